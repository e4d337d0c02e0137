"""NVIDIA GPUs: eager torch, one process per GPU, NCCL between them and gloo for what the hosts exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esm_neuron.backends.base import startable
from esm_neuron.backends.eager import EagerBackend
from esm_neuron.backends.topology import Topology
from esm_neuron.config import OptimConfig, TrainConfig, require
from esm_neuron.models.attention import ATTENTIONS, Attention, varlen_attention
from esm_neuron.models.quantize import bitsandbytes

UNCOMPILED = "varlen_uncompiled"
"""Name of `varlen` as compiled blocks call it."""


class Uncompiled:
    """An attention that torch.compile leaves as it is.

    Within a compiled block it would be another graph for the bounds of each pack, and torch.compile gives a block up
    after eight.
    """

    def __init__(self, attend: Attention) -> None:
        self._attend = attend

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        return self._attend(query, key, value, dropout)


ATTENTIONS[UNCOMPILED] = lambda segment_ids: Uncompiled(varlen_attention(segment_ids))


class CudaBackend(EagerBackend):
    """The GPU of this process."""

    def __init__(self, cfg: TrainConfig) -> None:
        device = choose_device(Topology.from_env().local_rank)
        torch.cuda.set_device(device)
        require(
            cfg.loop.precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False),
            f"loop.precision=bf16: {torch.cuda.get_device_name(device)} has no bfloat16; use loop.precision=fp32",
        )
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.loop.tf32
        super().__init__(cfg, device, "cpu:gloo,cuda:nccl")
        self.attention = UNCOMPILED if cfg.loop.torch_compile else "varlen"
        torch.cuda.reset_peak_memory_stats(device)

    def optimizer(
        self, model: nn.Module, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig
    ) -> torch.optim.Optimizer:
        return paged_adamw8bit(groups, cfg) if cfg.kind == "adamw8bit" else super().optimizer(model, groups, cfg)

    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device)


def choose_device(local_rank: int) -> torch.device:
    built = torch.version.cuda is not None
    why = "it finds no GPU" if built else f"torch {torch.__version__} is built without CUDA"
    require(
        torch.cuda.is_available(),
        f"backend cuda: torch cannot use a GPU here ({why}); run on a machine with an NVIDIA GPU and its driver, look "
        "at `esm-neuron doctor`, or use --backend cpu",
    )
    found = torch.cuda.device_count()
    require(
        local_rank < found,
        f"backend cuda: process {local_rank} of this node has no GPU, there are {found}; start at most {found} "
        "processes per node (torchrun --nproc_per_node)",
    )
    return torch.device("cuda", local_rank)


def paged_adamw8bit(groups: Sequence[Mapping[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer with its state made; parameters of fewer than 4,096 numbers keep float32 moments."""
    optim = bitsandbytes("bitsandbytes.optim.adamw", "optim.kind=adamw8bit", "optim.kind=adamw")
    optimizer: Any = optim.PagedAdamW8bit(startable(groups), lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
    # bitsandbytes would make its state at the first step, but a checkpoint is copied into it before.
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, place)
    made: torch.optim.Optimizer = optimizer
    return made
