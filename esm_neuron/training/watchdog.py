"""End a process that hangs, and say where it stands: one hung rank would keep all nodes of a cluster for days."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from pathlib import Path

from esm_neuron.config import TrainConfig
from esm_neuron.redact import shown

EXIT_HUNG = 70
"""Exit code of a process that its watchdog has ended (EX_SOFTWARE of sysexits.h)."""
GRACE = 10.0
"""Seconds after the limit at which faulthandler's own thread ends the process, with the stacks on stderr and exit code
1. It is written in C and needs no turn of the interpreter: a call into C that keeps the interpreter lock stops the
watchdog's thread too."""
PATIENCE = 3.0
"""Seconds that writing the reason may take: the file may lie on a file system that hangs. Less than GRACE."""


class Watchdog:
    """Within the block, work that takes longer than `expect` allows ends the process.

    One unit of work may take `seconds` (0: no limit, and nothing is started), and `slow` more where it may compile or
    is known to be long. The stacks of all threads go to `file`, and to stderr.
    """

    def __init__(self, seconds: float, file: Path, slow: float = 0.0) -> None:
        self._seconds, self._file, self._slow = seconds, file, slow
        self._what, self._allowed, self._deadline = "", 0.0, float("inf")
        self._over = threading.Event()

    @classmethod
    def of(cls, cfg: TrainConfig, rank: int) -> Watchdog:
        """Return the watchdog of a run's process: `loop.watchdog`, and a file of this rank in its folder."""
        return cls(cfg.loop.watchdog, Path(cfg.output) / f"hung-rank{rank}.txt", cfg.loop.watchdog_slow)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._over.clear()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._deadline = float("inf")
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def expect(self, what: str, units: int = 1, slow: bool = False) -> None:
        """Give `what`, of `units` that may each take the limit, its time from now on; what came before is done."""
        if self._seconds:
            self._allowed = units * self._seconds + slow * self._slow
            self._what, self._deadline = what, time.monotonic() + self._allowed
            # A second alarm, in C: it ends the process even where no Python thread gets to run any more.
            faulthandler.dump_traceback_later(self._allowed + GRACE, exit=True, file=2)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() > self._deadline:
                self._end()

    def _end(self) -> None:
        reason = (
            f"esm-neuron: error: {self._what} has taken more than {self._allowed:g} s (loop.watchdog); the stacks of "
            f"all threads are in {self._file}; nothing is saved from here on, go on with --checkpoint.resume auto"
        )
        try:
            # Whatever the writes below wait for, this timer ends the process; where no thread can be started, which may
            # be why it hangs, faulthandler's own does.
            with contextlib.suppress(RuntimeError):
                threading.Timer(PATIENCE, os._exit, (EXIT_HUNG,)).start()
            text = f"{shown(reason)}\n".encode() + _stacks()
            with contextlib.suppress(OSError):
                blocking = os.get_blocking(2)
                os.set_blocking(2, False)  # it may be a full pipe that nobody reads
                with contextlib.suppress(OSError):
                    os.write(2, text)
                os.set_blocking(2, blocking)  # other processes write there too
            with contextlib.suppress(OSError):
                self._file.write_bytes(text)
        finally:
            os._exit(EXIT_HUNG)


def _stacks() -> bytes:
    """Return the stacks of all threads."""
    # faulthandler keeps the interpreter lock while it writes: in a file or a pipe that hangs it would keep the timer
    # from running too, so it writes into memory.
    with os.fdopen(os.memfd_create("stacks"), "w+b") as memory:
        faulthandler.dump_traceback(memory)
        memory.seek(0)
        return memory.read()
