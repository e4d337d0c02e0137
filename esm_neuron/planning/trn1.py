"""What a run makes a trn1 compile, and what its host and vector engines do in a step, by counts made without one.

The tables are of LoRA on six linears with NxD 0.15; docs/performance.md says how they were counted. Nothing here was
measured on a trn1.
"""

from __future__ import annotations

from dataclasses import dataclass

from esm_neuron.config import TrainConfig
from esm_neuron.models.shapes import EsmShape
from esm_neuron.models.tensor_parallel import padded_heads


@dataclass(frozen=True)
class Line:
    """A number that grows with the blocks of a model."""

    per_block: float
    rest: float

    def at(self, layers: int) -> float:
        return self.per_block * layers + self.rest


PASS = {False: Line(445, 412), True: Line(648, 412)}
"""model.gradient_checkpointing -> HLO instructions of a training pass, before optimization."""
UPDATE = Line(0, 182)
"""HLO instructions of an update: LoRA's is of one vector, at any depth."""
EVALUATION = 1 / 3
"""Instructions of an evaluation pass as a share of a training pass's without checkpointing: taken, not counted."""
TRACE_PASS = {False: Line(2.28, 5.9), True: Line(2.95, 7.1)}
"""model.gradient_checkpointing -> milliseconds that Python needs to trace a pass, on the machine that counted."""
RUN_PASS = Line(0.04, 0.24)
"""The same where graphs are run by their hash."""
HOST_UPDATE = Line(0, 1.0)
"""Milliseconds that Python needs to trace an update; also used for an update by hash, an overestimate."""
SLOW_HOST = 4.7
"""How much slower the same tracing was on another machine. A trn1's host is taken to be like that one."""
SCORES_READ = {False: 9.0, True: 12.4}
"""model.gradient_checkpointing -> how often the vector engine goes over the scores of attention in a pass."""
VECTOR = 128 * 1.12e9
"""Numbers per second of a NeuronCore's vector engine: lanes times clock."""


def instructions(cfg: TrainConfig, shape: EsmShape) -> dict[str, int]:
    """Return phase -> HLO instructions of its graph, as if LoRA were trained."""
    found = {
        "training pass": PASS[cfg.model.gradient_checkpointing].at(shape.layers),
        "evaluation pass": PASS[False].at(shape.layers) * EVALUATION,
        "update": UPDATE.at(shape.layers),
    }
    return {phase: round(number) for phase, number in found.items()}


def host_seconds(cfg: TrainConfig, shape: EsmShape, passes: int) -> float:
    """Return the time that the host needs for a step of `passes` passes."""
    one = TRACE_PASS[cfg.model.gradient_checkpointing] if cfg.loop.tracing == "always" else RUN_PASS
    return SLOW_HOST * (passes * one.at(shape.layers) + HOST_UPDATE.at(shape.layers)) / 1e3


def softmax_seconds(cfg: TrainConfig, shape: EsmShape, tp: int, slots: float) -> float:
    """Return the time of a core for the softmaxes of `slots` tokens: each token has a score per slot of its pack."""
    scores = shape.layers * padded_heads(shape.heads, tp) / tp * cfg.data.pack_tokens * slots
    return SCORES_READ[cfg.model.gradient_checkpointing] * scores / VECTOR
