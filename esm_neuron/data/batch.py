"""The shape of a batch: rows of fixed length that hold several sequences, and the examples they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch

PAD_SEGMENT = -1
"""`segment_ids` of padding: belongs to no sequence."""

IntArray = np.ndarray
"""An array of integers; its shape and width are said where it is used."""


@dataclass(frozen=True)
class ExampleTable:
    """All examples of a split, tokenized once: one flat array and its offsets, so that 50 million fit in a memory map.

    An example is a whole protein or, with `data.long_sequences: window`, one window of it.
    """

    tokens: np.ndarray
    """uint8 [total tokens]: <cls>, residues and <eos> of every example, end to end."""
    offsets: np.ndarray
    """int64 [examples + 1]: example i is `tokens[offsets[i]:offsets[i + 1]]`."""
    record: np.ndarray
    """int64 [examples]: the row of the source (index into `ids`) that an example comes from."""
    weight: np.ndarray
    """float32 [examples]: 1, or 1 / windows of its protein, so that each protein counts once."""
    labels: np.ndarray
    """[records] task-defined target of each source row (int64 class index); empty where the task needs none."""
    ids: Sequence[str]
    """[records] names of the source rows."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples]: tokens of each example, specials included."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sequence(self, example: int) -> np.ndarray:
        """uint8 [n]: the tokens of one example."""
        return self.tokens[self.offsets[example] : self.offsets[example + 1]]


def shifted(table: ExampleTable, tokens: int, records: int) -> ExampleTable:
    """The table behind another one of so many tokens and records: its offsets and records count on."""
    return replace(table, offsets=table.offsets + tokens, record=table.record + records)


def join_tables(tables: Sequence[ExampleTable]) -> ExampleTable:
    """The examples of one or more tables in one, in their order."""
    tokens = np.cumsum([0, *(len(table.tokens) for table in tables)])
    records = np.cumsum([0, *(len(table.ids) for table in tables)])
    moved = [shifted(*where) for where in zip(tables, tokens, records, strict=False)]
    arrays = {
        field.name: np.concatenate([getattr(table, field.name) for table in moved])
        for field in fields(ExampleTable)
        if field.name not in ("offsets", "ids")
    }
    offsets = np.concatenate([*(table.offsets[:-1] for table in moved), tokens[-1:]])
    return ExampleTable(**arrays, offsets=offsets, ids=[name for table in tables for name in table.ids])


@dataclass(frozen=True)
class Target:
    """What a task makes of one example: what the model sees, and what it should answer."""

    tokens: np.ndarray
    """uint8 [n]: the model's input, e.g. with masked residues."""
    label: np.ndarray
    """int64 or float32: a scalar (one answer a sequence) or [n] (one a token)."""
    weight: np.ndarray
    """float32, a scalar or [n]: 0 where nothing is to be answered; 1 / windows for what a protein is asked once."""


class TargetMaker(Protocol):
    """The part of a task that the loader calls, see `tasks.Task`."""

    per_token: bool

    def target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Input, label and weight of one example; `rng` is seeded by (seed, epoch, example)."""
        ...


@dataclass(frozen=True)
class Batch:
    """R rows of L tokens with at most S segments each. All tensors but `members` travel to the device.

    Filler rows (in a short last batch) and empty segments carry weight 0, so shapes never change and sums stay exact.
    """

    input_ids: torch.Tensor
    """int64 [R, L]."""
    segment_ids: torch.Tensor
    """int64 [R, L]: 0..S-1 in order, PAD_SEGMENT for padding."""
    positions: torch.Tensor
    """int64 [R, L]: position within the segment, from 0."""
    labels: torch.Tensor
    """[R, S], or [R, L] for a task that answers per token."""
    weights: torch.Tensor
    """float32, of the shape of `labels`."""
    members: np.ndarray
    """int64 [R, S]: which example fills a segment, -1 for none. Host only."""
    max_segments: int
    """S."""

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on `device`."""
        moved: dict[str, Any] = {n: t.to(device, non_blocking=True) for n, t in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What travels to the device, by field; every tensor's dimension 0 is R."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
