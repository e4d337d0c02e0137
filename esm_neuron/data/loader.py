"""From plan to batches: any optimizer step of any rank can be asked for directly, so a resumed run jumps to its step.

Nothing is remembered between steps but the plan of one epoch. The rows of a step do not depend on how many devices
share them nor on how many passes they take, and an example's randomness does not depend on its neighbours.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch

from esm_neuron.config import TrainConfig
from esm_neuron.data.dataset import PAD_SEGMENT, Batch, ExampleTable, TargetMaker
from esm_neuron.data.packing import EpochPlan, attention_cost, bucket_candidates, choose_buckets, plan_epoch
from esm_neuron.data.tokenizer import PAD
from esm_neuron.errors import ConfigError

SPECIALS = 2
"""Tokens of an example that are no residues: <cls> and <eos>."""

_EVALUATION = -1
"""Stands for the epoch in the seeds of evaluation."""

T = TypeVar("T")


@dataclass(frozen=True)
class StepData:
    """One rank's share of an optimizer step."""

    step: int
    """Optimizer step from 0, over all epochs."""
    batches: list[Batch]
    """One batch for each accumulated pass."""
    residues: int
    """Residues in the batches of all ranks, specials left out."""


def select_row_lengths(cfg: TrainConfig, lengths: np.ndarray, hidden_size: int) -> tuple[int, ...]:
    """The row lengths of a run: `data.pack_tokens`, and with `data.max_buckets` > 1 shorter ones that pay.

    Args:
        cfg: the run's configuration.
        lengths: integers [examples]: tokens of each training example, specials included.
        hidden_size: width of the model; the wider, the less attention weighs and the less a short row saves.

    Returns:
        Row lengths in tokens, ascending; the last is `data.pack_tokens`.

    Raises:
        DataError: there is no example, or one does not fit a row.
    """
    if cfg.data.max_buckets == 1:
        return (cfg.data.pack_tokens,)
    return choose_buckets(
        lengths,
        bucket_candidates(cfg.data.pack_tokens),
        cfg.data.max_buckets,
        _segments(cfg),
        attention_cost(hidden_size),
        cfg.loop.packs_per_step,
    )


def training_plan(cfg: TrainConfig, lengths: np.ndarray, row_lengths: Sequence[int], epoch: int = 0) -> EpochPlan:
    """The optimizer steps of an epoch over all devices, a function of the configuration and the lengths alone.

    Args:
        cfg: the run's configuration.
        lengths: integers [examples]: tokens of each example, specials included.
        row_lengths: row lengths in tokens, see `select_row_lengths`.
        epoch: counted from 0.

    Raises:
        DataError: there is no example, or one does not fit a row.
    """
    rows, rng = cfg.loop.packs_per_step, _rng(cfg.seed, epoch)
    return plan_epoch(lengths, row_lengths, _segments(cfg), rows, rng)


def evaluation_plan(cfg: TrainConfig, lengths: np.ndarray, row_lengths: Sequence[int], devices: int = 1) -> EpochPlan:
    """The passes of an evaluation over `devices` data-parallel devices; otherwise as `training_plan`."""
    rows, rng = cfg.loop.eval_packs_per_device * devices, _rng(cfg.seed, _EVALUATION)
    return plan_epoch(lengths, row_lengths, _segments(cfg), rows, rng)


