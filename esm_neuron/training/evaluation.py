"""Forward passes without gradients: the one way validation, test metrics and predictions are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from esm_neuron.backends.base import Backend, state_of
from esm_neuron.data.dataset import Batch, ExampleTable
from esm_neuron.data.loader import EvalLoader, prefetch
from esm_neuron.errors import TrainingError
from esm_neuron.metrics import Value
from esm_neuron.tasks.base import Task

AHEAD = 2
"""Batches, or training steps with theirs, made before the device asks for them."""


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's logits for a batch on its device: [R, S, classes], or [R, L, tokens]."""
    logits: Tensor = model(
        input_ids=batch.input_ids,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        max_segments=batch.max_segments,
    ).logits
    return logits


def on_device(batches: Iterable[Batch], backend: Backend) -> Iterator[Batch]:
    """Yield the batches on the backend's device, or spread over its devices."""
    for batch in batches:
        moved = batch.to(backend.device)
        backend.spread(moved.tensors().values())
        yield moved


class Evaluator:
    """Makes a model's predictions for a task; it keeps their graphs, so one lives as long as the model."""

    def __init__(self, model: nn.Module, task: Task, backend: Backend) -> None:
        self.task, self.backend = task, backend
        self.model = model
        self._run_pass = backend.graph(self._pass, lambda: state_of(model))

    def _pass(self, batch: Batch) -> tuple[Tensor, ...]:
        with self.backend.autocast():
            logits = forward(self.model, batch)
        return tuple(self.task.predictions(logits, batch))  # not under autocast, which would round sums to bfloat16

    def run(self, batches: Iterable[Batch], take: Callable[[np.ndarray, list[np.ndarray]], None]) -> None:
        """Hand `task.predictions` of every batch to `take(members, predictions)`, as numpy on the host and in order."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for batch in on_device(prefetch(batches, AHEAD), self.backend):
                # `members` is bound now, as a default: a lazy device calls this once the loop has moved on.
                def deliver(*values: Tensor, members: np.ndarray = batch.members) -> None:
                    take(members, [v.numpy() for v in values])

                self.backend.on_host(deliver, *self._run_pass(batch))
                self.backend.sync()
        self.model.train(was_training)

    def collect(
        self, loader: EvalLoader, alone: bool = False, advance: Callable[[int], None] = lambda tokens: None
    ) -> list[np.ndarray]:
        """Return `task.predictions` for a loader's whole table, in the table's order.

        Each is float32 [examples, ...], or [tokens, ...] where `task.predictions_per_token`. Every rank evaluates its
        share and gets the predictions of all; with `alone` this rank's loader holds the whole table, and no other rank
        is asked. `advance` is told how many tokens each batch had. Raise TrainingError where a prediction is NaN or
        infinite.
        """
        table, per_token = loader.table, self.task.predictions_per_token
        parts: list[tuple[np.ndarray, ...]] = []

        def take(members: np.ndarray, predictions: list[np.ndarray]) -> None:
            parts.append(placed(table, members, predictions, per_token))
            advance(int(table.tokens_of(members[members >= 0]).sum()))

        self.run(loader, take)
        if not alone:
            topology, gathered = self.backend.topology, self.backend.gather_host(parts)
            # the ranks of a tensor-parallel group evaluate the same packs: those of the first of them count
            parts = [part for copy in range(topology.dp) for part in gathered[topology.rank_of(copy, 0)]]
        predictions = in_table_order(parts, int(table.offsets[-1]) if per_token else len(table))
        for values in predictions:
            _check_finite(table, values, per_token)
        return predictions

    def evaluate(self, loader: EvalLoader, intervals: bool = False) -> dict[str, Value]:
        """Return the task's metrics on a loader's table over all ranks, the same on each; raises as `collect` does."""
        return self.task.metrics(loader.table, self.collect(loader), intervals)


def _check_finite(table: ExampleTable, values: np.ndarray, per_token: bool) -> None:
    wrong = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
    if len(wrong):
        example = np.searchsorted(table.offsets, wrong, "right") - 1 if per_token else wrong
        shown = ", ".join(repr(table.ids[record]) for record in np.unique(table.record[example])[:3])
        raise TrainingError(
            f"the prediction for {shown} is NaN or infinite: the weights are damaged, or training has diverged; "
            "train again with a lower optim.lr"
        )


def placed(
    table: ExampleTable, members: np.ndarray, predictions: Sequence[np.ndarray], per_token: bool
) -> tuple[np.ndarray, ...]:
    """Return one batch's predictions without padding, after the index of the example or token that each is for.

    `members` is int64 [R, S], which example each segment is, -1 for none; `predictions` are [R, S, ...] each, or with
    `per_token` [R, L, ...], the tokens of a pack's segments end to end.
    """
    used = members >= 0
    example = members[used]
    if not per_token:
        return (example, *(values[used] for values in predictions))
    # A pack holds its segments end to end from column 0, so its first sum(lengths) columns are tokens. Row by row they
    # come in the order of `example`, and each is token `offsets[example]` of the table plus its place in the segment.
    lengths = np.where(used, table.tokens_of(members), 0)
    filled = np.arange(predictions[0].shape[1]) < lengths.sum(1, keepdims=True)
    size = lengths[used]
    first = np.cumsum(size) - size
    token = np.arange(size.sum()) + np.repeat(table.offsets[example] - first, size)
    return (token, *(values[filled] for values in predictions))


def in_table_order(parts: Sequence[tuple[np.ndarray, ...]], size: int) -> list[np.ndarray]:
    """Join what `placed` gave for the batches of all ranks: [size, ...] each, in the order of the table."""
    index, *predictions = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    # A loader or a rank that gives an example twice or never would spoil every metric without a sign.
    times = np.bincount(index, minlength=size)
    if (times != 1).any():
        wrong = int((times != 1).argmax())
        raise ValueError(
            f"{wrong} was predicted {times[wrong]} times ({(times != 1).sum()} such of {size}); each must be "
            "predicted once over all batches and ranks"
        )
    order = np.argsort(index, kind="stable")
    return [values[order] for values in predictions]
