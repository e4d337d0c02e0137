"""Simple models that a network has to beat: those that a referee would ask for.

Frequencies; composition; k-mers; where all proteins have one length, the residue at each place, and for variants of one
protein the sites that are mutated; the label of the closest training protein; for residues, their neighbours.

A baseline predicts in the form of the task's `predictions`, so `Task.metrics` scores both on the same proteins, with
the same intervals. It has the class weights of the task, as the network has, and sees what the model is given: the
cropped sequence, or a record's windows as one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.data.alignment import Proteins
from esm_neuron.data.families import most_frequent, mutated_positions
from esm_neuron.data.nearest import find_nearest
from esm_neuron.data.tokenizer import AMINO_ACIDS, VOCABULARY
from esm_neuron.metrics import Scores
from esm_neuron.tasks import features
from esm_neuron.tasks.features import Features, taken

if TYPE_CHECKING:
    from esm_neuron.data.dataset import ExampleTable
    from esm_neuron.tasks.base import Task

linear_model, pipeline, preprocessing = (
    module(f"sklearn.{name}") for name in ("linear_model", "pipeline", "preprocessing")
)
MOST_ROWS, MOST_RESIDUES = 20_000, 50_000
"""Most training rows, or residues, that a baseline is fitted on: a sample where there are more, and one row for each
class that is not in the sample."""
MOST_ENTRIES = 20_000_000
"""Most entries of k-mers and places, times the classes, that are fitted: a sample of the rows where there are more."""
MOST_TARGETS = 200_000
"""Most training proteins among which the closest one is looked for."""
MOST_CLASSES = 200
"""Classes above which only the baselines without a fit are made: the others would take longer than the network."""
CHUNK = 1 << 18  # tokens looked at together: tables may be files larger than the memory
LEAST = np.exp(-50.0)  # least probability that a logarithm is taken of, so that a cross entropy stays finite


@dataclass(frozen=True)
class Baseline:
    """A simple model, which may be fitted when it is first asked."""

    name: str
    predict: Callable[[ExampleTable], list[np.ndarray]]
    """From a table to predictions of the form of `Task.predictions`, for the whole table in its order."""
    fitted_on: int
    """Training rows, or residues where those are classified, that it has seen, of `training`."""
    training: int
    without_fit: bool = True
    """Whether it is made in no time, of any number of classes."""

    @property
    def size(self) -> dict[str, int]:
        """Return on how many rows it is fitted, for result.json."""
        return {"fitted_on": self.fitted_on, "training": self.training}

    def metrics(self, task: Task, table: ExampleTable) -> Scores:
        """Return the task's metrics with intervals on a table with labels, and `size`."""
        return Scores({**(found := task.metrics(table, self.predict(table), True)), **self.size}, found.drawn)


Learn = Callable[[Features, np.ndarray], Callable[[Features], np.ndarray]]
"""Fit on features and the training rows that they are of; return a function from features to predictions."""


