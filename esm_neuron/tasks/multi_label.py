"""Any number of labels per protein."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.labels import LabelSets
from esm_neuron.data.records import LIST_JOINER
from esm_neuron.metrics import Scores, multi_label_metrics
from esm_neuron.metrics.calibration import Calibration, best_threshold, f1, fit_temperature
from esm_neuron.metrics.classification import THRESHOLD
from esm_neuron.tasks.base import (
    CLASS_SETTINGS,
    Column,
    PooledTask,
    Predictions,
    by_class,
    cross_entropy,
    joined,
    record_mean,
)
from esm_neuron.tasks.baselines import Baseline, label_set_baselines
from esm_neuron.tasks.losses import sigmoid_losses
from esm_neuron.tasks.view import Confidence, Confusion, View, class_probabilities, lengths, most_frequent, worst

if TYPE_CHECKING:
    from torch import Tensor


class MultiLabel(PooledTask):
    """A yes or no for every class of a protein; the loss is binary cross entropy in nats, the mean over classes."""

    summary = "any number of labels per protein"
    settings = CLASS_SETTINGS
    label_kind = LabelSets
    metric = "macro_f1"
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
        targets, thresholds = table.labels.astype(bool), self.calibration.thresholds
        probabilities = self._probabilities(table, predictions)
        losses = self._losses(table, predictions)
        return multi_label_metrics(probabilities, targets, losses, self.labels, intervals, units, thresholds)

    def _probabilities(self, table: ExampleTable, predictions: Predictions, sign: int = 1) -> np.ndarray:
        """Return float64 [records, C]: that a protein has a label, or with a `sign` of -1 that it has not."""
        return record_mean(table, sigmoid(predictions[0].astype(np.float64) * sign / self.calibration.temperature))

    def _losses(self, table: ExampleTable, predictions: Predictions) -> np.ndarray:
        """Return float64 [records], nats, the mean over classes."""
        # both, since 1 - p would lose the digits of a probability near 1
        both = (self._probabilities(table, predictions, sign) for sign in (1, -1))
        return np.asarray(cross_entropy(np.where(table.labels.astype(bool), *both)).mean(1))

    def calibrate(self, table: ExampleTable, predictions: Predictions) -> Calibration:
        """Return a temperature, and for each label the threshold with the largest F1."""
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
        labels, probabilities = self.labels, class_probabilities(table, self.labels)
        target, predicted = (self._having(table[name].to_pylist()) for name in ("target", "label"))
        wrong = (target != predicted).sum(1)
        score = np.where(wrong > 0, np.abs(probabilities - target).sum(1), 0.0)
        protein = np.repeat(np.arange(len(target)), len(labels))
        totals = target.sum(0).astype(float)
        shown = most_frequent(totals)

        def describe(i: int) -> tuple[str, str, str]:
            own, found = (text or "none" for text in joined(labels, np.stack([target[i], predicted[i]]), ", "))
            return own, found, f"{wrong[i]} of {len(labels)} wrong"

        return View(
            residues=lengths(table),
            error=wrong / len(labels),
            weight=np.ones(len(wrong)),
            error_name="share of wrong labels",
            worst=worst(table, score, describe),
            confusion=Confusion(target[:, shown].T.astype(float) @ predicted[:, shown], totals[shown], shown),
            confidence=Confidence(probabilities.ravel(), target.ravel(), protein),
            several=True,
        )

    def _having(self, texts: Sequence[str]) -> np.ndarray:
        """Return bool [n, C]: which labels are in each of the texts of `joined`."""
        own = [set(text.split(LIST_JOINER)) for text in texts]
        return np.array([[label in has for label in self.labels] for has in own], bool).reshape(-1, len(self.labels))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-logits)), in a form that overflows nowhere."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits)))
