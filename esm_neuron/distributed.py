"""Raise an error of one rank on all of them, so that none waits in a collective for a peer that has failed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

from esm_neuron.errors import EsmNeuronError

if TYPE_CHECKING:
    from esm_neuron.backends.base import Backend

T = TypeVar("T")


def raise_on_any_rank(backend: Backend, act: Callable[[], T]) -> T:
    """Do `act`, which has no collectives in it, on every rank; if it fails on any, all raise the first rank's error.

    This holds for an EsmNeuronError and an OSError; any other is a bug and goes up on its own rank.
    """
    value: T | None = None
    failure: EsmNeuronError | OSError | None = None
    try:
        value = act()
    except (EsmNeuronError, OSError) as error:
        failure = error
    # Every rank comes here, failed or not, so that no rank goes on alone into a collective.
    for rank, found in enumerate(backend.gather_host(failure)):
        if found is not None:
            raise failure or type(found)(f"rank {rank}: {found}")
    return cast(T, value)  # nothing failed, so `act` has given it


def main_rank_only(backend: Backend, act: Callable[[], T]) -> T | None:
    """Do `act` on the main rank alone and return None elsewhere; every rank raises its error."""
    return raise_on_any_rank(backend, act if backend.topology.is_main else lambda: None)


def from_main_rank(backend: Backend, act: Callable[[], T]) -> T:
    """Do `act` on the main rank alone and return its value on all: for files that other nodes may not see."""
    return backend.broadcast_host(cast(T, main_rank_only(backend, act)))  # the other ranks' None is not used


def is_alone() -> bool:
    """Return whether this is the only process, so that it may raise an error before it has met its peers."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def log_nothing(line: str) -> None:
    """Log nothing: the `log` of every rank but the main one."""
