"""Fit linear heads by a task's own loss, for a row of penalties: the same minimum as ridge or logistic regression.

The features are standardized and turned to their principal axes, where the squared norm of the weights is the same.
Each axis is then stretched by what its curvature is for a loss of curvature 1, so that all directions are alike: L-BFGS
(scipy's) needs about ten steps for a squared error, and some tens for a cross entropy, however alike the features are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
"""Penalties that are tried, the strongest first: half of this times the squared norm of the weights of standardized
features is added to the mean loss. Of scikit-learn's logistic regression it is 1 / (C n)."""
STEPS, TOLERANCE = 300, 1e-7
LEAST_VARIANCE = 1e-6
"""Share of the largest variance below which an axis is noise of float32, and left out."""


@dataclass(frozen=True)
class LinearHead:
    """Weights [outputs, F] and biases [outputs], float32, for features as they are."""

    penalty: float
    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return float32 [n, outputs]."""
        return features @ self.weight.T + self.bias


def fit_path(
    features: np.ndarray, outputs: int, loss: Callable[[Tensor], Tensor], penalties: tuple[float, ...] = PENALTIES
) -> Iterator[LinearHead]:
    """Yield the head that minimizes `loss` and each penalty, in their order; each begins at the one before.

    `features` are float32 [n, F]; `loss` gives the mean loss of outputs, float32 [n, outputs].
    """
    mean = features.mean(0, dtype=np.float64).astype(np.float32)
    sd = features.std(0, dtype=np.float64).astype(np.float32)
    sd[sd < 1e-6 * np.maximum(np.abs(mean), 1e-6)] = 1.0  # a constant feature says nothing, and keeps a weight of 0
    standardized = (features - mean) / sd
    axes, variance = principal_axes(standardized)
    along = torch.from_numpy(standardized @ axes)
    weight, bias = np.zeros((len(variance), outputs)), np.zeros(outputs)  # along the axes
    for penalty in penalties:
        stretch = 1 / np.sqrt(variance + penalty)
        solver = _Objective(along, loss, stretch, penalty)
        start = np.concatenate([bias[None], weight / stretch[:, None]]).ravel()
        options = {"maxiter": STEPS, "ftol": TOLERANCE, "gtol": 1e-6, "maxcor": 20}
        found = optimize.minimize(solver, start, jac=True, method="L-BFGS-B", options=options).x.reshape(-1, outputs)
        weight, bias = found[1:] * stretch[:, None], found[0]
        # of the features as they are: their scale and mean go into weights and biases
        own = (axes @ weight) / sd[:, None]
        yield LinearHead(penalty, own.T.astype(np.float32), (bias - mean @ own).astype(np.float32))


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
    """Return orthonormal axes, float32 [F, axes], and the variance of centred features [n, F] along each, float64."""
    n, width = features.shape
    small = features.T @ features if width <= n else features @ features.T
    squares, vectors = np.linalg.eigh(small.astype(np.float64))
    kept = squares > LEAST_VARIANCE * max(squares[-1], 1e-30)
    squares, vectors = squares[kept], vectors[:, kept]
    if width > n:
        vectors = (features.T.astype(np.float64) @ vectors) / np.sqrt(squares)
    return vectors.astype(np.float32), squares / n
