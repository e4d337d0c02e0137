"""95 % intervals by the bootstrap, which draws proteins, or clusters of proteins that are not independent.

Point values come from scikit-learn and scipy; the resamples of an interval are computed from multiplicities (how often
a protein or a cluster was drawn), since calling a library a thousand times would need minutes for what takes a second
here. The tests hold both equal.

Homologs are right and wrong together. Drawn one by one they make intervals too narrow: at 500 proteins in families of
10 that share half of their variance, "95 %" held the truth in 68 of 100 samples, and in 92 to 96 with families drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_neuron.config.deferred import module

if TYPE_CHECKING:
    from scipy import sparse
else:
    sparse = module("scipy.sparse")

Value = float | int | str | list[float] | None | dict[str, Any]
"""A metric, a count, a class name, an interval [low, high], None where it is undefined, or metrics by class name."""

RESAMPLES = 1000
LEVEL = 95.0  # percent of the resamples within an interval
CELLS = 4_000_000  # multiplicities held at once: bounds memory on large splits (32 MB of float64)
SORTED = 1 << 24  # scores copied at once to be sorted by class: 128 MB of float64
SEED = 0  # two evaluations of the same predictions give the same interval


class Scores(dict[str, Value]):
    """Metrics by name, and those of every resample, by which two evaluations of the same proteins are compared."""

    def __init__(self, values: Mapping[str, Value], drawn: Mapping[str, np.ndarray] | None = None) -> None:
        super().__init__(values)
        self.drawn: Mapping[str, np.ndarray] = drawn or {}
        """Metric -> float64 [RESAMPLES], NaN where undefined; empty without intervals."""


def resamples(n: int, seed: int = SEED, width: int = 0) -> Iterator[np.ndarray]:
    """Yield RESAMPLES bootstrap draws as multiplicities float64 [k, n], in chunks; none for n = 0.

    A chunk has at most CELLS cells, counted by the larger of n and `width` (what the caller makes of a draw).
    """
    rng = np.random.default_rng(seed)
    done = 0 if n else RESAMPLES
    while done < RESAMPLES:
        k = min(RESAMPLES - done, max(1, CELLS // max(n, width)))
        # Draw i counts in cells i * n to i * n + n - 1, so that one bincount gives the multiplicities of all k draws.
        flat = rng.integers(0, n, (k, n)) + np.arange(k)[:, None] * n
        yield np.bincount(flat.ravel(), minlength=k * n).reshape(k, n).astype(np.float64)
        done += k


def bootstrap(
    n: int, metrics: Callable[[np.ndarray], Mapping[str, np.ndarray]], width: int = 0
) -> dict[str, np.ndarray]:
    """Return the metrics of every resample of `n` proteins, or clusters: name -> [RESAMPLES], empty for n = 0.

    `metrics` takes multiplicities float64 [k, n] and returns name -> [k], NaN where undefined; for each draw it holds
    `width` numbers, where those are more than n. The draws depend on n alone.
    """
    chunks = [metrics(counts) for counts in resamples(n, width=width)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in (chunks[0] if chunks else ())}


def numbered(units: np.ndarray | None, rows: int) -> tuple[int, np.ndarray]:
    """Return how many units are drawn, and the unit of each row, int64 [rows] from 0; None: each row is one."""
    if units is None:
        return rows, np.arange(rows)
    found, unit = np.unique(units, return_inverse=True)
    return len(found), unit


def with_intervals(values: Mapping[str, Value], drawn: Mapping[str, np.ndarray], units: int) -> Scores:
    """Return `values` with a `<name>_ci` behind every metric: the interval of `drawn[name]`, None where it has none.

    `units` says how many proteins, or clusters, a resample draws. Counts (integers) and metrics by class have no
    interval of their own.
    """
    result: dict[str, Value] = {}
    for name, value in values.items():
        result[name] = value
        if value is None or isinstance(value, float):
            known = name in drawn and value is not None
            result[f"{name}_ci"] = interval(drawn[name], value, units) if known else None
    return Scores(result, drawn)


def class_intervals(
    names: Sequence[str], per_class: Sequence[Mapping[str, Value]], drawn: Mapping[str, np.ndarray], units: int
) -> dict[str, Value]:
    """Return `with_intervals` of each class by its name; its resampled metrics are `<metric>/<class index>`."""
    own = [{kind: drawn[f"{kind}/{c}"] for kind in ("f1", "auroc", "auprc") if drawn} for c in range(len(names))]
    return {name: dict(with_intervals(per_class[c], own[c], units)) for c, name in enumerate(names)}


def interval(drawn: np.ndarray, value: float | None, units: int) -> list[float] | None:
    """Return the central LEVEL percent of the defined values; None of fewer than 2 units, or where half are undefined.

    Percentiles of few units are too narrow, as a normal interval without Student's t would be: they are taken as much
    further out (the expanded percentile interval of Hesterberg 2015, The American Statistician 69:371). The metric's
    own `value` is always within: resamples of some metrics are biased, such as macro-F1 where classes go missing.
    """
    defined = drawn[np.isfinite(drawn)]
    if units < 2 or 2 * len(defined) < len(drawn):
        return None
    tail = NORMAL.cdf(-((units / (units - 1)) ** 0.5) * student(units - 1))
    low, high = (float(bound) for bound in np.quantile(defined, [tail, 1 - tail]))
    return [low, high] if value is None else [min(low, value), max(high, value)]


def student(freedom: int) -> float:
    """Return the quantile of Student's t that leaves half of 1 - LEVEL above it, by Abramowitz & Stegun 26.7.5.

    It is 0.1 % off from 4 degrees of freedom on, and 11 % for one. The report needs no scipy for it.
    """
    x = NORMAL.inv_cdf(0.5 + LEVEL / 200)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / freedom**power for power, term in enumerate(terms, 1))


NORMAL = NormalDist()
MOST_CURVES = 100
"""Most classes that each have curves, and so intervals of their own; a resample sorts the scores of every class."""
MOST_THRESHOLDS = 2048
"""Distinct scores of positive rows kept apart in resamples; of more, neighbors share a threshold. Point values use
every score."""


def class_areas(scores: np.ndarray, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return AUROC and average precision of each class against the rest, float64 [C, 2], as scikit-learn's.

    `scores` [n, C] may be mapped from a file; `rows` has for each class the rows, int64, that are of it. NaN where
    those are all or none. Each class is sorted once, so thousands of them are a matter of seconds.
    """
    n, classes = scores.shape
    found = np.full((classes, 2), np.nan)
    width = max(1, SORTED // max(n, 1))
    for start in range(0, classes, width):
        for c, column in enumerate(np.array(scores[:, start : start + width].T, order="C"), start):  # a copy, to sort
            if 0 < len(rows[c]) < n:
                found[c] = _areas(column, rows[c])
    return found


def _areas(scores: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Return AUROC and average precision of the `rows` with a label; the scores [n] are sorted in place."""
    own = np.sort(scores[rows])
    scores.sort()
    below, to = (np.searchsorted(scores, own, side) for side in ("left", "right"))
    own_below, own_to = (np.searchsorted(own, own, side) for side in ("left", "right"))
    less, tied = below - own_below, (to - below) - (own_to - own_below)  # rows of other classes
    auroc = (less + tied / 2).sum() / (len(own) * (len(scores) - len(own)))
    precision = (len(own) - own_below) / (len(scores) - below)  # among those with as high a score
    return float(auroc), float(precision.mean())


@dataclass(frozen=True)
class Curve:
    """How often each score occurs in each protein, by falling score: all that a resample needs.

    Rows are sorted once; a resample only changes how often each of them counts. Each positive row's score is a
    threshold of its own, and negative rows between two of them are one group, which changes neither area: so rare
    positives keep their places among any number of negative rows.
    """

    positive: sparse.csr_matrix  # float64 [proteins, thresholds]: rows of the class
    negative: sparse.csr_matrix  # float64 [proteins, thresholds]: rows of other classes

    @classmethod
    def of(cls, score: np.ndarray, target: np.ndarray, unit: np.ndarray, units: int) -> Curve:
        """Count rows: score float64 [n], target bool [n], and the protein int64 [n] (0 to units - 1) of each."""
        distinct = np.unique(score[target])
        groups = np.array_split(distinct, min(len(distinct), MOST_THRESHOLDS)) if len(distinct) else []
        low, high = (np.array([group[end] for group in groups]) for end in (0, -1))
        # Place 2 i + 1 is a score of group i, 2 i + 2 one between it and the next, 0 one below all of them.
        group = np.searchsorted(low, score, side="right") - 1
        inside = (group >= 0) & (score <= high[group]) if groups else np.zeros(len(score), dtype=bool)
        thresholds = 2 * len(groups) + 1
        place = thresholds - 1 - (2 * group + 2 - inside)

        def counted(rows: np.ndarray) -> sparse.csr_matrix:
            cells = (np.ones(int(rows.sum())), (unit[rows], place[rows]))
            return sparse.csr_matrix(cells, shape=(units, thresholds))

        return cls(counted(target), counted(~target))

    @property
    def thresholds(self) -> int:
        return int(self.positive.shape[1])

    def areas(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return AUROC (Mann-Whitney U, ties count half) and average precision, each [k], of resamples [k, proteins].

        NaN where a resample has rows of one kind only.
        """
        positive, negative = counts @ self.positive, counts @ self.negative
        above, false = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
        p, n = above[:, -1], false[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):
            # Each negative row loses to the positive ones above it, and half to those of its own score.
            auroc = (negative * (above - positive / 2)).sum(1) / (p * n)
            precision = np.nan_to_num(above / (above + false))  # 0 / 0 only before the first row drawn: recall 0
            auprc = (positive * precision).sum(1) / p
        return auroc, np.where(n > 0, auprc, np.nan)
