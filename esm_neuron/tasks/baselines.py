"""Simple models that a network has to beat: by the training labels' frequencies, and by counted amino acids.

A baseline predicts in the form of the task's `predictions`, so `Task.metrics` scores both on the same proteins, with
the same intervals. It counts what the model is given: the cropped sequence, or a record's windows one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.data.tokenizer import AMINO_ACIDS, PAD, UNK, VOCABULARY
from esm_neuron.metrics import Value

if TYPE_CHECKING:
    from scipy import sparse

    from esm_neuron.data.dataset import ExampleTable
    from esm_neuron.tasks.base import Task
else:
    sparse = module("scipy.sparse")

linear_model, pipeline, preprocessing = (
    module(f"sklearn.{name}") for name in ("linear_model", "pipeline", "preprocessing")
)
END = 50  # residues at each terminus that get a composition of their own: sorting signals sit there
REACH = 7  # neighbors on each side that the baseline of residue classes sees
MOST_ROWS, MOST_RESIDUES = 20_000, 50_000
"""Most training rows, or residues, that a baseline is fitted on: a sample where there are more, and one row for each
class that is not in the sample."""
MOST_CLASSES = 200
"""Classes above which the composition baseline is left out: its fit would take longer than the network's."""
CHUNK = 1 << 18  # tokens looked at together: tables may be files larger than the memory
LEAST = np.exp(-50.0)  # least probability that a logarithm is taken of, so that a cross entropy stays finite


@dataclass(frozen=True)
class Baseline:
    """A simple fitted model."""

    name: str
    predict: Callable[[ExampleTable], list[np.ndarray]]
    """From a table to predictions of the form of `Task.predictions`, for the whole table in its order."""
    fitted_on: int
    """Training rows, or residues where those are classified, that it has seen, of `training`."""
    training: int

    def metrics(self, task: Task, table: ExampleTable) -> dict[str, Value]:
        """Return the task's metrics with intervals on a table with labels, and on how many rows it was fitted."""
        scored = task.metrics(table, self.predict(table), intervals=True)
        return {**scored, "fitted_on": self.fitted_on, "training": self.training}


def class_baselines(classes: int, train: ExampleTable) -> list[Baseline]:
    """Fit the class frequencies, and up to MOST_CLASSES a logistic regression on the amino-acid composition."""
    counts, rows = _draw(train.labels, classes, MOST_ROWS)
    shares = counts / counts.sum()
    if classes > MOST_CLASSES:
        return [_constant("majority", _log(shares), train)]
    classify = _classifier(_logistic(), composition_features(train, rows), train.labels[rows], shares)
    composition = _composition(lambda features: _log(classify(features)), rows, train)
    return [_constant("majority", _log(shares), train), composition]


def label_set_baselines(classes: int, train: ExampleTable) -> list[Baseline]:
    """Fit the label frequencies, and up to MOST_CLASSES a logistic regression per label on the composition."""
    rows = _sample(len(train.ids), MOST_ROWS)
    shares = train.labels.mean(0)
    if classes > MOST_CLASSES:
        return [_constant("majority", _logit(shares), train)]
    features = composition_features(train, rows)
    having = [
        _classifier(_logistic(), features, train.labels[rows, c], np.array([1 - shares[c], shares[c]]))
        for c in range(classes)
    ]

    def predict(features: np.ndarray) -> np.ndarray:
        return _logit(np.stack([classify(features)[:, 1] for classify in having], axis=1))

    return [_constant("majority", _logit(shares), train), _composition(predict, rows, train)]


def value_baselines(train: ExampleTable) -> list[Baseline]:
    """Fit the mean, and a ridge regression on the amino-acid composition."""
    rows = _sample(len(train.ids), MOST_ROWS)
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.Ridge()).fit(
        composition_features(train, rows), train.labels[rows]
    )
    return [_constant("mean", train.labels.mean(), train), _composition(model.predict, rows, train)]


def residue_baselines(classes: int, train: ExampleTable) -> list[Baseline]:
    """Fit the class frequencies, and a logistic regression on the residues around each."""
    counts, rows = _draw(train.labels, classes, MOST_RESIDUES)
    known, shares = int(counts.sum()), counts / counts.sum()
    classify = _classifier(
        linear_model.LogisticRegression(max_iter=1000), window_features(train, rows), train.labels[rows], shares
    )

    def window(table: ExampleTable) -> list[np.ndarray]:
        return [_log(np.concatenate([classify(window_features(table, part)) for part in _chunks(len(table.tokens))]))]

    majority = Baseline("majority", lambda table: [np.tile(_log(shares), (len(table.tokens), 1))], known, known)
    return [majority, Baseline("window", window, len(rows), known)]


def unigram_baseline(train: ExampleTable) -> Baseline:
    """Fit the frequency of every residue, each token of the alphabet counted once more.

    All residues of a table are predicted, not only those that were hidden from the network.
    """
    counts = np.zeros(len(VOCABULARY), dtype=np.int64)
    for part in _chunks(len(train.tokens)):
        counts += np.bincount(train.tokens[part], minlength=len(VOCABULARY))
    residues = int(counts[UNK + 1 :].sum())
    # Tokens up to <unk> are no residues and get no share, whereas a residue never seen still has one.
    counts += 1
    counts[: UNK + 1] = 0
    loss, likeliest = -_log(counts / counts.sum()), int(counts.argmax())

    def predict(table: ExampleTable) -> list[np.ndarray]:
        real, starts = table.tokens > UNK, table.offsets[:-1]
        columns = (loss[table.tokens] * real, real, table.tokens == likeliest)
        return [np.add.reduceat(column.astype(np.float64), starts) for column in columns]

    return Baseline("unigram", predict, residues, residues)


