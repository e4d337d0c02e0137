"""Sample validation and test rows, or folds, from the training rows, where neither a file nor a column names them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from esm_neuron.config import DataConfig, require
from esm_neuron.config.deferred import module
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.homology import MOST, find_clusters
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.data.validation import quote
from esm_neuron.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sklearn import model_selection
else:
    model_selection = module("sklearn.model_selection")

BOUND = 0.2
"""How far from its wanted number a class may be in a sample by cluster, as a part of that number; one protein always
may."""
_SAMPLING = 2**63
"""Keeps the random numbers of the sampling apart from others drawn from the same seed."""
_ROWS = {"valid": "validation", "test": "test"}
"""Split -> what errors call its rows."""


def homolog_clusters(sequences: list[str], cfg: DataConfig) -> np.ndarray:
    """Return the cluster of homologs that each row is in, int64 [rows], by whole sequences."""
    if cfg.homologs == "off":
        cure = "clusters are of homologs; use data.homologs=kmer or mmseqs"
        raise ConfigError(f"data.sample=clusters with data.homologs=off: {cure}")
    require(
        len(sequences) <= MOST,
        f"data.sample=clusters: {len(sequences)} proteins are more than {MOST}; cluster them beforehand and name the "
        "split of each in a column (data.split_column)",
    )
    return find_clusters(ExampleTable.of(*encode_many(sequences)), cfg.homologs)


def sample_rows(
    groups: np.ndarray, allowed: np.ndarray, fraction: float, *, seed: int, split: str, source: str
) -> np.ndarray:
    """Draw a `fraction` of the rows for a split, each group with its share; every group keeps a row to train on.

    `groups`, int64 [rows], numbers the group of each row's label; `allowed`, bool [rows], says which may be held out;
    the result, bool [rows], which are. Systematic sampling: rows in random order, sorted by group, one taken at every
    1 / fraction.
    """
    rng, rows = _generator(seed, split), len(groups)
    order = rng.permutation(rows)
    shuffled = groups[order]
    # A stable sort brings each group together and keeps the random order within it.
    order = order[np.argsort(shuffled, kind="stable")]
    # Leave out the first row of each group: it stays in training.
    order = order[np.diff(np.sort(shuffled), prepend=-1) == 0]
    order = order[allowed[order]]
    number = min(len(order), max(1, round(fraction * rows)))
    if number == 0:
        raise DataError(
            f"{source}: {rows} training proteins are too few to sample {_ROWS[split]} proteins from; "
            f"give data.{split}, or data.{split}_fraction=0 for none"
        )
    chosen = np.zeros(rows, dtype=bool)
    # One random start and even steps over the sorted groups: each gives its share, to within one row.
    every = (np.arange(number) + rng.random()) * len(order) / number
    chosen[order[every.astype(np.int64)]] = True
    return chosen


def sample_clusters(
    cluster: np.ndarray, groups: np.ndarray, allowed: np.ndarray, fraction: float, *, seed: int, split: str, source: str
) -> np.ndarray:
    """Draw whole clusters of homologs for a split, as `sample_rows` draws rows; `cluster` is int64 [rows].

    Clusters come in random order, those with a rare group first, and one is taken where it fits into the shares of its
    groups. A group that is still missing then gets its smallest cluster, and what lacks is filled up to BOUND above the
    shares. No cluster is taken that has a row that may not be held out, or the last rows of a group.
    """
    rng, rows, pool = _generator(seed, split), len(groups), _Pool(cluster, groups, allowed)
    pool.wanted = max(1, round(fraction * rows))
    share = fraction * np.bincount(groups)
    order = pool.in_order(rng)
    pool.fill(order, np.floor(share + rng.random(len(share))))
    for group in np.flatnonzero((share >= 1) & (np.array(pool.got) == 0)):
        pool.add_smallest(int(group))
    pool.fill(order, share * (1 + BOUND) + 1)
    if not pool.chosen.any():
        largest = int(pool.sizes.max())
        raise DataError(
            f"{source}: no cluster of homologs can be held out for {_ROWS[split]} ({rows} training proteins, "
            f"{np.count_nonzero(pool.sizes)} clusters, the largest of {largest} proteins); use data.sample=proteins, "
            f"or give data.{split}"
        )
    return pool.chosen[cluster]


class _Pool:
    """Clusters of which some are chosen, bool [clusters]; `got` and `left` have the rows of each group."""

    def __init__(self, cluster: np.ndarray, groups: np.ndarray, allowed: np.ndarray) -> None:
        self.sizes, kinds = np.bincount(cluster), int(groups.max()) + 1
        pairs, times = np.unique(cluster * kinds + groups, return_counts=True)
        first = np.searchsorted(pairs // kinds, np.arange(len(self.sizes) + 1))
        self._first, self._group, self._times = first.tolist(), (pairs % kinds).tolist(), times.tolist()
        rarity = np.argsort(np.argsort(np.bincount(groups, minlength=kinds), kind="stable"))
        self._rarest = np.zeros(len(self.sizes), np.int64)
        some = self.sizes > 0
        self._rarest[some] = np.minimum.reduceat(rarity[pairs % kinds], first[:-1][some])
        self._open = some & (np.bincount(cluster, ~allowed, len(self.sizes)) == 0)
        self.left: list[int] = np.bincount(groups, minlength=kinds).tolist()
        self.got = [0] * kinds
        self.chosen = np.zeros(len(self.sizes), dtype=bool)
        self.wanted = 0

    def in_order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the clusters that may be taken in random order, those with the rarest group first."""
        order = rng.permutation(np.flatnonzero(self._open))
        return order[np.argsort(self._rarest[order], kind="stable")]

    def fill(self, order: np.ndarray, limit: np.ndarray) -> None:
        """Take each cluster with which no group has more than `limit` [groups] rows, and all have at most `wanted`."""
        most, missing = limit.tolist(), self.wanted - sum(self.got)
        for one in order.tolist():
            if missing <= 0:
                return
            if self.sizes[one] <= missing and not self.chosen[one] and self._fits(one, most):
                self._take(one)
                missing -= int(self.sizes[one])

    def add_smallest(self, group: int) -> None:
        """Take the smallest cluster with a group, if half of the group stays and `wanted` is hardly exceeded."""
        having = [one for one in np.flatnonzero(self._open).tolist() if group in dict(self._of(one))]
        if not having:
            return
        one = min(having, key=lambda one: int(self.sizes[one]))
        half = 2 * dict(self._of(one))[group] <= self.left[group]
        room = self.wanted * (1 + BOUND) - sum(self.got)
        if half and self.sizes[one] <= room and self._fits(one, [float("inf")] * len(self.left)):
            self._take(one)

    def _of(self, one: int) -> Iterator[tuple[int, int]]:
        """Yield each group in a cluster, and how many rows of it."""
        span = slice(self._first[one], self._first[one + 1])
        return zip(self._group[span], self._times[span], strict=True)

    def _fits(self, one: int, most: list[float]) -> bool:
        return all(self.got[of] + times <= most[of] and self.left[of] > times for of, times in self._of(one))

    def _take(self, one: int) -> None:
        self.chosen[one] = True
        for of, times in self._of(one):
            self.got[of] += times
            self.left[of] -= times


