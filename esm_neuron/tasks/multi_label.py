"""Any number of labels per protein."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from esm_neuron.config.deferred import module
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.labels import LabelSets
from esm_neuron.data.records import LIST_JOINER
from esm_neuron.metrics import Scores, multi_label_metrics
from esm_neuron.metrics.bootstrap import MOST_CURVES
from esm_neuron.metrics.calibration import Calibration, best_threshold, f1, fit_temperature
from esm_neuron.metrics.classification import THRESHOLD
from esm_neuron.tasks.base import (
    CLASS_SETTINGS,
    Column,
    PooledTask,
    Predictions,
    by_class,
    combined,
    cross_entropy,
    joined,
    pieces,
    record_mean,
    thinned,
)
from esm_neuron.tasks.baselines import Baseline, label_set_baselines
from esm_neuron.tasks.losses import sigmoid_losses
from esm_neuron.tasks.view import (
    Confidence,
    Confusion,
    Curve,
    View,
    class_probabilities,
    curves,
    lengths,
    most_frequent,
    worst,
)

if TYPE_CHECKING:
    from scipy import sparse, special
    from torch import Tensor
else:
    sparse, special = module("scipy.sparse"), module("scipy.special")


class MultiLabel(PooledTask):
    """A yes or no for every class of a protein; the loss is binary cross entropy in nats, the mean over classes."""

    summary = "any number of labels per protein"
    settings = CLASS_SETTINGS
    label_kind = LabelSets
    metric = "macro_f1"
    averages = True
    compared = ("subset_accuracy", "macro_f1", "micro_f1", "auroc", "auprc")
    hub_task = "text-classification"
    problem_type = "multi_label_classification"

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Return float32 [classes]: for a label that the protein has its class weight (above 0), else 0."""
        if not len(table.labels):
            return Target(table.sequence(example), np.zeros(len(self.labels), np.float32), np.asarray(0, np.float32))
        label = table.labels[table.record[example]] * self.class_weights
        return Target(table.sequence(example), label, table.weight[example])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return `Task.loss`; a class weight multiplies the loss at the labels that a protein has."""
        has = batch.labels > 0
        losses = sigmoid_losses(logits, has.float(), self.cfg.label_smoothing, self.cfg.focal_gamma)
        weighted = losses * (batch.labels + (~has).float())
        return (weighted.mean(-1) * batch.weights).sum(), batch.weights.sum()

    def metrics(
        self, table: ExampleTable, predictions: Predictions, intervals: bool = False, units: np.ndarray | None = None
    ) -> Scores:
        """Return `multi_label_metrics`; a record's probabilities are the mean over its windows."""
        targets, thresholds = table.labels.view(bool), self.calibration.thresholds
        probabilities = self._probabilities(table, predictions)
        losses = self._losses(table, predictions)
        return multi_label_metrics(probabilities, targets, losses, self.labels, intervals, units, thresholds)

    def _probabilities(self, table: ExampleTable, predictions: Predictions, sign: int = 1) -> np.ndarray:
        """Return float64 [records, C]: that a protein has a label, or with a `sign` of -1 that it has not."""
        scale = sign / self.calibration.temperature
        return record_mean(table, predictions[0], lambda logits: sigmoid(logits.astype(np.float64) * scale))

    def averaged(self, each: Sequence[Predictions]) -> Predictions:
        def mean_sigmoid(logits: np.ndarray) -> np.ndarray:
            # log p - log (1 - p) of the mean p, in a form that loses no digits near 0 and 1
            return np.logaddexp.reduce(-np.logaddexp(0, -logits)) - np.logaddexp.reduce(-np.logaddexp(0, logits))

        return combined(each, mean_sigmoid)

    def _losses(self, table: ExampleTable, predictions: Predictions) -> np.ndarray:
        """Return float64 [records], nats, the mean over classes."""
        # both, since 1 - p would lose the digits of a probability near 1
        has, has_not = (self._probabilities(table, predictions, sign) for sign in (1, -1))
        losses = [
            cross_entropy(np.where(table.labels[rows] > 0, has[rows], has_not[rows])).mean(1) for rows in pieces(has)
        ]
        return np.concatenate(losses) if losses else np.empty(0)

    def kept(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return `outputs`; of more than MOST_CURVES classes `label` and the `probabilities` of these labels alone."""
        if len(self.labels) <= MOST_CURVES:
            return self.outputs(table, predictions)
        probabilities = self._probabilities(table, predictions)
        thresholds = np.array(self.calibration.thresholds or THRESHOLD)
        own = [row[row >= thresholds].astype(np.float32) for row in probabilities]
        label = [LIST_JOINER.join(self.labels[c] for c in np.flatnonzero(row >= thresholds)) for row in probabilities]
        return {"label": label, "probabilities": own}

    def calibrate(self, table: ExampleTable, predictions: Predictions) -> Calibration:
        """Return a temperature, and for each label the threshold with the largest F1."""
        table, predictions = thinned(table, predictions)
        n = len(table.ids)

        def scaled(temperature: float) -> MultiLabel:
            return self.read_by(Calibration(temperature=temperature))

        temperature = fit_temperature(lambda t: float(scaled(t)._losses(table, predictions).mean()), n)
        found, targets = scaled(temperature)._probabilities(table, predictions), table.labels.astype(bool)
        thresholds = [best_threshold(found[:, c], targets[:, c], f1) for c in range(len(self.labels))]
        return Calibration(n, temperature, tuple(thresholds))

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return `label` (those with a probability of at least their threshold, 1 / 2 where none was chosen, joined by
        `;`; may be empty), and as `p_<class>` the probability of each class."""
        probabilities = self._probabilities(table, predictions)
        chosen = probabilities >= np.array(self.calibration.thresholds or THRESHOLD)
        return {"label": joined(self.labels, chosen), **by_class(self.labels, probabilities.T)}

    def targets(self, table: ExampleTable) -> Column:
        return joined(self.labels, table.labels)

    def baselines(self, train: ExampleTable) -> list[Baseline]:
        return label_set_baselines(train, self.class_weights)

    def view(self, table: pa.Table) -> View:
        """Return wrong labels; the proteins whose probabilities are furthest off come first."""
        labels = self.labels
        target, predicted = (self._having(table[name].to_pylist()) for name in ("target", "label"))
        wrong = np.diff((target != predicted).indptr)
        totals = np.asarray(target.sum(0)).ravel()
        shown = most_frequent(totals)
        confidence, score = self._confidence(table, target, predicted)

        def describe(i: int) -> tuple[str, str, str]:
            own, found = (table[name][i].as_py().replace(LIST_JOINER, ", ") or "none" for name in ("target", "label"))
            return own, found, f"{wrong[i]} of {len(labels)} wrong"

        return View(
            residues=lengths(table),
            error=wrong / len(labels),
            weight=np.ones(len(wrong)),
            error_name="share of wrong labels",
            worst=worst(table, np.where(wrong > 0, score, 0.0), describe),
            curves=self._curves(table, target),
            confusion=Confusion((target[:, shown].T @ predicted[:, shown]).toarray(), totals[shown], shown),
            confidence=confidence,
            several=True,
        )

    def _curves(self, table: pa.Table, target: sparse.csr_matrix) -> list[Curve]:
        """Return the curves of labels, where the probabilities of all were kept."""
        if "probabilities" in table.column_names:
            return []
        return curves(self.labels, target.toarray() > 0, class_probabilities(table, self.labels))

    def _confidence(
        self, table: pa.Table, target: sparse.csr_matrix, predicted: sparse.csr_matrix
    ) -> tuple[Confidence, np.ndarray]:
        """Return what is known of each label, and how far off a protein's probabilities are, float64 [n]."""
        if "probabilities" in table.column_names:  # of the given labels alone, see `kept`
            given = table["probabilities"].combine_chunks().flatten().to_numpy()
            protein, right = predicted.nonzero()[0], np.asarray(target[predicted.nonzero()]).ravel() > 0
            return Confidence(given, right, protein), np.diff((target != predicted).indptr).astype(float)
        probabilities, has = class_probabilities(table, self.labels), target.toarray() > 0
        protein = np.repeat(np.arange(len(has)), len(self.labels))
        return Confidence(probabilities.ravel(), has.ravel(), protein), np.abs(probabilities - has).sum(1)

    def _having(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """Return float64 [n, C]: 1 for each label in the texts of `joined`."""
        place = {label: c for c, label in enumerate(self.labels)}
        own = [sorted(place[name] for name in text.split(LIST_JOINER) if name in place) for text in texts]
        row, column = (
            np.repeat(np.arange(len(own)), list(map(len, own))),
            np.array([c for has in own for c in has], int),
        )
        return sparse.csr_matrix((np.ones(len(row)), (row, column)), shape=(len(own), len(self.labels)))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-logits)), in a form that overflows nowhere."""
    return np.asarray(special.expit(logits))
