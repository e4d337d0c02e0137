"""Class weights that are decided by the counts of the training proteins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from esm_neuron.config import TaskConfig
from esm_neuron.redact import escaped

UNEVEN = 3.0
"""How many times the smallest balanced weight the largest is before classes are weighed."""
MOST_WEIGHT = 10.0
SHOWN = 20
"""Classes whose weights are named."""


def tempered(labels: Sequence[str], counts: np.ndarray, weights: np.ndarray) -> Literal["none"] | dict[str, float]:
    """Return the square roots of balanced weights, at most MOST_WEIGHT, or "none" for classes of like size.

    `counts` has the training proteins of each class. A class of share p is then answered from odds of
    sqrt(p / (1 - p)), at 5 % from a probability of 0.19: near half of the F1 that can be had, which is best for F1
    (Lipton et al. 2014, arXiv:1402.1892).
    """
    weights = np.maximum(weights, 1e-3)
    known = weights[counts > 0]
    if known.max(initial=1.0) < UNEVEN * known.min(initial=1e6):
        return "none"
    roots = np.where(counts > 0, np.minimum(np.sqrt(weights), MOST_WEIGHT), 1.0)
    return {label: round(float(weight), 6) for label, weight in zip(labels, roots, strict=True)}


def said_weights(task: TaskConfig) -> str:
    """Return a line about the class weights that `auto` has chosen."""
    weights = task.class_weights
    if not isinstance(weights, dict):
        return "class weights (task.class_weights=auto): none, the classes are of like size"
    shown = sorted(weights.items(), key=lambda item: -item[1])
    some = ", ".join(f"{escaped(name[:60])} {weight:.2f}" for name, weight in shown[:SHOWN])
    more = f", and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"class weights (task.class_weights=auto), since some classes are rare: {some}{more}"
