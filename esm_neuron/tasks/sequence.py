"""One class a protein."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from esm_neuron.config import TaskConfig
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.metrics import Value, classification_metrics
from esm_neuron.metrics.classification import log_softmax
from esm_neuron.tasks.base import Column, PooledTask, Predictions, record_mean, weights_of
from esm_neuron.tasks.losses import softmax_losses


class SequenceClassification(PooledTask):
    """One class a protein, by softmax; the loss is cross entropy in nats."""

    metric = "mcc"

    def __init__(self, cfg: TaskConfig, labels: Sequence[str]) -> None:
        super().__init__(cfg, labels)
        self._weights = weights_of(cfg, labels)

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """The protein's class index, int64, weighed by its class; 0 with weight 0 without labels (prediction)."""
        if not len(table.labels):
            return Target(table.sequence(example), np.asarray(0, np.int64), np.asarray(0, np.float32))
        label = np.asarray(table.labels[table.record[example]], np.int64)
        return Target(table.sequence(example), label, self._weights[label] * table.weight[example])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Task.loss`; with class weights w the sums are those of w_y x loss and of w_y."""
        losses = softmax_losses(logits, batch.labels, self.cfg.label_smoothing, self.cfg.focal_gamma)
        return (losses * batch.weights).sum(), batch.weights.sum()

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Logits [R, S, classes]."""
        return (logits.float(),)

    def metrics(self, table: ExampleTable, predictions: Predictions, intervals: bool = False) -> dict[str, Value]:
        """See `classification_figures`. A record's loss is the mean over its windows of the cross entropy, without
        class weights, smoothing and focal factor."""
        log_probabilities = log_softmax(predictions[0])
        loss = -log_probabilities[np.arange(len(table)), table.labels[table.record]]
        probabilities = record_mean(table, np.exp(log_probabilities))
        return classification_metrics(probabilities, table.labels, record_mean(table, loss), self.labels, intervals)

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """`label`, and as `p_<class>` the probability of each class: the mean over windows."""
        probabilities = record_mean(table, np.exp(log_softmax(predictions[0])))
        columns: dict[str, Column] = {"label": [self.labels[i] for i in probabilities.argmax(1)]}
        return {**columns, **{f"p_{name}": p for name, p in zip(self.labels, probabilities.T, strict=True)}}

    def targets(self, table: ExampleTable) -> Column:
        """The name of each protein's class."""
        return [self.labels[label] for label in table.labels]
