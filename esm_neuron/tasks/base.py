"""What the loop, the loader, the evaluation and the prediction ask of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor
from transformers import EsmConfig, PreTrainedModel

from esm_neuron.config import ModelConfig, TaskConfig
from esm_neuron.data.batch import Batch, ExampleTable, Target
from esm_neuron.metrics import Value

Answers = Sequence[np.ndarray]
"""What `evaluate.collect` found for every example of a table, in the table's order: arrays [examples, ...], or
[tokens of the table, ...] for a task that answers each token."""
Column = np.ndarray | list[str] | list[np.ndarray]
"""A value a record: numbers [records], texts, or an array a record."""


class Task(Protocol):
    """One way of learning from proteins; `tasks.TASKS` holds them by name."""

    metric: str
    """The figure of `figures` that chooses the best checkpoint."""
    greater_is_better: bool
    needs_labels: bool
    """Whether a source must have a label column."""
    per_token: bool
    """Whether targets are one a token or one a sequence."""
    answers_per_token: bool
    """Whether `answers` are one a token [R, L, ...] or one a segment [R, S, ...]."""

    def configure(self, config: EsmConfig, model: ModelConfig) -> EsmConfig:
        """The configuration of the task's model, from that of the pretrained one."""
        ...

    def build(self, config: EsmConfig) -> PreTrainedModel:
        """The task's model; called under the meta device, so it has shapes and no values."""
        ...

    def head(self, config: EsmConfig) -> tuple[str, ...]:
        """Names of the modules that a pretrained ESM-2 does not have: drawn anew and always trained."""
        ...

    def target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """See `data.batch.TargetMaker`."""
        ...

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of weighted losses, sum of weights), scalars: sums, so that passes and ranks add up exactly."""
        ...

    def answers(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """What an evaluation keeps of a batch, float32 [R, S, ...] or [R, L, ...] a tensor, on the device."""
        ...

    def figures(self, table: ExampleTable, answers: Answers, intervals: bool = False) -> dict[str, Value]:
        """How good the answers to a table with labels are; with `intervals` also 95 % bootstrap intervals."""
        ...

    def outputs(self, table: ExampleTable, answers: Answers) -> dict[str, Column]:
        """What is told of each record of a table: column -> a value a record, in the order of `table.ids`."""
        ...

    def truth(self, table: ExampleTable) -> Column | None:
        """What a table's labels say of each record, in the words of `outputs`; None for a task without labels."""
        ...


def record_mean(table: ExampleTable, values: np.ndarray) -> np.ndarray:
    """float64 [records, ...]: the mean of `values` [examples, ...] over the windows of each record."""
    # the window weights are float32 and sum to 1 only nearly
    total = np.bincount(table.record, table.weight.astype(np.float64), len(table.ids))
    share = table.weight / total[table.record]
    mean = np.zeros((len(table.ids), *values.shape[1:]))
    np.add.at(mean, table.record, values * share.reshape(-1, *[1] * (values.ndim - 1)))
    return mean


def weights_of(cfg: TaskConfig, labels: Sequence[str]) -> np.ndarray:
    """float32 [classes]: the class weights of a resolved task, 1 where it has none."""
    if isinstance(cfg.class_weights, dict):
        return np.array([cfg.class_weights[label] for label in labels], np.float32)
    return np.ones(len(labels), np.float32)
