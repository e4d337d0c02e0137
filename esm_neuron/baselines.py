"""What a network has to beat: answers from the training labels' frequencies, and from amino acids counted.

A baseline answers in the form that the task's model does, so `Task.figures` scores both on the same rows, with the same
intervals. What is counted is what the model is given: the cropped sequence, or a record's windows one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from esm_neuron.config import TaskConfig
from esm_neuron.data.tokenizer import AMINO_ACIDS, PAD, UNK, VOCABULARY
from esm_neuron.metrics import Value

if TYPE_CHECKING:
    from esm_neuron.data.batch import ExampleTable
    from esm_neuron.tasks import Task

END = 50
"""Residues at each terminus that get a composition of their own: sorting signals sit there."""
REACH = 7
"""Neighbours on each side that the baseline of residue classes sees."""
MOST_ROWS, MOST_RESIDUES = 20_000, 50_000
"""Training rows, or residues, that a baseline is fitted on at most: drawn from them where there are more."""
LEAST = np.exp(-50.0)
"""Least probability that a logarithm is taken of, so that a cross entropy stays a number."""

Answer = Callable[["ExampleTable"], list[np.ndarray]]
"""From a table to answers of the form of `Task.answers`, for the whole table in its order."""


@dataclass(frozen=True)
class Baseline:
    """Something simple, fitted."""

    name: str
    answer: Answer
    fitted_on: int
    """Training rows, or residues where those are classified, that it has seen."""
    training: int
    """How many there are."""

    def figures(self, task: Task, table: ExampleTable) -> dict[str, Value]:
        """The task's figures with intervals on a table with labels, and on how many rows the baseline was fitted."""
        scored = task.figures(table, self.answer(table), intervals=True)
        return {**scored, "fitted_on": self.fitted_on, "training": self.training}


def fit_baselines(task: TaskConfig, train: ExampleTable) -> list[Baseline]:
    """The baselines of a task (resolved, see `data.labels.resolve`), fitted on its training table."""
    kind = {
        "sequence_classification": _class_baselines,
        "multi_label": _multi_label_baselines,
        "regression": _regression_baselines,
        "residue_classification": _residue_baselines,
        "masked_lm": _unigram,
    }[task.name]
    return kind(len(task.labels or ()), train)


def _class_baselines(classes: int, train: ExampleTable) -> list[Baseline]:
    rows = _sample(len(train.ids), MOST_ROWS)
    shares = np.bincount(train.labels, minlength=classes) / len(train.labels)
    model = _logistic().fit(composition_features(train)[rows], train.labels[rows])

    def composition(table: ExampleTable) -> list[np.ndarray]:
        probabilities = np.zeros((len(table.ids), classes))  # a class without training rows has probability 0
        probabilities[:, model.classes_] = model.predict_proba(composition_features(table))
        return [_log(probabilities)[table.record]]

    return [
        Baseline("majority", lambda table: [np.tile(_log(shares), (len(table), 1))], len(train.ids), len(train.ids)),
        Baseline("composition", composition, len(rows), len(train.ids)),
    ]


def _multi_label_baselines(classes: int, train: ExampleTable) -> list[Baseline]:
    rows = _sample(len(train.ids), MOST_ROWS)
    shares = train.labels.mean(0)
    features = composition_features(train)[rows]
    models = []
    for c in range(classes):
        own = train.labels[rows, c]
        models.append(_logistic().fit(features, own) if 0 < own.sum() < len(own) else None)

    def composition(table: ExampleTable) -> list[np.ndarray]:
        seen = composition_features(table)
        each = [
            np.full(len(seen), share) if model is None else model.predict_proba(seen)[:, 1]
            for model, share in zip(models, shares, strict=True)
        ]
        return [_logit(np.stack(each, axis=1))[table.record]]

    return [
        Baseline("majority", lambda table: [np.tile(_logit(shares), (len(table), 1))], len(train.ids), len(train.ids)),
        Baseline("composition", composition, len(rows), len(train.ids)),
    ]


def _regression_baselines(_: int, train: ExampleTable) -> list[Baseline]:
    rows = _sample(len(train.ids), MOST_ROWS)
    mean = train.labels.mean()
    model = make_pipeline(StandardScaler(), Ridge()).fit(composition_features(train)[rows], train.labels[rows])
    return [
        Baseline("mean", lambda table: [np.full(len(table), mean)], len(train.ids), len(train.ids)),
        Baseline(
            "composition",
            lambda table: [model.predict(composition_features(table))[table.record]],
            len(rows),
            len(train.ids),
        ),
    ]


