"""Metrics of one class out of several: per protein, or per residue with proteins resampled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.metrics.bootstrap import Curve, Value, bootstrap, class_intervals, with_intervals

sk = module("sklearn.metrics")
NAMES = ("loss", "accuracy", "balanced_accuracy", "mcc", "macro_f1", "auroc", "auprc")


def classification_metrics(
    probabilities: np.ndarray,
    labels: np.ndarray,
    loss: np.ndarray,
    names: Sequence[str],
    intervals: bool = False,
    protein: np.ndarray | None = None,
) -> dict[str, Value]:
    """Return n (rows), n_records (proteins, where rows are residues) and NAMES.

    A row is a protein, or a residue of `protein` (int64 [n]). `probabilities` are float64 [n, C], `labels` int64 [n]
    class indices, `loss` float64 [n] in nats. With `intervals` also `<name>_ci`, over proteins, and `per_class`: n, F1,
    AUROC and AUPRC of each class.

    Of two classes, AUROC and AUPRC are those of class 1; of more, the mean over classes of one against the rest,
    undefined when a class is absent. Balanced accuracy averages over the classes present, macro-F1 over those present
    or predicted.
    """
    predicted = probabilities.argmax(1) if len(labels) else labels
    values: dict[str, Value] = {"n": len(labels)}
    if protein is not None:
        values["n_records"] = len(np.unique(protein))
    values.update(classification_scores(probabilities, labels, loss))
    if not intervals:
        return values
    classes = len(names)
    found, unit = np.unique(np.arange(len(labels)) if protein is None else protein, return_inverse=True)
    # A confusion matrix per protein: that of a resample is their sum by multiplicity, one product for a whole chunk.
    cells = np.zeros((len(found), classes * classes))
    np.add.at(cells, (unit, labels * classes + predicted), 1.0)
    losses, sizes = np.bincount(unit, loss, len(found)), np.bincount(unit, minlength=len(found))
    curves = [Curve.of(probabilities[:, c], labels == c, unit, len(found)) for c in range(classes)]

    def metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
        matrix = (counts @ cells).reshape(-1, classes, classes)
        drawn = {"loss": counts @ losses / (counts @ sizes), **confusion_scores(matrix)}
        for c, f1 in enumerate(_f1(matrix).T):
            drawn[f"f1/{c}"] = f1
            drawn[f"auroc/{c}"], drawn[f"auprc/{c}"] = curves[c].areas(counts)
        shown = [1] if classes == 2 else range(classes)
        for name in ("auroc", "auprc"):
            drawn[name] = np.mean([drawn[f"{name}/{c}"] for c in shown], axis=0)
        return drawn

    drawn = bootstrap(len(found), metrics, max((curve.thresholds for curve in curves), default=0))
    per_class = [binary_scores(probabilities[:, c], labels == c, predicted == c) for c in range(classes)]
    return {**with_intervals(values, drawn), "per_class": class_intervals(names, per_class, drawn)}


def classification_scores(probabilities: np.ndarray, labels: np.ndarray, loss: np.ndarray) -> dict[str, Value]:
    """Return the point values NAMES by scikit-learn: probabilities [n, C], labels [n], loss [n]."""
    values: dict[str, Value] = dict.fromkeys(NAMES)
    if not len(labels):
        return values
    predicted, present = probabilities.argmax(1), np.unique(labels)
    values["loss"] = float(loss.mean())
    values["accuracy"] = float(sk.accuracy_score(labels, predicted))
    # Not balanced_accuracy_score: the same value, but it warns of every class that is predicted and not present.
    values["balanced_accuracy"] = float(np.mean([(predicted[labels == c] == c).mean() for c in present]))
    values["macro_f1"] = float(sk.f1_score(labels, predicted, average="macro", zero_division=0))
    if len(present) > 1:
        values["mcc"] = float(sk.matthews_corrcoef(labels, predicted))
    classes = probabilities.shape[1]
    if len(present) == classes:
        shown = [1] if classes == 2 else range(classes)
        each = [(labels == c, probabilities[:, c]) for c in shown]
        values["auroc"] = float(np.mean([sk.roc_auc_score(target, column) for target, column in each]))
        values["auprc"] = float(np.mean([sk.average_precision_score(target, column) for target, column in each]))
    return values


def binary_scores(score: np.ndarray, target: np.ndarray, predicted: np.ndarray) -> dict[str, Value]:
    """Return n (rows of the class), f1, auroc, auprc of one class against the rest, None where undefined.

    `score`, float64 [n], is its probability; `target` and `predicted`, bool [n], which rows are of it and predicted so.
    """
    positives = int(target.sum())
    both = 0 < positives < len(target)
    return {
        "n": positives,
        "f1": float(sk.f1_score(target, predicted)) if target.any() or predicted.any() else None,
        "auroc": float(sk.roc_auc_score(target, score)) if both else None,
        "auprc": float(sk.average_precision_score(target, score)) if both else None,
    }


def confusion_scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Return accuracy, balanced_accuracy, mcc, macro_f1, each [k], of matrices [k, C, C]; NaN where undefined.

    Rows of a confusion matrix are targets, columns predictions. MCC of several classes after Gorodkin 2004, and 0 for a
    constant prediction, both as in scikit-learn.
    """
    right, target, predicted = np.einsum("kii->ki", matrix), matrix.sum(2), matrix.sum(1)
    n = target.sum(1)
    covariance = right.sum(1) * n - (target * predicted).sum(1)
    target_variance, predicted_variance = n**2 - (target**2).sum(1), n**2 - (predicted**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mcc = np.where(predicted_variance > 0, covariance / np.sqrt(target_variance * predicted_variance), 0.0)
        return {
            "accuracy": right.sum(1) / n,
            "balanced_accuracy": np.nanmean(np.where(target > 0, right / target, np.nan), axis=1),
            "mcc": np.where(target_variance > 0, mcc, np.nan),
            "macro_f1": np.nanmean(_f1(matrix), axis=1),
        }


def _f1(matrix: np.ndarray) -> np.ndarray:
    """Return F1 of each class [k, C] of confusion matrices [k, C, C]; NaN for one neither present nor predicted."""
    right, marked = np.einsum("kii->ki", matrix), matrix.sum(2) + matrix.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(marked > 0, 2 * right / marked, np.nan))
