"""From files to the three splits: rows are divided, classes named, long sequences cut, tokenized, counted; cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from esm_neuron.config import DataConfig, TaskConfig, TrainConfig, require
from esm_neuron.data.cache import TableWriter, cached, content_hash, content_key, open_table
from esm_neuron.data.dataset import CUTS, ExampleTable, chunk_table
from esm_neuron.data.homology import MOST, clusters
from esm_neuron.data.intake import SPLITS, Part, data_files, passes, read_parts
from esm_neuron.data.labels import Labels
from esm_neuron.data.records import LIST_JOINER
from esm_neuron.data.sources import CHUNK_ROWS, read_chunks
from esm_neuron.data.tokenizer import VOCABULARY, encode_many
from esm_neuron.data.validation import Checker, Problems, Rejected, Report, text_hashes
from esm_neuron.errors import ConfigError, DataError

_SAMPLING = 2**63
"""Keeps the random numbers of the sampling apart from others drawn from the same seed."""
_CACHE_VERSION = 4
"""Of what `_save` writes: another number makes every cached folder anew."""
_UNCACHED_DATA = {"cache", "homologs", "packing", "pack_tokens", "max_segments", *SPLITS}
_UNCACHED_TASK = {
    "class_weights", "label_smoothing", "focal_gamma", "mask_probability", "target_mean", "target_sd",
}  # fmt: skip
"""Settings that change nothing in the tables; of the files, the content is what counts."""
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
    """Class names; class i is `labels[i]`. Empty for a task without classes."""
    reports: tuple[Report, ...]
    """One a file, then one a split."""
    fingerprint: str
    """sha256 (hex) of tokens, weights, labels, ids and class names: equal for equal data. A resumed run compares it."""
    sampled: Mapping[str, tuple[str, ...]]
    """Split -> ids of its rows where they were sampled from the training rows, to be written with the run."""
    rejected: tuple[Rejected, ...]
    """The rows left out or changed for their characters (`data.on_bad_residue`), to be written with the run."""
    task: TaskConfig
    """The task with what the training rows decide, see `labels.resolve`."""

    def summary(self) -> str:
        """What was read, left out, changed and shared between splits: a line a file and a line a split."""
        return "\n".join(report.summary() for report in self.reports)


def load_splits(cfg: TrainConfig, labels: type[Labels] | None) -> Splits:
    """Read, check and tokenize the data of a run, with labels of the task's kind, or with none.

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
        splits = _make(cfg, labels, None)
    else:
        key = content_key(_cache_key(cfg, labels is not None))
        folder = cached(Path(cfg.data.cache), key, lambda aside: _save(_make(cfg, labels, aside), cfg, aside))
        splits = _load(folder, cfg)
    if labels is None:
        return splits
    named = replace(cfg.task, labels=splits.labels or None)
    return replace(splits, task=labels(named, cfg.data.label_column).resolve(splits.train.labels))


def _make(cfg: TrainConfig, kind: type[Labels] | None, folder: Path | None) -> Splits:
    """The splits from the files, tables in memory or under `folder`."""
    labels = None if kind is None else kind(cfg.task, cfg.data.label_column)
    parts, reports, rejected = read_parts(cfg.data, labels, folder)
    if labels is not None:
        labels.learn_classes(parts["train"].chunks(["label"]), parts["train"].source)
    sampled: dict[str, tuple[str, ...]] = {}
    fractions = {"valid": cfg.data.valid_fraction, "test": cfg.data.test_fraction}
    wanted = {name: fraction for name, fraction in fractions.items() if name not in parts and fraction > 0}
    families = _families(parts["train"], cfg.data) if wanted and cfg.data.sample == "clusters" else None
    for name, fraction in wanted.items():
        if families is None:
            chosen = _sample(parts["train"], labels, cfg, name, fraction)
        else:
            chosen = _sample_families(parts["train"], labels, families, cfg, name, fraction)
            families = families[~chosen]
        parts |= {"train": parts["train"].take(~chosen), name: parts["train"].take(chosen)}
        sampled[name] = tuple(parts[name].column("id"))
    tables: dict[str, ExampleTable] = {}
    shared = _shared(parts, labels)
    for name in (split for split in SPLITS if split in parts):
        tables[name], report = _table(parts[name], cfg.data, labels, None if folder is None else folder / name)
        reports.append(replace(report, name=f"{name} split", **shared[name]))
    if folder is not None:
        for spool in folder.glob("*.arrow"):
            spool.unlink()
    names = (labels and labels.task.labels) or ()
    return Splits(
        train=tables["train"],
        valid=tables.get("valid"),
        test=tables.get("test"),
        labels=names,
        reports=tuple(reports),
        fingerprint=_fingerprint(tables, names),
        sampled=sampled,
        rejected=tuple(rejected),
        task=cfg.task,
    )