def _residue_baselines(classes: int, train: ExampleTable) -> list[Baseline]:
    known = np.flatnonzero(train.labels >= 0)
    rows = known[_sample(len(known), MOST_RESIDUES)]
    shares = np.bincount(train.labels[known], minlength=classes) / len(known)
    model = LogisticRegression(max_iter=1000).fit(window_features(train, rows), train.labels[rows])

    def window(table: ExampleTable) -> list[np.ndarray]:
        probabilities = np.zeros((len(table.tokens), classes))
        probabilities[:, model.classes_] = model.predict_proba(window_features(table, np.arange(len(table.tokens))))
        return [_log(probabilities)]

    return [
        Baseline("majority", lambda table: [np.tile(_log(shares), (len(table.tokens), 1))], len(known), len(known)),
        Baseline("window", window, len(rows), len(known)),
    ]


def _unigram(_: int, train: ExampleTable) -> list[Baseline]:
    """Every residue by its frequency in training, each token of the alphabet counted once more; all residues of a
    table are asked, not only those that were hidden from the network."""
    counts = np.bincount(train.tokens, minlength=len(VOCABULARY)) + 1
    counts[: UNK + 1] = 0
    loss, likeliest = -_log(counts / counts.sum()), int(counts.argmax())

    def answer(table: ExampleTable) -> list[np.ndarray]:
        real, starts = table.tokens > UNK, table.offsets[:-1]
        columns = (loss[table.tokens] * real, real, table.tokens == likeliest)
        return [np.add.reduceat(column.astype(np.float64), starts) for column in columns]

    residues = int((train.tokens > UNK).sum())
    return [Baseline("unigram", answer, residues, residues)]


def composition_features(table: ExampleTable) -> np.ndarray:
    """float64 [records, 61]: amino-acid frequencies of the protein, its first and its last 50 residues, log length."""
    features = np.zeros((len(table.ids), 3 * len(AMINO_ACIDS) + 1))
    order = np.argsort(table.record, kind="stable")
    bounds = np.searchsorted(table.record[order], np.arange(len(features) + 1))
    for row, (start, stop) in enumerate(pairwise(bounds)):
        tokens = np.concatenate([table.sequence(example) for example in order[start:stop]])
        residues = tokens[tokens > UNK]  # the specials come first in the alphabet
        parts = (residues, residues[:END], residues[-END:])
        features[row] = np.concatenate([*(_frequencies(part) for part in parts), [np.log(max(len(residues), 1))]])
    return features


def window_features(table: ExampleTable, rows: np.ndarray) -> sparse.csr_matrix:
    """float64 [rows, (2 REACH + 1) x 33]: which token is at each place around the tokens `rows`, in their example."""
    example = np.searchsorted(table.offsets, rows, side="right") - 1
    around = rows[:, None] + np.arange(-REACH, REACH + 1)
    inside = (around >= table.offsets[example, None]) & (around < table.offsets[example + 1, None])
    tokens = np.where(inside, table.tokens[np.clip(around, 0, len(table.tokens) - 1)], PAD).astype(np.int64)
    columns = tokens + len(VOCABULARY) * np.arange(tokens.shape[1])
    bounds = np.arange(len(rows) + 1) * tokens.shape[1]
    shape = (len(rows), tokens.shape[1] * len(VOCABULARY))
    return sparse.csr_matrix((np.ones(tokens.size), columns.ravel(), bounds), shape=shape)


def _frequencies(tokens: np.ndarray) -> np.ndarray:
    """float64 [20]: share of each standard amino acid among `tokens`."""
    return np.bincount(tokens, minlength=len(VOCABULARY))[AMINO_ACIDS] / max(len(tokens), 1)


def _logistic() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))


def _sample(n: int, most: int) -> np.ndarray:
    """Row numbers, rising: all `n`, or `most` of them by a fixed seed."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(np.maximum(probabilities, LEAST)))


def _logit(probabilities: np.ndarray) -> np.ndarray:
    return _log(probabilities) - _log(1 - probabilities)


def capped(baselines: Sequence[Baseline]) -> str:
    """A line that says which baselines did not see all training rows; empty where all did."""
    some = [f"{b.name} on {b.fitted_on:,} of {b.training:,}" for b in baselines if b.fitted_on < b.training]
    return f"baselines fitted on a sample of the training rows: {', '.join(some)}" if some else ""
