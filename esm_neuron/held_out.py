"""What a finished run answered to each held-out record: OUT/answers-valid.parquet and OUT/answers-test.parquet.

Columns: `id`, `residues` (before the sequence was cut), `related` (whether a relative was found among the training
rows, where that was looked for), `truth` (but for masked LM), and what `predict` would write, in its order
(`Task.outputs`). `truth` is in the words of the answers: a class, several joined by `;`, a number, or for
classes of residues a list of them with null where nothing is known. Numbers that come one a residue are float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esm_neuron.errors import CheckpointError
from esm_neuron.files import new_file

if TYPE_CHECKING:
    from esm_neuron.data.batch import ExampleTable
    from esm_neuron.tasks import Answers, Column, Task


def save_answers(
    path: Path, task: Task, table: ExampleTable, answers: Answers, related: np.ndarray | None = None
) -> None:
    """Write `as_table` of the same arguments as a Parquet file."""
    found = as_table(task, table, answers, related)
    with new_file(path) as aside:
        pq.write_table(found, aside, compression="zstd")


def as_table(task: Task, table: ExampleTable, answers: Answers, related: np.ndarray | None = None) -> pa.Table:
    """The answers of `evaluate.collect` to a table with labels, a row a record, in the table's order.

    Args:
        related: bool [records]: which records have a relative among the training rows; None: not known.
    """
    _, bounds = table.residue_slots()
    truth = task.truth(table)
    columns = {
        "id": pa.array(list(table.ids), pa.string()),
        "residues": pa.array(np.diff(bounds), pa.int32()),
        **({} if related is None else {"related": pa.array(related, pa.bool_())}),
        **({} if truth is None else {"truth": _array(truth)}),
    }
    outputs = task.outputs(table, answers)
    arrays = [*columns.values(), *map(_array, outputs.values())]
    return pa.table(arrays, names=[*columns, *outputs])


def load_answers(path: Path) -> pa.Table | None:
    """The table that `save_answers` wrote; None where there is none (`log.answers` false, or no rows held out).

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return pq.read_table(path) if path.is_file() else None
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove it, or train again") from error


def _array(column: Column) -> pa.Array:
    if isinstance(column, np.ndarray):
        return pa.array(column)
    if not column or isinstance(column[0], str):
        return pa.array(column, pa.string())
    if column[0].dtype == object:
        return pa.array(column, pa.list_(pa.string()))
    return pa.array([part.astype(np.float32) for part in column], pa.list_(pa.float32()))
