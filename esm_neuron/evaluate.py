"""Forward passes without gradients: the one way validation, test figures and predictions are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from esm_neuron.backends.base import Backend
from esm_neuron.data.batch import Batch
from esm_neuron.data.loader import EvalLoader, prefetch
from esm_neuron.errors import TrainingError
from esm_neuron.metrics import MetricState
from esm_neuron.tasks import Task

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
    task: Task,
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
            answers = task.answers(logits, batch)  # not under autocast, which would round sums to bfloat16

            def deliver(*values: Tensor, members: np.ndarray = batch.members) -> None:
                take(members, [v.numpy() for v in values])

            backend.on_host(deliver, *answers)
            backend.sync()
    model.train(was_training)


def evaluate(model: nn.Module, task: Task, backend: Backend, loader: EvalLoader) -> MetricState:
    """The metric state of a loader's table over all ranks, the same on each of them.

    Raises:
        TrainingError: an answer is NaN or infinite, on any rank.
    """
    state = task.metrics()
    finite = True

    def take(members: np.ndarray, answers: list[np.ndarray]) -> None:
        nonlocal finite
        finite = finite and all(np.isfinite(answer[members >= 0]).all() for answer in answers)
        task.observe(state, loader.table, members, answers)

    run_passes(model, task, backend, loader, take)
    if not all(backend.gather_host(finite)):
        raise TrainingError("the model's answers hold values that are no numbers; lower optim.lr and train again")
    states, topology = backend.gather_host(state), backend.topology
    # the ranks of a tensor-parallel group answer the same rows: each row counts from the first of them
    first, *others = [states[topology.rank_of(copy, 0)] for copy in range(topology.dp)]
    for other in others:
        first.merge(other)
    return first
