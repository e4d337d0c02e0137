"""Stopping on request: SIGTERM (a cluster that wants its node back) and SIGINT (ctrl-C) let the step finish first."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and has saved its state (EX_TEMPFAIL of sysexits.h: try again later)."""


ECHO = 5.0
"""Seconds in which a second signal is the same request again: Slurm and a terminal signal every process, and torchrun
then passes on the one it got itself."""


class StopSignal:
    """Within the block, the first SIGTERM or SIGINT sets `received`; one that comes `ECHO` later ends the process."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the signal that came, None so far."""
        self._before: dict[int, Any] = {}
        self._first = 0.0

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._first = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._first > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
