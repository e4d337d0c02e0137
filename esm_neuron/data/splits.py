"""From files to the three splits: read, filter and check rows, sample, name classes, tokenize; cache the result."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import DataConfig, TaskConfig, TrainConfig, require
from esm_neuron.data.cache import cached, content_hash, content_key
from esm_neuron.data.class_weights import said_weights
from esm_neuron.data.dataset import ExampleTable, TableWriter, chunk_table, open_table
from esm_neuron.data.filters import SPLITS, filter_key, passes, split_of, truth
from esm_neuron.data.labels import Labels, Regions
from esm_neuron.data.parts import Part, census, hold_out, labels_of
from esm_neuron.data.records import file_and_number, files_of, is_hub, row_unit
from esm_neuron.data.sources import check_columns, check_sheet, filter_column, read_chunks
from esm_neuron.data.tokenizer import VOCABULARY
from esm_neuron.data.validation import (
    Checker,
    Problems,
    Rejected,
    RejectedRows,
    Report,
    conflicting,
    quote,
    text_hashes,
)
from esm_neuron.errors import DataError
from esm_neuron.files import open_new, parse_json, read_bytes, write_json
from esm_neuron.redact import Lines

_SHOWN = 10
"""Values of a column that an error shows."""
_CACHE_VERSION = 8
"""Version of what `_save` writes: another number makes every cached folder anew."""
_UNCACHED_DATA = {"cache", "homologs", "packing", "pack_tokens", "max_segments", *SPLITS}
_UNCACHED_TASK = {
    "class_weights", "label_smoothing", "focal_gamma", "mask_probability", "target_mean", "target_sd",
}  # fmt: skip
"""Settings that change nothing in the tables; of the files, the content is what counts."""
_META, _REJECTED = "splits.json", "rejected.jsonl"


@dataclass(frozen=True)
class Splits:
    """The data of a run."""

    train: ExampleTable
    valid: ExampleTable | None
    test: ExampleTable | None
    labels: tuple[str, ...]
    """Class names; class i is `labels[i]`. Empty for a task without classes."""
    reports: tuple[Report, ...]
    """One per file, then one per split."""
    fingerprint: str
    """sha256 (hex) of tokens, weights, labels, ids and class names: equal for equal data. A resumed run compares it."""
    sampled: Mapping[str, tuple[str, ...]]
    """Split -> ids of its proteins where they were sampled from the training rows, to be written with the run."""
    rejected: RejectedRows
    """The rows left out or changed for their characters (`data.on_bad_residue`), to be written with the run."""
    task: TaskConfig
    """The task with what the training rows decide, see `labels.resolve`."""
    described: str = ""
    """The classes of the training proteins with their counts, see `Labels.describe`; empty without labels."""

    def summary(self) -> str:
        """Return what was read, left out, changed and shared between splits, by file and by split; and the classes."""
        lines = [line for line in self.described.split("\n") if line]
        return Lines.of([*(report.summary() for report in self.reports), *lines])


def check_files(cfg: DataConfig, labels: type[Labels] | None) -> None:
    """Raise DataError where a file of a run is missing or lacks a column; reads no more than its first record."""
    check_settings(cfg, labels)
    check_sheet(data_files(cfg).values(), cfg.sheet)
    for split, source in data_files(cfg).items():
        check_columns(source, _file_config(cfg, split), None if labels is None else labels.joiner)


def check_settings(cfg: DataConfig, labels: type[Labels] | None) -> None:
    """Raise ConfigError where settings of the data contradict each other, or one would have no effect."""
    require(
        cfg.mask_column is None or (labels is not None and labels.per_residue),
        f"data.mask_column={cfg.mask_column} is for labels of residues; leave it out, or use "
        "task.name=residue_classification",
    )
    _check_chains(cfg, labels)
    names = [value for of in cfg.split_values for value in of]
    require(
        len(set(names)) == len(names) and len(cfg.split_names) == 3,
        f"data.split_names={cfg.split_names} must be three different names, or lists of names",
    )
    require(
        cfg.positives is None and cfg.negatives is None,
        "data.positives and data.negatives go together, in place of data.train; give both, and no data.train",
    )
    default = DataConfig()
    for setting, needs, is_set in (
        ("split_names", "split_column", cfg.split_names != default.split_names and cfg.fold is None),
        ("fold", "split_column", cfg.fold is not None and cfg.folds is None),
    ):
        require(
            not is_set or cfg.split_column is not None,
            f"data.{setting} without data.{needs} has no effect; name the column, or leave it out",
        )
    require(
        cfg.fold is None or (cfg.split_names == default.split_names and not cfg.test),
        f"data.fold={cfg.fold} says what is tested on; leave out data.split_names and data.test",
    )
    _check_folds(cfg)
    for split in ("valid", "test"):
        fraction = getattr(cfg, f"{split}_fraction")
        require(
            not getattr(cfg, split) or fraction in (0, getattr(default, f"{split}_fraction")),
            f"data.{split}_fraction={fraction} has no effect beside data.{split}; leave one of them out",
        )


def _check_chains(cfg: DataConfig, labels: type[Labels] | None) -> None:
    chains = len(cfg.sequence_columns)
    require(
        chains == 1 or labels is None or issubclass(labels, Regions),
        f"data.sequence_column={cfg.sequence_column} joins chains, which is for task.name=masked_lm; name one column",
    )
    require(
        chains == 1 or labels is None or len(cfg.label_columns) == chains,
        f"data.label_column={cfg.label_column} must name {chains} columns, one per chain of data.sequence_column",
    )


def _check_folds(cfg: DataConfig) -> None:
    if cfg.folds is None:
        return
    given = [name for name in ("test", "split_column", "valid_column", "test_fraction") if getattr(cfg, name)]
    require(
        not given,
        f"data.folds={cfg.folds} samples what is tested on; leave out data.{given[0] if given else ''} (folds that "
        "a column names: data.split_column and data.fold, one run each)",
    )
    numbers = [str(number) for number in range(1, cfg.folds + 1)]
    require(
        cfg.fold is None or cfg.fold in numbers,
        f"data.fold={cfg.fold} is none of data.folds={cfg.folds}; use 1 to {cfg.folds}, or leave it out for all",
    )


def load_splits(cfg: TrainConfig, labels: type[Labels] | None, spool: Path | None = None) -> Splits:
    """Read, check and tokenize the data of a run, with labels of the task's kind, or with none.

    With `log.score_test` off, the test rows are read with their file and held out as always, and dropped untokenized.

    Order: rows are read; `data.keep` and `data.keep_heldout` filter them; ids, sequences and labels of the rest are
    checked; validation and test rows are sampled where neither a file nor the split column gives any (from the training
    rows that pass `data.keep_heldout`); long sequences are cut.

    With `data.cache` all this is done once for the same files and settings, on any number of processes, and the tables
    are files mapped into memory; without it they are files in `spool`, an empty folder, or in memory where that is
    None. The result is the same, and `open_splits` opens such files.

    Raises:
        DataError: a file or a row cannot be used, training does not know a label, or a split has no rows.
        ConfigError: settings contradict each other, or the cache folder cannot be written.
    """
    require(cfg.data.train is not None, "data.train is not given; name the training file: --data.train FILE")
    check_settings(cfg.data, labels)
    folder = make_splits(cfg, labels, spool)
    return open_splits(cfg, labels, folder) if folder else _resolved(_make(cfg, labels, None), cfg, labels)


def make_splits(cfg: TrainConfig, labels: type[Labels] | None, spool: Path | None) -> Path | None:
    """Return the folder with the tables of a run: in `data.cache` where that is set, else `spool`, which is filled."""
    if cfg.data.cache is not None:
        key = content_key(_cache_key(cfg, labels is not None))
        return cached(Path(cfg.data.cache), key, lambda aside: _save(_make(cfg, labels, aside), cfg, aside))
    if spool is not None:
        _save(_make(cfg, labels, spool), cfg, spool)
    return spool


def open_splits(cfg: TrainConfig, labels: type[Labels] | None, folder: Path) -> Splits:
    """Return what `make_splits` has put in a folder, mapped."""
    return _resolved(_load(folder, cfg), cfg, labels)


def _resolved(splits: Splits, cfg: TrainConfig, labels: type[Labels] | None) -> Splits:
    if labels is None:
        return splits
    named = replace(cfg.task, labels=splits.labels or None)
    task = labels.of(named, cfg.data).resolve(splits.train.labels)
    said = [splits.described, *([said_weights(task)] if cfg.task.class_weights == "auto" else [])]
    return replace(splits, task=task, described="\n".join(said))


def _make(cfg: TrainConfig, kind: type[Labels] | None, folder: Path | None) -> Splits:
    """Return the splits of the files, with tables in memory or under `folder`."""
    labels = None if kind is None else kind.of(cfg.task, cfg.data)
    parts, reports, rejected = read_parts(cfg.data, labels, folder)
    if labels is not None:
        labels.learn_classes(parts["train"].chunks(["label"]), parts["train"].source)
    # The classes are known by now, from all training rows; sampling then leaves each of them a row to train on.
    sampled, notes = hold_out(parts, labels, cfg)
    tables: dict[str, ExampleTable] = {}
    shared = _shared(parts, labels)
    if not cfg.log.score_test:
        parts.pop("test", None)
    described = [] if labels is None else [labels.describe(labels_of(parts["train"])), *census(parts, labels)]
    for name in (split for split in SPLITS if split in parts):
        tables[name], counts = _table(parts[name], cfg.data, labels, folder and folder / name)
        reports.append(Report(name=f"{name} split", **counts, **shared[name]))
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
        rejected=rejected,
        task=cfg.task,
        described="\n".join([*described, *notes]),
    )


def _file_config(cfg: DataConfig, split: str) -> DataConfig:
    """Return the settings by which the file of a split is read."""
    # Only the training file has columns that name splits, or rows that are sampled for validation and test.
    own = cfg if split == "train" else replace(cfg, split_column=None, valid_column=None)
    sampled = (not cfg.valid and cfg.valid_fraction > 0) or cfg.test_fraction > 0
    if split == "train" and (cfg.split_column, cfg.valid_column) == (None, None) and not sampled:
        own = replace(own, keep_heldout={})
    return own


class _File:
    """Read one file: keep its usable rows, and note what its errors and its report need."""

    def __init__(self, cfg: DataConfig, split: str, source: str, labels: Labels | None) -> None:
        self.split, self.source, self._labels = split, source, labels
        self.cfg = _file_config(cfg, split)
        self.checker = Checker(self.cfg, source, *(() if labels is None else (labels.nothing,)))
        self.values: dict[str, set[str]] = {}  # filtered column -> its values that are allowed, and its first _SHOWN
        self._counts: Counter[str] = Counter()
        self._named: set[str] = set()  # splits of the rows that pass `keep`
        self._usable: set[str] = set()  # splits of the rows that pass `keep_heldout` as well
        self._unknown: dict[str, tuple[int, int]] = {}  # value that names no split -> how many rows, the first of them
        self._folds: dict[str, None] = {}  # values of the split column, in order
        self._kept = pa.table({})
        self._seen = np.empty(0, dtype=np.uint64)  # hashes of the values of `unique_column` so far, sorted
        self._left = own.max_rows if (own := self.cfg).max_rows is not None and split == "train" else None

    def read(self, path: Path | None) -> None:
        """Read, filter and check all rows; keep them in memory, or in a file `path` that is mapped."""
        if path is None:
            chunks = list(self._chunks())
            self._kept = pa.concat_tables(chunks) if chunks else self._kept
            return
        writer = None
        for rows in self._chunks():
            writer = writer or pa.ipc.new_file(path, rows.schema)
            writer.write_table(rows)
        if writer is not None:
            writer.close()
            self._kept = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def _chunks(self) -> Iterator[pa.Table]:
        labels = self._labels
        for rows in read_chunks(self.source, self.cfg, None if labels is None else labels.joiner):
            for source in {**self.cfg.keep, **self.cfg.keep_heldout}:
                there = self.values.get(source, set()).union(rows[filter_column(source)].unique().to_pylist())
                # A column may have a value per record: only those that `_check_filters` looks at are kept.
                wanted = {*self.cfg.keep.get(source, ()), *self.cfg.keep_heldout.get(source, ())}
                allowed = set(map(filter_key, wanted))
                self.values[source] = {value for value in there if filter_key(value) in allowed}
                self.values[source].update(heapq.nsmallest(_SHOWN, there))
            kept = self._number_splits(rows.filter(pa.array(passes(rows, self.cfg.keep))))
            split = kept["split"].to_numpy()
            # Training rows are always usable: `keep_heldout` filters validation and test rows alone.
            usable = split == 0
            if not usable.all():
                usable |= (split > 0) & passes(kept, self.cfg.keep_heldout)
            self._named |= _names(split)
            self._usable |= _names(split[usable])
            filtered = {"filtered": len(rows) - len(kept), "filtered_heldout": int((~usable).sum())}
            self._counts.update(rows=len(rows), **filtered)
            clean = self._first_of_each(self.checker(kept.filter(pa.array(usable))))
            if len(clean):
                yield clean if labels is None else labels.encode(clean, self.checker.problems)

    def _first_of_each(self, rows: pa.Table) -> pa.Table:
        """Leave out, and count, rows that repeat a value of `unique_column`, and training rows beyond `max_rows`."""
        kept = np.ones(len(rows), dtype=bool)
        if self.cfg.unique_column is not None:
            values = text_hashes(rows["unique"].to_pylist())
            kept = np.zeros(len(rows), dtype=bool)
            kept[np.unique(values, return_index=True)[1]] = True
            kept &= ~np.isin(values, self._seen)
            self._seen = np.union1d(self._seen, values)
            self._counts.update(doubled=int((~kept).sum()))
        if self._left is not None:
            train = kept & (rows["split"].to_numpy() == 0)
            beyond = train & (np.cumsum(train) > self._left)
            self._left -= int((train & ~beyond).sum())
            self._counts.update(beyond=int(beyond.sum()))
            kept &= ~beyond
        return rows if kept.all() else rows.filter(pa.array(kept))

    def _number_splits(self, rows: pa.Table) -> pa.Table:
        """Return the rows with a column `split`, int8: the place in SPLITS of each row's split, -1 for none."""
        cfg = self.cfg
        split = np.full(len(rows), SPLITS.index(self.split), np.int8)
        if cfg.split_column is not None:
            split = self._splits_by_name(rows)
            rows = rows.drop_columns("split")
        if cfg.valid_column is not None:
            marked = {value: truth(value) for value in rows["valid"].unique().to_pylist()}
            for value in (value for value, truth in marked.items() if truth is None):
                line = rows["line"][pc.index(rows["valid"], value).as_py()].as_py()
                what = f"column {cfg.valid_column!r} (data.valid_column) has {quote(value)}"
                self.checker.problems.add(line, f"{what}; write true, or false or nothing")
                marked[value] = False
            wanted = pa.array([value for value, truth in marked.items() if truth], pa.large_string())
            split[(split == 0) & pc.is_in(rows["valid"], value_set=wanted).to_numpy()] = 1
        return rows.append_column("split", pa.array(split))

    def _splits_by_name(self, rows: pa.Table) -> np.ndarray:
        """Return int8 [rows]: the place in SPLITS of each row's split, -1 for a value that names none."""
        known = {value: split_of(value, self.cfg) for value in rows["split"].unique().to_pylist()}
        self._folds.update(dict.fromkeys(known))
        names = pa.array(list(known), pa.large_string())
        split = np.array(list(known.values()), np.int8)[pc.index_in(rows["split"], value_set=names).to_numpy()]
        strange = rows.filter(pa.array(split == -1))
        for value, line in zip(strange["split"].to_pylist(), strange["line"].to_pylist(), strict=True):
            count, first = self._unknown.get(value, (0, line))
            self._unknown[value] = (count + 1, first)
        return split

    def finish(self) -> tuple[dict[str, Part], Report]:
        """Return the part of each split that has rows; raise DataError for all that is wrong with the file."""
        if self._labels is not None:
            self._labels.conclude(self.checker.problems)
        if self._counts["filtered"] == self._counts["rows"]:
            raise DataError(f"{self.source}: data.keep leaves no records; allow more values")
        if self._unknown:
            files = files_of(self.source)
            unit = row_unit(files[0][0])
            shown = ", ".join(
                f"{quote(value)} ({count} records, first in {unit} {file_and_number(files, first)[1]})"
                for value, (count, first) in list(self._unknown.items())[:5]
            )
            raise DataError(
                f"{self.source}: column {self.cfg.split_column!r} has {len(self._unknown)} values that are not in "
                f"data.split_names={self.cfg.split_names}: {shown}; name the splits there, or one in "
                "data.fold, or filter the records with data.keep"
            )
        if self.cfg.fold is not None and self._folds and not any(split_of(f, self.cfg) == 2 for f in self._folds):
            folds = sorted(map(quote, self._folds))
            shown = ", ".join(folds[:_SHOWN]) + (", ..." if len(folds) > _SHOWN else "")
            raise DataError(
                f"{self.source}: column {self.cfg.split_column!r} (data.split_column) has no fold "
                f"{str(self.cfg.fold)!r} (data.fold), but {shown}; name one of these"
            )
        for name in sorted(self._named - self._usable):
            raise DataError(f"{self.source}: data.keep_heldout leaves no {name} proteins; allow more values")
        self.checker.finish()
        split = self._kept["split"].to_numpy()
        left = _names(split)
        for name in sorted(self._usable - left):
            raise DataError(
                f"{self.source}: what is left out (data.on_bad_residue, data.on_missing, data.min_residues, "
                f"data.unique_column) leaves no {name} proteins; correct their sequences, or leave less out"
            )
        parts = {name: Part(self._kept, self.source, split == SPLITS.index(name)) for name in sorted(left)}
        return parts, Report(name=self.source, **{**self.checker.counts, **self._counts})


