"""Callbacks that report on a run: console progress, metrics.jsonl; and the state of early stopping.

Callbacks run on the main rank only and get values that are already on the host. Every line is one write, because log
capture on clusters splits a line that arrives in pieces.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import NoneType
from typing import Any, TextIO

from tqdm import tqdm

from esm_neuron.errors import CheckpointError
from esm_neuron.files import append_line, finite, parse_json, read_bytes, write_text
from esm_neuron.redact import shown
from esm_neuron.run_dir import LOG_LIMIT

MetricsLine = Mapping[str, Any]
"""Named values: numbers, None where undefined, strings such as the split, intervals [low, high]."""


class Callback:
    """A watcher of a run; a subclass overrides what it wants to hear of."""

    def on_log(self, step: int, total: int, record: MetricsLine) -> None:
        """Optimizer step `step` of `total` is done; `record` has loss, lr, grad_norm, epoch, residues_per_second ..."""

    def on_eval(self, step: int, record: MetricsLine) -> None:
        """An evaluation after `step` is done; `record` has the split and its metrics."""

    def on_trained(self) -> None:
        """The last step is done; the evaluation at the end is still to come."""

    def on_end(self, result: MetricsLine) -> None:
        """The run is over, also when it stopped early; `result` is what result.json gets."""


CHANGED = 0.25
"""Share by which the time that a run takes has to change to be told again."""


class ProgressConsole(Callback):
    """Show a bar with the time left on a terminal, one plain line per record elsewhere.

    Plain lines suit regular expressions such as SageMaker's metric definitions:
    `step=120/500 loss=0.6123 lr=3.0e-04 grad_norm=1.23 epoch=0.24 ... residues_per_second=1234 eta=00:12:34` and
    `eval step=120 split=valid accuracy=0.7100 mcc=0.3500`.
    """

    def __init__(self, start: int = 0, stream: TextIO | None = None) -> None:
        """Report on a run that begins after step `start`, on `stream` (stderr)."""
        self.stream = stream if stream is not None else sys.stderr
        self.start = start
        self.origin = (start, monotonic())
        self.told: float | None = None
        """Seconds from the start to the last step, as they were told last; None: not yet."""
        self.begun = self.now = self.origin[1]
        self.bar: tqdm[Any] | None = None

    def on_log(self, step: int, total: int, record: MetricsLine) -> None:
        left = self._eta(step, total)
        self._expect(step, total, left)
        if not self.stream.isatty():
            self._write(f"step={step}/{total} {_on_console(record)} eta={format_seconds(left)}")
            return
        if self.bar is None:
            options: dict[str, Any] = {"file": self.stream, "unit": "step", "dynamic_ncols": True}
            self.bar = tqdm(total=total, initial=self.start, desc="training", **options)
        self.bar.set_postfix_str(format_record({"loss": record["loss"]}) if "loss" in record else "", refresh=False)
        self.bar.update(step - self.bar.n)

    def on_eval(self, step: int, record: MetricsLine) -> None:
        self._write(f"eval step={step} {format_record(record)}")

    def on_trained(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_end(self, result: MetricsLine) -> None:
        """Tell last what the chosen step reaches, since SageMaker's tuner takes the last value."""
        self.on_trained()  # where it failed
        if result.get("valid"):
            self.on_eval(result["chosen_step"], {"split": "valid", **result["valid"]})

    def _write(self, line: str) -> None:
        with suppress(OSError):  # a reader that went away, or a full disk, ends no training
            if self.bar is not None:
                self.bar.write(shown(line), file=self.stream)
                return
            self.stream.write(shown(line) + "\n")
            self.stream.flush()

    def _expect(self, step: int, total: int, left: float) -> None:
        """Say how many minutes are left once the first steps, which may compile, are over; and when that changes."""
        whole = self.now - self.begun + left
        as_told = self.told and abs(whole - self.told) <= max(60.0, CHANGED * self.told)
        if step >= total or self.origin[0] == step or as_told:
            return
        self.told = whole
        self._write(f"expected: {max(1, round(left / 60))} min for the {total - step} steps to come")

    def _eta(self, step: int, total: int) -> float:
        """Return the seconds left. The first interval includes compilation, so later estimates leave it out."""
        self.now = now = monotonic()
        first_step, first_time = self.origin
        rate = (now - first_time) / max(step - first_step, 1)
        if first_step == self.start:
            self.origin = (step, now)
        return rate * (total - step)


