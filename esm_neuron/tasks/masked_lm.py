"""Masked language modelling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EsmConfig, PreTrainedModel

from esm_neuron.config import ModelConfig, TaskConfig
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.tokenizer import AMINO_ACIDS, CLS, EOS, MASK
from esm_neuron.metrics import Value, masked_lm_metrics
from esm_neuron.models.esm2 import PackedForMaskedLM
from esm_neuron.tasks.base import Column, Predictions


class MaskedLM:
    """Residues hidden from the model, predicted from the rest; BERT's recipe (arXiv:1810.04805), as in ESM-2.

    Of the residues, `mask_probability` are targets; 80 % of these are shown as <mask>, 10 % as a random standard amino
    acid, 10 % unchanged. <cls> and <eos> are never targets. Every hidden residue counts once; where windows overlap
    each of them hides its own.
    """

    metric = "loss"
    greater_is_better = False
    label_kind = None
    per_token = True
    predictions_per_token = False

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

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """The original token ids, int64 [n], with weight 1 at the chosen residues."""
        original = table.sequence(example)
        chosen = (rng.random(len(original)) < self._probability) & (original != CLS) & (original != EOS)
        fate = rng.random(len(original))
        shown = np.where(chosen & (fate < 0.8), np.uint8(MASK), original)
        random = np.asarray(AMINO_ACIDS, np.uint8)[rng.integers(0, len(AMINO_ACIDS), len(original))]
        shown = np.where(chosen & (fate >= 0.8) & (fate < 0.9), random, shown)
        return Target(shown, original.astype(np.int64), chosen.astype(np.float32))

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropy in nats, see `Task.loss`."""
        return (self._losses(logits, batch) * batch.weights).sum(), batch.weights.sum()

    @staticmethod
    def _losses(logits: Tensor, batch: Batch) -> Tensor:
        flat = logits.float().flatten(0, 1)
        return F.cross_entropy(flat, batch.labels.flatten(), reduction="none").view_as(batch.weights)

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Per segment [R, S]: summed loss, number of targets, number of these answered right."""
        right = logits.argmax(-1) == batch.labels
        slots = torch.arange(batch.max_segments, device=batch.segment_ids.device).view(1, -1, 1)
        member = (batch.segment_ids.unsqueeze(1) == slots).float()
        per_token = (self._losses(logits, batch) * batch.weights, batch.weights, right * batch.weights)
        return tuple((member @ values.unsqueeze(-1)).squeeze(-1) for values in per_token)

    def metrics(self, table: ExampleTable, predictions: Predictions, intervals: bool = False) -> dict[str, Value]:
        """See `masked_lm_figures`."""
        return masked_lm_metrics(self._sums(table, predictions), intervals)

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """hidden (residues asked for), loss (nats a residue) and perplexity; NaN where none was hidden."""
        loss, hidden, _ = self._sums(table, predictions).T
        with np.errstate(invalid="ignore"):
            mean = loss / hidden
        return {"hidden": hidden.astype(np.int64), "loss": mean, "perplexity": np.exp(mean)}

    def targets(self, table: ExampleTable) -> None:
        """None: the hidden residues are the truth."""

    @staticmethod
    def _sums(table: ExampleTable, predictions: Predictions) -> np.ndarray:
        """float64 [records, 3]: loss, hidden residues and right answers."""
        columns = [np.bincount(table.record, values.astype(np.float64), len(table.ids)) for values in predictions]
        return np.stack(columns, axis=1)
