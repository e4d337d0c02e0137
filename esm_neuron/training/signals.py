"""Stop on request: SIGTERM (a cluster wants its node back) and SIGINT (ctrl-C) let the step finish first."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and has saved its state (EX_TEMPFAIL of sysexits.h: try again later)."""

ECHO = 5.0
"""Seconds in which a second signal is the same request again: Slurm and a terminal signal every process, and torchrun
then passes on the one it got itself."""

ROUND = 2.0
"""Seconds between two rounds in which the ranks ask each other for signals: less than `ECHO`, after which a second
ctrl-C ends the process, and little beside the two minutes that a spot instance leaves."""


class StopSignal:
    """Within the block, the first SIGTERM or SIGINT sets `received`; one that comes `ECHO` later ends the process.

    A thread of its own ends it, at once: Python's handlers wait for the main thread, which may be writing, or compiling
    for an hour. What is being written aside then never becomes visible. The exit code is a shell's: 128 + the signal.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal, None without one."""
        self.answered = False
        """Whether the run ends because of it; a signal that came too late for that is sent again after the block."""
        self._before: dict[int, Any] = {}
        self._every = 1  # steps from the last round to the next
        self._asked, self._at = 0, time.monotonic()  # step and time of the last round

    def round_due(self, step: int) -> bool:
        """Return whether the ranks ask each other after `step`: each rank says the same."""
        return step >= self._asked + self._every

    def pace(self, step: int) -> float:
        """Return this rank's seconds per step since the last round."""
        return (time.monotonic() - self._at) / max(1, step - self._asked)

    def plan_round(self, step: int, pace: float) -> None:
        """Note a round after `step` and plan the next, about `ROUND` seconds later, by the slowest rank's `pace`."""
        # At most twice as far ahead as before: the first steps may have been faster than those to come.
        self._every = max(1, min(2 * self._every, int(ROUND / max(pace, 1e-6))))
        self._asked, self._at = step, time.monotonic()

    def __enter__(self) -> StopSignal:
        self._heard, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        self._bell_before = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _listen(self) -> None:
        # The handler in C writes each signal's number into a pipe as it comes, see `signal.set_wakeup_fd`.
        first: float | None = None
        while number := ord(os.read(self._heard, 1)):
            if number in self._before:
                now = time.monotonic()
                first = now if first is None else first
                if now - first > ECHO:
                    os._exit(128 + number)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._bell_before)
        os.write(self._bell, b"\0")  # ends the thread: no signal has this number
        self._listener.join()
        os.close(self._bell)
        os.close(self._heard)
        if kind is None and self.received and not self.answered:  # it came after the last look
            signal.raise_signal(signal.Signals[self.received])