def _cache_key(cfg: TrainConfig, needs_labels: bool) -> list[object]:
    """All that the tables follow from: the files' kind and content, settings that matter, the alphabet, the version."""
    by_clusters = {"homologs"} if cfg.data.sample == "clusters" else set()
    unused = _UNCACHED_DATA - by_clusters
    data = {name: value for name, value in asdict(cfg.data).items() if name not in unused}
    task = {name: value for name, value in asdict(cfg.task).items() if name not in _UNCACHED_TASK}
    files = data_files(cfg.data)
    fractions = {"valid": cfg.data.valid_fraction, "test": cfg.data.test_fraction}
    may_sample = any(fraction > 0 and split not in files for split, fraction in fractions.items())
    seed = cfg.seed if may_sample else None
    contents = [(split, Path(path).suffixes[-2:], content_hash(path)) for split, path in files.items()]
    return [_CACHE_VERSION, VOCABULARY, needs_labels, seed, data, task, contents]


def _save(splits: Splits, cfg: TrainConfig, folder: Path) -> None:
    """Write what `_load` reads back beside the tables, which `_make` has put in `folder`."""
    meta = {
        "files": list(data_files(cfg.data).values()),
        "splits": [name for name in SPLITS if getattr(splits, name) is not None],
        "labels": splits.labels,
        "reports": [asdict(report) for report in splits.reports],
        "fingerprint": splits.fingerprint,
        "sampled": splits.sampled,
        "rejected": [asdict(row) for row in splits.rejected],
    }
    (folder / _META).write_text(json.dumps(meta), encoding="utf-8")


def _load(folder: Path, cfg: TrainConfig) -> Splits:
    """The splits kept in `folder`; what was said of a file is said of the one that has its place and content now."""
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    now = dict(zip(meta["files"], data_files(cfg.data).values(), strict=True))
    tables = {name: open_table(folder / name) for name in meta["splits"]}
    return Splits(
        train=tables["train"],
        valid=tables.get("valid"),
        test=tables.get("test"),
        labels=tuple(meta["labels"]),
        reports=tuple(Report(**{**one, "name": now.get(one["name"], one["name"])}) for one in meta["reports"]),
        fingerprint=meta["fingerprint"],
        sampled={name: tuple(ids) for name, ids in meta["sampled"].items()},
        rejected=tuple(Rejected(**{**row, "file": now[row["file"]]}) for row in meta["rejected"]),
        task=cfg.task,
    )


