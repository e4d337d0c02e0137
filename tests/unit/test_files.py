"""Files and folders: replaced whole, and held by one process at a time."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import wait_for

from esm_neuron.data.cache import cached
from esm_neuron.errors import ConfigError
from esm_neuron.files import (
    LEDGER,
    NUMBER,
    check_apart,
    check_ours,
    claimed,
    misfit,
    new_file,
    new_folder,
    note,
    note_output,
    read_json,
    save_tensors,
    write_json,
    write_text,
)

FORK = multiprocessing.get_context("fork")


def claim_from_another_process(folder: Path) -> int | None:
    """Exit code of a process that claims `folder`: 0 when it could, 3 when it was refused."""

    def child() -> None:
        try:
            with claimed(folder):
                os._exit(0)
        except ConfigError as error:
            os._exit(3 if str(folder) in str(error) and "in use" in str(error) else 4)

    process = FORK.Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def test_one_process_at_a_time_holds_an_output_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with claimed(folder):
        assert claim_from_another_process(folder) == 3
    assert claim_from_another_process(folder) == 0


def hold_for_ever(folder: Path) -> None:
    with claimed(folder):
        (folder / "held").touch()
        time.sleep(600)


def test_a_killed_process_lets_go_of_its_folder(tmp_path: Path) -> None:
    process = FORK.Process(target=hold_for_ever, args=(tmp_path,))
    process.start()
    wait_for((tmp_path / "held").exists)
    assert claim_from_another_process(tmp_path) == 3
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert claim_from_another_process(tmp_path) == 0


def test_a_folder_that_cannot_be_claimed_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/out cannot be written"), claimed(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_no_running_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    said = rf"{tmp_path} cannot be locked \({os.strerror(number)}\); .* \(Lustre: mount -o flock\)$"
    with pytest.raises(ConfigError, match=f"^output={said}"), claimed(tmp_path):
        pass
    with pytest.raises(ConfigError, match=f"^data.cache={said}"):
        cached(tmp_path, "key", lambda folder: None)


def test_a_text_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": float("nan")})
    assert path.read_text() == "old"
    write_json(path, {"é": 1})
    assert json.loads(path.read_text()) == {"é": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_new_folder_takes_the_old_ones_place_only_when_it_is_done(tmp_path: Path) -> None:
    target = tmp_path / "model"
    note(tmp_path, [])
    with new_folder(target) as aside:
        (aside / "old").touch()
    with pytest.raises(FileNotFoundError), new_folder(target) as aside:
        (aside / "not there" / "new").touch()
    assert [p.name for p in target.iterdir()] == ["old"]
    with new_folder(target) as aside:
        (aside / "new").touch()
        assert [p.name for p in target.iterdir()] == ["old"]
    assert [p.name for p in target.iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [LEDGER, "model"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to nothing", "added file"])
def test_what_others_wrote_is_not_replaced(tmp_path: Path, kind: str) -> None:
    note(tmp_path, ["b"])
    target = tmp_path / "adapter"
    if kind == "file":
        target.write_text("mine")
    elif kind == "link to nothing":
        target.symlink_to(tmp_path / "nothing")
    elif kind == "link":
        (tmp_path / "mine").mkdir()
        target.symlink_to(tmp_path / "mine")
    else:
        with new_folder(target) as aside:
            (aside / "ours").touch()
        check_ours(tmp_path, ["adapter"])
        if kind == "folder":
            (tmp_path / LEDGER).unlink()
        else:
            (target / "deep").mkdir()
            (target / "deep" / "notes.txt").write_text("mine")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="adapter.* is in the way"), new_folder(target):
        pass
    with pytest.raises(ConfigError, match="adapter.* is in the way"):
        check_ours(tmp_path, ["config.yaml", "adapter"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    check_ours(tmp_path, ["b", "not there"])


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    def killed() -> None:
        with new_folder(tmp_path / "out") as aside, new_file(tmp_path / "x.csv") as file:
            (aside / "half").touch()
            file.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(2):
        process = FORK.Process(target=killed)
        process.start()
        process.join()
    assert len(list(tmp_path.glob(".*.tmp"))) == 2
    with new_file(tmp_path / "x.csv") as mine, new_file(tmp_path / "y.csv") as other:
        mine.touch()
        other.touch()
        left = os.fspath(mine).replace(str(os.getpid()), "1")  # of a process that runs
        Path(left).touch()
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [Path(left).name, "out", "x.csv", "y.csv"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    note(tmp_path, [])
    with new_folder(tmp_path / "out") as aside:
        (aside / "first").touch()

    def killed() -> None:
        Path.rename = lambda self, to: (os.rename(self, to), os.kill(os.getpid(), signal.SIGKILL))  # type: ignore
        with new_folder(tmp_path / "out") as aside:
            (aside / "second").touch()

    process = FORK.Process(target=killed)
    process.start()
    process.join()
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]


def test_a_lock_keeps_what_is_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="cannot be written"), claimed(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "way",
    [
        "itself",
        "link",
        "hard link",
        "dots",
        "inside",
        "in a folder inside",
        "inside by a link",
        "weights",
        "to come",
    ],
)
def test_an_output_is_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml").touch()
    note(Path("run"), ["config.yaml", "result.json"])
    source = Path("data.csv")
    source.write_text("mine")
    targets = {
        "itself": source, "link": Path("link.csv"), "hard link": Path("hard.csv"), "dots": Path("run/../data.csv"),
        "inside": Path("run/config.yaml"), "in a folder inside": Path("run/adapter/x"),
        "inside by a link": Path("other/config.yaml"), "weights": Path("run/x.safetensors"),
        "to come": Path("run/result.json"),
    }  # fmt: skip
    Path("link.csv").symlink_to(source)
    os.link(source, "hard.csv")
    Path("other").symlink_to("run")
    with pytest.raises(
        ConfigError, match=r"--output .* would replace what --(input data\.csv|model run) names or holds"
    ):
        check_apart("--output", targets[way], {"--none": [], "--input": ["no.csv", str(source)]}, "run")
    check_apart("--output", Path("new.csv"), {"--input": [str(source)], "--hub": ["owner/name"]}, "run")
    with pytest.raises(ConfigError, match="would replace what --input run names or holds"):
        check_apart("--output", Path("run/new.csv"), {"--input": ["run"]})
    check_apart("--output", Path("run/p.csv"), {"--input": [str(source)]}, "run")
    Path("run/p.csv").touch()
    with pytest.raises(ConfigError, match="would replace"):
        check_apart("--output", Path("run/p.csv"), {}, "run")
    note_output(Path("run/p.csv"))
    check_apart("--output", Path("run/p.csv"), {}, "run")


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({"a": 1, "b": {"x": 1.5}, "c": ["t"]}, ""),
        ({"a": 1, "b": {}, "c": [], "d": None, "more": [{}]}, ""),
        ({"a": 1, "b": {"x": 1e300}, "c": []}, ""),
        ([], "the value is no JSON object"),
        ({"b": {}, "c": []}, "the value has no a"),
        ({"a": True, "b": {}, "c": []}, "the value.a is 'True'"),
        ({"a": 10**30, "b": {}, "c": []}, "the value.a is '1000"),
        ({"a": 1, "b": {"x": "y"}, "c": []}, "the value.b.x is 'y'"),
        ({"a": 1, "b": [], "c": []}, "the value.b is no JSON object"),
        ({"a": 1, "b": {}, "c": "text"}, "the value.c is no list"),
        ({"a": 1, "b": {}, "c": ["t", 3]}, "the value.c[1] is '3'"),
        ({"a": 1, "b": {}, "c": [], "d": 3}, "the value.d is '3'"),
    ],
)
def test_json_has_its_form_or_is_refused(tmp_path: Path, value: object, wrong: str) -> None:
    form = {"a": int, "b": {"*": NUMBER}, "c": [str], "d?": (str, type(None))}
    assert misfit(value, form).startswith(wrong) and bool(misfit(value, form)) == bool(wrong)
    write_json(tmp_path / "x.json", value)
    if wrong:
        with pytest.raises(ValueError, match=re.escape(wrong)):
            read_json(tmp_path / "x.json", form)
    else:
        assert read_json(tmp_path / "x.json", form) == value


def test_a_full_disk_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    def write(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for tensors in ({"x": np.zeros(9_000)}, {"x": torch.zeros(9_000)}):
            try:
                save_tensors(tmp_path / "x.safetensors", tensors)
            except OSError as error:
                if error.errno == errno.EFBIG and "x.safetensors" in str(error):
                    continue
            os._exit(1)
        os._exit(0)

    process = FORK.Process(target=write, args=(10_000,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_folder_comes_back_where_its_replacement_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two renames fails, as with EIO: before, both the old folder and the new one were removed."""
    folder = tmp_path / "adapter"
    with new_folder(folder) as aside:
        (aside / "weights").write_text("old")
    note(tmp_path, ["adapter/weights"])
    rename, seen = Path.rename, list[Path]()

    def failing(self: Path, target: Path) -> Path:
        seen.append(target)
        if target == folder and len(seen) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"), new_folder(folder) as aside:
        (aside / "weights").write_text("new")
    assert (folder / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_folder_with_any_manifest_is_not_ours(tmp_path: Path) -> None:
    theirs = tmp_path / "model"
    theirs.mkdir()
    (theirs / "manifest.json").write_text('{"name": "my web application"}')
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis.txt is in the way|manifest.json is in the way"):
        check_ours(tmp_path, ["model"])
    (theirs / "manifest.json").write_text('{"files": {"thesis.txt": {}}}')
    check_ours(tmp_path, ["model"])


def test_two_commands_that_note_at_the_same_moment_lose_nothing(tmp_path: Path) -> None:
    """Each reads the ledger, adds its own names and writes it: not one between another's reading and writing."""
    note(tmp_path, ["first"])

    def child(number: int) -> None:
        for i in range(25):
            note(tmp_path, [f"{number}-{i}"], "outputs" if i % 2 else "wrote")

    processes = [FORK.Process(target=child, args=(number,)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = read_json(tmp_path / LEDGER)
    assert set(found["wrote"]) == {"first", *(f"{number}-{i}" for number in range(6) for i in range(0, 25, 2))}
    assert set(found["outputs"]) == {f"{number}-{i}" for number in range(6) for i in range(1, 25, 2)}
