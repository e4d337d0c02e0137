"""One class a residue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from transformers import EsmConfig, PreTrainedModel

from esm_neuron.config import ModelConfig, TaskConfig
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.labels import ResidueLabels
from esm_neuron.data.records import RESIDUE_JOINER
from esm_neuron.metrics import Value, classification_metrics
from esm_neuron.metrics.classification import log_softmax
from esm_neuron.models.esm2 import PackedForTokenClassification
from esm_neuron.tasks.base import Column, Predictions, weights_of
from esm_neuron.tasks.losses import softmax_losses

NOT_ANSWERED = "-"
"""Stands for a residue that was cut off and so never shown to the model."""


class ResidueClassification:
    """One class a residue, by softmax; the loss is cross entropy in nats over the residues with a label.

    In training a residue counts in every window that shows it; in figures and outputs it is one residue, with the mean
    of its windows' probabilities.
    """

    metric = "mcc"
    greater_is_better = True
    label_kind = ResidueLabels
    per_token = True
    predictions_per_token = True

    def __init__(self, cfg: TaskConfig, labels: Sequence[str]) -> None:
        self.cfg = cfg
        self.labels = tuple(labels)
        # one more, for UNKNOWN: index -1 is the last
        self._weights = np.append(weights_of(cfg, labels), np.float32(0))

    def configure(self, config: EsmConfig, model: ModelConfig) -> EsmConfig:
        """Add the classes; the model is transformers' own EsmForTokenClassification."""
        names = {"id2label": dict(enumerate(self.labels)), "label2id": {n: i for i, n in enumerate(self.labels)}}
        configured: EsmConfig = EsmConfig.from_dict(config.to_dict() | names)
        return configured

    def build(self, config: EsmConfig) -> PreTrainedModel:
        """See `Task.build`."""
        return PackedForTokenClassification(config)

    def head(self, config: EsmConfig) -> tuple[str, ...]:
        """See `Task.head`."""
        return ("classifier",)

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Class indices int64 [n] weighed by their class; 0 with weight 0 at specials and where nothing is known."""
        tokens = table.sequence(example)
        if not len(table.labels):
            return Target(tokens, np.zeros(len(tokens), np.int64), np.zeros(len(tokens), np.float32))
        labels = table.labels[table.offsets[example] : table.offsets[example + 1]].astype(np.int64)
        return Target(tokens, np.maximum(labels, 0), self._weights[labels])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Task.loss`."""
        losses = softmax_losses(logits, batch.labels, self.cfg.label_smoothing, self.cfg.focal_gamma)
        return (losses * batch.weights).sum(), batch.weights.sum()

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Logits [R, L, classes]."""
        return (logits.float(),)

    def metrics(self, table: ExampleTable, predictions: Predictions, intervals: bool = False) -> dict[str, Value]:
        """See `classification_figures`: over residues with a label, intervals over proteins."""
        log_probabilities = log_softmax(predictions[0])
        slot, bounds = table.residue_slots()
        label = residue_labels(table, slot, bounds)
        own = -np.take_along_axis(log_probabilities, np.maximum(table.labels, 0).astype(np.int64)[:, None], axis=1)
        known = label >= 0
        probabilities = residue_mean(slot, bounds, np.exp(log_probabilities))[known]
        loss = residue_mean(slot, bounds, own)[known, 0]
        protein = np.repeat(np.arange(len(table.ids)), np.diff(bounds))[known]
        return classification_metrics(probabilities, label[known], loss, self.labels, intervals, protein)

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """`labels` (a character a residue; with longer names joined by `,`) and as `p_<class>` each class's
        probabilities, an array a record; `-` and NaN for residues that were cut off."""
        slot, bounds = table.residue_slots()
        probabilities = residue_mean(slot, bounds, np.exp(log_softmax(predictions[0])))
        names = np.array([*self.labels, NOT_ANSWERED], dtype=object)
        said = names[np.where(np.isnan(probabilities[:, 0]), -1, probabilities.argmax(1))]
        joiner = "" if all(len(name) == 1 for name in self.labels) else RESIDUE_JOINER
        columns: dict[str, Column] = {"labels": [joiner.join(part) for part in np.split(said, bounds[1:-1])]}
        return {
            **columns,
            **{f"p_{name}": np.split(p, bounds[1:-1]) for name, p in zip(self.labels, probabilities.T, strict=True)},
        }

    def targets(self, table: ExampleTable) -> Column:
        """The class names of each record's residues; None where nothing is known or the residue was cut off."""
        slot, bounds = table.residue_slots()
        names = np.array([*self.labels, None], dtype=object)
        return np.split(names[residue_labels(table, slot, bounds)], bounds[1:-1])


def residue_labels(table: ExampleTable, slot: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """int64 [residues of all records]: class index, -1 where nothing is known; `slot` and `bounds` as below."""
    shown = slot >= 0
    label = np.full(bounds[-1], -1)
    label[slot[shown]] = table.labels[shown]
    return label


def residue_mean(slot: np.ndarray, bounds: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float64 [residues of all records, C]: the mean of `values` [tokens, C] over the windows that show a residue.

    NaN where none does. `slot` and `bounds` are those of `ExampleTable.residue_slots`.
    """
    shown, size = slot >= 0, int(bounds[-1])
    times = np.bincount(slot[shown], minlength=size)
    columns = [np.bincount(slot[shown], column, size) for column in values[shown].T]
    with np.errstate(invalid="ignore"):
        return np.stack(columns, axis=1) / times[:, None]
