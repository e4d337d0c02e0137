"""From files to the three splits: filter, check, divide, name the classes, cut long sequences, tokenize, count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from esm_neuron.config import DataConfig, TrainConfig, require
from esm_neuron.data.batch import ExampleTable, join_tables
from esm_neuron.data.records import row_unit
from esm_neuron.data.sources import CHUNK_ROWS, filter_column, read_chunks, read_rows
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.data.validate import Checker, Problems, Rejected, Report, check_rows, quote
from esm_neuron.errors import DataError

SPLITS = ("train", "valid", "test")

_CUTS = ("cropped", "cropped_residues", "windowed", "windows")
"""Counts of a `Report` that are made by cutting long sequences."""

_SAMPLING = 2**63
"""Keeps the random numbers of the sampling apart from others drawn from the same seed."""


@dataclass(frozen=True)
class Splits:
    """The data of a run."""

    train: ExampleTable
    valid: ExampleTable | None
    test: ExampleTable | None
    labels: tuple[str, ...]
    """Class names; class i is `labels[i]`. Empty for a task without labels."""
    reports: tuple[Report, ...]
    """One a file, then one a split."""
    fingerprint: str
    """sha256 (hex) of tokens, weights, labels, ids and class names: equal for equal data. A resumed run compares it."""
    sampled_valid: tuple[str, ...]
    """Ids of the validation rows where they were sampled from the training rows, to be written with the run."""

    def summary(self) -> str:
        """What was read, left out, changed and shared between splits: a line a file and a line a split."""
        return "\n".join(report.summary() for report in self.reports)


@dataclass(frozen=True)
class _Part:
    """Rows on their way, and the file they are from."""

    rows: pa.Table
    source: str

    def column(self, name: str) -> list[str]:
        return list(self.rows[name].to_pylist())

    def take(self, mask: np.ndarray) -> _Part:
        return replace(self, rows=self.rows.filter(pa.array(mask)))


def load_splits(cfg: TrainConfig, needs_labels: bool) -> Splits:
    """Read, check and tokenize the data of a run, with labels where its task needs them.

    Order: rows are read; `data.keep` and `data.keep_heldout` filter them; ids, sequences and labels of the rest are
    checked; validation rows are sampled where neither a file nor the split column gives any (from the training rows
    that pass `data.keep_heldout`); long sequences are cut.

    Raises:
        DataError: a file or a row cannot be used, see `sources`, `validate`; a label that training does not know; fewer
            than two classes; a split without rows.
        ConfigError: settings that contradict each other.
    """
    require(cfg.data.train is not None, "data.train is not given; name the training file: --data.train FILE")
    require(
        len(set(cfg.data.split_names)) == 3, f"data.split_names={cfg.data.split_names} must be three different names"
    )
    files = _read_files(cfg.data, needs_labels)
    _check_filters(cfg.data, list(files.values()))
    parts, reports = _divide(cfg.data, files)
    labels = _class_names(cfg, parts["train"]) if needs_labels else None
    sampled: tuple[str, ...] = ()
    if "valid" not in parts and cfg.data.valid_fraction > 0:
        chosen = _sample(parts["train"], cfg)
        parts |= {"train": parts["train"].take(~chosen), "valid": parts["train"].take(chosen)}
        sampled = tuple(parts["valid"].column("id"))
    tables: dict[str, ExampleTable] = {}
    for name in (split for split in SPLITS if split in parts):
        tables[name], report = _table(parts[name], cfg.data, labels)
        reports.append(replace(report, name=f"{name} split", **_shared(name, parts)))
    names = labels or ()
    return Splits(
        train=tables["train"],
        valid=tables.get("valid"),
        test=tables.get("test"),
        labels=names,
        reports=tuple(reports),
        fingerprint=_fingerprint(tables, names),
        sampled_valid=sampled,
    )


class InputChunks:
    """One whole file in its order, a chunk at a time: without labels for prediction, or with them for evaluation.

    Can be iterated any number of times; a bad row anywhere is an error after the last chunk, so what was made of the
    chunks before must not be final until then (or iterate once in advance: it costs little).

    The split column and the row filters of `cfg` are for training and are not applied.

    Args:
        path: the file, see `sources.read_chunks`.
        cfg: columns, treatment of bad residues and of long sequences.
        labels: class i is `labels[i]`; None: labels are not read.
        rows: most rows in a chunk.
    """

    def __init__(
        self, path: str | Path, cfg: DataConfig, labels: Sequence[str] | None = None, rows: int = CHUNK_ROWS
    ) -> None:
        self._path, self._labels, self._rows = str(path), labels, rows
        self._cfg = replace(cfg, split_column=None, keep={}, keep_heldout={})
        self.report = Report(name=self._path)
        """What the last iteration has read and done so far."""
        self.rejected: list[Rejected] = []
        """The rows that the last iteration has left out or changed so far."""

    def __iter__(self) -> Iterator[ExampleTable]:
        """Tables of one chunk each; `record` counts from 0 in each of them.

        Raises:
            DataError: the file or a row cannot be used; a label that is not in `labels`.
        """
        checker = Checker(self._cfg, self._path)
        self.rejected = checker.rejected
        cut = Report(name=self._path)
        for rows in checker.chunks(read_chunks(self._path, self._cfg, self._labels is not None, rows=self._rows)):
            table, more = _table(_Part(rows, self._path), self._cfg, self._labels)
            cut = replace(cut, **{name: getattr(cut, name) + getattr(more, name) for name in _CUTS})
            self.report = replace(checker.report(), **{name: getattr(cut, name) for name in _CUTS})
            yield table
        self.report = replace(checker.report(), **{name: getattr(cut, name) for name in _CUTS})


def load_inputs(path: str | Path, cfg: DataConfig, labels: Sequence[str] | None = None) -> tuple[ExampleTable, Report]:
    """One whole file in memory, see `InputChunks`.

    Raises:
        DataError: the file or a row cannot be used; a label that is not in `labels`.
    """
    chunks = InputChunks(path, cfg, labels)
    table = join_tables(list(chunks))
    return table, chunks.report


def _read_files(data: DataConfig, need_label: bool) -> dict[str, _Part]:
    """The rows of each file that the config names; only the training file has a split column."""
    paths = {split: path for split, path in zip(SPLITS, (data.train, data.valid, data.test), strict=True) if path}
    files = {}
    for split, path in paths.items():
        own = data if split == "train" else replace(data, split_column=None)
        only_training_rows = split == "train" and data.split_column is None and (data.valid or data.valid_fraction == 0)
        if only_training_rows:
            own = replace(own, keep_heldout={})
        files[split] = _Part(read_rows(path, own, need_label), path)
    return files


def _filter_key(value: str) -> str:
    """Values are compared as strings, but True, TRUE and true are one."""
    return value.lower() if value.lower() in ("true", "false") else value


def _check_filters(cfg: DataConfig, files: Sequence[_Part]) -> None:
    """Refuse a filter value that no row of any file has: it is a slip of the pen."""
    for setting, filters in (("data.keep", cfg.keep), ("data.keep_heldout", cfg.keep_heldout)):
        for source, allowed in filters.items():
            name = filter_column(source)
            having = [file for file in files if name in file.rows.column_names]
            if (
                not having
            ):  # no held-out rows at all, so nothing to filter: `read_rows` refuses a file that should have it
                continue
            there = {value for file in having for value in file.column(name)}
            keys = {_filter_key(value) for value in there}
            missing = [value for value in allowed if _filter_key(value) not in keys]
            if missing or not allowed:
                what = f"value {quote(missing[0])} matches no row" if missing else "the list of values is empty"
                shown = ", ".join(quote(value) for value in sorted(there)[:10])
                where = ", ".join(file.source for file in having)
                raise DataError(
                    f"{where}: {setting}, column {source!r}: {what}; use values that are there, such as {shown}"
                )


def _passes(part: _Part, filters: Mapping[str, Sequence[str]]) -> np.ndarray:
    """bool [rows]: which rows have an allowed value in every column of the filter."""
    passes = np.ones(len(part.rows), dtype=bool)
    for source, allowed in filters.items():
        keys = {_filter_key(value) for value in allowed}
        passes &= np.array([_filter_key(value) in keys for value in part.column(filter_column(source))], dtype=bool)
    return passes


def _divide(cfg: DataConfig, files: Mapping[str, _Part]) -> tuple[dict[str, _Part], list[Report]]:
    """The checked rows of each split that has any, and a report a file."""
    parts: dict[str, _Part] = {}
    reports = []
    for split, file in files.items():
        kept = file.take(_passes(file, cfg.keep))
        if len(kept.rows) == 0:
            raise DataError(f"{file.source}: data.keep leaves no rows; allow more values")
        named = _members(cfg, kept, split)
        usable = named == "train"
        if not usable.all():
            usable |= _passes(kept, cfg.keep_heldout)
        _check_members(file.source, named, named[usable], "data.keep_heldout leaves", "allow more values")
        rows, report = check_rows(kept.take(usable).rows, cfg, file.source)
        clean = replace(file, rows=rows)
        left = _members(cfg, clean, split)
        _check_members(file.source, named, left, "data.on_bad_residue=skip leaves", "correct their sequences")
        filtered, heldout = len(file.rows) - len(kept.rows), int((~usable).sum())
        reports.append(replace(report, rows=len(file.rows), filtered=filtered, filtered_heldout=heldout))
        for name in np.unique(left).tolist():
            require(name == split or name not in files, _twice(cfg, name))
            parts[name] = clean.take(left == name)
    if "train" not in parts:
        raise DataError(
            f"{files['train'].source}: no row has {cfg.split_names[0]!r} in column {cfg.split_column!r} "
            "(data.split_column); set data.split_names to the values for training, validation and test"
        )
    return parts, reports


def _check_members(source: str, before: np.ndarray, after: np.ndarray, reason: str, cure: str) -> None:
    """Refuse that a split which had rows has none now."""
    for name in np.setdiff1d(before, after).tolist():
        raise DataError(f"{source}: {reason} no {name} rows; {cure}")


def _twice(cfg: DataConfig, split: str) -> str:
    return (
        f"{split} rows come both from data.{split} and from data.split_column={cfg.split_column!r}; "
        f"leave out data.{split}, or filter those rows with data.keep"
    )


def _members(cfg: DataConfig, part: _Part, split: str) -> np.ndarray:
    """str [rows]: the split of each row: by the split column where the file has one, else `split`."""
    if "split" not in part.rows.column_names:
        return np.full(len(part.rows), split)
    values = part.column("split")
    unknown = {value: None for value in values if value not in cfg.split_names}
    if unknown:
        shown = ", ".join(
            f"{quote(value)} ({values.count(value)} rows, first in {row_unit(part.source)} "
            f"{part.rows['line'][values.index(value)]})"
            for value in list(unknown)[:5]
        )
        raise DataError(
            f"{part.source}: column {cfg.split_column!r} has {len(unknown)} values that are not in "
            f"data.split_names={cfg.split_names}: {shown}; name the splits there, or filter the rows with data.keep"
        )
    names = dict(zip(cfg.split_names, SPLITS, strict=True))
    return np.array([names[value] for value in values])


def _class_names(cfg: TrainConfig, train: _Part) -> tuple[str, ...]:
    """The configured class names, or the sorted labels of the training rows."""
    present = sorted(set(train.column("label")))
    labels = cfg.task.labels if cfg.task.labels is not None else tuple(present)
    require(len(set(labels)) == len(labels), f"task.labels={labels} has a name twice; name each class once")
    if len(present) < 2:
        raise DataError(
            f"{train.source}: column {cfg.data.label_column!r} has one class only, {quote(present[0])}, in the "
            "training rows; two are needed, check data.label_column and data.keep"
        )
    return labels


def _sample(train: _Part, cfg: TrainConfig) -> np.ndarray:
    """bool [rows]: rows drawn for validation by `seed`, each class with its share; every class keeps a row to train on.

    Systematic sampling: rows in random order, sorted by class, then one taken at every 1 / fraction.
    """
    fraction = cfg.data.valid_fraction
    rng = np.random.default_rng([cfg.seed, _SAMPLING])
    order = rng.permutation(len(train.rows))
    if "label" in train.rows.column_names:
        labels = train.column("label")
        index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        classes = np.array([index[label] for label in labels])[order]
        order = order[np.argsort(classes, kind="stable")]
        order = order[np.diff(np.sort(classes), prepend=-1) == 0]
    else:
        order = order[1:]
    order = order[_passes(train, cfg.data.keep_heldout)[order]]
    number = min(len(order), max(1, round(fraction * len(train.rows))))
    if number == 0:
        raise DataError(
            f"{train.source}: {len(train.rows)} training rows are too few to sample validation rows from; "
            "give data.valid, or data.valid_fraction=0 for none"
        )
    chosen = np.zeros(len(train.rows), dtype=bool)
    every = (np.arange(number) + rng.random()) * len(order) / number
    chosen[order[every.astype(np.int64)]] = True
    return chosen


def _table(part: _Part, cfg: DataConfig, labels: Sequence[str] | None) -> tuple[ExampleTable, Report]:
    """Tokenized rows, long sequences cut, and how many were; without labels where `labels` is None."""
    ids, sequences, lines = part.column("id"), part.column("sequence"), part.rows["line"].to_pylist()
    problems = Problems(part.source)
    pieces: list[str] = []
    counts = np.ones(len(ids), dtype=np.int64)
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    for i, sequence in enumerate(sequences):
        cut = cut_sequence(sequence, cfg)
        counts[i] = len(cut)
        pieces += cut
    long = lengths > cfg.max_residues
    if cfg.long_sequences == "refuse":
        for i in np.flatnonzero(long):
            problems.add(lines[i], _too_long(ids[i], int(lengths[i]), cfg.max_residues))
    targets = np.empty(0, dtype=np.int64)
    if labels is not None:
        targets = _targets(part, cfg, labels, problems)
    problems.raise_any()
    tokens, offsets = encode_many(pieces)
    record = np.repeat(np.arange(len(ids), dtype=np.int64), counts)
    weight = (1 / counts[record]).astype(np.float32)
    report = Report(name=part.source, rows=len(ids))
    if cfg.long_sequences == "window":
        report = replace(report, windowed=int(long.sum()), windows=int(counts[long].sum()))
    else:
        cropped = int((lengths - cfg.max_residues)[long].sum())
        report = replace(report, cropped=int(long.sum()), cropped_residues=cropped)
    return ExampleTable(tokens, offsets, record, weight, targets, ids), report


def _too_long(name: str, length: int, limit: int) -> str:
    cure = "raise data.max_residues, or choose data.long_sequences=crop, crop_ends or window"
    return f"the sequence of {quote(name)} has {length} residues, more than data.max_residues={limit}; {cure}"


def _targets(part: _Part, cfg: DataConfig, labels: Sequence[str], problems: Problems) -> np.ndarray:
    """int64 [rows]: class indices."""
    index = {label: i for i, label in enumerate(labels)}
    targets = np.zeros(len(part.rows), dtype=np.int64)
    known = ", ".join(quote(label) for label in labels[:20]) + (", ..." if len(labels) > 20 else "")
    for i, label in enumerate(part.column("label")):
        if label in index:
            targets[i] = index[label]
        else:
            cure = "correct it, add training rows of it, or filter it with data.keep"
            message = f"column {cfg.label_column!r}: label {quote(label)} is not one of the classes {known}; {cure}"
            problems.add(part.rows["line"][i].as_py(), message)
    return targets


def cut_sequence(sequence: str, cfg: DataConfig) -> list[str]:
    """The examples that a sequence becomes: itself, or where it is longer than `cfg.max_residues` n what
    `cfg.long_sequences` makes of it: its first n residues; its first ceil(n / 2) and last floor(n / 2); or windows of n
    that share `cfg.window_overlap` residues, the last one moved back to end with the sequence."""
    n, length = cfg.max_residues, len(sequence)
    if length <= n or cfg.long_sequences == "refuse":
        return [sequence]
    if cfg.long_sequences == "crop":
        return [sequence[:n]]
    if cfg.long_sequences == "crop_ends":
        return [sequence[: n - n // 2] + sequence[length - n // 2 :]]
    starts = [*range(0, length - n, n - cfg.window_overlap), length - n]
    return [sequence[start : start + n] for start in starts]


def _shared(name: str, parts: Mapping[str, _Part]) -> dict[str, int]:
    """Exact repeats of whole sequences: within the split, with training, and those whose labels disagree."""
    part, train = parts[name], parts["train"]
    sequences = part.column("sequence")
    in_train = set(train.column("sequence")) if name != "train" else set()
    known: dict[str, set[str]] = {}
    for other in {id(p): p for p in (part, train)}.values():
        if "label" in other.rows.column_names:
            for sequence, label in zip(other.column("sequence"), other.column("label"), strict=True):
                known.setdefault(sequence, set()).add(label)
    return {
        "repeated": len(sequences) - len(set(sequences)),
        "in_train": sum(sequence in in_train for sequence in sequences),
        "conflicting": sum(len(known.get(sequence, ())) > 1 for sequence in sequences),
    }


def _fingerprint(tables: Mapping[str, ExampleTable], labels: Sequence[str]) -> str:
    digest = hashlib.sha256(repr(tuple(labels)).encode())
    for name, table in tables.items():
        digest.update(f"{name} {len(table)}".encode())
        for array in (table.tokens, table.offsets, table.record, table.weight, table.labels):
            digest.update(np.ascontiguousarray(array).data)
        digest.update(repr(list(table.ids)).encode())
    return digest.hexdigest()
