"""Step folders that are complete or invisible: weights, optimizer and counters, with a manifest of their hashes.

What is *not* stored is as deliberate: the learning rate, the order of rows, the masks and the dropout of every step are
functions of the seed and the step, so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from esm_neuron.backends.base import Backend
from esm_neuron.distributed import from_main_rank
from esm_neuron.errors import CheckpointError
from esm_neuron.files import new_folder, read_json, sha256, write_json
from esm_neuron.run_dir import PASSED_OVER
from esm_neuron.training import checkpoint

logger = logging.getLogger(__name__)

VERSION = 1
MANIFEST = "manifest.json"
TENSORS = ("model", "optimizer")
_UNREADABLE = "mend the disk or the rights, nothing was deleted"
"""The cure where the file system fails."""
STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass
class TrainState:
    """Counters of a run, all that a checkpoint keeps beside tensors."""

    step: int = 0
    """Optimizer steps done."""
    residues: int = 0
    """True residues trained on, over all ranks."""
    seconds: float = 0.0
    """Time in training steps, evaluation and saving left out."""
    stopper: dict[str, Any] = field(default_factory=dict)
    """State of early stopping: best value, its step, validations since."""
    run: dict[str, Any] = field(default_factory=dict)
    """What a continued run must share with this one (configuration and data), see `run.identity`."""
    watch: dict[str, Any] = field(default_factory=dict)
    """State of `guards.StepWatch`: recent losses, steps without a finite one."""


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds: whole tensors on the host, by parameter name."""

    state: TrainState
    model: dict[str, Tensor]
    """Trained parameters."""
    optimizer: dict[str, Tensor]
    """Optimizer state: `<parameter>/exp_avg`, `/exp_avg_sq`, `/step`."""


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return root / f"step-{step:08d}"


def save(root: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint: aside, flushed, then renamed, so that a crash leaves the old ones and no half of this one.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    folder = step_folder(root, snapshot.state.step)
    try:
        with new_folder(folder) as aside:
            for name in TENSORS:
                save_file(getattr(snapshot, name), aside / f"{name}.safetensors")
            write_json(aside / "state.json", asdict(snapshot.state))
            files = {f.name: {"sha256": sha256(f), "bytes": f.stat().st_size} for f in sorted(aside.iterdir())}
            write_json(aside / MANIFEST, {"version": VERSION, "step": snapshot.state.step, "files": files})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot write the checkpoint ({error}); free space or fix permissions, then go on with "
            "--checkpoint.resume auto"
        ) from error
    return folder


def load(folder: Path) -> Snapshot:
    """Read a checkpoint back after checking every file against the manifest.

    Raises:
        CheckpointError: something is missing, changed, or of another version; names the file.
    """
    verify(folder)
    try:
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in TENSORS}
        state = TrainState(**read_json(folder / "state.json"))
        kinds = {f.name: type(getattr(TrainState(), f.name)) for f in fields(TrainState)}
        wrong = [name for name, kind in kinds.items() if type(getattr(state, name)) is not kind]
        if wrong or step_folder(folder.parent, state.step) != folder:
            raise ValueError(f"state.json: no sound {wrong[0] if wrong else 'step'}")
    except (OSError, SafetensorError, ValueError, TypeError) as error:  # whole by its manifest, and yet none of ours
        raise CheckpointError(f"{folder}: cannot be read ({error}); delete the folder") from error
    return Snapshot(state=state, **tensors)


class Saver:
    """Writes the checkpoints of a run under `root` and prunes them; with `asynchronous`, in a thread of its own.

    One snapshot at most is held: `settle` must be called before the next one is made, and at the end. `every`: steps
    between regular checkpoints, see `prune`.
    """

    def __init__(self, root: Path, keep: int, every: int, asynchronous: bool) -> None:
        self._root, self._keep, self._every = root, keep, every
        self._pool = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot, best: int | None) -> None:
        """Write `snapshot`, or begin to; raises as `checkpoint.save`, or has the next `settle` raise it."""
        if self._pool is None:
            self._write(snapshot, best)
        else:
            self._pending = self._pool.submit(self._write, snapshot, best)

    def settle(self) -> None:
        """Wait until the last snapshot is written.

        Raises:
            CheckpointError: it could not be; said once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for what is still being written. A failure is said and not raised: another error ends the run."""
        try:
            self.settle()
        except (CheckpointError, OSError) as error:
            logger.warning("%s", error)

    def _write(self, snapshot: Snapshot, best: int | None) -> None:
        save(self._root, snapshot)
        prune(self._root, self._keep, best, self._every)


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there and has its hash."""
    for path in (folder, folder / MANIFEST):
        _refuse_link(path)
    try:
        manifest = read_json(folder / MANIFEST)
        version = manifest["version"]
        files = {n: str(entry["sha256"]) for n, entry in manifest["files"].items()} if version == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        gone = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        cure = _UNREADABLE if gone else "delete the folder"
        raise CheckpointError(f"{folder / MANIFEST}: not a readable manifest ({error}); {cure}") from error
    if version != VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint version {version}, this package reads {VERSION}; use the release that wrote it"
        )
    wanted = {"state.json", *(f"{name}.safetensors" for name in TENSORS)}
    if set(files) != wanted:
        raise CheckpointError(
            f"{folder / MANIFEST}: lists {sorted(files)}, expected {sorted(wanted)}; delete the folder"
        )
    for name, digest in files.items():
        path = folder / name
        try:
            _refuse_link(path)
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; the checkpoint is incomplete, delete its folder")
            found = sha256(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_UNREADABLE}") from error
        if found != digest:
            raise CheckpointError(
                f"{path}: content differs from its manifest; the checkpoint is damaged, delete its folder"
            )


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, None if it can."""
    try:
        verify(folder)
    except CheckpointError as error:
        return str(error)
    return None


