"""What a network has to beat: the commonest class, and a logistic regression on amino-acid composition.

Both are scored on the same records by the same `classification_figures` as the model, so their figures and intervals
stand beside the model's.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from esm_neuron.data.tokenizer import AMINO_ACIDS, UNK, VOCABULARY
from esm_neuron.metrics import Value, classification_figures

if TYPE_CHECKING:
    from esm_neuron.data.batch import ExampleTable

END = 50
"""Residues at each terminus that get a composition of their own: sorting signals sit there."""
LEAST = np.exp(-50.0)
"""Least probability that a cross entropy is computed from."""


def majority_baseline(train_labels: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, Value]:
    """Always answer the commonest training class.

    Args:
        train_labels: int64 [m], class indices of the training records.
        labels: int64 [n], class indices of the records to score.
        classes: number of classes.

    Returns:
        n, class (the index answered) and accuracy (None for no records).
    """
    answer = int(np.bincount(train_labels, minlength=classes).argmax())
    accuracy = float((np.asarray(labels) == answer).mean()) if len(labels) else None
    return {"n": len(labels), "class": answer, "accuracy": accuracy}


def composition_features(table: ExampleTable) -> np.ndarray:
    """float64 [records, 61]: amino-acid frequencies of the protein, its first and its last 50 residues, log length.

    What is counted is what the model is given: the cropped sequence, or the windows of a record one after the other.
    """
    features = np.zeros((len(table.labels), 3 * len(AMINO_ACIDS) + 1))
    order = np.argsort(table.record, kind="stable")
    bounds = np.searchsorted(table.record[order], np.arange(len(features) + 1))
    for row, (start, stop) in enumerate(pairwise(bounds)):
        tokens = np.concatenate([table.sequence(example) for example in order[start:stop]])
        residues = tokens[tokens > UNK]  # the specials come first in the alphabet
        parts = (residues, residues[:END], residues[-END:])
        features[row] = np.concatenate([*(_frequencies(part) for part in parts), [np.log(max(len(residues), 1))]])
    return features


def _frequencies(tokens: np.ndarray) -> np.ndarray:
    """float64 [20]: share of each standard amino acid among `tokens`."""
    return np.bincount(tokens, minlength=len(VOCABULARY))[AMINO_ACIDS] / max(len(tokens), 1)


def composition_baseline(
    train: ExampleTable, test: ExampleTable, classes: int, intervals: bool = True
) -> dict[str, Value]:
    """Standardised logistic regression on `composition_features`, fit on `train` and scored on `test`.

    Args:
        train: training records, at least two classes among them.
        test: records to score.
        classes: number of classes.
        intervals: also give 95 % bootstrap intervals.

    Returns:
        The figures of `classification_figures`.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(composition_features(train), train.labels)
    probabilities = np.zeros((len(test.labels), classes))  # a class without training rows has probability 0
    if len(test.labels):
        probabilities[:, model.classes_] = model.predict_proba(composition_features(test))
    # A finite floor keeps the cross entropy of such a class a number.
    loss = -np.log(np.maximum(probabilities[np.arange(len(test.labels)), test.labels], LEAST))
    names = [str(c) for c in range(classes)]
    return classification_figures(probabilities, test.labels, loss, names, intervals)
