"""Find pairs of proteins that may be homologs, by k-mers that both have, in time and memory linear in the residues.

The idea is linclust's (Steinegger & Soding 2018, Nat Commun 9:2542): a k-mer names a few proteins that have it, its
centres, and every other protein that has it is compared with those alone. Residues that often replace each other count
as one (linclust's 13 groups). All k-mers choose their centres by one random order of the proteins, so that the k-mers
of a family name the same ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.data.alignment import COVERAGE, OTHER, Pairs, Proteins
from esm_neuron.data.tokenizer import RESIDUES

if TYPE_CHECKING:
    import tqdm
else:
    tqdm = module("tqdm")

GROUPS = ("A", "ST", "C", "DN", "EQ", "FY", "G", "H", "IV", "KR", "LM", "P", "W")
"""Residues that count as one; others (X, B, Z, U, O) end a k-mer."""
NAMES = 30_000_000
"""Most centres that all k-mers of the queries name; with more, each names fewer, and then fewer k-mers are used."""
BLOCK = 1 << 21
"""Centres looked at at once."""
PIECE = 1 << 23
"""Residues whose k-mers are made at once."""

_NO_GROUP = len(GROUPS)
_GROUP = np.array([next((g for g, of in enumerate(GROUPS) if r in of), _NO_GROUP) for r in RESIDUES[: OTHER + 1]])
_POSITION = 16
"""Bits of a k-mer's position. Later ones of a longer protein are passed over."""
_DIAGONAL = 18
_NOTHING = np.zeros(0, dtype=np.int64)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Seeds:
    """How proteins of some lengths are compared."""

    shortest: int
    longest: int
    k: int
    """Residues of a k-mer."""
    least: int
    """Fewest k-mers that a pair shares."""
    candidates: int
    """Most targets that a query is compared with: those that share the most k-mers."""


SEEDS = (Seeds(4, 38, 4, 1, 32), Seeds(30, 1 << 62, 6, 2, 3))
"""Lengths overlap so that a protein has all its partners in one of them. Three candidates and `alignment.SEGMENT` were
chosen on scl2205: with them 94 % of the validation proteins' homologs are aligned, and 97 % of the test proteins'."""


