"""Whole tensors from the shards of a tensor-parallel, ZeRO-1 world and back: over the host, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from esm_neuron.backends.base import upload
from esm_neuron.backends.topology import Topology
from esm_neuron.errors import CheckpointError
from esm_neuron.models.tensor_parallel import join, shard_of, whole_shape

Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]


@dataclass(frozen=True)
class Held:
    """What this process's optimizer holds of one trained parameter."""

    name: str
    parameter: nn.Parameter
    """This rank's tensor-parallel part, in the model."""
    master: Tensor
    """What AdamW updates: the same, or with ZeRO-1 this rank's rows of it in float32."""
    state: dict[str, Tensor]
    """AdamW's `exp_avg` and `exp_avg_sq`, of the shape of `master`, and `step`, a scalar."""


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Held]:
    """Every trained parameter of `model`, in its order."""
    inner = getattr(optimizer, "base_optimizer", optimizer)
    masters: dict[int, Tensor] = {}
    for outside, inside in zip(optimizer.param_groups, inner.param_groups, strict=True):
        masters |= {id(p): master for p, master in zip(outside["params"], inside["params"], strict=True)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            master = masters[id(parameter)]
            yield Held(name, parameter, master, inner.state[master])


@dataclass(frozen=True)
class ShardedState:
    """The way between the shards of all processes and whole tensors."""

    topology: Topology
    heads: int
    """Attention heads of the model, without padding."""
    groups: Groups = field(repr=False)
    """Host process groups of this rank: tensor-parallel, data-parallel."""

    def gather(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Backend.gather_state`. All ranks take part; only rank 0 keeps the result."""
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for item in held(model, optimizer):
            rows = None if item.master is item.parameter else item.parameter.shape[0]
            values = {item.name: item.master, **{f"{item.name}/{kind}": v for kind, v in item.state.items()}}
            for key, value in values.items():
                whole = self._whole(item.name, value.detach().cpu(), rows)
                if self.topology.is_main:
                    (weights if key == item.name else moments)[key] = whole
        return weights, moments

    def load(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
    ) -> None:
        """See `Backend.load_state`."""
        self.load_weights(model, weights)
        for item in held(model, optimizer):
            by_rows = item.master is not item.parameter
            sources = {kind: moments.get(f"{item.name}/{kind}") for kind in item.state}
            whole = {kind: weights[item.name].shape if value.ndim else () for kind, value in item.state.items()}
            unfit = [kind for kind, source in sources.items() if source is None or source.shape != whole[kind]]
            if unfit:
                raise CheckpointError(
                    f"the checkpoint has no {item.name}/{unfit[0]} that fits; use the checkpoint before it"
                )
            targets = [(item.master, weights[item.name])] if by_rows else []
            targets += [(item.state[kind], source) for kind, source in sources.items() if source is not None]
            for target, source in targets:
                part = self._part(item.name, source)
                with torch.no_grad():
                    target.copy_(self._rows(part) if by_rows and part.ndim else upload(part, target.device))

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """See `Backend.load_weights`."""
        mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
        different = sorted(set(mine) ^ set(weights)) or [
            name
            for name, parameter in mine.items()
            if whole_shape(name, parameter.shape, self.heads, self.topology.tp) != tuple(weights[name].shape)
        ]
        if different:
            raise CheckpointError(
                f"the saved weights do not fit the model: {len(different)} parameters differ, the first is "
                f"{different[0]}; use the configuration they were trained with"
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(self._part(name, weights[name]))

    def _whole(self, name: str, value: Tensor, rows: int | None) -> Tensor:
        """`value` from its data-parallel rows (`rows` in all) and its tensor-parallel parts."""
        if value.ndim == 0:
            return value.clone()
        tp, dp = self.groups
        if rows is not None:
            value = torch.cat(_all_gather(value, dp))[:rows]
        return join(name, _all_gather(value, tp), self.heads).clone(memory_format=torch.contiguous_format)

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's tensor-parallel part of `whole`."""
        if whole.ndim == 0:
            return whole
        shard = shard_of(name, whole.shape, self.heads, self.topology.tp, self.topology.tp_rank)
        return shard.read(whole.__getitem__)

    def _rows(self, part: Tensor) -> Tensor:
        """This rank's rows of `part` under ZeRO-1, which pads them to a multiple of the data-parallel degree."""
        missing = -part.shape[0] % self.topology.dp
        padded = F.pad(part, [0, 0] * (part.ndim - 1) + [0, missing])
        return padded.chunk(self.topology.dp)[self.topology.dp_rank]


def host_groups(topology: Topology, patience: timedelta) -> Groups:
    """This rank's tensor-parallel and data-parallel groups on the host (gloo); called by all ranks alike."""
    mine: list[Any] = []
    for all_groups in (topology.tp_groups(), topology.dp_groups()):
        for ranks in all_groups:
            group = dist.new_group(ranks, backend="gloo", timeout=patience)
            if topology.rank in ranks:
                mine.append(group)
    return mine[0], mine[1]


def _all_gather(value: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return parts
