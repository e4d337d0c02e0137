"""Any number of labels per protein."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from esm_neuron.config.deferred import module
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.labels import LabelSets
from esm_neuron.data.records import LIST_JOINER
from esm_neuron.metrics import Value, multi_label_metrics
from esm_neuron.metrics.bootstrap import MOST_CURVES
from esm_neuron.metrics.multi_label import THRESHOLD
from esm_neuron.tasks.base import CLASS_SETTINGS, Column, PooledTask, Predictions, by_class, record_mean, score_records
from esm_neuron.tasks.baselines import Baseline, label_set_baselines
from esm_neuron.tasks.losses import sigmoid_losses
from esm_neuron.tasks.view import Confidence, Confusion, View, class_probabilities, lengths, most_frequent, worst

if TYPE_CHECKING:
    from scipy import sparse
    from torch import Tensor
else:
    sparse = module("scipy.sparse")


class MultiLabel(PooledTask):
    """A yes or no for every class of a protein; the loss is binary cross entropy in nats, the mean over classes."""

    summary = "any number of labels per protein"
    settings = CLASS_SETTINGS
    label_kind = LabelSets
    metric = "macro_f1"
    compared = ("subset_accuracy", "macro_f1", "micro_f1", "auroc", "auprc")
    hub_task = "text-classification"
    problem_type = "multi_label_classification"

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Return float32 [classes]: for a label that the protein has its class weight (above 0), else 0."""
        if not len(table.labels):
            return Target(table.sequence(example), np.zeros(len(self.labels), np.float32), np.asarray(0, np.float32))
        label = table.labels[table.record[example]] * self.class_weights
        return Target(table.sequence(example), label, table.weight[example])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return `Task.loss`; a class weight multiplies the loss at the labels that a protein has."""
        has = batch.labels > 0
        losses = sigmoid_losses(logits, has.float(), self.cfg.label_smoothing, self.cfg.focal_gamma)
        weighted = losses * (batch.labels + (~has).float())
        return (weighted.mean(-1) * batch.weights).sum(), batch.weights.sum()

    def metrics(self, table: ExampleTable, predictions: Predictions, intervals: bool = False) -> dict[str, Value]:
        """Return `multi_label_metrics`; a record's loss is the mean over windows and classes of the cross entropy."""

        def score(part: ExampleTable, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            logits = logits.astype(np.float64)
            targets = part.labels[part.record].view(bool)
            # - log sigmoid of the logit of what is true, in a form that overflows nowhere
            losses = np.logaddexp(0, np.where(targets, -logits, logits)).mean(1)
            return record_mean(part, sigmoid(logits)), record_mean(part, losses)

        probabilities, losses = score_records(table, predictions[0], score)
        return multi_label_metrics(probabilities, table.labels.view(bool), losses, self.labels, intervals)

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return `label` (those with a probability of at least 1 / 2, joined by `;`; may be empty), and as `p_<class>`
        the probability of each class."""
        probabilities = record_mean(table, sigmoid(predictions[0].astype(np.float64)))
        return {"label": self._joined(probabilities >= THRESHOLD), **by_class(self.labels, probabilities.T)}

    def kept(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return `outputs`; of more than MOST_CURVES classes `label` and the `probabilities` of these labels alone."""
        if len(self.labels) <= MOST_CURVES:
            return self.outputs(table, predictions)

        def score(part: ExampleTable, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return record_mean(part, sigmoid(logits.astype(np.float64))), np.zeros(len(part.ids))

        probabilities, _ = score_records(table, predictions[0], score)
        chosen = [row[row >= THRESHOLD] for row in probabilities]
        return {"label": self._joined(row >= THRESHOLD for row in probabilities), "probabilities": chosen}

    def targets(self, table: ExampleTable) -> Column:
        return self._joined(table.labels)

    def _joined(self, chosen: Iterable[np.ndarray]) -> list[str]:
        """Return the names of the classes that are not 0 in each row of [n, C]."""
        return [LIST_JOINER.join(self.labels[i] for i in np.flatnonzero(row).tolist()) for row in chosen]

    def baselines(self, train: ExampleTable) -> list[Baseline]:
        return label_set_baselines(len(self.labels), train)

    def view(self, table: pa.Table) -> View:
        """Return wrong labels; the proteins whose probabilities are furthest off come first."""
        labels = self.labels
        target, predicted = (self._matrix(table[name].to_pylist()) for name in ("target", "label"))
        wrong = (target != predicted).getnnz(axis=1)
        totals = np.asarray(target.sum(0)).ravel()
        shown = most_frequent(totals)
        if "probabilities" in table.column_names:  # of the predicted labels alone
            protein, score = predicted.tocoo().row, wrong.astype(float)
            probability = table["probabilities"].combine_chunks().flatten().to_numpy()
            right = np.asarray(target[predicted.nonzero()]).ravel() > 0
        else:
            probabilities, has = class_probabilities(table, labels), target.toarray() > 0
            score = np.where(wrong > 0, np.abs(probabilities - has).sum(1), 0.0)
            protein, probability, right = (
                np.repeat(np.arange(len(has)), len(labels)),
                probabilities.ravel(),
                has.ravel(),
            )

        def describe(i: int) -> tuple[str, str, str]:
            own, found = (table[name][i].as_py().replace(LIST_JOINER, ", ") or "none" for name in ("target", "label"))
            return own, found, f"{wrong[i]} of {len(labels)} wrong"

        return View(
            residues=lengths(table),
            error=wrong / len(labels),
            weight=np.ones(len(wrong)),
            error_name="share of wrong labels",
            worst=worst(table, score, describe),
            confusion=Confusion((target[:, shown].T @ predicted[:, shown]).toarray(), totals[shown], shown),
            confidence=Confidence(probability, right, protein),
            several=True,
        )

    def _matrix(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """Return float64 [n, C], 1 for each label in a text of `outputs`."""
        place = {label: i for i, label in enumerate(self.labels)}
        found = [[place[name] for name in text.split(LIST_JOINER) if name in place] for text in texts]
        row = np.repeat(np.arange(len(found)), list(map(len, found)))
        column = np.array([i for own in found for i in sorted(own)], dtype=np.int64)
        return sparse.csr_matrix((np.ones(len(row)), (row, column)), shape=(len(found), len(self.labels)))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-logits)), in a form that overflows nowhere."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits)))
