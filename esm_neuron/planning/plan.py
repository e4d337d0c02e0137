"""What a run will be like before anything is built or rented: packs, programs, legal tensor parallelism.

Planned by the functions that the loaders use, so the table is what will happen and not an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from esm_neuron.backends.topology import NEURON_CORES, NEURON_TP, legal_tp
from esm_neuron.config import TrainConfig, require
from esm_neuron.data.loader import (
    SPECIALS,
    accumulated_passes,
    evaluation_plan,
    select_row_lengths,
    total_steps,
    training_plan,
)
from esm_neuron.data.packing import EpochPlan
from esm_neuron.data.splits import Splits
from esm_neuron.models.shapes import EsmShape, known_shape
from esm_neuron.planning.memory import Memory, predict_memory
from esm_neuron.planning.memory import render as render_memory

SET_UP = 2
"""Programs that make the gradient buffers and the optimizer's state on XLA:CPU (torch_xla 2.8.1)."""


@dataclass(frozen=True)
class Bucket:
    """The rows of one length in an epoch of training."""

    pack_tokens: int
    """Slots of a row."""
    rows: int
    """Rows that hold sequences."""
    sequences: int
    residues: int
    """Residues, specials left out."""
    share: float
    """Part of the epoch's residues, 0 to 1."""
    efficiency: float
    """Share of the slots, filler rows included, that hold tokens; 1 where there is no row. Static shapes compute all of
    them; where shapes are free (cpu, cuda) less is computed, and result.json's `padding_efficiency` is higher."""
    steps: int
    """Optimizer steps an epoch."""
    packs_per_step: int
    """Rows of a step over all devices."""
    passes: int
    """Forward passes of a step on each device."""


@dataclass(frozen=True)
class TensorParallel:
    """The degrees of tensor parallelism that a model's shape allows."""

    heads: int
    degrees: tuple[int, ...]
    """Powers of two up to 32 that cut heads and feed-forward evenly."""
    padded: tuple[int, ...]
    """The same with `parallel.pad_heads`."""
    instances: Mapping[str, tuple[int, ...]]
    """trn1 instance -> those of `padded` that lie well on its links."""


@dataclass(frozen=True)
class RunPlan:
    """What `esm-neuron plan` prints."""

    buckets: tuple[Bucket, ...]
    """Shortest rows first."""
    total: Bucket
    """Sums over the buckets; `pack_tokens`, `packs_per_step` and `passes` are those of the longest rows."""
    unpacked_efficiency: float
    """`efficiency` with one sequence a row of `data.pack_tokens`."""
    steps: int
    """Optimizer steps of the run."""
    graphs_by_part: Mapping[str, int]
    """Part of the run -> programs that a static-shape backend compiles for it."""
    tensor_parallel: TensorParallel | None
    """None where the model's shape is not known here: a hub id that is no released ESM-2."""
    memory: Memory | None
    """Of a device; None where the shape is not known."""
    memory_turned: Memory | None
    """The same with gradient checkpointing on instead of off, or off instead of on."""

    @property
    def graphs(self) -> int:
        """All programs of the run."""
        return sum(self.graphs_by_part.values())


def make_plan(cfg: TrainConfig, splits: Splits, devices: int = 1) -> RunPlan:
    """The plan of a run on so many data-parallel devices.

    Raises:
        ConfigError: `loop.packs_per_step` is not a multiple of `loop.packs_per_device` times `devices`.
        DataError: a sequence does not fit a row.
    """
    lengths = splits.train.lengths.astype(np.int32)
    shape = known_shape(cfg.model.name)
    require(
        shape is not None or cfg.data.max_buckets == 1,
        f"data.max_buckets={cfg.data.max_buckets}: row lengths depend on the model's width, and {cfg.model.name} is "
        "not here; use data.max_buckets=1, or download it and name its folder as model.name",
    )
    row_lengths = select_row_lengths(cfg, lengths, shape.hidden if shape else 0)
    epoch = training_plan(cfg, lengths, row_lengths)
    steps = total_steps(len(epoch), cfg.loop.epochs, cfg.loop.max_steps)
    held_out = [table for table in (splits.valid, splits.test) if table is not None]
    evaluations = [evaluation_plan(cfg, table.lengths.astype(np.int32), row_lengths, devices) for table in held_out]
    evaluated = {row_length(plan, step) for plan in evaluations for step in plan.first_steps()}
    passes = accumulated_passes(cfg, devices)
    buckets = tuple(_bucket(epoch, number, lengths, passes) for number in range(len(epoch.packs)))
    again = cfg.model.gradient_checkpointing
    memory, turned = (
        predict_memory(cfg, shape, devices, len(splits.labels) or 1, checkpointing) if shape else None
        for checkpointing in (again, not again)
    )
    return RunPlan(
        buckets=buckets,
        total=_total(buckets, epoch.efficiency(lengths)),
        unpacked_efficiency=_unpacked(cfg, lengths),
        steps=steps,
        graphs_by_part={
            "training pass": len(epoch.first_steps(steps)),
            "evaluation pass": len(evaluated),
            "update": 1,
            "set-up": SET_UP,
        },
        tensor_parallel=tensor_parallel(shape) if shape else None,
        memory=memory,
        memory_turned=turned,
    )


