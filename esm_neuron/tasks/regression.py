"""A number a protein."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from esm_neuron.config import TaskConfig, require
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.labels import Numbers
from esm_neuron.metrics import Value, regression_metrics
from esm_neuron.tasks.base import Column, PooledTask, Predictions, record_mean


class Regression(PooledTask):
    """A number a protein; the loss is the squared error in units of the training values' standard deviation.

    The model answers in the values' own unit: mean and sd are part of its configuration.
    """

    metric = "spearman"
    label_kind = Numbers

    def __init__(self, cfg: TaskConfig, labels: Sequence[str]) -> None:
        super().__init__(cfg, labels)
        require(
            cfg.target_mean is not None and cfg.target_sd is not None,
            "task.target_mean and task.target_sd are not known; they are taken from the training rows, or given",
        )
        self._mean, self._sd = float(cfg.target_mean or 0.0), float(cfg.target_sd or 1.0)

    def _answered(self) -> dict[str, Any]:
        scale = {"target_mean": self._mean, "target_sd": self._sd}
        return {"id2label": {0: "value"}, "problem_type": "regression", **scale}

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """The protein's value, float32; 0 with weight 0 where the table has no labels (prediction)."""
        if not len(table.labels):
            return Target(table.sequence(example), np.asarray(0, np.float32), np.asarray(0, np.float32))
        value = np.asarray(table.labels[table.record[example]], np.float32)
        return Target(table.sequence(example), value, table.weight[example])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Task.loss`."""
        errors = (logits.float().squeeze(-1) - batch.labels) / self._sd
        return (errors.square() * batch.weights).sum(), batch.weights.sum()

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Values [R, S]."""
        return (logits.float().squeeze(-1),)

    def metrics(self, table: ExampleTable, predictions: Predictions, intervals: bool = False) -> dict[str, Value]:
        """See `regression_figures`; a record's value is the mean over its windows, and loss is as it is trained."""
        return regression_metrics(record_mean(table, predictions[0]), table.labels, self._sd, intervals)

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """value: the mean over windows."""
        return {"value": record_mean(table, predictions[0])}

    def targets(self, table: ExampleTable) -> Column:
        """Each protein's value."""
        return table.labels