class JsonlLogger(Callback):
    """Append one JSON object per line to `path`, such as metrics.jsonl, at once; NaN and infinity become null."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def on_log(self, step: int, total: int, record: MetricsLine) -> None:
        self.append({"step": step, **record})

    def on_eval(self, step: int, record: MetricsLine) -> None:
        self.append({"step": step, **record})  # its `split` tells it from a training line

    def truncate_after(self, step: int, pending: Container[int] = ()) -> None:
        """Drop the lines of steps above `step` and of `pending` steps, which the resumed run writes again.

        A last line that a kill cut short is dropped too; raise CheckpointError where another is not JSON with a step.
        """
        if not self.path.exists():
            return
        *lines, _ = self._content().split(b"\n")
        numbers = [self._step(number, line) for number, line in enumerate(lines, 1)]
        kept = [line for line, of in zip(lines, numbers, strict=True) if of <= step and of not in pending]
        write_text(self.path, "".join(f"{line.decode()}\n" for line in kept))

    def _content(self) -> bytes:
        try:
            return read_bytes(self.path, LOG_LIMIT)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}; remove it to resume") from error

    def _step(self, number: int, line: bytes) -> int:
        try:
            return int(parse_json(line.decode())["step"])
        except (ValueError, TypeError, KeyError, OverflowError):
            raise CheckpointError(
                f"{self.path}:{number}: not a JSON object with a step; delete the line (or the file) to resume"
            ) from None

    def append(self, record: MetricsLine) -> None:
        append_line(self.path, json.dumps(finite(record), allow_nan=False))


@dataclass
class EarlyStopping:
    """The best value of the watched metric so far and how long it has stood; kept in checkpoints."""

    patience: int
    """Validations without improvement after which `stop` is true; 0: never."""
    greater_is_better: bool
    """True for a metric that should rise (MCC), False for one that should fall (loss)."""
    best: float | None = None
    best_loss: float | None = None
    """The validation loss beside `best`: among equal values the lowest loss is the best, and is progress."""
    best_step: int | None = None
    ties: int = 0
    """Validations with the value `best`, but for the first."""
    lowest_loss: float | None = None
    """The lowest validation loss so far: while it falls the run learns, though the metric may not show it yet."""
    bad: int = 0
    """Validations since the best one, or since the loss last fell."""

    def update(self, value: float | None, step: int, loss: float | None = None) -> bool:
        """Take in a validation; return whether it is the best so far. An undefined value (None, NaN) never is."""
        if value is not None and value == self.best:
            self.ties += 1
        learns = loss is not None and self.lowest_loss is not None and loss < self.lowest_loss
        if loss is not None and (learns or self.lowest_loss is None):
            self.lowest_loss = loss
        if value is None or math.isnan(value) or not self._better(value, loss):
            self.bad = 0 if learns else self.bad + 1
            return False
        self.ties = self.ties if value == self.best else 0
        self.best, self.best_loss, self.best_step, self.bad = value, loss, step, 0
        return True

    def _better(self, value: float, loss: float | None) -> bool:
        if value == self.best:
            return loss is not None and self.best_loss is not None and loss < self.best_loss
        return self.best is None or (value > self.best if self.greater_is_better else value < self.best)

    def remarks(self, metric: str) -> list[str]:
        """Return what a user should know of the choice."""
        if not self.ties:
            return []
        tied = f"{self.ties + 1} validations have the best {metric}, {self.best:.4f}"
        return [f"{tied}; step {self.best_step} has the lowest loss of them"]

    def forget(self) -> None:
        """Know no best validation any more: its checkpoint is gone."""
        self.best = self.best_loss = self.best_step = self.lowest_loss = None
        self.ties = 0

    @property
    def stop(self) -> bool:
        return 0 < self.patience <= self.bad

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, valid JSON."""
        return {name: getattr(self, name) for name in _STOPPER}

    def load_state_dict(self, state: MetricsLine) -> None:
        """Go on from `state`; patience and direction stay those of the present config."""
        older = {"best": None, "best_loss": None, "best_step": None, "lowest_loss": None, "ties": 0}  # lack some
        state = {**older, **state}
        sound = all(isinstance(state.get(name), kinds) for name, kinds in _STOPPER.items())
        if not sound or (state.get("best") is None) != (state.get("best_step") is None):
            raise CheckpointError("state.json: no valid `stopper`; delete the checkpoint's folder")
        for name in _STOPPER:
            setattr(self, name, state[name])


_STOPPER: dict[str, Any] = {
    "best": (int, float, NoneType), "best_loss": (int, float, NoneType), "best_step": (int, NoneType),
    "lowest_loss": (int, float, NoneType), "ties": int, "bad": int,
}  # fmt: skip
"""What a checkpoint has of early stopping -> its types."""

FORMATS = {
    "lr": ".1e", "grad_norm": ".2f", "epoch": ".2f", "sequences_per_second": ".1f", "residues_per_second": ".0f",
}  # fmt: skip
"""How a value is printed on the console; other floats get 4 decimals."""


def format_record(record: MetricsLine) -> str:
    """Return `name=value` of every number and string; undefined values and intervals are left to metrics.jsonl."""
    shown = {name: value for name, value in record.items() if isinstance(value, (float, int, str))}
    formats = {name: FORMATS.get(name, ".4f") if isinstance(value, float) else "" for name, value in shown.items()}
    return " ".join(f"{name}={value:{formats[name]}}" for name, value in shown.items())


def _on_console(record: MetricsLine) -> str:
    """Return a training record for the console, without the number of graphs where none is compiled."""
    return format_record({name: value for name, value in record.items() if name != "graphs" or value})


def format_seconds(seconds: float) -> str:
    """Return HH:MM:SS; hours go beyond 99 where needed."""
    whole = round(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
