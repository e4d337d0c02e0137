"""A request to stop: noted, answered or sent on, and at once when it is repeated."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from esm_neuron.training import signals
from esm_neuron.training.signals import StopSignal


@pytest.mark.parametrize("busy", ["time.sleep(0.01)", "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"])
def test_the_first_signal_is_noted_its_echo_ignored_and_a_later_one_ends_the_process_at_once(busy: str) -> None:
    """Also where the main thread is in C, as while a program compiles, and Python's own handlers would wait."""
    program = f"""
import hashlib, os, signal, sys, threading, time
from esm_neuron.training import signals
signals.ECHO = 0.5

def from_outside():
    for pause, number in ((0.2, signal.SIGINT), (0.1, signal.SIGTERM), (0.6, signal.SIGTERM)):
        time.sleep(pause)
        print(number.name, stop.received, flush=True)
        os.kill(os.getpid(), number)

with signals.StopSignal() as stop:
    threading.Thread(target=from_outside, daemon=True).start()
    while True:
        {busy}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    noted = "SIGINT" if "sleep" in busy else "None"
    assert done.stdout.splitlines() == ["SIGINT None", f"SIGTERM {noted}", f"SIGTERM {noted}"]
    assert done.returncode == 128 + signal.SIGTERM, done.stderr


def test_a_signal_that_nobody_has_answered_is_sent_again() -> None:
    """One that comes after the last look of a run, which would else go on into its last evaluation without a word."""
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        for answered in (True, False):
            with StopSignal() as stop:
                signal.raise_signal(signal.SIGTERM)
                assert (stop.received, got) == ("SIGTERM", [])
                stop.answered = answered
        assert got == [signal.SIGTERM]
        with pytest.raises(KeyError), StopSignal():
            {}[signal.raise_signal(signal.SIGTERM)]  # why the run has ended is said
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ranks_ask_each_other_after_the_same_steps_seldom_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks whose clocks disagree; a first step that compiles, 499 quick ones, then steps eight times as long."""
    clock, seconds, rounds = SimpleNamespace(now=0.0), 0.0, []
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.now))
    ranks = {speed: StopSignal() for speed in (1.0, 0.5)}

    def each(ask: Callable[[StopSignal], Any]) -> list[Any]:
        answers = []
        for speed, rank in ranks.items():
            clock.now = seconds * speed
            answers.append(ask(rank))
        return answers

    for step in range(1, 1001):
        seconds += 3600 if step == 1 else 0.125 if step <= 500 else 1
        due = each(lambda rank, step=step: rank.round_due(step))
        assert due[0] == due[1], "a rank that asked alone would wait for ever"
        if due[0]:
            slowest = max(each(lambda rank, step=step: rank.pace(step)))
            each(lambda rank, step=step, slowest=slowest: rank.plan_round(step, slowest))
            rounds.append(step)
    assert rounds[:8] == [1, 2, 4, 8, 16, 32, 48, 64]
    assert [step for step in rounds if step > 480][:5] == [496, 512, 514, 516, 518]
