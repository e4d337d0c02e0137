"""Files and folders: replaced whole, and held by one process at a time."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from helpers.processes import wait_for

from esm_neuron.data.cache import cached
from esm_neuron.errors import ConfigError
from esm_neuron.files import claimed, new_folder, write_json, write_text

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
    with new_folder(target) as aside:
        (aside / "old").touch()
    with pytest.raises(FileNotFoundError), new_folder(target) as aside:
        (aside / "not there" / "new").touch()
    assert [p.name for p in target.iterdir()] == ["old"]
    with new_folder(target) as aside:
        (aside / "new").touch()
        assert [p.name for p in target.iterdir()] == ["old"]
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
