"""A process that hangs says where, and ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from esm_neuron.config import TrainConfig, settings
from esm_neuron.config.backends import BACKENDS
from esm_neuron.config.rules import validate
from esm_neuron.training import run
from esm_neuron.training.watchdog import EXIT_HUNG, Watchdog

CONFIGS = Path(__file__).parents[2] / "configs"

HANGING = """
import re, sys, threading, time
from pathlib import Path
from esm_neuron.training import watchdog
watchdog.GRACE, watchdog.PATIENCE = 5.0, 1.0

def wait_for_a_peer():
    threading.Event().wait()

def wait_without_threads():
    def refuse(thread):  # as at a limit of threads, which can be why a process hangs
        raise RuntimeError("can't start new thread")
    threading.Thread.start = refuse
    wait_for_a_peer()

def keep_the_interpreter():
    re.match(r"(a+)+b", "a" * 60)

with watchdog.Watchdog(0.5, Path(sys.argv[1])) as dog:
    dog.expect("step 6")
    dog.expect("step 7", units=2)
    {hang}()
"""


def hang(how: str, file: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    words = [sys.executable, "-c", HANGING.replace("{hang}", how), str(file)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False), time.monotonic() - began


def test_a_hung_process_ends_with_its_reason_and_its_stacks(tmp_path: Path) -> None:
    file = tmp_path / "hung-rank0.txt"
    done, seconds = hang("wait_for_a_peer", file)
    assert done.returncode == EXIT_HUNG and seconds > 1
    for said in (done.stderr, file.read_text()):
        first, *stacks = said.splitlines()
        assert first.startswith("esm-neuron: error: step 7 has taken more than 1 s (loop.watchdog); the stacks of all")
        assert any("in wait_for_a_peer" in line for line in stacks)


def test_a_start_that_hangs_ends_with_its_stacks(toy: Callable[..., TrainConfig]) -> None:
    cfg = toy(loop={"watchdog": 1, "watchdog_slow": 1})
    config = Path(f"{cfg.output}.yaml")
    config.write_text(settings.dump(cfg))
    code = (
        "import sys, threading\nfrom esm_neuron import cli\nfrom esm_neuron.training import run\n"
        "run.load_splits = lambda *_: threading.Event().wait()\n"
        "sys.exit(cli.main(['train', '--config', sys.argv[1]]))"
    )
    words = [sys.executable, "-c", code, str(config)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == EXIT_HUNG, done.stderr
    said = (Path(cfg.output) / "hung-rank0.txt").read_text()
    assert "the start of the run (data, weights, checkpoint) has taken more than 2 s" in said and "in <lambda>" in said


def test_a_call_that_keeps_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    done, _ = hang("keep_the_interpreter", tmp_path / "file")
    assert done.returncode == 1
    assert "in keep_the_interpreter" in done.stderr


def test_a_folder_that_is_gone_does_not_keep_it_alive(tmp_path: Path) -> None:
    done, _ = hang("wait_for_a_peer", tmp_path / "gone" / "file")
    assert done.returncode == EXIT_HUNG
    assert "in wait_for_a_peer" in done.stderr


def test_a_full_pipe_that_nobody_reads_does_not_keep_it_alive(tmp_path: Path) -> None:
    file = tmp_path / "file"
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    words = [sys.executable, "-c", HANGING.replace("{hang}", "wait_for_a_peer"), str(file)]
    with subprocess.Popen(words, stderr=writer) as process:
        try:
            assert process.wait(60) == EXIT_HUNG
        finally:
            process.kill()
            os.close(writer)
            os.close(reader)
    said = file.read_text()
    assert said.startswith("esm-neuron: error: step 7 has taken more than 1 s") and "in wait_for_a_peer" in said


def test_a_process_that_may_start_no_thread_says_why_it_ends(tmp_path: Path) -> None:
    done, _ = hang("wait_without_threads", tmp_path / "file")
    assert done.returncode == EXIT_HUNG
    for said in (done.stderr, (tmp_path / "file").read_text()):
        assert "step 7 has taken more than 1 s" in said and "in wait_for_a_peer" in said


def test_a_file_system_that_hangs_does_not_keep_it_alive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")  # it waits for a reader
    done, _ = hang("wait_for_a_peer", tmp_path / "file")
    assert done.returncode == EXIT_HUNG
    assert "step 7 has taken more than 1 s" in done.stderr and "in wait_for_a_peer" in done.stderr


def test_a_file_system_that_hangs_amid_the_stacks_does_not_keep_it_alive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    reader = os.open(tmp_path / "file", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "file", os.O_WRONLY)
    try:
        room = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, bytes(room - 600))  # what is left takes the reason, but not the stacks
        done, _ = hang("wait_for_a_peer", tmp_path / "file")
    finally:
        os.close(writer)
        os.close(reader)
    assert done.returncode == EXIT_HUNG
    assert "in wait_for_a_peer" in done.stderr


@pytest.mark.parametrize("seconds", [0, 0.2])
def test_work_that_gets_on_is_left_alone(tmp_path: Path, seconds: float) -> None:
    with Watchdog(seconds, tmp_path / "file") as dog:
        for _ in range(4):
            dog.expect("a step")
            time.sleep(0.1)
    time.sleep(0.3)
    assert not (tmp_path / "file").exists()


def test_what_may_compile_has_longer(
    tmp_path: Path, toy: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Watchdog(0.2, tmp_path / "file", slow=60) as dog:
        dog.expect("step 1", slow=True)
        time.sleep(0.5)  # without what is allowed besides, this process would end here

    allowed: list[tuple[str, float]] = []

    class Noted(Watchdog):
        def expect(self, what: str, units: int = 1, slow: bool = False) -> None:
            super().expect(what, units, slow)
            allowed.append((what, self._allowed))

    for module in ("monitors", "run"):
        monkeypatch.setattr(f"esm_neuron.training.{module}.Watchdog", Noted)
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], compiles=True))
    cfg = toy(loop={"max_steps": 4, "eval_every": 2, "watchdog": 600, "watchdog_slow": 7200})
    run.train(cfg, str)
    steps = [seconds for what, seconds in allowed if what.startswith("step")]
    assert steps == [600, 7800, 600, 7800, 600, 600], "a batch is waited for, then a step that may compile"
    rest = [(what, seconds) for what, seconds in allowed if not what.startswith("step")]
    start, (_, first), one, (_, later), two, (end, last) = rest
    assert start == ("the start of the run (data, weights, checkpoint)", 7800)
    assert first - later == 7200 and later % 600 == 0
    assert (one, two) == (("the checkpoint after step 2", 7800), ("the checkpoint after step 4", 600))
    assert end.startswith("the end of the run") and last > 7800


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*trn1*.yaml")), ids=lambda path: path.stem)
def test_it_is_on_in_the_configs_for_trn1(path: Path) -> None:
    cfg = settings.parse(["--config", str(path)])
    validate(cfg)
    assert cfg.loop.watchdog >= 300 and cfg.loop.watchdog_slow >= 2 * 3600
