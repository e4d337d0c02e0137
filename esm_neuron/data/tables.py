"""From checked rows to an `ExampleTable`: long sequences cut, tokens, labels laid along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from esm_neuron.config import DataConfig, TaskConfig
from esm_neuron.data.batch import ExampleTable
from esm_neuron.data.labels import UNKNOWN, LabelRows, targets
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.data.validate import Problems, Report, quote

CUTS = ("cropped", "cropped_residues", "windowed", "windows", "unlabelled_residues")
"""Counts of a `Report` that are made with a table."""


def chunk_table(
    rows: pa.Table, source: str, cfg: DataConfig, task: TaskConfig | None, problems: Problems
) -> tuple[ExampleTable, Report]:
    """Rows that are held at once, tokenized, long sequences cut; and how many were.

    Args:
        rows: see `sources.read_chunks`.
        source: the file they are from.
        cfg: how long sequences are cut.
        task: with its class names, whose labels are laid along; None: the table gets none.
        problems: where faults of the rows go; with any, the table is of no use.
    """
    columns = rows.to_pydict()
    ids, sequences = columns["id"], columns["sequence"]
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    cuts = [cut_starts(length, cfg) for length in lengths.tolist()]
    counts = np.array([len(cut) for cut in cuts], dtype=np.int64)
    starts = np.array([cut[:2] for of_record in cuts for cut in of_record], dtype=np.int32).reshape(-1, 2)
    long = lengths > cfg.max_residues
    if cfg.long_sequences == "refuse":
        for i in np.flatnonzero(long):
            problems.add(columns["line"][i], _too_long(ids[i], int(lengths[i]), cfg.max_residues))
    tokens, offsets = encode_many([piece for sequence in sequences for piece in cut_sequence(sequence, cfg)])
    record = np.repeat(np.arange(len(ids), dtype=np.int64), counts)
    table = ExampleTable(
        tokens=tokens,
        offsets=offsets,
        record=record,
        weight=(1 / counts[record]).astype(np.float32),
        labels=np.empty(0, dtype=np.int64),
        ids=ids,
        starts=starts,
        residues=lengths.astype(np.int32),
    )
    report = Report(name=source, rows=len(ids))
    if cfg.long_sequences == "window":
        report = replace(report, windowed=int(long.sum()), windows=int(counts[long].sum()))
    else:
        cropped = int((lengths - cfg.max_residues)[long].sum())
        report = replace(report, cropped=int(long.sum()), cropped_residues=cropped)
    if task is None:
        return table, report
    found = targets(task, task.labels or (), LabelRows.of(rows, source, cfg.label_column), problems)
    if problems.total:
        return table, report
    if task.name == "residue_classification":
        report = replace(report, unlabelled_residues=sum(int((row == UNKNOWN).sum()) for row in found))
    return replace(table, labels=_laid(table, task, found)), report


def _laid(table: ExampleTable, task: TaskConfig, found: Sequence[np.ndarray]) -> np.ndarray:
    """`ExampleTable.labels` from each record's own: cut with the sequence where there is one a residue."""
    if task.name != "residue_classification":
        return np.stack(found)
    places, _ = table.residue_slots()
    return np.where(places >= 0, np.concatenate(found)[places], np.int16(UNKNOWN))


def _too_long(name: str, length: int, limit: int) -> str:
    cure = "raise data.max_residues, or choose data.long_sequences=crop, crop_ends or window"
    return f"the sequence of {quote(name)} has {length} residues, more than data.max_residues={limit}; {cure}"


def cut_starts(length: int, cfg: DataConfig) -> list[tuple[int, int, int]]:
    """The examples that a sequence becomes, each as (first, second, n): of its n residues ceil(n / 2) begin at `first`,
    the others at `second`.

    The sequence itself, or where it is longer than `cfg.max_residues` n what `cfg.long_sequences` makes of it: its
    first n residues; its first ceil(n / 2) and last floor(n / 2); or windows of n that share `cfg.window_overlap`
    residues, the last one moved back to end with the sequence.
    """
    n = cfg.max_residues
    if length <= n or cfg.long_sequences == "refuse":
        return [(0, length - length // 2, length)]
    half = n - n // 2
    if cfg.long_sequences == "crop":
        return [(0, half, n)]
    if cfg.long_sequences == "crop_ends":
        return [(0, length - n // 2, n)]
    starts = [*range(0, length - n, n - cfg.window_overlap), length - n]
    return [(start, start + half, n) for start in starts]


def cut_sequence(sequence: str, cfg: DataConfig) -> list[str]:
    """The residues of each of `cut_starts`."""
    cuts = cut_starts(len(sequence), cfg)
    return [sequence[a : a + n - n // 2] + sequence[b : b + n // 2] for a, b, n in cuts]
