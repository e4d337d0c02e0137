"""The shape of a batch: rows of fixed length that hold several sequences, and the examples they are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import torch

from esm_neuron.config import DataConfig
from esm_neuron.data.labels import UNKNOWN, Labels
from esm_neuron.data.sources import sequence_bytes
from esm_neuron.data.tokenizer import encode_residues
from esm_neuron.data.validation import Problems, Report, quote

PAD_SEGMENT = -1
"""`segment_ids` of padding: belongs to no sequence."""


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
    """What is to be answered, as the task has it; empty where it needs nothing or nothing is known. [records]: int64
    class index, or float64 value; [records, classes] uint8: 1 for each label a row has; of the shape of `tokens`,
    int16: class index of each residue, -1 where it is not known and at specials."""
    ids: Sequence[str]
    """[records] names of the source rows."""
    starts: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int32))
    """int32 [examples, 2]: where in its record's sequence, from 0, the first ceil(n / 2) of an example's n residues
    begin, and where the others do. Empty: each example is its whole record."""
    residues: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """int32 [records]: residues of the record's sequence before it was cut. Empty: as `starts`."""

    @classmethod
    def of(cls, tokens: np.ndarray, offsets: np.ndarray, ids: Sequence[str] | None = None) -> ExampleTable:
        """Return whole proteins without labels, named by their number where `ids` gives no names."""
        n = len(offsets) - 1
        names = [str(number) for number in range(n)] if ids is None else ids
        return cls(tokens, offsets, np.arange(n), np.ones(n, np.float32), np.empty(0), names)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples]: tokens of each example, specials included."""
        return np.diff(self.offsets)

    def tokens_of(self, examples: np.ndarray) -> np.ndarray:
        """int64, shaped as `examples`: tokens of some examples, at the cost of these alone."""
        return self.offsets[examples + 1] - self.offsets[examples]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sequence(self, example: int) -> np.ndarray:
        """uint8 [n]: the tokens of one example."""
        return self.tokens[self.offsets[example] : self.offsets[example + 1]]

    def whole_residues(self) -> np.ndarray:
        """int [records]: residues of each record's sequence before it was cut."""
        return self.residues if len(self.residues) else self.lengths[np.argsort(self.record)] - 2

    def content(self, example: int) -> int:
        """A hash of an example's tokens, 0 to 2^64 - 1: a name that does not depend on the rest of the table."""
        return int.from_bytes(hashlib.blake2b(self.sequence(example).tobytes(), digest_size=8).digest(), "little")

    def residue_slots(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each token belongs among the residues of all records, laid end to end.

        Returns:
            int64 [tokens]: its place, -1 for specials. int64 [records + 1]: record i has the places from the i-th to
            the next of these; those of residues that were cut off are nobody's.
        """
        inner = self.lengths - 2
        starts = self.starts if len(self.starts) else np.stack([np.zeros_like(inner), inner - inner // 2], axis=1)
        bounds = np.concatenate([[0], np.cumsum(self.whole_residues(), dtype=np.int64)])
        example = np.repeat(np.arange(len(self)), self.lengths)
        place = np.arange(len(self.tokens)) - self.offsets[example] - 1
        first = (inner - inner // 2)[example]
        within = np.where(place < first, starts[example, 0] + place, starts[example, 1] + place - first)
        real = (place >= 0) & (place < inner[example])
        return np.where(real, bounds[self.record[example]] + within, -1), bounds


def shifted(table: ExampleTable, tokens: int, records: int) -> ExampleTable:
    """The table behind another one of so many tokens and records: its offsets and records count on."""
    return replace(table, offsets=table.offsets + tokens, record=table.record + records)


def join_tables(tables: Sequence[ExampleTable]) -> ExampleTable:
    """The examples of one or more tables in one, in their order."""
    tokens = np.cumsum([0, *(len(table.tokens) for table in tables)])
    records = np.cumsum([0, *(len(table.ids) for table in tables)])
    moved = [shifted(*where) for where in zip(tables, tokens, records, strict=False)]
    arrays = {
        array.name: np.concatenate([getattr(table, array.name) for table in moved])
        for array in fields(ExampleTable)
        if array.name not in ("offsets", "ids")
    }
    offsets = np.concatenate([*(table.offsets[:-1] for table in moved), tokens[-1:]])
    return ExampleTable(**arrays, offsets=offsets, ids=[name for table in tables for name in table.ids])


def select_records(table: ExampleTable, keep: np.ndarray) -> tuple[ExampleTable, np.ndarray, np.ndarray]:
    """The records of a table where `keep`, bool [records], holds, in their order.

    Returns:
        The table; bool [examples] and bool [tokens]: which of the whole table's are in it.
    """
    examples = keep[table.record]
    tokens = np.repeat(examples, table.lengths)
    labels = table.labels
    if len(labels):  # a record has at least two tokens, so lengths tell what a label belongs to
        labels = labels[tokens if len(labels) == len(table.tokens) else keep]
    kept = ExampleTable(
        tokens=table.tokens[tokens],
        offsets=np.concatenate([[0], np.cumsum(table.lengths[examples])]),
        record=(np.cumsum(keep) - 1)[table.record[examples]],
        weight=table.weight[examples],
        labels=labels,
        ids=[name for name, is_kept in zip(table.ids, keep, strict=True) if is_kept],
        starts=table.starts[examples] if len(table.starts) else table.starts,
        residues=table.residues[keep] if len(table.residues) else table.residues,
    )
    return kept, examples, tokens


@dataclass(frozen=True)
class Target:
    """What a task makes of one example: what the model sees, and what it should answer."""

    tokens: np.ndarray
    """uint8 [n]: the model's input, e.g. with masked residues."""
    label: np.ndarray
    """int64 or float32: one answer a sequence ([], or [classes]), or one a token [n]."""
    weight: np.ndarray
    """float32, a scalar or [n]: 0 where nothing is to be answered; 1 / windows for what a protein is asked once."""


class TargetMaker(Protocol):
    """The part of `tasks.Task` that the loader calls."""

    per_token: ClassVar[bool]

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Return input, label and weight of one example."""
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
    """[R, S, ...], or [R, L, ...] for a task that answers per token; int64 or float32."""
    weights: torch.Tensor
    """float32 [R, S] or [R, L]."""
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


CUTS = ("cropped", "cropped_residues", "windowed", "windows", "unlabelled_residues")
"""Counts of a `Report` that are made with a table."""


def chunk_table(
    rows: pa.Table, source: str, cfg: DataConfig, labels: Labels | None, problems: Problems
) -> tuple[ExampleTable, Report]:
    """Rows that are held at once, tokenized, long sequences cut; and how many were.

    Args:
        rows: see `sources.read_chunks`.
        source: the file they are from.
        cfg: how long sequences are cut.
        labels: makes targets of the rows' encoded labels; None: the table gets none.
        problems: where faults of the rows go; with any, the table is of no use.
    """
    ids = rows["id"].to_pylist()
    text, bounds = sequence_bytes(rows)
    lengths = np.diff(bounds)
    long = np.flatnonzero(lengths > cfg.max_residues)
    if cfg.long_sequences == "refuse":
        for i in long.tolist():
            problems.add(rows["line"][i].as_py(), _too_long(ids[i], int(lengths[i]), cfg.max_residues))
        long = long[:0]
    cuts = {i: cut_starts(int(lengths[i]), cfg) for i in long.tolist()}
    counts = np.ones(len(ids), dtype=np.int64)
    counts[long] = [len(of_record) for of_record in cuts.values()]
    record = np.repeat(np.arange(len(ids), dtype=np.int64), counts)
    starts = np.stack([np.zeros_like(lengths), lengths - lengths // 2], axis=1).astype(np.int32)[record]
    sizes = lengths[record]
    # Most sequences are not long: the text between two long ones is taken as it stands.
    pieces: list[memoryview] = []
    done = 0
    for i, of_record in cuts.items():
        begin = int(bounds[i])
        pieces += [text[done:begin], *_cut(text[begin : bounds[i + 1]], of_record)]
        done = int(bounds[i + 1])
        examples = slice(*np.searchsorted(record, [i, i + 1]))
        starts[examples] = [cut[:2] for cut in of_record]
        sizes[examples] = cfg.max_residues
    tokens, offsets = encode_residues(b"".join([*pieces, text[done:]]), sizes)
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
        report = replace(report, windowed=len(long), windows=int(counts[long].sum()))
    else:
        cropped = int((lengths - cfg.max_residues)[long].sum())
        report = replace(report, cropped=len(long), cropped_residues=cropped)
    if labels is None:
        return table, report
    targets = labels.targets(rows, problems)
    if problems.total or not labels.per_residue:
        return replace(table, labels=targets), report
    report = replace(report, unlabelled_residues=int((targets == UNKNOWN).sum()))
    places, _ = table.residue_slots()  # the labels of residues are cut as their sequence is
    return replace(table, labels=np.where(places >= 0, targets[places], np.int16(UNKNOWN))), report


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


def _cut(text: memoryview, cuts: Iterable[tuple[int, int, int]]) -> Iterator[memoryview]:
    """Give the residues of each of `cut_starts`, in two pieces."""
    for first, second, n in cuts:
        yield text[first : first + n - n // 2]
        yield text[second : second + n // 2]