def _constant(name: str, prediction: np.ndarray, train: ExampleTable) -> Baseline:
    """Predict the same for every example, learned from all training rows."""

    def predict(table: ExampleTable) -> list[np.ndarray]:
        return [np.broadcast_to(prediction, (len(table), *np.shape(prediction)))]

    return Baseline(name, predict, len(train.ids), len(train.ids))


def _composition(predict: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, train: ExampleTable) -> Baseline:
    """Predict from `composition_features`, fitted on `rows`; each window gets the prediction for its whole protein."""
    return Baseline(
        "composition", lambda table: [predict(composition_features(table))[table.record]], len(rows), len(train.ids)
    )


def composition_features(table: ExampleTable, records: np.ndarray | None = None) -> np.ndarray:
    """Return float64 [records, 61]: amino-acid frequencies of the protein, of its first and its last 50 residues, and
    the log length; for all records of the table, or for those given."""
    records = np.arange(len(table.ids)) if records is None else records
    features = np.zeros((len(records), 3 * len(AMINO_ACIDS) + 1))
    order = np.argsort(table.record, kind="stable")
    starts = np.searchsorted(table.record, records, "left", order)
    stops = np.searchsorted(table.record, records, "right", order)
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        tokens = np.concatenate([table.sequence(example) for example in order[start:stop]])
        residues = tokens[tokens > UNK]  # the specials come first in the alphabet
        shares = [
            np.bincount(part, minlength=len(VOCABULARY))[AMINO_ACIDS] / max(len(part), 1)
            for part in (residues, residues[:END], residues[-END:])
        ]
        features[row] = np.concatenate([*shares, [np.log(max(len(residues), 1))]])
    return features


def window_features(table: ExampleTable, rows: np.ndarray) -> sparse.csr_matrix:
    """Return float64 [rows, (2 REACH + 1) x 33]: which token is at each place around the tokens `rows`."""
    example = np.searchsorted(table.offsets, rows, side="right") - 1
    around = rows[:, None] + np.arange(-REACH, REACH + 1)
    # A window never reaches into a neighbor's sequence: places outside the example are padding.
    inside = (around >= table.offsets[example, None]) & (around < table.offsets[example + 1, None])
    tokens = np.where(inside, table.tokens[np.clip(around, 0, len(table.tokens) - 1)], PAD).astype(np.int64)
    columns = tokens + len(VOCABULARY) * np.arange(tokens.shape[1])
    bounds = np.arange(len(rows) + 1) * tokens.shape[1]
    shape = (len(rows), tokens.shape[1] * len(VOCABULARY))
    return sparse.csr_matrix((np.ones(tokens.size), columns.ravel(), bounds), shape=shape)


def _logistic() -> Any:
    return pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=5000))


def _classifier(
    model: Any, features: np.ndarray | sparse.csr_matrix, labels: np.ndarray, shares: np.ndarray
) -> Callable[[np.ndarray | sparse.csr_matrix], np.ndarray]:
    """Return a function from features to probabilities, float64 [rows, classes], fitted on rows of classes `labels`.

    A class without such rows has probability 0. With rows of one class only nothing can be fitted, and every
    probability is that in `shares`, float64 [classes].
    """
    if len(np.unique(labels)) < 2:
        return lambda seen: np.tile(shares, (seen.shape[0], 1))
    model.fit(features, labels)

    def probabilities(seen: np.ndarray | sparse.csr_matrix) -> np.ndarray:
        found = np.zeros((seen.shape[0], len(shares)))
        # scikit-learn has a column only for each class that it has seen.
        found[:, model.classes_] = model.predict_proba(seen)
        return found

    return probabilities


def _chunks(n: int) -> Iterator[np.ndarray]:
    """Yield the indices below n, CHUNK at a time: features of all tokens, or tokens as int64, may fill the memory."""
    return (np.arange(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def _draw(labels: np.ndarray, classes: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many rows each class has, int64 [classes], and the rows to fit a classifier on, rising.

    Rows whose label, int [n], is -1 are not drawn. Of each class that has none among the `most` drawn, its first is.
    """
    known = np.flatnonzero(labels >= 0)
    found, first = np.unique(labels[known], return_index=True)
    drawn = known[_sample(len(known), most)]
    lacking = ~np.isin(found, labels[drawn])
    rows = np.sort(np.concatenate([drawn, known[first[lacking]]]))
    return np.bincount(labels[known], minlength=classes), rows


def _sample(n: int, most: int) -> np.ndarray:
    """Return row numbers, rising: all `n`, or `most` of them by a fixed seed."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(np.maximum(probabilities, LEAST)))


def _logit(probabilities: np.ndarray) -> np.ndarray:
    return _log(probabilities) - _log(1 - probabilities)


def capped(baselines: Sequence[Baseline]) -> str:
    """Return a line that says which baselines did not see all training rows; empty where all did."""
    some = [f"{b.name} on {b.fitted_on:,} of {b.training:,}" for b in baselines if b.fitted_on < b.training]
    return f"baselines fitted on a sample of the training proteins: {', '.join(some)}" if some else ""
