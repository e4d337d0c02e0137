"""Read a source for prediction or evaluation: every record of it, in chunks."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import DataConfig
from esm_neuron.data.dataset import ExampleTable, chunk_table, join_tables
from esm_neuron.data.filters import passes
from esm_neuron.data.labels import Labels
from esm_neuron.data.sources import check_columns, check_sheet, filter_column, read_chunks
from esm_neuron.data.validation import Checker, Problems, RejectedRows, Report, quote
from esm_neuron.errors import DataError

SHOWN = 10
"""Values of a column that an error shows."""


class InputChunks:
    """Give the tables of a file chunk by chunk: without labels for prediction, or with them for evaluation.

    Can be iterated any number of times. A bad record raises DataError only after the last chunk, so iterate once before
    anything is made of the tables (which costs little), or keep the results back until the end.

    Columns, filters, bad residues and long sequences are treated as `cfg` says; of splits nothing is known. `labels`
    are those of a finished run, with its class names; `most` is the largest number of residues of a protein, those that
    are cut off included.
    """

    def __init__(
        self, path: str | Path, cfg: DataConfig, labels: Labels | None = None, most: int | None = None
    ) -> None:
        self.path, self._labels, self.most = str(path), labels, most
        self.cfg = replace(cfg, split_column=None, valid_column=None, unique_column=None)
        self._filters = {**cfg.keep, **cfg.keep_heldout}
        self.report = Report(name=self.path)
        """What the last iteration has read and done so far."""
        self.rejected = RejectedRows()
        """The rows that the last iteration has left out or changed so far."""

    def check(self) -> None:
        """Raise DataError where the file is missing or lacks a column; reads no more than its first record."""
        check_sheet([self.path], self.cfg.sheet)
        check_columns(self.path, self.cfg, None if self._labels is None else self._labels.joiner)

    def __iter__(self) -> Iterator[ExampleTable]:
        """Give a table per chunk; `record` counts from 0 in each of them."""
        cuts, labels = Counter[str](), self._labels
        checker = Checker(self.cfg, self.path, *(() if labels is None else (labels.nothing,)))
        self.rejected, filtered = checker.rejected, 0
        values = {source: set[str]() for source in self._filters}
        for read in self._chunks():
            for source, there in values.items():
                there.update(heapq.nsmallest(SHOWN, there.union(read[filter_column(source)].unique().to_pylist())))
            chosen = read.filter(pa.array(passes(read, self.cfg.keep) & passes(read, self.cfg.keep_heldout)))
            filtered += len(read) - len(chosen)
            rows = checker(chosen)
            if self.most is not None:
                self._refuse_longer(rows, self.most, checker.problems)
            if len(rows):
                rows = rows if labels is None else labels.encode(rows, checker.problems)
                table, more = chunk_table(rows, self.cfg, labels, checker.problems)
                cuts.update(more)
            self.report = Report(name=self.path, **{**cuts, **checker.counts, "filtered": filtered})
            # After the first problem no table is given, but all rows are still read: the error then lists every
            # problem.
            if len(rows) and not checker.problems.total:
                yield table
        if labels is not None:
            labels.conclude(checker.problems)
        checker.finish()
        if not checker.counts["rows"] and filtered:
            shown = {source: sorted(there)[:SHOWN] for source, there in values.items()}
            raise DataError(f"{self.path}: data.keep leaves no records; use values that are there, such as {shown}")

    @staticmethod
    def _refuse_longer(rows: pa.Table, most: int, problems: Problems) -> None:
        for row in np.flatnonzero(pc.binary_length(rows["sequence"]).to_numpy() > most).tolist():
            what = f"the sequence of {quote(rows['id'][row].as_py())} has {len(rows['sequence'][row].as_py())} residues"
            cure = "correct it, or leave such records out with data.long_sequences=skip"
            problems.add(rows["line"][row].as_py(), f"{what}, and each has a result, which is for up to {most}; {cure}")

    def _chunks(self) -> Iterator[pa.Table]:
        return read_chunks(self.path, self.cfg, None if self._labels is None else self._labels.joiner)

    def read(self) -> ExampleTable:
        """Return the whole file as one table in memory."""
        return join_tables(self)
