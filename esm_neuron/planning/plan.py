"""Plan a run before anything is built or rented: packs, graphs, legal tensor parallelism.

The plan comes from the functions that the loaders use, so it is what will happen and not an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from esm_neuron.backends.topology import NEURON_CORES, NEURON_TP, legal_tp
from esm_neuron.config import TrainConfig
from esm_neuron.config.rules import accumulated_passes
from esm_neuron.data.loader import SPECIALS, plan_packs, total_steps
from esm_neuron.data.splits import Splits
from esm_neuron.models.shapes import EsmShape, shape_of
from esm_neuron.planning.memory import Memory, predict_memory
from esm_neuron.planning.memory import render as render_memory
from esm_neuron.redact import Lines

SHORTEST = 256
"""Tokens of the shortest pack that `halve` proposes."""
SET_UP = 1
"""Graphs that make the gradient buffers and the optimizer's state on XLA:CPU (torch_xla 2.8.1)."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the training examples."""

    pack_tokens: int
    """Slots of a pack."""
    packs: int
    sequences: int
    residues: int
    """Without special tokens."""
    efficiency: float
    """Share of the slots, filler packs included, that hold tokens. Static shapes compute all of them; where shapes are
    free (cpu, cuda) less is computed, and result.json's `padding_efficiency` is higher."""
    unpacked_efficiency: float
    """`efficiency` with one sequence per pack."""
    steps: int
    packs_per_step: int
    """Over all devices."""
    passes: int
    """Forward passes of a step on each device."""


@dataclass(frozen=True)
class TensorParallel:
    """The degrees of tensor parallelism that a model's shape allows."""

    heads: int
    degrees: tuple[int, ...]
    """Powers of two up to 32 that divide heads and feed-forward evenly."""
    padded: tuple[int, ...]
    """`degrees` with `parallel.pad_heads`."""
    instances: Mapping[str, tuple[int, ...]]
    """trn1 instance -> those of `padded` that fit its links."""


@dataclass(frozen=True)
class RunPlan:
    """What `esm-neuron plan` prints."""

    epoch: Epoch
    steps: int
    """Of the whole run."""
    graphs_by_phase: Mapping[str, int]
    """Phase of the run -> graphs that a static-shape backend compiles for it."""
    tensor_parallel: TensorParallel | None
    """None if the model's shape is not known here: a hub id that is not a released ESM-2."""
    memory: Memory | None
    """On one device; None if the shape is not known."""
    memory_turned: Memory | None
    """`memory` with gradient checkpointing switched."""
    halved: Epoch | None = None
    """An epoch of the same proteins by `halve`."""
    cropped: int = 0
    """Sequences that are too long for that."""

    @property
    def graphs(self) -> int:
        return sum(self.graphs_by_phase.values())


def make_plan(cfg: TrainConfig, splits: Splits, devices: int = 1) -> RunPlan:
    """Return the plan of a run on `devices` data-parallel devices.

    Raise ConfigError where they cannot share `loop.packs_per_step`, DataError where a sequence does not fit a pack.
    """
    lengths = splits.train.lengths.astype(np.int32)
    epoch = _epoch(cfg, lengths, devices)
    half = halve(cfg)
    shape = shape_of(cfg.model)
    again = cfg.model.gradient_checkpointing
    memory, turned = (
        predict_memory(cfg, shape, devices, len(splits.labels) or 1, checkpointing) if shape else None
        for checkpointing in (again, not again)
    )
    return RunPlan(
        epoch=epoch,
        steps=total_steps(epoch.steps, cfg.loop),
        graphs_by_phase={
            "training pass": 1,
            "evaluation pass": int(splits.valid is not None or splits.test is not None),
            "update": 1,
            "set-up": SET_UP,
        },
        tensor_parallel=tensor_parallel(shape) if shape else None,
        memory=memory,
        memory_turned=turned,
        halved=_epoch(half, np.minimum(lengths, half.data.pack_tokens), devices) if half else None,
        cropped=int((lengths > half.data.pack_tokens).sum()) if half else 0,
    )


def halve(cfg: TrainConfig) -> TrainConfig | None:
    """Return `cfg` with twice as many packs of half the length, None where that is no sensible length."""
    tokens = cfg.data.pack_tokens // 2
    if not cfg.data.packing or tokens < SHORTEST:
        return None
    data = replace(cfg.data, pack_tokens=tokens, max_residues=min(cfg.data.max_residues, tokens - SPECIALS))
    step, device = 2 * cfg.loop.packs_per_step, 2 * cfg.loop.packs_per_device
    return replace(cfg, data=data, loop=replace(cfg.loop, packs_per_step=step, packs_per_device=device))


def tensor_parallel(shape: EsmShape) -> TensorParallel:
    padded = tuple(legal_tp(shape.heads, shape.intermediate, pad_heads=True))
    return TensorParallel(
        heads=shape.heads,
        degrees=tuple(legal_tp(shape.heads, shape.intermediate)),
        padded=padded,
        instances={name: tuple(tp for tp in NEURON_TP[n] if tp in padded) for name, n in NEURON_CORES.items()},
    )


def metrics(plan: RunPlan) -> dict[str, Any]:
    """Return the plan for JSON, sums included."""
    found: dict[str, Any] = {**asdict(plan), "graphs": plan.graphs}
    for name, memory in (("memory", plan.memory), ("memory_turned", plan.memory_turned)):
        if memory is not None:
            found[name] |= {"state": memory.state, "total": memory.total}
    return found


def render(plan: RunPlan) -> str:
    """Return the plan as text."""
    epoch = plan.epoch
    lines = [
        f"an epoch: {epoch.sequences:,} sequences with {epoch.residues:,} residues in all, in {epoch.packs:,} packs of "
        f"{epoch.pack_tokens} tokens, efficiency {epoch.efficiency:.3f} ({epoch.unpacked_efficiency:.3f} with one "
        "sequence per pack)",
        f"{plan.steps:,} optimizer steps of {epoch.packs_per_step} packs (passes: {epoch.passes}); an epoch has "
        f"{epoch.steps:,} steps",
        f"{plan.graphs} graphs on a static-shape backend: "
        + ", ".join(f"{number} {phase}" for phase, number in plan.graphs_by_phase.items()),
    ]
    if plan.tensor_parallel is None or plan.memory is None or plan.memory_turned is None:
        return Lines.of([*lines, "parallel.tp and memory: the model's shape is not known before it is downloaded"])
    lines += render_memory(plan.memory, plan.memory_turned)
    legal = plan.tensor_parallel
    lines.append(f"parallel.tp for {legal.heads} heads: {_list(legal.degrees)}; with pad_heads: {_list(legal.padded)}")
    return Lines.of([*lines, *(f"  on {name}: {_list(tp)}" for name, tp in legal.instances.items())])


def _epoch(cfg: TrainConfig, lengths: np.ndarray, devices: int) -> Epoch:
    plan = plan_packs(cfg, lengths, cfg.loop.packs_per_step)
    tokens = int(lengths.sum(dtype=np.int64))
    unpacked = -(-len(lengths) // plan.packs_per_step) * plan.packs_per_step
    return Epoch(
        pack_tokens=plan.pack_tokens,
        packs=plan.packs,
        sequences=len(lengths),
        residues=tokens - SPECIALS * len(lengths),
        efficiency=plan.efficiency(lengths),
        unpacked_efficiency=tokens / (unpacked * plan.pack_tokens),
        steps=len(plan),
        packs_per_step=plan.packs_per_step,
        passes=accumulated_passes(cfg, devices),
    )


def _list(degrees: tuple[int, ...]) -> str:
    return ", ".join(map(str, degrees))
