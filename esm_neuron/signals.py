"""Stopping on request: SIGTERM (a cluster that wants its node back) and SIGINT (ctrl-C) let the step finish first."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and has saved its state (EX_TEMPFAIL of sysexits.h: try again later)."""


class StopSignal:
    """Within the block, the first SIGTERM or SIGINT sets `received`; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the signal that came, None so far."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
