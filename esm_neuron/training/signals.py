"""Stopping on request: SIGTERM (a cluster that wants its node back) and SIGINT (ctrl-C) let the step finish first."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and has saved its state (EX_TEMPFAIL of sysexits.h: try again later)."""


ECHO = 5.0
"""Seconds in which a second signal is the same request again: Slurm and a terminal signal every process, and torchrun
then passes on the one it got itself."""


class StopSignal:
    """Within the block, the first SIGTERM or SIGINT sets `received`; one that comes `ECHO` later ends the process.

    At once and from a thread of its own: Python's handlers wait for the main thread, which may be compiling for an hour
    or writing. What was being written aside is then never seen. The exit code is a shell's, 128 and the signal.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the signal that came, None so far."""
        self.answered = False
        """Whether someone has said that the run ends for a signal; one that nobody answers is sent again at the end."""
        self._before: dict[int, Any] = {}

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
        """The system's own handler writes each signal's number into a pipe as it comes."""
        first: float | None = None
        while number := ord(os.read(self._heard, 1)):
            if number in self._before:
                now = time.monotonic()
                first = now if first is None else first
                if now - first > ECHO:
                    os._exit(128 + number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._bell_before)
        os.write(self._bell, b"\0")  # no signal has this number
        self._listener.join()
        os.close(self._bell)
        os.close(self._heard)
        if kind is None and self.received and not self.answered:  # it came after the last look
            signal.raise_signal(signal.Signals[self.received])
