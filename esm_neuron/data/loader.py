"""From plan to batches: any optimizer step of any rank can be asked for directly, so a resumed run jumps to its step.

Nothing is remembered between steps but the plan of one epoch. The packs of a step do not depend on how many devices
share them nor on how many passes they take, and an example's randomness does not depend on its neighbours.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from esm_neuron.config import LoopConfig, TrainConfig
from esm_neuron.config.deferred import module
from esm_neuron.config.rules import accumulated_passes
from esm_neuron.data.dataset import PAD_SEGMENT, Batch, ExampleTable, TargetMaker
from esm_neuron.data.packing import EpochPlan, plan_epoch
from esm_neuron.data.progress import bar
from esm_neuron.data.tokenizer import PAD

if TYPE_CHECKING:
    import torch
else:
    torch = module("torch")

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
    sequences: int
    """Examples in the batches of all ranks."""


def plan_packs(cfg: TrainConfig, lengths: np.ndarray, packs_per_step: int, epoch: int = 0) -> EpochPlan:
    """Plan the packs of an epoch over all devices from `lengths` alone: int [examples], specials included."""
    return plan_epoch(lengths, cfg.data.pack_tokens, _segments(cfg), packs_per_step, _rng(cfg.seed, epoch))


class _Loader:
    """Lay the examples of packs out in batches, one data-parallel rank's share of each step.

    Args:
        table: the examples.
        task: makes inputs and targets.
        cfg: the run's configuration.
        dp: data-parallel degree.
        dp_rank: this process's place among them, 0 to dp - 1.
        local_dp: devices over which this process spreads the packs of a batch (`Backend.local_dp`).
        static_shapes: True: every batch has one shape. False: filler packs and the columns that are padding in every
            pack are left out of a batch, which is less work where a new shape costs nothing.
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
    ) -> None:
        self.table = table
        """The examples that are given."""
        self._task, self._cfg, self._static_shapes = task, cfg, static_shapes
        self._dp, self._dp_rank, self._devices = dp, dp_rank, dp * local_dp
        self._lengths = table.lengths.astype(np.int32)
        # A batch of filler packs alone must have the labels' type and shape of all others: learnt from an example.
        label = np.asarray(task.example_target(table, 0, _rng(cfg.seed, _EVALUATION, 0)).label)
        self._label_type, self._label_shape = label.dtype, label.shape[1:] if task.per_token else label.shape
        self._prepare()

    def _prepare(self) -> None:
        """Plan the packs."""
        raise NotImplementedError

    def _batch(self, packs: Sequence[np.ndarray], epoch: int) -> Batch:
        """Return this rank's share of some packs of examples as a batch; `epoch` seeds the examples' randomness."""
        count, segments, pack_tokens = len(packs) // self._dp, _segments(self._cfg), self._cfg.data.pack_tokens
        packs = packs[self._dp_rank * count : (self._dp_rank + 1) * count]
        if not self._static_shapes:
            # Keep one pack even where all are empty: every rank runs every pass, since the ranks sum their gradients
            # together.
            packs = [pack for pack in packs if len(pack)] or packs[:1]
        size = (len(packs), pack_tokens)
        targets = size if self._task.per_token else (len(packs), segments)
        # All slots begin as padding of weight 0, so what no example fills adds nothing to the loss.
        input_ids = np.full(size, PAD, np.int64)
        segment_ids = np.full(size, PAD_SEGMENT, np.int64)
        positions = np.zeros(size, np.int64)
        labels = np.zeros((*targets, *self._label_shape), self._label_type)
        weights = np.zeros(targets, np.float32)
        members = np.full((len(packs), segments), -1, np.int64)
        position = np.arange(pack_tokens)
        longest = 1
        for p, pack in enumerate(packs):
            members[p, : len(pack)] = pack
            end = 0
            for s, example in enumerate(pack.tolist()):
                if epoch == _EVALUATION:
                    target = self._task.evaluation_target(self.table, example)
                else:
                    target = self._task.example_target(self.table, example, _rng(self._cfg.seed, epoch, example))
                start, end = end, end + len(target.tokens)
                input_ids[p, start:end] = target.tokens
                segment_ids[p, start:end] = s
                positions[p, start:end] = position[: end - start]
                place = slice(start, end) if self._task.per_token else s
                labels[p, place] = target.label
                weights[p, place] = target.weight
            longest = max(longest, end)
        # A compiled graph needs one width; elsewhere the columns that are padding in every pack are cut off.
        width = pack_tokens if self._static_shapes else longest
        target_width = width if self._task.per_token else segments
        return Batch(
            input_ids=_tensor(input_ids, width),
            segment_ids=_tensor(segment_ids, width),
            positions=_tensor(positions, width),
            labels=_tensor(labels, target_width),
            weights=_tensor(weights, target_width),
            members=members,
            max_segments=segments,
        )


