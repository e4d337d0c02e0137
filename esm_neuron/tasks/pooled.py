"""What tasks with one answer a protein share: the encoder, a pooling and a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import EsmConfig, PreTrainedModel

from esm_neuron.config import ModelConfig, TaskConfig
from esm_neuron.model import (
    PackedForPooledClassification,
    PackedForSequenceClassification,
    PooledEsmConfig,
    head_names,
)


class PooledTask:
    """One vector a protein, and a head on it; subclasses say what is answered and how it is learnt."""

    greater_is_better = True
    needs_labels = True
    per_token = False
    answers_per_token = False

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
