"""Examples and batches: a split's proteins as one flat table of tokens, and the tensors that packs of them become."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import DataConfig
from esm_neuron.config.deferred import module
from esm_neuron.data.labels import UNKNOWN, Labels
from esm_neuron.data.sources import text_bytes
from esm_neuron.data.tokenizer import BREAK, encode_residues
from esm_neuron.data.validation import Problems, quote
from esm_neuron.files import open_new, read_json, write_json

if TYPE_CHECKING:
    import torch
else:
    torch = module("torch")

PAD_SEGMENT = -1
"""`segment_ids` of padding: belongs to no sequence."""
_IDS = pa.schema([("id", pa.large_string())])


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
    """int64 [examples]: the protein that an example comes from, as an index into `ids`."""
    weight: np.ndarray
    """float32 [examples]: 1, or 1 / windows of its protein, so that each protein counts once."""
    labels: np.ndarray
    """Targets as the task has them; empty where there are none. [records]: int64 class index, or float64 value;
    [records, classes] uint8: 1 for each label of a protein; of the shape of `tokens`, int16: class index of each
    residue, -1 where it is not known and at specials."""
    ids: Sequence[str]
    """[records]: names of the proteins."""
    starts: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int32))
    """int32 [examples, 2]: where in its protein, from 0, the first ceil(n / 2) of an example's n residues begin, and
    where the others do. Empty: each example is its whole protein."""
    residues: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """int32 [records]: residues of a protein before it was cut. Empty: as `starts`."""

    @classmethod
    def of(cls, tokens: np.ndarray, offsets: np.ndarray, ids: Sequence[str] | None = None) -> ExampleTable:
        """Return whole proteins without labels, named by their number where `ids` gives no names."""
        n = len(offsets) - 1
        names = [str(number) for number in range(n)] if ids is None else ids
        return cls(tokens, offsets, np.arange(n), np.ones(n, np.float32), np.empty(0), names)

    @property
    def lengths(self) -> np.ndarray:
        """Return int64 [examples]: tokens of each example, specials included."""
        return np.diff(self.offsets)

    def tokens_of(self, examples: np.ndarray) -> np.ndarray:
        """Return the tokens of some examples, int64 in the shape of `examples`, without counting all of them."""
        return self.offsets[examples + 1] - self.offsets[examples]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sequence(self, example: int) -> np.ndarray:
        """Return the tokens of one example, uint8 [n]."""
        return self.tokens[self.offsets[example] : self.offsets[example + 1]]

    def whole_residues(self) -> np.ndarray:
        """Return the residues of each protein before it was cut, int [records]."""
        return self.residues if len(self.residues) else self.lengths[np.argsort(self.record)] - 2

    def content(self, example: int) -> int:
        """Return a hash of an example's tokens, 0 to 2^64 - 1: a name that does not depend on the rest of the table."""
        return int.from_bytes(hashlib.blake2b(self.sequence(example).tobytes(), digest_size=8).digest(), "little")

    def digest(self) -> str:
        """Return a hash of what the model sees of each protein, in hexadecimal."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.offsets, self.record, self.starts):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def residue_slots(self) -> tuple[np.ndarray, np.ndarray]:
        """Return where each token belongs among the residues of all proteins, laid end to end.

        Returns:
            int64 [tokens]: its slot, -1 for specials.
            int64 [records + 1]: protein i has the slots from the i-th to the next of these, cut residues included.
        """
        inner = self.lengths - 2
        starts = self.starts if len(self.starts) else np.stack([np.zeros_like(inner), inner - inner // 2], axis=1)
        bounds = np.concatenate([[0], np.cumsum(self.whole_residues(), dtype=np.int64)])
        example = np.repeat(np.arange(len(self)), self.lengths)
        place = np.arange(len(self.tokens)) - self.offsets[example] - 1
        # A cut example shows two stretches of its protein: its first half lies from starts[:, 0] on, the rest from
        # starts[:, 1].
        first = (inner - inner // 2)[example]
        within = np.where(place < first, starts[example, 0] + place, starts[example, 1] + place - first)
        real = (place >= 0) & (place < inner[example])
        return np.where(real, bounds[self.record[example]] + within, -1), bounds


_ARRAYS = tuple(array.name for array in fields(ExampleTable) if array.name != "ids")


class TableWriter:
    """Join tables of one kind as they come, in memory or in files that begin with `stem`, such as `folder/train`."""

    def __init__(self, stem: Path | None = None) -> None:
        self._stem = stem
        # Both kinds of file grow in place: the tokens of a corpus are never held twice.
        self._files: dict[str, Any] = {
            name: io.BytesIO() if stem is None else open_new(_file(stem, name), "wb") for name in _ARRAYS
        }
        self._types: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._ids: list[str] = []
        self._id_file = None if stem is None else pa.ipc.new_file(_file(stem, "ids"), _IDS)
        self._tokens = self._records = 0

    def add(self, table: ExampleTable) -> None:
        """Put the examples of a table behind those that are there."""
        moved = replace(table, offsets=table.offsets + self._tokens, record=table.record + self._records)
        arrays = {name: np.ascontiguousarray(getattr(moved, name)) for name in _ARRAYS}
        types = {name: (array.dtype.str, array.shape[1:]) for name, array in arrays.items()}
        if self._types:
            # The first offset of a later table is the last one of those before it.
            arrays["offsets"] = arrays["offsets"][1:]
            if types != self._types:
                raise ValueError(f"tables of two kinds cannot be joined: {self._types} and {types}")
        self._types = types
        for name, array in arrays.items():
            self._files[name].write(array.data)
        if self._id_file is None:
            self._ids += table.ids
        else:
            self._id_file.write_table(pa.table({"id": list(table.ids)}, schema=_IDS))
        self._tokens += len(table.tokens)
        self._records += len(table.ids)

    def table(self) -> ExampleTable:
        """Return all examples, mapped where they are in files; nothing can be added after."""
        if self._stem is None:
            arrays = {
                name: np.frombuffer(self._files[name].getbuffer(), kind).reshape(-1, *shape)
                for name, (kind, shape) in self._types.items()
            }
            return ExampleTable(**arrays, ids=self._ids)
        for file in (self._id_file, *self._files.values()):
            file.close()
        write_json(_file(self._stem, "types"), self._types)
        return open_table(self._stem)


class MappedNames(Sequence[str]):
    """Ids in a file that is mapped, read one at a time or in order."""

    def __init__(self, path: Path) -> None:
        self._column = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["id"]

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int | slice) -> Any:
        found = self._column[index]
        return found.to_pylist() if isinstance(index, slice) else found.as_py()

    def __iter__(self) -> Iterator[str]:
        return (name for chunk in self._column.chunks for name in chunk.to_pylist())


def open_table(stem: Path) -> ExampleTable:
    """Return the table that a `TableWriter` has put in files, mapped."""
    arrays = {}
    for name, (kind, shape) in read_json(_file(stem, "types")).items():
        path = _file(stem, name)
        flat = np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)  # an empty file is not mapped
        arrays[name] = flat.reshape(-1, *shape)
    return ExampleTable(**arrays, ids=MappedNames(_file(stem, "ids")))


def _file(stem: Path, name: str) -> Path:
    return stem.with_name(f"{stem.name}.{name}")


def join_tables(tables: Iterable[ExampleTable]) -> ExampleTable:
    """Return the examples of one or more tables in one, in their order."""
    writer = TableWriter()
    for table in tables:
        writer.add(table)
    return writer.table()


def select_records(table: ExampleTable, keep: np.ndarray) -> tuple[ExampleTable, np.ndarray, np.ndarray]:
    """Return the proteins of a table where `keep`, bool [records], holds, in their order.

    With it come bool [examples] and bool [tokens]: which of the whole table's are in it.
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