def candidates(queries: Proteins, targets: Proteins, seeds: Seeds) -> Iterator[tuple[Pairs, np.ndarray]]:
    """Give the pairs of some queries at a time, each query's in one part, and int64 [pairs]: a pair's rank, from 0.

    Two proteins are a pair if their lengths allow COVERAGE of both. Where queries and targets are the same object,
    each pair is given once.
    """
    whole = max(int(queries.bounds[-1]), int(targets.bounds[-1]))
    share = min(1.0, NAMES / 2 / max(1, whole))
    order = np.random.default_rng(0).permutation(len(targets))
    named = _kmers(targets, seeds, share)
    kmer = named if queries is targets else _kmers(queries, seeds, share)
    codes, turn, position = _by_code(named, order)
    start = np.flatnonzero(np.diff(codes, prepend=-1))
    if not len(start):
        return
    distinct, having = codes[start], np.diff(np.append(start, len(codes)))
    found = np.searchsorted(distinct, kmer.code).clip(max=len(distinct) - 1)
    known = distinct[found] == kmer.code
    query, place, found = kmer.owner[known], kmer.position[known], found[known]
    most = int(np.clip(NAMES // max(1, len(found)), 2, 16))
    names, place_of = np.minimum(having[found], most), np.argsort(order)
    total = np.concatenate([[0], np.cumsum(names)])
    ends = np.append(np.flatnonzero(np.diff(query)) + 1, len(query))  # a query's k-mers stay together
    bar = tqdm.tqdm(
        total=len(query), desc="homologs", unit="k-mer", unit_scale=True, delay=5, leave=False, disable=None
    )
    done = 0
    while done < len(query):
        last = np.searchsorted(total[ends], total[done] + BLOCK, side="right") - 1
        end = int(ends[max(last, np.searchsorted(ends, done, side="right"))])
        part = np.repeat(np.arange(done, end), names[done:end])
        within = np.arange(len(part)) - np.repeat(total[done:end] - total[done], names[done:end])
        centre = start[found[part]] + within
        mine, turns = query[part], turn[centre]
        if queries is targets:  # of two that a k-mer names, the later one is compared with the earlier one
            later = place_of[mine] > turns
            mine, turns, part, centre = mine[later], turns[later], part[later], centre[later]
        yield _pairs(queries, targets, seeds, mine, order[turns], place[part] - position[centre])
        bar.update(end - done)
        done = end
    bar.close()


def _pairs(
    queries: Proteins, targets: Proteins, seeds: Seeds, query: np.ndarray, target: np.ndarray, diagonal: np.ndarray
) -> tuple[Pairs, np.ndarray]:
    """Return the best pairs of each query, on the diagonals with the most k-mers, and their ranks."""
    a, b = queries.lengths[query], targets.lengths[target]
    keep = np.minimum(a, b) >= COVERAGE * np.maximum(a, b)
    owners, place = np.unique(query[keep], return_inverse=True)  # few of many: the key below has room for these alone
    n, half = len(targets), 1 << (_DIAGONAL - 1)
    key = np.sort(((place.astype(np.int64) * n + target[keep]) << _DIAGONAL) + diagonal[keep] + half)
    begin = np.flatnonzero(np.diff(key, prepend=-1))
    shared = np.diff(np.append(begin, len(key)))
    pair, line = key[begin] >> _DIAGONAL, key[begin] & (2 * half - 1)
    begin = np.flatnonzero(np.diff(pair, prepend=-1))
    if not len(begin):
        return Pairs(*np.zeros((3, 0), np.int64)), np.zeros(0, np.int64)
    longest = np.maximum.reduceat((shared << _DIAGONAL) + line, begin)
    shared, pair = np.add.reduceat(shared, begin), pair[begin]
    kept = shared >= seeds.least
    shared, pair, line = shared[kept], pair[kept], longest[kept] & (2 * half - 1)
    order = np.lexsort((-shared, pair // n))
    owner = pair[order] // n
    begin = np.flatnonzero(np.diff(owner, prepend=-1))
    rank = np.arange(len(owner)) - np.repeat(begin, np.diff(np.append(begin, len(owner))))
    best = order[rank < seeds.candidates]
    return Pairs(owners[pair[best] // n].astype(np.int64), pair[best] % n, line[best] - half), rank[
        rank < seeds.candidates
    ]


@dataclass(frozen=True)
class _Kmers:
    """Distinct k-mers of each protein, in the order of the proteins; int32 each."""

    code: np.ndarray
    owner: np.ndarray
    position: np.ndarray


def _kmers(proteins: Proteins, seeds: Seeds, share: float) -> _Kmers:
    """Return a fixed `share` of all k-mers, where a protein has them first."""
    pieces = np.searchsorted(proteins.bounds, np.arange(0, proteins.bounds[-1], PIECE), side="right") - 1
    ends = np.append(np.unique(pieces), len(proteins)).tolist()
    key = np.concatenate([_keys(proteins, i, j, seeds, share) for i, j in itertools.pairwise(ends)] or [_NOTHING])
    possible = len(GROUPS) ** seeds.k
    own = key >> _POSITION
    place = key & ((1 << _POSITION) - 1)
    return _Kmers((own % possible).astype(np.int32), (own // possible).astype(np.int32), place.astype(np.int32))


def _keys(proteins: Proteins, first: int, last: int, seeds: Seeds, share: float) -> np.ndarray:
    """Return the k-mers of proteins `first` to `last` - 1: protein, code and position in one number, sorted."""
    bounds = proteins.bounds[first : last + 1]
    groups, lengths = _GROUP[proteins.residues[bounds[0] : bounds[-1]]], np.diff(bounds)
    ends = max(0, len(groups) - seeds.k + 1)
    code, inside = np.zeros(ends, dtype=np.int64), np.ones(ends, dtype=bool)
    for shift in range(seeds.k):
        part = groups[shift : shift + ends]
        code = code * len(GROUPS) + part
        inside &= part != _NO_GROUP
    owner = np.repeat(np.arange(len(lengths)), lengths)[:ends]
    position = np.arange(ends) - (bounds - bounds[0])[owner]
    fits = (lengths >= seeds.shortest) & (lengths <= seeds.longest)
    inside &= fits[owner] & (position <= lengths[owner] - seeds.k) & (position < 1 << _POSITION)
    if share < 1:
        inside &= (code.astype(np.uint64) * _SPREAD >> np.uint64(44)) < np.uint64(share * (1 << 20))
    # a plain sort brings equal k-mers of a protein together, the first position in front
    own = (owner[inside] + first) * len(GROUPS) ** seeds.k + code[inside]
    key = np.sort((own << _POSITION) + position[inside])
    return np.asarray(key[np.diff(key >> _POSITION, prepend=-1) > 0])


def _by_code(kmers: _Kmers, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return code, turn of the protein in `order`, and position of k-mers, sorted by the code, then by the turn."""
    key = kmers.code.astype(np.int64) * len(order) + np.argsort(order)[kmers.owner]
    key = np.sort((key << _POSITION) + kmers.position)
    position, own = (key & ((1 << _POSITION) - 1)).astype(np.int32), key >> _POSITION
    code = own // len(order)
    return code.astype(np.int32), (own - code * len(order)).astype(np.int32), position
