"""Who is where: the world of processes as data-parallel times tensor-parallel. Pure arithmetic, no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esm_neuron.errors import ConfigError
from esm_neuron.models.tensor_parallel import padded_heads

NEURON_CORES = {"trn1.2xlarge": 2, "trn1.32xlarge": 32}
"""NeuronCores of an instance."""
NEURON_WORKERS = {2: (1, 2), 32: (1, 2, 8, 32)}
"""Cores of an instance -> processes per node that its runtime can form collectives over (Neuron documentation)."""
NEURON_TP = {2: (1, 2), 32: (1, 2, 4, 8, 32)}
"""Cores of an instance -> tensor-parallel degrees that lie well on its links (NxD developer guide)."""


@dataclass(frozen=True)
class Topology:
    """One process among `world`. Consecutive ranks form a tensor-parallel group, as in NxD and Megatron.

    With world 4 and tp 2 the TP groups are (0, 1) and (2, 3), the data-parallel groups (0, 2) and (1, 3). The one
    exception is tp 4 on trn1, where NxD takes every eighth rank of a node: see `stride` and `neuron_stride`.
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    tp: int = 1
    """Processes that share one copy of the model."""
    stride: int = 1
    """Distance between the ranks of a tensor-parallel group."""

    def __post_init__(self) -> None:
        if self.tp < 1 or self.world < 1 or self.world % self.tp:
            fits = any_of(divisors(max(self.world, 1)))
            raise ConfigError(f"tp={self.tp} does not divide the world of {self.world} processes; use tp={fits}")
        if self.stride < 1 or self.dp % self.stride:
            raise ConfigError(f"stride {self.stride} does not divide the data-parallel degree {self.dp}; use 1")
        if not 0 <= self.rank < self.world:
            raise ConfigError(
                f"rank {self.rank} is outside a world of {self.world}; start all processes by one launcher"
            )

    @property
    def dp(self) -> int:
        """Return the number of copies of the model: the data-parallel degree."""
        return self.world // self.tp

    @property
    def dp_rank(self) -> int:
        """Return which copy of the model this process belongs to; it reads the packs of this index."""
        # A block of tp * stride ranks holds `stride` copies: neighbors belong to different copies, shards lie `stride`
        # apart.
        block, place = divmod(self.rank, self.tp * self.stride)
        return block * self.stride + place % self.stride

    @property
    def tp_rank(self) -> int:
        """Return which shard of the model this process holds."""
        return self.rank // self.stride % self.tp

    @property
    def is_main(self) -> bool:
        """Return whether this is the one process that prints and writes."""
        return self.rank == 0

    def rank_of(self, dp_rank: int, tp_rank: int) -> int:
        """Return the process that holds shard `tp_rank` of copy `dp_rank`."""
        block, place = divmod(dp_rank, self.stride)
        return (block * self.tp + tp_rank) * self.stride + place

    def tp_groups(self) -> list[list[int]]:
        """Return the ranks of every tensor-parallel group, in order."""
        return [[self.rank_of(copy, shard) for shard in range(self.tp)] for copy in range(self.dp)]

    def dp_groups(self) -> list[list[int]]:
        """Return the ranks of every data-parallel group (equal shards of the model), in order."""
        return [[self.rank_of(copy, shard) for copy in range(self.dp)] for shard in range(self.tp)]

    @classmethod
    def from_env(cls, tp: int = 1, *, neuron: bool = False, env: Mapping[str, str] | None = None) -> Topology:
        """Return this process's place by torchrun's variables, or alone; with `neuron`, in groups as NxD's on trn1."""
        env = os.environ if env is None else env
        world = _integer(env, "WORLD_SIZE", 1)
        local_world = _integer(env, "LOCAL_WORLD_SIZE", world)
        return cls(
            rank=_integer(env, "RANK", 0),
            local_rank=_integer(env, "LOCAL_RANK", 0),
            world=world,
            tp=tp,
            stride=neuron_stride(tp, local_world) if neuron else 1,
        )

    def validate(
        self, heads: int, hidden: int, intermediate: int, model: str, pad_heads: bool = False, can_pad: bool = True
    ) -> None:
        """Raise ConfigError unless `tp` cuts the linears of `model` evenly; `can_pad`: padding may be the cure."""
        if hidden % heads:
            raise ConfigError(f"hidden size {hidden} of {model} is not a multiple of its {heads} attention heads")
        legal = legal_tp(heads, intermediate, pad_heads)
        if self.tp in legal:
            return
        cure = f"use tp={any_of(legal)}"
        if intermediate % self.tp:
            raise ConfigError(f"tp={self.tp} does not divide the intermediate size {intermediate} of {model}; {cure}")
        cure += ", or parallel.pad_heads=true" if can_pad else ""
        raise ConfigError(f"tp={self.tp} does not divide {heads} attention heads of {model}; {cure}")

    def validate_neuron(self, cores: int, local_world: int) -> None:
        """Raise ConfigError unless the Neuron runtime can form groups of these processes on a node of `cores` cores."""
        name = next((name for name, have in NEURON_CORES.items() if have == cores), None)
        if name is None:
            have = ", ".join(f"{name} ({n})" for name, n in NEURON_CORES.items())
            raise ConfigError(f"{cores} NeuronCores found, but a trn1 node has {have}; free the cores other jobs hold")
        if local_world not in NEURON_WORKERS[cores]:
            workers = any_of(NEURON_WORKERS[cores])
            raise ConfigError(f"{local_world} processes on {name}; start {workers} (torchrun --nproc_per_node)")
        if self.world > local_world and cores != 32:
            raise ConfigError(f"{self.world} processes on several {name}; several nodes need trn1.32xlarge")
        if self.world > local_world and local_world != 32:
            raise ConfigError(f"{local_world} processes a node on several nodes; start all 32 (--nproc_per_node=32)")
        if self.tp not in NEURON_TP[cores] or local_world % self.tp:
            fits = [tp for tp in NEURON_TP[cores] if local_world % tp == 0]
            raise ConfigError(f"tp={self.tp} does not lie on the links of {name} with {local_world} processes; "
                              f"use tp={any_of(fits)}")  # fmt: skip


def neuron_stride(tp: int, local_world: int) -> int:
    """Return the distance between ranks of a TP group on trn1: 1, but at tp 4 a quarter of the node's processes.

    NxD's `initialize_model_parallel` does so to put the four on one ring of links: (0, 8, 16, 24) of 32.
    """
    return max(local_world // 4, 1) if tp == 4 else 1


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def legal_tp(heads: int, intermediate: int, pad_heads: bool = False, most: int = 32) -> list[int]:
    """Return the powers of two up to `most` that cut heads (padded if allowed) and intermediate size evenly."""
    powers = [2**n for n in range(most.bit_length()) if 2**n <= most]
    return [
        tp for tp in powers
        if intermediate % tp == 0 and (heads % tp == 0 or (pad_heads and padded_heads(heads, tp) % tp == 0))
    ]  # fmt: skip


def any_of(numbers: Sequence[int]) -> str:
    """Return the numbers in words: [1, 2, 4] -> "1, 2 or 4"."""
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not a number; torchrun sets it") from None
