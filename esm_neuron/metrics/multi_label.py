"""Metrics of any number of labels per protein."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.metrics.bootstrap import Curve, Value, bootstrap, class_intervals, with_intervals
from esm_neuron.metrics.classification import binary_scores

sk = module("sklearn.metrics")
THRESHOLD = 0.5  # probability from which a label is predicted
NAMES = ("loss", "subset_accuracy", "macro_f1", "micro_f1", "auroc", "auprc")


def multi_label_metrics(
    probabilities: np.ndarray, target: np.ndarray, loss: np.ndarray, names: Sequence[str], intervals: bool = False
) -> dict[str, Value]:
    """Return n (proteins) and NAMES; subset_accuracy is the share of proteins with exactly the right labels.

    `probabilities` are float64 [n, C], `target` bool [n, C], `loss` float64 [n] (nats, the mean over classes). With
    `intervals` also `<name>_ci`, and `per_class`: n (proteins with the label), F1, AUROC and AUPRC of each class.

    F1 of a class that is neither present nor predicted is 0 in the macro average, as in scikit-learn; AUROC and AUPRC
    are means over classes, undefined when a class has rows of one kind only.
    """
    predicted = probabilities >= THRESHOLD
    per_class = [binary_scores(probabilities[:, c], target[:, c], predicted[:, c]) for c in range(len(names))]
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
    right, marked = (target & predicted).astype(float), target.astype(float) + predicted
    exact = (target == predicted).all(1).astype(float)
    curves = [Curve.of(probabilities[:, c], target[:, c], everyone, n) for c in range(len(names))]

    def metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
        both, either = 2 * (counts @ right), counts @ marked
        with np.errstate(invalid="ignore"):
            f1 = np.where(either > 0, both / either, 0.0)
            micro = np.where(either.sum(1) > 0, both.sum(1) / either.sum(1), 0.0)
        areas = np.array([curve.areas(counts) for curve in curves])  # [C, 2, k]
        drawn = {"loss": counts @ loss / n, "subset_accuracy": counts @ exact / n, "macro_f1": f1.mean(1)}
        drawn |= {"micro_f1": micro, "auroc": areas[:, 0].mean(0), "auprc": areas[:, 1].mean(0)}
        for c in range(len(names)):
            drawn |= {f"f1/{c}": f1[:, c], f"auroc/{c}": areas[c, 0], f"auprc/{c}": areas[c, 1]}
        return drawn

    drawn = bootstrap(n, metrics, max((curve.thresholds for curve in curves), default=0))
    return {**with_intervals(values, drawn), "per_class": class_intervals(names, per_class, drawn)}