class InputChunks:
    """One whole file in its order, a chunk at a time: without labels for prediction, or with them for evaluation.

    Can be iterated any number of times; a bad row anywhere is an error after the last chunk, so what was made of the
    chunks before must not be final until then (or iterate once in advance: it costs little).

    The split column and the row filters of `cfg` are for training and are not applied.

    Args:
        path: the file, see `sources.read_chunks`.
        cfg: columns, treatment of bad residues and of long sequences.
        labels: of a finished run, with its class names; None: no labels are read.
        rows: most rows in a chunk.
    """

    def __init__(self, path: str | Path, cfg: DataConfig, labels: Labels | None = None, rows: int = CHUNK_ROWS) -> None:
        self._path, self._rows = str(path), rows
        self._labels = labels
        self._cfg = replace(cfg, split_column=None, keep={}, keep_heldout={})
        self.report = Report(name=self._path)
        """What the last iteration has read and done so far."""
        self.rejected: list[Rejected] = []
        """The rows that the last iteration has left out or changed so far."""

    def __iter__(self) -> Iterator[ExampleTable]:
        """Tables of one chunk each; `record` counts from 0 in each of them.

        Raises:
            DataError: the file or a row cannot be used; a label that training did not know.
        """
        checker = Checker(self._cfg, self._path)
        self.rejected = checker.rejected
        cuts = Report(name=self._path)
        labels = self._labels
        for usable in checker.chunks(self._chunks()):
            rows = usable if labels is None else labels.encode(usable, checker.problems)
            table, more = chunk_table(rows, self._path, self._cfg, labels, checker.problems)
            cuts = cuts.plus(more, CUTS)
            self.report = checker.report().plus(cuts, CUTS)
            if not checker.problems.total:
                yield table
        self.report = checker.report().plus(cuts, CUTS)

    def _chunks(self) -> Iterator[pa.Table]:
        joiner = LIST_JOINER if self._labels is None else self._labels.joiner
        return read_chunks(self._path, self._cfg, self._labels is not None, joiner, self._rows)

    def read(self) -> ExampleTable:
        """The whole file as one table in memory.

        Raises:
            DataError: as when it is iterated.
        """
        writer = TableWriter(None)
        for table in self:
            writer.add(table)
        return writer.table()


def _families(train: Part, cfg: DataConfig) -> np.ndarray:
    """int64 [rows]: the cluster of homologs that each row is in, by whole sequences; see `homologs.clusters`."""
    if cfg.homologs == "off":
        raise ConfigError(
            "data.sample=clusters with data.homologs=off: clusters are of homologs; use data.homologs=kmer or mmseqs"
        )
    require(
        len(train) <= MOST,
        f"data.sample=clusters: {len(train)} rows are more than {MOST}; cluster them beforehand and name the split of "
        "each row in a column (data.split_column)",
    )
    tokens, offsets = encode_many(train.column("sequence"))
    rows = np.arange(len(train))
    table = ExampleTable(
        tokens, offsets, rows, np.ones(len(rows), np.float32), np.empty(0), [str(row) for row in rows.tolist()]
    )
    return clusters(table, cfg.homologs)


def _sample_families(
    train: Part, labels: Labels | None, families: np.ndarray, cfg: TrainConfig, name: str, fraction: float
) -> np.ndarray:
    """bool [rows]: whole clusters drawn for a split by `seed`; every class keeps a row to train on.

    Clusters come in random order; one is passed over where it would make more than the wanted rows, has a row that
    `data.keep_heldout` leaves out, or has the last rows of a class.
    """
    rng, rows = _generator(cfg, name), len(train)
    groups = _strata(train, labels)
    members = np.split(np.argsort(families, kind="stable"), np.cumsum(np.bincount(families))[:-1])
    left, allowed = np.bincount(groups), _allowed(train, cfg)
    chosen, wanted = np.zeros(rows, dtype=bool), max(1, round(fraction * rows))
    for family in rng.permutation(np.unique(families)):
        own = members[family]
        after = left - np.bincount(groups[own], minlength=len(left))
        if len(own) <= wanted and allowed[own].all() and (after[groups[own]] > 0).all():
            chosen[own], left, wanted = True, after, wanted - len(own)
    if not chosen.any():
        largest = int(np.bincount(families).max())
        raise DataError(
            f"{train.source}: no cluster of homologs can be held out for {_ROWS[name]} ({rows} training rows, "
            f"{len(np.unique(families))} clusters, the largest of {largest} rows); use data.sample=rows, or give "
            f"data.{name}"
        )
    return chosen


