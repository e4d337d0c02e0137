"""A process that hangs says where, and ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from esm_neuron.watchdog import EXIT_HUNG, Watchdog

HANGING = """
import re, sys, threading, time
from pathlib import Path
from esm_neuron import watchdog
watchdog.GRACE = 1.0

def wait_for_a_peer():
    threading.Event().wait()

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


def test_a_call_that_keeps_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    done, _ = hang("keep_the_interpreter", tmp_path / "file")
    assert done.returncode == 1
    assert "in keep_the_interpreter" in done.stderr


def test_a_folder_that_is_gone_does_not_keep_it_alive(tmp_path: Path) -> None:
    done, _ = hang("wait_for_a_peer", tmp_path / "gone" / "file")
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
