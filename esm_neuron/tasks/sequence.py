"""One class per protein."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.metrics import Scores, classification_metrics
from esm_neuron.metrics.bootstrap import MOST_CURVES
from esm_neuron.metrics.calibration import (
    COVERAGE,
    Calibration,
    best_threshold,
    coverage_scores,
    fit_temperature,
    kept_scores,
    mcc,
)
from esm_neuron.metrics.classification import decided
from esm_neuron.tasks.base import (
    CLASS_SETTINGS,
    Column,
    PooledTask,
    Predictions,
    by_class,
    combined,
    cross_entropy,
    joined,
    log_softmax,
    mean_softmax,
    pieces,
    record_mean,
    thinned,
    weighted,
)
from esm_neuron.tasks.baselines import Baseline, class_baselines
from esm_neuron.tasks.losses import softmax_losses
from esm_neuron.tasks.view import (
    Confidence,
    Confusion,
    Curve,
    View,
    class_indices,
    class_probabilities,
    curves,
    lengths,
    worst,
)

if TYPE_CHECKING:
    from torch import Tensor


class SequenceClassification(PooledTask):
    """One class per protein, by softmax; the loss is cross entropy in nats."""

    summary = "one class per protein"
    settings = CLASS_SETTINGS
    metric = "mcc"
    averages = True
    covers = True
    compared = ("accuracy", "balanced_accuracy", "mcc", "macro_f1", "auroc", "auprc")
    hub_task = "text-classification"

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Return the protein's class index, int64, weighted by its class; weight 0 without labels (prediction)."""
        if not len(table.labels):
            return super().example_target(table, example, rng)
        label = np.asarray(table.labels[table.record[example]], np.int64)
        return Target(table.sequence(example), label, self.class_weights[label] * table.weight[example])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sums of w_y x loss and of w_y, with class weights w."""
        return weighted(softmax_losses(logits, batch.labels, self.cfg.label_smoothing, self.cfg.focal_gamma), batch)

    def metrics(
        self, table: ExampleTable, predictions: Predictions, intervals: bool = False, units: np.ndarray | None = None
    ) -> Scores:
        """Return `classification_metrics`; a record's probabilities are the mean over its windows."""
        probabilities, labels = self._probabilities(table, predictions), table.labels
        loss = cross_entropy(probabilities[np.arange(len(labels)), labels])
        threshold = self.calibration.threshold
        return classification_metrics(
            probabilities, labels, loss, self.labels, intervals, units=units, threshold=threshold
        )

    def _probabilities(self, table: ExampleTable, predictions: Predictions) -> np.ndarray:
        """Return float64 [records, C]."""
        temperature = self.calibration.temperature
        return record_mean(table, predictions[0], lambda logits: np.exp(log_softmax(logits / temperature)))

    def averaged(self, each: Sequence[Predictions]) -> Predictions:
        return combined(each, mean_softmax)

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return `label`, and as `p_<class>` the probability of each class: the mean over windows."""
        probabilities = self._probabilities(table, predictions)
        predicted = [self.labels[i] for i in decided(probabilities, self.calibration.threshold)]
        return {"label": predicted, **by_class(self.labels, probabilities.T)}

    def kept(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return `outputs`; of more than MOST_CURVES classes `label` and its `probability` alone."""
        if len(self.labels) <= MOST_CURVES:
            return self.outputs(table, predictions)
        probabilities = self._probabilities(table, predictions)
        predicted = probabilities.argmax(1)
        chosen = probabilities[np.arange(len(predicted)), predicted]
        return {"label": [self.labels[c] for c in predicted.tolist()], "probability": np.asarray(chosen, np.float32)}

    def calibrate(self, table: ExampleTable, predictions: Predictions) -> Calibration:
        """Return a temperature, of two classes the threshold with the largest MCC, and errors for `covering`."""
        table, predictions = thinned(table, predictions)
        rows, labels = np.arange(len(table.ids)), table.labels

        def probabilities(temperature: float) -> np.ndarray:
            return self.read_by(Calibration(temperature=temperature))._probabilities(table, predictions)

        def loss(temperature: float) -> float:
            return float(cross_entropy(probabilities(temperature)[rows, labels]).mean())

        temperature = fit_temperature(loss, len(rows))
        found = probabilities(temperature)
        thresholds = (best_threshold(found[:, 1], labels == 1, mcc),) if len(self.labels) == 2 else ()
        return Calibration(len(rows), temperature, thresholds, kept_scores(1 - found[rows, labels]))

    def covering(self, table: ExampleTable, predictions: Predictions, coverage: float) -> dict[str, Column]:
        """Return `set`: the classes, joined by `;`, among which the true one is; the likeliest always."""
        return {"set": joined(self.labels, self._sets(table, predictions, coverage))}

    def _sets(self, table: ExampleTable, predictions: Predictions, coverage: float) -> np.ndarray:
        """Return bool [records, C]."""
        probabilities = self._probabilities(table, predictions)
        sets, radius = np.empty(probabilities.shape, bool), self.calibration.radius(coverage)
        for rows in pieces(probabilities):
            p = probabilities[rows]
            sets[rows] = (1 - p <= radius) | (p == p.max(1, keepdims=True))
        return sets

    def coverage(
        self, table: ExampleTable, predictions: Predictions, units: np.ndarray | None = None
    ) -> dict[str, Any] | None:
        if not self.calibration.reaches(COVERAGE):
            return None
        sets = self._sets(table, predictions, COVERAGE)
        return coverage_scores(sets[np.arange(len(sets)), table.labels], sets.sum(1), units)

    def targets(self, table: ExampleTable) -> Column:
        return [self.labels[label] for label in table.labels]

    def baselines(self, train: ExampleTable) -> list[Baseline]:
        return class_baselines(train, self.class_weights)

    def view(self, table: pa.Table) -> View:
        """Return wrong classes, the most confident ones first."""
        labels = self.labels
        target, predicted = (class_indices(labels, table[name]) for name in ("target", "label"))
        drawn: list[Curve] = []
        if "probability" in table.column_names:  # of hundreds of classes, see `kept`
            confidence = table["probability"].to_numpy()
        else:
            probabilities = class_probabilities(table, labels)
            confidence = probabilities[np.arange(len(predicted)), predicted]
            drawn = curves(labels, target[:, None] == np.arange(len(labels)), probabilities)
        wrong = predicted != target

        def describe(i: int) -> tuple[str, str, str]:
            return labels[target[i]], labels[predicted[i]], f"probability {confidence[i]:.3f}"

        return View(
            residues=lengths(table),
            error=wrong.astype(float),
            weight=np.ones(len(wrong)),
            error_name="share of wrong classes",
            worst=worst(table, np.where(wrong, confidence, 0.0), describe),
            curves=drawn,
            confusion=Confusion.of(target, predicted, len(labels)),
            confidence=Confidence(confidence, ~wrong, np.arange(len(wrong))),
        )
