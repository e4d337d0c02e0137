"""The first hour on a trn1: what it has time for, and the page of what it found."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

REHEARSAL = os.environ.get("TRN1_REHEARSAL") == "1"
"""Whether the tests run on XLA:CPU: see `tests/trn1/conftest.py`."""

QUESTIONS = {
    "right": "Are the numbers right?",
    "graphs": "Is a graph compiled late, and do those compiled ahead serve?",
    "environment": "What does importing torch_xla set?",
    "compiling": "How long does a graph compile?",
    "host": "Does the host keep up with the device?",
}
"""Key of a figure -> the section of the page, in its order, that it settles."""


@dataclass
class Report:
    """Figures as they are found, on the page at once, so that a run that is cut short leaves what it has seen."""

    page: Path
    title: str
    machine: str
    """What `esm-neuron doctor` says there."""
    minutes: float
    """How long the tests may take in all; one that would not end in time is left out, and the page says so."""
    clock: Callable[[], float] = time.monotonic
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = self.clock()

    def add(self, question: str, what: str, found: object, wanted: str = "a figure") -> None:
        """Note a figure, before it is asserted: a failure is on the page too."""
        self.rows.append((QUESTIONS[question], what, str(found).replace("|", "\\|"), wanted))
        self._write()

    def has_time(self, what: str, minutes: float) -> bool:
        """Return whether `what` can be done within the time that is left; note it as left out if not."""
        left = self.minutes - (self.clock() - self._began) / 60
        if minutes > left:
            said = f"about {minutes:.0f} minutes, {max(0.0, left):.0f} of {self.minutes:.0f} were left (TRN1_MINUTES)"
            self.left_out.append(f"{what}: {said}")
            self._write()
        return minutes <= left

    def text(self) -> str:
        """Return the page in Markdown."""
        lines = [f"# {self.title}", "", f"Written by `make test-trn1` on {time.strftime('%Y-%m-%d')}."]
        for question in QUESTIONS.values():
            found = [f"| {' | '.join(row)} |" for asked, *row in self.rows if asked == question]
            if found:
                lines += ["", f"## {question}", "| what | found | wanted |", "|---|---|---|", *found]
        if self.left_out:
            lines += ["", "## Left out", *(f"- {what}" for what in self.left_out)]
        return "\n".join([*lines, "", "## Measured on", "```", self.machine.strip(), "```", ""])

    def _write(self) -> None:
        self.page.write_text(self.text(), encoding="utf-8")
