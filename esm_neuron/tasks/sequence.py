"""One class per protein."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.metrics import Value, classification_metrics
from esm_neuron.metrics.bootstrap import MOST_CURVES
from esm_neuron.tasks.base import (
    CLASS_SETTINGS,
    Column,
    PooledTask,
    Predictions,
    by_class,
    log_softmax,
    record_mean,
    score_records,
    weighted,
)
from esm_neuron.tasks.baselines import Baseline, class_baselines
from esm_neuron.tasks.losses import softmax_losses
from esm_neuron.tasks.view import Confidence, Confusion, View, class_indices, class_probabilities, lengths, worst

if TYPE_CHECKING:
    from torch import Tensor


class SequenceClassification(PooledTask):
    """One class per protein, by softmax; the loss is cross entropy in nats."""

    summary = "one class per protein"
    settings = CLASS_SETTINGS
    metric = "mcc"
    compared = ("accuracy", "balanced_accuracy", "mcc", "macro_f1", "auroc", "auprc")
    hub_task = "text-classification"

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Return the protein's class index, int64, weighted by its class; weight 0 without labels (prediction)."""
        if not len(table.labels):
            return super().example_target(table, example, rng)
        label = np.asarray(table.labels[table.record[example]], np.int64)
        return Target(table.sequence(example), label, self.class_weights[label] * table.weight[example])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sums of w_y x loss and of w_y, with class weights w."""
        return weighted(softmax_losses(logits, batch.labels, self.cfg.label_smoothing, self.cfg.focal_gamma), batch)

    def metrics(self, table: ExampleTable, predictions: Predictions, intervals: bool = False) -> dict[str, Value]:
        """Return `classification_metrics`; a record's loss is the mean over its windows of the plain cross entropy."""

        def score(part: ExampleTable, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            log_probabilities = log_softmax(logits)
            loss = -log_probabilities[np.arange(len(part)), part.labels[part.record]]
            return record_mean(part, np.exp(log_probabilities)), record_mean(part, loss)

        probabilities, losses = score_records(table, predictions[0], score)
        return classification_metrics(probabilities, table.labels, losses, self.labels, intervals)

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return `label`, and as `p_<class>` the probability of each class: the mean over windows."""
        probabilities = record_mean(table, np.exp(log_softmax(predictions[0])))
        predicted = [self.labels[i] for i in probabilities.argmax(1)]
        return {"label": predicted, **by_class(self.labels, probabilities.T)}

    def kept(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return `outputs`; of more than MOST_CURVES classes `label` and its `probability` alone."""
        if len(self.labels) <= MOST_CURVES:
            return self.outputs(table, predictions)

        def score(part: ExampleTable, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return record_mean(part, np.exp(log_softmax(logits))), np.zeros(len(part.ids))

        probabilities, _ = score_records(table, predictions[0], score)
        return {"label": [self.labels[i] for i in probabilities.argmax(1)], "probability": probabilities.max(1)}

    def targets(self, table: ExampleTable) -> Column:
        return [self.labels[label] for label in table.labels]

    def baselines(self, train: ExampleTable) -> list[Baseline]:
        return class_baselines(len(self.labels), train)

    def view(self, table: pa.Table) -> View:
        """Return wrong classes, the most confident ones first."""
        labels, few = self.labels, "probability" not in table.column_names
        target, predicted = (class_indices(labels, table[name]) for name in ("target", "label"))
        confidence = class_probabilities(table, labels).max(1) if few else table["probability"].to_numpy()
        wrong = predicted != target

        def describe(i: int) -> tuple[str, str, str]:
            return labels[target[i]], labels[predicted[i]], f"probability {confidence[i]:.3f}"

        return View(
            residues=lengths(table),
            error=wrong.astype(float),
            weight=np.ones(len(wrong)),
            error_name="share of wrong classes",
            worst=worst(table, np.where(wrong, confidence, 0.0), describe),
            confusion=Confusion.of(target, predicted, len(labels)),
            confidence=Confidence(confidence, ~wrong, np.arange(len(wrong))),
        )
