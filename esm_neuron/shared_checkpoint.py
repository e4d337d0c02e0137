"""Reading a checkpoint on every rank, also where it lies on the main rank's node alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from esm_neuron import checkpoint
from esm_neuron.agreement import from_main
from esm_neuron.backends.base import Backend
from esm_neuron.checkpoint import Snapshot
from esm_neuron.errors import CheckpointError

T = TypeVar("T")


def load_shared(backend: Backend, root: Path, step: int, take: Callable[[Snapshot], T]) -> T:
    """What `take` takes of the checkpoint of `step` under `root`, on every rank.

    Files are mapped, so that ranks which read for themselves share the memory. But the checkpoint may lie on the main
    rank's node alone, as on SageMaker, or be another or damaged elsewhere: then the main rank sends it.

    Raises:
        CheckpointError: the main rank has none that is whole.
    """
    folder = checkpoint.step_folder(root, step)
    seen: str | None = None
    try:
        mine: T | CheckpointError = take(checkpoint.load(folder))
        seen = checkpoint.fingerprint(folder)
    except CheckpointError as error:
        mine = error
    held = set(backend.gather_host(seen))

    def found() -> T:
        if isinstance(mine, CheckpointError):
            raise mine
        return mine

    return found() if len(held) == 1 and seen is not None else from_main(backend, found)
