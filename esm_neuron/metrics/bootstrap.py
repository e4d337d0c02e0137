"""95 % intervals by the percentile bootstrap, which draws proteins.

Point values come from scikit-learn and scipy; the resamples of an interval are computed from multiplicities (how often
a protein was drawn), since calling a library a thousand times would need minutes for what takes a second here. The
tests hold both equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_neuron.config.deferred import module

if TYPE_CHECKING:
    from scipy import sparse
else:
    sparse = module("scipy.sparse")

Value = float | int | list[float] | None | dict[str, Any]
"""A metric, a count, an interval [low, high], None where it is undefined, or metrics by class name."""

RESAMPLES = 1000
LEVEL = 95.0  # percent of the resamples within an interval
CELLS = 4_000_000  # multiplicities held at once: bounds memory on large splits (32 MB of float64)
SORTED = 1 << 25  # scores that are copied at once to be sorted by class: 128 MB of float32
SEED = 0  # two evaluations of the same predictions give the same interval


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
    """Return the metrics of every resample of `n` proteins: name -> [RESAMPLES], empty for n = 0.

    `metrics` takes multiplicities float64 [k, n] and returns name -> [k], NaN where undefined; for each draw it holds
    `width` numbers, where those are more than n.
    """
    chunks = [metrics(counts) for counts in resamples(n, width=width)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in (chunks[0] if chunks else ())}


def with_intervals(values: Mapping[str, Value], drawn: Mapping[str, np.ndarray]) -> dict[str, Value]:
    """Return `values` with a `<name>_ci` behind every metric: the interval of `drawn[name]`, None where it has none.

    Counts (integers) and metrics by class have no interval of their own.
    """
    result: dict[str, Value] = {}
    for name, value in values.items():
        result[name] = value
        if value is None or isinstance(value, float):
            known = name in drawn and value is not None
            result[f"{name}_ci"] = interval(drawn[name]) if known else None
    return result


def class_intervals(
    names: Sequence[str], per_class: Sequence[Mapping[str, Value]], drawn: Mapping[str, np.ndarray]
) -> dict[str, Value]:
    """Return `with_intervals` of each class by its name; its resampled metrics are `<metric>/<class index>`."""
    own = [{kind: drawn[f"{kind}/{c}"] for kind in ("f1", "auroc", "auprc") if drawn} for c in range(len(names))]
    return {name: with_intervals(per_class[c], own[c]) for c, name in enumerate(names)}


def interval(drawn: np.ndarray) -> list[float] | None:
    """Return the central LEVEL percent of the defined values, None if fewer than half are defined."""
    defined = drawn[np.isfinite(drawn)]
    if 2 * len(defined) < len(drawn):
        return None
    tail = (100 - LEVEL) / 2
    return [float(bound) for bound in np.percentile(defined, [tail, 100 - tail])]


MOST_CURVES = 100
"""Most classes that each have curves, and so intervals of their own; a resample sorts the scores of every class."""
MOST_THRESHOLDS = 4096
"""Distinct scores kept apart in resamples; of more, neighbors share a threshold, which moves an interval's bounds far
less than resampling does. Point values use every score."""


def class_areas(scores: np.ndarray, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return AUROC and average precision of each class against the rest, float64 [C, 2], as scikit-learn's.

    `scores` [n, C] may be mapped; `rows` has for each class the rows, int64, that are of it. NaN where those are all or
    none. One sort per class: thousands of classes are a matter of seconds.
    """
    n, classes = scores.shape
    found = np.full((classes, 2), np.nan)
    width = max(1, SORTED // max(n, 1))
    for start in range(0, classes, width):
        for c, column in enumerate(np.ascontiguousarray(scores[:, start : start + width].T), start):
            own = np.sort(column[rows[c]])
            if not 0 < len(own) < n:
                continue
            column.sort()
            below, to = (np.searchsorted(column, own, side) for side in ("left", "right"))
            own_below, own_to = (np.searchsorted(own, own, side) for side in ("left", "right"))
            less, tied = below - own_below, (to - below) - (own_to - own_below)  # rows of other classes
            found[c, 0] = (less + tied / 2).sum() / (len(own) * (n - len(own)))
            found[c, 1] = ((len(own) - own_below) / (n - below)).mean()
    return found


@dataclass(frozen=True)
class Curve:
    """How often each score occurs in each protein, by falling score: all that a resample needs.

    Rows are sorted once; a resample only changes how often each of them counts.
    """

    positive: sparse.csr_matrix  # float64 [proteins, thresholds]: rows of the class
    negative: sparse.csr_matrix  # float64 [proteins, thresholds]: rows of other classes

    @classmethod
    def of(cls, score: np.ndarray, target: np.ndarray, unit: np.ndarray, units: int) -> Curve:
        """Count rows: score float64 [n], target bool [n], and the protein int64 [n] (0 to units - 1) of each."""
        distinct, place = np.unique(-score, return_inverse=True)  # rows of one score are one threshold
        thresholds = min(len(distinct), MOST_THRESHOLDS)
        place = place * thresholds // max(len(distinct), 1)

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