class TrainLoader:
    """The training batches of one data-parallel rank, by optimizer step.

    A step of a bucket shorter than `data.pack_tokens` has `data.pack_tokens // length` times the rows, so that all steps
    hold about the same number of tokens. A bucket's last step of an epoch is filled up with rows of weight 0.

    Args:
        table: the training examples.
        task: makes inputs and targets.
        cfg: the run's configuration.
        dp: data-parallel degree.
        dp_rank: this process's place among them, 0 to dp - 1.
        local_dp: devices over which this process spreads the rows of a batch (`Backend.local_dp`).
        static_shapes: True: every batch of a bucket has one shape. False: filler rows and the columns that are padding
            in every row are left out of a batch, which is less work where a new shape costs nothing.
        row_lengths: row lengths in tokens, such as `select_row_lengths` gives; None: `data.pack_tokens` alone.

    Raises:
        ConfigError: `loop.packs_per_step` is not a multiple of `loop.packs_per_device` times `dp` times `local_dp`.
        DataError: there is no example, or one does not fit a row.
    """

    def __init__(
        self,
        table: ExampleTable,
        task: TargetMaker,
        cfg: TrainConfig,
        dp: int = 1,
        dp_rank: int = 0,
        *,
        local_dp: int = 1,
        static_shapes: bool = True,
        row_lengths: Sequence[int] | None = None,
    ) -> None:
        self.table = table
        """The training examples."""
        self.passes = accumulated_passes(cfg, dp * local_dp)
        """Forward passes of this rank in one optimizer step."""
        self._cfg, self._dp, self._dp_rank = cfg, dp, dp_rank
        self._lengths = table.lengths.astype(np.int32)
        chosen = (cfg.data.pack_tokens,) if row_lengths is None else row_lengths
        self.row_lengths: tuple[int, ...] = tuple(sorted(chosen))
        """Row lengths in tokens, ascending."""
        self._collator = _Collator(table, task, _segments(cfg), cfg.seed, static_shapes)
        self._planned = (0, self._plan(0))
        self.steps_per_epoch: int = len(self._planned[1])
        """Optimizer steps in one pass over the examples, the same in every epoch."""
        batches = None if static_shapes else self.passes * dp
        self.padding_efficiency: float = self._planned[1].efficiency(self._lengths, batches)
        """Share of the slots computed in an epoch that hold tokens."""

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of a run: `max_steps`, or else those of `epochs` passes, at least 1."""
        return total_steps(self.steps_per_epoch, epochs, max_steps)

    def batches(self, step: int) -> list[Batch]:
        """The accumulated passes of this rank in optimizer step `step`, counted from 0 over all epochs."""
        return self.load(step).batches

    def load(self, step: int) -> StepData:
        """`batches` with what they hold, made in one go: `prefetch(map(loader.load, range(first, last)), 2)`."""
        epoch, local = divmod(step, self.steps_per_epoch)
        pack_tokens, rows = self.plan(epoch).step(local)
        count = len(rows) // self.passes
        # Pass by pass, then rank by rank: two passes of one rank hold what one pass of each of two ranks holds.
        share = [_share(rows[n * count : (n + 1) * count], self._dp, self._dp_rank) for n in range(self.passes)]
        batches = [self._collator(part, pack_tokens, epoch) for part in share]
        return StepData(step, batches, self._residues(rows))

    def record_ids(self, step: int) -> list[str]:
        """Names of the records, over all ranks, that optimizer step `step` learns from."""
        epoch, local = divmod(step, self.steps_per_epoch)
        _, rows = self.plan(epoch).step(local)
        records = self.table.record[np.concatenate(rows)]
        return [self.table.ids[record] for record in dict.fromkeys(records.tolist())]

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of `epoch`, made from (seed, epoch) alone; the last one asked for is kept."""
        known, plan = self._planned
        if known != epoch:
            plan = self._plan(epoch)
            self._planned = (epoch, plan)
        return plan

    def first_steps(self, total: int) -> list[int]:
        """The first step of each bucket that a run of `total` steps meets: together they need all its programs."""
        return self.plan(0).first_steps(total)

    def _plan(self, epoch: int) -> EpochPlan:
        return training_plan(self._cfg, self._lengths, self.row_lengths, epoch)

    def _residues(self, rows: Sequence[np.ndarray]) -> int:
        members = np.concatenate(rows)
        return int(self._lengths[members].sum()) - SPECIALS * len(members)


