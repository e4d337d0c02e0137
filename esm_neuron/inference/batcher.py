"""Requests that come at the same time share packs: one thread computes, and takes all that waits each time.

Nothing waits for others to come: while the device computes, requests gather, so that packs fill as the load grows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from esm_neuron.data.dataset import ExampleTable
from esm_neuron.errors import EsmNeuronError

Rows = list[dict[str, Any]]


class BusyError(EsmNeuronError):
    """More waits than is allowed; the same request may do later."""


@dataclass
class _Job:
    kind: str
    table: ExampleTable
    answer: Future[Rows] = field(default_factory=Future)


class Batcher:
    """Answer tables of proteins, those that wait together in one go; a context manager, which ends its thread."""

    def __init__(
        self, answer: Callable[[str, Sequence[ExampleTable]], list[Rows]], most_tokens: int, most_waiting: int
    ) -> None:
        """Call `answer(kind, tables)` for up to `most_tokens` tokens, or one table, of a kind; refuse what is beyond
        `most_waiting` tokens."""
        self._answer, self._most, self._room = answer, most_tokens, most_waiting
        self._waiting: deque[_Job] = deque()
        self._tokens, self._closed = 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)

    def __enter__(self) -> Batcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Answer what waits, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def put(self, kind: str, table: ExampleTable) -> Future[Rows]:
        """Return the answer to come for a table. Raise BusyError where too much waits already."""
        job, size = _Job(kind, table), len(table.tokens)
        with self._changed:
            if self._closed or (self._waiting and self._tokens + size > self._room):
                raise BusyError(
                    f"{self._tokens} tokens of other requests wait, at most {self._room} may; try again later"
                )
            self._waiting.append(job)
            self._tokens += size
            self._changed.notify()
        return job.answer

    def _take(self) -> list[_Job]:
        """Wait for jobs; return those of the first one's kind that fit together, none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            taken, left, size = list[_Job](), deque[_Job](), 0
            for job in self._waiting:
                tokens = len(job.table.tokens)
                if taken and (job.kind != taken[0].kind or size + tokens > self._most):
                    left.append(job)
                    continue
                taken.append(job)
                size += tokens
            self._waiting, self._tokens = left, self._tokens - size
        return taken

    def _work(self) -> None:
        while taken := self._take():
            jobs = [job for job in taken if job.answer.set_running_or_notify_cancel()]  # not those given up
            if not jobs:
                continue
            try:
                answers = self._answer(jobs[0].kind, [job.table for job in jobs])
            except Exception as error:  # a request's failure must not end the thread of all others
                for job in jobs:
                    job.answer.set_exception(error)
                continue
            for job, rows in zip(jobs, answers, strict=True):
                job.answer.set_result(rows)
