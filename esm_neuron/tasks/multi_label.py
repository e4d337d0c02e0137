"""Any number of labels a protein."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from esm_neuron.config import TaskConfig
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.labels import LabelSets
from esm_neuron.data.records import LIST_JOINER
from esm_neuron.metrics import Value, multi_label_metrics
from esm_neuron.metrics.multi_label import THRESHOLD
from esm_neuron.tasks.base import Column, PooledTask, Predictions, record_mean, weights_of
from esm_neuron.tasks.losses import sigmoid_losses


class MultiLabel(PooledTask):
    """A yes or no for every class of a protein; the loss is binary cross entropy in nats, the mean over classes."""

    metric = "macro_f1"
    label_kind = LabelSets

    def __init__(self, cfg: TaskConfig, labels: Sequence[str]) -> None:
        super().__init__(cfg, labels)
        self._weights = weights_of(cfg, labels)

    def _answered(self) -> dict[str, Any]:
        return super()._answered() | {"problem_type": "multi_label_classification"}

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """float32 [classes]: for a label that the protein has its class weight (above 0), else 0."""
        if not len(table.labels):
            return Target(table.sequence(example), np.zeros(len(self.labels), np.float32), np.asarray(0, np.float32))
        label = table.labels[table.record[example]] * self._weights
        return Target(table.sequence(example), label, table.weight[example])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Task.loss`; a class weight multiplies the loss at the labels that a protein has."""
        has = batch.labels > 0
        losses = sigmoid_losses(logits, has.float(), self.cfg.label_smoothing, self.cfg.focal_gamma)
        weighted = losses * (batch.labels + (~has).float())
        return (weighted.mean(-1) * batch.weights).sum(), batch.weights.sum()

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Logits [R, S, classes]."""
        return (logits.float(),)

    def metrics(self, table: ExampleTable, predictions: Predictions, intervals: bool = False) -> dict[str, Value]:
        """See `multi_label_figures`; a record's loss is the mean over windows and classes of the cross entropy."""
        logits = predictions[0].astype(np.float64)
        truth = table.labels.astype(bool)
        # - log sigmoid of the logit of what is true, in a form that overflows nowhere
        losses = np.logaddexp(0, np.where(truth[table.record], -logits, logits)).mean(1)
        probabilities = record_mean(table, sigmoid(logits))
        return multi_label_metrics(probabilities, truth, record_mean(table, losses), self.labels, intervals)

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """`label` (those with a probability of at least 1 / 2, joined by `;`; may be empty), and as `p_<class>` the
        probability of each class."""
        probabilities = record_mean(table, sigmoid(predictions[0].astype(np.float64)))
        columns: dict[str, Column] = {"label": self._joined(probabilities >= THRESHOLD)}
        return {**columns, **{f"p_{name}": p for name, p in zip(self.labels, probabilities.T, strict=True)}}

    def targets(self, table: ExampleTable) -> Column:
        """Each protein's labels, joined by `;`; may be empty."""
        return self._joined(table.labels)

    def _joined(self, chosen: np.ndarray) -> list[str]:
        """The names of the classes that are not 0 in each row of [n, C]."""
        return [LIST_JOINER.join(label for label, is_in in zip(self.labels, row, strict=True) if is_in)
                for row in chosen]  # fmt: skip


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logits)), in a form that overflows nowhere."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits)))
