"""What the sequences of a file look like as a whole: proteins, or nucleotides, structures, cells of a table left empty.

One record cannot tell: GATTACA is a peptide, NAN is one, and HHH is a tail of histidines. A file can.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

MISSING = frozenset(
    ("nan", "none", "null", "na", "n/a", "#n/a", "<na>", "nil", "#value!", "#ref!", "-", "--", ".", "?", "missing")
)
"""What programs write where a value is missing, in small letters."""
LONGEST = max(map(len, MISSING))
"""Characters of the longest of them."""
LEAST_LETTERS = 50
"""Letters below which a file is too small to tell."""
SAMPLE = 1 << 20
"""Most letters of a chunk of rows that are counted."""
_PEPTIDE = 4
"""Residues of a peptide so short that NAN may be one of its kind."""


class Looks:
    """Counts over all sequences of a file, taken in as many chunks as they come."""

    def __init__(self) -> None:
        self._letters = np.zeros(256, dtype=np.int64)
        self.letters = 0
        """Characters of all sequences so far."""
        self._rows = 0
        self._words = 0
        self._peptides = {True: 0, False: 0}  # short sequences that are no word of MISSING, in capitals or not

    def missing(self, rows: int, short: Iterable[str]) -> list[bool]:
        """Return which of the short sequences of the next `rows` rows stand for nothing.

        `short` are those of 1 to LONGEST characters. `nan` and `None` always do, among capitals; NAN does unless the
        file is one of short peptides.
        """
        texts = list(short)
        words = [text.lower() in MISSING for text in texts]
        self._rows += rows
        self._words += sum(words)
        for text, word in zip(texts, words, strict=True):
            if not word and len(text) <= _PEPTIDE:
                self._peptides[text.isupper()] += 1
        least = max(self._words, self._rows / 100)
        alike = {upper: count > least for upper, count in self._peptides.items()}
        return [
            word and not (text.isalpha() and (text.isupper() or text.islower()) and alike[text.isupper()])
            for text, word in zip(texts, words, strict=True)
        ]

    def count(self, residues: memoryview | bytes) -> None:
        """Count the letters of sequences that lie end to end."""
        if not len(residues):
            return
        self.letters += len(residues)
        self._letters += np.bincount(np.frombuffer(residues[:SAMPLE], dtype=np.uint8), minlength=256)

    def foreign(self) -> str | None:
        """Return what the file holds instead of proteins, with the cure; None where it may well hold proteins."""
        letters = {chr(i): int(self._letters[i] + self._letters[i + 32]) for i in range(ord("A"), ord("Z") + 1)}
        total = sum(letters.values())
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
