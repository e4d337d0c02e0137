"""Whole tensors from the shards of a tensor-parallel, ZeRO-1 world and back: over the host, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from esm_neuron.backends.topology import Topology
from esm_neuron.models.tensor_parallel import join, shard_of

Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]


@dataclass(frozen=True)
class ShardedState:
    topology: Topology
    heads: int
    """Attention heads of the model, without padding."""
    groups: Groups = field(repr=False)
    """Host process groups of this rank: tensor-parallel, data-parallel."""

    def whole(self, name: str, value: Tensor, rows: int | None) -> Tensor:
        """Join all ranks' shards of a parameter or a moment; `rows`: of a rank's part, which ZeRO-1 cuts; None: all."""
        if value.ndim == 0:
            return value.clone()
        tp, dp = self.groups
        # Two cuts are undone, the inner one first: rows over data-parallel ranks (padded), then over tensor-parallel
        # ranks.
        if rows is not None:
            value = torch.cat(_all_gather(value, dp))[:rows]
        return join(name, _all_gather(value, tp), self.heads).clone(memory_format=torch.contiguous_format)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's tensor-parallel part of `whole`."""
        shard = shard_of(name, whole.shape, self.heads, self.topology.tp, self.topology.tp_rank)
        return shard.read(whole.__getitem__)

    def rows(self, part: Tensor) -> Tensor:
        """Return this rank's rows of `part` under ZeRO-1, which pads them to a multiple of the data-parallel degree."""
        missing = -part.shape[0] % self.topology.dp
        padded = F.pad(part, [0, 0] * (part.ndim - 1) + [0, missing])
        return padded.chunk(self.topology.dp)[self.topology.dp_rank]


def host_groups(topology: Topology, patience: timedelta) -> Groups:
    """Make this rank's tensor-parallel and data-parallel groups on the host (gloo); called by all ranks alike."""
    mine: list[Any] = []
    for all_groups in (topology.tp_groups(), topology.dp_groups()):
        for ranks in all_groups:
            # torch wants every process to make every group, in the same order, also those that it is not in.
            group = dist.new_group(ranks, backend="gloo", timeout=patience)
            if topology.rank in ranks:
                mine.append(group)
    return mine[0], mine[1]


def _all_gather(value: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return parts
