"""Fit linear heads by a task's own loss, for a row of penalties: ridge or logistic regression along principal axes.

The features are standardized and, block by block, turned to their principal axes, each of which is divided by the
square root of its standard deviation. Pooled states of neighbouring layers are nearly equal: what tells proteins apart
is often in how they differ, along axes of small variance, which a penalty on the states as they are would shut out.
L-BFGS (scipy's) sees each axis stretched by what its curvature is for a loss of curvature 1, so that all are alike: it
needs about ten steps for a squared error, and some tens for a cross entropy, however alike the features are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from esm_neuron.config.deferred import module

if TYPE_CHECKING:
    from scipy import optimize
else:
    optimize = module("scipy.optimize")

PENALTIES = tuple(float(10**power) for power in np.arange(1, -4.25, -0.5))
"""Penalties that are tried, the strongest first: half of this times the squared norm of the weights along the axes is
added to the mean loss. Of scikit-learn's logistic regression it is 1 / (C n)."""
STEPS, TOLERANCE, ROUGH = 300, 1e-6, 1e-5
"""Most steps for a penalty, and the relative fall of the loss in one that ends them; `ROUGH` tells penalties apart."""
LEAST_VARIANCE = 1e-9
"""Share of a block's largest variance below which an axis is left out."""
CHUNK = 1 << 24
"""Values that are held at once as float64."""


@dataclass(frozen=True)
class LinearHead:
    """Weights [outputs, F] and biases [outputs], float32."""

    penalty: float
    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return float32 [n, outputs] of features [n, F]."""
        return features @ self.weight.T + self.bias

    def parted(self, heads: int) -> list[LinearHead]:
        """Return this many heads whose outputs, as many of each, are side by side here."""
        parts = zip(np.split(self.weight, heads), np.split(self.bias, heads), strict=True)
        return [LinearHead(self.penalty, weight, bias) for weight, bias in parts]


@dataclass(frozen=True)
class Axes:
    """Features along the axes that heads are fitted on."""

    along: np.ndarray
    """float32 [n, axes]."""
    variance: np.ndarray
    """float64 [axes], of `along`."""
    mean: np.ndarray
    """float32 [F], of the features."""
    turns: tuple[tuple[np.ndarray, np.ndarray], ...]
    """For each block its columns, and float32 [columns, axes] by which features less the mean are multiplied."""

    @classmethod
    def of(cls, features: np.ndarray, block: np.ndarray) -> Axes:
        """Turn features, float32 [n, F]; `block`, int [F], says whose axes each is turned to."""
        mean = features.mean(0, dtype=np.float64).astype(np.float32)
        sd = features.std(0, dtype=np.float64).astype(np.float32)
        sd[sd < 1e-6 * np.maximum(np.abs(mean), 1e-6)] = 1.0  # a constant feature says nothing, and keeps a weight of 0
        along, variances, turns = [], [], []
        for own in (np.flatnonzero(block == number) for number in np.unique(block)):
            centred = features[:, own] - mean[own]
            axes, variance = principal_axes(centred / sd[own])
            turn = (axes * variance**-0.25 / sd[own, None]).astype(np.float32)
            along.append(centred @ turn)
            variances.append(np.sqrt(variance))
            turns.append((own, turn))
        return cls(np.concatenate(along, axis=1), np.concatenate(variances), mean, tuple(turns))

    def of_features(self, head: LinearHead) -> LinearHead:
        """Return a head along the axes as one of the features as they are."""
        ends = np.cumsum([turn.shape[1] for _, turn in self.turns])
        weight = np.empty((len(head.bias), len(self.mean)))
        for (own, turn), part in zip(self.turns, np.split(head.weight, ends[:-1], axis=1), strict=True):
            weight[:, own] = part.astype(np.float64) @ turn.T
        return LinearHead(head.penalty, weight.astype(np.float32), (head.bias - weight @ self.mean).astype(np.float32))


def fit_path(
    along: np.ndarray,
    variance: np.ndarray,
    outputs: int,
    loss: Callable[[Tensor], Tensor],
    penalties: Sequence[float],
    tolerance: float,
) -> Iterator[LinearHead]:
    """Yield the head that minimizes `loss` and each penalty, in their order; each begins at the one before.

    `along` and `variance` are those of `Axes`, or of some of its rows; `loss` gives the mean loss of outputs, float32
    [n, outputs]. `tolerance` is the relative fall of the loss in one step that ends a fit.
    """
    weight, bias, values = np.zeros((len(variance), outputs)), np.zeros(outputs), torch.from_numpy(along)
    for penalty in penalties:
        stretch = 1 / np.sqrt(variance + penalty)
        solver = _Objective(values, loss, stretch, penalty)
        start = np.concatenate([bias[None], weight / stretch[:, None]]).ravel()
        options = {"maxiter": STEPS, "ftol": tolerance, "gtol": 1e-6, "maxcor": 20}
        found = optimize.minimize(solver, start, jac=True, method="L-BFGS-B", options=options).x.reshape(-1, outputs)
        weight, bias = found[1:] * stretch[:, None], found[0]
        yield LinearHead(penalty, weight.T.astype(np.float32), bias.astype(np.float32))


class _Objective:
    """Mean loss plus penalty, and its gradient, of biases and stretched weights [1 + axes, outputs] laid flat."""

    def __init__(self, along: Tensor, loss: Callable[[Tensor], Tensor], stretch: np.ndarray, penalty: float) -> None:
        self.along, self.loss, self.penalty = along, loss, penalty
        self.stretch = torch.from_numpy(stretch).unsqueeze(1)

    def __call__(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        values = torch.from_numpy(flat).view(1 + len(self.stretch), -1).requires_grad_()
        weight = values[1:] * self.stretch
        mean = self.loss(torch.addmm(values[0].float(), self.along, weight.float()))
        total = mean.double() + self.penalty / 2 * weight.square().sum()
        (gradient,) = torch.autograd.grad(total, values)
        return total.item(), gradient.numpy().ravel()


def principal_axes(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return orthonormal axes [F, axes] and the variance of centred features [n, F] along each, both float64."""
    n, width = features.shape
    squares, vectors = np.linalg.eigh(_squared(features if width <= n else features.T))
    kept = squares > LEAST_VARIANCE * max(squares[-1], 1e-30)
    squares, vectors = squares[kept], vectors[:, kept]
    if width > n:
        vectors = (features.T @ vectors) / np.sqrt(squares)
    return vectors, squares / n


def _squared(x: np.ndarray) -> np.ndarray:
    """Return x.T @ x in float64, whose small eigenvalues float32 would bury."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for part in np.array_split(x, max(1, x.size // CHUNK)):
        exact = part.astype(np.float64)
        total += exact.T @ exact
    return total
