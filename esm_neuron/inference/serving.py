"""A trained model that stays in memory and predicts for sequences as they come, as in an endpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from esm_neuron.backends import create_backend
from esm_neuron.config import BackendName, DataConfig, TrainConfig
from esm_neuron.data.dataset import ExampleTable, join_tables
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.records import Column, text
from esm_neuron.data.sources import make_rows
from esm_neuron.errors import DataError
from esm_neuron.files import finite
from esm_neuron.inference.embed import per_record
from esm_neuron.inference.load import find_members
from esm_neuron.inference.predict import (
    MOST_RESIDUES,
    answers,
    check_coverage,
    piece_tokens,
    predict_table,
    prediction_table,
    table_pieces,
)
from esm_neuron.models.esm2 import Embedder
from esm_neuron.tasks.base import Predictions, Task
from esm_neuron.tasks.embedding import Embedding
from esm_neuron.training.evaluation import Evaluator


@dataclass
class Predictor:
    """A trained model, or the models of an ensemble, ready to predict; `load` makes one."""

    cfg: TrainConfig
    task: Task
    evaluators: Sequence[Evaluator]

    def predict(self, records: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Return the columns of `esm-neuron predict` for each (id, sequence), in order, with None for NaN.

        Bad residues and long sequences are treated as the run's data section says; it may refuse them with DataError.
        """
        return self.predict_tables([self.read(records)])[0]

    def read(self, records: Sequence[tuple[str, str]]) -> ExampleTable:
        """Return the proteins of a request as a table."""
        return _Request(records, self.cfg.data).read()

    def predict_tables(self, tables: Sequence[ExampleTable]) -> list[list[dict[str, Any]]]:
        """Return for each table what `predict` returns; their proteins share packs."""
        table = join_tables(tables)
        columns = answers(self.task, table, self._each(table))
        rows = zip(table.ids, *map(_plain, columns.values()), strict=True)
        return _parted([dict(zip(("id", *columns), row, strict=True)) for row in rows], tables)

    def embed_tables(self, tables: Sequence[ExampleTable]) -> list[list[dict[str, Any]]]:
        """Return for each table `id` and `embedding` of each protein, the mean state of its residues."""
        if len(self.evaluators) > 1:
            raise DataError("an ensemble has no one embedding; serve one of its runs")
        table = join_tables(tables)
        vectors = per_record(table, predict_table(self._embedder, self.cfg, table), per_residue=False)
        names = zip(table.ids, vectors, strict=True)
        return _parted([{"id": name, "embedding": vector.tolist()} for name, vector in names], tables)

    @cached_property
    def _embedder(self) -> Evaluator:
        own = self.evaluators[0]
        return Evaluator(Embedder(own.model, "mean"), Embedding(per_residue=False), own.backend)

    def table(self, source: Path, coverage: float | None = None) -> pa.Table:
        """Return the columns of `esm-neuron predict` for every record of a file, in order."""
        task, cfg = self.task, self.cfg
        check_coverage(task, coverage)
        most = MOST_RESIDUES if task.predictions_per_token else None
        pieces = table_pieces(
            InputChunks(source, cfg.data, most=most), piece_tokens(cfg, self.evaluators[0].backend.local_dp)
        )
        tables = (piece.content for piece in pieces)
        return pa.concat_tables(prediction_table(task, each, self._each(each), coverage) for each in tables)

    def _each(self, table: ExampleTable) -> list[Predictions]:
        """Return the predictions of each model."""
        return [predict_table(evaluator, self.cfg, table) for evaluator in self.evaluators]


class _Request(InputChunks):
    """The records of a request, which pass the same checks as those of a file."""

    def __init__(self, records: Sequence[tuple[str, str]], cfg: DataConfig) -> None:
        super().__init__("request", cfg)
        if not records:
            raise DataError("request: no records; send at least one")
        # JSON can hold what no file can: halves of surrogate pairs and zero bytes, which `text` refuses.
        ids, sequences = Column("id", "id", ""), Column("sequence", "sequence", "")
        self._records = [
            (text(name, "request", number, ids), text(sequence, "request", number, sequences).strip())
            for number, (name, sequence) in enumerate(records, start=1)
        ]

    def _chunks(self) -> Iterator[pa.Table]:
        ids, sequences = zip(*self._records, strict=True)
        yield make_rows({"line": range(1, len(ids) + 1), "id": ids, "sequence": sequences})


def load(
    model: str | Path, backend: BackendName | None = None, settings: Sequence[str] = (), command: str = "load"
) -> Predictor:
    """Load a trained model to run on `backend`, by default where it was trained; names and settings as for `predict`.

    `command` is what errors call it. Raise EsmNeuronError where the model or its weights cannot be used.
    """
    specs, task = find_members(model, backend, settings, command)
    created = create_backend(specs[0].cfg)
    evaluators = [Evaluator(spec.load(task, created).model, task, created) for spec in specs]
    return Predictor(specs[0].cfg, task, evaluators)


def _parted(rows: list[dict[str, Any]], tables: Sequence[ExampleTable]) -> list[list[dict[str, Any]]]:
    """Return the rows of each table."""
    left = iter(rows)
    return [list(islice(left, len(table.ids))) for table in tables]


def _plain(column: Sequence[Any] | np.ndarray) -> list[Any]:
    """Return a column as Python's own numbers, lists and strings, with None for what is not finite: JSON has no NaN."""
    return [finite(value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value) for value in column]
