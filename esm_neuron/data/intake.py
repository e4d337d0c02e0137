"""From files to the checked rows of each split: read in chunks, filtered, checked, divided.

Rows that stay are Arrow tables, in memory or in a file that is mapped, so that a corpus need not fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from esm_neuron.config import DataConfig, require
from esm_neuron.data.labels import Labels
from esm_neuron.data.records import LIST_JOINER, row_unit
from esm_neuron.data.sources import CHUNK_ROWS, filter_column, make_rows, read_chunks
from esm_neuron.data.validation import Checker, Rejected, Report, quote
from esm_neuron.errors import DataError

SPLITS = ("train", "valid", "test")

_SHOWN = 10
"""Values of a column that an error shows."""


@dataclass(frozen=True)
class Part:
    """Rows on their way to a split, and the file they are from."""

    rows: pa.Table
    """The kept rows of the whole file."""
    source: str
    mask: np.ndarray
    """bool [rows]: which of them are the part's."""

    @classmethod
    def of(cls, rows: pa.Table, source: str) -> Part:
        """All rows of a table."""
        return cls(rows, source, np.ones(len(rows), dtype=bool))

    def __len__(self) -> int:
        return int(self.mask.sum())

    def chunks(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The part's rows, in order, those of CHUNK_ROWS rows of the file at a time; all columns or those named."""
        rows = self.rows if columns is None else self.rows.select(list(columns))
        for start in range(0, len(rows), CHUNK_ROWS):
            mask = self.mask[start : start + CHUNK_ROWS]
            if mask.any():
                yield rows.slice(start, CHUNK_ROWS).filter(pa.array(mask))

    def column(self, name: str) -> list[str]:
        """The values of one column."""
        return [value for chunk in self.chunks([name]) for value in chunk[name].to_pylist()]

    def take(self, chosen: np.ndarray) -> Part:
        """The rows of the part where `chosen`, bool [rows of the part], holds."""
        mask = self.mask.copy()
        mask[mask] = chosen
        return replace(self, mask=mask)


class Spool:
    """Where rows are put as they come: memory, or a file that is mapped when it is read.

    Args:
        path: the file to write; None: memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._tables: list[pa.Table] = []
        self._writer: pa.RecordBatchFileWriter | None = None

    def add(self, rows: pa.Table) -> None:
        """Put rows behind those that are there; all have the same columns."""
        if self._path is None:
            self._tables.append(rows)
            return
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._path, rows.schema)
        self._writer.write_table(rows)

    def table(self) -> pa.Table:
        """All rows; nothing can be added after."""
        if self._writer is not None:
            self._writer.close()
            return pa.ipc.open_file(pa.memory_map(str(self._path))).read_all()
        return pa.concat_tables(self._tables) if self._tables else make_rows({"id": [], "sequence": [], "line": []})


@dataclass
class _File:
    """One file while it is read: its kept rows and all that its errors and its report tell."""

    split: str
    source: str
    cfg: DataConfig
    """With the split column and the held-out filter only where they are this file's."""
    spool: Spool
    checker: Checker
    labels: Labels | None
    """Reads the labels; None: rows have none."""
    rows: int = 0
    filtered: int = 0
    filtered_heldout: int = 0
    codes: list[np.ndarray] = field(default_factory=list)
    """int8 [kept rows] of each chunk: the index in SPLITS of the split of each row."""
    named: set[str] = field(default_factory=set)
    """Splits of the rows that pass `keep`."""
    usable: set[str] = field(default_factory=set)
    """Splits of the rows that pass `keep_heldout` as well."""
    unknown: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Value of the split column that no split has -> how many rows, the first of them."""
    found: dict[str, set[str]] = field(default_factory=dict)
    """Filtered column -> the keys of its allowed values that some row has."""
    shown: dict[str, list[str]] = field(default_factory=dict)
    """Filtered column -> the first of its values, sorted."""

    def read(self) -> None:
        """Read, filter and check all rows; what is wrong with them is told by `finish`."""
        joiner = LIST_JOINER if self.labels is None else self.labels.joiner
        for rows in read_chunks(self.source, self.cfg, self.labels is not None, joiner):
            self.rows += len(rows)
            self._note_values(rows)
            kept = rows.filter(pa.array(passes(rows, self.cfg.keep)))
            names = self._members(kept)
            self.named.update(name for name in names if name)
            usable = np.array([name == "train" for name in names], dtype=bool)
            if not usable.all():
                usable |= passes(kept, self.cfg.keep_heldout)
                usable &= np.array([bool(name) for name in names], dtype=bool)
            self.usable.update(name for name, use in zip(names, usable, strict=True) if use)
            self.filtered += len(rows) - len(kept)
            self.filtered_heldout += int((~usable).sum())
            self._keep(kept.filter(pa.array(usable)))

    def _keep(self, rows: pa.Table) -> None:
        if not len(rows):
            return
        clean = self.checker(rows)
        if len(clean):
            self.codes.append(np.array([SPLITS.index(name) for name in self._members(clean)], dtype=np.int8))
            self.spool.add(clean if self.labels is None else self.labels.encode(clean, self.checker.problems))

    def _note_values(self, rows: pa.Table) -> None:
        for source in {**self.cfg.keep, **self.cfg.keep_heldout}:
            values = set(rows[filter_column(source)].to_pylist())
            allowed = {_filter_key(v) for v in (*self.cfg.keep.get(source, ()), *self.cfg.keep_heldout.get(source, ()))}
            self.found.setdefault(source, set()).update(allowed & {_filter_key(value) for value in values})
            self.shown[source] = sorted(values.union(self.shown.get(source, ())))[:_SHOWN]

    def _members(self, rows: pa.Table) -> list[str]:
        """The split of each row: by the split column where the file has one; '' for a value that names none."""
        if self.cfg.split_column is None:
            return [self.split] * len(rows)
        names = dict(zip(self.cfg.split_names, SPLITS, strict=True))
        values = rows["split"].to_pylist()
        for value, line in zip(values, rows["line"].to_pylist(), strict=True):
            if value not in names:
                count, first = self.unknown.get(value, (0, line))
                self.unknown[value] = (count + 1, first)
        return [names.get(value, "") for value in values]

    def finish(self) -> tuple[dict[str, Part], Report]:
        """The part of each split that has rows.

        Raises:
            DataError: a filter leaves nothing, a split is unknown, or rows cannot be used.
        """
        if self.filtered == self.rows:
            raise DataError(f"{self.source}: data.keep leaves no rows; allow more values")
        if self.unknown:
            self._refuse_unknown()
        _check_members(self.source, self.named, self.usable, "data.keep_heldout leaves", "allow more values")
        report = self.checker.finish()
        codes = np.concatenate(self.codes)
        left = {SPLITS[code] for code in np.unique(codes)}
        _check_members(self.source, self.named, left, "data.on_bad_residue=skip leaves", "correct their sequences")
        table = self.spool.table()
        parts = {name: Part(table, self.source, codes == SPLITS.index(name)) for name in sorted(left)}
        return parts, replace(report, rows=self.rows, filtered=self.filtered, filtered_heldout=self.filtered_heldout)

    def _refuse_unknown(self) -> None:
        unit = row_unit(self.source)
        shown = ", ".join(
            f"{quote(value)} ({count} rows, first in {unit} {first})"
            for value, (count, first) in list(self.unknown.items())[:5]
        )
        raise DataError(
            f"{self.source}: column {self.cfg.split_column!r} has {len(self.unknown)} values that are not in "
            f"data.split_names={self.cfg.split_names}: {shown}; name the splits there, or filter the rows with "
            "data.keep"
        )


def read_parts(
    cfg: DataConfig, labels: Labels | None, folder: Path | None
) -> tuple[dict[str, Part], list[Report], list[Rejected]]:
    """The checked rows of each split that has any, a report a file, and the rows that were left out or changed.

    Args:
        cfg: files, columns and filters.
        labels: replaces the text of each label by its codes; None: rows have no labels.
        folder: where kept rows are put as files; None: they are kept in memory.

    Raises:
        DataError: a file or a row cannot be used; a filter value that no row has; a split without rows.
        ConfigError: a split has two origins.
    """
    files = [_open(cfg, split, path, labels, folder) for split, path in data_files(cfg).items()]
    for file in files:
        file.read()
    _check_filters(cfg, files)
    parts: dict[str, Part] = {}
    reports = []
    for file in files:
        own, report = file.finish()
        reports.append(report)
        for name, part in own.items():
            require(name == file.split or name not in data_files(cfg), _twice(cfg, name))
            parts[name] = part
    if "train" not in parts:
        raise DataError(
            f"{cfg.train}: no row has {cfg.split_names[0]!r} in column {cfg.split_column!r} "
            "(data.split_column); set data.split_names to the values for training, validation and test"
        )
    return parts, reports, [row for file in files for row in file.checker.rejected]


def data_files(cfg: DataConfig) -> dict[str, str]:
    """Split -> the file that the configuration names for it, where it names one."""
    return {split: path for split, path in zip(SPLITS, (cfg.train, cfg.valid, cfg.test), strict=True) if path}


def passes(rows: pa.Table, filters: Mapping[str, Sequence[str]]) -> np.ndarray:
    """bool [rows]: which rows have an allowed value in every column of the filter."""
    mask = np.ones(len(rows), dtype=bool)
    for source, allowed in filters.items():
        keys = {_filter_key(value) for value in allowed}
        values = rows[filter_column(source)].to_pylist()
        mask &= np.array([_filter_key(value) in keys for value in values], dtype=bool)
    return mask


def _open(data: DataConfig, split: str, path: str, labels: Labels | None, folder: Path | None) -> _File:
    """A file to read; only the training file has a split column."""
    own = data if split == "train" else replace(data, split_column=None)
    sampled = (not data.valid and data.valid_fraction > 0) or data.test_fraction > 0
    if split == "train" and data.split_column is None and not sampled:
        own = replace(own, keep_heldout={})
    spool = Spool(None if folder is None else folder / f"{split}.arrow")
    return _File(split, path, own, spool, Checker(own, path), labels)


def _filter_key(value: str) -> str:
    """Values are compared as strings, but True, TRUE and true are one."""
    return value.lower() if value.lower() in ("true", "false") else value


def _check_filters(cfg: DataConfig, files: Sequence[_File]) -> None:
    """Refuse a filter value that no row of any file has: it is a slip of the pen."""
    for setting, filters in (("keep", cfg.keep), ("keep_heldout", cfg.keep_heldout)):
        for source, allowed in filters.items():
            having = [file for file in files if source in getattr(file.cfg, setting)]
            if not having:  # no held-out rows at all: a file that should have the column was refused when it was read
                continue
            found = set().union(*(file.found[source] for file in having))
            missing = [value for value in allowed if _filter_key(value) not in found]
            if missing or not allowed:
                what = f"value {quote(missing[0])} matches no row" if missing else "the list of values is empty"
                values = sorted(set().union(*(file.shown[source] for file in having)))[:_SHOWN]
                shown, where = ", ".join(map(quote, values)), ", ".join(file.source for file in having)
                raise DataError(
                    f"{where}: data.{setting}, column {source!r}: {what}; use values that are there, such as {shown}"
                )


def _check_members(source: str, before: set[str], after: set[str], reason: str, cure: str) -> None:
    """Refuse that a split which had rows has none now."""
    for name in sorted(before - after):
        raise DataError(f"{source}: {reason} no {name} rows; {cure}")


def _twice(cfg: DataConfig, split: str) -> str:
    return (
        f"{split} rows come both from data.{split} and from data.split_column={cfg.split_column!r}; "
        f"leave out data.{split}, or filter those rows with data.keep"
    )
