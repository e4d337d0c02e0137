"""Forward passes without gradients: the one way validation, test figures and predictions are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from esm_neuron.backends.base import Backend
from esm_neuron.data.dataset import Batch, ExampleTable
from esm_neuron.data.loader import EvalLoader, prefetch
from esm_neuron.errors import TrainingError
from esm_neuron.metrics import Value
from esm_neuron.tasks import Task


class Asks(Protocol):
    """What forward passes ask of a task."""

    @property
    def predictions_per_token(self) -> bool:
        """See `tasks.Task`."""
        ...

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """See `tasks.Task`."""
        ...


AHEAD = 2
"""Batches made before the device asks for them."""


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits for a batch on its device: [R, S, classes], or [R, L, tokens]."""
    logits: Tensor = model(
        input_ids=batch.input_ids,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        max_segments=batch.max_segments,
    ).logits
    return logits


def on_device(batches: Iterable[Batch], backend: Backend) -> Iterator[Batch]:
    """The same batches on the backend's device, or spread over its devices."""
    for batch in batches:
        moved = batch.to(backend.device)
        backend.spread(moved.tensors().values())
        yield moved


def run_passes(
    model: nn.Module,
    task: Asks,
    backend: Backend,
    batches: Iterable[Batch],
    take: Callable[[np.ndarray, list[np.ndarray]], None],
) -> None:
    """Hand `task.answers` of every batch to `take(members, answers)`, as numpy on the host and in order."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in on_device(prefetch(batches, AHEAD), backend):
            with backend.autocast():
                logits = forward(model, batch)
            predictions = task.predictions(logits, batch)  # not under autocast, which would round sums to bfloat16

            def deliver(*values: Tensor, members: np.ndarray = batch.members) -> None:
                take(members, [v.numpy() for v in values])

            backend.on_host(deliver, *predictions)
            backend.sync()
    model.train(was_training)


@dataclass
class Collected:
    """Answers by the example, or the token of a table, that they are to, gathered batch by batch and over ranks."""

    size: int
    """Examples, or tokens, of the table."""
    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    """Of every batch: what is answered, int64 [n], 0 to size - 1; then the answers, [n, ...] each."""

    def whole(self) -> list[np.ndarray]:
        """The answers in the table's order, [size, ...] each.

        Raises:
            ValueError: something was answered twice, or not at all.
        """
        index, *predictions = (np.concatenate(arrays) for arrays in zip(*self.parts, strict=True))
        times = np.bincount(index, minlength=self.size)
        if (times != 1).any():
            wrong = int((times != 1).argmax())
            raise ValueError(
                f"{wrong} was answered {times[wrong]} times ({(times != 1).sum()} such of {self.size}); each must be "
                "answered once over all batches and ranks"
            )
        order = np.argsort(index, kind="stable")
        return [values[order] for values in predictions]


def placed(
    table: ExampleTable, members: np.ndarray, predictions: Sequence[np.ndarray], per_token: bool
) -> tuple[np.ndarray, ...]:
    """One batch's answers without its padding, behind the index of the example or token of `table` that each is to.

    Args:
        table: what is evaluated.
        members: int64 [R, S], which example each segment is, -1 for none.
        answers: [R, S, ...] each, or with `per_token` [R, L, ...], the tokens of a row's segments end to end.
        per_token: whether answers are to tokens or to examples.
    """
    used = members >= 0
    example = members[used]
    if not per_token:
        return (example, *(answer[used] for answer in predictions))
    lengths = np.where(used, table.tokens_of(members), 0)
    filled = np.arange(predictions[0].shape[1]) < lengths.sum(1, keepdims=True)
    size = lengths[used]
    first = np.cumsum(size) - size
    token = np.arange(size.sum()) + np.repeat(table.offsets[example] - first, size)
    return (token, *(answer[filled] for answer in predictions))


def collect(model: nn.Module, task: Task, backend: Backend, loader: EvalLoader) -> list[np.ndarray]:
    """`task.answers` to a loader's whole table, in the table's order, over all ranks and the same on each of them.

    Returns:
        float32 [examples, ...] each, or [tokens, ...] where `task.answers_per_token`.

    Raises:
        TrainingError: an answer is NaN or infinite, on any rank.
    """
    table = loader.table
    mine = Collected(int(table.offsets[-1]) if task.predictions_per_token else len(table))

    def take(members: np.ndarray, predictions: list[np.ndarray]) -> None:
        mine.parts.append(placed(table, members, predictions, task.predictions_per_token))

    run_passes(model, task, backend, loader, take)
    finite = all(np.isfinite(values).all() for part in mine.parts for values in part[1:])
    if not all(backend.gather_host(finite)):
        raise TrainingError("the model's answers hold values that are no numbers; lower optim.lr and train again")
    gathered, topology = backend.gather_host(mine.parts), backend.topology
    # the ranks of a tensor-parallel group answer the same rows: each row counts from the first of them
    parts = [part for copy in range(topology.dp) for part in gathered[topology.rank_of(copy, 0)]]
    return Collected(mine.size, parts).whole()


def collect_here(
    model: nn.Module, task: Asks, backend: Backend, loader: EvalLoader, advance: Callable[[int], None]
) -> list[np.ndarray]:
    """As `collect`, by this rank alone: the loader's batches must hold the whole table.

    Args:
        advance: told how many tokens each batch has answered.

    Raises:
        TrainingError: an answer is NaN or infinite.
    """
    table = loader.table
    found = Collected(int(table.offsets[-1]) if task.predictions_per_token else len(table))

    def take(members: np.ndarray, predictions: list[np.ndarray]) -> None:
        found.parts.append(placed(table, members, predictions, task.predictions_per_token))
        example = members[members >= 0]
        if not all(np.isfinite(values).all() for values in found.parts[-1][1:]):
            shown = ", ".join(repr(table.ids[record]) for record in table.record[example][:3])
            raise TrainingError(f"an answer to {shown} or a record beside them is no number; the weights are not sound")
        advance(int(table.tokens_of(example).sum()))

    run_passes(model, task, backend, loader, take)
    return found.whole()


def evaluate(
    model: nn.Module, task: Task, backend: Backend, loader: EvalLoader, intervals: bool = False
) -> dict[str, Value]:
    """The task's figures on a loader's table over all ranks, the same on each; raises as `collect` does."""
    return task.metrics(loader.table, collect(model, task, backend, loader), intervals)
