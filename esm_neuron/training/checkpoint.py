"""Checkpoints: folders that are complete or invisible, and the manager that saves, prunes and restores those of a run.

A checkpoint holds weights, optimizer state, counters and a manifest with their hashes. The learning rate, the order of
the packs, the masks and the dropout of a step are not stored: they are functions of the seed and the step, so a resumed
run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esm_neuron.backends.base import Backend
from esm_neuron.config import TrainConfig
from esm_neuron.distributed import from_main_rank, main_rank_only, raise_on_any_rank
from esm_neuron.errors import CheckpointError
from esm_neuron.files import MANIFEST, misfit, new_folder, read_json, remove, save_tensors, sha256, write_json
from esm_neuron.models.hf_folder import load_tensors
from esm_neuron.run_dir import PASSED_OVER

logger = logging.getLogger(__name__)

VERSION = 1
TENSORS = ("model", "optimizer")
UNREADABLE = "fix the disk or its permissions; nothing was deleted"
"""The cure where the file system fails."""
STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass
class TrainState:
    """The counters of a run: everything that a checkpoint keeps besides tensors."""

    step: int = 0
    """Optimizer steps done."""
    residues: int = 0
    """Residues trained on, over all ranks, padding and special tokens not counted."""
    seconds: float = 0.0
    """Time spent in training steps, without evaluation and saving."""
    stopper: dict[str, Any] = field(default_factory=dict)
    """State of `callbacks.EarlyStopping`."""
    run: dict[str, Any] = field(default_factory=dict)
    """What a continued run must share with this one (configuration and data), see `run.identity`."""
    watch: dict[str, Any] = field(default_factory=dict)
    """State of `monitors.LossWatch`: recent losses, steps without a finite one."""


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds: whole tensors on the host, by parameter name."""

    state: TrainState
    model: dict[str, Tensor]
    """Trained parameters."""
    optimizer: dict[str, Tensor]
    """Optimizer state: `<parameter>/exp_avg`, `/exp_avg_sq`, `/step`."""


