"""A number per protein."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from esm_neuron.config import ModelConfig, TaskConfig, require
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.labels import Numbers
from esm_neuron.metrics import Scores, regression_metrics
from esm_neuron.metrics.calibration import COVERAGE, Calibration, coverage_scores, kept_scores
from esm_neuron.tasks.base import Column, PooledTask, Predictions, combined, record_mean, weighted
from esm_neuron.tasks.baselines import Baseline, value_baselines
from esm_neuron.tasks.view import View, lengths, worst

if TYPE_CHECKING:
    from torch import Tensor


class Regression(PooledTask):
    """A number per protein; the loss is the squared error in units of the training values' standard deviation.

    Targets and predictions are in that unit, from the training mean: float32 would lose the digits of values whose mean
    is large against their spread. Metrics and outputs are in the values' own, and so are the predictions of a saved
    model in transformers: mean and sd are part of its configuration.
    """

    summary = "a number per protein"
    settings = ("target_mean", "target_sd")
    label_kind = Numbers
    problem_type = "regression"
    metric = "spearman"
    averages = True
    covers = True
    compared = ("spearman", "pearson")

    def __init__(self, cfg: TaskConfig, labels: Sequence[str]) -> None:
        super().__init__(cfg, labels)
        require(
            cfg.target_mean is not None and cfg.target_sd is not None,
            "task.target_mean and task.target_sd are not known; they are taken from the training proteins, or given",
        )
        self._mean, self._sd = float(cfg.target_mean or 0.0), float(cfg.target_sd or 1.0)

    @classmethod
    def in_transformers(cls, model: ModelConfig) -> bool:
        return False  # transformers does not scale values

    def is_plain(self, model: ModelConfig) -> bool:
        return super().in_transformers(model) and (self._mean, self._sd) == (0.0, 1.0)

    def _output_config(self) -> dict[str, Any]:
        scale = {"target_mean": self._mean, "target_sd": self._sd}
        return {"id2label": {0: "value"}, "problem_type": self.problem_type, **scale}

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Return the protein's standardised value, float32; 0 with weight 0 without labels (prediction)."""
        if not len(table.labels):
            return Target(table.sequence(example), np.asarray(0, np.float32), np.asarray(0, np.float32))
        value = (float(table.labels[table.record[example]]) - self._mean) / self._sd
        return Target(table.sequence(example), np.asarray(value, np.float32), table.weight[example])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the squared errors, in units of the training values' standard deviation."""
        return weighted((logits.float().squeeze(-1) - batch.labels).square(), batch)

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        return (logits.float().squeeze(-1),)

    def metrics(
        self, table: ExampleTable, predictions: Predictions, intervals: bool = False, units: np.ndarray | None = None
    ) -> Scores:
        """Return `regression_metrics`; a record's value is the mean over its windows, and loss is as in training."""
        return regression_metrics(self._values(table, predictions), table.labels, self._sd, intervals, units)

    def averaged(self, each: Sequence[Predictions]) -> Predictions:
        return combined(each, lambda values: values.mean(axis=0))

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        return {"value": self._values(table, predictions)}

    def _values(self, table: ExampleTable, predictions: Predictions) -> np.ndarray:
        """Return float64 [records] in the values' own unit."""
        return record_mean(table, predictions[0]) * self._sd + self._mean

    def calibrate(self, table: ExampleTable, predictions: Predictions) -> Calibration:
        """Return absolute errors, for `covering`."""
        return Calibration(len(table.ids), scores=kept_scores(self._errors(table, predictions)))

    def covering(self, table: ExampleTable, predictions: Predictions, coverage: float) -> dict[str, Column]:
        """Return `low` and `high`, between which the true value is."""
        value, radius = self._values(table, predictions), self.calibration.radius(coverage)
        return {"low": value - radius, "high": value + radius}

    def coverage(
        self, table: ExampleTable, predictions: Predictions, units: np.ndarray | None = None
    ) -> dict[str, Any] | None:
        if not self.calibration.reaches(COVERAGE):
            return None
        errors, radius = self._errors(table, predictions), self.calibration.radius(COVERAGE)
        return coverage_scores(errors <= radius, np.full(len(errors), 2 * radius), units)

    def _errors(self, table: ExampleTable, predictions: Predictions) -> np.ndarray:
        """Return float64 [records], in the values' unit."""
        return np.abs(self._values(table, predictions) - table.labels)

    def targets(self, table: ExampleTable) -> Column:
        return table.labels

    def baselines(self, train: ExampleTable) -> list[Baseline]:
        return value_baselines(replace(train, labels=(train.labels - self._mean) / self._sd))

    def view(self, table: pa.Table) -> View:
        """Return errors of the values, the largest first."""
        target, predicted = (table[name].to_numpy().astype(np.float64) for name in ("target", "value"))
        error = predicted - target

        def describe(i: int) -> tuple[str, str, str]:
            return f"{target[i]:.4g}", f"{predicted[i]:.4g}", f"{error[i]:+.4g}"

        return View(
            residues=lengths(table),
            error=np.abs(error),
            weight=np.ones(len(error)),
            error_name="mean absolute error",
            worst=worst(table, np.abs(error), describe),
            values=(target, predicted),
        )
