"""Check a file of proteins before anything is trained on it: lengths, alphabet, repeats, labels, leaks."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import DataConfig
from esm_neuron.data.dataset import ExampleTable, TableWriter, select_records
from esm_neuron.data.filters import passes
from esm_neuron.data.homology import MOST, Method, find_homologs, too_short
from esm_neuron.data.labels import Labels, alike, flatten
from esm_neuron.data.looks import count_letters
from esm_neuron.data.sources import check_sheet, read_chunks, text_bytes
from esm_neuron.data.tokenizer import RESIDUES, encode_residues
from esm_neuron.data.validation import Checker, Problems, Report, conflicting, text_hashes
from esm_neuron.redact import Lines

SHOWN = 20
"""Labels that the text names."""
CHECKED = (
    "data.id_column", "data.sequence_column", "data.label_column", "data.label_separator", "data.split_column",
    "data.sheet", "data.keep", "data.on_bad_residue", "data.on_missing", "data.min_residues", "data.max_residues",
    "data.long_sequences", "task.name", "task.labels", "task.ignore",
)  # fmt: skip
"""Settings of a run that `data check` looks at."""


@dataclass(frozen=True)
class Leak:
    """What the proteins of one value of the split column share with training."""

    rows: int
    in_train: int
    """Proteins with a sequence that is in training too."""
    homologs: int | None
    """Proteins with a homolog in training; None: not looked for (by choice, or in more than `homology.MOST`)."""
    too_short: int = 0
    """Proteins without one that are too short to tell homologs from chance."""


@dataclass(frozen=True)
class Check:
    """What was found in a file. Counts by name have the most frequent first."""

    file: str
    rows: int
    """Rows read, those left out included."""
    proteins: int
    residues: int
    lengths: Mapping[str, int]
    """min, q1, median, q3, max, in residues."""
    alphabet: Mapping[str, int]
    """Letter -> how often; letters outside the ESM alphabet count as X."""
    repeated: int
    """Proteins with a sequence that an earlier one has."""
    conflicting: int
    """Proteins with a sequence that has another label elsewhere in the file."""
    labels: Mapping[str, int] | None
    """Label -> proteins, or residues where each has one; None: not looked at, or numbers."""
    values: Mapping[str, float] | None
    """min, q1, median, q3, max of labels that are numbers."""
    splits: Mapping[str, int] | None
    """Value of the split column -> proteins; None: not looked at."""
    leaks: Mapping[str, Leak]
    """For each value of the split column but that of training."""
    changed: str
    """What was left out or changed, see `validation.Report`; empty where nothing was."""
    faults: int
    """Faults of records that training would refuse."""
    first_faults: Sequence[str]

    def render(self) -> str:
        """Return the lines that a person reads."""
        spread = ", ".join(f"{name} {value}" for name, value in self.lengths.items())
        letters = ", ".join(f"{letter} {count / self.residues:.2%}" for letter, count in self.alphabet.items())
        lines = [
            f"{self.file}: {self.proteins} proteins of {self.rows} rows, {self.residues} residues",
            f"lengths: {spread}",
            f"alphabet: {letters}",
            f"repeats: {self.repeated} proteins have a sequence that an earlier one has",
        ]
        if self.values is not None:
            lines.append("values: " + ", ".join(f"{name} {value:.6g}" for name, value in self.values.items()))
        if self.labels is not None:
            shown = ", ".join(f"{name} {count}" for name, count in list(self.labels.items())[:SHOWN])
            lines.append(f"labels: {len(self.labels)}: {shown}" + (", ..." if len(self.labels) > SHOWN else ""))
            lines += [f"NOTE: {remark}" for remark in alike(self.labels)]
        if self.labels is not None or self.values is not None:
            lines.append(f"conflicts: {self.conflicting} proteins have a sequence with another label elsewhere")
        if self.splits is not None:
            lines.append("splits: " + ", ".join(f"{name} {count}" for name, count in self.splits.items()))
        for name, leak in self.leaks.items():
            has_homolog = f"{leak.homologs} with a homolog there"
            if leak.too_short:
                has_homolog += f", {leak.too_short} too short to tell homologs from chance"
            if leak.homologs is None:
                many = f" ({self.proteins} proteins are more than {MOST})" if self.proteins > MOST else ""
                has_homolog = f"homologs not looked for{many}"
            lines.append(f"leaks: {name}: of {leak.rows} proteins {leak.in_train} are in training, {has_homolog}")
        if self.changed:
            lines.append(f"left out or changed: {self.changed}")
        lines.append(f"faults: {self.faults}" if self.faults else "faults: none")
        return Lines.of([*lines, *(f"  {fault}" for fault in self.first_faults)])


class _SeenLabels:
    """The labels of a file, row by row; the training proteins' are judged as `train` does."""

    def __init__(self, labels: Labels, split_column: str | None, train: str) -> None:
        self.labels, self._split_column, self._train = labels, split_column, train
        self.hashes: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.names: Counter[str] = Counter()
        self._learned: Counter[str] = Counter()  # classes of the training proteins
        self._training = 0

    def add(self, clean: pa.Table, problems: Problems) -> None:
        labels, encoded = self.labels, self.labels.encode(clean, problems)
        self.hashes.append((labels.hashes(encoded) >> np.uint64(32)).astype(np.uint32))
        self.names.update(labels.count(encoded))
        if labels.numeric:
            self.values.append(flatten(encoded)[0])
        if self._split_column is not None:
            encoded = encoded.filter(pc.equal(encoded["split"], self._train))
        self._learned.update(labels.count(encoded))
        self._training += len(encoded)

    def conclude(self, problems: Problems) -> None:
        self.labels.conclude(problems)
        fault = self.labels.fault(self._learned, self._training) if self._training else None
        if fault is not None and not problems.total:
            problems.add(None, fault)