def read_parts(
    cfg: DataConfig, labels: Labels | None, folder: Path | None
) -> tuple[dict[str, Part], list[Report], RejectedRows]:
    """Return the checked rows of each split that has any, a report per file, and the rows left out or changed.

    The text of each label is replaced by its codes. Rows are kept as files in `folder`, or in memory where it is None.
    """
    files = [_File(cfg, split, path, labels) for split, path in data_files(cfg).items()]
    for file in files:
        file.read(folder and folder / f"{file.split}.arrow")
    _check_filters(cfg, files)
    parts: dict[str, Part] = {}
    reports = []
    for file in files:
        own, report = file.finish()
        reports.append(report)
        for name, part in own.items():
            require(
                name == file.split or name not in data_files(cfg),
                f"{name} proteins come both from data.{name} and from data.split_column={cfg.split_column!r}; "
                f"leave out data.{name}, or filter those records with data.keep",
            )
            parts[name] = part
    if "train" not in parts:
        raise DataError(
            f"{cfg.train}: no record has {cfg.split_names[0]!r} in column {cfg.split_column!r} "
            "(data.split_column); set data.split_names to the values for training, validation and test"
        )
    return parts, reports, RejectedRows(row for file in files for row in file.checker.rejected)


def data_files(cfg: DataConfig) -> dict[str, str]:
    """Return split -> the file that the configuration names for it, where it names one.

    A folder of a DatasetDict as the training file is its splits.
    """
    files = {split: path for split, path in zip(SPLITS, (cfg.train, cfg.valid, cfg.test), strict=True) if path}
    folder = Path(files.get("train", ""))
    if cfg.train and not is_hub(cfg.train) and (folder / "dataset_dict.json").is_file():
        known = {split_of(item.name, DataConfig()): str(item) for item in sorted(folder.iterdir()) if item.is_dir()}
        inner = {name: known[place] for place, name in enumerate(SPLITS) if place in known}
        if "train" not in inner:
            raise DataError(f"{folder}: the folder holds no split `train`; name one of its splits: {folder}/NAME")
        files = {**inner, **{split: path for split, path in files.items() if split != "train"}}
    return {split: files[split] for split in SPLITS if split in files}


