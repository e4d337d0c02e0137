"""Saving: a checkpoint is whole or invisible, whatever happens while it is written: errors, full disks, kills."""

from __future__ import annotations

import errno
import gc
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import wait_for
from helpers.snapshots import FORK, same, snapshot
from torch import nn

from esm_neuron.backends.cpu import CpuBackend
from esm_neuron.config import CheckpointConfig, TrainConfig
from esm_neuron.errors import CheckpointError
from esm_neuron.training import checkpoint, run
from esm_neuron.training.checkpoint import CheckpointManager, Snapshot


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with whole checkpoints of the steps 1, 2 and 12."""
    for step in (2, 1, 12):
        checkpoint.save(tmp_path, snapshot(step))
    return tmp_path


@pytest.mark.parametrize("failing", ["model", "optimizer"])
def test_a_full_disk_leaves_the_earlier_checkpoints(root: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    real = checkpoint.save_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if path.stem == failing:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    for step in (12, 13):
        with pytest.raises(CheckpointError, match=r"No space left on device.*free space") as caught:
            checkpoint.save(root, snapshot(step))
        assert str(checkpoint.step_folder(root, step)) in str(caught.value)
    monkeypatch.undo()
    assert sorted(p.name for p in root.iterdir()) == ["step-00000001", "step-00000002", "step-00000012"]
    newest = checkpoint.newest(root)
    assert newest is not None
    assert same(newest, snapshot(12))


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        checkpoint.save(tmp_path / "file", snapshot(1))


def in_a_fork(act: Callable[[], None]) -> str:
    """The message of the CheckpointError that `act` raises in a process of its own, "" where it raises none."""
    said, log = FORK.Pipe(duplex=False)

    def child() -> None:
        try:
            act()
        except CheckpointError as error:
            log.send(str(error))
        else:
            log.send("")

    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and said.poll()
    return str(said.recv())


def test_a_file_that_may_not_grow_is_one_line_and_the_earlier_checkpoints_stay(root: Path) -> None:
    """EFBIG by RLIMIT_FSIZE, and not a disk without space: a write fails midway, in safetensors' own code."""

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        checkpoint.save(root, snapshot(13, size=5000))

    said = in_a_fork(fill)
    assert "step-00000013: cannot write the checkpoint (" in said and "free space" in said and "\n" not in said
    assert sorted(p.name for p in root.iterdir()) == ["step-00000001", "step-00000002", "step-00000012"]
    assert in_a_fork(lambda: checkpoint.save(root, snapshot(13, size=50)) and None) == ""


def test_a_folder_that_may_only_be_read_is_one_line_and_stays() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        checkpoint.save(root, snapshot(12))
        for path in (root, root / "step-00000012"):
            path.chmod(0o755)
        root.chmod(0o555)

        def save_as_nobody() -> None:
            if os.getuid() == 0:
                os.setuid(65534)  # permissions do not bind root
            checkpoint.save(root, snapshot(13))

        said = in_a_fork(save_as_nobody)
        root.chmod(0o755)
        assert "cannot write the checkpoint (" in said and "Permission denied" in said and "fix permissions" in said
        newest = checkpoint.newest(root)
        assert newest is not None and same(newest, snapshot(12))


def test_saving_beside_training_holds_one_copy_loses_none_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, writing, most = checkpoint.save, [0], [0]
    may_write = threading.Event()

    def slow(root: Path, snapshot: Snapshot) -> Path:
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        may_write.wait(60)
        try:
            if snapshot.state.step == 3:
                raise CheckpointError("the disk is full")
            return real(root, snapshot)
        finally:
            writing[0] -= 1

    monkeypatch.setattr(checkpoint, "save", slow)
    cfg = TrainConfig(output=str(tmp_path / "out"), checkpoint=CheckpointConfig(keep=2, asynchronous=True))
    linear = nn.Linear(1, 1)
    saver = CheckpointManager(cfg, CpuBackend(cfg), linear, torch.optim.AdamW(linear.parameters()))
    root = saver.folder
    held = snapshot(1)
    alive = weakref.ref(held)
    saver.write(held, best=None)
    del held
    assert checkpoint.steps(root) == [] and alive() is not None, "training goes on while it is written"
    may_write.set()
    saver.wait()
    assert checkpoint.steps(root) == [1]
    gc.collect()
    assert alive() is None, "what is written is let go of"
    saver.write(snapshot(2), best=None)
    saver.wait()
    saver.write(snapshot(3), best=None)
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.wait()
    saver.wait()  # said once
    saver.write(snapshot(4), best=None)
    saver.wait()
    assert checkpoint.steps(root) == [2, 4]
    newest = checkpoint.newest(root)
    assert newest is not None and same(newest, snapshot(4)) and most == [1]
    saver.write(snapshot(3), best=None)
    saver.close()  # as when another error ends the run
    assert caplog.messages == ["the disk is full"]


