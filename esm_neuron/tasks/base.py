"""What the loop, the loader, the evaluation and the prediction ask of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor
from transformers import EsmConfig, PreTrainedModel

from esm_neuron.config import ModelConfig, TaskConfig
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.labels import Labels
from esm_neuron.metrics import Value
from esm_neuron.models.esm2 import (
    PackedForPooledClassification,
    PackedForSequenceClassification,
    PooledEsmConfig,
    head_names,
)

Predictions = Sequence[np.ndarray]
"""What `evaluate.collect` found for every example of a table, in the table's order: arrays [examples, ...], or
[tokens of the table, ...] for a task that answers each token."""
Column = np.ndarray | list[str] | list[np.ndarray]
"""A value a record: numbers [records], texts, or an array a record."""


class Task(Protocol):
    """One way of learning from proteins; `tasks.TASKS` holds them by name."""

    metric: str
    """The figure of `figures` that chooses the best checkpoint."""
    greater_is_better: bool
    label_kind: ClassVar[type[Labels] | None]
    """Reads the label column; None: the task needs no labels."""
    per_token: bool
    """Whether targets are one a token or one a sequence."""
    predictions_per_token: bool
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

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """See `data.batch.TargetMaker`."""
        ...

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum of weighted losses, sum of weights), scalars: sums, so that passes and ranks add up exactly."""
        ...

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """What an evaluation keeps of a batch, float32 [R, S, ...] or [R, L, ...] a tensor, on the device."""
        ...

    def metrics(self, table: ExampleTable, predictions: Predictions, intervals: bool = False) -> dict[str, Value]:
        """How good the answers to a table with labels are; with `intervals` also 95 % bootstrap intervals."""
        ...

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """What is told of each record of a table: column -> a value a record, in the order of `table.ids`."""
        ...

    def targets(self, table: ExampleTable) -> Column | None:
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


class PooledTask:
    """One vector a protein, and a head on it; subclasses say what is answered and how it is learnt."""

    greater_is_better = True
    label_kind: ClassVar[type[Labels]] = Labels
    per_token = False
    predictions_per_token = False

    def __init__(self, cfg: TaskConfig, labels: Sequence[str]) -> None:
        self.cfg = cfg
        self.labels = tuple(labels)

    def configure(self, config: EsmConfig, model: ModelConfig) -> EsmConfig:
        """Add the answers and the pooling; what transformers would compute otherwise becomes a type of its own."""
        values = config.to_dict() | {"pooling": model.pooling} | self._answered()
        values.update(label2id={label: i for i, label in values["id2label"].items()})
        values.pop("model_type", None)
        plain = model.pooling == "cls" and values["problem_type"] != "regression"
        configured: EsmConfig = (EsmConfig if plain else PooledEsmConfig).from_dict(values)
        return configured

    def _answered(self) -> dict[str, Any]:
        """Entries of the model's configuration: `id2label`, `problem_type`."""
        return {"id2label": dict(enumerate(self.labels)), "problem_type": "single_label_classification"}

    def build(self, config: EsmConfig) -> PreTrainedModel:
        """See `Task.build`."""
        kind = PackedForPooledClassification if isinstance(config, PooledEsmConfig) else PackedForSequenceClassification
        return kind(config)

    def head(self, config: EsmConfig) -> tuple[str, ...]:
        """See `Task.head`."""
        return head_names(config)
