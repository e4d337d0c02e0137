"""Predictions of one split in the forms that the report draws, whatever the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

WORST = 10


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


def most_frequent(totals: np.ndarray) -> np.ndarray:
    """Return int64: the classes with the MOST_SHOWN largest totals, in their order."""
    return np.sort(np.argsort(-totals, kind="stable")[:MOST_SHOWN])


@dataclass(frozen=True)
class Confidence:
    """Predicted probabilities, n in all, and whether what each predicts is true."""

    probability: np.ndarray  # float64 [n]
    right: np.ndarray  # bool [n]
    protein: np.ndarray  # int64 [n]: whose it is


@dataclass(frozen=True)
class Record:
    """A record with a bad prediction."""

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
    """Return the records with the WORST largest scores above 0, the largest first; of equal ones the first.

    `score` is float64 [records]; `describe` takes a record's number and returns its target, prediction and error.
    """
    rows = [int(i) for i in np.argsort(-score, kind="stable")[:WORST] if score[i] > 0]
    return [Record(table["id"][i].as_py(), table["residues"][i].as_py(), *describe(i)) for i in rows]