def tensor_parallel(shape: EsmShape) -> TensorParallel:
    """The degrees that a shape allows."""
    padded = tuple(legal_tp(shape.heads, shape.intermediate, pad_heads=True))
    return TensorParallel(
        heads=shape.heads,
        degrees=tuple(legal_tp(shape.heads, shape.intermediate)),
        padded=padded,
        instances={name: tuple(tp for tp in NEURON_TP[n] if tp in padded) for name, n in NEURON_CORES.items()},
    )


def metrics(plan: RunPlan) -> dict[str, Any]:
    """The plan as JSON has it, sums included."""
    said: dict[str, Any] = {**asdict(plan), "graphs": plan.graphs}
    for name, memory in (("memory", plan.memory), ("memory_turned", plan.memory_turned)):
        if memory is not None:
            said[name] |= {"state": memory.state, "total": memory.total}
    return said


def render(plan: RunPlan) -> str:
    """The plan as a table for a person."""
    lines = ["row length      rows  sequences  residues efficiency   steps rows/step"]
    for name, bucket in [*((str(b.pack_tokens), b) for b in plan.buckets), ("total", plan.total)]:
        lines.append(
            f"{name:>10} {bucket.rows:>9,} {bucket.sequences:>10,} {bucket.share:>9.1%} {bucket.efficiency:>10.3f} "
            f"{bucket.steps:>7,} {bucket.packs_per_step if bucket is not plan.total else '':>9}"
        )
    lines += [
        f"one sequence a row of {plan.total.pack_tokens} tokens: efficiency {plan.unpacked_efficiency:.3f}",
        f"{plan.steps:,} optimizer steps of {plan.total.passes} passes; an epoch has {plan.total.steps:,} steps and "
        f"{plan.total.residues:,} residues",
        f"{plan.graphs} programs on a static-shape backend: "
        + ", ".join(f"{number} {part}" for part, number in plan.graphs_by_part.items()),
    ]
    if plan.tensor_parallel is None or plan.memory is None or plan.memory_turned is None:
        return "\n".join([*lines, "parallel.tp and memory: the model's shape is not known before it is downloaded"])
    lines += render_memory(plan.memory, plan.memory_turned)
    legal = plan.tensor_parallel
    lines.append(f"parallel.tp for {legal.heads} heads: {_list(legal.degrees)}; with pad_heads: {_list(legal.padded)}")
    return "\n".join([*lines, *(f"  on {name}: {_list(tp)}" for name, tp in legal.instances.items())])


def row_length(plan: EpochPlan, step: int) -> int:
    """Row length of a step."""
    return plan.packs[int(plan.bucket[step])].pack_tokens


def _bucket(epoch: EpochPlan, number: int, lengths: np.ndarray, passes: int) -> Bucket:
    pack, in_step = epoch.packs[number], epoch.packs_per_step[number]
    steps = int((epoch.bucket == number).sum())
    tokens = int(lengths[pack.members].sum(dtype=np.int64))
    slots = steps * in_step * pack.pack_tokens
    residues = tokens - SPECIALS * len(pack.members)
    every = int(lengths.sum(dtype=np.int64)) - SPECIALS * len(lengths)
    return Bucket(
        pack_tokens=pack.pack_tokens,
        rows=pack.rows,
        sequences=len(pack.members),
        residues=residues,
        share=residues / every,
        efficiency=tokens / slots if slots else 1.0,
        steps=steps,
        packs_per_step=in_step,
        passes=passes,
    )


def _total(buckets: tuple[Bucket, ...], efficiency: float) -> Bucket:
    longest = buckets[-1]
    return Bucket(
        pack_tokens=longest.pack_tokens,
        rows=sum(b.rows for b in buckets),
        sequences=sum(b.sequences for b in buckets),
        residues=sum(b.residues for b in buckets),
        share=sum(b.share for b in buckets),
        efficiency=efficiency,
        steps=sum(b.steps for b in buckets),
        packs_per_step=longest.packs_per_step,
        passes=longest.passes,
    )


def _unpacked(cfg: TrainConfig, lengths: np.ndarray) -> float:
    rows = -(-len(lengths) // cfg.loop.packs_per_step) * cfg.loop.packs_per_step
    return float(lengths.sum(dtype=np.int64) / (rows * cfg.data.pack_tokens))


def _list(degrees: tuple[int, ...]) -> str:
    return ", ".join(map(str, degrees))