def check_file(path: str, cfg: DataConfig, labels: Labels | None, train: str, method: Method | None) -> Check:
    """Read a whole file and return what it holds; bad records are counted, not raised.

    With a split column, its value `train` names the training proteins. `labels` reads the label column and
    `method` finds homologs; None: they are not looked at. Raise DataError where the file itself cannot be read.
    """
    check_sheet([path], cfg.sheet)
    with tempfile.TemporaryDirectory(prefix="esm-neuron-") as folder:
        # Tokens are for the search of homologs alone, and lie in mapped files: memory has counts and hashes.
        tokens = TableWriter(Path(folder, "file")) if method is not None and cfg.split_column is not None else None
        return _Look(path, cfg, labels, train).check(method, tokens)


class _Look:
    """What one reading of a file finds."""

    def __init__(self, path: str, cfg: DataConfig, labels: Labels | None, train: str) -> None:
        self._path, self._cfg, self._train = path, cfg, train
        self._joiner = None if labels is None else labels.joiner
        self._checker = Checker(cfg, path, *(() if labels is None else (labels.nothing,)))
        self._labels = None if labels is None else _SeenLabels(labels, cfg.split_column, train)
        self._letters = np.zeros(256, np.int64)
        self._lengths: Counter[int] = Counter()
        self._hashes: list[np.ndarray] = []
        self._splits: list[np.ndarray] = []  # places in `_names`
        self._names: dict[str, int] = {}
        self._read = 0

    def _add(self, rows: pa.Table, tokens: TableWriter | None) -> None:
        self._read += len(rows)
        clean = self._checker(rows.filter(pa.array(passes(rows, self._cfg.keep))))
        if self._labels is not None:
            self._labels.add(clean, self._checker.problems)
        if "split" in clean.column_names:
            for name in clean["split"].unique().to_pylist():
                self._names.setdefault(name, len(self._names))
            places = pc.index_in(clean["split"], pa.array(self._names, pa.large_string())).to_numpy()
            self._splits.append(places.astype(np.min_scalar_type(len(self._names))))
        self._hashes.append(text_hashes(clean["sequence"].to_pylist()))
        text, bounds = text_bytes(clean)
        sizes, times = np.unique(np.diff(bounds), return_counts=True)
        self._lengths.update(dict(zip(sizes.tolist(), times.tolist(), strict=True)))
        self._letters += count_letters(text)
        if tokens is not None:
            tokens.add(ExampleTable.of(*encode_residues(bytes(text), np.diff(bounds))))

    def check(self, method: Method | None, tokens: TableWriter | None) -> Check:
        cfg, checker, seen = self._cfg, self._checker, self._labels
        for rows in read_chunks(self._path, cfg, self._joiner):
            self._add(rows, tokens)
        if seen is not None:
            seen.conclude(checker.problems)
        checker.conclude()
        checker.check_left(self._read)
        sequences = np.concatenate(self._hashes)
        self._hashes.clear()
        numbers = seen is not None and seen.labels.numeric
        splits = np.concatenate(self._splits) if self._splits else np.empty(0, np.int8)
        named = {name: int(count) for name, count in zip(self._names, np.bincount(splits), strict=True)}
        lengths = np.array(sorted(self._lengths.items())).reshape(-1, 2)
        return Check(
            file=self._path,
            rows=self._read,
            proteins=len(sequences),
            residues=int((lengths[:, 0] * lengths[:, 1]).sum()),
            lengths={name: int(value) for name, value in _counted_quartiles(*lengths.T).items()},
            alphabet=dict(Counter({r: n for r in RESIDUES if (n := int(self._letters[ord(r)]))}).most_common()),
            repeated=len(sequences) - len(np.unique(sequences)),
            conflicting=0 if seen is None else conflicting(sequences, sequences, np.concatenate(seen.hashes)),
            labels=None if seen is None or numbers else dict(seen.names.most_common()),
            values=_quartiles(values) if seen and len(values := np.concatenate([[], *seen.values])) else None,
            splits=dict(Counter(named).most_common()) if cfg.split_column is not None else None,
            leaks=self._leaks(sequences, splits, method, tokens),
            changed=Report(name="", **{**checker.counts, "rows": 0}).summary().partition("; ")[2],
            faults=checker.problems.total,
            first_faults=tuple(checker.problems.first),
        )

    def _leaks(
        self, sequences: np.ndarray, splits: np.ndarray, method: Method | None, tokens: TableWriter | None
    ) -> dict[str, Leak]:
        training = splits == self._names.get(self._train, -1)
        if not training.any() or training.all():
            return {}
        has_homolog, short = np.zeros((2, len(splits)), dtype=bool)
        looked = method is not None and tokens is not None and len(splits) <= MOST
        if method is not None and tokens is not None and looked:
            table = tokens.table()
            held_out, train_table = select_records(table, ~training)[0], select_records(table, training)[0]
            has_homolog[~training] = find_homologs(held_out, train_table, method)
            if method == "kmer":
                short[~training] = too_short(held_out, train_table) & ~has_homolog[~training]
        found, known = {}, np.sort(sequences[training])
        there = ~training
        for name, place in self._names.items():
            own = there & (splits == place)
            if own.any():
                at = np.minimum(np.searchsorted(known, sequences[own]), len(known) - 1)
                copies = int((known[at] == sequences[own]).sum())
                homologs = int(has_homolog[own].sum()) if looked else None
                found[name] = Leak(int(own.sum()), copies, homologs, int(short[own].sum()))
        return found


def _quartiles(values: np.ndarray) -> dict[str, float]:
    return _named(np.percentile(values, [0, 25, 50, 75, 100]))


def _counted_quartiles(values: np.ndarray, times: np.ndarray) -> dict[str, float]:
    """Return the quartiles of sorted values, each of which is there so many times."""
    ends = np.cumsum(times)
    place = np.array([0, 0.25, 0.5, 0.75, 1]) * (ends[-1] - 1)
    low, high = (values[np.searchsorted(ends, at.astype(np.int64), side="right")] for at in (place, np.ceil(place)))
    return _named(low + (high - low) * (place % 1))


def _named(found: np.ndarray) -> dict[str, float]:
    return dict(zip(("min", "q1", "median", "q3", "max"), map(float, found), strict=True))
