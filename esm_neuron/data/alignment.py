"""Align pairs of proteins: which are homologs, without gaps where that decides, else with gaps in a band.

Two proteins are homologs if an alignment has at least 30 % equal residues over at least 80 % of both (the measure of
MMseqs2's and UniRef's clusters) and is better than chance would give among all targets. Windows of one protein have at
least 90 % over 40 %, without gaps. Chance is judged in two ways:

- Equal residues of a diagonal: at most exp(-n KL(share || p)) of pairs with n facing residues, Chernoff's bound of the
  binomial distribution; p is how often residues of these two compositions are equal. It holds at every length.
- A score with gaps: K m n exp(-lambda S), with the constants of BLOSUM62 at 11 for a gap and 1 for each residue more
  (Altschul & Gish 1996, Methods Enzymol 266:460); m is the query's length, n the residues of all targets. Lambda is
  smaller where both proteins are rich in the same residues.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.tokenizer import AMINO_ACIDS, RESIDUES

IDENTITY = 0.3
"""Least equal residues of homologs, as a share of the alignment's columns."""
COVERAGE = 0.8
"""Least aligned residues, as a share of each protein; so also of the shorter's length to the longer's."""
WINDOW_IDENTITY, WINDOW_COVERAGE = 0.9, 0.4
"""The same of windows of one protein."""
CHANCE = 0.01
"""Most targets that chance may give a query."""
EXPECT = 1e-3
"""The same, of an alignment with gaps: MMseqs2's."""
USUAL = 0.06
"""How often two residues are equal by chance where compositions are as usual."""
SEGMENT = 42
"""Least score of the best stretch of a diagonal for which gaps are tried. See `kmers.SEEDS`."""

OTHER = 20
"""Number of a residue that is no standard amino acid, and matches nothing."""
_OUTSIDE = 21
_GAP, _MORE = 11, 1
_LAMBDA, _K, _LAMBDA_UNGAPPED = 0.267, 0.041, 0.318
_CELLS = 1 << 18
"""Cells that are computed at once: they stay in a processor's cache."""
_START, _MATCH, _SCORE = 14, 28, 42
"""Bits of a packed cell: column and row of the start below these, then matches, then the score."""
_LONGEST = (1 << _START) - 1
"""Residues of a protein that are aligned with gaps."""

# S Henikoff & J G Henikoff 1992, PNAS 89:10915; rows to the diagonal, in the order of _ORDER.
_ORDER = "ARNDCQEGHILKMFPSTWYV"
_BLOSUM62 = """
4; -1 5; -2 0 6; -2 -2 1 6; 0 -3 -3 -3 9; -1 1 0 0 -3 5; -1 0 0 2 -4 2 5; 0 -2 0 -1 -3 -2 -2 6; -2 0 1 -1 -3 0 0 -2 8;
-1 -3 -3 -3 -1 -3 -3 -4 -3 4; -1 -2 -3 -4 -1 -2 -3 -4 -3 2 4; -1 2 0 -1 -3 1 1 -2 -1 -3 -2 5;
-1 -1 -2 -3 -1 0 -2 -3 -2 1 2 -1 5; -2 -3 -3 -3 -2 -3 -3 -3 -1 0 0 -3 0 6;
-1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4 7; 1 -1 1 0 -1 0 0 0 -1 -2 -2 0 -1 -2 -1 4;
0 -1 0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1 1 5; -3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1 1 -4 -3 -2 11;
-2 -2 -2 -3 -2 -1 -2 -3 2 -1 -1 -2 -1 3 -3 -2 -2 2 7; 0 -3 -3 -3 -1 -2 -2 -3 -3 3 1 -2 1 -1 -2 -2 0 -3 -1 4
"""


def _scores() -> np.ndarray:
    """Return the score of each pair of residues, int64 [22, 22]; what lies outside a protein ends an alignment."""
    scores = np.full((_OUTSIDE + 1, _OUTSIDE + 1), -1, dtype=np.int64)
    for row, values in enumerate(_BLOSUM62.split(";")):
        for column, value in enumerate(values.split()):
            one, other = (RESIDUES.index(_ORDER[place]) for place in (row, column))
            scores[one, other] = scores[other, one] = int(value)
    scores[_OUTSIDE], scores[:, _OUTSIDE] = -(1 << 20), -(1 << 20)
    return scores


