"""Eager torch on one device a process: what the CPU and CUDA GPUs share.

Data parallelism sums gradients once an optimizer step, after all its passes, in buckets. With `parallel.fsdp` (FSDP2)
parameters, gradients and moments are cut over the ranks, and each block is put together while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from esm_neuron.backends import base as common
from esm_neuron.backends import eager as fsdp
from esm_neuron.backends.base import (
    adamw,
    copy_to_host,
    mix_seed,
    normalise_clip_update,
    patience,
    trainable,
    upload,
)
from esm_neuron.backends.topology import Topology
from esm_neuron.config import OptimConfig, TrainConfig, require
from esm_neuron.models.esm2 import encoder_of
from esm_neuron.models.lora import fuse_lora, store_frozen_linears
from esm_neuron.models.tensor_parallel import Shard

T = TypeVar("T")

BUCKET = 64 << 20
"""Bytes of gradients that are summed over the ranks at a time."""


def buckets(tensors: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of at most `most` bytes; one that is larger comes alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > most:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


class EagerBackend:
    """See `base.Backend`."""

    name: str
    attention: str
    local_dp = 1
    static_shapes = False
    lora_modules: Mapping[type, type] = {}

    def __init__(self, cfg: TrainConfig, device: torch.device, processes: str) -> None:
        """`processes`: the kind of torch's process group."""
        require(
            cfg.parallel.tp == 1,
            f"parallel.tp={cfg.parallel.tp}: the {self.name} backend has no tensor parallelism; use parallel.tp=1",
        )
        self.device = device
        self.topology = Topology.from_env(tp=1)
        require(
            not cfg.parallel.fsdp or self.topology.world > 1,
            "parallel.fsdp=true with one process: there is nobody to share with; start several with torchrun, or use "
            "parallel.fsdp=false",
        )
        self._bf16 = cfg.loop.precision == "bf16"
        self._drops = cfg.model.dropout > 0 or cfg.adapter.dropout > 0
        self._fsdp, self._compile = cfg.parallel.fsdp, cfg.loop.torch_compile
        if self.topology.world > 1 and not dist.is_initialized():
            dist.init_process_group(processes, timeout=patience(cfg))

    def shard(self, model: nn.Module) -> None:
        """Nothing is sharded: tp is 1."""

    def part(self, name: str, shape: tuple[int, ...]) -> Shard | None:
        return None

    def prepare(self, model: nn.Module) -> nn.Module:
        if self._bf16:
            store_frozen_linears(model, torch.bfloat16)
        fuse_lora(model)
        if self._compile:
            for block in encoder_of(model).encoder.layer:
                block.compile()
        if self._fsdp:
            fsdp.shard_fully(model, self.device.type, self.topology.world)
        else:
            model.to(self.device)
        return model

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """The rows are where they belong: this process drives one device."""

    def autocast(self) -> AbstractContextManager[Any]:
        # each weight is used once a pass: a cache of casts would only hold all of them to its end
        kind = self.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=False) if self._bf16 else nullcontext()

    def checkpoint_fn(self) -> Callable[..., Any]:
        def recompute(fn: Callable[..., Any], *args: Any) -> Any:
            return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=self._drops)

        return recompute

    def optimizer(self, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
        if cfg.kind == "adamw8bit":
            from esm_neuron.backends.cuda import paged_adamw8bit  # needs bitsandbytes

            return paged_adamw8bit(groups, cfg)
        return adamw(groups, cfg, self.device, fused=True)

    def set_lr(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def seed(self, *numbers: int) -> None:
        torch.manual_seed(mix_seed(*numbers, self.topology.dp_rank))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, totals: Tensor, max_norm: float) -> Tensor:
        parameters = trainable(model)
        if self._fsdp:  # the backward pass has summed the gradients
            self.all_reduce(totals)
            return normalise_clip_update(parameters, optimizer, totals, max_norm, self._norm_over_ranks)
        if self.topology.world > 1:
            self._sum_over_ranks([*(p.grad for p in parameters if p.grad is not None), totals])
        return normalise_clip_update(parameters, optimizer, totals, max_norm)

    def _sum_over_ranks(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, several of them at a time."""
        for bucket in buckets(tensors, BUCKET):
            flat = self.all_reduce(torch.cat([tensor.flatten() for tensor in bucket]))
            for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def _norm_over_ranks(self, shards: list[Tensor]) -> Tensor:
        return self.all_reduce(torch.nn.utils.get_total_norm(shards) ** 2).sqrt()

    def sync(self) -> None:
        """Eager torch has already run."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.topology.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_host(self, fn: Callable[..., None], *tensors: Tensor) -> None:
        fn(*(tensor.cpu() for tensor in tensors))

    def gather_host(self, value: T) -> list[T]:
        if self.topology.world == 1:
            return [value]
        values: list[Any] = [None] * self.topology.world
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
        return common.gather_state(model, optimizer, fsdp.fetch)

    def load_state(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
    ) -> None:
        common.load_state(model, optimizer, weights, moments, fsdp.place)

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        common.load_weights(model, weights, fsdp.place)

    def graphs(self) -> int:
        return 0

    def peak_memory(self) -> int | None:
        return None

    def close(self, wait: bool = True) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def shard_fully(model: nn.Module, device: str, ranks: int) -> None:
    """Cut `model` over `ranks` in place, moving it to the device a block at a time; gradients will be sums.

    Parameters travel in the type that they are stored in: a frozen linear in bfloat16, a trained one in float32, so
    that the numbers are those of one device.
    """
    mesh = init_device_mesh(device, (ranks,))
    for module in (*encoder_of(model).encoder.layer, model):
        # Also the root, which FSDP2 would leave whole after a forward pass, for the backward pass to come. After a
        # validation none comes, and a checkpoint would look for moments by parameters that the optimizer does not have.
        cut = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        cut.set_gradient_divide_factor(1.0)
        cut.set_force_sum_reduction_for_comms(True)  # else a factor of 1 asks for an operation that only NCCL has


def fetch(tensor: Tensor) -> Tensor:
    """The whole tensor on the host; where it is cut, a collective that leaves it on rank 0 and nothing elsewhere: a
    host has a rank a GPU, and not the memory for as many copies of a model and its moments."""
    if not isinstance(tensor, DTensor):
        return copy_to_host(tensor)
    whole = tensor.full_tensor()
    return copy_to_host(whole if dist.get_rank() == 0 else whole.new_empty(0))


def place(whole: Tensor, target: Tensor) -> Tensor:
    """`whole`, which every rank has, laid like `target`; no rank sends anything."""
    if not isinstance(target, DTensor):
        return upload(whole, target.device)
    moved = whole.to(target.device)
    return distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)
