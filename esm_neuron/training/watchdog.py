"""A process that does not get on says where it stands, and ends: one hung rank would keep all nodes for days."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

from esm_neuron.config import TrainConfig

EXIT_HUNG = 70
"""Exit code of a process that its watchdog has ended (EX_SOFTWARE of sysexits.h)."""
GRACE = 10.0
"""Seconds after which faulthandler's own thread acts, which needs no turn of the interpreter: a call into C that keeps
the interpreter lock stops the watchdog's thread too. It writes to stderr alone, and the exit code is 1. It alone has no
patience: where, besides, stderr is a full pipe that nobody reads, the process stays."""
PATIENCE = 3.0
"""Seconds that the file and stderr each have to take the reason: a file system can hang, and a pipe that nobody reads
can be full. Both together are over before GRACE is."""


class Watchdog:
    """Within the block, work that takes longer than `expect` allows ends the process.

    Args:
        seconds: that one unit of work may take; 0: no limit, and nothing is started.
        file: where the stacks of all threads are written, besides stderr.
        slow: seconds besides, for work that may compile or is known to be long.
    """

    def __init__(self, seconds: float, file: Path, slow: float = 0.0) -> None:
        self._seconds, self._file, self._slow = seconds, file, slow
        self._what, self._allowed, self._deadline = "", 0.0, float("inf")
        self._over = threading.Event()

    @classmethod
    def of(cls, cfg: TrainConfig, rank: int) -> Watchdog:
        """The watchdog of a run's process: `loop.watchdog`, and a file of this rank in its folder."""
        return cls(cfg.loop.watchdog, Path(cfg.output) / f"hung-rank{rank}.txt", cfg.loop.watchdog_slow)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._over.clear()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._deadline = float("inf")
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def expect(self, what: str, units: int = 1, slow: bool = False) -> None:
        """From now on `what` is done, in `units` that may each take the time; what came before is done."""
        if self._seconds:
            self._allowed = units * self._seconds + slow * self._slow
            self._what, self._deadline = what, time.monotonic() + self._allowed
            faulthandler.dump_traceback_later(self._allowed + GRACE, exit=True, file=2)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() > self._deadline:
                self._end()

    def _end(self) -> None:
        reason = (
            f"esm-neuron: error: {self._what} has taken more than {self._allowed:g} s (loop.watchdog); the stacks of "
            f"all threads are in {self._file}; nothing is saved from here on, go on with --checkpoint.resume auto\n"
        )
        try:
            said = reason.encode() + _stacks()
            writes = (self._file.write_bytes, partial(os.write, 2))
            tellers = [threading.Thread(target=_tell, args=(write, said), daemon=True) for write in writes]
            try:
                for teller in tellers:
                    teller.start()
                for teller in tellers:
                    teller.join(PATIENCE)
            except RuntimeError:  # no more threads to be had, which may be why it hangs
                for write in writes:
                    _tell(write, said)
        finally:
            os._exit(EXIT_HUNG)


def _stacks() -> bytes:
    """The stacks of all threads. Into memory, since faulthandler keeps the interpreter lock while it writes."""
    try:
        with open(os.memfd_create("stacks"), "w+b", buffering=0) as memory:
            faulthandler.dump_traceback(memory)
            memory.seek(0)
            return memory.read()
    except OSError as error:
        return f"no stacks: {error.strerror}\n".encode()


def _tell(write: Callable[[bytes], int], said: bytes) -> None:
    with contextlib.suppress(OSError):  # the other one may be told
        write(said)
