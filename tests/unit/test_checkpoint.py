"""Checkpoints: whole or invisible, whatever happens while they are written, and never taken for another run's."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
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

import pytest
import torch
from waiting import wait_for

from esm_neuron import checkpoint
from esm_neuron.checkpoint import Saver, Snapshot, TrainState
from esm_neuron.errors import CheckpointError
from esm_neuron.files import write_json

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
FORK = multiprocessing.get_context("fork")


def snapshot(step: int, size: int = 50) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "a.weight": torch.randn(size, 7, generator=generator),
        "b": torch.randn(3, generator=generator).bfloat16(),
    }
    moments = {
        "a.weight/exp_avg": torch.randn(size, 7, generator=generator),
        "a.weight/step": torch.tensor(float(step)),
    }
    state = TrainState(step, 123 * step, 4.5, {"best": 0.1, "best_step": None}, {"seed": 1, "task.labels": ["a", "é"]})
    return Snapshot(state, weights, moments)


def same(a: Snapshot, b: Snapshot) -> bool:
    """Equal to the last bit."""
    pairs = ((a.model, b.model), (a.optimizer, b.optimizer))
    tensors = all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x) for x, y in pairs
    )
    return tensors and a.state == b.state


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with whole checkpoints of the steps 1, 2 and 12."""
    for step in (2, 1, 12):
        checkpoint.save(tmp_path, snapshot(step))
    return tmp_path


def test_a_checkpoint_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, snapshot(7))
    assert folder == tmp_path / "step-00000007"
    assert tuple(sorted(p.name for p in folder.iterdir())) == FILES
    assert same(checkpoint.load(folder), snapshot(7))
    assert not same(checkpoint.load(folder), snapshot(8))


def test_a_run_without_optimizer_state_or_weights_can_be_saved(tmp_path: Path) -> None:
    empty = Snapshot(TrainState(3), {}, {})
    assert same(checkpoint.load(checkpoint.save(tmp_path, empty)), empty)


def test_the_newest_is_the_last_step_not_the_last_written(root: Path) -> None:
    assert checkpoint.steps(root) == [1, 2, 12]
    newest = checkpoint.newest(root)
    assert newest is not None
    assert same(newest, snapshot(12))


def test_no_checkpoint_is_none_and_no_error(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "not there") is None


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], None]] = {"flipped": flip_a_bit, "truncated": truncate, "missing": Path.unlink}


@pytest.mark.parametrize("file", [f for f in FILES if f != "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_the_files_name_and_the_one_before_is_taken(
    root: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint.step_folder(root, 12)
    DAMAGE[damage](folder / file)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    assert str(folder / file) in str(caught.value)
    newest = checkpoint.newest(root)
    assert newest is not None
    assert same(newest, snapshot(2))
    (said,) = caplog.messages
    assert said.startswith("passed over a checkpoint: ") and str(folder / file) in said


def test_a_file_that_cannot_be_read_is_named_and_the_checkpoint_before_is_taken(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, real = checkpoint.step_folder(root, 12) / "optimizer.safetensors", checkpoint.sha256

    def failing(file: Path) -> str:
        if file == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file)

    monkeypatch.setattr(checkpoint, "sha256", failing)
    newest = checkpoint.newest(root)
    assert newest is not None and same(newest, snapshot(2))
    assert f"{path}: cannot be read (Input/output error)" in caplog.text


def edit(**values: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        write_json(path, json.loads(path.read_text()) | values)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_text(""),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("3"),
        lambda path: path.write_text("{}"),
        lambda path: path.write_bytes(b"\xff\xfe"),
        edit(files=3),
        edit(files=[]),
        edit(files={}),
        edit(files=dict.fromkeys(FILES[1:], 3)),
        edit(files={name: {} for name in FILES[1:]}),
        edit(files={name: {"sha256": None} for name in FILES[1:]}),
        edit(files={**{name: {"sha256": "0"} for name in FILES[1:]}, "../../elsewhere": {"sha256": "0"}}),
        edit(version=2),
        edit(version=2, files="another form"),
        edit(version=None),
    ],
)
def test_a_manifest_that_is_none_is_refused(root: Path, damage: Callable[[Path], None]) -> None:
    folder = checkpoint.step_folder(root, 12)
    damage(folder / "manifest.json")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_version_is_said_to_be_one(root: Path) -> None:
    edit(version=9, files="another form")(checkpoint.step_folder(root, 12) / "manifest.json")
    with pytest.raises(CheckpointError, match=r"version 9, this package reads 1; use the release that wrote it"):
        checkpoint.load(checkpoint.step_folder(root, 12))


def test_none_whole_is_an_error_and_not_a_new_start(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in checkpoint.steps(root):
        flip_a_bit(checkpoint.step_folder(root, step) / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is whole"):
        checkpoint.newest(root)
    assert len(caplog.messages) == 3


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, None, [4, 5]), (2, 1, [1, 4, 5]), (1, 5, [5]), (2, 4, [4, 5]), (9, None, [1, 2, 3, 4, 5]), (1, 99, [5])],
)
def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    for step in range(1, 6):
        checkpoint.step_folder(tmp_path, step).mkdir()
    (tmp_path / "notes").mkdir()
    checkpoint.prune(tmp_path, keep, best)
    assert checkpoint.steps(tmp_path) == left
    assert (tmp_path / "notes").is_dir()


