"""Metrics of one class out of several: per protein, or per residue with proteins resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.metrics.bootstrap import (
    MOST_CURVES,
    Curve,
    Scores,
    Value,
    bootstrap,
    class_areas,
    class_intervals,
    numbered,
    with_intervals,
)

if TYPE_CHECKING:
    from scipy import sparse
else:
    sparse = module("scipy.sparse")

sk = module("sklearn.metrics")
THRESHOLD = 0.5  # probability from which a label is given
NAMES = ("loss", "accuracy", "balanced_accuracy", "mcc", "macro_f1", "auroc", "auprc")


def classification_metrics(
    probabilities: np.ndarray,
    labels: np.ndarray,
    loss: np.ndarray,
    names: Sequence[str],
    intervals: bool = False,
    protein: np.ndarray | None = None,
    units: np.ndarray | None = None,
    threshold: float = THRESHOLD,
) -> Scores:
    """Return n (rows), n_records (proteins, where rows are residues), NAMES, and what is to be known of them.

    A row is a protein, or a residue of `protein` (int64 [n]). `probabilities` are float64 [n, C], `labels` int64 [n]
    class indices, `loss` float64 [n] in nats, and `threshold` is that of `decided`. With `intervals` also `<name>_ci`,
    over proteins, or over the clusters `units` (int64 [proteins]; n_clusters says how many, where fewer than proteins),
    and `per_class`: n, F1, AUROC and AUPRC of each class; of more than MOST_CURVES classes n and F1 alone, of those
    that occur.

    Of two classes AUPRC is that of the rarer one, which `auprc_of` names, and AUROC is that of either; of more, both
    are means over classes of one against the rest, undefined when a class is absent. Balanced accuracy averages over
    the classes present, macro-F1 over those present or predicted. `only_answer` is there where every row is predicted
    to be of one class, and not all are.
    """
    predicted = decided(probabilities, threshold) if len(labels) else labels
    values: dict[str, Value] = {"n": len(labels)}
    if protein is not None:
        values["n_records"] = len(np.unique(protein))
    values.update(classification_scores(probabilities, labels, loss, predicted))
    if values["auprc"] is not None and len(names) == 2:
        values["auprc_of"] = names[rarer(labels)]
    if len(labels) and (predicted == predicted[0]).all() and (labels != labels[0]).any():
        values["only_answer"] = names[predicted[0]]
    if not intervals:
        return Scores(values)
    of_rows = units if protein is None or units is None else units[protein]
    size, unit = numbered(protein if of_rows is None else of_rows, len(labels))
    if size < int(values.get("n_records", len(labels))):  # type: ignore[arg-type]
        values["n_clusters"] = size
    cells = Cells.of(labels, predicted, unit, size)
    drawn = _drawn(probabilities, labels, loss, cells, unit)
    found = with_intervals(values, drawn, size)
    if len(names) <= MOST_CURVES:
        each = [binary_scores(p, labels == c, predicted == c) for c, p in enumerate(probabilities.T)]
        found["per_class"] = class_intervals(names, each, drawn, size)
        return found
    right, target, marked = cells.sums(np.ones((1, size)))
    f1 = _f1(right, target, marked)[0]
    own = {names[c]: {"n": int(target[0, i]), "f1": float(f1[i])} for i, c in enumerate(cells.classes.tolist())}
    found["per_class"] = own
    return found


def _drawn(
    probabilities: np.ndarray, labels: np.ndarray, loss: np.ndarray, cells: Cells, unit: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the metrics of every resample of the units, of which each row is one, int64 [n]."""
    classes, size = probabilities.shape[1], cells.counts.shape[0]
    few = classes <= MOST_CURVES
    losses, rows = np.bincount(unit, loss, size), np.bincount(unit, minlength=size)
    curves = [Curve.of(p, labels == c, unit, size) for c, p in enumerate(probabilities.T)] if few else []

    def metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
        sums = cells.sums(counts)
        drawn = {"loss": counts @ losses / (counts @ rows), **class_scores(*sums)}
        if not few:
            return drawn
        f1 = np.full((len(counts), classes), np.nan)
        f1[:, cells.classes] = _f1(*sums)
        for c, curve in enumerate(curves):
            drawn[f"f1/{c}"] = f1[:, c]
            drawn[f"auroc/{c}"], drawn[f"auprc/{c}"] = curve.areas(counts)
        shown = [rarer(labels)] if classes == 2 else range(classes)
        for name in ("auroc", "auprc"):
            drawn[name] = np.mean([drawn[f"{name}/{c}"] for c in shown], axis=0)
        return drawn

    width = max((curve.thresholds for curve in curves), default=0)
    return bootstrap(size, metrics, max(width, cells.counts.shape[1], 3 * len(cells.classes)))


def rarer(labels: np.ndarray) -> int:
    """Return the class, 0 or 1, that fewer of the labels int64 [n] are of; 1 where both are as frequent."""
    return int(2 * (labels == 1).sum() <= len(labels))