SCORES = _scores()


@dataclass(frozen=True)
class Proteins:
    """Residues of proteins end to end; those that two windows share stand once."""

    residues: np.ndarray
    """uint8 [residues]: the amino acid's place among the tokens from the first one on, or OTHER."""
    bounds: np.ndarray
    """int64 [proteins + 1]: protein i has the residues from the i-th to the next of these."""

    @classmethod
    def of(cls, table: ExampleTable) -> Proteins:
        """Return the proteins of a table as the model sees them: what was cut off is left out."""
        slots, bounds = table.residue_slots()
        real = slots >= 0
        flat = np.full(int(bounds[-1]), _OUTSIDE, dtype=np.uint8)
        flat[slots[real]] = np.minimum(table.tokens[real] - AMINO_ACIDS[0], OTHER)
        seen = flat != _OUTSIDE
        return cls(flat[seen], np.concatenate([[0], np.cumsum(seen, dtype=np.int64)])[bounds])

    @property
    def lengths(self) -> np.ndarray:
        """Return int64 [proteins]."""
        return np.diff(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1


@dataclass(frozen=True)
class Pairs:
    """Pairs of proteins and the diagonal on which they are compared; int64 [pairs] each."""

    query: np.ndarray
    target: np.ndarray
    diagonal: np.ndarray
    """Position in the query minus position in the target of residues that face each other."""

    def __getitem__(self, kept: np.ndarray) -> Pairs:
        return Pairs(self.query[kept], self.target[kept], self.diagonal[kept])

    def __len__(self) -> int:
        return len(self.query)


def shortest_judged(targets: int) -> int:
    """Return from how many residues on an exact copy is more than chance among so many targets.

    A shorter protein may have a homolog that nothing tells from chance.
    """
    length = 1
    while length * np.log(1 / USUAL) < np.log(targets * 2 * length / CHANCE):
        length += 1
    return length


class Judge:
    """Say which pairs of `queries` and `targets` are homologs."""

    def __init__(self, queries: Proteins, targets: Proteins) -> None:
        self._queries, self._targets = queries, targets
        self._composition = {id(proteins): _composition(proteins) for proteins in (queries, targets)}

    def __call__(self, pairs: Pairs) -> np.ndarray:
        """Return bool [pairs]."""
        a, b = self._queries.lengths[pairs.query], self._targets.lengths[pairs.target]
        longer = np.maximum(a, b)
        facing, equal, segment = self.ungapped(pairs)
        homologs = (equal >= IDENTITY * facing) & (facing >= COVERAGE * longer)
        homologs |= (equal >= WINDOW_IDENTITY * facing) & (facing >= WINDOW_COVERAGE * longer)
        homologs &= self._beyond_chance(pairs, facing, equal)
        open_ = np.flatnonzero(~homologs & (segment >= SEGMENT) & (longer <= _LONGEST))
        homologs[open_] = self._gapped(pairs[open_])
        return homologs

    def _beyond_chance(self, pairs: Pairs, facing: np.ndarray, equal: np.ndarray) -> np.ndarray:
        alike = self._alike(pairs)
        share = np.minimum(equal / np.maximum(facing, 1), 1 - 1e-9)
        divergence = share * np.log(np.maximum(share, 1e-9) / alike) + (1 - share) * np.log((1 - share) / (1 - alike))
        diagonals = self._queries.lengths[pairs.query] + self._targets.lengths[pairs.target]
        return (share > alike) & (facing * divergence >= np.log(len(self._targets) * diagonals / CHANCE))

    def _alike(self, pairs: Pairs) -> np.ndarray:
        """Return how often a residue of one and a residue of the other are equal, float32 [pairs]."""
        one, other = (self._composition[id(proteins)] for proteins in (self._queries, self._targets))
        return np.asarray(np.einsum("pr,pr->p", one[pairs.query], other[pairs.target])).clip(0.01, 0.99)

    def _scale(self, pairs: Pairs) -> np.ndarray:
        """Return lambda, float64 [pairs]: smaller the more residues of the two compositions score well by chance.

        Without gaps it solves sum(p e^(lambda s)) = 1 over the scores s that the compositions make with probability p
        (Karlin & Altschul 1990, PNAS 87:2264); with gaps it is taken to change in proportion, as BLAST does (Schaffer
        et al. 2001, Nucleic Acids Res 29:2994).
        """
        one, other = (self._composition[id(proteins)] for proteins in (self._queries, self._targets))
        known = SCORES[:OTHER, :OTHER]
        values = np.unique(known)
        chances = [((one[pairs.query] @ (known == value)) * other[pairs.target]).sum(axis=1) for value in values]
        chance = np.stack(chances, axis=1).astype(np.float64)
        low, high = np.zeros((len(pairs), 1)), np.ones((len(pairs), 1))
        for _ in range(20):
            middle = (low + high) / 2
            above = (chance * np.exp(middle * values)).sum(axis=1, keepdims=True) > 1
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return np.asarray(_LAMBDA * low[:, 0] / _LAMBDA_UNGAPPED).clip(max=_LAMBDA)

    def ungapped(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return each diagonal's residues that face each other, those of them that are equal, and its best score."""
        first, second = np.maximum(pairs.diagonal, 0), np.maximum(-pairs.diagonal, 0)
        facing = np.minimum(
            self._queries.lengths[pairs.query] - first, self._targets.lengths[pairs.target] - second
        ).clip(0)
        one, other = self._queries.bounds[pairs.query] + first, self._targets.bounds[pairs.target] + second
        equal, best = np.zeros(len(pairs), np.int64), np.zeros(len(pairs), np.int64)
        for some in _batches(facing):
            width = np.arange(max(1, int(facing[some].max())))
            inside = width < facing[some, None]
            a = _at(self._queries, one[some, None] + width, inside)
            b = _at(self._targets, other[some, None] + width, inside)
            equal[some] = ((a == b) & (a < OTHER)).sum(axis=1)
            sums = np.cumsum(SCORES.astype(np.int32)[a, b], axis=1, dtype=np.int32)
            lowest = np.minimum.accumulate(np.pad(sums, ((0, 0), (1, 0)))[:, :-1], axis=1)
            best[some] = (sums - lowest).max(axis=1)
        return facing, equal, best

    def _gapped(self, pairs: Pairs) -> np.ndarray:
        """Return whether the best alignment with gaps near the diagonal makes the pairs homologs."""
        a, b = self._queries.lengths[pairs.query], self._targets.lengths[pairs.target]
        half = 16 + np.minimum(np.maximum(a, b) // 8, 112)  # as far as gaps may move the alignment from its diagonal
        score = np.zeros(len(pairs), np.int64)
        for some in _batches(2 * half + 1):
            for _, cells in _band(self._queries, self._targets, pairs[some], int(half[some].max()), packed=False):
                score[some] = np.maximum(score[some], cells.max(axis=1))
        expected = _K * a * float(len(self._targets.residues)) * np.exp(-self._scale(pairs) * score)
        homologs = expected <= EXPECT
        found = np.flatnonzero(homologs)  # few: only these are looked at again, for where they begin and end
        for some in (found[of] for of in _batches((2 * half + 1)[found])):
            equal, rows, columns = _best(self._queries, self._targets, pairs[some], int(half[some].max()))
            length = np.maximum(rows, columns)
            # an alignment brings equal residues together, the more of them the more both have of the same kinds
            identity = IDENTITY + (self._alike(pairs[some]) - USUAL).clip(0)
            homologs[some] = (
                (equal >= identity * length)
                & (rows >= COVERAGE * a[some])
                & (columns >= COVERAGE * b[some])
                & self._beyond_chance(pairs[some], length, equal)
            )
        return homologs


def _composition(proteins: Proteins) -> np.ndarray:
    """Return the share of each amino acid in each protein, float32 [proteins, 20]."""
    owner = np.repeat(np.arange(len(proteins)), proteins.lengths)
    known = proteins.residues < OTHER
    counts = np.bincount(owner[known] * OTHER + proteins.residues[known], minlength=len(proteins) * OTHER)
    table = counts.reshape(-1, OTHER).astype(np.float32)
    return np.asarray(table / np.maximum(table.sum(axis=1, keepdims=True), 1))


def _batches(widths: np.ndarray) -> Iterator[np.ndarray]:
    """Give the numbers of items of about one width, so that a batch has at most _CELLS cells, or one item."""
    order = np.argsort(widths, kind="stable")
    done = 0
    while done < len(order):
        ahead = widths[order[done : done + _CELLS // max(1, int(widths[order[done]])) + 1]]
        fits = (np.arange(1, len(ahead) + 1) * ahead <= _CELLS) & (ahead <= 1.2 * ahead[0] + 8)
        step = max(1, int(fits.sum()))
        yield order[done : done + step]
        done += step


def _at(proteins: Proteins, places: np.ndarray, inside: np.ndarray) -> np.ndarray:
    found = proteins.residues[np.minimum(places, len(proteins.residues) - 1)]
    return np.where(inside, found, _OUTSIDE)


def _band(
    queries: Proteins, targets: Proteins, pairs: Pairs, half: int, packed: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Align by Smith, Waterman and Gotoh within `half` residues of the diagonals; give each row and its cells.

    Cell j of a row, [pairs, 2 half + 2], faces the target's residue row - diagonal - half + j; the last one is empty. A
    cell is a score, int32, or `packed`: the score above what belongs to its alignment (equal residues, where it began),
    int64, so that the largest of some cells brings that along.
    """
    kind: Any = np.int64 if packed else np.int32
    a, b = queries.lengths[pairs.query], targets.lengths[pairs.target]
    width, count = 2 * half + 1, len(pairs)
    rows = np.arange(int(a.max()))
    query = _at(queries, queries.bounds[pairs.query, None] + rows, rows < a[:, None]).astype(np.int32) * len(SCORES)
    columns = -pairs.diagonal[:, None] - half + np.arange(len(rows) + width)
    target = _at(targets, targets.bounds[pairs.target, None] + columns.clip(0), (columns >= 0) & (columns < b[:, None]))
    unit = kind(1 << _SCORE if packed else 1)
    table = SCORES.astype(kind) * unit
    if packed:
        table += np.diag(np.arange(len(SCORES)) < OTHER).astype(kind) << _MATCH
    table = table.ravel()
    gap, more = kind(_GAP) * unit, kind(_MORE) * unit
    ramp = np.arange(width, dtype=kind) * more
    cells = np.zeros((count, width + 1), dtype=kind)
    down = np.full((count, width + 1), -(unit << kind(20)), dtype=kind)
    for row in rows.tolist():
        before = cells[:, :-1]
        if packed:
            before = np.where(before >= unit, before, (row << _START) + columns[:, row : row + width].clip(0))
        found = before + table[query[:, row, None] + target[:, row : row + width]]
        down[:, :-1] = np.maximum(cells[:, 1:] - gap, down[:, 1:] - more)
        np.maximum(found, down[:, :-1], out=found)
        across = np.maximum.accumulate(found + ramp, axis=1) - ramp - gap
        np.maximum(found[:, 1:], across[:, :-1], out=found[:, 1:])
        cells[:, :-1] = np.where(found >= unit, found, 0)
        yield row, cells


def _best(queries: Proteins, targets: Proteins, pairs: Pairs, half: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each best alignment the equal residues, and those of the query and of the target from first to last."""
    best, last_row, last_cell = np.zeros((3, len(pairs)), dtype=np.int64)
    for row, cells in _band(queries, targets, pairs, half, packed=True):
        peak = cells.argmax(axis=1)
        highest = cells[np.arange(len(pairs)), peak]
        higher = (highest >> _SCORE) > (best >> _SCORE)
        best[higher], last_row[higher], last_cell[higher] = highest[higher], row, peak[higher]
    first_row, first_column = (best >> _START) & _LONGEST, best & _LONGEST
    last_column = last_row - pairs.diagonal - half + last_cell
    return (best >> _MATCH) & _LONGEST, last_row - first_row + 1, last_column - first_column + 1
