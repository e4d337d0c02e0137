"""Masked language modeling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from esm_neuron.config import TaskConfig
from esm_neuron.config.deferred import module
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.labels import Labels, Regions
from esm_neuron.data.tokenizer import AMINO_ACIDS, MASK, VOCABULARY
from esm_neuron.metrics import Scores, masked_lm_metrics
from esm_neuron.tasks.base import Column, Predictions, Task, weighted
from esm_neuron.tasks.baselines import Baseline, unigram_baseline
from esm_neuron.tasks.view import View, lengths, worst

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    from esm_neuron.compat import EsmConfig, PreTrainedModel
    from esm_neuron.models import esm2
else:
    torch, F, esm2 = module("torch"), module("torch.nn.functional"), module("esm_neuron.models.esm2")


class MaskedLM(Task):
    """Residues hidden from the model, predicted from the rest; BERT's recipe (arXiv:1810.04805), as in ESM-2.

    Of the 20 amino acids, `mask_probability` (or its region's share in `mask_rates`) are targets; X and other letters
    are context alone. In training 80 % of
    the targets are shown as <mask>, 10 % as a random amino acid, 10 % unchanged. In evaluation every target is a
    <mask>: of one that the model can see, its letter says much that nothing was learned for. Every hidden residue
    counts once; where windows overlap each of them hides its own.
    """

    summary = "masked language modeling"
    unit = "hidden residues"
    settings = ("mask_probability", "mask_rates")
    compared = ("perplexity",)
    per_token = True
    keeps_lm_head = True
    hub_task = "fill-mask"
    auto_class = "AutoModelForMaskedLM"
    peft_task = None

    def __init__(self, cfg: TaskConfig, labels: Sequence[str] = ()) -> None:
        super().__init__(cfg, labels)
        self.needs_labels = cfg.mask_rates is not None
        self._rates = np.array([*(cfg.mask_rates or {}).values(), 0.0])  # the last: of a residue without a region, -1

    @classmethod
    def labels_of(cls, cfg: TaskConfig) -> type[Labels] | None:
        return None if cfg.mask_rates is None else Regions

    def build(self, config: EsmConfig) -> PreTrainedModel:
        return esm2.PackedForMaskedLM(config)

    @classmethod
    def head_bytes(cls, hidden: int, outputs: int, number: int) -> int:
        """Return the bytes per token of the LM head's two layers, its outputs and float32 copies of them."""
        return (2 * number + 2 * 4) * hidden + (number + 2 * 4) * len(VOCABULARY)

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Return the original token ids, int64 [n], with weight 1 at the chosen residues."""
        original = table.sequence(example)
        chosen = self._chosen(table, example, rng)
        # As in BERT: of the chosen residues 80 % are masked, 10 % become a random amino acid and 10 % stay as they are.
        fate = rng.random(len(original))
        shown = np.where(chosen & (fate < 0.8), np.uint8(MASK), original)
        random = np.asarray(AMINO_ACIDS, np.uint8)[rng.integers(0, len(AMINO_ACIDS), len(original))]
        shown = np.where(chosen & (fate >= 0.8) & (fate < 0.9), random, shown)
        return Target(shown, original.astype(np.int64), chosen.astype(np.float32))

    def evaluation_target(self, table: ExampleTable, example: int) -> Target:
        """Return `example_target` with a <mask> in place of every target, the same ones in every evaluation."""
        original = table.sequence(example)
        chosen = self._chosen(table, example, np.random.default_rng(table.content(example)))
        shown = np.where(chosen, np.uint8(MASK), original)
        return Target(shown, original.astype(np.int64), chosen.astype(np.float32))

    def _chosen(self, table: ExampleTable, example: int, rng: np.random.Generator) -> np.ndarray:
        """Return which tokens are targets, bool [n]."""
        tokens = table.sequence(example)
        rates = self.rates(table, slice(table.offsets[example], table.offsets[example + 1]))
        return (rng.random(len(tokens)) < rates) & np.isin(tokens, AMINO_ACIDS)

    def rates(self, table: ExampleTable, part: slice | np.ndarray) -> np.ndarray | float:
        """Return which share of each of some tokens are targets, float [tokens] or one number."""
        return self._rates[table.labels[part]] if self.needs_labels else self.cfg.mask_probability

    def hidden(self, table: ExampleTable) -> np.ndarray:
        """Return which tokens of a table an evaluation hides, bool [tokens]."""
        return np.concatenate([self.evaluation_target(table, example).weight > 0 for example in range(len(table))])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the hidden residues, in nats."""
        return weighted(self._losses(logits, batch), batch)

    @staticmethod
    def _losses(logits: Tensor, batch: Batch) -> Tensor:
        flat = logits.float().flatten(0, 1)
        return F.cross_entropy(flat, batch.labels.flatten(), reduction="none").view_as(batch.weights)

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Return per segment [R, S]: summed loss, number of targets, how many of these were predicted right."""
        right = logits.argmax(-1) == batch.labels
        slots = torch.arange(batch.max_segments, device=batch.segment_ids.device).view(1, -1, 1)
        # A product with the membership sums over segments, in shapes that do not depend on the data.
        member = (batch.segment_ids.unsqueeze(1) == slots).float()
        per_token = (self._losses(logits, batch) * batch.weights, batch.weights, right * batch.weights)
        return tuple((member @ values.unsqueeze(-1)).squeeze(-1) for values in per_token)

    def metrics(
        self, table: ExampleTable, predictions: Predictions, intervals: bool = False, units: np.ndarray | None = None
    ) -> Scores:
        return masked_lm_metrics(self._sums(table, predictions), intervals, units)

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return `hidden` (residues), `loss` (nats per residue) and `perplexity`; NaN where none was hidden."""
        loss, hidden, _ = self._sums(table, predictions).T
        with np.errstate(invalid="ignore"):
            mean = loss / hidden
        return {"hidden": hidden.astype(np.int64), "loss": mean, "perplexity": np.exp(mean)}

    def baselines(self, train: ExampleTable) -> list[Baseline]:
        return [unigram_baseline(train, self.hidden, self.rates if self.needs_labels else None)]

    def view(self, table: pa.Table) -> View:
        """Return perplexities, the largest first."""
        hidden, loss = (table[name].to_numpy().astype(np.float64) for name in ("hidden", "loss"))
        mean = np.where(hidden > 0, loss, 0.0)
        return View(
            residues=lengths(table),
            error=mean * hidden,
            weight=hidden,
            error_name="cross entropy of hidden residues (nats)",
            worst=worst(table, mean, lambda i: (f"{hidden[i]:.0f} hidden", "", f"perplexity {np.exp(mean[i]):.3g}")),
            spread=np.exp(mean[hidden > 0]),
        )

    @staticmethod
    def _sums(table: ExampleTable, predictions: Predictions) -> np.ndarray:
        """Return float64 [records, 3]: loss, hidden residues, right predictions."""
        columns = [np.bincount(table.record, values.astype(np.float64), len(table.ids)) for values in predictions]
        return np.stack(columns, axis=1)
