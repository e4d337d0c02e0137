"""Metrics of any number of labels per protein."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.metrics.bootstrap import (
    MOST_CURVES,
    Curve,
    Scores,
    Value,
    bootstrap,
    class_intervals,
    numbered,
    with_intervals,
)
from esm_neuron.metrics.classification import THRESHOLD, binary_scores

if TYPE_CHECKING:
    from scipy import sparse
else:
    sparse = module("scipy.sparse")

sk = module("sklearn.metrics")
NAMES = ("loss", "subset_accuracy", "macro_f1", "micro_f1", "auroc", "auprc")


def multi_label_metrics(
    probabilities: np.ndarray,
    target: np.ndarray,
    loss: np.ndarray,
    names: Sequence[str],
    intervals: bool = False,
    units: np.ndarray | None = None,
    thresholds: Sequence[float] = (),
) -> Scores:
    """Return n (proteins) and NAMES; subset_accuracy is the share of proteins with exactly the right labels.

    `probabilities` are float64 [n, C], `target` bool [n, C], `loss` float64 [n] (nats, the mean over classes);
    a label is given from its probability in `thresholds` on, or THRESHOLD. With
    `intervals` also `<name>_ci`, over proteins or over the clusters `units` (int64 [n]; their number is n_clusters),
    and `per_class`: n (proteins with the label), F1, AUROC and AUPRC of each class; of more than MOST_CURVES classes n
    and F1 alone, of those that occur.

    F1 of a class that is neither present nor predicted is 0 in the macro average, as in scikit-learn; AUROC and AUPRC
    are means over classes, undefined when a class has rows of one kind only. `only_answer` is there where all proteins
    are predicted to have the same labels, and they have not.
    """
    predicted, few = probabilities >= np.array(thresholds or THRESHOLD), len(names) <= MOST_CURVES
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
    if len(target) and (predicted == predicted[0]).all() and (target != target[0]).any():
        values["only_answer"] = ", ".join(names[c] for c in np.flatnonzero(predicted[0]).tolist()) or "no label"
    if not intervals:
        return Scores(values)
    size, unit = numbered(units, len(target))
    if size < len(target):
        values["n_clusters"] = size
    of_unit = sparse.csr_matrix((np.ones(len(unit)), (unit, np.arange(len(unit)))), shape=(size, len(unit)))
    exact = (target == predicted).all(1).astype(float)
    sums = np.stack([of_unit @ x for x in (np.ones(len(target)), loss, exact)])
    right, marked = (
        of_unit @ sparse.csr_matrix(x, dtype=float) for x in (target & predicted, target.astype(np.int8) + predicted)
    )
    curves = [Curve.of(p, has, unit, size) for p, has in zip(probabilities.T, target.T, strict=True)] if few else []
    drawn = _drawn(sums, right, marked, curves)
    found = with_intervals(values, drawn, size)
    if few:
        found["per_class"] = class_intervals(names, per_class, drawn, size)
        return found
    both, either = (np.asarray(x.sum(0)).ravel() for x in (2 * right, marked))
    occurs = np.flatnonzero(either).tolist()
    found["per_class"] = {names[c]: {"n": int(positives[c]), "f1": float(both[c] / either[c])} for c in occurs}
    return found


def _drawn(
    sums: np.ndarray, right: sparse.csr_matrix, marked: sparse.csr_matrix, curves: Sequence[Curve]
) -> dict[str, np.ndarray]:
    """Return the metrics of every resample of units.

    Of each unit, `sums` [3, units] has the proteins, their losses, and those with exactly the right labels; `right` and
    `marked` [units, C] how often a label is predicted rightly, and is there or predicted.
    """
    rows, losses, exact = sums

    def metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
        both, either, n = 2 * (counts @ right), counts @ marked, counts @ rows
        with np.errstate(invalid="ignore"):
            f1 = np.where(either > 0, both / either, 0.0)
            micro = np.where(either.sum(1) > 0, both.sum(1) / either.sum(1), 0.0)
        drawn = {"loss": counts @ losses / n, "subset_accuracy": counts @ exact / n, "macro_f1": f1.mean(1)}
        drawn["micro_f1"] = micro
        if not curves:
            return drawn
        areas = np.array([curve.areas(counts) for curve in curves])  # [C, 2, k]
        drawn |= {"auroc": areas[:, 0].mean(0), "auprc": areas[:, 1].mean(0)}
        for c in range(len(curves)):
            drawn |= {f"f1/{c}": f1[:, c], f"auroc/{c}": areas[c, 0], f"auprc/{c}": areas[c, 1]}
        return drawn

    width = max((curve.thresholds for curve in curves), default=3 * marked.shape[1])
    return bootstrap(len(rows), metrics, width)