def uneven(split: str, wanted: int, got: int, whole: Mapping[str, int], own: Mapping[str, int]) -> list[str]:
    """Return a warning where a sample by cluster has fewer rows than wanted, or shares of classes beyond BOUND.

    `whole` and `own` count each class in all rows and in the sample.
    """
    lines = []
    if abs(got - wanted) > max(1, BOUND * wanted):
        lines.append(
            f"WARNING: {split} split: {wanted} proteins were wanted, {got} could be held out: clusters of homologs are "
            f"not cut; use more proteins, data.sample=proteins, or data.{split}"
        )
    for name, count in whole.items():
        expected = count * sum(own.values()) / max(1, sum(whole.values()))
        if abs(own.get(name, 0) - expected) > 1 + BOUND * expected:
            lines.append(
                f"WARNING: {split} split: of class {quote(name)} {expected:.0f} were wanted, as in all, and "
                f"{own.get(name, 0)} could be held out with whole clusters of homologs"
            )
    return lines[:_SHOWN] + ([f"WARNING: {split} split: ... {len(lines)} such lines"] if len(lines) > _SHOWN else [])


_SHOWN = 6
"""Lines of warnings per split."""


def assign_folds(cluster: np.ndarray | None, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each row from 0, int64 [rows]: each group in proportion, and clusters whole where given."""
    how = {"n_splits": folds, "shuffle": True, "random_state": seed % 2**32}
    make = model_selection.StratifiedKFold if cluster is None else model_selection.StratifiedGroupKFold
    found = np.zeros(len(groups), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of groups with fewer rows than folds: the classes are counted
        for number, (_, rows) in enumerate(make(**how).split(groups, groups, cluster)):
            found[rows] = number
    return found


def _generator(seed: int, split: str) -> np.random.Generator:
    return np.random.default_rng([seed, _SAMPLING + ("valid", "test").index(split)])
