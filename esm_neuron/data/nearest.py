"""Find the closest training protein of each held-out one: the one whose best stretch without gaps scores most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esm_neuron.data.alignment import Judge, Pairs, Proteins
from esm_neuron.data.kmers import SEEDS, candidates

CELLS = 1 << 24
"""Pairs of residues compared at once, of proteins that all have one length."""


@dataclass(frozen=True)
class Nearest:
    """What is closest to each query."""

    target: np.ndarray
    """int64 [queries], -1 where no target shares enough k-mers."""
    identity: np.ndarray
    """float64 [queries]: the share of the facing residues that are equal, 0 to 1."""
    diagonal: np.ndarray
    """int64 [queries]: position in the query minus position in the target of residues that face each other."""


def find_nearest(queries: Proteins, targets: Proteins) -> Nearest:
    """Return the closest target of each query: of those that share the most k-mers, see `kmers.candidates`.

    Proteins that all have one length, such as variants, are compared with every target place by place instead, and
    those of 20 amino acids that are equal are counted; of equally close ones the first is taken.
    """
    lengths = np.unique(np.concatenate([queries.lengths, targets.lengths]))
    if len(lengths) == 1:
        return _place_by_place(queries, targets, int(lengths[0]))
    n = len(queries)
    found = Nearest(np.full(n, -1), np.zeros(n), np.zeros(n, dtype=np.int64))
    best, judge = np.zeros(n, dtype=np.int64), Judge(queries, targets)
    for seeds in SEEDS:
        for pairs, _ in candidates(queries, targets, seeds):
            facing, equal, score = judge.ungapped(pairs)
            order = np.lexsort((score, pairs.query))
            last = order[np.diff(pairs.query[order], append=-1) != 0]  # the best of each query
            last = last[score[last] > best[pairs.query[last]]]
            chosen: Pairs = pairs[last]
            best[chosen.query], found.target[chosen.query] = score[last], chosen.target
            found.identity[chosen.query] = equal[last] / np.maximum(facing[last], 1)
            found.diagonal[chosen.query] = chosen.diagonal
    return found


def _place_by_place(queries: Proteins, targets: Proteins, length: int) -> Nearest:
    one, other = (proteins.residues.reshape(-1, length) for proteins in (queries, targets))
    target, equal = np.zeros(len(one), dtype=np.int64), np.zeros(len(one))
    for start in range(0, len(one), step := max(1, CELLS // max(1, other.size))):
        part = slice(start, start + step)
        shared = np.zeros((len(one[part]), len(other)), dtype=np.int32)
        for place in range(length):
            shared += one[part, place, None] == other[:, place]
        target[part] = shared.argmax(1)
        equal[part] = shared.max(1)
    return Nearest(target, equal / max(1, length), np.zeros(len(one), dtype=np.int64))
