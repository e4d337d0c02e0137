"""What is learnt. A task is a class here and a row in `TASKS`: its model, its targets, its loss and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EsmConfig, PreTrainedModel

from esm_neuron.config import ModelConfig, TaskConfig
from esm_neuron.data.batch import Batch, ExampleTable, Target
from esm_neuron.data.tokenizer import AMINO_ACIDS, CLS, EOS, MASK
from esm_neuron.metrics import ClassificationState, MaskedLMState, MetricState
from esm_neuron.model import (
    PackedForMaskedLM,
    PackedForPooledClassification,
    PackedForSequenceClassification,
    PooledEsmConfig,
    head_name,
)


class Task(Protocol):
    """What the loop, the loader and the model builder ask of a task."""

    metric: str
    """The figure of `metrics().compute()` that chooses the best checkpoint."""
    greater_is_better: bool
    needs_labels: bool
    """Whether a source must have a label column."""
    per_token: bool
    """Whether targets are one a token or one a sequence."""

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
        """What an evaluation keeps of a batch, float32 [R, S, ...] a tensor, on the device."""
        ...

    def metrics(self) -> MetricState:
        """An empty state for one evaluation."""
        ...

    def observe(self, state: Any, table: ExampleTable, members: np.ndarray, answers: Sequence[np.ndarray]) -> None:
        """Add one batch's `answers` to `state`; `members` int64 [R, S] says which example each segment is."""
        ...


class SequenceClassification:
    """One class a protein, by softmax; the loss is cross entropy in nats."""

    metric = "mcc"
    greater_is_better = True
    needs_labels = True
    per_token = False

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
        return Target(table.sequence(example), np.asarray(label, np.int64), np.asarray(known, np.float32))

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Task.loss`."""
        flat = logits.float().flatten(0, 1)
        losses = F.cross_entropy(flat, batch.labels.flatten(), reduction="none", label_smoothing=self._smoothing)
        weights = batch.weights.flatten()
        return (losses * weights).sum(), weights.sum()

    def answers(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Logits [R, S, classes]."""
        return (logits.float(),)

    def metrics(self) -> MetricState:
        """See `Task.metrics`."""
        return ClassificationState(len(self.labels))

    def observe(
        self, state: ClassificationState, table: ExampleTable, members: np.ndarray, answers: Sequence[np.ndarray]
    ) -> None:
        """See `Task.observe`."""
        used = members >= 0
        example = members[used]
        record = table.record[example]
        state.update(record, table.weight[example], answers[0][used], table.labels[record])


class MaskedLM:
    """Residues hidden from the model, predicted from the rest; BERT's recipe (arXiv:1810.04805), as in ESM-2.

    Of the residues, `mask_probability` are targets; 80 % of these are shown as <mask>, 10 % as a random standard amino
    acid, 10 % unchanged. <cls> and <eos> are never targets.
    """

    metric = "loss"
    greater_is_better = False
    needs_labels = False
    per_token = True

    def __init__(self, cfg: TaskConfig, labels: Sequence[str]) -> None:
        self._probability = cfg.mask_probability

    def configure(self, config: EsmConfig, model: ModelConfig) -> EsmConfig:
        """The pretrained configuration as it is."""
        return config

    def build(self, config: EsmConfig) -> PreTrainedModel:
        """See `Task.build`."""
        return PackedForMaskedLM(config)

    def head(self, config: EsmConfig) -> tuple[str, ...]:
        """None: the LM head is ESM-2's own."""
        return ()

    def target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """The original token ids, int64 [n], with weight 1 at the chosen residues."""
        original = table.sequence(example)
        chosen = (rng.random(len(original)) < self._probability) & (original != CLS) & (original != EOS)
        fate = rng.random(len(original))
        shown = np.where(chosen & (fate < 0.8), np.uint8(MASK), original)
        random = np.asarray(AMINO_ACIDS, np.uint8)[rng.integers(0, len(AMINO_ACIDS), len(original))]
        shown = np.where(chosen & (fate >= 0.8) & (fate < 0.9), random, shown)
        return Target(shown, original.astype(np.int64), chosen.astype(np.float32))

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Task.loss`."""
        return (self._losses(logits, batch) * batch.weights).sum(), batch.weights.sum()

    @staticmethod
    def _losses(logits: Tensor, batch: Batch) -> Tensor:
        flat = logits.float().flatten(0, 1)
        return F.cross_entropy(flat, batch.labels.flatten(), reduction="none").view_as(batch.weights)

    def answers(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Per segment [R, S]: summed loss, number of targets, number of these answered right."""
        right = logits.argmax(-1) == batch.labels
        slots = torch.arange(batch.max_segments, device=batch.segment_ids.device).view(1, -1, 1)
        member = (batch.segment_ids.unsqueeze(1) == slots).float()
        per_token = (self._losses(logits, batch) * batch.weights, batch.weights, right * batch.weights)
        return tuple((member @ values.unsqueeze(-1)).squeeze(-1) for values in per_token)

    def metrics(self) -> MetricState:
        """See `Task.metrics`."""
        return MaskedLMState()

    def observe(
        self, state: MaskedLMState, table: ExampleTable, members: np.ndarray, answers: Sequence[np.ndarray]
    ) -> None:
        """See `Task.observe`."""
        used = members >= 0
        example = members[used]
        state.update(example, table.record[example], *(a[used] for a in answers))


TASKS: dict[str, type[SequenceClassification] | type[MaskedLM]] = {
    "sequence_classification": SequenceClassification,
    "masked_lm": MaskedLM,
}
"""Name in the config -> task."""


def create_task(cfg: TaskConfig, labels: Sequence[str]) -> Task:
    """The task that `cfg.name` names, for the classes `labels` (empty where it has none)."""
    return TASKS[cfg.name](cfg, labels)
