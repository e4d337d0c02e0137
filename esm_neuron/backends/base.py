"""What the training loop asks of a device. The loop knows this protocol and nothing of any vendor package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from esm_neuron.config import OptimConfig
from esm_neuron.parallel.slices import Shard
from esm_neuron.parallel.topology import Topology

T = TypeVar("T")


class Backend(Protocol):
    """One process's view of its device and of its peers.

    Call order: `shard` (model on meta), weights, adapters, `prepare`, `optimizer`, then for every optimizer step one
    `seed` a pass, forward and backward, `sync`, and one `step`, `sync`.
    """

    name: str
    device: torch.device
    topology: Topology
    """Where this process is among the processes."""
    local_dp: int
    """Data-parallel devices that this process drives as one: 1, but the mesh's degree under SPMD. A pass of the process
    holds `loop.rows_per_device` times as many rows; the process reads them all, so the topology knows nothing of it."""
    static_shapes: bool
    """True where a new shape means a new compiled program."""
    attention: str
    """Which of `attention.ATTENTIONS` fits the device: "segments", "varlen" (on cuda with torch.compile
    "varlen_uncompiled") or "masked"."""

    lora_modules: Mapping[type, type]
    """Linear class -> LoRA layer class, for linears that PEFT does not know."""

    def shard(self, model: nn.Module) -> None:
        """Swap or mark the linears of the tensor-parallel plan, before weights and adapters come."""
        ...

    def part(self, name: str, shape: tuple[int, ...]) -> Shard | None:
        """What this rank holds of the whole parameter `name` of `shape`; None for all of it."""
        ...

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move to the device, in the precision of the run; answers need no more than this."""
        ...

    def spread(self, tensors: Iterable[torch.Tensor]) -> None:
        """Lay the rows (dimension 0) of a batch's tensors, already on the device, over the `local_dp` devices."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass: mixed precision, or nothing."""
        ...

    def checkpoint_fn(self) -> Callable[..., Any]:
        """The function that recomputes a block in the backward pass (torch's, or a device's own)."""
        ...

    def optimizer(self, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
        """AdamW over `groups`: its state and zeroed gradient buffers already made, its learning rate a tensor there."""
        ...

    def set_lr(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Write a new learning rate into the tensor that the update graph reads."""
        ...

    def seed(self, *numbers: int) -> None:
        """Seed the device's generator from (run seed, step, pass): equal on TP ranks, different on DP ranks."""
        ...

    def step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, totals: torch.Tensor, max_norm: float
    ) -> torch.Tensor:
        """Sum gradients over data-parallel ranks, divide by the global weight, clip, update, zero the gradients.

        Where the loss or the norm is not finite, weights, moments and their count of steps stay as they are.

        Args:
            totals: [2] on the device: this rank's loss sum and weight since the last step; becomes all ranks' sums.
            max_norm: clip to this norm of the normalised gradient; 0 for no clipping.

        Returns:
            The norm before clipping, a scalar on the device, the same on every rank; not finite where nothing moved.
        """
        ...

    def sync(self) -> None:
        """End of a graph: run what has been recorded (nothing to do on eager devices)."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over data-parallel ranks, on the device."""
        ...

    def on_host(self, fn: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Run `fn` with the tensors' values once they are there; never blocks the graph."""
        ...

    def gather_host(self, value: T) -> list[T]:
        """One value of every rank, in rank order, on every rank; over the host, not the device."""
        ...

    def broadcast_host(self, value: T) -> T:
        """Rank 0's value, on every rank; over the host, not the device."""
        ...

    def gather_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Whole tensors on the host, by parameter name: trained parameters, and optimizer state (`name/exp_avg`...).

        Called by all ranks; complete on rank 0.
        """
        ...

    def load_state(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        weights: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor],
    ) -> None:
        """The inverse of `gather_state`, from whole tensors at any world size.

        Raises:
            CheckpointError: names or shapes differ from the model's.
        """
        ...

    def load_weights(self, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """The trained parameters alone, as `load_state` does."""
        ...

    def graphs(self) -> int:
        """Programs compiled so far; 0 on eager devices."""
        ...

    def peak_memory(self) -> int | None:
        """Most bytes of tensors that the device has held so far; None where it does not say."""
        ...

    def close(self, wait: bool = True) -> None:
        """Leave the process group; with `wait`, once the device has done all it was told."""
        ...