class TrainLoader(_Loader):
    """Give the training batches of one data-parallel rank, by optimizer step.

    The last step of an epoch is filled up with packs of weight 0.
    """

    def _prepare(self) -> None:
        self.passes = accumulated_passes(self._cfg, self._devices)
        """Forward passes of this rank in one optimizer step."""
        self._planned = (0, plan_packs(self._cfg, self._lengths, self._cfg.loop.packs_per_step))
        self.steps_per_epoch: int = len(self._planned[1])
        """Optimizer steps in one pass over the examples, the same in every epoch."""
        batches = None if self._static_shapes else self.passes * self._dp
        self.padding_efficiency: float = self._planned[1].efficiency(self._lengths, batches)
        """Share of the slots computed in an epoch that hold tokens."""

    def load(self, step: int) -> StepData:
        """Return the batches of a step with what they hold: `prefetch(map(loader.load, range(first, last)), 2)`."""
        epoch, local = divmod(step, self.steps_per_epoch)
        packs = self.plan(epoch).step(local)
        count, members = len(packs) // self.passes, np.concatenate(packs)
        residues = int(self._lengths[members].sum()) - SPECIALS * len(members)
        # Pass by pass, then rank by rank: two passes of one rank hold what one pass of each of two ranks holds.
        batches = [self._batch(packs[n * count : (n + 1) * count], epoch) for n in range(self.passes)]
        return StepData(step, batches, residues, len(members))

    def record_ids(self, step: int) -> list[str]:
        """Return the names of the proteins, over all ranks, that optimizer step `step` learns from."""
        epoch, local = divmod(step, self.steps_per_epoch)
        records = self.table.record[np.concatenate(self.plan(epoch).step(local))]
        return [self.table.ids[record] for record in dict.fromkeys(records.tolist())]

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of `epoch`, made from (seed, epoch) alone; the last one asked for is kept."""
        if self._planned[0] != epoch:
            self._planned = (epoch, plan_packs(self._cfg, self._lengths, self._cfg.loop.packs_per_step, epoch))
        return self._planned[1]


class EvalLoader(_Loader):
    """Give one rank's batches that together, over all ranks, hold every example exactly once.

    Every rank gives the same number of batches, filled up with packs of weight 0. The plan depends on the seed and the
    table alone, an example on its tokens alone: a protein is evaluated alike whatever shares its file, shard or
    request. Can be iterated any number of times.
    """

    title = ""
    """Name of the bar that shows a pass over it on a terminal; empty: there is none."""

    def _prepare(self) -> None:
        packs = self._cfg.loop.eval_packs_per_device * self._devices
        self._plan = plan_packs(self._cfg, self._lengths, packs, _EVALUATION)

    def __len__(self) -> int:
        """Return the batches of this rank, the same on every rank."""
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        return (self._batch(self._plan.step(step), _EVALUATION) for step in bar(self.title, range(len(self))))


def prefetch(iterable: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Give the items of `iterable` in order, made ahead by a thread: at most `depth` are made and not yet taken.

    What `iterable` raises is raised at the place of the item that it failed to give.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} is below 1: nothing could ever be made; use 2")
    room = threading.Semaphore(depth)
    ready: SimpleQueue[tuple[list[T], BaseException | None]] = SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        try:
            source = iter(iterable)
            # Room first, then the item: so never more than `depth` items wait.
            while room.acquire() and not stopped.is_set():
                ready.put(([next(source)], None))
        except BaseException as error:  # the consumer raises it: StopIteration is the end, all else a failure
            ready.put(([], error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            made, error = ready.get()
            # The end comes as a value: Python turns a StopIteration raised within a generator into a RuntimeError.
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield from made
    finally:
        # The consumer may leave early. Wake the thread if it waits for room, and join it, so that nothing reads on.
        stopped.set()
        room.release()
        thread.join()


def total_steps(steps_per_epoch: int, loop: LoopConfig) -> int:
    """Return the optimizer steps of a run: `max_steps`, or else those of `epochs` passes, at least `min_steps`."""
    if loop.max_steps is not None:
        return loop.max_steps
    return max(1, loop.min_steps, math.ceil(loop.epochs * steps_per_epoch))


def eval_interval(steps_per_epoch: int, loop: LoopConfig) -> int:
    """Return the steps between validations: `eval_every`, or an epoch; fewer where `min_evals` needs them."""
    most = max(1, total_steps(steps_per_epoch, loop) // loop.min_evals)
    return min(loop.eval_every or steps_per_epoch, most)


def _segments(cfg: TrainConfig) -> int:
    return cfg.data.max_segments if cfg.data.packing else 1


def _rng(seed: int, epoch: int, *example: int) -> np.random.Generator:
    """Return the generator of a plan (no example) or of one example; evaluation counts as epoch -1."""
    # numpy seeds [a, b] and [a, b, 0] alike, so examples count from 1 here.
    # And numpy takes no negative numbers: hence the modulo, and the 1 added to evaluation's epoch, -1.
    return np.random.default_rng([seed % 2**64, epoch + 1, *(number + 1 for number in example)])


def _tensor(array: np.ndarray, width: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array[:, :width]))