def _names(split: np.ndarray) -> set[str]:
    """Return the splits that have a row."""
    return {SPLITS[number] for number in np.unique(split) if number >= 0}


def _check_filters(cfg: DataConfig, files: Sequence[_File]) -> None:
    """Refuse a filter value that no row of any file has: it is a typing error."""
    for setting, filters in (("keep", cfg.keep), ("keep_heldout", cfg.keep_heldout)):
        for source, allowed in filters.items():
            having = [file for file in files if source in getattr(file.cfg, setting)]
            if not having:  # no held-out rows at all: a file that should have the column was refused when it was read
                continue
            there = set().union(*(file.values[source] for file in having))
            found = set(map(filter_key, there))
            missing = [str(value) for value in allowed if filter_key(str(value)) not in found]
            if missing or not allowed:
                what = f"value {quote(missing[0])} matches no record" if missing else "the list of values is empty"
                shown, where = ", ".join(map(quote, sorted(there)[:_SHOWN])), ", ".join(file.source for file in having)
                raise DataError(
                    f"{where}: data.{setting}, column {source!r}: {what}; use values that are there, such as {shown}"
                )


def _cache_key(cfg: TrainConfig, needs_labels: bool) -> list[object]:
    """Return all that decides the tables: content and kind of the files, settings that matter, alphabet, version."""
    # How homologs are found changes the tables only where whole clusters of them are sampled.
    unused = _UNCACHED_DATA - ({"homologs"} if cfg.data.sample == "clusters" else set())
    data = {name: value for name, value in asdict(cfg.data).items() if name not in unused}
    task = {name: value for name, value in asdict(cfg.task).items() if name not in _UNCACHED_TASK}
    if cfg.task.mask_rates is not None:  # a label is the place of its region among them
        task["mask_rates"] = list(cfg.task.mask_rates)
    files = data_files(cfg.data)
    fractions = {"valid": cfg.data.valid_fraction, "test": cfg.data.test_fraction}
    may_sample = any(fraction > 0 and split not in files for split, fraction in fractions.items())
    # The seed decides which rows are sampled and nothing else, so runs of all seeds share a cache where none are.
    seed = cfg.sampling_seed if may_sample or cfg.data.folds is not None else None
    contents = [(split, Path(path).suffixes[-2:], content_hash(path)) for split, path in files.items()]
    return [_CACHE_VERSION, VOCABULARY, needs_labels, cfg.log.score_test, seed, data, task, contents]


