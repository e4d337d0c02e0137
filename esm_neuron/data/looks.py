"""What the sequences of a file look like as a whole: proteins, or nucleotides, structures, cells of a table left empty.

One record cannot tell: GATTACA is a peptide, NAN is one, and HHH is a tail of histidines. A file can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLANK = frozenset(
    (
        *("nan", "none", "null", "na", "n/a", "n.a.", "#n/a", "<na>", "nil", "#value!", "#ref!", "#name?"),
        *(
            "-",
            "--",
            ".",
            "?",
            "\u2013",
            "\u2014",
            "\u2212",
            "\u2026",
        ),  # also dashes and dots as word processors write them
    )
)
"""What programs write where a value is missing, in small letters: nothing of it is a name."""
NO_LABEL = BLANK | {""}
"""What stands for no label of a protein and for no measured value, in small letters."""
NO_RESIDUE_LABELS = frozenset(("", "nan", "<na>", "#n/a"))
"""What stands for no labels of residues, in small letters: `-` and NA can be those of one residue or two."""
MISSING = BLANK | frozenset(
    (
        *("??", "???", "nd", "n.d.", "n/d", "tbd", "tba", "todo", "true", "false", "missing", "unknown", "undefined"),
        *("deleted", "removed", "withdrawn", "obsolete", "deprecated", "pending", "empty", "blank", "absent", "error"),
        *("failed", "unavailable", "unassigned", "not available", "not found", "no data", "no sequence", "redacted"),
        *("see note", "in progress", "not determined", "to be determined", "merged", "demerged", "invalid", "void"),
    )
)
"""What programs and people write where a value is missing, in small letters."""
LOCATION = "SUBCELLULAR LOCATION:"
"""How UniProt's free text about locations begins."""
LONGEST = max(map(len, MISSING))
"""Characters of the longest of them."""
LEAST_LETTERS = 50
"""Letters below which a file is too small to tell."""
SAMPLE = 1 << 20
"""Most letters of a chunk of rows that are counted."""
_PEPTIDE = 4
"""Residues of a peptide so short that NAN may be one of its kind."""


_STRUCTURES = frozenset("HECLBGITSP-~")
"""Letters of secondary structures in 3 and 8 states."""
_FEW = 8
"""Most letters of a line of labels."""
_LEAST_STRUCTURE = 15
_LEAST_LINE = 20
ALL = 10_000
"""Records of a FASTA file that are all looked at for labels; of later ones it is every 16th."""


def is_structure(text: str) -> bool:
    """Return whether a text is a secondary structure: of H, E and C two or more, and most letters stand in runs."""
    text = text.upper()
    if len(text) < _LEAST_STRUCTURE or len(set(text) & set("HEC")) < 2 or not set(text) <= _STRUCTURES:
        return False
    return sum(a == b for a, b in pairwise(text)) >= len(text) / 2


_CODES = "ALA|ARG|ASN|ASP|CYS|GLN|GLU|GLY|HIS|ILE|LEU|LYS|MET|PHE|PRO|SER|THR|TRP|TYR|VAL"
_CODED = "is written in codes of three letters; write MKA for MetLysAla"
_LEAST_CODED = 9
_STRUCTURE = "is a secondary structure; remove such records"
_ROWS = (
    (
        r"^(?:[A-Z#][a-z#]){5,}$",
        "has a small letter behind each capital, as SaProt writes structures among residues; keep the capitals alone",
    ),
    (rf"(?i)^(?:(?:{_CODES})[\s-]*)+$", _CODED),
    (
        rf"(?i)^[{''.join(_STRUCTURES - {'-'})}-]{{{_LEAST_STRUCTURE},}}$",
        _STRUCTURE,
    ),
)
"""What a sequence looks like -> what to say; no protein of so many residues looks so by chance."""


def is_nothing(label: str, nothing: frozenset[str]) -> bool:
    """Return whether a label is one of `nothing`, in small letters, or UniProt's note without a location."""
    return label.lower() in nothing or label.startswith(f"{LOCATION} Note=")


