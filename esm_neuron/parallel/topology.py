"""Who is where: the world of processes as data-parallel times tensor-parallel. Pure arithmetic, no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from esm_neuron.errors import ConfigError
from esm_neuron.parallel.plan import padded_heads

NEURON_CORES = {"trn1.2xlarge": 2, "trn1.32xlarge": 32}
"""NeuronCores of an instance."""
NEURON_WORKERS = {2: (1, 2), 32: (1, 2, 8, 32)}
"""Cores of an instance -> processes a node that its runtime can form collectives over (Neuron documentation, torchrun)."""
NEURON_TP = {2: (1, 2), 32: (1, 2, 4, 8, 32)}
"""Cores of an instance -> tensor-parallel degrees that lie well on its links (NxD developer guide)."""


@dataclass(frozen=True)
class Topology:
    """One process among `world`. Consecutive ranks form a tensor-parallel group, as in NxD and Megatron.

    With world 4 and tp 2 the TP groups are (0, 1) and (2, 3), the data-parallel groups (0, 2) and (1, 3).
    """

    rank: int = 0
    """Index among all processes."""
    local_rank: int = 0
    """Index among the processes of this node."""
    world: int = 1
    """Number of processes."""
    tp: int = 1
    """Processes that share one copy of the model."""

    def __post_init__(self) -> None:
        if self.tp < 1 or self.world < 1 or self.world % self.tp:
            fits = ", ".join(str(tp) for tp in divisors(self.world)) if self.world > 0 else "none"
            raise ConfigError(f"tp={self.tp} does not divide the world of {self.world} processes; use tp={fits}")
        if not 0 <= self.rank < self.world:
            raise ConfigError(
                f"rank {self.rank} is outside a world of {self.world}; start all processes by one launcher"
            )

    @property
    def dp(self) -> int:
        """Copies of the model: the data-parallel degree."""
        return self.world // self.tp

    @property
    def dp_rank(self) -> int:
        """Which copy of the model this process belongs to; it reads the rows of this index."""
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        """Which shard of the model this process holds."""
        return self.rank % self.tp

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes."""
        return self.rank == 0

    def tp_groups(self) -> list[list[int]]:
        """Ranks of every tensor-parallel group, in order."""
        return [list(range(first, first + self.tp)) for first in range(0, self.world, self.tp)]

    def dp_groups(self) -> list[list[int]]:
        """Ranks of every data-parallel group (equal shards of the model), in order."""
        return [list(range(shard, self.world, self.tp)) for shard in range(self.tp)]

    @classmethod
    def from_env(cls, tp: int = 1, env: Mapping[str, str] | None = None) -> Topology:
        """The place that torchrun (RANK, LOCAL_RANK, WORLD_SIZE) gave this process; alone where it gave none.

        Raises:
            ConfigError: tp does not divide the world, or a variable is no number.
        """
        env = os.environ if env is None else env
        return cls(
            rank=_integer(env, "RANK", 0), local_rank=_integer(env, "LOCAL_RANK", 0),
            world=_integer(env, "WORLD_SIZE", 1), tp=tp,
        )  # fmt: skip

    def validate(self, heads: int, hidden: int, intermediate: int, model: str, pad_heads: bool = False) -> None:
        """Check that `tp` cuts the model's linears evenly.

        Args:
            heads: attention heads. With `pad_heads`, zero heads are added until tp divides them.
            hidden: hidden size, not cut itself unless it is heads times their width.
            intermediate: width of the feed-forward layer.
            model: its name, for the message.
            pad_heads: the value of `parallel.pad_heads`.

        Raises:
            ConfigError: with the degrees that fit.
        """
        if hidden % heads:
            raise ConfigError(f"hidden size {hidden} of {model} is not a multiple of its {heads} attention heads")
        legal = legal_tp(heads, intermediate, pad_heads)
        if self.tp in legal:
            return
        cure = f"use tp={_or(legal)}"
        if intermediate % self.tp:
            raise ConfigError(f"tp={self.tp} does not divide the intermediate size {intermediate} of {model}; {cure}")
        raise ConfigError(
            f"tp={self.tp} does not divide {heads} attention heads of {model}; {cure}, or parallel.pad_heads=true"
        )

    def validate_neuron(self, cores: int, local_world: int) -> None:
        """Check what the Neuron runtime can form groups of.

        Args:
            cores: NeuronCores of this node, 2 (trn1.2xlarge) or 32 (trn1.32xlarge).
            local_world: processes on this node.

        Raises:
            ConfigError: with the numbers that work.
        """
        name = next((name for name, have in NEURON_CORES.items() if have == cores), None)
        if name is None:
            have = ", ".join(f"{name} ({n})" for name, n in NEURON_CORES.items())
            raise ConfigError(f"{cores} NeuronCores found, but a trn1 node has {have}; free the cores other jobs hold")
        if local_world not in NEURON_WORKERS[cores]:
            workers = _or(NEURON_WORKERS[cores])
            raise ConfigError(f"{local_world} processes on {name}; start {workers} (torchrun --nproc_per_node)")
        if self.world > local_world and cores != 32:
            raise ConfigError(f"{self.world} processes on several {name}; several nodes need trn1.32xlarge")
        if self.world > local_world and local_world != 32:
            raise ConfigError(f"{local_world} processes a node on several nodes; start all 32 (--nproc_per_node=32)")
        if self.tp not in NEURON_TP[cores] or local_world % self.tp:
            fits = [tp for tp in NEURON_TP[cores] if local_world % tp == 0]
            raise ConfigError(f"tp={self.tp} does not lie on the links of {name} with {local_world} processes; "
                              f"use tp={_or(fits)}")  # fmt: skip


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def legal_tp(heads: int, intermediate: int, pad_heads: bool = False, most: int = 32) -> list[int]:
    """Tensor-parallel degrees up to `most`, powers of two, that cut heads (padded if allowed) and intermediate size."""
    powers = [2**n for n in range(most.bit_length()) if 2**n <= most]
    return [
        tp for tp in powers
        if intermediate % tp == 0 and (heads % tp == 0 or (pad_heads and padded_heads(heads, tp) % tp == 0))
    ]  # fmt: skip


def _or(numbers: list[int] | tuple[int, ...]) -> str:
    """[1, 2, 4] -> "1, 2 or 4"."""
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not a number; torchrun sets it") from None
