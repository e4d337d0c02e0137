"""Sample validation and test rows from the training rows, where neither a file nor a column names them."""

from __future__ import annotations

import numpy as np

from esm_neuron.config import DataConfig, require
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.homology import MOST, find_clusters
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.errors import ConfigError, DataError

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

    Clusters come in random order; one is passed over where it would make more than the wanted rows, has a row that may
    not be held out, or has the last rows of a group.
    """
    rng, rows = _generator(seed, split), len(groups)
    members = np.split(np.argsort(cluster, kind="stable"), np.cumsum(np.bincount(cluster))[:-1])
    left = np.bincount(groups)
    chosen, wanted = np.zeros(rows, dtype=bool), max(1, round(fraction * rows))
    for number in rng.permutation(np.unique(cluster)):
        own = members[number]
        # What each group would have left to train on if this cluster were held out.
        after = left - np.bincount(groups[own], minlength=len(left))
        if len(own) <= wanted and allowed[own].all() and (after[groups[own]] > 0).all():
            chosen[own], left, wanted = True, after, wanted - len(own)
    if not chosen.any():
        largest = int(np.bincount(cluster).max())
        raise DataError(
            f"{source}: no cluster of homologs can be held out for {_ROWS[split]} ({rows} training proteins, "
            f"{len(np.unique(cluster))} clusters, the largest of {largest} proteins); use data.sample=proteins, or "
            f"give data.{split}"
        )
    return chosen


def _generator(seed: int, split: str) -> np.random.Generator:
    return np.random.default_rng([seed, _SAMPLING + ("valid", "test").index(split)])
