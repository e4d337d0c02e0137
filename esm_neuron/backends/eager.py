"""Eager torch on one device per process: what the CPU and CUDA GPUs share.

Data parallelism sums gradients once per optimizer step, after all its passes, in buckets. With `parallel.fsdp` (FSDP2)
parameters, gradients and moments are cut over the ranks, and each block is put together while it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from esm_neuron.backends.base import Backend, Trained, copy_to_host, normalise_clip_update, patience, trainable
from esm_neuron.backends.topology import Topology
from esm_neuron.compat import DTensor, distribute_tensor
from esm_neuron.config import TrainConfig, require
from esm_neuron.models.esm2 import encoder_of


class EagerBackend(Backend):
    """Several data-parallel processes, each with one device that runs what it is told at once."""

    def __init__(self, cfg: TrainConfig, device: torch.device, processes: str) -> None:
        """Join the process group of the kind `processes` where there are several processes."""
        require(
            cfg.parallel.tp == 1,
            f"parallel.tp={cfg.parallel.tp}: the {cfg.backend} backend has no tensor parallelism; use parallel.tp=1",
        )
        super().__init__(cfg, device, Topology.from_env())
        require(
            not cfg.parallel.fsdp or self.topology.world > 1,
            "parallel.fsdp=true with one process: there is nobody to share with; start several with torchrun, or use "
            "parallel.fsdp=false",
        )
        self._drops = cfg.model.dropout > 0 or cfg.adapter.dropout > 0
        self._fsdp, self._compile = cfg.parallel.fsdp, cfg.loop.torch_compile
        if self.topology.world > 1 and not dist.is_initialized():
            dist.init_process_group(processes, timeout=patience(cfg))

    def move(self, model: nn.Module) -> None:
        if self._compile:
            for block in encoder_of(model).encoder.layer:
                block.compile()
        if self._fsdp:
            shard_fully(model, self.device.type, self.topology.world)
        else:
            super().move(model)

    def autocast(self) -> AbstractContextManager[Any]:
        # each weight is used once per pass: a cache of casts would only hold all of them to its end
        kind = self.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=False) if self._bf16 else nullcontext()

    def checkpoint_fn(self) -> Callable[..., Any]:
        def recompute(fn: Callable[..., Any], *args: Any) -> Any:
            return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=self._drops)

        return recompute

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, totals: Tensor, max_norm: float) -> Tensor:
        parameters = trainable(model)
        if self._fsdp:  # the backward pass has summed the gradients
            self.all_reduce(totals)
            return normalise_clip_update(parameters, optimizer, totals, max_norm, self._norm_over_ranks)
        if self.topology.world > 1:
            # The loss sums travel with the gradients, which saves a collective.
            self.sum_over_ranks([*(p.grad for p in parameters if p.grad is not None), totals])
        return normalise_clip_update(parameters, optimizer, totals, max_norm)

    def _norm_over_ranks(self, shards: list[Tensor]) -> Tensor:
        # Each rank holds other shards, so the squares of their norms add up.
        return self.all_reduce(torch.nn.utils.get_total_norm(shards) ** 2).sqrt()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.topology.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def fetch(self, item: Trained, tensor: Tensor) -> Tensor:
        # Every rank takes part, and rank 0 alone copies the result: a host has a rank per GPU, and not the memory for
        # as many copies of a model and its moments.
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return copy_to_host(whole if self.topology.is_main else whole.new_empty(0))

    def place(self, item: Trained, whole: Tensor, target: Tensor) -> Tensor:
        if not isinstance(target, DTensor):
            return whole
        # every rank has the whole tensor, so none sends anything
        return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)

    def close(self, wait: bool = True) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def shard_fully(model: nn.Module, device: str, ranks: int) -> None:
    """Cut `model` over `ranks` in place, moving it to the device a block at a time; gradients will be sums.

    Parameters travel in the type that they are stored in: a frozen linear in bfloat16, a trained one in float32, so
    that the numbers are those of one device.
    """
    from torch.distributed.fsdp import fully_shard  # a second, with what it imports

    mesh = init_device_mesh(device, (ranks,))
    for module in (*encoder_of(model).encoder.layer, model):
        # Also the root, which FSDP2 would leave whole after a forward pass, for the backward pass to come. After a
        # validation none comes, and a checkpoint would look for moments by parameters that the optimizer does not have.
        cut = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        cut.set_gradient_divide_factor(1.0)
        cut.set_force_sum_reduction_for_comms(True)  # else a factor of 1 asks for an operation that only NCCL has
