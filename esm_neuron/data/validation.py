"""Check records: ids are unique, sequences are residues, labels are there. What cannot be used is named or counted."""

from __future__ import annotations

import csv
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import DataConfig
from esm_neuron.data.looks import LEAST_LETTERS, LOCATION, LONGEST, NO_LABEL, Looks, is_nothing
from esm_neuron.data.records import NUMBERED, file_and_number, files_of, place, row_unit
from esm_neuron.data.sources import text_bytes
from esm_neuron.data.tokenizer import BadResidues, bad_residues, not_residues, replace_bad_residues
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.files import new_file, open_new, parse_json
from esm_neuron.redact import Lines

MOST_LISTED, MOST_ALIKE = 20, 3
"""Problems that an error lists, and how many of one kind; the rest is counted."""
_VARIES = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+")
"""In what problems of one kind differ."""
_BLOCK = 1024
"""Rejected records that are packed together: about 20 bytes each."""

MOST_REPLACED = 0.2
"""Largest share of all characters that data.on_bad_residue=replace writes X for."""
_NOT_WRITTEN = re.compile(r"[-.~*\s\d]")
"""Gaps, blanks, digits, and stops within: what alignments and numbered listings add to sequences."""
_QUOTES = re.compile("[\"'`´“”‘’„«»]")
_STOPS = r"\*+(\||$)"
"""Stops at the end of a sequence, or of a chain before another."""
_NUCLEIC = "^[ACGTUN]{30,}$"
"""A sequence that is hardly a protein's: of 30 random residues, one in 10^17 has these letters alone."""
_STRUCTURE_STARTS, _STRUCTURE_ENDS = ("ss_pred", "ss_conf", "ss_dssp"), (":secstr", "_secstr")
"""How the names of records begin or end that A3M files (HHsuite) and the PDB's ss.txt have beside proteins."""
_SPECIAL = {
    " ": " (a blank)",
    "*": " (a stop codon)",
    "-": " (a gap)",
    ".": " (a gap)",
    '"': " (a quote)",
    "'": " (a quote)",
    "J": " (leucine or isoleucine)",
}


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
    stripped: int = 0
    stripped_characters: int = 0
    """Gaps, blanks, digits and stops taken out of the `stripped` proteins."""
    nucleic: int = 0
    unknown: int = 0
    words: int = 0
    numbered: int = 0
    stops: int = 0
    missing: int = 0
    short: int = 0
    long: int = 0
    doubled: int = 0
    beyond: int = 0
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
            "stripped": f"with {self.stripped_characters} gaps, blanks, digits or stops taken out",
            "nucleic": "WARNING: written in A, C, G, T, U and N alone, as nucleotides are",
            "unknown": "WARNING: of X alone",
            "words": "WARNING: short and in small letters among capitals, as words are",
            "numbered": "named by their number: there is no id column (data.id_column)",
            "stops": "with a * taken off their ends",
            "missing": "left out without a sequence or a label (data.on_missing)",
            "short": "left out as shorter than data.min_residues",
            "long": "left out as longer than data.max_residues",
            "doubled": "left out as repeating a value of data.unique_column",
            "beyond": "left out after the first data.max_rows",
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
    total: int = 0
    _lines: list[str] = field(default_factory=list)
    _kinds: dict[str, list[int]] = field(default_factory=dict)
    """Kind of problem that has a line -> the place of its last one, how many it has, and how many more were noted."""

    def add(self, line: int | None, message: str) -> None:
        """Note a problem of the record that starts in `line`, or has this number; None: of the file as a whole."""
        self.total += 1
        kind = _VARIES.sub("", message)
        listed = self._kinds[kind][1] if kind in self._kinds else 0
        if listed < MOST_ALIKE and len(self._lines) < MOST_LISTED:
            self._kinds[kind] = [len(self._lines), listed + 1, 0]
            self._lines.append(f"{self.source if line is None else place(self.source, line)}: {message}")
        elif listed:
            self._kinds[kind][2] += 1

    @property
    def first(self) -> list[str]:
        """The first problems of each kind, MOST_LISTED at most, a line each; the last one says how many are like it."""
        lines = list(self._lines)
        for last, _, more in self._kinds.values():
            lines[last] += f" (and {more} more like it)" if more else ""
        return lines

    def raise_any(self) -> None:
        """Raise what was noted as DataError: one line for one problem; else their count, then the first of them."""
        if self.total == 1:
            raise DataError(self.first[0])
        if self.total:
            which = "the first of each kind" if self.total > len(self._lines) else "all listed"
            raise DataError(Lines.of([f"{self.source}: {self.total} problems ({which}):", *self.first], "  "))