def _refuse_link(path: Path) -> None:
    try:
        linked = path.is_symlink()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_UNREADABLE}") from error
    if linked:
        raise CheckpointError(f"{path}: a link, which may lead anywhere; copy the checkpoint with its files")


def steps(root: Path) -> list[int]:
    """Steps of the checkpoints under `root`, oldest first."""
    names = (STEP_FOLDER.fullmatch(p.name) for p in root.iterdir()) if root.is_dir() else ()
    return sorted(int(m.group(1)) for m in names if m)


def newest(root: Path, every: int = 1) -> Snapshot | None:
    """The newest whole checkpoint under `root`, None when there is none; says in the log which ones it passed over.

    Args:
        root: folder of the checkpoints.
        every: those of steps that are its multiples are taken before all others.

    Raises:
        CheckpointError: there are checkpoints and not one is whole.
    """
    found = sorted(steps(root), key=lambda step: (step % every == 0, step))
    for step in reversed(found):
        try:
            return load(step_folder(root, step))
        except CheckpointError as error:
            logger.warning("passed over a checkpoint: %s", error)
    if found:
        raise CheckpointError(
            f"{root}: none of its {len(found)} checkpoints is whole; start again with another --output"
        )
    return None


def fingerprint(folder: Path) -> str:
    """What two checkpoints of equal content share: the hash of their manifest.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return sha256(folder / MANIFEST)
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be read ({error.strerror}); {_UNREADABLE}") from error


def set_aside_after(root: Path, step: int) -> None:
    """Rename the checkpoints of steps after `step`, which a resumed run has passed over and will write anew."""
    for later in steps(root):
        if later > step:
            set_aside(step_folder(root, later))


def set_aside(folder: Path) -> None:
    """Rename a checkpoint that cannot be used, if it is there.

    It is not deleted: a newer release may have written it, or its disk may be read again another day.
    """
    number = 1
    while os.path.lexists(aside := folder.with_name(f"{PASSED_OVER}{folder.name}-{number}")):
        number += 1
    if os.path.lexists(folder):  # a link that leads nowhere, too
        folder.rename(aside)
        logger.warning("%s is now %s; delete it when it is of no use", folder, aside.name)


def prune(root: Path, keep: int, best: int | None, every: int = 1) -> None:
    """Delete all checkpoints but those named, and what killed processes left half-written.

    Args:
        root: their folder.
        keep: how many of the newest stay.
        best: step of the best one, which stays.
        every: the newest of the steps that are its multiples stays too: what a rollback goes back to, however often a
            run was stopped in between.
    """
    found = steps(root)
    regular = [step for step in found if step % every == 0]
    for step in found[:-keep]:
        if step not in (best, *regular[-1:]):
            folder = step_folder(root, step)
            if folder.is_symlink():
                folder.unlink()  # and not what it leads to
            else:
                shutil.rmtree(folder)
    for aside in root.glob(".step-*.tmp"):
        shutil.rmtree(aside)


def check_identity(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError when a checkpoint belongs to another run, naming the first values that differ."""
    names = sorted(set(found) | set(wanted))
    differing = [f"{n} was {found.get(n)!r}, is {wanted.get(n)!r}" for n in names if found.get(n) != wanted.get(n)]
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise CheckpointError(
            f"{where}: its checkpoints come from another run: {'; '.join(differing[:3])}{more}; "
            "use the same settings and data, or another --output"
        )


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

    return found() if len(held) == 1 and seen is not None else from_main_rank(backend, found)
