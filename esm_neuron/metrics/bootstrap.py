"""95 % intervals by the percentile bootstrap, with proteins as what is drawn.

Point values come from scikit-learn and scipy; the resamples of an interval are computed from multiplicities (how often
a protein was drawn), since calling a library a thousand times would need minutes for what takes a second here. The
tests hold both equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Value = float | int | list[float] | None | dict[str, Any]
"""A figure, a count, an interval [low, high], None where it is undefined, or figures by class name."""

RESAMPLES = 1000
"""Bootstrap resamples of an interval."""
LEVEL = 95.0
"""Percent of the resamples within an interval."""
CELLS = 4_000_000
"""Multiplicities held at once while resampling: bounds memory on large splits (32 MB of float64)."""
SEED = 0
"""Seed of the resamples: two evaluations of the same answers give the same interval."""


def resamples(n: int, seed: int = SEED, width: int = 0) -> Iterator[np.ndarray]:
    """RESAMPLES bootstrap draws as multiplicities float64 [k, n], in chunks; none for n = 0.

    A chunk has at most CELLS cells, counted by the larger of n and `width` (what the caller makes of a draw).
    """
    rng = np.random.default_rng(seed)
    done = 0 if n else RESAMPLES
    while done < RESAMPLES:
        k = min(RESAMPLES - done, max(1, CELLS // max(n, width)))
        flat = rng.integers(0, n, (k, n)) + np.arange(k)[:, None] * n
        yield np.bincount(flat.ravel(), minlength=k * n).reshape(k, n).astype(np.float64)
        done += k


def bootstrap(
    n: int, figures: Callable[[np.ndarray], Mapping[str, np.ndarray]], width: int = 0
) -> dict[str, np.ndarray]:
    """The figures of every resample of `n` proteins: name -> [RESAMPLES], empty for n = 0.

    Args:
        n: proteins to draw from.
        figures: multiplicities float64 [k, n] -> name -> [k], NaN where undefined.
        width: numbers that `figures` holds for a draw, where more than n.
    """
    chunks = [figures(counts) for counts in resamples(n, width=width)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in (chunks[0] if chunks else ())}


def with_intervals(values: Mapping[str, Value], drawn: Mapping[str, np.ndarray]) -> dict[str, Value]:
    """`values` with a `<name>_ci` behind every figure: the interval of `drawn[name]`, None where it has none.

    Counts (integers) and figures by class have no interval of their own.
    """
    result: dict[str, Value] = {}
    for name, value in values.items():
        result[name] = value
        if value is None or isinstance(value, float):
            known = name in drawn and value is not None
            result[f"{name}_ci"] = interval(drawn[name]) if known else None
    return result


def interval(drawn: np.ndarray) -> list[float] | None:
    """The central LEVEL percent of the defined values, None when fewer than half are defined."""
    defined = drawn[np.isfinite(drawn)]
    if 2 * len(defined) < len(drawn):
        return None
    tail = (100 - LEVEL) / 2
    return [float(bound) for bound in np.percentile(defined, [tail, 100 - tail])]