def chunk_table(
    rows: pa.Table, cfg: DataConfig, labels: Labels | None, problems: Problems
) -> tuple[ExampleTable, Counter[str]]:
    """Return the rows tokenized, long sequences cut, with targets of their encoded labels; and counts of a `Report`.

    Faults of the rows go to `problems`; with any, the table is of no use.
    """
    ids = rows["id"].to_pylist()
    text, bounds = text_bytes(rows)
    lengths, limit = np.diff(bounds), cfg.max_residues
    long = np.flatnonzero(lengths > limit)
    if cfg.long_sequences == "refuse":
        _refuse(long, lengths, rows, limit, problems)
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
        own = text[bounds[i] : bounds[i + 1]]
        pieces.append(text[done : bounds[i]])
        for first, second, n in of_record:
            pieces += [own[first : first + n - n // 2], own[second : second + n // 2]]
        done = int(bounds[i + 1])
        examples = slice(*np.searchsorted(record, [i, i + 1]))
        starts[examples] = [cut[:2] for cut in of_record]
        sizes[examples] = limit
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
    report = Counter(rows=len(ids))
    if cfg.long_sequences == "window":
        report.update(windowed=len(long), windows=int(counts[long].sum()))
    else:
        report.update(cropped=len(long), cropped_residues=int((lengths - limit)[long].sum()))
    return (table if labels is None else _labelled(table, labels, rows, problems, report)), report


def _refuse(long: np.ndarray, lengths: np.ndarray, rows: pa.Table, limit: int, problems: Problems) -> None:
    for i in long.tolist():
        what = f"the sequence of {quote(rows['id'][i].as_py())} has {lengths[i]} residues, more than data.max_residues"
        cure = "raise data.max_residues, or choose data.long_sequences=crop, crop_ends or window"
        problems.add(rows["line"][i].as_py(), f"{what}={limit}; {cure}")


def _labelled(
    table: ExampleTable, labels: Labels, rows: pa.Table, problems: Problems, report: Counter[str]
) -> ExampleTable:
    targets = labels.targets(rows, problems)
    if problems.total or not labels.per_residue:
        return replace(table, labels=targets)
    joints = pc.sum(pc.count_substring(rows["sequence"], BREAK)).as_py() or 0  # between chains, which are no residues
    report.update(unlabelled_residues=int((targets == UNKNOWN).sum()) - joints)
    places, _ = table.residue_slots()  # the labels of residues are cut as their sequence is
    return replace(table, labels=np.where(places >= 0, targets[places], np.int16(UNKNOWN)))


def cut_starts(length: int, cfg: DataConfig) -> list[tuple[int, int, int]]:
    """Return the examples that a sequence becomes, each as (first, second, n): ceil(n / 2) of its residues begin at
    `first`, the others at `second`.

    Where it is longer than n = `cfg.max_residues`, `cfg.long_sequences` decides: its first n residues; its first
    ceil(n / 2) and last floor(n / 2); or windows of n that share `cfg.window_overlap` residues, the last one moved back
    to end with the sequence.
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


@dataclass(frozen=True)
class Target:
    """What a task makes of one example: what the model sees, and what it should predict."""

    tokens: np.ndarray
    """uint8 [n]: the model's input, e.g. with masked residues."""
    label: np.ndarray
    """int64 or float32: one target per sequence ([], or [classes]), or one per token [n]."""
    weight: np.ndarray
    """float32, a scalar or [n]: 0 where there is no target; 1 / windows for a target per protein."""


class TargetMaker(Protocol):
    """The part of `tasks.Task` that the loader calls."""

    per_token: ClassVar[bool]

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Return input, label and weight of one example in training."""
        ...

    def evaluation_target(self, table: ExampleTable, example: int) -> Target:
        """Return the same in an evaluation, by its tokens alone."""
        ...


@dataclass(frozen=True)
class Batch:
    """R packs of L tokens with at most S segments each. All tensors but `members` travel to the device.

    Filler packs (in a short last batch) and empty segments carry weight 0, so shapes never change and sums stay exact.
    """

    input_ids: torch.Tensor
    """int64 [R, L]."""
    segment_ids: torch.Tensor
    """int64 [R, L]: 0..S-1 in order, PAD_SEGMENT for padding."""
    positions: torch.Tensor
    """int64 [R, L]: position within the segment, from 0."""
    labels: torch.Tensor
    """[R, S, ...], or [R, L, ...] for a task with a target per token; int64 or float32."""
    weights: torch.Tensor
    """float32 [R, S] or [R, L]."""
    members: np.ndarray
    """int64 [R, S]: which example fills a segment, -1 for none. Host only."""
    max_segments: int
    """S."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch with every tensor on `device`."""
        moved: dict[str, Any] = {n: t.to(device, non_blocking=True) for n, t in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what travels to the device, by field; every tensor's dimension 0 is R."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def signature(self) -> dict[str, str]:
        """Return by field what a compiled graph depends on: shape and type of a tensor, or a value."""
        return {f.name: _describe(getattr(self, f.name)) for f in fields(self) if f.name != "members"}


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{' x '.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
    return str(value)