class LabelLines:
    """Tell records of a FASTA file that have labels below the residues, as SignalP's third line, in the sequence."""

    def __init__(self) -> None:
        self._seen = self._records = self._labelled = self._certain = self._first = 0

    def due(self, records: int) -> np.ndarray:
        """Return which of the next records are to be looked at, counted from 0."""
        number = self._seen + np.arange(1, records + 1)
        self._seen += records
        return np.flatnonzero((number <= ALL) | (number % 16 == 0))  # a corpus need not wait for each of its records

    def look(self, start: int, body: str) -> None:
        """Look at the lines of a record whose header is in line `start`."""
        self._records += 1
        lines = body.split()
        if len(lines) < 2:
            return
        text, ends = "".join(lines), set(accumulate(map(len, lines)))
        found = False
        for parts in (2, 3):  # one line of labels, or two; each may be wrapped as it likes
            size = len(text) // parts
            if len(text) % parts == 0 and size in ends:
                residues, labels = text[:size], text[size : 2 * size]
                certain = is_structure(labels)
                self._certain += certain
                found = found or certain or len(set(labels)) <= min(_FEW, len(set(residues)) // 2)
        # lines of labels that are shorter or longer than the residues; a line of a wrapped protein has more letters
        few = min(_FEW, len(set(lines[0])) // 2)
        found = found or any(len(line) >= _LEAST_LINE and len(set(line)) <= few for line in lines[1:])
        if found:
            self._labelled += 1
            self._first = self._first or start

    def found(self, path: str) -> str | None:
        """Return what to say of the file where its sequences hold labels; None where they do not."""
        if not self._certain and self._labelled * 2 <= self._records:
            return None
        return (
            f"{path}:{self._first}: below the residues of {self._labelled} of {self._records} records stand lines of "
            "labels, of few letters; remove them, or give each record one line of residues and one of labels"
        )


class Looks:
    """Counts over all sequences of a file, taken in as many chunks as they come."""

    def __init__(self) -> None:
        self._letters = np.zeros(256, dtype=np.int64)
        self.letters = 0
        """Characters of all sequences so far."""
        self._rows = 0
        self._words = 0
        self._small = self._coded = 0
        self._peptides = {True: 0, False: 0}  # short sequences that are no word of MISSING, in capitals or not

    def missing(self, rows: int, short: Iterable[str]) -> list[bool]:
        """Return which of the short sequences of the next `rows` rows stand for nothing.

        `short` are those of 1 to LONGEST characters. `nan` and `None` always do, among capitals; NAN does unless the
        file is one of short peptides, and so do other words of up to four letters.
        """
        texts = list(short)
        words = [text.lower() in MISSING for text in texts]
        self._rows += rows
        self._words += sum(words)
        for text, word in zip(texts, words, strict=True):
            if not word and len(text) <= _PEPTIDE:
                self._peptides[text.isupper()] += 1
            self._small += not word and text.isalpha() and not text.isupper()
        least = max(self._words, self._rows / 100)
        alike = {upper: count > least for upper, count in self._peptides.items()}
        return [
            word
            and not (
                len(text) <= _PEPTIDE
                and text.isalpha()
                and (text.isupper() or text.islower())
                and alike[text.isupper()]
            )
            for text, word in zip(texts, words, strict=True)
        ]

    def count(self, residues: memoryview | bytes) -> None:
        """Count the letters of sequences that lie end to end."""
        if not len(residues):
            return
        self.letters += len(residues)
        self._letters += count_letters(residues[:SAMPLE])

    def strange(self, sequences: pa.ChunkedArray) -> Iterator[tuple[int, str]]:
        """Give the row of each sequence that is of another kind of text for certain, and what to say of it."""
        for pattern, what in _ROWS:
            for row in np.flatnonzero(pc.match_substring_regex(sequences, pattern).to_numpy()).tolist():
                text = sequences[row].as_py()
                if what == _CODED and len(text) < _LEAST_CODED:
                    self._coded += 1  # ALA is a peptide, and so is METLYS
                elif what != _STRUCTURE or is_structure(text):
                    yield row, what

    def words(self) -> int:
        """Return how many short sequences in small letters stand among capitals, as words do that MISSING lacks."""
        capitals = int(self._letters[ord("A") : ord("Z") + 1].sum())
        return self._small if capitals > 0.8 * self._letters.sum() else 0

    def foreign(self) -> str | None:
        """Return what the file holds instead of proteins, with the cure; None where it may well hold proteins."""
        letters = {chr(i): int(self._letters[i] + self._letters[i + 32]) for i in range(ord("A"), ord("Z") + 1)}
        total = sum(letters.values())
        if self._coded > max(_FEW, self._rows / 2):
            return f"most sequences are short, and each {_CODED}"
        if total < LEAST_LETTERS:
            return None
        share = {letter: count / total for letter, count in letters.items()}
        bases = sum(share[letter] for letter in "ACGTUN")
        if bases >= 0.95 and min(share["A"], share["C"], share["G"], share["T"] + share["U"]) >= 0.05:
            return (
                f"{bases:.0%} of the letters are A, C, G, T, U or N: these are nucleotides (DNA or RNA), not residues; "
                "translate them into proteins first"
            )
        structure = sum(share[letter] for letter in "HECLBGITSP")
        if structure >= 0.995 and share["H"] >= 0.05 and share["E"] >= 0.02:
            return (
                "the letters are those of secondary structures (H, E, C), not of residues; name the column of residues"
            )
        return None


def count_letters(text: memoryview | bytes) -> np.ndarray:
    """Return how often each byte is in some text, int64 [256]."""
    letters = np.frombuffer(text, dtype=np.uint8) if len(text) else np.empty(0, np.uint8)
    counts = np.zeros(256, np.int64)
    for start in range(0, len(letters), SAMPLE):  # in parts, since numpy makes int64 of what it counts
        counts += np.bincount(letters[start : start + SAMPLE], minlength=256)
    return counts
