"""Predictions of one split in the forms that the report draws, whatever the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

LISTED = 2000
"""Most proteins that the report lists, those with the worst predictions."""
MOST_CURVES = 6
"""Most classes with a ROC curve of their own: of more, the most frequent."""


MOST_SHOWN = 50
"""Most classes of a confusion matrix: of more, the most frequent."""


@dataclass(frozen=True)
class Confusion:
    """Which class was predicted for which target."""

    counts: np.ndarray  # float64 [S, S]: rows are targets, columns predictions
    totals: np.ndarray  # float64 [S]: what the cells of a row are shares of
    classes: np.ndarray  # int64 [S]: the classes shown, in their order

    @classmethod
    def of(cls, target: np.ndarray, predicted: np.ndarray, classes: int) -> Confusion:
        """Count pairs of class indices int64 [n]."""
        totals = np.bincount(target, minlength=classes)
        shown = most_frequent(totals)
        place = np.full(classes, -1)
        place[shown] = np.arange(len(shown))
        pair = place[target] * len(shown) + place[predicted]
        both = pair[(place[target] >= 0) & (place[predicted] >= 0)]
        counts = np.bincount(both, minlength=len(shown) ** 2).reshape(len(shown), len(shown))
        return cls(counts.astype(float), totals[shown].astype(float), shown)


def most_frequent(totals: np.ndarray, most: int = MOST_SHOWN) -> np.ndarray:
    """Return int64: the classes with the `most` largest totals, in their order."""
    return np.sort(np.argsort(-totals, kind="stable")[:most])


@dataclass(frozen=True)
class Confidence:
    """Predicted probabilities, n in all, and whether what each predicts is true."""

    probability: np.ndarray  # float64 [n]
    right: np.ndarray  # bool [n]
    protein: np.ndarray  # int64 [n]: whose it is


@dataclass(frozen=True)
class Curve:
    """How a class is told from the rest, for its ROC and precision-recall curves."""

    name: str
    number: int
    """Its place among the classes."""
    truth: np.ndarray  # bool [n]
    score: np.ndarray  # float64 [n]


def curves(labels: Sequence[str], truth: np.ndarray, score: np.ndarray) -> list[Curve]:
    """Return the curves of classes by bool [n, C] and probabilities [n, C]: of two classes that of the second alone."""
    often = truth.sum(0)
    known = [c for c in most_frequent(often, MOST_CURVES).tolist() if 0 < often[c] < len(truth)]
    if truth.shape[1] == 2 and (truth.sum(1) == 1).all():
        known = known[-1:]
    return [Curve(labels[c], c, truth[:, c], score[:, c]) for c in known]


@dataclass(frozen=True)
class Record:
    """A record and how it was predicted."""

    id: str
    residues: int
    target: str
    prediction: str
    error: str


@dataclass(frozen=True)
class View:
    """The predictions for one split; None where a chart does not fit the task."""

    residues: np.ndarray  # int64 [records]
    error: np.ndarray  # float64 [records]: how wrong each is, a sum over `weight` parts
    weight: np.ndarray  # float64 [records]
    error_name: str
    worst: list[Record]  # the worst first, see `worst` below
    curves: Sequence[Curve] = ()
    confusion: Confusion | None = None
    confidence: Confidence | None = None
    several: bool = False  # whether a protein can have several of the classes
    values: tuple[np.ndarray, np.ndarray] | None = None  # of numbers, targets and predictions, float64 [records] each
    spread: np.ndarray | None = None  # perplexity of each record with hidden residues, float64


def lengths(table: pa.Table) -> np.ndarray:
    """Return int64 [records]: residues of each."""
    return np.asarray(table["residues"].to_numpy()).astype(np.int64)


def class_probabilities(table: pa.Table, labels: Sequence[str]) -> np.ndarray:
    """Return float64 [records, C]: the columns `p_<class>`."""
    return np.stack([table[f"p_{label}"].to_numpy() for label in labels], axis=1)


def class_indices(labels: Sequence[str], names: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return int64 [n]: the class of each name."""
    place = {label: i for i, label in enumerate(labels)}
    return np.array([place[name] for name in names.to_pylist()], dtype=np.int64)


def worst(table: pa.Table, score: np.ndarray, describe: Callable[[int], tuple[str, str, str]]) -> list[Record]:
    """Return the records with the LISTED largest scores, the largest first; of equal ones the first.

    `score` is float64 [records]; `describe` takes a record's number and returns its target, prediction and error.
    """
    rows = np.argsort(-score, kind="stable")[:LISTED].tolist()
    ids, residues = (table[name].take(pa.array(rows, pa.int64())).to_pylist() for name in ("id", "residues"))
    return [Record(name, size, *describe(i)) for name, size, i in zip(ids, residues, rows, strict=True)]
