"""Errors that every rank learns of: nobody waits in a collective for a peer that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from esm_neuron.backends.base import Backend
from esm_neuron.errors import EsmNeuronError

T = TypeVar("T")


def raise_on_any_rank(backend: Backend, act: Callable[[], T]) -> T:
    """Do `act` on every rank, without collectives in it; if it fails on any, all raise the first one's error.

    Raises:
        EsmNeuronError: a known error of any rank.
        OSError: of the file system, of any rank.
    """
    value, failure = _attempt(act)
    for rank, error in enumerate(backend.gather_host(failure)):
        if error is not None:
            raise failure or type(error)(f"rank {rank}: {error}")
    return cast(T, value)  # nothing failed, so `act` has given it


def main_rank_only(backend: Backend, act: Callable[[], T]) -> T | None:
    """Do `act` on the main rank alone, and give None elsewhere; every rank raises its error, as by `agree`."""
    return raise_on_any_rank(backend, act if backend.topology.is_main else lambda: None)


def from_main_rank(backend: Backend, act: Callable[[], T]) -> T:
    """Do `act` on the main rank alone and give its value to all: for files that other nodes may not see."""
    return backend.broadcast_host(cast(T, main_rank_only(backend, act)))  # the others' None is not looked at


def _attempt(act: Callable[[], T]) -> tuple[T | None, EsmNeuronError | OSError | None]:
    try:
        return act(), None
    except (EsmNeuronError, OSError) as error:
        return None, error


def log_nothing(line: str) -> None:
    """Print nothing: the `log` of every rank but the main one."""