def test_pruning_keeps_what_a_rollback_goes_back_to(tmp_path: Path) -> None:
    for step in (3, 6, 7, 8):
        checkpoint.step_folder(tmp_path, step).mkdir()
    checkpoint.prune(tmp_path, 2, None, every=3)
    assert checkpoint.steps(tmp_path) == [6, 7, 8]


def test_the_newest_of_regular_steps(root: Path) -> None:
    for every, step in ((1, 12), (2, 12), (5, None)):
        found = checkpoint.newest(root, every)
        assert (found and found.state.step) == step


def test_pruning_removes_what_a_killed_process_left(root: Path) -> None:
    (root / ".step-00000013.4711.tmp").mkdir()
    checkpoint.prune(root, 3, None)
    assert sorted(p.name for p in root.iterdir()) == ["step-00000001", "step-00000002", "step-00000012"]


def test_another_runs_checkpoint_is_refused_with_what_differs() -> None:
    found = {"seed": 1, "optim.lr": 0.1, "data": "abc", "gone": 3}
    checkpoint.check_identity(found, dict(found), Path("out"))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_identity(found, {"seed": 2, "optim.lr": 0.1, "data": "abc", "new": None}, Path("out"))
    assert "gone was 3, is None; seed was 1, is 2;" in str(caught.value)
    assert "optim.lr" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"and 2 more"):
        checkpoint.check_identity({str(i): i for i in range(5)}, {}, Path("out"))


@pytest.mark.parametrize("failing", ["model", "optimizer"])
def test_a_full_disk_leaves_the_earlier_checkpoints(root: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    real = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.stem == failing:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
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
    said, say = FORK.Pipe(duplex=False)

    def child() -> None:
        try:
            act()
        except CheckpointError as error:
            say.send(str(error))
        else:
            say.send("")

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
    saver = Saver(tmp_path, keep=2, every=1, asynchronous=True)
    held = snapshot(1)
    alive = weakref.ref(held)
    saver.save(held, best=None)
    del held
    assert checkpoint.steps(tmp_path) == [] and alive() is not None, "training goes on while it is written"
    may_write.set()
    saver.settle()
    assert checkpoint.steps(tmp_path) == [1]
    gc.collect()
    assert alive() is None, "what is written is let go of"
    saver.save(snapshot(2), best=None)
    saver.settle()
    saver.save(snapshot(3), best=None)
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.settle()
    saver.settle()  # said once
    saver.save(snapshot(4), best=None)
    saver.settle()
    assert checkpoint.steps(tmp_path) == [2, 4]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and same(newest, snapshot(4)) and most == [1]
    saver.save(snapshot(3), best=None)
    saver.close()  # as when another error ends the run
    assert caplog.messages == ["the disk is full"]


@pytest.mark.parametrize("where", ["save_file", "write_json", "sha256"])
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


def test_what_a_resumed_run_passed_over_is_set_aside(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise pruning, which counts by step, would delete the new checkpoints in favour of the damaged one."""
    edit(version=9)(checkpoint.step_folder(root, 12) / "manifest.json")
    before = (checkpoint.step_folder(root, 12) / "manifest.json").read_bytes()
    checkpoint.set_aside_after(root, 2)
    assert checkpoint.steps(root) == [1, 2]
    checkpoint.save(root, snapshot(12))
    checkpoint.set_aside_after(root, 2)
    kept = sorted(root.glob("passed-over-*"))
    assert [path.name for path in kept] == ["passed-over-step-00000012-1", "passed-over-step-00000012-2"]
    assert (kept[0] / "manifest.json").read_bytes() == before, "the release that wrote it can still read it"
    assert all("delete it when it is of no use" in said for said in caplog.messages)
    checkpoint.prune(root, 1, None)
    assert checkpoint.steps(root) == [2] and len(list(root.glob("passed-over-*"))) == 2
