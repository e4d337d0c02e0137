"""Metrics that merge over batches and ranks, exact whatever the batch size and the world, with bootstrap intervals.

A state holds plain numpy arrays, so it travels between hosts as it is; every record counts once, and a record seen
twice is an error, not a slightly different figure. Values that are undefined (AUROC with one class present) are None,
which is null in JSON. Point values come from scikit-learn; the resamples of an interval are computed from
multiplicities, since scikit-learn would need minutes for what takes a second here; the tests hold both equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from sklearn import metrics as sk

if TYPE_CHECKING:
    from typing_extensions import Self

Value = float | int | list[float] | None
"""A figure, a count, an interval [low, high], or None where it is undefined."""

RESAMPLES = 1000
"""Bootstrap resamples of an interval."""
LEVEL = 95.0
"""Percent of the resamples within an interval."""
CELLS = 4_000_000
"""Multiplicities held at once while resampling: bounds memory on large splits (32 MB of int64)."""
WINDOW_TOLERANCE = 1e-3
"""How far the window weights of a record (float32, 1 / windows each) may sum from 1."""


class MetricState(Protocol):
    """What is kept of an evaluation: `update` per batch, `merge` over ranks, `compute` once at the end."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in one batch."""
        ...

    def merge(self, other: Self) -> None:
        """Take in what another rank has seen."""
        ...

    def compute(self, intervals: bool = False) -> dict[str, Value]:
        """The figures over everything seen; with `intervals` also `<name>_ci`, 95 % bootstrap over records."""
        ...


@dataclass
class ClassificationState:
    """One label a record out of `classes`; the windows of a record are averaged before anything is scored."""

    classes: int
    """C: number of classes, 2 or more."""
    seed: int = 0
    """Seed of the bootstrap."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    """(record, weight, logits, labels) of every batch."""

    def update(self, record: np.ndarray, weight: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> None:
        """Take in one batch of windows; those of weight 0 are fillers and left out.

        Args:
            record: int64 [n], the record a window belongs to.
            weight: float32 [n], 1 / windows of its record.
            logits: float32 [n, C].
            labels: int64 [n], class index.

        Raises:
            ValueError: shapes that do not fit, or a label outside 0..C-1.
        """
        record, weight, labels = np.asarray(record), np.asarray(weight, np.float64), np.asarray(labels)
        logits = np.asarray(logits, np.float64)
        n = len(record)
        if weight.shape != (n,) or labels.shape != (n,) or logits.shape != (n, self.classes):
            raise ValueError(
                f"record {record.shape}, weight {weight.shape}, logits {logits.shape} and labels {labels.shape} "
                f"do not fit [n], [n], [n, {self.classes}] and [n]"
            )
        real = weight > 0
        outside = (labels[real] < 0) | (labels[real] >= self.classes)
        if outside.any():
            raise ValueError(f"label {labels[real][outside][0]} is outside 0..{self.classes - 1}")
        self.parts.append((record[real], weight[real], logits[real], labels[real]))

    def merge(self, other: ClassificationState) -> None:
        """Take in what another rank has seen."""
        if other.classes != self.classes:
            raise ValueError(f"cannot merge states of {self.classes} and {other.classes} classes")
        self.parts.extend(other.parts)

    def records(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Every record once, by rising record index.

        Returns:
            record int64 [n]; probabilities float64 [n, C], the weighted mean over windows; labels int64 [n]; loss
            float64 [n], the weighted mean over windows of the cross entropy (as it is trained, without smoothing).

        Raises:
            ValueError: a window came twice or is missing, or the windows of a record differ in their label.
        """
        if not self.parts:
            return np.zeros(0, np.int64), np.zeros((0, self.classes)), np.zeros(0, np.int64), np.zeros(0)
        record, weight, logits, labels = (np.concatenate(arrays) for arrays in zip(*self.parts, strict=True))
        ids, first, index = np.unique(record, return_index=True, return_inverse=True)
        total = np.bincount(index, weight, len(ids))
        for wrong, what in (
            (total > 1 + WINDOW_TOLERANCE, "was evaluated more than once"),
            (total < 1 - WINDOW_TOLERANCE, "misses windows"),
        ):
            if wrong.any():
                raise ValueError(
                    f"record {ids[wrong][0]} {what}: its window weights sum to {total[wrong][0]:.4f}, not 1 "
                    f"({wrong.sum()} such records); each window must be given once over all batches and ranks"
                )
        if (labels != labels[first][index]).any():
            raise ValueError(f"record {record[labels != labels[first][index]][0]} has windows with different labels")
        log_probabilities = log_softmax(logits)
        share = weight / total[index]
        probabilities = np.zeros((len(ids), self.classes))
        np.add.at(probabilities, index, np.exp(log_probabilities) * share[:, None])
        loss = np.bincount(index, -log_probabilities[np.arange(len(labels)), labels] * share, len(ids))
        return ids, probabilities, labels[first], loss

    def compute(self, intervals: bool = False) -> dict[str, Value]:
        """n, loss, accuracy, balanced_accuracy, mcc, macro_f1, auroc, auprc over records.

        Of two classes, AUROC and AUPRC are those of class 1; of more, the mean over classes of one against the rest,
        undefined when a class is absent. Balanced accuracy averages over the classes present, macro-F1 over those
        present or predicted. With `intervals`, each `<name>_ci` is the percentile interval over the resamples in which
        the value is defined, None where those are fewer than half.
        """
        _, probabilities, labels, loss = self.records()
        values = classification_scores(probabilities, labels, loss)
        if not intervals:
            return values
        predicted = probabilities.argmax(1) if len(labels) else labels
        scores = _score_columns(probabilities)
        draws: dict[str, list[np.ndarray]] = {name: [] for name in values if name != "n"}
        for counts in resamples(len(labels), self.seed):
            chunk = {
                "loss": counts @ loss / len(labels),
                **confusion_scores(confusions(counts, labels, predicted, self.classes)),
                **ranking_scores(counts, scores, labels),
            }
            for name, drawn in chunk.items():
                draws[name].append(drawn)
        return with_intervals(values, draws)


