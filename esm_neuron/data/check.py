"""Check a file of proteins before anything is trained on it: lengths, alphabet, repeats, labels, leaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import DataConfig
from esm_neuron.data.dataset import ExampleTable, TableWriter, select_records
from esm_neuron.data.filters import passes
from esm_neuron.data.homology import MOST, Method, find_homologs, too_short
from esm_neuron.data.labels import Labels, flatten
from esm_neuron.data.sources import check_sheet, read_chunks
from esm_neuron.data.tokenizer import UNK, VOCABULARY, encode_many
from esm_neuron.data.validation import Checker, Problems, Report, conflicting, text_hashes
from esm_neuron.redact import Lines

SHOWN = 20
"""Labels that the text names."""


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
        self.hashes.append(labels.hashes(encoded))
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
    nothing = () if labels is None else (labels.nothing,)
    checker, writer = Checker(cfg, path, *nothing), TableWriter()
    splits: list[str] = []
    hashes: list[np.ndarray] = []
    seen = None if labels is None else _SeenLabels(labels, cfg.split_column, train)
    read = 0
    for rows in read_chunks(path, cfg, None if labels is None else labels.joiner):
        read += len(rows)
        clean = checker(rows.filter(pa.array(passes(rows, cfg.keep))))
        columns = clean.to_pydict()
        if seen is not None:
            seen.add(clean, checker.problems)
        splits += columns.get("split", [])
        hashes.append(text_hashes(columns["sequence"]))
        writer.add(ExampleTable.of(*encode_many(columns["sequence"])))
    if seen is not None:
        seen.conclude(checker.problems)
    checker.conclude()
    checker.check_left(read)
    table = writer.table()
    sequences, residues = np.concatenate(hashes), table.lengths - 2
    letters = np.bincount(table.tokens, minlength=len(VOCABULARY))[UNK + 1 :]  # residues follow the specials
    order = [i for i in np.argsort(-letters, kind="stable") if letters[i]]
    return Check(
        file=path,
        rows=read,
        proteins=len(table),
        residues=int(residues.sum()),
        lengths={name: int(value) for name, value in _quartiles(residues).items()},
        alphabet={VOCABULARY[UNK + 1 + i]: int(letters[i]) for i in order},
        repeated=len(sequences) - len(np.unique(sequences)),
        conflicting=conflicting(sequences, sequences, np.concatenate(seen.hashes)) if seen is not None else 0,
        labels=None if seen is None or seen.labels.numeric else dict(seen.names.most_common()),
        values=_quartiles(np.concatenate(seen.values)) if seen is not None and any(map(len, seen.values)) else None,
        splits=dict(Counter(splits).most_common()) if cfg.split_column is not None else None,
        leaks=_leaks(table, sequences, np.array(splits), train, method if len(table) <= MOST else None),
        changed=Report(name="", **{**checker.counts, "rows": 0}).summary().partition("; ")[2],
        faults=checker.problems.total,
        first_faults=tuple(checker.problems.first),
    )


def _quartiles(values: np.ndarray) -> dict[str, float]:
    found = np.percentile(values, [0, 25, 50, 75, 100])
    return dict(zip(("min", "q1", "median", "q3", "max"), map(float, found), strict=True))


def _leaks(
    table: ExampleTable, sequences: np.ndarray, splits: np.ndarray, train: str, method: Method | None
) -> dict[str, Leak]:
    training = splits == train
    if not training.any() or training.all():
        return {}
    has_homolog, short = np.zeros((2, len(splits)), dtype=bool)
    if method is not None:
        held_out, train_table = select_records(table, ~training)[0], select_records(table, training)[0]
        has_homolog[~training] = find_homologs(held_out, train_table, method)
        if method == "kmer":
            short[~training] = too_short(held_out, train_table) & ~has_homolog[~training]
    found = {}
    for name in dict.fromkeys(splits[~training].tolist()):
        own = splits == name
        copies = int(np.isin(sequences[own], sequences[training]).sum())
        homologs = int(has_homolog[own].sum()) if method is not None else None
        found[name] = Leak(int(own.sum()), copies, homologs, int(short[own].sum()))
    return found