def test_a_run_gathers_no_snapshot_while_one_is_still_written(
    toy: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save here ends only once it is waited for, as on a disk that is slower than training."""
    write, save, wait = checkpoint.save, CheckpointManager.write, CheckpointManager.wait
    gather = CpuBackend.gather_state
    waited_for, held, seen = threading.Event(), [], []

    def gated_write(root: Path, snapshot: Snapshot) -> Path:
        assert waited_for.wait(60)
        folder = write(root, snapshot)
        held.remove(snapshot.state.step)
        return folder

    def noted_save(self: CheckpointManager, snapshot: Snapshot, best: int | None) -> None:
        waited_for.clear()
        held.append(snapshot.state.step)
        save(self, snapshot, best)

    def opening_wait(self: CheckpointManager) -> None:
        waited_for.set()
        wait(self)

    def noted_gather(self: CpuBackend, *of: Any) -> Any:
        seen.append(list(held))
        return gather(self, *of)

    monkeypatch.setattr(checkpoint, "save", gated_write)
    monkeypatch.setattr(CheckpointManager, "write", noted_save)
    monkeypatch.setattr(CheckpointManager, "wait", opening_wait)
    monkeypatch.setattr(CpuBackend, "gather_state", noted_gather)
    cfg = toy(loop={"max_steps": 6}, checkpoint={"asynchronous": True, "every": 2, "keep": 100})
    run.train(cfg, str)
    assert checkpoint.steps(Path(cfg.output) / "checkpoints") == [2, 4, 6]
    assert len(seen) >= 3 and seen == [[]] * len(seen)


def test_a_save_that_failed_beside_training_ends_the_run_before_the_next(
    toy: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun = checkpoint.save, []

    def fail_once(root: Path, snapshot: Snapshot) -> Path:
        begun.append(snapshot.state.step)
        if begun == [2]:
            raise CheckpointError("the disk is full")
        return write(root, snapshot)

    monkeypatch.setattr(checkpoint, "save", fail_once)
    cfg = toy(loop={"max_steps": 6}, checkpoint={"asynchronous": True, "every": 2})
    with pytest.raises(CheckpointError, match="^the disk is full$"):
        run.train(cfg, str)
    assert begun == [2]
    assert not (Path(cfg.output) / "result.json").exists()


@pytest.mark.parametrize("where", ["save_tensors", "write_json", "sha256"])
def test_a_crash_within_a_save_leaves_nothing_of_it(root: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, where, crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(root, snapshot(13))
    assert checkpoint.steps(root) == [1, 2, 12]
    assert not list(root.glob(".step*"))


def save_for_ever(root: Path) -> None:
    step = 0
    while True:
        step += 1
        checkpoint.save(root, snapshot(step, size=5000))
        checkpoint.prune(root, 2, None)


def test_a_process_killed_while_saving_leaves_whole_checkpoints(tmp_path: Path) -> None:
    interrupted = 0
    for attempt in range(12):
        root = tmp_path / str(attempt)
        process = FORK.Process(target=save_for_ever, args=(root,))
        process.start()
        wait_for(lambda root=root: len(checkpoint.steps(root)) > 0)
        time.sleep(0.002 * attempt)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        seen = checkpoint.steps(root)
        assert seen
        # a pruned one may be half deleted, and is older than two whole ones
        for step in seen[-2:]:
            assert same(checkpoint.load(checkpoint.step_folder(root, step)), snapshot(step, size=5000))
        interrupted += bool(list(root.glob(".step*")))
        checkpoint.prune(root, 2, None)
        assert not list(root.glob(".step*"))
        shutil.rmtree(root)
    assert interrupted > 0  # at least one was killed in the middle of a save