@dataclass
class MaskedLMState:
    """Loss, perplexity and accuracy over the residues that were hidden, kept per example."""

    seed: int = 0
    """Seed of the bootstrap."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    """(example int64 [n], record int64 [n], sums float64 [n, 3] of loss, weight and correct) of every batch."""

    def update(
        self, example: np.ndarray, record: np.ndarray, loss: np.ndarray, weight: np.ndarray, correct: np.ndarray
    ) -> None:
        """Take in one batch; entries may be tokens or sums of an example, those of weight 0 are left out.

        Args:
            example: int64 [n], index of the example (protein or window). Entries of one call with the same example are
                summed; an example in two calls is an error, found by `compute`.
            record: int64 [n], the record an example comes from.
            loss: float32 [n], summed cross entropy (nats), times the weight.
            weight: float32 [n], residues answered.
            correct: float32 or bool [n], of these how many right.

        Raises:
            ValueError: arrays of different shapes.
        """
        arrays = [np.asarray(a) for a in (example, record, loss, weight, correct)]
        if len({a.shape for a in arrays}) != 1 or arrays[0].ndim != 1:
            raise ValueError(f"shapes {[a.shape for a in arrays]} are not one [n]")
        real = arrays[3] > 0
        ids, first, index = np.unique(arrays[0][real], return_index=True, return_inverse=True)
        sums = np.stack([np.bincount(index, a[real], len(ids)) for a in arrays[2:]], axis=1)
        self.parts.append((ids, arrays[1][real][first], sums))

    def merge(self, other: MaskedLMState) -> None:
        """Take in what another rank has seen."""
        self.parts.extend(other.parts)

    def records(self) -> np.ndarray:
        """float64 [records, 3]: loss, weight and correct of every record, by rising record index.

        Raises:
            ValueError: an example came twice.
        """
        if not self.parts:
            return np.zeros((0, 3))
        example, record, sums = (np.concatenate(arrays) for arrays in zip(*self.parts, strict=True))
        ids, seen = np.unique(example, return_counts=True)
        if (seen > 1).any():
            raise ValueError(
                f"example {ids[seen > 1][0]} was evaluated {seen[seen > 1][0]} times "
                f"({(seen > 1).sum()} such examples); each must be given once over all batches and ranks"
            )
        names, index = np.unique(record, return_inverse=True)
        return np.stack([np.bincount(index, column, len(names)) for column in sums.T], axis=1)

    def compute(self, intervals: bool = False) -> dict[str, Value]:
        """n (residues answered), n_records, loss (nats a residue), perplexity = exp(loss), accuracy."""
        sums = self.records()
        loss, weight, correct = sums.sum(0)
        if weight == 0:
            values: dict[str, Value] = {"n": 0, "n_records": 0, "loss": None, "perplexity": None, "accuracy": None}
            return with_intervals(values, {"loss": [], "perplexity": [], "accuracy": []}) if intervals else values
        values = {
            "n": round(weight),
            "n_records": len(sums),
            "loss": float(loss / weight),
            "perplexity": float(np.exp(loss / weight)),
            "accuracy": float(correct / weight),
        }
        if not intervals:
            return values
        draws: dict[str, list[np.ndarray]] = {"loss": [], "perplexity": [], "accuracy": []}
        for counts in resamples(len(sums), self.seed):
            drawn = counts @ sums
            draws["loss"].append(drawn[:, 0] / drawn[:, 1])
            draws["perplexity"].append(np.exp(drawn[:, 0] / drawn[:, 1]))
            draws["accuracy"].append(drawn[:, 2] / drawn[:, 1])
        return with_intervals(values, draws)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities [n, C] of `logits` [n, C]."""
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def classification_scores(probabilities: np.ndarray, labels: np.ndarray, loss: np.ndarray) -> dict[str, Value]:
    """Point values by scikit-learn over records: probabilities [n, C], labels [n], loss [n]."""
    names = ("loss", "accuracy", "balanced_accuracy", "mcc", "macro_f1", "auroc", "auprc")
    values: dict[str, Value] = {"n": len(labels), **dict.fromkeys(names)}
    if not len(labels):
        return values
    predicted = probabilities.argmax(1)
    recalls = [float((predicted[labels == c] == c).mean()) for c in np.unique(labels)]
    values["loss"] = float(loss.mean())
    values["accuracy"] = float(sk.accuracy_score(labels, predicted))
    # Not balanced_accuracy_score: the same figure, but it warns of every class that is predicted and not present.
    values["balanced_accuracy"] = float(np.mean(recalls))
    values["macro_f1"] = float(sk.f1_score(labels, predicted, average="macro", zero_division=0))
    if len(recalls) > 1:
        values["mcc"] = float(sk.matthews_corrcoef(labels, predicted))
    scores = _score_columns(probabilities)
    if len(recalls) == probabilities.shape[1]:
        each = [(labels == c, column) for c, column in scores.items()]
        values["auroc"] = float(np.mean([sk.roc_auc_score(truth, column) for truth, column in each]))
        values["auprc"] = float(np.mean([sk.average_precision_score(truth, column) for truth, column in each]))
    return values