class CheckpointManager:
    """Saves, prunes and restores the checkpoints of one run.

    Every public method but `write` and `close` is called on all ranks together, and an error of one rank is raised on
    all. The main rank alone writes; with `checkpoint.asynchronous` in a thread, while training goes on.
    """

    def __init__(self, cfg: TrainConfig, backend: Backend, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder = Path(cfg.output) / "checkpoints"
        self._keep = cfg.checkpoint.keep
        self._backend, self._model, self._optimizer = backend, model, optimizer
        self._pool = ThreadPoolExecutor(1, "checkpoint") if cfg.checkpoint.asynchronous else None
        self._pending: Future[None] | None = None

    def restore(self, identity: Mapping[str, Any]) -> TrainState | None:
        """Load weights and optimizer state of the newest whole checkpoint; return its counters, None without one.

        Raise CheckpointError where the checkpoints belong to another run, none is whole, or the ranks see different
        ones.
        """
        snapshot = raise_on_any_rank(self._backend, lambda: self._newest(identity))
        found = self._backend.gather_host(None if snapshot is None else snapshot.state.step)
        if len(set(found)) > 1:
            raise CheckpointError(
                f"{self.folder}: the ranks find different checkpoints, of steps {found}; give them one shared folder"
            )
        if snapshot is None:
            return None
        self._backend.load_state(self._model, self._optimizer, snapshot.model, snapshot.optimizer)
        return snapshot.state

    def _newest(self, identity: Mapping[str, Any]) -> Snapshot | None:
        snapshot = newest(self.folder)
        if snapshot is not None:
            check_identity(snapshot.state.run, identity, self.folder)
        return snapshot

    def set_aside_unusable(self, step: int, best: int | None, over: bool) -> bool:
        """Rename what a run resumed after `step` cannot use: checkpoints of later steps, and a damaged best one.

        Return whether the one of step `best` was damaged, so that the best of the steps to come takes its place; raise
        CheckpointError if training is `over` and there are none. It is checked here, before training and not after it:
        at the end it could no longer be replaced.
        """
        # The restored run writes later steps anew. Pruning goes by step, and would keep the damaged ones instead.
        main_rank_only(self._backend, lambda: set_aside_after(self.folder, step))
        if best is None or best == step:  # the restored checkpoint itself has just been read
            return False
        folder = step_folder(self.folder, best)
        damaged = from_main_rank(self._backend, lambda: damage(folder))
        if damaged is None:
            return False
        if over:
            raise CheckpointError(
                f"training is over and its best step, {best}, cannot be read: {damaged}; bring this folder back, or "
                f"train again into another --output: the weights of step {step} are not taken in its place"
            )
        main_rank_only(self._backend, lambda: set_aside(folder))
        logger.warning("the best step is looked for anew among those after %d: %s", step, damaged)
        return True

    def save(self, state: TrainState, best: int | None) -> None:
        """Write a checkpoint of the model, the optimizer and `state`, and prune the older ones; `best` stays.

        Raise CheckpointError where it cannot be written, or the one before could not (`checkpoint.asynchronous`).
        """
        if self._pool is not None:
            self.wait()  # before the next snapshot is gathered: the host holds one at most
        weights, moments = self._backend.gather_state(self._model, self._optimizer)
        snapshot = Snapshot(copy(state), weights, moments)
        main_rank_only(self._backend, lambda: self.write(snapshot, best))

    def write(self, snapshot: Snapshot, best: int | None) -> None:
        """Write `snapshot`, or begin to; the main rank's part of `save`."""
        if self._pool is None:
            self._write_and_prune(snapshot, best)
        else:
            self._pending = self._pool.submit(self._write_and_prune, snapshot, best)

    def _write_and_prune(self, snapshot: Snapshot, best: int | None) -> None:
        save(self.folder, snapshot)
        prune(self.folder, self._keep, best)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; if it could not be written, every rank raises, once."""
        main_rank_only(self._backend, self._settle)

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for what is still being written. A failure is logged and not raised: another error ends the run."""
        try:
            self._settle()
        except (CheckpointError, OSError) as error:
            logger.warning("%s", error)

    def load_best(self, best: int | None, last: int) -> tuple[int, dict[str, Tensor]]:
        """Put the weights of the best validated step back; without one, those of the last step stay.

        Return the step of the weights, and the trained ones, whole (on the main rank). Do not gather them again: under
        ZeRO-1 `Backend.gather_state` reads the optimizer's master copies, which are still those of the last step.
        """
        if best is None or best == last:
            return last, self._backend.gather_state(self._model, self._optimizer)[0]
        weights = self.read_weights(best)
        self._backend.load_weights(self._model, weights)
        return best, weights

    def read_weights(self, step: int) -> dict[str, Tensor]:
        """Read the trained weights of a checkpoint on every rank.

        Each rank maps the file for itself where all see the same one, so the ranks of a node share its memory. But the
        checkpoint may lie on the main rank's node alone, as on SageMaker, or be damaged elsewhere: then the main rank
        sends the weights.
        """
        folder = step_folder(self.folder, step)
        weights: dict[str, Tensor] = {}
        seen: str | None = None
        failure: CheckpointError | OSError | None = None
        try:
            weights, seen = load(folder).model, sha256(folder / MANIFEST)
        except (CheckpointError, OSError) as error:
            failure = error
        seen_by_all = self._backend.gather_host(seen)
        if seen is not None and set(seen_by_all) == {seen}:
            return weights

        def of_main_rank() -> dict[str, Tensor]:
            if failure is not None:
                raise failure
            return weights

        return from_main_rank(self._backend, of_main_rank)


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """Return the steps of the checkpoints under `root`, oldest first."""
    names = (STEP_FOLDER.fullmatch(p.name) for p in root.iterdir()) if root.is_dir() else ()
    return sorted(int(m.group(1)) for m in names if m)


def save(root: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint aside, flush it, then rename it: a crash leaves the old ones whole and no half of this one."""
    folder = step_folder(root, snapshot.state.step)
    try:
        with new_folder(folder) as aside:
            for name in TENSORS:
                save_tensors(aside / f"{name}.safetensors", getattr(snapshot, name))
            write_json(aside / "state.json", asdict(snapshot.state))
            # The manifest comes last and lists all files before it: without it, a folder is no checkpoint.
            files = {f.name: {"sha256": sha256(f), "bytes": f.stat().st_size} for f in sorted(aside.iterdir())}
            write_json(aside / MANIFEST, {"version": VERSION, "step": snapshot.state.step, "files": files})
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot write the checkpoint ({error}); free space or fix permissions, then go on with "
            "--checkpoint.resume auto"
        ) from error
    return folder


def load(folder: Path) -> Snapshot:
    """Read a checkpoint back after checking every file against the manifest."""
    verify(folder)
    try:
        tensors = {name: load_tensors(folder / f"{name}.safetensors", "delete its folder") for name in TENSORS}
        state = TrainState(**read_json(folder / "state.json"))
        # JSON carries no types of ours, and a wrong one would fail much later, in the middle of training.
        kinds = {f.name: type(getattr(TrainState(), f.name)) for f in fields(TrainState)}
        wrong = [name for name, kind in kinds.items() if type(getattr(state, name)) is not kind]
        if wrong or step_folder(folder.parent, state.step) != folder:
            raise ValueError(f"state.json: no valid {wrong[0] if wrong else 'step'}")
    except (OSError, ValueError, TypeError) as error:  # whole by its manifest, yet not ours
        raise CheckpointError(f"{folder}: cannot be read ({error}); delete the folder") from error
    return Snapshot(state=state, **tensors)


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there and has its hash."""
    try:
        manifest = read_json(folder / MANIFEST, {"version": int})
        version = manifest["version"]
        if version == VERSION and (wrong := misfit(manifest, {"files": {"*": {"sha256": str}}})):
            raise ValueError(wrong)
    except (OSError, ValueError) as error:
        failing = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        cure = UNREADABLE if failing else "delete the folder"
        raise CheckpointError(f"{folder / MANIFEST}: not a readable manifest ({error}); {cure}") from error
    if version != VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint version {version}, this package reads {VERSION}; use the release that wrote it"
        )
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    wanted = {"state.json", *(f"{name}.safetensors" for name in TENSORS)}
    if set(files) != wanted:
        raise CheckpointError(
            f"{folder / MANIFEST}: lists {sorted(files)}, expected {sorted(wanted)}; delete the folder"
        )
    for name, digest in files.items():
        path = folder / name
        try:
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; the checkpoint is incomplete, delete its folder")
            found = sha256(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {UNREADABLE}") from error
        if found != digest:
            raise CheckpointError(
                f"{path}: content differs from its manifest; the checkpoint is damaged, delete its folder"
            )


def damage(folder: Path) -> str | None:
    """Return why a checkpoint cannot be used, None if it can."""
    try:
        verify(folder)
    except CheckpointError as error:
        return str(error)
    return None


def newest(root: Path) -> Snapshot | None:
    """Read the newest whole checkpoint under `root`, None when there is none; those passed over are logged."""
    found = steps(root)
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


def set_aside_after(root: Path, step: int) -> None:
    """Rename the checkpoints of steps after `step`."""
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
    if os.path.lexists(folder):  # also a link that leads nowhere
        folder.rename(aside)
        logger.warning("%s is now %s; delete it when it is of no use", folder, aside.name)


def prune(root: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the `keep` newest and the one of step `best`, and what killed processes left."""
    for folder in root.glob(".step-*.tmp"):
        remove(folder)
    old = [step_folder(root, step) for step in steps(root)[:-keep] if step != best]
    for folder in old:
        if (folder / MANIFEST).is_file():  # what has none is no checkpoint, whatever its name
            folder.rename(root / f".{folder.name}.pruned.tmp")  # so that none is half there
    for folder in root.glob(".step-*.tmp"):
        remove(folder)


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError when a checkpoint belongs to another run, naming the first values that differ."""
    names = sorted(set(found) | set(wanted))
    differing = [f"{n} was {found.get(n)!r}, is {wanted.get(n)!r}" for n in names if found.get(n) != wanted.get(n)]
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise CheckpointError(
            f"{where}: its checkpoints come from another run: {'; '.join(differing[:3])}{more}; "
            "use the same settings and data, or another --output"
        )