@dataclass(frozen=True)
class Cells:
    """The confusion matrices of proteins, as far as their cells are occupied: most pairs of classes never occur."""

    counts: sparse.csr_matrix  # float64 [proteins, cells]: how often each pair of target and prediction occurs
    target: np.ndarray  # int64 [cells]: place in `classes`
    predicted: np.ndarray  # int64 [cells]
    classes: np.ndarray  # int64: the classes that are a target or predicted

    @classmethod
    def of(cls, labels: np.ndarray, predicted: np.ndarray, unit: np.ndarray, units: int) -> Cells:
        """Count pairs of classes, int64 [n] each, by the protein (int64 [n], 0 to units - 1) that they are of."""
        classes, place = np.unique(np.concatenate([labels, predicted]), return_inverse=True)
        both = place.reshape(2, -1).astype(np.int64)
        pairs, cell = np.unique(both[0] * len(classes) + both[1], return_inverse=True)
        counts = sparse.csr_matrix((np.ones(len(cell)), (unit, cell)), shape=(units, len(pairs)))
        return cls(counts, pairs // max(len(classes), 1), pairs % max(len(classes), 1), classes)

    def sums(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return how often each class is right, a target, predicted, [k, classes] each, in resamples [k, proteins]."""
        drawn = counts @ self.counts
        right = (self.target == self.predicted).astype(float)

        def by_class(place: np.ndarray, weight: np.ndarray) -> np.ndarray:
            shape = (drawn.shape[1], len(self.classes))
            return np.asarray(drawn @ sparse.csr_matrix((weight, (np.arange(shape[0]), place)), shape=shape))

        ones = np.ones_like(right)
        return by_class(self.target, right), by_class(self.target, ones), by_class(self.predicted, ones)


def decided(probabilities: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Return the likeliest class of each row, int64 [n], of `probabilities` float64 [n, C].

    Of two classes that is the second where its probability is more than `threshold`.
    """
    if probabilities.shape[1] == 2 and threshold != THRESHOLD:
        return (probabilities[:, 1] > threshold).astype(np.int64)
    return np.asarray(probabilities.argmax(1))


def classification_scores(
    probabilities: np.ndarray, labels: np.ndarray, loss: np.ndarray, predicted: np.ndarray
) -> dict[str, Value]:
    """Return the point values NAMES: probabilities [n, C], labels [n], loss [n], and the `predicted` classes [n]."""
    values: dict[str, Value] = dict.fromkeys(NAMES)
    if not len(labels):
        return values
    present = np.unique(labels)
    values["loss"] = float(loss.mean())
    values["accuracy"] = float(sk.accuracy_score(labels, predicted))
    # Not by scikit-learn, whose confusion matrix is dense; the tests hold both equal.
    everyone = np.zeros(len(labels), dtype=np.int64)
    scores = class_scores(*Cells.of(labels, predicted, everyone, 1).sums(np.ones((1, 1))))
    values["balanced_accuracy"], values["macro_f1"] = (float(scores[n][0]) for n in ("balanced_accuracy", "macro_f1"))
    if len(present) > 1:
        values["mcc"] = float(scores["mcc"][0])
    classes = probabilities.shape[1]
    if len(present) == classes:
        shown = [rarer(labels)] if classes == 2 else slice(None)
        rows = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
        areas = class_areas(probabilities, rows)[shown]
        values["auroc"], values["auprc"] = map(float, areas.mean(0))
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
    """Return `class_scores` of confusion matrices [k, C, C]; rows are targets, columns predictions."""
    return class_scores(np.einsum("kii->ki", matrix), matrix.sum(2), matrix.sum(1))


def class_scores(right: np.ndarray, target: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Return accuracy, balanced_accuracy, mcc, macro_f1, each [k]; NaN where undefined.

    `right`, `target` and `predicted`, [k, C] each, say how often a class is right, a target, predicted. MCC of several
    classes after Gorodkin 2004, and 0 for a constant prediction, both as in scikit-learn.
    """
    n = target.sum(1)
    covariance = right.sum(1) * n - (target * predicted).sum(1)
    target_variance, predicted_variance = n**2 - (target**2).sum(1), n**2 - (predicted**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mcc = np.where(predicted_variance > 0, covariance / np.sqrt(target_variance * predicted_variance), 0.0)
        return {
            "accuracy": right.sum(1) / n,
            "balanced_accuracy": np.nanmean(np.where(target > 0, right / target, np.nan), axis=1),
            "mcc": np.where(target_variance > 0, mcc, np.nan),
            "macro_f1": np.nanmean(_f1(right, target, predicted), axis=1),
        }


def _f1(right: np.ndarray, target: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return F1 of each class [k, C], see `class_scores`; NaN for one neither present nor predicted."""
    marked = target + predicted
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(marked > 0, 2 * right / marked, np.nan))
