"""Spearman's rank correlation with its bootstrap interval."""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr

from esm_neuron.metrics.bootstrap import Value, bootstrap, with_intervals


def rank_correlation(one: np.ndarray, other: np.ndarray) -> dict[str, Value]:
    """`n`, `spearman` (by scipy; ties share their mean rank) and `spearman_ci`, 95 % over resampled rows.

    Args:
        one, other: float64 [n]. The figure is None below two different values of either.
    """
    n = len(one)
    defined = n > 1 and np.ptp(one) > 0 and np.ptp(other) > 0
    values: dict[str, Value] = {"n": n, "spearman": float(spearmanr(one, other)[0]) if defined else None}
    groups = [np.unique(side, return_inverse=True)[1] for side in (one, other)]
    return with_intervals(values, bootstrap(n, lambda counts: {"spearman": _of_draws(counts, groups)}))


def _of_draws(counts: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """Spearman [k] of resamples as multiplicities [k, n]; `groups` numbers the distinct values [n] of each side."""
    first, second = (_ranks(counts, group) for group in groups)
    middle = (counts.sum(1, keepdims=True) + 1) / 2
    first, second = first - middle, second - middle
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt((counts * first**2).sum(1) * (counts * second**2).sum(1))
        return np.asarray((counts * first * second).sum(1) / scale)


def _ranks(counts: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The mean rank [k, n], from 1, of every row in each resample."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    held = np.add.reduceat(counts[:, order], starts, axis=1)
    return np.asarray((np.cumsum(held, axis=1) - (held - 1) / 2)[:, group])
