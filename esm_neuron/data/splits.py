"""From files to the three splits: rows are divided, classes named, long sequences cut, tokenized, counted; cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from esm_neuron.config import DataConfig, TrainConfig, require
from esm_neuron.data.batch import ExampleTable
from esm_neuron.data.intake import SPLITS, Part, data_files, passes, read_parts
from esm_neuron.data.records import LIST_JOINER
from esm_neuron.data.sources import CHUNK_ROWS, read_chunks
from esm_neuron.data.store import TableWriter, cached, content_hash, content_key, open_table
from esm_neuron.data.tokenizer import VOCABULARY, encode_many
from esm_neuron.data.validate import Checker, Problems, Rejected, Report, quote, text_hashes
from esm_neuron.errors import DataError

_CUTS = ("cropped", "cropped_residues", "windowed", "windows")
"""Counts of a `Report` that are made by cutting long sequences."""
_SAMPLING = 2**63
"""Keeps the random numbers of the sampling apart from others drawn from the same seed."""
_CACHE_VERSION = 1
"""Of what `_save` writes: another number makes every cached folder anew."""
_UNCACHED_DATA = {"cache", "packing", "row_tokens", "max_segments", "max_buckets"}
_UNCACHED_TASK = {"label_smoothing", "mask_probability"}
"""Settings that change nothing in the tables."""
_META = "splits.json"
_ROWS = {"valid": "validation", "test": "test"}
"""Split -> what errors call its rows."""


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
    sampled: Mapping[str, tuple[str, ...]]
    """Split -> ids of its rows where they were sampled from the training rows, to be written with the run."""
    rejected: tuple[Rejected, ...]
    """The rows left out or changed for their characters (`data.on_bad_residue`), to be written with the run."""

    def summary(self) -> str:
        """What was read, left out, changed and shared between splits: a line a file and a line a split."""
        return "\n".join(report.summary() for report in self.reports)


def load_splits(cfg: TrainConfig, needs_labels: bool) -> Splits:
    """Read, check and tokenize the data of a run, with labels where its task needs them.

    Order: rows are read; `data.keep` and `data.keep_heldout` filter them; ids, sequences and labels of the rest are
    checked; validation and test rows are sampled where neither a file nor the split column gives any (from the training
    rows that pass `data.keep_heldout`); long sequences are cut.

    With `data.cache` all this is done once for the same files and settings, on any number of processes, and the tables
    are files mapped into memory; the result is the same with and without.

    Raises:
        DataError: a file or a row cannot be used, see `sources`, `validate`; a label that training does not know; fewer
            than two classes; a split without rows.
        ConfigError: settings that contradict each other; a cache folder that cannot be written.
    """
    require(cfg.data.train is not None, "data.train is not given; name the training file: --data.train FILE")
    require(
        len(set(cfg.data.split_names)) == 3, f"data.split_names={cfg.data.split_names} must be three different names"
    )
    if cfg.data.cache is None:
        return _make(cfg, needs_labels, None)
    key = content_key(_cache_key(cfg, needs_labels))
    folder = cached(Path(cfg.data.cache), key, lambda aside: _save(_make(cfg, needs_labels, aside), aside))
    return _load(folder)


def _make(cfg: TrainConfig, needs_labels: bool, folder: Path | None) -> Splits:
    """The splits from the files, tables in memory or under `folder`."""
    parts, reports, rejected = read_parts(cfg.data, needs_labels, LIST_JOINER, folder)
    labels = _class_names(cfg, parts["train"]) if needs_labels else None
    sampled: dict[str, tuple[str, ...]] = {}
    for name, fraction in (("valid", cfg.data.valid_fraction), ("test", cfg.data.test_fraction)):
        if name not in parts and fraction > 0:
            chosen = _sample(parts["train"], cfg, name, fraction)
            parts |= {"train": parts["train"].take(~chosen), name: parts["train"].take(chosen)}
            sampled[name] = tuple(parts[name].column("id"))
    tables: dict[str, ExampleTable] = {}
    shared = _shared(parts)
    for name in (split for split in SPLITS if split in parts):
        tables[name], report = _table(parts[name], cfg.data, labels, None if folder is None else folder / name)
        reports.append(replace(report, name=f"{name} split", **shared[name]))
    if folder is not None:
        for spool in folder.glob("*.arrow"):
            spool.unlink()
    names = labels or ()
    return Splits(
        train=tables["train"],
        valid=tables.get("valid"),
        test=tables.get("test"),
        labels=names,
        reports=tuple(reports),
        fingerprint=_fingerprint(tables, names),
        sampled=sampled,
        rejected=tuple(rejected),
    )


def _cache_key(cfg: TrainConfig, needs_labels: bool) -> list[object]:
    """All that the tables follow from: the files' content, settings that matter, the alphabet, this code's version."""
    data = {name: value for name, value in asdict(cfg.data).items() if name not in _UNCACHED_DATA}
    task = {name: value for name, value in asdict(cfg.task).items() if name not in _UNCACHED_TASK}
    content = [content_hash(path) for path in data_files(cfg.data).values()]
    return [_CACHE_VERSION, VOCABULARY, needs_labels, cfg.seed, data, task, content]


def _save(splits: Splits, folder: Path) -> None:
    """Write what `_load` reads back beside the tables, which `_make` has put in `folder`."""
    meta = {
        "splits": [name for name in SPLITS if getattr(splits, name) is not None],
        "labels": splits.labels,
        "reports": [asdict(report) for report in splits.reports],
        "fingerprint": splits.fingerprint,
        "sampled": splits.sampled,
        "rejected": [asdict(row) for row in splits.rejected],
    }
    (folder / _META).write_text(json.dumps(meta), encoding="utf-8")


def _load(folder: Path) -> Splits:
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    tables = {name: open_table(folder / name) for name in meta["splits"]}
    return Splits(
        train=tables["train"],
        valid=tables.get("valid"),
        test=tables.get("test"),
        labels=tuple(meta["labels"]),
        reports=tuple(Report(**report) for report in meta["reports"]),
        fingerprint=meta["fingerprint"],
        sampled={name: tuple(ids) for name, ids in meta["sampled"].items()},
        rejected=tuple(Rejected(**row) for row in meta["rejected"]),
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
        cuts = Report(name=self._path)
        for rows in checker.chunks(read_chunks(self._path, self._cfg, self._labels is not None, rows=self._rows)):
            table, more = _chunk_table(Part.of(rows, self._path), self._cfg, self._labels, checker.problems)
            cuts = cuts.plus(more, _CUTS)
            self.report = checker.report().plus(cuts, _CUTS)
            if not checker.problems.total:
                yield table
        self.report = checker.report().plus(cuts, _CUTS)


def load_inputs(path: str | Path, cfg: DataConfig, labels: Sequence[str] | None = None) -> tuple[ExampleTable, Report]:
    """One whole file in memory, see `InputChunks`.

    Raises:
        DataError: the file or a row cannot be used; a label that is not in `labels`.
    """
    chunks = InputChunks(path, cfg, labels)
    writer = TableWriter(None)
    for table in chunks:
        writer.add(table)
    return writer.table(), chunks.report


def _class_names(cfg: TrainConfig, train: Part) -> tuple[str, ...]:
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


def _sample(train: Part, cfg: TrainConfig, name: str, fraction: float) -> np.ndarray:
    """bool [rows]: rows drawn for a split by `seed`, each class with its share; every class keeps a row to train on.

    Systematic sampling: rows in random order, sorted by class, then one taken at every 1 / fraction.
    """
    rng = np.random.default_rng([cfg.seed, _SAMPLING + SPLITS.index(name) - 1])
    rows = len(train)
    order = rng.permutation(rows)
    if "label" in train.rows.column_names:
        labels = train.column("label")
        index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        classes = np.array([index[label] for label in labels])[order]
        order = order[np.argsort(classes, kind="stable")]
        order = order[np.diff(np.sort(classes), prepend=-1) == 0]
    else:
        order = order[1:]
    allowed = np.concatenate([passes(chunk, cfg.data.keep_heldout) for chunk in train.chunks()])
    order = order[allowed[order]]
    number = min(len(order), max(1, round(fraction * rows)))
    if number == 0:
        raise DataError(
            f"{train.source}: {rows} training rows are too few to sample {_ROWS[name]} rows from; "
            f"give data.{name}, or data.{name}_fraction=0 for none"
        )
    chosen = np.zeros(rows, dtype=bool)
    every = (np.arange(number) + rng.random()) * len(order) / number
    chosen[order[every.astype(np.int64)]] = True
    return chosen


def _table(part: Part, cfg: DataConfig, labels: Sequence[str] | None, stem: Path | None) -> tuple[ExampleTable, Report]:
    """Tokenized rows, long sequences cut, and how many were: in memory, or in files that begin with `stem`."""
    writer, report, problems = TableWriter(stem), Report(name=part.source), Problems(part.source)
    for rows in part.chunks():
        table, more = _chunk_table(Part.of(rows, part.source), cfg, labels, problems)
        report = report.plus(more, ("rows", *_CUTS))
        writer.add(table)
    problems.raise_any()
    return writer.table(), report


def _chunk_table(
    part: Part, cfg: DataConfig, labels: Sequence[str] | None, problems: Problems
) -> tuple[ExampleTable, Report]:
    """`_table` of a part that is held at once; what is wrong with its rows goes to `problems`."""
    ids, sequences, lines = part.column("id"), part.column("sequence"), part.rows["line"].to_pylist()
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


def _targets(part: Part, cfg: DataConfig, labels: Sequence[str], problems: Problems) -> np.ndarray:
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


def _shared(parts: Mapping[str, Part]) -> dict[str, dict[str, int]]:
    """Split -> exact repeats of whole sequences: within it, with training, those whose labels disagree, and ids that
    name another sequence in training. Compared by 64-bit hashes, so that no sequence is held."""
    hashes = {
        name: {column: _hashes(part, column) for column in ("id", "sequence", "label")} for name, part in parts.items()
    }
    train = hashes["train"]
    counts = {}
    for name, own in hashes.items():
        both = [own] if name == "train" else [own, train]
        texts, labels = (np.concatenate([hashed[column] for hashed in both]) for column in ("sequence", "label"))
        pairs = (
            np.unique(np.stack([texts, labels], axis=1), axis=0) if len(labels) else np.empty((0, 2), dtype=np.uint64)
        )
        different, times = np.unique(pairs[:, 0], return_counts=True)
        found = {"repeated": len(own["sequence"]) - len(np.unique(own["sequence"]))}
        if name != "train":
            found["in_train"] = int(np.isin(own["sequence"], train["sequence"]).sum())
            found["renamed"] = _renamed(own, train)
        counts[name] = found | {"conflicting": int(np.isin(own["sequence"], different[times > 1]).sum())}
    return counts


def _hashes(part: Part, column: str) -> np.ndarray:
    """uint64 [rows]: a hash of every value of a column; empty where there is no such column."""
    if column not in part.rows.column_names:
        return np.empty(0, dtype=np.uint64)
    return np.concatenate([text_hashes(chunk[column].to_pylist()) for chunk in part.chunks([column])])


def _renamed(own: Mapping[str, np.ndarray], train: Mapping[str, np.ndarray]) -> int:
    """How many ids of `own` name another sequence in `train`."""
    _, here, there = np.intersect1d(own["id"], train["id"], return_indices=True)
    return int((own["sequence"][here] != train["sequence"][there]).sum())


def _fingerprint(tables: Mapping[str, ExampleTable], labels: Sequence[str]) -> str:
    digest = hashlib.sha256(repr(tuple(labels)).encode())
    for name, table in tables.items():
        digest.update(f"{name} {len(table)}".encode())
        for array in (table.tokens, table.offsets, table.record, table.weight, table.labels):
            digest.update(np.ascontiguousarray(array).data)
        for record in table.ids:
            digest.update(f"{len(record)} {record}".encode())
    return digest.hexdigest()
