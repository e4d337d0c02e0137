"""Several torch_xla devices driven by one process: the tensor-parallel table as `mark_sharding` over a dp x tp mesh.

torch_xla shows the process one logical device, and XLA cuts every graph into one per device, with the collectives that
the marks ask for: packs along dp; linears of the table, and their gradients and moments where all weights are trained,
along tp; everything else whole on each device, among it what LoRA trains. So the process sees whole tensors, and
checkpoints hold them. The graphs of a run are those of `xla.py`. On a TPU the devices are its cores; on the CPU,
PJRT_DEVICE=CPU and CPU_NUM_DEVICES=4 make four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esm_neuron.backends.base import Named, Pass, Trained, copy_to_host, upload
from esm_neuron.backends.topology import Topology, any_of, divisors
from esm_neuron.backends.xla import XlaBackend, import_torch_xla
from esm_neuron.config import OptimConfig, TrainConfig, require
from esm_neuron.data.dataset import Batch
from esm_neuron.models.tensor_parallel import cut_of


def create(cfg: TrainConfig) -> XlaBackend:
    """Return the `xla` backend: SPMD over all devices of this process where it has several, else its only device."""
    import_torch_xla()
    from torch_xla import runtime

    return SpmdBackend(cfg) if runtime.addressable_runtime_device_count() > 1 else XlaBackend(cfg)


class SpmdBackend(XlaBackend):
    """All devices of this process, as a mesh of dp x tp."""

    def _open(self, cfg: TrainConfig) -> torch.device:
        from torch_xla import runtime
        from torch_xla.distributed import spmd
        from torch_xla.distributed.spmd.xla_sharding import wrap_as_sharded_tensor

        tp, devices = cfg.parallel.tp, runtime.global_runtime_device_count()
        mine = runtime.addressable_runtime_device_count()
        require(
            mine == devices,
            f"backend xla sees {devices} devices of which this process drives {mine}: it does not span several hosts; "
            "start one process on one host",
        )
        require(
            devices % tp == 0,
            f"parallel.tp={tp} does not divide the {devices} devices of this process; "
            f"use parallel.tp={any_of(divisors(devices))}",
        )
        require(
            not cfg.parallel.pad_heads,
            "parallel.pad_heads=true: only the neuron backend adds zero heads; use parallel.pad_heads=false",
        )
        if not runtime.is_spmd():
            runtime.use_spmd()
        self._spmd, self._wrap = spmd, wrap_as_sharded_tensor
        self._grid = Topology(world=devices, tp=tp)
        self.local_dp = self._grid.dp
        self._mesh = spmd.Mesh(np.arange(devices), (self._grid.dp, tp), ("dp", "tp"))
        self._model_name, self._heads = cfg.model.name, 0
        device: torch.device = self._torch_xla.device()
        return device

    def shard(self, model: nn.Module) -> None:
        """Check that tp fits the model; its tensors are marked once they are on the device."""
        config: Any = model.config
        self._heads = config.num_attention_heads
        sizes = (self._heads, config.hidden_size, config.intermediate_size)
        self._grid.validate(*sizes, self._model_name, can_pad=False)

    def move(self, model: nn.Module) -> None:
        super().move(model)
        for name, parameter in model.named_parameters():
            self._lay(name, parameter)

    def _adamw(self, groups: Sequence[Mapping[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
        optimizer = super()._adamw(groups, cfg)
        for group in groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for tensor in (parameter, parameter.grad, *optimizer.state[parameter].values()):
                    if tensor.shape == parameter.shape:
                        self._lay(name, tensor)
        return optimizer

    def _lay(self, name: str, tensor: Tensor) -> None:
        """Cut a tensor of the shape of the parameter `name` along tp, as the table says, or put it on each device.

        Called before the tensor is made real, so that no device ever holds more than its part. Updates in place keep
        the mark.
        """
        dim = cut_of(name, tensor.shape, self._heads, self._grid.tp).dim
        self._mark(tensor, dim, "tp")

    def _mark(self, tensor: Tensor, dim: int | None, axis: str = "") -> None:
        """Cut `tensor` along `dim` over an axis of the mesh; None: every device holds the whole."""
        self._spmd.mark_sharding(tensor, self._mesh, tuple(axis if d == dim else None for d in range(tensor.ndim)))

    def spread(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._mark(tensor, 0, "dp")

    def graph(self, fn: Pass, named: Callable[[], Named]) -> Pass:
        def joined(*batch: Batch) -> tuple[Tensor, ...]:
            results = fn(*batch)
            for tensor in results:  # whole on every device: reading a cut one would compile another graph
                self._mark(tensor, None)
            return results

        joined.__name__ = fn.__name__
        return super().graph(joined, named)

    def place(self, item: Trained, whole: Tensor, target: Tensor) -> Tensor:
        if target.device != self.device:
            return whole
        moved = upload(whole, self.device)
        if whole.ndim:  # marked like its target: a copy of a tensor without marks would take the target's away
            self._lay(item.name, moved)
        return moved

    def fetch(self, item: Trained, tensor: Tensor) -> Tensor:
        # put together here from the devices' parts: no graph, and no device holds the whole
        if tensor.device != self.device:
            return copy_to_host(tensor)
        kinds = self._spmd.ShardingType
        sharded = self._wrap(tensor.detach())
        if sharded.sharding_type not in (kinds.TILED, kinds.PARTIAL):
            return copy_to_host(tensor)
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for shard in sharded.local_shards:
            whole[tuple(shard.indices)] = shard.data  # nothing is padded: tp divides whatever it cuts
        return whole