class EvalLoader:
    """One rank's batches that together, over all ranks, hold every example exactly once.

    Every rank gives the same number of batches, filled up with rows of weight 0. The plan depends on the seed and the
    table alone, an example's randomness on the seed and its tokens. Can be iterated any number of times.

    Args:
        table, task, cfg, dp, dp_rank, local_dp, static_shapes: as for `TrainLoader`.
        row_lengths: as for `TrainLoader`.

    Raises:
        DataError: there is no example, or one does not fit a row.
    """

    def __init__(
        self,
        table: ExampleTable,
        task: TargetMaker,
        cfg: TrainConfig,
        dp: int = 1,
        dp_rank: int = 0,
        *,
        local_dp: int = 1,
        static_shapes: bool = True,
        row_lengths: Sequence[int] | None = None,
    ) -> None:
        lengths = table.lengths.astype(np.int32)
        self.table = table
        """The examples that are given."""
        self._dp, self._dp_rank = dp, dp_rank
        self._collator = _Collator(table, task, _segments(cfg), cfg.seed, static_shapes)
        chosen = (cfg.data.pack_tokens,) if row_lengths is None else row_lengths
        self._plan = evaluation_plan(cfg, lengths, chosen, dp * local_dp)
        self.row_lengths: tuple[int, ...] = tuple(sorted(self._plan.step(step)[0] for step in self._plan.first_steps()))
        """Tokens of the rows that its batches have."""

    def __len__(self) -> int:
        """Batches of this rank, the same on every rank."""
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches in order."""
        return map(self._batch, range(len(self)))

    def first_batches(self) -> Iterator[Batch]:
        """The first batch of each bucket: together they need all programs of the evaluation."""
        return map(self._batch, self._plan.first_steps())

    def _batch(self, step: int) -> Batch:
        pack_tokens, rows = self._plan.step(step)
        return self._collator(_share(rows, self._dp, self._dp_rank), pack_tokens, _EVALUATION)


class _Collator:
    """Lays the examples of some rows into tensors."""

    def __init__(self, table: ExampleTable, task: TargetMaker, segments: int, seed: int, static_shapes: bool) -> None:
        self._table, self._task, self._segments, self._seed = table, task, segments, seed
        self._static_shapes = static_shapes
        # A batch of filler rows alone must have the labels' type and shape of all others: learnt from an example.
        label = np.asarray(task.example_target(table, 0, _rng(seed, _EVALUATION, 0)).label)
        self._label_type, self._label_shape = label.dtype, label.shape[1:] if task.per_token else label.shape

    def __call__(self, rows: Sequence[np.ndarray], pack_tokens: int, epoch: int) -> Batch:
        """Rows of examples, filler rows last, as a batch; `epoch` seeds the examples' randomness."""
        if not self._static_shapes:
            rows = [row for row in rows if len(row)] or rows[:1]
        size = (len(rows), pack_tokens)
        predictions = size if self._task.per_token else (len(rows), self._segments)
        input_ids = np.full(size, PAD, np.int64)
        segment_ids = np.full(size, PAD_SEGMENT, np.int64)
        positions = np.zeros(size, np.int64)
        labels = np.zeros((*predictions, *self._label_shape), self._label_type)
        weights = np.zeros(predictions, np.float32)
        members = np.full((len(rows), self._segments), -1, np.int64)
        count = np.arange(pack_tokens)
        longest = 1
        for r, row in enumerate(rows):
            members[r, : len(row)] = row
            end = 0
            for s, example in enumerate(row.tolist()):
                # a protein is evaluated alike whatever shares its file, piece or request
                name = self._table.content(example) if epoch == _EVALUATION else example
                target = self._task.example_target(self._table, example, _rng(self._seed, epoch, name))
                start, end = end, end + len(target.tokens)
                input_ids[r, start:end] = target.tokens
                segment_ids[r, start:end] = s
                positions[r, start:end] = count[: end - start]
                answer = slice(start, end) if self._task.per_token else s
                labels[r, answer] = target.label
                weights[r, answer] = target.weight
            longest = max(longest, end)
        width = pack_tokens if self._static_shapes else longest
        answered = width if self._task.per_token else self._segments
        return Batch(
            input_ids=_tensor(input_ids, width),
            segment_ids=_tensor(segment_ids, width),
            positions=_tensor(positions, width),
            labels=_tensor(labels, answered),
            weights=_tensor(weights, answered),
            members=members,
            max_segments=self._segments,
        )


def prefetch(iterable: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items of `iterable`, made ahead by a thread: the same items in the same order.

    Args:
        iterable: consumed in the thread from the first item asked for.
        depth: most items made and not yet taken, at least 1.

    Raises:
        ValueError: `depth` is below 1.
        Exception: whatever `iterable` raises, at the place of the item that it failed to give.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} is below 1: nothing could ever be made; use 2")
    room = threading.Semaphore(depth)
    ready: SimpleQueue[tuple[list[T], BaseException | None]] = SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        try:
            source = iter(iterable)
            while room.acquire() and not stopped.is_set():
                ready.put(([next(source)], None))
        except BaseException as error:  # the consumer raises it: StopIteration is the end, all else a failure
            ready.put(([], error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            made, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield from made
    finally:
        stopped.set()
        room.release()
        thread.join()


def total_steps(steps_per_epoch: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run, see `TrainLoader.total_steps`."""
    return max_steps if max_steps is not None else max(1, math.ceil(epochs * steps_per_epoch))


def accumulated_passes(cfg: TrainConfig, dp: int) -> int:
    """Forward passes in an optimizer step of each of `dp` data-parallel devices.

    Raises:
        ConfigError: `loop.packs_per_step` does not give each of them the same number.
    """
    rows, per_device = cfg.loop.packs_per_step, cfg.loop.packs_per_device
    unit = per_device * dp
    if rows % unit:
        below, above = rows // unit * unit, (rows // unit + 1) * unit
        cure = f"{below} or {above}" if below else f"{above}, or fewer rows per device"
        raise ConfigError(
            f"loop.packs_per_step={rows} is not a multiple of {unit} (loop.packs_per_device={per_device} on {dp} "
            f"data-parallel ranks); use loop.packs_per_step={cure}"
        )
    return rows // unit


def _segments(cfg: TrainConfig) -> int:
    return cfg.data.max_segments if cfg.data.packing else 1


def _share(rows: Sequence[np.ndarray], dp: int, dp_rank: int) -> Sequence[np.ndarray]:
    """The rows of one rank: equal runs in rank order."""
    count = len(rows) // dp
    return rows[dp_rank * count : (dp_rank + 1) * count]


def _rng(seed: int, epoch: int, *example: int) -> np.random.Generator:
    """The generator of a plan (no example) or of one example; evaluation counts as epoch -1."""
    # numpy seeds [a, b] and [a, b, 0] alike, so examples count from 1 here.
    return np.random.default_rng([seed % 2**64, epoch + 1, *(number + 1 for number in example)])


def _tensor(array: np.ndarray, width: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array[:, :width]))
