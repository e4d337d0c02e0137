"""Snapshots of a run, and folders of their checkpoints."""

from __future__ import annotations

import multiprocessing

import torch

from esm_neuron.training.checkpoint import Snapshot, TrainState

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
FORK = multiprocessing.get_context("fork")


def snapshot(step: int, size: int = 50) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "a.weight": torch.randn(size, 7, generator=generator),
        "b": torch.randn(3, generator=generator).bfloat16(),
    }
    moments = {
        "a.weight/exp_avg": torch.randn(size, 7, generator=generator),
        "a.weight/step": torch.tensor(float(step)),
    }
    state = TrainState(step, 123 * step, 4.5, {"best": 0.1, "best_step": None}, {"seed": 1, "task.labels": ["a", "é"]})
    return Snapshot(state, weights, moments)


def same(a: Snapshot, b: Snapshot) -> bool:
    """Equal to the last bit."""
    pairs = ((a.model, b.model), (a.optimizer, b.optimizer))
    tensors = all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x) for x, y in pairs
    )
    return tensors and a.state == b.state