def _save(splits: Splits, cfg: TrainConfig, folder: Path) -> None:
    """Write what `_load` reads back beside the tables, which `_make` has put in `folder`."""
    meta = {
        "files": list(data_files(cfg.data).values()),
        "splits": [name for name in SPLITS if getattr(splits, name) is not None],
        "labels": splits.labels,
        "reports": [asdict(report) for report in splits.reports],
        "fingerprint": splits.fingerprint,
        "sampled": splits.sampled,
        "described": splits.described,
    }
    write_json(folder / _META, meta)
    with open_new(folder / _REJECTED) as file:
        file.writelines(json.dumps(row) + "\n" for row in splits.rejected)


def _load(folder: Path, cfg: TrainConfig) -> Splits:
    """Return the splits kept in `folder`."""
    meta = parse_json(read_bytes(folder / _META, 1 << 32))  # as large as the ids of a corpus
    # The same content may have another path today: reports and rejected records name the files of this configuration.
    now = dict(zip(meta["files"], data_files(cfg.data).values(), strict=True))
    tables = {name: open_table(folder / name) for name in meta["splits"]}
    with (folder / _REJECTED).open(encoding="utf-8") as file:
        rows = (Rejected(*parse_json(line)) for line in file)
        rejected = RejectedRows(row._replace(file=now.get(row.file, row.file)) for row in rows)
    return Splits(
        train=tables["train"],
        valid=tables.get("valid"),
        test=tables.get("test"),
        labels=tuple(meta["labels"]),
        reports=tuple(Report(**{**one, "name": now.get(one["name"], one["name"])}) for one in meta["reports"]),
        fingerprint=meta["fingerprint"],
        sampled={name: tuple(ids) for name, ids in meta["sampled"].items()},
        rejected=rejected,
        task=cfg.task,
        described=meta["described"],
    )