def _generator(cfg: TrainConfig, name: str) -> np.random.Generator:
    """The random numbers that sample a split."""
    return np.random.default_rng([cfg.seed, _SAMPLING + SPLITS.index(name) - 1])


def _strata(train: Part, labels: Labels | None) -> np.ndarray:
    """int64 [rows]: the group of each row's label; one group where there are no labels."""
    if labels is None:
        return np.zeros(len(train), dtype=np.int64)
    return labels.strata(pa.concat_tables(train.chunks(["label"])))


def _allowed(train: Part, cfg: TrainConfig) -> np.ndarray:
    """bool [rows]: which rows `data.keep_heldout` lets be held out."""
    return np.concatenate([passes(chunk, cfg.data.keep_heldout) for chunk in train.chunks()])


def _sample(train: Part, labels: Labels | None, cfg: TrainConfig, name: str, fraction: float) -> np.ndarray:
    """bool [rows]: rows drawn for a split by `seed`, each class with its share; every class keeps a row to train on.

    Systematic sampling: rows in random order, sorted by class, one taken at every 1 / fraction.
    """
    rng, rows = _generator(cfg, name), len(train)
    order = rng.permutation(rows)
    groups = _strata(train, labels)[order]
    order = order[np.argsort(groups, kind="stable")]
    order = order[np.diff(np.sort(groups), prepend=-1) == 0]
    order = order[_allowed(train, cfg)[order]]
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


def _table(part: Part, cfg: DataConfig, labels: Labels | None, stem: Path | None) -> tuple[ExampleTable, Report]:
    """Tokenized rows, long sequences cut, and how many were: in memory, or in files that begin with `stem`."""
    writer, report, problems = TableWriter(stem), Report(name=part.source), Problems(part.source)
    for rows in part.chunks():
        table, more = chunk_table(rows, part.source, cfg, labels, problems)
        report = report.plus(more, ("rows", *CUTS))
        writer.add(table)
    problems.raise_any()
    return writer.table(), report


def _shared(parts: Mapping[str, Part], labels: Labels | None) -> dict[str, dict[str, int]]:
    """Split -> exact repeats of whole sequences: within it, with training, those whose labels disagree, and ids that
    name another sequence in training. Compared by 64-bit hashes, so that no sequence is held."""
    hashes = {
        name: {column: _hashes(part, column) for column in ("id", "sequence")} | {"label": _label_hashes(part, labels)}
        for name, part in parts.items()
    }
    train = hashes["train"]
    counts = {}
    for name, own in hashes.items():
        both = [own] if name == "train" else [own, train]
        texts, answers = (np.concatenate([hashed[column] for hashed in both]) for column in ("sequence", "label"))
        pairs = (
            np.unique(np.stack([texts, answers], axis=1), axis=0) if len(answers) else np.empty((0, 2), dtype=np.uint64)
        )
        different, times = np.unique(pairs[:, 0], return_counts=True)
        found = {"repeated": len(own["sequence"]) - len(np.unique(own["sequence"]))}
        if name != "train":
            found["in_train"] = int(np.isin(own["sequence"], train["sequence"]).sum())
            found["renamed"] = _renamed(own, train)
        counts[name] = found | {"conflicting": int(np.isin(own["sequence"], different[times > 1]).sum())}
    return counts


def _hashes(part: Part, column: str) -> np.ndarray:
    """uint64 [rows]: a hash of every value of a column."""
    return np.concatenate([text_hashes(chunk[column].to_pylist()) for chunk in part.chunks([column])])


def _label_hashes(part: Part, labels: Labels | None) -> np.ndarray:
    """uint64 [rows]: a hash of what every label says; empty where there are none."""
    if labels is None:
        return np.empty(0, dtype=np.uint64)
    return np.concatenate([labels.hashes(rows) for rows in part.chunks(["label"])])


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
