"""AdamW with 8-bit moments in paged memory, by bitsandbytes (arXiv:2110.02861): 2 bytes a trained weight, not 8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from esm_neuron.backends.common import make_gradient_buffers
from esm_neuron.config import OptimConfig
from esm_neuron.quantize import bitsandbytes


def paged_adamw8bit(groups: Sequence[Mapping[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer with its state made; parameters of fewer than 4,096 numbers keep float32 moments.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    optim = bitsandbytes("bitsandbytes.optim.adamw", "optim.kind=adamw8bit", "optim.kind=adamw")
    make_gradient_buffers(groups)
    named = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    optimizer: Any = optim.PagedAdamW8bit(named, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, place)
    made: torch.optim.Optimizer = optimizer
    return made
