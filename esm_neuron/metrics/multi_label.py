"""Metrics of any number of labels per protein."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.metrics.bootstrap import MOST_CURVES, Curve, Value, bootstrap, class_intervals, with_intervals
from esm_neuron.metrics.classification import binary_scores

if TYPE_CHECKING:
    from scipy import sparse
else:
    sparse = module("scipy.sparse")

sk = module("sklearn.metrics")
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
    predicted, few = probabilities >= THRESHOLD, len(names) <= MOST_CURVES
    positives = target.sum(0)
    defined_ = bool(len(target)) and bool(((positives > 0) & (positives < len(target))).all())
    wanted = range(len(names)) if few or defined_ else ()
    per_class = [binary_scores(probabilities[:, c], target[:, c], predicted[:, c]) for c in wanted]
    values: dict[str, Value] = {"n": len(target), **dict.fromkeys(NAMES)}
    if len(target):
        values["loss"] = float(loss.mean())
        values["subset_accuracy"] = float(sk.accuracy_score(target, predicted))
        values["macro_f1"] = float(sk.f1_score(target, predicted, average="macro", zero_division=0))
        values["micro_f1"] = float(sk.f1_score(target, predicted, average="micro", zero_division=0))
        for name in ("auroc", "auprc"):
            each = [scores[name] for scores in per_class]
            defined = [value for value in each if isinstance(value, float)]
            values[name] = float(np.mean(defined)) if len(defined) == len(names) else None
    if not intervals:
        return values
    n, everyone = len(target), np.arange(len(target))
    right, marked = (
        sparse.csr_matrix(x, dtype=float) for x in (target & predicted, target.astype(np.int8) + predicted)
    )
    exact = (target == predicted).all(1).astype(float)
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
        return {**values, "per_class": class_intervals(names, per_class, drawn)}
    both, either = right.sum(0).A1 * 2, marked.sum(0).A1
    occurs = np.flatnonzero(either).tolist()
    own = {names[c]: {"n": int(positives[c]), "f1": float(both[c] / either[c])} for c in occurs}
    return {**values, "per_class": own}
