"""Held-out answers in the forms that charts are drawn from, whatever the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from esm_neuron.data.records import LIST_JOINER
from esm_neuron.metrics.multi_label import THRESHOLD

WORST = 10
"""Records listed as the worst."""


@dataclass(frozen=True)
class Confusion:
    """What was answered where something else, or the same, was true."""

    counts: np.ndarray
    """float64 [C, C]: rows are the truth, columns the answers."""
    totals: np.ndarray
    """float64 [C]: what a row is a share of."""


@dataclass(frozen=True)
class Confidence:
    """Probabilities and whether what they stand for is true: n rows of some proteins."""

    probability: np.ndarray
    """float64 [n]."""
    right: np.ndarray
    """bool [n]."""
    protein: np.ndarray
    """int64 [n]."""


@dataclass(frozen=True)
class Record:
    """A record that was answered badly."""

    id: str
    residues: int
    truth: str
    answer: str
    error: str


@dataclass(frozen=True)
class View:
    """The answers to one split; None where a form says nothing of the task."""

    residues: np.ndarray
    """int64 [records]."""
    error: np.ndarray
    """float64 [records]: how wrong each is, a sum over `weight` parts."""
    weight: np.ndarray
    """float64 [records]."""
    error_name: str
    worst: list[Record]
    """The WORST worst records, the worst first."""
    confusion: Confusion | None = None
    confidence: Confidence | None = None
    values: tuple[np.ndarray, np.ndarray] | None = None
    """Regression: truth and answer, float64 [records] each."""
    spread: np.ndarray | None = None
    """Masked LM: perplexity of each record with hidden residues, float64."""


def view(task: str, labels: Sequence[str], table: pa.Table) -> View:
    """The view of a table that `held_out.save_answers` wrote."""
    kinds: dict[str, Callable[[Sequence[str], pa.Table], View]] = {
        "sequence_classification": _classes,
        "multi_label": _multi_label,
        "regression": _values,
        "residue_classification": _residues,
        "masked_lm": _masked_lm,
    }
    return kinds[task](labels, table)


def _classes(labels: Sequence[str], table: pa.Table) -> View:
    probabilities = np.stack([table[f"p_{label}"].to_numpy() for label in labels], axis=1)
    truth, said = _indices(labels, table["target"]), probabilities.argmax(1)
    confidence, wrong = probabilities.max(1), said != truth
    return View(
        residues=_lengths(table),
        error=wrong.astype(float),
        weight=np.ones(len(wrong)),
        error_name="share answered wrong",
        worst=[
            Record(*_named(table, i), labels[truth[i]], labels[said[i]], f"probability {confidence[i]:.3f}")
            for i in _largest(np.where(wrong, confidence, 0.0))
        ],
        confusion=_confusion(truth, said, len(labels)),
        confidence=Confidence(confidence, ~wrong, np.arange(len(wrong))),
    )


def _multi_label(labels: Sequence[str], table: pa.Table) -> View:
    probabilities = np.stack([table[f"p_{label}"].to_numpy() for label in labels], axis=1)
    has = [set(text.split(LIST_JOINER)) for text in table["target"].to_pylist()]
    truth = np.array([[label in own for label in labels] for own in has], dtype=bool).reshape(-1, len(labels))
    said = probabilities >= THRESHOLD
    wrong = (truth != said).sum(1)
    protein = np.repeat(np.arange(len(truth)), len(labels))

    def words(row: np.ndarray) -> str:
        return ", ".join(label for label, chosen in zip(labels, row, strict=True) if chosen) or "none"

    gap = np.where(wrong > 0, np.abs(probabilities - truth).sum(1), 0.0)
    return View(
        residues=_lengths(table),
        error=wrong / len(labels),
        weight=np.ones(len(wrong)),
        error_name="share of labels wrong",
        worst=[
            Record(*_named(table, i), words(truth[i]), words(said[i]), f"{wrong[i]} of {len(labels)} wrong")
            for i in _largest(gap)
        ],
        confusion=Confusion(truth.T.astype(float) @ said, truth.sum(0).astype(float)),
        confidence=Confidence(probabilities.ravel(), truth.ravel(), protein),
    )


def _residues(labels: Sequence[str], table: pa.Table) -> View:
    lengths = _lengths(table)
    columns = [table[f"p_{label}"].combine_chunks() for label in labels]
    flat = [column.flatten().to_numpy(zero_copy_only=False) for column in columns]
    probabilities = np.stack(flat, axis=1).astype(np.float64)
    names = table["target"].combine_chunks().flatten()
    protein = np.repeat(np.arange(len(lengths)), lengths)
    known = ~np.isnan(probabilities[:, 0]) & names.is_valid().to_numpy(zero_copy_only=False)
    probabilities, protein = probabilities[known], protein[known]
    truth, said = _indices(labels, names.filter(pa.array(known))), probabilities.argmax(1)
    wrong, asked = (np.bincount(protein, rows, len(lengths)) for rows in (said != truth, np.ones(len(said))))
    share = wrong / np.maximum(asked, 1)
    return View(
        residues=lengths,
        error=wrong,
        weight=asked,
        error_name="share of residues answered wrong",
        worst=[
            Record(*_named(table, i), f"{asked[i]:.0f} residues", f"{wrong[i]:.0f} wrong", f"{share[i]:.1%}")
            for i in _largest(share)
        ],
        confusion=_confusion(truth, said, len(labels)),
        confidence=Confidence(probabilities.max(1), said == truth, protein),
    )


def _values(_: Sequence[str], table: pa.Table) -> View:
    truth, said = (table[name].to_numpy().astype(np.float64) for name in ("target", "value"))
    gap = np.abs(said - truth)
    return View(
        residues=_lengths(table),
        error=gap,
        weight=np.ones(len(gap)),
        error_name="mean absolute error",
        worst=[
            Record(*_named(table, i), f"{truth[i]:.4g}", f"{said[i]:.4g}", f"{said[i] - truth[i]:+.4g}")
            for i in _largest(gap)
        ],
        values=(truth, said),
    )


def _masked_lm(_: Sequence[str], table: pa.Table) -> View:
    hidden, loss = (table[name].to_numpy().astype(np.float64) for name in ("hidden", "loss"))
    asked = hidden > 0
    mean = np.where(asked, loss, 0.0)
    return View(
        residues=_lengths(table),
        error=mean * hidden,
        weight=hidden,
        error_name="cross entropy of hidden residues (nats)",
        worst=[
            Record(*_named(table, i), f"{hidden[i]:.0f} hidden", "", f"perplexity {np.exp(mean[i]):.3g}")
            for i in _largest(mean)
        ],
        spread=np.exp(mean[asked]),
    )


def _lengths(table: pa.Table) -> np.ndarray:
    return np.asarray(table["residues"].to_numpy()).astype(np.int64)


def _named(table: pa.Table, row: int) -> tuple[str, int]:
    return table["id"][row].as_py(), table["residues"][row].as_py()


def _indices(labels: Sequence[str], names: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """int64 [n]: the class of each name."""
    place = {label: i for i, label in enumerate(labels)}
    return np.array([place[name] for name in names.to_pylist()], dtype=np.int64)


def _confusion(truth: np.ndarray, said: np.ndarray, classes: int) -> Confusion:
    counts = np.bincount(truth * classes + said, minlength=classes**2).reshape(classes, classes).astype(float)
    return Confusion(counts, counts.sum(1))


def _largest(score: np.ndarray) -> list[int]:
    """Rows of the WORST largest scores above 0, the largest first; of equal ones the first."""
    order = np.argsort(-score, kind="stable")[:WORST]
    return [int(i) for i in order if score[i] > 0]
