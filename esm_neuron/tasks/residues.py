"""One class per residue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from esm_neuron.config import ModelConfig
from esm_neuron.config.deferred import module
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.labels import ResidueLabels
from esm_neuron.data.records import RESIDUE_JOINER
from esm_neuron.metrics import Scores, classification_metrics
from esm_neuron.metrics.calibration import Calibration, best_threshold, fit_temperature, mcc
from esm_neuron.metrics.classification import decided
from esm_neuron.models.shapes import EsmShape
from esm_neuron.tasks.base import (
    CLASS_SETTINGS,
    Column,
    Predictions,
    Task,
    by_class,
    combined,
    cross_entropy,
    log_softmax,
    mean_softmax,
    weighted,
)
from esm_neuron.tasks.baselines import Baseline, residue_baselines
from esm_neuron.tasks.losses import softmax_losses
from esm_neuron.tasks.view import Confidence, Confusion, View, class_indices, curves, lengths, worst

if TYPE_CHECKING:
    from torch import Tensor

    from esm_neuron.compat import EsmConfig, PreTrainedModel
    from esm_neuron.models import esm2
else:
    esm2 = module("esm_neuron.models.esm2")

NO_PREDICTION = "-"  # stands for a residue that was cut off and so never shown to the model


class ResidueClassification(Task):
    """One class per residue, by softmax; the loss is cross entropy in nats over the residues with a label.

    In training a residue counts in every window that shows it; in metrics and outputs it is one residue, with the mean
    of its windows' probabilities.
    """

    summary = "one class per residue"
    unit = "residues"
    settings = (*CLASS_SETTINGS, "ignore")
    label_kind = ResidueLabels
    metric = "mcc"
    greater_is_better = True
    averages = True
    compared = ("accuracy", "balanced_accuracy", "mcc", "macro_f1", "auroc", "auprc")
    per_token = True
    predictions_per_token = True
    hub_task = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    peft_task = "TOKEN_CLS"

    def configure(self, config: EsmConfig, model: ModelConfig) -> EsmConfig:
        """Add the classes; the model is transformers' own EsmForTokenClassification."""
        names = {"id2label": dict(enumerate(self.labels)), "label2id": {n: i for i, n in enumerate(self.labels)}}
        configured: EsmConfig = type(config).from_dict(config.to_dict() | names)
        return configured

    def build(self, config: EsmConfig) -> PreTrainedModel:
        return esm2.PackedForTokenClassification(config)

    def head(self, config: EsmConfig) -> tuple[str, ...]:
        return ("classifier",)

    def linear_head(self, config: EsmConfig) -> str:
        return "classifier"

    @classmethod
    def head_sizes(cls, model: ModelConfig, shape: EsmShape, outputs: int) -> list[int]:
        return [outputs * shape.hidden, outputs]

    @classmethod
    def head_bytes(cls, hidden: int, outputs: int, number: int) -> int:
        """Return the bytes per token: the layer's input, its outputs and float32 copies of them in the loss."""
        return number * hidden + (number + 3 * 4) * outputs

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Return class indices int64 [n] weighted by their class; 0 with weight 0 at specials and unknown labels."""
        tokens = table.sequence(example)
        if not len(table.labels):
            return Target(tokens, np.zeros(len(tokens), np.int64), np.zeros(len(tokens), np.float32))
        labels = table.labels[table.offsets[example] : table.offsets[example + 1]].astype(np.int64)
        return Target(tokens, np.maximum(labels, 0), self.class_weights[labels] * (labels >= 0))

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sums over residues of w_y x loss and of w_y, with class weights w."""
        return weighted(softmax_losses(logits, batch.labels, self.cfg.label_smoothing, self.cfg.focal_gamma), batch)

    def metrics(
        self, table: ExampleTable, predictions: Predictions, intervals: bool = False, units: np.ndarray | None = None
    ) -> Scores:
        """Return `classification_metrics` over residues with a label, intervals over proteins."""
        probabilities, label, protein = self._known(table, predictions)
        loss = cross_entropy(probabilities[np.arange(len(probabilities)), label])
        threshold = self.calibration.threshold
        return classification_metrics(
            probabilities, label, loss, self.labels, intervals, protein, units, threshold=threshold
        )

    def _known(self, table: ExampleTable, predictions: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return of the residues with a label: probabilities float64 [n, C], classes and proteins int64 [n] each.

        A residue counts once, however many windows show it: its probabilities are averaged.
        """
        slot, bounds = table.residue_slots()
        label = residue_labels(table, slot, bounds)
        known = label >= 0
        protein = np.repeat(np.arange(len(table.ids)), np.diff(bounds))[known]
        return self._probabilities(slot, bounds, predictions)[known], label[known], protein

    def _probabilities(self, slot: np.ndarray, bounds: np.ndarray, predictions: Predictions) -> np.ndarray:
        """Return float64 [residues of all records, C], see `residue_mean`."""
        return residue_mean(slot, bounds, np.exp(log_softmax(predictions[0] / self.calibration.temperature)))

    def averaged(self, each: Sequence[Predictions]) -> Predictions:
        return combined(each, mean_softmax)

    def calibrate(self, table: ExampleTable, predictions: Predictions) -> Calibration:
        """Return a temperature, and of two classes the threshold with the largest MCC."""

        def known(temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return self.read_by(Calibration(temperature=temperature))._known(table, predictions)

        def loss(temperature: float) -> float:
            probabilities, label, _ = known(temperature)
            return float(cross_entropy(probabilities[np.arange(len(label)), label]).mean())

        # residues of a protein are alike: as many facts as there are proteins
        temperature = fit_temperature(loss, len(table.ids))
        probabilities, label, protein = known(temperature)
        thresholds: tuple[float, ...] = ()
        if len(self.labels) == 2:
            thresholds = (best_threshold(probabilities[:, 1], label == 1, mcc, protein),)
        return Calibration(len(table.ids), temperature, thresholds)

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return `labels` (a character per residue; longer names joined by `,`) and as `p_<class>` each class's
        probabilities, an array per record; `-` and NaN for residues that were cut off."""
        slot, bounds = table.residue_slots()
        probabilities = self._probabilities(slot, bounds, predictions)
        names = np.array([*self.labels, NO_PREDICTION], dtype=object)
        chosen = decided(probabilities, self.calibration.threshold)
        predicted = names[np.where(np.isnan(probabilities[:, 0]), -1, chosen)]
        texts = [self._joiner.join(part) for part in np.split(predicted, bounds[1:-1])]
        return {"labels": texts, **by_class(self.labels, [np.split(p, bounds[1:-1]) for p in probabilities.T])}

    @property
    def _joiner(self) -> str:
        return "" if all(len(name) == 1 for name in self.labels) else RESIDUE_JOINER

    def _names(self, text: str) -> list[str]:
        """Return the classes of the residues of one protein, from `labels` of `outputs`."""
        return text.split(self._joiner) if self._joiner else list(text)

    def targets(self, table: ExampleTable) -> Column:
        """Return the class names of each record's residues; None where unknown or cut off."""
        slot, bounds = table.residue_slots()
        names = np.array([*self.labels, None], dtype=object)
        return np.split(names[residue_labels(table, slot, bounds)], bounds[1:-1])

    def baselines(self, train: ExampleTable) -> list[Baseline]:
        return residue_baselines(train, self.class_weights)

    def view(self, table: pa.Table) -> View:
        """Return wrong residues; the proteins with the largest share of them come first."""
        residues = lengths(table)
        columns = [table[f"p_{label}"].combine_chunks() for label in self.labels]
        flat = [column.flatten().to_numpy(zero_copy_only=False) for column in columns]
        probabilities = np.stack(flat, axis=1).astype(np.float64)
        names = table["target"].combine_chunks().flatten()
        if min(residues, default=0) < 0 or residues.sum() != len(probabilities):
            raise ValueError("the lists of predictions are not as long as the proteins")
        protein = np.repeat(np.arange(len(residues)), residues)
        known = ~np.isnan(probabilities[:, 0]) & names.is_valid().to_numpy(zero_copy_only=False)
        probabilities, protein = probabilities[known], protein[known]
        answered = pa.array([name for text in table["labels"].to_pylist() for name in self._names(text)], pa.string())
        target, predicted = (class_indices(self.labels, each.filter(pa.array(known))) for each in (names, answered))
        wrong = np.bincount(protein, predicted != target, len(residues))
        labelled = np.bincount(protein, minlength=len(residues)).astype(float)
        share = wrong / np.maximum(labelled, 1)

        def describe(i: int) -> tuple[str, str, str]:
            return f"{labelled[i]:.0f} residues", f"{wrong[i]:.0f} wrong", f"{share[i]:.1%}"

        return View(
            residues=residues,
            error=wrong,
            weight=labelled,
            error_name="share of wrong residues",
            worst=worst(table, share, describe),
            curves=curves(self.labels, target[:, None] == np.arange(len(self.labels)), probabilities),
            confusion=Confusion.of(target, predicted, len(self.labels)),
            confidence=Confidence(probabilities[np.arange(len(predicted)), predicted], predicted == target, protein),
        )


def residue_labels(table: ExampleTable, slot: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return int64 [residues of all records]: class index, -1 where unknown; `slot` and `bounds` as below."""
    shown = slot >= 0
    label = np.full(bounds[-1], -1)
    label[slot[shown]] = table.labels[shown]
    return label


def residue_mean(slot: np.ndarray, bounds: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return float64 [residues of all records, C]: the mean of `values` [tokens, C] over the windows with a residue.

    NaN where none does. `slot` and `bounds` are those of `ExampleTable.residue_slots`.
    """
    shown, size = slot >= 0, int(bounds[-1])
    times = np.bincount(slot[shown], minlength=size)
    columns = [np.bincount(slot[shown], column, size) for column in values[shown].T]
    with np.errstate(invalid="ignore"):
        return np.stack(columns, axis=1) / times[:, None]