def _table(part: Part, cfg: DataConfig, labels: Labels | None, stem: Path | None) -> tuple[ExampleTable, Counter[str]]:
    """Return the rows tokenized and cut, in memory or in files that begin with `stem`; and their counts."""
    writer, counts, problems = TableWriter(stem), Counter[str](), Problems(part.source)
    for rows in part.chunks():
        table, more = chunk_table(rows, cfg, labels, problems)
        counts.update(more)
        writer.add(table)
    problems.raise_any()
    return writer.table(), counts


def _shared(parts: Mapping[str, Part], labels: Labels | None) -> dict[str, dict[str, int]]:
    """Return split -> how often it repeats whole sequences or shares them and ids with training, see `Report`."""
    hashes = {name: _hashes(part, labels) for name, part in parts.items()}
    train = hashes["train"]
    counts = {}
    for name, own in hashes.items():
        # Labels may conflict within a split, and those of a held-out split with training as well.
        both = [own] if name == "train" else [own, train]
        found = {"repeated": len(own["sequence"]) - len(np.unique(own["sequence"])), "conflicting": 0}
        if labels is not None:
            everyone = (np.concatenate([hashed[column] for hashed in both]) for column in ("sequence", "label"))
            found["conflicting"] = conflicting(own["sequence"], *everyone)
        if name != "train":
            found["in_train"] = int(np.isin(own["sequence"], train["sequence"]).sum())
            _, here, there = np.intersect1d(own["id"], train["id"], return_indices=True)
            renamed = int((own["sequence"][here] != train["sequence"][there]).sum())
            found["renamed"] = 0 if _numbered(parts[name]) else renamed
        counts[name] = found
    return counts


