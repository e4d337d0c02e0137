"""Parameter groups and the learning-rate schedule: pure functions of the model and of the step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from esm_neuron.config import OptimConfig


def parameter_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: matrices with weight decay; biases, norms and vectors without.

    Each group has `params`, their `names` in the same order, and `weight_decay`; an empty one is left out.
    """
    groups: list[dict[str, Any]] = []
    for decays in (True, False):
        chosen = [(n, p) for n, p in model.named_parameters() if p.requires_grad and (p.ndim > 1) == decays]
        if chosen:
            names, params = zip(*chosen, strict=True)
            decay = cfg.weight_decay if decays else 0.0
            groups.append({"params": list(params), "names": list(names), "weight_decay": decay})
    return groups


LEAST_RATE = 1e-20
"""Takes the place of a learning rate of 0 behind the end of a schedule. AdamW on an XLA device divides by the rate, so
at 0 a weight without gradient would become 0 / 0 (torch 2.8, `capturable`); and XLA compiles a 0 into the graph."""


def warmup_steps(total_steps: int, cfg: OptimConfig) -> int:
    """Return the steps over which the rate rises: `warmup_steps`, or else `warmup_ratio` of all."""
    return cfg.warmup_steps or round(cfg.warmup_ratio * total_steps)


def learning_rate(step: int, total_steps: int, cfg: OptimConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total_steps`.

    Warm-up is `lr * (step + 1) / warmup`, so that no step is wasted at rate 0. Then the rate falls from `lr`
    towards `lr * min_lr_ratio` (at least LEAST_RATE), which the step after the last one would have, as in
    transformers' schedules: along half a cosine (Loshchilov & Hutter 2017, eq. 5), along a line, or not at all.
    """
    warmup = warmup_steps(total_steps, cfg)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule == "constant":
        return cfg.lr
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.schedule == "cosine" else 1 - progress
    return max(LEAST_RATE, cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * share))