class Rejected(NamedTuple):
    """A record that was left out or changed, and why."""

    file: str
    line: int
    """Its line, or in Parquet files and datasets the number of the record, from 1."""
    id: str
    reason: str
    action: str
    """`left out` or `replaced by X`."""


_HEADER = "\t".join(Rejected._fields) + "\n"


class RejectedRows:
    """Records left out or changed, in their order and packed: a corpus in which none is sound fills no memory."""

    def __init__(self, rows: Iterable[Rejected] = ()) -> None:
        self._packed: list[bytes] = []  # blocks of `_BLOCK` rows
        self._last: list[Rejected] = []
        for row in rows:
            self.append(row)

    def append(self, row: Rejected) -> None:
        self._last.append(row)
        if len(self._last) == _BLOCK:
            self._packed.append(zlib.compress(json.dumps(self._last).encode(), 1))
            self._last = []

    def __len__(self) -> int:
        return len(self._packed) * _BLOCK + len(self._last)

    def __iter__(self) -> Iterator[Rejected]:
        for block in self._packed:
            yield from (Rejected(*row) for row in parse_json(zlib.decompress(block)))
        yield from self._last


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


def save_rejected(path: Path, rows: RejectedRows) -> None:
    """Write a tab-separated file of records left out or changed; if there are none, remove that of an earlier run."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    with new_file(path) as aside, open_new(aside) as file:
        file.write(_HEADER)
        # quotes values that hold tabs or newlines
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)


class Checker:
    """Take the rows of one file, in as many chunks as they come, and return those that can be used.

    `cfg.on_bad_residue` decides about characters that are no residue, `cfg.on_missing` about rows without a sequence or
    a label, `cfg.min_residues` about short ones; every other fault is an error in any case.
    """

    def __init__(self, cfg: DataConfig, source: str, nothing: frozenset[str] = NO_LABEL) -> None:
        self._cfg, self._source, self._nothing = cfg, source, nothing  # the last: what stands for no label
        self._chains = len(cfg.sequence_columns) > 1
        self.problems = Problems(source)
        """What is wrong with the rows so far, in the order of the file."""
        self._ids, self._looks = _Ids(), Looks()
        self.counts: Counter[str] = Counter(rows=0, skipped=0)
        """Counts of the rows so far, by their names in a `Report`."""
        self._used = 0
        self.rejected = RejectedRows()
        """The rows left out or changed so far, in the order of the file."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return the rows of a chunk that can be used, sequences in upper case; note problems, also of `label`."""
        rows = self._without_stops(rows)
        kept = np.ones(len(rows), dtype=bool)
        changed: dict[int, str] = {}
        columns = [name for name in ("line", "id", "sequence", "label") if name in rows.column_names]
        first = self._ids.first_lines(rows["id"].to_pylist(), rows["line"].to_numpy())
        residues, bounds = text_bytes(rows)
        self._looks.count(residues)
        missing = self._missing(rows, np.diff(bounds))
        for row, what in self._looks.strange(rows["sequence"]):
            name = quote(rows["id"][row].as_py())
            self.problems.add(rows["line"][row].as_py(), f"the sequence of {name} {what}")
        # Whole columns tell which rows could be at fault; only these are looked at one by one.
        suspects = _suspects(rows, first, missing, self._nothing)
        # Bad characters are looked for in the bytes of all sequences at once; `bounds` tells whose they are.
        bad = not_residues(bytes(residues), self._chains)
        suspects[np.searchsorted(bounds, bad, side="right") - 1] = True
        for row in np.flatnonzero(suspects).tolist():
            values = [rows[name][row].as_py() for name in columns]
            sequence = self._check(int(first[row]), bool(missing[row]), *values)
            if sequence is None:
                kept[row] = False
            elif sequence != rows["sequence"][row].as_py():
                changed[row] = sequence
        sequences = rows["sequence"]
        # Only a chunk with a replaced sequence pays for Python strings.
        if changed:
            texts = sequences.to_pylist()
            sequences = pa.array([changed.get(row, text) for row, text in enumerate(texts)], pa.large_string())
        rows = rows.set_column(rows.column_names.index("sequence"), "sequence", pc.ascii_upper(sequences))
        nucleic = pc.match_substring_regex(rows["sequence"], _NUCLEIC).to_numpy() & kept
        unknown = pc.match_substring_regex(rows["sequence"], "^X+$").to_numpy() & kept
        numbered = len(rows) if NUMBERED.encode() in (rows.schema.metadata or {}) else 0
        self.counts.update(nucleic=int(nucleic.sum()), unknown=int(unknown.sum()), numbered=numbered)
        kept = self._of_length(rows, kept)
        self.counts.update(rows=len(rows))
        self._used += int(kept.sum())
        return rows if kept.all() else rows.filter(pa.array(kept))

    def _without_stops(self, rows: pa.Table) -> pa.Table:
        """Return the rows without `*` at the ends of sequences, where translation has stopped."""
        ends = pc.match_substring_regex(rows["sequence"], _STOPS)
        stops = pc.sum(ends).as_py() or 0
        if not stops:
            return rows
        self.counts.update(stops=stops)
        trimmed = pc.replace_substring_regex(rows["sequence"], _STOPS, r"\1")
        return rows.set_column(rows.column_names.index("sequence"), "sequence", trimmed)

    def _missing(self, rows: pa.Table, lengths: np.ndarray) -> np.ndarray:
        """Return which rows have no sequence, bool [rows]: an empty one, or a word such as `nan` in its place."""
        found = lengths == 0
        short = np.flatnonzero((lengths > 0) & (lengths <= LONGEST))
        words = rows["sequence"].take(pa.array(short)).to_pylist()
        found[short] = self._looks.missing(len(rows), words)
        return np.asarray(found)

    def _of_length(self, rows: pa.Table, kept: np.ndarray) -> np.ndarray:
        """Leave out, and count, sequences that are shorter or longer than is asked for."""
        cfg = self._cfg
        if cfg.min_residues > 1 or cfg.long_sequences == "skip":
            lengths = pc.binary_length(rows["sequence"]).to_numpy()
            short = kept & (lengths < cfg.min_residues)
            long = kept & (lengths > cfg.max_residues) & (cfg.long_sequences == "skip")
            self.counts.update(short=int(short.sum()), long=int(long.sum()))
            for row in np.flatnonzero(short | long).tolist():
                line, name = rows["line"][row].as_py(), rows["id"][row].as_py()
                self._reject(line, name, f"the sequence has {lengths[row]} residues", "left out")
            kept = kept & ~short & ~long
        return kept

    def _check(
        self, first: int, missing: bool, line: int, name: str, sequence: str, label: str | None = None
    ) -> str | None:
        """Note what is wrong with a row. Return its sequence as it is used, None where the row is left out."""
        if not name:
            self.problems.add(line, "the id is empty; give every record a name")
        elif first != line:
            where = row_place(self._files, first, line)
            self.problems.add(line, f"id {quote(name)} was used in {where} already; make ids unique")
        if name.startswith(_STRUCTURE_STARTS) or name.endswith(_STRUCTURE_ENDS):
            self.problems.add(line, f"{quote(name)} is a structure, not a protein; remove such records")
        lacks = []
        if label is not None and is_nothing(label, self._nothing):
            word = label and f"{quote(label)}, which stands for none"
            cure = "give a label" + (
                ", or name it with the other classes in task.labels where it is one," if word else ""
            )
            lacks.append((f"column {self._cfg.label_column!r} of {quote(name)} is {word or 'empty'}", cure))
        if missing:
            what = f"{quote(sequence)}, which stands for none" if sequence else "empty"
            lacks.append((f"the sequence of {quote(name)} is {what}", "give it residues"))
        if lacks and self._cfg.on_missing == "skip":
            self._reject(line, name, "; ".join(what for what, _ in lacks), "left out")
            self.counts.update(missing=1)
            return None
        for what, cure in lacks:
            self.problems.add(line, f"{what}; {cure} or remove the record, or leave such out: data.on_missing=skip")
        return "" if missing else self._residues(line, name, sequence)

    def _residues(self, line: int, name: str, sequence: str) -> str | None:
        """Return a sequence without what is no residue, as `cfg.on_bad_residue` says; None: leave its row out."""
        choice = self._cfg.on_bad_residue
        whole = sequence
        if choice == "strip":
            sequence = _NOT_WRITTEN.sub("", sequence)
            if len(sequence) < len(whole):
                self.counts.update(stripped=1, stripped_characters=len(whole) - len(sequence))
                self._reject(line, name, f"the sequence {_bad_message(bad_residues(whole, self._chains))}", "stripped")
        bad = bad_residues(sequence, self._chains)
        quoted = _QUOTES.search(sequence) is not None  # of a table that was written otherwise: the rest may be torn
        if not sequence:
            self.problems.add(
                line, f"the sequence of {quote(name)} is {quote(whole)}: nothing is left of it; remove it"
            )
        if bad is None:
            return sequence
        if choice in ("strict", "strip") or (quoted and choice == "replace"):
            self.problems.add(line, f"the sequence of {quote(name)} {_bad_message(bad)}; {_bad_cure(sequence, choice)}")
            return replace_bad_residues(sequence, self._chains)
        self._reject(
            line, name, f"the sequence {_bad_message(bad)}", "left out" if choice == "skip" else "replaced by X"
        )
        if choice == "skip":
            self.counts.update(skipped=1)
            return None
        self.counts.update(replaced=1, replaced_residues=bad.count)
        return replace_bad_residues(sequence, self._chains)

    @cached_property
    def _files(self) -> Sequence[tuple[str, str | None]]:
        return files_of(self._source)  # once: a pattern is looked up in folders

    def _reject(self, line: int, name: str, reason: str, action: str) -> None:
        self.rejected.append(Rejected(*file_and_number(self._files, line), name, reason, action))

    def conclude(self) -> None:
        """Note, after the last chunk, what only the file as a whole shows."""
        self.counts.update(words=self._looks.words())
        foreign = self._looks.foreign()
        if foreign is not None:
            self.problems.add(None, foreign)
        replaced, letters = self.counts["replaced_residues"], self._looks.letters
        if letters >= LEAST_LETTERS and replaced > MOST_REPLACED * letters:
            self.problems.add(
                None,
                f"{replaced} of {letters} characters would be replaced by X: too many to be residues; take gaps, "
                "blanks, digits and stops out with data.on_bad_residue=strip, or correct the sequences",
            )

    def finish(self) -> None:
        """Raise DataError, after the last chunk, where a row cannot be used or none is left."""
        self.conclude()
        self.problems.raise_any()
        self.check_left(self.counts["rows"])

    def check_left(self, read: int) -> None:
        """Raise DataError where none of `read` rows is left."""
        if not read or self._used:
            return
        self.problems.raise_any()
        if not self.counts["rows"]:
            raise DataError(f"{self._source}: data.keep leaves no records; use values that are there")
        report = Report(name=self._source, **self.counts).summary()
        cure = "is it protein?" if self.counts["skipped"] == self.counts["rows"] else "change what is left out"
        raise DataError(f"{report}: none is left; {cure}")


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


