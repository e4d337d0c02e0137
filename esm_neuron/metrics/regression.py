"""Metrics of a number per protein."""

from __future__ import annotations

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.metrics.bootstrap import Scores, Value, bootstrap, numbered, with_intervals

stats = module("scipy.stats")
CONSTANT = 0.01  # standard deviation of predictions, as a share of the targets', below which they are all alike
NAMES = ("loss", "spearman", "pearson", "rmse", "mae", "r2")


def regression_metrics(
    predicted: np.ndarray,
    target: np.ndarray,
    scale: float = 1.0,
    intervals: bool = False,
    units: np.ndarray | None = None,
) -> Scores:
    """Return n, loss (mean squared error over scale^2), spearman, pearson (both undefined where the targets or the
    predictions, float64 [n], are all equal), rmse, mae (in the values' unit) and r2 = 1 - MSE / variance.

    With `intervals` also `<name>_ci`, over proteins or over the clusters `units` (int64 [n]; their number is
    n_clusters). `only_answer` is there where the predictions vary by less than CONSTANT of what the targets do.
    """
    n = len(target)
    values: dict[str, Value] = {"n": n, **dict.fromkeys(NAMES)}
    if not n:
        return with_intervals(values, {}, 0) if intervals else Scores(values)
    error = predicted - target
    mse = float(np.mean(error**2))
    values.update(loss=mse / scale**2, rmse=mse**0.5, mae=float(np.abs(error).mean()))
    if np.ptp(target) > 0:
        values["r2"] = 1 - mse / float(target.var())
        if np.ptp(predicted) > 0:
            values["spearman"] = float(stats.spearmanr(predicted, target).statistic)
            values["pearson"] = float(stats.pearsonr(predicted, target).statistic)
        if predicted.std() < CONSTANT * target.std():
            values["only_answer"] = f"{predicted.mean():.6g}"
    if not intervals:
        return Scores(values)
    size, unit = numbered(units, n)
    if size < n:
        values["n_clusters"] = size
    # centred first: the sums below would cancel where a mean is large against its spread
    x, y = predicted - predicted.mean(), target - target.mean()

    def metrics(drawn: np.ndarray) -> dict[str, np.ndarray]:
        counts = drawn[:, unit]  # ranks need the rows
        rows = counts.sum(1)
        squares, absolute = counts @ error**2 / rows, counts @ np.abs(error) / rows
        variance = counts @ y**2 / rows - (counts @ y / rows) ** 2
        with np.errstate(invalid="ignore", divide="ignore"):
            r2 = np.where(variance > 0, 1 - squares / variance, np.nan)
        return {
            "loss": squares / scale**2,
            "spearman": correlations(counts, ranks(counts, x), ranks(counts, y)),
            "pearson": correlations(counts, x, y),
            "rmse": np.sqrt(squares),
            "mae": absolute,
            "r2": r2,
        }

    return with_intervals(values, bootstrap(size, metrics, n), size)


def correlations(counts: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson correlations [k] in resamples [k, n] of x and y, each [n] or [k, n]; NaN where one is constant."""
    n = counts.sum(1, keepdims=True)
    x = x - (counts * x).sum(1, keepdims=True) / n
    y = y - (counts * y).sum(1, keepdims=True) / n
    spread = (counts * x**2).sum(1) * (counts * y**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(spread > 0, (counts * x * y).sum(1) / np.sqrt(spread), np.nan))


def ranks(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return float64 [k, n]: each row's rank among the rows drawn in resamples [k, n]; ties share their mean rank."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    # Equal values are one group, whose copies in a resample share the mean of the ranks that they take.
    drawn = np.add.reduceat(counts[:, order], starts, axis=1)
    last = np.cumsum(drawn, axis=1)
    return np.asarray((last - (drawn - 1) / 2)[:, group])


def rank_correlation(one: np.ndarray, other: np.ndarray, units: np.ndarray | None = None) -> Scores:
    """Return `n`, `spearman` (by scipy; ties share their mean rank) and `spearman_ci`, 95 % over resampled rows.

    With the clusters `units`, int64 [n], these are drawn, and n_clusters says how many there are.

    It is None below two different values of `one` or `other`, float64 [n] each.
    """
    n = len(one)
    defined = n > 1 and np.ptp(one) > 0 and np.ptp(other) > 0
    values: dict[str, Value] = {"n": n, "spearman": float(stats.spearmanr(one, other).statistic) if defined else None}

    size, unit = numbered(units, n)
    if size < n:
        values["n_clusters"] = size

    def metrics(drawn: np.ndarray) -> dict[str, np.ndarray]:
        counts = drawn[:, unit]
        return {"spearman": correlations(counts, ranks(counts, one), ranks(counts, other))}

    return with_intervals(values, bootstrap(size, metrics, n), size)