def _score_columns(probabilities: np.ndarray) -> dict[int, np.ndarray]:
    """Class -> its probability [n]: class 1 of two, every class of more."""
    classes = probabilities.shape[1]
    return {c: probabilities[:, c] for c in ([1] if classes == 2 else range(classes))}


def resamples(n: int, seed: int) -> Iterator[np.ndarray]:
    """RESAMPLES bootstrap draws as multiplicities float64 [k, n], in chunks of at most CELLS cells; none for n = 0."""
    rng = np.random.default_rng(seed)
    done = 0 if n else RESAMPLES
    while done < RESAMPLES:
        k = min(RESAMPLES - done, max(1, CELLS // n))
        flat = rng.integers(0, n, (k, n)) + np.arange(k)[:, None] * n
        yield np.bincount(flat.ravel(), minlength=k * n).reshape(k, n).astype(np.float64)
        done += k


def confusions(counts: np.ndarray, labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Confusion matrices [k, C, C] (truth, prediction) of k resamples given as multiplicities [k, n]."""
    cells = np.zeros((len(labels), classes * classes))
    cells[np.arange(len(labels)), labels * classes + predicted] = 1
    return np.asarray(counts @ cells).reshape(-1, classes, classes)


def confusion_scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """accuracy, balanced_accuracy, mcc, macro_f1, each [k], of confusion matrices [k, C, C]; NaN where undefined.

    MCC of several classes after Gorodkin 2004, and 0 for a constant prediction, both as in scikit-learn.
    """
    right, truth, said = np.einsum("kii->ki", matrix), matrix.sum(2), matrix.sum(1)
    n = truth.sum(1)
    covariance = right.sum(1) * n - (truth * said).sum(1)
    truth_variance, said_variance = n**2 - (truth**2).sum(1), n**2 - (said**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mcc = np.where(said_variance > 0, covariance / np.sqrt(truth_variance * said_variance), 0.0)
        return {
            "accuracy": right.sum(1) / n,
            "balanced_accuracy": np.nanmean(np.where(truth > 0, right / truth, np.nan), axis=1),
            "mcc": np.where(truth_variance > 0, mcc, np.nan),
            "macro_f1": np.nanmean(np.where(truth + said > 0, 2 * right / (truth + said), np.nan), axis=1),
        }


def ranking_scores(counts: np.ndarray, scores: dict[int, np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """auroc and auprc, each [k], of k resamples [k, n], averaged over the classes of `scores`; NaN where undefined."""
    each = [_ranking(counts, column, labels == c) for c, column in scores.items()]
    return {"auroc": np.mean([a for a, _ in each], axis=0), "auprc": np.mean([p for _, p in each], axis=0)}


def _ranking(counts: np.ndarray, score: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC (Mann-Whitney U, ties count half) and average precision [k], of one class against the rest.

    Rows are sorted once, by falling score; a resample only changes how often each row counts.
    """
    order = np.argsort(-score, kind="stable")
    ordered, sorted_counts = score[order], counts[:, order]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1])  # rows of one score are one threshold
    positive = np.add.reduceat(sorted_counts * truth[order], starts, axis=1)
    negative = np.add.reduceat(sorted_counts * ~truth[order], starts, axis=1)
    above, false = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    p, n = above[:, -1], false[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (negative * (above - positive / 2)).sum(1) / (p * n)
        precision = np.nan_to_num(above / (above + false))  # 0 / 0 only before the first row drawn, where recall is 0
        auprc = (positive * precision).sum(1) / p
    return auroc, np.where(n > 0, auprc, np.nan)


def with_intervals(values: dict[str, Value], draws: dict[str, list[np.ndarray]]) -> dict[str, Value]:
    """`values` with a `<name>_ci` behind every name of `draws` (its values [k] in each chunk of resamples)."""
    result: dict[str, Value] = {}
    for name, value in values.items():
        result[name] = value
        if name in draws:
            defined = bool(draws[name]) and value is not None
            result[f"{name}_ci"] = _percentiles(np.concatenate(draws[name])) if defined else None
    return result


def _percentiles(drawn: np.ndarray) -> list[float] | None:
    """The central LEVEL percent of the defined values, None when fewer than half are defined."""
    defined = drawn[np.isfinite(drawn)]
    if 2 * len(defined) < len(drawn):
        return None
    tail = (100 - LEVEL) / 2
    return [float(bound) for bound in np.percentile(defined, [tail, 100 - tail])]
