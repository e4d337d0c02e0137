"""Any torch_xla device driven by one process: XLA:CPU (what CI runs), or a TPU.

A run compiles these graphs: moving the model and making the optimizer state (set-up), one pass of training (forward and
backward), one update, one pass of evaluation. Each is traced once and then run by its hash (`graphs.py`). Nothing in a
step reads a value back to the host.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from esm_neuron.backends.base import (
    Backend,
    Named,
    Pass,
    Trained,
    adamw,
    copy_to_host,
    mix_seed,
    move_keeping_ties,
    upload,
)
from esm_neuron.backends.flat import flat_of, flatten
from esm_neuron.backends.graphs import GraphRunner
from esm_neuron.backends.topology import Topology
from esm_neuron.config import OptimConfig, TrainConfig, require
from esm_neuron.errors import ConfigError


def import_torch_xla() -> Any:
    """Import torch_xla with the modules that a backend uses; raise ConfigError where it is missing."""
    try:
        import torch_xla
        import torch_xla.core.xla_model
        import torch_xla.debug.metrics
        import torch_xla.utils.checkpoint
    except ImportError as error:
        raise ConfigError(f"backend xla needs torch_xla ({error}); pip install -e '.[xla]'") from error
    return torch_xla


class LazyBackend(Backend):
    """What all torch_xla devices share: operations are recorded, and `sync` compiles and runs them as one graph."""

    attention = "masked"

    _torch_xla: Any
    """The package, which a subclass imports."""

    def __init__(self, cfg: TrainConfig, device: torch.device | None = None, topology: Topology | None = None) -> None:
        super().__init__(cfg, device, topology)
        self._tracing = cfg.loop.tracing
        self._flattens = cfg.adapter.kind != "none"
        self._compiled_again = 0

    def is_shared(self, name: str, parameter: Tensor) -> bool:
        """Return whether all tensor-parallel ranks hold the same values of a parameter."""
        return True

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        super().backward(model, loss)
        if (flat := flat_of(model)) is not None:
            flat.collect()

    def trained(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Trained]:
        if (flat := flat_of(model)) is None:
            return super().trained(model, optimizer)
        # on the host: each slice read from the device would be a graph of its own
        values = flat.by_name(copy_to_host(flat.vector))
        state: dict[str, dict[str, Tensor]] = {name: {} for name in values}
        for kind, tensor in (optimizer.state[flat.vector] if optimizer is not None else {}).items():
            host = copy_to_host(tensor)
            for name, part in (flat.by_name(host) if host.ndim else {name: host.clone() for name in values}).items():
                state[name][kind] = part
        return [Trained(name, value, value, state[name]) for name, value in values.items()]

    def written(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, items: Sequence[Trained]) -> None:
        if (flat := flat_of(model)) is None:
            return
        whole = Trained("flat.vector", flat.vector, flat.vector, {})
        self._copy(whole, torch.cat([item.parameter.flatten() for item in items]), flat.vector)
        for kind, tensor in (optimizer.state[flat.vector] if optimizer is not None else {}).items():
            parts = [item.state[kind] for item in items]
            self._copy(whole, torch.cat([part.flatten() for part in parts]) if tensor.ndim else parts[0], tensor)

    def optimizer(
        self, model: nn.Module, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig
    ) -> torch.optim.Optimizer:
        optimizer = self._adamw(flatten(model, groups, self.is_shared) if self._flattens else groups, cfg)
        if (flat := flat_of(model)) is not None:
            optimizer.register_step_pre_hook(flat.decay)
        self.sync()
        return optimizer

    def _adamw(self, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
        return adamw(groups, cfg, self._rate(cfg.lr), capturable=True, foreach=False)

    def checkpoint_fn(self) -> Callable[..., Any]:
        # torch's own would be undone: XLA merges the second forward pass with the first unless a barrier is between
        function: Callable[..., Any] = self._torch_xla.utils.checkpoint.checkpoint
        return function

    def graph(self, fn: Pass, named: Callable[[], Named]) -> Pass:
        if self.device.type != "xla":  # NxD's own CPU mode runs everything at once
            return super().graph(fn, named)
        return GraphRunner(self._torch_xla, self.device, fn, named, self._tracing, self._compiling_again)

    def set_lr(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        # in place: a graph that is not traced again knows this tensor
        optimizer.param_groups[0]["lr"].data = self._rate(lr)

    def _rate(self, lr: float) -> Tensor:
        # of one dimension: torch_xla compiles a scalar 0 or 1 into the graph, which makes another one
        return torch.full((1,), lr, dtype=torch.float32).to(self.device)

    def sync(self) -> None:
        self._torch_xla.sync()

    def on_host(self, fn: Callable[..., None], *tensors: Tensor) -> None:
        self._torch_xla.core.xla_model.add_step_closure(super().on_host, args=(fn, *tensors))

    def place(self, item: Trained, whole: Tensor, target: Tensor) -> Tensor:
        return upload(whole, self.device) if whole.ndim == 0 and target.device == self.device else whole

    def graphs(self) -> int:
        compiled = self._torch_xla.debug.metrics.metric_data("CompileTime")
        return (compiled[0] if compiled else 0) - self._compiled_again

    @contextmanager
    def _compiling_again(self) -> Iterator[None]:
        before = self.graphs()
        yield
        self._compiled_again += self.graphs() - before

    def close(self, wait: bool = True) -> None:
        if wait:
            self._torch_xla.core.xla_model.wait_device_ops()


class XlaBackend(LazyBackend):
    """The one device of this process."""

    def __init__(self, cfg: TrainConfig) -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        require(
            world == 1,
            f"backend xla in a world of {world} processes: on the CPU torch_xla has no collectives between them, they "
            f"would train {world} models apart; start one process, or use --backend cpu for data parallelism on gloo",
        )
        self._torch_xla = import_torch_xla()
        super().__init__(cfg, self._open(cfg))

    def _open(self, cfg: TrainConfig) -> torch.device:
        """Return the device that the whole run lives on."""
        require(
            cfg.parallel.tp == 1,
            f"parallel.tp={cfg.parallel.tp}: this process has one XLA device; use parallel.tp=1, or give it more "
            "devices (on the CPU: CPU_NUM_DEVICES)",
        )
        device: torch.device = self._torch_xla.device()
        return device

    def move(self, model: nn.Module) -> None:
        move_keeping_ties(model, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("xla", dtype=torch.bfloat16) if self._bf16 else nullcontext()

    def seed(self, *numbers: int) -> None:
        self._torch_xla.core.xla_model.set_rng_state(mix_seed(*numbers) >> 1, device=str(self.device))
