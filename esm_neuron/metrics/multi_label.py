"""Metrics of any number of labels per protein."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.metrics.bootstrap import (
    CELLS,
    MOST_CURVES,
    Curve,
    Value,
    bootstrap,
    class_areas,
    class_intervals,
    with_intervals,
)
from esm_neuron.metrics.classification import binary_scores

if TYPE_CHECKING:
    from scipy import sparse
else:
    sparse = module("scipy.sparse")

THRESHOLD = 0.5  # probability from which a label is predicted
NAMES = ("loss", "subset_accuracy", "macro_f1", "micro_f1", "auroc", "auprc")


def multi_label_metrics(
    probabilities: np.ndarray, target: np.ndarray, loss: np.ndarray, names: Sequence[str], intervals: bool = False
) -> dict[str, Value]:
    """Return n (proteins) and NAMES; subset_accuracy is the share of proteins with exactly the right labels.

    `probabilities` are float64 [n, C], `target` bool [n, C], `loss` float64 [n] (nats, the mean over classes). With
    `intervals` also `<name>_ci`, and `per_class`: n (proteins with the label), F1, AUROC and AUPRC of each class; of
    more than MOST_CURVES classes n and F1 alone, of those that occur.

    F1 of a class that is neither present nor predicted is 0 in the macro average, as in scikit-learn; AUROC and AUPRC
    are means over classes, undefined when a class has rows of one kind only.
    """
    few, n, everyone = len(names) <= MOST_CURVES, len(target), np.arange(len(target))
    wanted, predicted = _sparse(target, lambda part: part), _sparse(probabilities, lambda part: part >= THRESHOLD)
    right, marked = wanted.multiply(predicted).tocsr(), wanted + predicted
    exact = ((wanted != predicted).getnnz(axis=1) == 0).astype(float)
    positives, both, either = (np.asarray(x.sum(0)).ravel() for x in (wanted, 2 * right, marked))
    values: dict[str, Value] = {"n": n, **dict.fromkeys(NAMES)}
    if n:
        values["loss"], values["subset_accuracy"] = float(loss.mean()), float(exact.mean())
        values["macro_f1"] = float((both / np.maximum(either, 1)).mean())
        values["micro_f1"] = float(both.sum() / max(either.sum(), 1))
        if ((positives > 0) & (positives < n)).all():
            by_class = wanted.tocsc()
            areas = class_areas(probabilities, np.split(by_class.indices, by_class.indptr[1:-1]))
            values["auroc"], values["auprc"] = map(float, areas.mean(0))
    if not intervals:
        return values
    curves = [Curve.of(probabilities[:, c], target[:, c], everyone, n) for c in range(len(names))] if few else []

    def metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
        both, either = 2 * (counts @ right), counts @ marked
        with np.errstate(invalid="ignore"):
            f1 = np.where(either > 0, both / either, 0.0)
            micro = np.where(either.sum(1) > 0, both.sum(1) / either.sum(1), 0.0)
        drawn = {"loss": counts @ loss / n, "subset_accuracy": counts @ exact / n, "macro_f1": f1.mean(1)}
        drawn["micro_f1"] = micro
        if not few:
            return drawn
        areas = np.array([curve.areas(counts) for curve in curves])  # [C, 2, k]
        drawn |= {"auroc": areas[:, 0].mean(0), "auprc": areas[:, 1].mean(0)}
        for c in range(len(names)):
            drawn |= {f"f1/{c}": f1[:, c], f"auroc/{c}": areas[c, 0], f"auprc/{c}": areas[c, 1]}
        return drawn

    drawn = bootstrap(n, metrics, max((curve.thresholds for curve in curves), default=3 * len(names)))
    values = with_intervals(values, drawn)
    if few:
        per_class = [binary_scores(p, t, p >= THRESHOLD) for p, t in zip(probabilities.T, target.T, strict=True)]
        return {**values, "per_class": class_intervals(names, per_class, drawn)}
    occurs = np.flatnonzero(either).tolist()
    own = {names[c]: {"n": int(positives[c]), "f1": float(both[c] / either[c])} for c in occurs}
    return {**values, "per_class": own}


def _sparse(matrix: np.ndarray, chosen: Callable[[np.ndarray], np.ndarray]) -> sparse.csr_matrix:
    """Return where a matrix [n, C], which may be mapped, is chosen, as float64 ones; some rows at a time."""
    step = max(1, CELLS // max(matrix.shape[1], 1))
    parts = [sparse.csr_matrix(chosen(matrix[at : at + step]), dtype=float) for at in range(0, len(matrix), step)]
    return sparse.vstack(parts, "csr") if parts else sparse.csr_matrix(matrix.shape)