def _numbered(part: Part) -> bool:
    """Return whether ids are numbers of rows, which say nothing about those of another file."""
    return all(pc.all(pc.utf8_is_digit(rows["id"])).as_py() for rows in part.chunks(["id"]))


def _hashes(part: Part, labels: Labels | None) -> dict[str, np.ndarray]:
    """Return uint64 [rows] hashes of ids, sequences and, where they are read, labels, so that no text is held."""
    hashes = {
        column: np.concatenate([text_hashes(rows[column].to_pylist()) for rows in part.chunks([column])])
        for column in ("id", "sequence")
    }
    if labels is not None:
        hashes["label"] = np.concatenate([labels.hashes(rows) for rows in part.chunks(["label"])])
    return hashes


def _fingerprint(tables: Mapping[str, ExampleTable], labels: Sequence[str]) -> str:
    digest = hashlib.sha256(repr(tuple(labels)).encode())
    for name, table in tables.items():
        digest.update(f"{name} {len(table)}".encode())
        for array in (table.tokens, table.offsets, table.record, table.weight, table.labels):
            digest.update(np.ascontiguousarray(array).data)
        # Each name follows its length, so that ("ab", "c") and ("a", "bc") differ.
        digest.update("".join(f"{len(record)} {record}" for record in table.ids).encode())
    return digest.hexdigest()
