"""Answers record by record: a file of proteins in, packed forward passes, a row for each record out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from esm_neuron.agreement import agree, agree_on_main
from esm_neuron.answers.opened import Opened
from esm_neuron.answers.parts import Answers
from esm_neuron.answers.stream import Advance, Piece, read_once, stream
from esm_neuron.backends import opened_backend
from esm_neuron.backends.base import Backend
from esm_neuron.build import Built, ModelMaker
from esm_neuron.config import TrainConfig
from esm_neuron.data.batch import ExampleTable, TargetMaker
from esm_neuron.data.loader import EvalLoader
from esm_neuron.data.splits import InputChunks
from esm_neuron.data.validate import Rejected, save_rejected
from esm_neuron.evaluate import Asks, collect_here

BATCHES = 32
"""Batches that a piece fills, about: the last one is half empty on average, which costs 1 / 64 of the work."""


class Asking(ModelMaker, TargetMaker, Asks, Protocol):
    """The part of a task that answers need."""


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """What a command does with the records of a file."""

    command: str
    options: Mapping[str, Any]
    """What decides its answers besides model and settings, in JSON's types."""
    task: Asking
    model: Callable[[Built], nn.Module]
    """Makes the network to be asked of the one that was built."""
    write: Callable[[ExampleTable, Sequence[np.ndarray]], Answers]
    """(records, what `collect_here` has found for them) -> their rows."""
    batches: int = BATCHES
    """How many a piece fills."""


def answer_file(
    opened: Opened, answerer: Answerer, source: Path, target: Path, resume: bool, say: Callable[[str], None]
) -> int:
    """Answer every record of `source` and write `target`; returns the records written, see `predict` and `embed`."""
    cfg = opened.cfg
    with opened_backend(cfg) as backend:
        say = say if backend.topology.is_main else say_nothing
        inputs = InputChunks(source, cfg.data)
        tokens = piece_tokens(cfg, backend, answerer.batches)

        def pieces() -> Iterator[Piece[ExampleTable]]:
            return table_pieces(inputs, tokens)

        survey = read_once(backend, pieces)
        rejected = tuple(inputs.rejected)
        say(inputs.report.summary())
        built = agree(backend, lambda: opened.build(answerer.task, backend))
        model = answerer.model(built)

        def answer(table: ExampleTable, advance: Advance) -> Answers:
            return answerer.write(table, answer_table(model, answerer.task, backend, cfg, table, advance))

        identity = opened.identity(built, command=answerer.command, piece_tokens=tokens, **answerer.options)
        written = stream(backend, target, survey, identity, pieces, answer, resume, say)
        write_rejected(backend, target, rejected, say)
        return written


def write_rejected(backend: Backend, target: Path, rows: Sequence[Rejected], say: Callable[[str], None]) -> None:
    """Write the rows that were left out or changed beside `target`; where there are none, remove an older file."""
    path = target.with_name(f"{target.name}.rejected.tsv")
    agree_on_main(backend, lambda: save_rejected(path, rows))
    if rows:
        say(f"the {len(rows)} rows left out or changed are in {path}")


def say_nothing(_: str) -> None:
    """What every rank but the main one prints."""


def piece_tokens(cfg: TrainConfig, backend: Backend, batches: int = BATCHES) -> int:
    """Tokens that a piece of `batches` batches holds at most."""
    return batches * cfg.loop.eval_rows_per_device * backend.local_dp * cfg.data.row_tokens


def answer_table(
    model: nn.Module, task: Asking, backend: Backend, cfg: TrainConfig, table: ExampleTable, advance: Advance
) -> list[np.ndarray]:
    """The task's answers to a table by this rank alone, see `evaluate.collect_here`."""
    loader = EvalLoader(table, task, cfg, local_dp=backend.local_dp, static_shapes=backend.static_shapes)
    return collect_here(model, task, backend, loader, advance)


def table_pieces(tables: Iterable[ExampleTable], tokens: int) -> Iterator[Piece[ExampleTable]]:
    """Tables of whole records with at most `tokens` tokens, or one record, from larger ones; labels are left out.

    Residues that were cut off count too, for answers may have a row for them.
    """
    for table in tables:
        shown = np.bincount(table.record, table.lengths, len(table.ids))
        ends = np.cumsum(np.maximum(shown, table.residues))
        first = 0
        while first < len(table.ids):
            begin = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, begin + tokens, side="right")))
            part = _records(table, first, last)
            yield Piece(part, len(part.tokens), _digest(part))
            first = last


def _records(table: ExampleTable, first: int, last: int) -> ExampleTable:
    """The examples of records `first` to `last` - 1 as a table of their own."""
    low, high = np.searchsorted(table.record, (first, last))
    offsets = table.offsets[low : high + 1]
    return ExampleTable(
        tokens=table.tokens[offsets[0] : offsets[-1]],
        offsets=offsets - offsets[0],
        record=table.record[low:high] - first,
        weight=table.weight[low:high],
        labels=table.labels[:0],
        ids=table.ids[first:last],
        starts=table.starts[low:high],
        residues=table.residues[first:last],
    )


def _digest(table: ExampleTable) -> bytes:
    digest = hashlib.sha256(repr(list(table.ids)).encode())
    for array in (table.tokens, table.offsets, table.record, table.starts, table.residues):
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
