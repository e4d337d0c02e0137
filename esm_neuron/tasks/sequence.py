"""One class a protein."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn import functional as F
from transformers import EsmConfig, PreTrainedModel

from esm_neuron.config import ModelConfig, TaskConfig
from esm_neuron.data.batch import Batch, ExampleTable, Target
from esm_neuron.metrics import Value, classification_figures
from esm_neuron.metrics.classification import log_softmax
from esm_neuron.model import (
    PackedForPooledClassification,
    PackedForSequenceClassification,
    PooledEsmConfig,
    head_name,
)
from esm_neuron.tasks.base import Answers, Column, record_mean


class SequenceClassification:
    """One class a protein, by softmax; the loss is cross entropy in nats."""

    metric = "mcc"
    greater_is_better = True
    needs_labels = True
    per_token = False
    answers_per_token = False

    def __init__(self, cfg: TaskConfig, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._smoothing = cfg.label_smoothing

    def configure(self, config: EsmConfig, model: ModelConfig) -> EsmConfig:
        """Add the classes and the pooling; a pooling unknown to transformers makes it a type of its own."""
        values = config.to_dict()
        values.update(pooling=model.pooling, id2label=dict(enumerate(self.labels)), problem_type=None)
        values.update(label2id={label: i for i, label in enumerate(self.labels)})
        values.pop("model_type", None)
        kind = EsmConfig if model.pooling == "cls" else PooledEsmConfig
        configured: EsmConfig = kind.from_dict(values)
        return configured

    def build(self, config: EsmConfig) -> PreTrainedModel:
        """See `Task.build`."""
        kind = PackedForPooledClassification if isinstance(config, PooledEsmConfig) else PackedForSequenceClassification
        return kind(config)

    def head(self, config: EsmConfig) -> tuple[str, ...]:
        """See `Task.head`."""
        return (head_name(config),)

    def target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """The protein's class index, int64; 0 with weight 0 where the table has no labels (prediction)."""
        known = len(table.labels) > 0
        label = table.labels[table.record[example]] if known else 0
        return Target(table.sequence(example), np.asarray(label, np.int64), known * table.weight[example])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Task.loss`."""
        flat = logits.float().flatten(0, 1)
        losses = F.cross_entropy(flat, batch.labels.flatten(), reduction="none", label_smoothing=self._smoothing)
        weights = batch.weights.flatten()
        return (losses * weights).sum(), weights.sum()

    def answers(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Logits [R, S, classes]."""
        return (logits.float(),)

    def figures(self, table: ExampleTable, answers: Answers, intervals: bool = False) -> dict[str, Value]:
        """See `classification_figures`; the loss of a record is the mean over its windows, without smoothing."""
        log_probabilities = log_softmax(answers[0])
        loss = -log_probabilities[np.arange(len(table)), table.labels[table.record]]
        probabilities = record_mean(table, np.exp(log_probabilities))
        return classification_figures(probabilities, table.labels, record_mean(table, loss), self.labels, intervals)

    def outputs(self, table: ExampleTable, answers: Answers) -> dict[str, Column]:
        """`label`, and as `p_<class>` the probability of each class: the mean over windows."""
        probabilities = record_mean(table, np.exp(log_softmax(answers[0])))
        columns: dict[str, Column] = {"label": [self.labels[i] for i in probabilities.argmax(1)]}
        return {**columns, **{f"p_{name}": p for name, p in zip(self.labels, probabilities.T, strict=True)}}
