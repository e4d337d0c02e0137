"""Metrics of any number of labels per protein."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.metrics.bootstrap import (
    CELLS,
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
from esm_neuron.metrics.classification import THRESHOLD, binary_scores

if TYPE_CHECKING:
    from scipy import sparse
else:
    sparse = module("scipy.sparse")

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
    few, n, cut = len(names) <= MOST_CURVES, len(target), np.array(thresholds or THRESHOLD)
    wanted, predicted = _ones(target, lambda part: part), _ones(probabilities, lambda part: part >= cut)
    right, marked = wanted.multiply(predicted).tocsr(), (wanted + predicted).tocsr()
    exact = np.diff((wanted != predicted).indptr) == 0
    positives, both, either = (np.asarray(x.sum(0)).ravel() for x in (wanted, 2 * right, marked))
    values: dict[str, Value] = {"n": n, **dict.fromkeys(NAMES)}
    if n:
        values |= {"loss": float(loss.mean()), "subset_accuracy": float(exact.mean())}
        values |= {"macro_f1": float((both / np.maximum(either, 1)).mean())}
        values |= {"micro_f1": float(both.sum() / max(either.sum(), 1)), **_mean_areas(probabilities, wanted)}
    if n and _alike(predicted) and not _alike(wanted):
        values["only_answer"] = ", ".join(names[c] for c in predicted[0].indices.tolist()) or "no label"
    if not intervals:
        return Scores(values)
    size, unit = numbered(units, n)
    if size < n:
        values["n_clusters"] = size
    of_unit = sparse.csr_matrix((np.ones(len(unit)), (unit, np.arange(len(unit)))), shape=(size, len(unit)))
    sums = np.stack([of_unit @ x for x in (np.ones(n), loss, exact.astype(float))])
    curves = [Curve.of(p, has, unit, size) for p, has in zip(probabilities.T, target.T, strict=True)] if few else []
    drawn = _drawn(sums, of_unit @ right, of_unit @ marked, curves)
    found = with_intervals(values, drawn, size)
    if few:
        per_class = [binary_scores(p, has, p >= at) for p, has, at in _classes(probabilities, target, cut)]
        found["per_class"] = class_intervals(names, per_class, drawn, size)
        return found
    occurs = np.flatnonzero(either).tolist()
    found["per_class"] = {names[c]: {"n": int(positives[c]), "f1": float(both[c] / either[c])} for c in occurs}
    return found


def _mean_areas(probabilities: np.ndarray, wanted: sparse.csr_matrix) -> dict[str, Value]:
    """Return the means over classes of AUROC and AUPRC; none where a class has rows of one kind only."""
    columns = wanted.tocsc()
    areas = class_areas(probabilities, np.split(columns.indices, columns.indptr[1:-1]))
    return {} if np.isnan(areas).any() else {"auroc": float(areas[:, 0].mean()), "auprc": float(areas[:, 1].mean())}


def _classes(probabilities: np.ndarray, target: np.ndarray, cut: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Give the probabilities [n], the truth [n] and the threshold of each class."""
    return zip(probabilities.T, target.T, np.broadcast_to(cut, probabilities.shape[1]), strict=True)


def _ones(matrix: np.ndarray, chosen: Callable[[np.ndarray], np.ndarray]) -> sparse.csr_matrix:
    """Return float64 [n, C]: 1 where a matrix [n, C], which may be mapped from a file, is chosen."""
    step = max(1, CELLS // max(matrix.shape[1], 1))
    parts = [sparse.csr_matrix(chosen(matrix[at : at + step]), dtype=float) for at in range(0, len(matrix), step)]
    return sparse.vstack(parts, "csr") if parts else sparse.csr_matrix(matrix.shape)


def _alike(matrix: sparse.csr_matrix) -> bool:
    """Return whether all rows of ones are the same."""
    counts = np.asarray(matrix.sum(0)).ravel()
    return bool(((counts == 0) | (counts == matrix.shape[0])).all())


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
