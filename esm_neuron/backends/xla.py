"""Any torch_xla device driven by one process: XLA:CPU (what CI runs), or a TPU.

Programs a run compiles, with one row length: moving the model and making the optimizer state (set-up), one pass of
training (forward and backward), one update, one pass of evaluation. Nothing in a step reads a value back to the host.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from esm_neuron.backends import base as common
from esm_neuron.backends.base import (
    adamw,
    mix_seed,
    move_keeping_ties,
    normalise_clip_update,
    trainable,
)
from esm_neuron.backends.topology import Topology
from esm_neuron.config import OptimConfig, TrainConfig, require
from esm_neuron.errors import ConfigError
from esm_neuron.models.lora import store_frozen_linears
from esm_neuron.models.tensor_parallel import Shard

T = TypeVar("T")


def import_torch_xla() -> Any:
    """The package torch_xla with the modules that a backend uses; ConfigError where it is missing."""
    try:
        import torch_xla
        import torch_xla.core.xla_model
        import torch_xla.debug.metrics
        import torch_xla.utils.checkpoint
    except ImportError as error:
        raise ConfigError(f"backend xla needs torch_xla ({error}); pip install -e '.[xla]'") from error
    return torch_xla


class XlaBackend:
    """See `base.Backend`."""

    name = "xla"
    local_dp = 1
    static_shapes = True
    attention = "masked"
    lora_modules: Mapping[type, type] = {}

    def __init__(self, cfg: TrainConfig) -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        require(
            world == 1,
            f"backend xla in a world of {world} processes: on the CPU torch_xla has no collectives between them, they "
            f"would train {world} models apart; start one process, or use --backend cpu for data parallelism on gloo",
        )
        self._torch_xla = import_torch_xla()
        self._xm, self._met = self._torch_xla.core.xla_model, self._torch_xla.debug.metrics
        self._checkpoint = self._torch_xla.utils.checkpoint.checkpoint
        self.device = self._open(cfg)
        self.topology = Topology()
        self._bf16 = cfg.loop.precision == "bf16"

    def _open(self, cfg: TrainConfig) -> torch.device:
        """The device that the whole run lives on."""
        require(
            cfg.parallel.tp == 1,
            f"parallel.tp={cfg.parallel.tp}: this process has one XLA device; use parallel.tp=1, or give it more "
            "devices (on the CPU: CPU_NUM_DEVICES)",
        )
        return self._torch_xla.device()

    def shard(self, model: nn.Module) -> None:
        """Nothing is sharded: tp is 1."""

    def part(self, name: str, shape: tuple[int, ...]) -> Shard | None:
        return None

    def prepare(self, model: nn.Module) -> nn.Module:
        if self._bf16:
            store_frozen_linears(model, torch.bfloat16)
        self._move(model)
        self.sync()
        return model

    def _move(self, model: nn.Module) -> None:
        move_keeping_ties(model, self.device)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """The rows are where they belong: this process drives one device."""

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("xla", dtype=torch.bfloat16) if self._bf16 else nullcontext()

    def checkpoint_fn(self) -> Callable[..., Any]:
        # torch's own would be undone: XLA merges the second forward pass with the first unless a barrier is between
        return self._checkpoint

    def optimizer(self, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
        optimizer = self._adamw(groups, cfg)
        self.sync()
        return optimizer

    def _adamw(self, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
        return adamw(groups, cfg, self.device, capturable=True, foreach=False)

    def set_lr(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        # through a device buffer: a Python number would be compiled into the program, a new one each step
        value = torch.tensor(lr, dtype=torch.float32).to(self.device)
        for group in optimizer.param_groups:
            group["lr"] = value

    def seed(self, *numbers: int) -> None:
        self._xm.set_rng_state(mix_seed(*numbers) >> 1, device=str(self.device))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, totals: Tensor, max_norm: float) -> Tensor:
        return normalise_clip_update(trainable(model), optimizer, self.all_reduce(totals), max_norm, lazy=True)

    def sync(self) -> None:
        self._torch_xla.sync()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def on_host(self, fn: Callable[..., None], *tensors: Tensor) -> None:
        def with_values(*values: Tensor) -> None:
            fn(*(v.cpu() for v in values))

        self._xm.add_step_closure(with_values, args=tensors)

    def gather_host(self, value: T) -> list[T]:
        return [value]

    def broadcast_host(self, value: T) -> T:
        return value

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
        compiled = self._met.metric_data("CompileTime")
        return compiled[0] if compiled else 0

    def peak_memory(self) -> int | None:
        return None

    def close(self, wait: bool = True) -> None:
        if wait:
            self._xm.wait_device_ops()