def _suspects(rows: pa.Table, first: np.ndarray, missing: np.ndarray, nothing: frozenset[str]) -> np.ndarray:
    """Return which rows may have a fault besides their residues, bool [rows].

    `first` is the line in which the id of each was first used, `missing` says which have no sequence, `nothing` what
    stands for no label.
    """
    found = (first != rows["line"].to_numpy()) | missing | (pc.equal(rows["id"], "").to_numpy())
    for match, patterns in ((pc.starts_with, _STRUCTURE_STARTS), (pc.ends_with, _STRUCTURE_ENDS)):
        for pattern in patterns:
            found |= match(rows["id"], pattern).to_numpy()
    if "label" in rows.column_names:
        found |= pc.is_in(
            pc.utf8_lower(rows["label"]), value_set=pa.array(sorted(nothing), pa.large_string())
        ).to_numpy()
        found |= pc.starts_with(rows["label"], LOCATION).to_numpy()
    return np.asarray(found)


def row_place(files: Sequence[tuple[str, str | None]], number: int, seen_from: int) -> str:
    """Return where a row is, for a message about another one: `line 4`, or with its file where that is another."""
    (file, at), (other, _) = file_and_number(files, number), file_and_number(files, seen_from)
    return f"{row_unit(file)} {at}" + ("" if file == other else f" of {file}")


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
    order = np.argsort(sequences)
    sequences = sequences[order]
    starts = np.flatnonzero(np.diff(sequences, prepend=~sequences[:1]))  # of the rows of each sequence
    if not len(starts):
        return 0
    labels = labels[order]
    several = np.minimum.reduceat(labels, starts) != np.maximum.reduceat(labels, starts)
    return int(np.isin(own, sequences[starts[several]]).sum())


def _bad_cure(sequence: str, choice: str) -> str:
    """Return what helps against a character that is no residue, of what does help."""
    if _QUOTES.search(sequence):
        return (
            'take the quotes out: in a CSV only a " directly behind the separator, without a blank, begins a quoted '
            "value; or use data.on_bad_residue=skip (leave the record out)"
        )
    stripped = bad_residues(_NOT_WRITTEN.sub("", sequence), chains=True) is None
    strip = ", strip (take gaps, blanks, digits and stops out)" if stripped and choice == "strict" else ""
    return f"correct it, or use data.on_bad_residue=skip (leave the record out){strip} or replace (write X)"


def _bad_message(bad: BadResidues | None) -> str:
    if bad is None:
        return "is sound"
    more = f" and {bad.count - 1} more" if bad.count > 1 else ""
    what = f"{bad.character!r}{_SPECIAL.get(bad.character.upper(), '')}"
    chain = f" of chain {bad.chain}" if bad.chain else ""
    return f"has {what} at residue {bad.position}{chain}{more}, outside the ESM alphabet"
