"""Check records: ids are unique, sequences are residues, labels are there. What cannot be used is named or counted."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import DataConfig
from esm_neuron.data.records import place, row_unit
from esm_neuron.data.sources import sequence_bytes
from esm_neuron.data.tokenizer import BadResidues, bad_residues, not_residues, replace_bad_residues
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.files import write_text
from esm_neuron.redact import Lines

MOST_LISTED = 20
"""Problems that an error lists; the rest is counted."""

_SPECIAL = {"*": " (a stop codon)", "-": " (a gap)", ".": " (a gap)", "J": " (leucine or isoleucine)"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to the proteins of a file or of a split; fields without a word of their own count proteins."""

    name: str
    """The file or the split."""
    rows: int = 0
    """Read (file) or used (split)."""
    filtered: int = 0
    filtered_heldout: int = 0
    skipped: int = 0
    replaced: int = 0
    replaced_residues: int = 0
    """Characters replaced by X."""
    cropped: int = 0
    cropped_residues: int = 0
    """Residues cut off."""
    windowed: int = 0
    windows: int = 0
    """Windows made of the `windowed` proteins."""
    unlabelled_residues: int = 0
    repeated: int = 0
    """With a sequence that an earlier protein of the same split has."""
    in_train: int = 0
    renamed: int = 0
    conflicting: int = 0
    """With a sequence that has another label elsewhere: in training, or in the same split."""

    def summary(self) -> str:
        """Return one line: the proteins and every count that is not 0."""
        texts = {
            "filtered": "left out by data.keep",
            "filtered_heldout": "left out by data.keep_heldout",
            "skipped": "skipped for characters that are no residues",
            "replaced": f"with {self.replaced_residues} characters replaced by X",
            "cropped": f"cropped, {self.cropped_residues} residues cut off",
            "windowed": f"cut into {self.windows} windows",
            "unlabelled_residues": "residues without a label (task.ignore)",
            "repeated": "repeat a sequence of the same split",
            "in_train": "have a sequence that is in training too",
            "renamed": "have an id that names another sequence in training",
            "conflicting": "have a sequence with conflicting labels",
        }
        parts = [f"{getattr(self, key)} {text}" for key, text in texts.items() if getattr(self, key)]
        return f"{self.name}: " + "; ".join([f"{self.rows} proteins", *parts])


@dataclass
class Problems:
    """Collects what is wrong with a file, so that one error tells it all."""

    source: str
    first: list[str] = field(default_factory=list)
    """The first MOST_LISTED problems, one line per problem."""
    total: int = 0

    def add(self, line: int, message: str) -> None:
        """Note a problem of the record that starts in `line`, or has this number."""
        self.total += 1
        if len(self.first) < MOST_LISTED:
            self.first.append(f"{place(self.source, line)}: {message}")

    def raise_any(self) -> None:
        """Raise what was noted as DataError: one line for one problem; else their count, then the first of them."""
        if self.total == 1:
            raise DataError(self.first[0])
        if self.total:
            which = f"the first {len(self.first)}" if self.total > len(self.first) else "all listed"
            raise DataError(Lines.of([f"{self.source}: {self.total} problems ({which}):", *self.first], "  "))


@dataclass(frozen=True)
class Rejected:
    """A record that was left out or changed, and why."""

    file: str
    line: int
    """Its line, or in Parquet files and datasets the number of the record, from 1."""
    id: str
    reason: str
    action: str
    """`left out` or `replaced by X`."""


_HEADER = "\t".join(field.name for field in fields(Rejected)) + "\n"


def rejected_path(target: Path) -> Path:
    """Return the file beside an output that lists the records left out or changed."""
    return target.with_name(f"{target.name}.rejected.tsv")


def check_rejected(path: Path) -> None:
    """Raise ConfigError where `save_rejected` would replace a file that it did not write."""
    ours = not os.path.lexists(path)
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            ours = file.read(len(_HEADER)) == _HEADER.encode()
    if not ours:
        raise ConfigError(
            f"{path} is in the way: records that are left out are listed there; move it, or name another --output"
        )


