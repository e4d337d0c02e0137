"""What validation proteins teach about a model's answers: a temperature, thresholds, and how far off it is.

Of a trained model the weights stay as they are. Temperature: Guo et al. 2017 (arXiv:1706.04599). Sets and ranges by
split conformal prediction: they hold the truth of a new protein with the coverage that was asked for, if it is as
likely to have been drawn for validation; Sadinle et al. 2019 (JASA 114:223) for classes, Lei et al. 2018 (JASA
113:1094) for numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.errors import ConfigError
from esm_neuron.metrics.bootstrap import SEED, bootstrap, interval, numbered
from esm_neuron.metrics.classification import THRESHOLD

optimize = module("scipy.optimize")
COVERAGE = 0.9
"""What result.json measures on held-out proteins, and what `predict --coverage` is asked for mostly."""
DRAWS = 100  # resamples, of which a threshold is the median
LEAST = 10  # rows with and rows without a label below which its threshold stays
KEPT = 2000  # most scores that are kept, evenly by rank
WIDEST = 3.0  # largest logarithm of a temperature: from 0.05 to 20

Value = Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]
"""From hits and false alarms, float64 [cuts] each, and the numbers of rows with and without a label to a metric."""


@dataclass(frozen=True)
class Calibration:
    """How to read the predictions of a model. The default reads them as they are."""

    proteins: int = 0
    """Validation proteins that it was fitted on."""
    temperature: float = 1.0
    """Logits are divided by it."""
    thresholds: tuple[float, ...] = ()
    """Probability from which each label is given; of two classes one number, for the second. Empty: 1 / 2."""
    scores: tuple[float, ...] = ()
    """Errors of validation proteins, rising: 1 - the probability of what is true, or the absolute error."""

    def wrong(self, labels: int) -> str:
        """Return what cannot be in a file about a model of `labels` classes; empty where nothing is."""
        if not 0 < self.temperature < math.inf:
            return f"temperature is {self.temperature}, not above 0"
        if len(self.thresholds) not in (0, labels) and (len(self.thresholds), labels) != (1, 2):
            return f"{len(self.thresholds)} thresholds for {labels} classes"
        if not all(0 <= value <= 1 for value in self.thresholds):
            return "a threshold is no probability"
        rising = all(low <= high for low, high in itertools.pairwise(self.scores))
        return "" if rising and len(self.scores) <= self.proteins else "scores must rise, one of each protein at most"

    @property
    def threshold(self) -> float:
        """Return the probability from which the second of two classes is given."""
        return self.thresholds[0] if self.thresholds else THRESHOLD

    def digest(self) -> str:
        """Return what tells it from another."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def reaches(self, coverage: float) -> bool:
        """Return whether `radius` can tell."""
        return bool(self.scores) and (self.proteins + 1) * coverage <= self.proteins

    def radius(self, coverage: float) -> float:
        """Return the error that a new protein stays within, with a probability of `coverage` at least.

        Raise ConfigError where the proteins are too few to tell, or `coverage` is no share.
        """
        if not 0 < coverage < 1:
            raise ConfigError(f"--coverage {coverage}: give a share between 0 and 1, such as 0.9")
        if not self.scores:
            raise ConfigError(
                f"--coverage {coverage}: nothing was calibrated; train with validation proteins (data.valid or "
                "data.valid_fraction), for one class or one number per protein"
            )
        rank = math.ceil((self.proteins + 1) * coverage - 1e-9)
        if rank > self.proteins:
            largest = self.proteins / (self.proteins + 1)
            raise ConfigError(
                f"--coverage {coverage}: {self.proteins} validation proteins tell up to {largest:.4g}; ask for less, "
                f"or train with {math.ceil(coverage / (1 - coverage) - 1e-9)} of them"
            )
        kept = len(
            self.scores
        )  # of n scores those of ranks n / kept, 2 n / kept, ...: the next one is on the safe side
        return self.scores[math.ceil(rank * kept / self.proteins) - 1]