@dataclass(frozen=True)
class Pooled:
    """How the baselines of a task with one prediction per protein learn."""

    train: ExampleTable
    rows: np.ndarray
    """The training rows that are fitted on."""
    dense: Learn
    """Learns from few features, which it standardises."""
    sparse: Learn
    """Learns from many features as they are, most of them 0."""
    copied: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """The predictions where training rows (-1: none) are the closest ones, with a share of equal residues."""
    outputs: int = 1

    def baselines(self) -> Iterator[Baseline]:
        """Yield all but the constant one."""
        yield self._fitted("composition", features.composition, self.rows, self.dense)
        proteins = self._proteins(self.rows)
        entries = max(1, int(proteins.lengths.mean())) * self.outputs
        some = self.rows[_sample(len(self.rows), max(1, MOST_ENTRIES // entries))]
        yield self._fitted("k-mers", features.kmers, some, self.sparse)
        lengths = np.unique(proteins.lengths)
        if len(lengths) == 1:
            length = int(lengths[0])
            yield self._fitted("one-hot", partial(features.one_hot, length=length), some, self.sparse)
            if mutated_positions(proteins, np.arange(len(proteins))) is not None:
                wild_type = most_frequent(proteins.residues.reshape(-1, length))
                describe = partial(features.sites, wild_type=wild_type)
                yield self._fitted("site-independent", describe, some, self.sparse)
        yield self._nearest()

    def _proteins(self, rows: np.ndarray) -> Proteins:
        return Proteins.of(taken(self.train, rows))

    def _fitted(self, name: str, describe: Callable[[Proteins], Features], rows: np.ndarray, learn: Learn) -> Baseline:
        fit = functools.cache(lambda: learn(describe(self._proteins(rows)), rows))
        # each window gets the prediction for its whole protein
        predict = lambda table: [fit()(describe(Proteins.of(table)))[table.record]]  # noqa: E731
        return Baseline(name, predict, len(rows), len(self.train.ids), without_fit=False)

    def _nearest(self) -> Baseline:
        rows = _sample(len(self.train.ids), MOST_TARGETS)
        targets = functools.cache(lambda: self._proteins(rows))

        def predict(table: ExampleTable) -> list[np.ndarray]:
            found = find_nearest(Proteins.of(table), targets())
            closest = np.where(found.target >= 0, rows[found.target], -1)
            return [self.copied(closest, found.identity)[table.record]]

        return Baseline("nearest homolog", predict, len(rows), len(self.train.ids))


def class_baselines(train: ExampleTable, weights: np.ndarray) -> list[Baseline]:
    """Return the baselines of one class per protein; `weights`, float [classes], are the task's class weights.

    The constant one knows how frequent each class is, without weights: its ranking and its MCC do not depend on them.
    """
    classes = len(weights)
    counts, rows = _draw(train.labels, classes, MOST_ROWS)
    shares = counts / counts.sum()

    def learn(make: Callable[[], Any]) -> Learn:
        def fit(seen: Features, of: np.ndarray) -> Callable[[Features], np.ndarray]:
            classify = _classifier(make(), seen, train.labels[of], shares, weights)
            return lambda new: _log(classify(new))

        return fit

    def copied(closest: np.ndarray, identity: np.ndarray) -> np.ndarray:
        return _log(_copied_classes(np.where(closest >= 0, train.labels[closest], -1), identity, shares))

    pooled = Pooled(train, rows, learn(_standardised), learn(_logistic), copied, classes)
    return [_constant("majority", _log(shares), train), *_allowed(pooled, classes)]


def label_set_baselines(train: ExampleTable, weights: np.ndarray) -> list[Baseline]:
    """Return the baselines of any number of labels per protein; `weights`, float [classes], multiply the loss at the
    labels that a protein has. The constant one gives each label its weighted frequency."""
    classes = len(weights)
    rows = _sample(len(train.ids), MOST_ROWS)
    shares = train.labels.mean(0)

    def learn(make: Callable[[], Any]) -> Learn:
        def fit(seen: Features, of: np.ndarray) -> Callable[[Features], np.ndarray]:
            having = [
                _classifier(make(), seen, train.labels[of, c], np.array([1 - p, p]), np.array([1.0, weights[c]]))
                for c, p in enumerate(shares)
            ]
            return lambda new: _logit(np.stack([classify(new)[:, 1] for classify in having], axis=1))

        return fit

    def copied(closest: np.ndarray, identity: np.ndarray) -> np.ndarray:
        sure = _sure(closest >= 0, identity)
        return _logit(sure * train.labels[closest] + (1 - sure) * shares)

    pooled = Pooled(train, rows, learn(_standardised), learn(_logistic), copied, classes)
    constant = _logit(weights * shares / (weights * shares + 1 - shares))
    return [_constant("majority", constant, train), *_allowed(pooled, classes)]


def value_baselines(train: ExampleTable) -> list[Baseline]:
    """Return the baselines of a number per protein."""
    rows, mean = _sample(len(train.ids), MOST_ROWS), train.labels.mean()

    def learn(*before: Callable[[], Any]) -> Learn:
        def fit(seen: Features, of: np.ndarray) -> Callable[[Features], np.ndarray]:
            model = pipeline.make_pipeline(*(make() for make in before), linear_model.Ridge())
            found: Callable[[Features], np.ndarray] = model.fit(seen, train.labels[of]).predict
            return found

        return fit

    def copied(closest: np.ndarray, identity: np.ndarray) -> np.ndarray:
        return np.where(closest >= 0, train.labels[closest], mean)

    pooled = Pooled(train, rows, learn(lambda: preprocessing.StandardScaler()), learn(), copied)
    return [_constant("mean", np.asarray(mean), train), *pooled.baselines()]


def _allowed(pooled: Pooled, classes: int) -> list[Baseline]:
    return [baseline for baseline in pooled.baselines() if baseline.without_fit or classes <= MOST_CLASSES]


def _sure(known: np.ndarray, identity: np.ndarray) -> np.ndarray:
    """Return the least probability of a copied label, [rows, 1]: one half, and more the more residues are equal."""
    return np.where(known, 0.5 + identity / 2, 0.0)[:, None]


def _copied_classes(labels: np.ndarray, identity: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return probabilities [rows, classes] by the classes int64 [rows] of the closest rows, by the training `shares`
    where that is -1."""
    sure = _sure(labels >= 0, identity)
    p = (1 - sure) * shares
    p[np.arange(len(p)), labels] += sure[:, 0]
    return np.asarray(p)


def residue_baselines(train: ExampleTable, weights: np.ndarray) -> list[Baseline]:
    """Return the class frequencies, a logistic regression on the residues around each, and the labels of the closest
    training protein's residues; `weights`, float [classes], are the task's class weights."""
    counts, rows = _draw(train.labels, len(weights), MOST_RESIDUES)
    known, shares = int(counts.sum()), counts / counts.sum()
    fit = functools.cache(
        lambda: _classifier(_logistic(), features.windows(train, rows), train.labels[rows], shares, weights)
    )

    def window(table: ExampleTable) -> list[np.ndarray]:
        return [_log(np.concatenate([fit()(features.windows(table, part)) for part in _chunks(len(table.tokens))]))]

    majority = Baseline("majority", lambda table: [np.tile(_log(shares), (len(table.tokens), 1))], known, known)
    return [majority, Baseline("window", window, len(rows), known, without_fit=False), _nearest_residues(train, shares)]


def _nearest_residues(train: ExampleTable, shares: np.ndarray) -> Baseline:
    """Give each residue the label of the one that faces it in the closest training protein, without gaps."""
    rows = _sample(len(train.ids), MOST_TARGETS)

    @functools.cache
    def targets() -> tuple[Proteins, np.ndarray]:
        table = taken(train, rows)
        slot, _ = table.residue_slots()
        shown = slot >= 0
        _, first = np.unique(slot[shown], return_index=True)  # in the order of `Proteins`, which leaves out what is cut
        return Proteins.of(table), table.labels[shown][first]

    def predict(table: ExampleTable) -> list[np.ndarray]:
        (proteins, labels), queries = targets(), Proteins.of(table)
        found = find_nearest(queries, proteins)
        owner = np.repeat(np.arange(len(queries)), queries.lengths)
        target = found.target[owner]
        place = np.arange(len(owner)) - queries.bounds[owner] - found.diagonal[owner]
        facing = (target >= 0) & (place >= 0) & (place < proteins.lengths[target])
        label = np.where(facing, labels[np.where(facing, proteins.bounds[target] + place, 0)], -1)
        p = _copied_classes(label.astype(np.int64), found.identity[owner], shares)
        slot, _ = table.residue_slots()
        shown = slot >= 0
        everywhere = np.tile(shares, (len(table.tokens), 1))
        everywhere[shown] = p[np.unique(slot[shown], return_inverse=True)[1]]
        return [_log(everywhere)]

    return Baseline("nearest homolog", predict, len(rows), len(train.ids))


def unigram_baseline(
    train: ExampleTable,
    hidden: Callable[[ExampleTable], np.ndarray],
    rates: Callable[[ExampleTable, np.ndarray], np.ndarray | float] | None = None,
) -> Baseline:
    """Fit the frequencies of the amino acids, each counted once more; `hidden` names the tokens that are predicted.

    With `rates`, the share of each token that is hidden, a residue counts by it.
    """
    counts = np.zeros(len(VOCABULARY))
    for part in _chunks(len(train.tokens)):
        counts += np.bincount(train.tokens[part], None if rates is None else rates(train, part), len(VOCABULARY))
    # Other tokens are no targets and get no share, whereas an amino acid never seen still has one.
    shares = np.zeros(len(VOCABULARY))
    shares[AMINO_ACIDS] = counts[AMINO_ACIDS] + 1
    residues = round(counts[AMINO_ACIDS].sum())
    loss, likeliest = -_log(shares / shares.sum()), int(shares.argmax())

    def predict(table: ExampleTable) -> list[np.ndarray]:
        asked, starts = hidden(table), table.offsets[:-1]
        columns = (loss[table.tokens] * asked, asked, (table.tokens == likeliest) & asked)
        return [np.add.reduceat(column.astype(np.float64), starts) for column in columns]

    return Baseline("unigram", predict, residues, residues)


def _constant(name: str, prediction: np.ndarray, train: ExampleTable) -> Baseline:
    """Predict the same for every example, learned from all training rows."""

    def predict(table: ExampleTable) -> list[np.ndarray]:
        return [np.broadcast_to(prediction, (len(table), *np.shape(prediction)))]

    return Baseline(name, predict, len(train.ids), len(train.ids))


def _logistic() -> Any:
    return linear_model.LogisticRegression(max_iter=1000)


def _standardised() -> Any:
    return pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=5000))


def _classifier(
    model: Any, seen: Features, labels: np.ndarray, shares: np.ndarray, weights: np.ndarray
) -> Callable[[Features], np.ndarray]:
    """Return a function from features to probabilities, float64 [rows, classes], fitted on rows of classes `labels`.

    An error counts by the class's weight, `weights` float [classes], scaled so that the rows' mean is 1: the strength
    of the regularization does not change. A class without such rows has probability 0. With rows of one class only
    nothing can be fitted, and every probability is that in `shares`, float64 [classes].
    """
    if len(np.unique(labels)) < 2:
        return lambda new: np.tile(shares, (new.shape[0], 1))
    of_row = weights[labels] / weights[labels].mean()
    last = model.steps[-1][0] + "__" if hasattr(model, "steps") else ""
    model.fit(seen, labels, **{f"{last}sample_weight": of_row})

    def probabilities(new: Features) -> np.ndarray:
        found = np.zeros((new.shape[0], len(shares)))
        # scikit-learn has a column only for each class that it has seen.
        found[:, model.classes_] = model.predict_proba(new)
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