def save_rejected(path: Path, rows: Sequence[Rejected]) -> None:
    """Write a tab-separated file of records left out or changed; if there are none, remove that of an earlier run."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")  # quotes values that hold tabs or newlines
    writer.writerows([[field.name for field in fields(Rejected)], *map(astuple, rows)])
    if rows:
        write_text(path, text.getvalue())
    else:
        path.unlink(missing_ok=True)


class Checker:
    """Take the rows of one file, in as many chunks as they come, and return those that can be used.

    `cfg.on_bad_residue` decides about characters that are no residue; every other fault is an error in any case.
    """

    def __init__(self, cfg: DataConfig, source: str) -> None:
        self._cfg, self._source = cfg, source
        self.problems = Problems(source)
        """What is wrong with the rows so far, in the order of the file."""
        self._ids = _Ids()
        self.counts: Counter[str] = Counter(rows=0, skipped=0)
        """Counts of the rows so far, by their names in a `Report`."""
        self.rejected: list[Rejected] = []
        """The rows left out or changed so far, in the order of the file."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return the rows of a chunk that can be used, sequences in upper case; note problems, also of `label`."""
        kept = np.ones(len(rows), dtype=bool)
        changed: dict[int, str] = {}
        columns = [name for name in ("line", "id", "sequence", "label") if name in rows.column_names]
        first = self._ids.first_lines(rows["id"].to_pylist(), rows["line"].to_numpy())
        # Whole columns tell which rows could be at fault; only these are looked at one by one.
        for row in np.flatnonzero(_suspects(rows, first)).tolist():
            sequence = self._check(int(first[row]), *(rows[name][row].as_py() for name in columns))
            if sequence is None:
                kept[row] = False
            elif sequence != rows["sequence"][row].as_py():
                changed[row] = sequence
        self.counts.update(rows=len(rows), skipped=int((~kept).sum()))
        sequences = rows["sequence"]
        # Only a chunk with a replaced sequence pays for Python strings.
        if changed:
            texts = sequences.to_pylist()
            sequences = pa.array([changed.get(row, text) for row, text in enumerate(texts)], pa.large_string())
        rows = rows.set_column(rows.column_names.index("sequence"), "sequence", pc.ascii_upper(sequences))
        return rows if kept.all() else rows.filter(pa.array(kept))

    def _check(self, first: int, line: int, name: str, sequence: str, label: str | None = None) -> str | None:
        """Note what is wrong with a row. Return its sequence as it is used, None where the row is left out."""
        if not name:
            self.problems.add(line, "the id is empty; give every record a name")
        elif first != line:
            where = f"{row_unit(self._source)} {first}"
            self.problems.add(line, f"id {quote(name)} was used in {where} already; make ids unique")
        if label is not None and is_missing(label):
            what = f"column {self._cfg.label_column!r} of {quote(name)} is empty"
            self.problems.add(line, f"{what}; give a label or remove the record")
        if not sequence:
            self.problems.add(line, f"the sequence of {quote(name)} is empty; give it residues or remove the record")
        bad = bad_residues(sequence)
        if bad is None:
            return sequence
        choice = self._cfg.on_bad_residue
        if choice == "strict":
            cure = "correct it, or use data.on_bad_residue=skip (leave the record out) or replace (write X)"
            self.problems.add(line, f"the sequence of {quote(name)} {_bad_message(bad)}; {cure}")
        else:
            action = "left out" if choice == "skip" else "replaced by X"
            self.rejected.append(Rejected(self._source, line, name, f"the sequence {_bad_message(bad)}", action))
        if choice == "skip":
            return None
        self.counts.update(replaced=1, replaced_residues=bad.count)
        return replace_bad_residues(sequence)

    def finish(self) -> None:
        """Raise DataError, after the last chunk, where a row cannot be used or none is left."""
        self.problems.raise_any()
        rows = self.counts["rows"]
        if self.counts["skipped"] == rows:
            raise DataError(f"{self._source}: all {rows} records have characters that are no residues; is it protein?")


class _Ids:
    """Remember where each id of a file was first used, in 16 bytes: its hash and its line."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # (hashes, lines), sorted by hash, ever shorter

    def first_lines(self, ids: Sequence[str], lines: np.ndarray) -> np.ndarray:
        """Return the line in which each id of the next chunk was first used, int64 [rows]: its own, if it is new."""
        known, at, index = np.unique(text_hashes(ids), return_index=True, return_inverse=True)
        first = lines[at]
        for hashes, earlier in self._runs:
            place = np.minimum(np.searchsorted(hashes, known), len(hashes) - 1)
            first = np.where(hashes[place] == known, earlier[place], first)
        if len(known):
            self._runs.append((known, first))
        # Merge a run with one that is not much longer: few runs are left, and each id is moved only a few times.
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            (older, newer), (older_lines, newer_lines) = zip(*self._runs[-2:], strict=True)
            merged, at = np.unique(np.concatenate([older, newer]), return_index=True)
            self._runs[-2:] = [(merged, np.concatenate([older_lines, newer_lines])[at])]
        return np.asarray(first[index])


def _suspects(rows: pa.Table, first: np.ndarray) -> np.ndarray:
    """Return which rows may have a fault, bool [rows]; `first` is the line in which the id of each was first used."""
    residues, bounds = sequence_bytes(rows)
    found = (first != rows["line"].to_numpy()) | (np.diff(bounds) == 0) | (pc.equal(rows["id"], "").to_numpy())
    if "label" in rows.column_names:
        empty = pc.or_(pc.equal(rows["label"], ""), pc.equal(pc.utf8_lower(rows["label"]), "nan"))  # `is_missing`
        found |= empty.to_numpy()
    # Bad characters are looked for in the bytes of all sequences at once; `bounds` tells whose they are.
    found[np.searchsorted(bounds, not_residues(bytes(residues)), side="right") - 1] = True
    return np.asarray(found)


def is_missing(value: str) -> bool:
    """Return whether a value stands for nothing: '' or NaN. NA and None can be labels."""
    return value == "" or value.lower() == "nan"


def quote(value: str) -> str:
    """Return a value as an error shows it: on one line, shortened to 60 characters."""
    return repr(value if len(value) <= 60 else value[:57] + "...")


def text_hashes(texts: Sequence[str]) -> np.ndarray:
    """Return a hash of each text, uint64 [n]: Python's own (SipHash), which is equal within this process alone."""
    return np.fromiter(map(hash, texts), np.int64, len(texts)).view(np.uint64)


def mixed(values: np.ndarray) -> np.ndarray:
    """Return a hash of each number of 64 bits, uint64 [n] (splitmix64, doi:10.1145/2660193.2660195)."""
    bits = values.view(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits


def conflicting(own: np.ndarray, sequences: np.ndarray, labels: np.ndarray) -> int:
    """Count the rows of `own` whose sequence has more than one label among `sequences` and `labels`; all are hashes."""
    # A sequence in more than one distinct pair has labels that conflict.
    pairs = np.unique(np.stack([sequences, labels], axis=1), axis=0)
    different, times = np.unique(pairs[:, 0], return_counts=True)
    return int(np.isin(own, different[times > 1]).sum())


def _bad_message(bad: BadResidues) -> str:
    more = f" and {bad.count - 1} more" if bad.count > 1 else ""
    what = f"{bad.character!r}{_SPECIAL.get(bad.character.upper(), '')}"
    return f"has {what} at residue {bad.position}{more}, outside the ESM alphabet"