def kept_scores(errors: np.ndarray) -> tuple[float, ...]:
    """Return errors, float64 [n], rising, or of more than KEPT those of evenly spaced ranks up to the largest."""
    rising = np.sort(errors)
    if len(rising) > KEPT:
        rising = rising[np.ceil(np.arange(1, KEPT + 1) * len(rising) / KEPT).astype(np.int64) - 1]
    return tuple(rising.tolist())


def fit_temperature(loss: Callable[[float], float], proteins: int) -> float:
    """Return the temperature with the least `loss`, in nats per protein, of `proteins` proteins.

    A normal prior on its logarithm, of mean 0 and sd 1, keeps a handful of right answers from making it tiny.
    """

    def objective(logarithm: float) -> float:
        return proteins * loss(math.exp(logarithm)) + logarithm**2 / 2

    found = optimize.minimize_scalar(objective, bounds=(-WIDEST, WIDEST), method="bounded")
    return float(math.exp(found.x))


def best_threshold(score: np.ndarray, target: np.ndarray, value: Value, unit: np.ndarray | None = None) -> float:
    """Return from which `score`, float64 [n] from 0 to 1, to give a label that `target`, bool [n], has: 1 / 2 of few.

    It is the median of the best thresholds of DRAWS resamples of the rows, or of the proteins `unit` (int64 [n]) that
    they are of: the very best one on all rows hangs on a single protein. A resample where none is better than 1 / 2,
    as of a constant score, keeps that.
    """
    if min(target.sum(), (~target).sum()) < LEAST:
        return THRESHOLD
    order = np.argsort(-score, kind="stable")
    falling, hit = score[order], target[order]
    ends = np.flatnonzero(np.append(falling[1:] < falling[:-1], True))
    cuts = (falling[ends] + np.append(falling[ends[:-1] + 1], falling[-1])) / 2
    size, units = numbered(unit, len(score))
    given = int((score >= THRESHOLD).sum())
    rng = np.random.default_rng(SEED)
    found = []
    for _ in range(DRAWS):
        times = np.bincount(rng.integers(0, size, size), minlength=size)[units[order]]
        hits, alarms = np.cumsum(times * hit), np.cumsum(times * ~hit)
        if hits[-1] and alarms[-1]:
            at = np.append(ends, given - 1)
            right, wrong = (np.where(at < 0, 0, count[at]).astype(float) for count in (hits, alarms))
            scores = value(right, wrong, float(hits[-1]), float(alarms[-1]))
            best = scores[:-1].argmax()
            found.append(cuts[best] if scores[best] > scores[-1] else THRESHOLD)
    return float(np.median(found)) if found else THRESHOLD


def mcc(hits: np.ndarray, alarms: np.ndarray, having: float, lacking: float) -> np.ndarray:
    """Return the Matthews correlation, 0 where all rows are given the label; a `Value`."""
    missed, left = having - hits, lacking - alarms
    scale = np.sqrt((hits + alarms) * (missed + left) * having * lacking)
    return np.asarray(np.where(scale > 0, (hits * left - alarms * missed) / np.maximum(scale, 1), 0.0))


def f1(hits: np.ndarray, alarms: np.ndarray, having: float, lacking: float) -> np.ndarray:
    """Return F1; a `Value`."""
    return np.asarray(2 * hits / (hits + alarms + having))


def coverage_scores(within: np.ndarray, size: np.ndarray, units: np.ndarray | None) -> dict[str, Any]:
    """Return which share of proteins is `within` (bool [n]) its set or range, with an interval over `units`, and the
    mean `size` (float64 [n]) of these."""
    count, unit = numbered(units, len(within))
    rows, right = np.bincount(unit, minlength=count), np.bincount(unit, within, count)
    drawn = bootstrap(count, lambda counts: {"covered": counts @ right / (counts @ rows)})
    covered = float(within.mean())
    return {
        "level": COVERAGE,
        "covered": covered,
        "covered_ci": interval(drawn["covered"], covered, count),
        "size": float(size.mean()),
    }
