"""Means by group with intervals over proteins: a reliability diagram, and errors by length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esm_neuron.metrics.bootstrap import bootstrap, interval

BINS = 10  # of a reliability diagram, of equal width from 0 to 1


@dataclass(frozen=True)
class Group:
    """Rows that belong together."""

    rows: int
    mean: float
    interval: list[float] | None  # 95 %, over proteins; None where fewer than half of the resamples have such rows


def group_means(
    value: np.ndarray, weight: np.ndarray, group: np.ndarray, groups: int, protein: np.ndarray
) -> list[Group | None]:
    """Return the mean of each group with an interval over proteins, None for a group without weight.

    Each of n rows belongs to a `group` (int64 [n], 0 to `groups` - 1) and to a `protein` (int64 [n]). A mean is the sum
    of `value` (float64 [n], itself a sum over a row's parts) over the sum of `weight` (float64 [n], how many parts).
    """
    found, unit = np.unique(protein, return_inverse=True)
    # Sums per protein and group: those of a resample are a product with how often each protein was drawn.
    cell, cells = unit * groups + group, len(found) * groups
    values = np.bincount(cell, value, cells).reshape(-1, groups)
    weights = np.bincount(cell, weight, cells).reshape(-1, groups)

    def metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (counts @ values) / (counts @ weights)
        return {str(g): means[:, g] for g in range(groups)}

    drawn = bootstrap(len(found), metrics, groups)
    rows, total, weighed = np.bincount(group, minlength=groups), values.sum(0), weights.sum(0)
    return [
        Group(int(rows[g]), float(total[g] / weighed[g]), interval(drawn[str(g)], None, len(found)))
        if weighed[g] > 0
        else None
        for g in range(groups)
    ]


@dataclass(frozen=True)
class Reliability:
    """How often predictions of some confidence are right."""

    confidence: list[float]  # mean confidence of each bin that has rows
    right: list[Group]  # the share of right predictions in each
    ece: float  # expected calibration error: mean of |share right - confidence| over bins, weighted by their rows


def reliability(confidence: np.ndarray, right: np.ndarray, protein: np.ndarray) -> Reliability | None:
    """Return the reliability diagram and the expected calibration error of Guo et al. 2017 (arXiv:1706.04599).

    Of each of n rows (None where there are none) `confidence`, float64 [n], is the probability of what was predicted,
    `right`, bool [n], whether that is true, and `protein`, int64 [n], whose row it is.
    """
    if not len(confidence):
        return None
    # A confidence of exactly 1 belongs to the last bin.
    group = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    found = group_means(right.astype(float), np.ones(len(right)), group, BINS, protein)
    shares = [(g, share) for g, share in enumerate(found) if share is not None]
    means = [float(confidence[group == g].mean()) for g, _ in shares]
    gaps = [share.rows * abs(share.mean - mean) for (_, share), mean in zip(shares, means, strict=True)]
    return Reliability(means, [share for _, share in shares], sum(gaps) / len(confidence))
