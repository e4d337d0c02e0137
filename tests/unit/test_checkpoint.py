"""Checkpoints: whole or invisible, whatever happens while they are written, and never taken for another run's."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.snapshots import FILES, same, snapshot

from esm_neuron.errors import CheckpointError
from esm_neuron.files import write_json
from esm_neuron.training import checkpoint
from esm_neuron.training.checkpoint import Snapshot, TrainState


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
        (checkpoint.step_folder(tmp_path, step) / "manifest.json").touch()
    others = [tmp_path / "notes", checkpoint.step_folder(tmp_path, 0)]
    for folder in others:  # somebody else's: no manifest is in it
        folder.mkdir()
    checkpoint.prune(tmp_path, keep, best)
    assert checkpoint.steps(tmp_path) == [0, *left]
    assert all(folder.is_dir() for folder in others)


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


def test_a_link_that_leads_nowhere_is_set_aside_too(root: Path) -> None:
    link = checkpoint.step_folder(root, 13)
    link.symlink_to(root / "gone")
    found = checkpoint.newest(root)
    assert found is not None and found.state.step == 12
    checkpoint.set_aside_after(root, 12)
    assert checkpoint.steps(root) == [1, 2, 12]
    checkpoint.save(root, snapshot(13))


@pytest.mark.xfail(
    sys.version_info >= (3, 14), reason="there Path.is_file says False of a disk that fails", strict=True
)
def test_a_folder_that_cannot_be_looked_at_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a disk that fails, or of another user's on NFS; a test that runs as root may look at all of its own."""
    stat = Path.stat

    def failing(self: Path, **how: Any) -> os.stat_result:
        if self.parent.name == "step-00000012":
            raise OSError(5, "Input/output error", str(self))
        return stat(self, **how)

    monkeypatch.setattr(Path, "stat", failing)
    said = str(checkpoint.damage(checkpoint.step_folder(root, 12)))
    assert "Input/output error" in said and said.endswith("fix the disk or its permissions; nothing was deleted")
    found = checkpoint.newest(root)
    assert found is not None and found.state.step == 2


def test_a_checkpoint_behind_a_link_is_read_and_what_it_leads_to_is_not_deleted(root: Path, tmp_path: Path) -> None:
    elsewhere = checkpoint.step_folder(tmp_path / "scratch", 1)
    elsewhere.parent.mkdir()
    checkpoint.step_folder(root, 1).rename(elsewhere)
    checkpoint.step_folder(root, 1).symlink_to(elsewhere)
    file = elsewhere / "state.json"
    file.rename(tmp_path / "state.json")
    file.symlink_to(tmp_path / "state.json")
    (root / ".step-00000002-1.tmp").symlink_to(tmp_path / "scratch")
    assert same(checkpoint.load(checkpoint.step_folder(root, 1)), snapshot(1))
    checkpoint.prune(root, 1, None)
    assert checkpoint.steps(root) == [12] and not list(root.glob(".step-*"))
    assert same(checkpoint.load(elsewhere), snapshot(1))
