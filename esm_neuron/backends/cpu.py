"""The plain CPU: eager torch, one process or several data-parallel ones on gloo under torchrun."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esm_neuron.adapters import store_frozen_linears
from esm_neuron.backends import common
from esm_neuron.backends.common import adamw, from_peers, mix_seed, normalise_clip_update, trainable
from esm_neuron.config import OptimConfig, TrainConfig, require
from esm_neuron.parallel.slices import Shard
from esm_neuron.parallel.topology import Topology

T = TypeVar("T")


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step.

    By default each large activation is mapped anew, zeroed page by page and unmapped, which took 5 to 20 % of a step.
    Nothing is changed with another C library, or where the user set MALLOC_* variables.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST), (_M_TOP_PAD, 64 << 20)):
            mallopt(option, value)


class CpuBackend:
    """See `base.Backend`."""

    name = "cpu"
    local_dp = 1
    static_shapes = False
    attention = "segments"
    lora_modules: Mapping[type, type] = {}

    def __init__(self, cfg: TrainConfig) -> None:
        require(
            cfg.parallel.tp == 1,
            f"parallel.tp={cfg.parallel.tp}: the cpu backend has no tensor parallelism; use parallel.tp=1",
        )
        keep_freed_memory()
        self.device = torch.device("cpu")
        self.topology = Topology.from_env(tp=1)
        self._bf16 = cfg.loop.precision == "bf16"
        if self.topology.world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")

    def shard(self, model: nn.Module) -> None:
        """Nothing is sharded: tp is 1."""

    def part(self, name: str, shape: tuple[int, ...]) -> Shard | None:
        return None

    def prepare(self, model: nn.Module) -> nn.Module:
        if self._bf16:
            store_frozen_linears(model, torch.bfloat16)
        return model

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """The rows are where they belong: this process drives one device."""

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self._bf16 else nullcontext()

    def checkpoint_fn(self) -> Callable[..., Any]:
        def recompute(fn: Callable[..., Any], *args: Any) -> Any:
            return checkpoint(fn, *args, use_reentrant=False)

        return recompute

    def optimizer(self, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
        return adamw(groups, cfg, self.device, fused=True)

    def set_lr(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"].fill_(lr)

    def seed(self, *numbers: int) -> None:
        torch.manual_seed(mix_seed(*numbers, self.topology.dp_rank))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, weight: Tensor, max_norm: float) -> Tensor:
        parameters = trainable(model)
        if self.topology.world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None] + [weight.view(1)])
            self.all_reduce(flat)
            sizes = [p.numel() for p in parameters]
            *grads, total = flat.split([*sizes, 1])
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.view_as(parameter)
            weight = total.squeeze(0)
        return normalise_clip_update(parameters, optimizer, weight, max_norm)

    def sync(self) -> None:
        """Eager torch has already run."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.topology.world > 1:
            with from_peers(self.topology.rank):
                dist.all_reduce(tensor)
        return tensor

    def on_host(self, fn: Callable[..., None], *tensors: Tensor) -> None:
        fn(*tensors)

    def gather_host(self, value: T) -> list[T]:
        if self.topology.world == 1:
            return [value]
        values: list[Any] = [None] * self.topology.world
        with from_peers(self.topology.rank):
            dist.all_gather_object(values, value)
        return values

    def broadcast_host(self, value: T) -> T:
        values = [value]
        if self.topology.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gather_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return common.gather_state(model, optimizer)

    def load_state(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
    ) -> None:
        common.load_state(model, optimizer, weights, moments)
        self.sync()

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        common.load_weights(model, weights)
        self.sync()

    def graphs(self) -> int:
        return 0

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
