"""What watches a run from the host: signals, time limits, the clock, losses that stand out, unplanned graphs.

Nothing here reads a value of the device within a step: `Backend.on_host` brings the values when they are there.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from esm_neuron.backends.base import LARGEST, Backend
from esm_neuron.config import OnRecompile, TrainConfig
from esm_neuron.data.dataset import Batch
from esm_neuron.data.loader import EvalLoader, StepData, TrainLoader
from esm_neuron.distributed import main_rank_only
from esm_neuron.errors import CheckpointError, ConfigError, TrainingError
from esm_neuron.run_dir import NONFINITE
from esm_neuron.training.callbacks import JsonlLogger
from esm_neuron.training.checkpoint import TrainState
from esm_neuron.training.signals import StopSignal
from esm_neuron.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

GIVE_UP = 10
"""Consecutive steps that are not finite after which training stops, whatever `loop.on_nonfinite` says."""


class Monitors:
    """The monitors of one run."""

    def __init__(self, cfg: TrainConfig, backend: Backend, train: TrainLoader) -> None:
        self.cfg, self.backend, self.train_loader = cfg, backend, train
        self.signal = StopSignal()
        self.clock = Clock()
        self.losses = LossWatch()
        self.recompiles = RecompileGuard(cfg.loop.on_recompile, backend.graphs, cfg.data.pack_tokens)
        self.watchdog = Watchdog.of(cfg, backend.topology.rank)
        self._compiles = backend.static_shapes or cfg.loop.torch_compile
        self._epoch = 0.0
        self._done_once: set[str] = set()
        self._on_device: list[tuple[int, Tensor, Tensor]] = []  # step, its loss sum and weight, its gradient norm

    def resume(self, state: TrainState) -> None:
        """Go on from the counters of a checkpoint."""
        self.losses.load_state_dict(state.watch)
        self.clock = Clock(state.seconds, state.residues)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the block: catch signals, end it when it hangs, count its seconds."""
        with self.signal, self.watchdog:
            self.clock.start()
            yield

    @contextmanager
    def step(self, data: StepData) -> Iterator[None]:
        """Watch a training step; the first ones may compile, which takes long."""
        if self._compiles and self.recompiles.warms_up(data.batches):
            self.watchdog.expect(f"step {data.step + 1}", slow=True)
        self._epoch = (data.step + 1) / self.train_loader.steps_per_epoch
        self.clock.sequences += data.sequences
        self.recompiles.begin()
        yield
        self.recompiles.end(data.step, data.batches)

    @contextmanager
    def validation(self, step: int, loader: EvalLoader) -> Iterator[None]:
        """Watch the validation after `step` as a step is watched."""
        with self.pause("evaluation", step, len(loader) + 1):
            self.recompiles.begin()
            yield
            self.recompiles.end_validation(step)

    @contextmanager
    def pause(self, what: str, step: int, units: int = 1) -> Iterator[None]:
        """Stop the clock for an evaluation or a checkpoint after `step`; the first one of a process may compile."""
        self.clock.stop()
        first = what not in self._done_once
        self._done_once.add(what)
        self.watchdog.expect(f"the {what} after step {step}", units, slow=self._compiles and first)
        yield
        self.clock.start()

    def note(self, step: int, totals: Tensor, norm: Tensor) -> None:
        """Remember what a step gave, [loss sum, weight] and the gradient's norm, without waiting for the values."""
        self._on_device.append((step, totals, norm))

    def look(self) -> None:
        """Have the values of all steps since the last look taken in, once they are on the host."""
        steps, totals, norms = zip(*self._on_device, strict=True)
        self._on_device = []

        def take_in(*values: Tensor) -> None:
            for step, sums, norm in zip(steps, values[: len(steps)], values[len(steps) :], strict=True):
                self.losses.take_in(step, mean_loss(sums), float(norm))

        self.backend.on_host(take_in, *totals, *norms)

    def flush(self) -> None:
        """Take in what is still on the device, as when a run is stopped between two looks."""
        if self._on_device:
            self.look()
            self.backend.sync()

    def metrics(self, residues: int) -> dict[str, float | int]:
        """Return the rest of a line of the log, after `residues` in all; the clock must be stopped."""
        of_residues, of_sequences = self.clock.rates(residues)
        found = {"epoch": self._epoch, "sequences_per_second": of_sequences, "residues_per_second": of_residues}
        found["graphs"] = self.backend.graphs()
        if self.losses.spikes:
            found["loss_spikes"], self.losses.spikes = self.losses.spikes, 0
        peak = self.backend.peak_memory()
        if peak is not None:
            found["peak_memory_gb"] = peak / 1e9
        return found

    def handle_nonfinite_steps(self) -> None:
        """Write down the records of steps that were not finite, then stop or go on, as `loop.on_nonfinite` says.

        Their updates were left out on the device already, so going on is safe.
        """
        found, loop = self.losses.nonfinite, self.cfg.loop
        if not found:
            return
        self.losses.nonfinite = []
        path, first, in_a_row = Path(self.cfg.output) / NONFINITE, found[0], self.losses.in_a_row
        stops = loop.on_nonfinite == "stop" or in_a_row >= GIVE_UP
        # The values are the same on every rank, so all ranks come to this collective together.
        main_rank_only(self.backend, lambda: self._name_records(path, found, "stop" if stops else "skip"))
        what = f"step {first['step']}: the loss is {first['loss']} and the gradient's norm {first['grad_norm']}"
        many = f" ({in_a_row} such steps in a row)" if in_a_row > 1 else ""
        if stops:
            cure = "; or go on without such steps: --loop.on_nonfinite skip" if loop.on_nonfinite == "stop" else ""
            raise TrainingError(
                f"{what}{many}; its records are in {path}; lower optim.lr={self.cfg.optim.lr}, or clip by "
                f"optim.max_grad_norm{cure}"
            )
        logger.warning("%s%s; left out, see %s", what, many, path)

    def _name_records(self, path: Path, found: Sequence[Mapping[str, Any]], action: str) -> None:
        lines = JsonlLogger(path)
        for step in found:
            lines.append({**step, "action": action, "ids": self.train_loader.record_ids(step["step"] - 1)})


class Clock:
    """Seconds in training steps, without evaluation and saving, and the rates since the last line of the log."""

    def __init__(self, seconds: float = 0.0, residues: int = 0) -> None:
        self.seconds = seconds
        self.sequences = 0
        """Sequences trained on since the last line of the log."""
        self._logged = (seconds, residues)
        self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._began

    def rates(self, residues: int) -> tuple[float, float]:
        """Return residues and sequences per second since the last call; `residues` counts from the run's start."""
        (since, before), sequences = self._logged, self.sequences
        self._logged, self.sequences = (self.seconds, residues), 0
        return (residues - before) / (self.seconds - since), sequences / (self.seconds - since)


WINDOW, LEAST = 64, 16
"""How many losses a spike is measured by: at most, and at least."""
DEVIATIONS = 8.0
"""How far above the median a spike is, in deviations by the median of absolute ones (times 1.4826: the normal's)."""
FLOOR = 0.01
"""Least deviation as a share of the median, for losses that hardly move."""


@dataclass
class LossWatch:
    """The recent losses of a run: plain values, the same on every rank, kept in checkpoints."""

    recent: list[float] = field(default_factory=list)
    """The newest finite mean losses, at most WINDOW."""
    spikes: int = 0
    """Losses that stood out since the last line of the log."""
    nonfinite: list[dict[str, Any]] = field(default_factory=list)
    """Step, loss and gradient norm of steps that were not finite and are not handled yet."""
    in_a_row: int = 0
    """Such steps up to the last one."""

    def take_in(self, step: int, loss: float | None, norm: float) -> None:
        """Add a step's mean loss (None: nothing was to be learnt) and its gradient's norm; warn of a spike."""
        if not norm < LARGEST:  # NaN is not, either
            self.nonfinite.append({"step": step, "loss": _for_json(loss), "grad_norm": _for_json(norm)})
            self.in_a_row += 1
            return
        self.in_a_row = 0
        if loss is None:
            return
        limit = spike_limit(self.recent)
        if limit is not None and loss > limit:
            self.spikes += 1
            logger.warning(
                "step %d: the loss is %.4g, the last %d had a median of %.4g; if it stays there, lower optim.lr",
                step, loss, len(self.recent), median(self.recent),
            )  # fmt: skip
        self.recent = [*self.recent, loss][-WINDOW:]

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state`."""
        mine = self.state_dict()
        losses, steps = state.get("recent", []), state.get("nonfinite", [])
        if (
            any(type(value) is not type(mine.get(name)) for name, value in state.items())
            or not all(isinstance(loss, (int, float)) for loss in losses)
            or not all(isinstance(step, dict) and set(step) == {"step", "loss", "grad_norm"} for step in steps)
        ):
            raise CheckpointError("state.json: no valid `watch`; delete the checkpoint's folder")
        for name, value in state.items():
            setattr(self, name, value)


def mean_loss(totals: Tensor) -> float | None:
    """Return the mean loss of [loss sum, weight] on the host; None where nothing was to be learnt."""
    loss, weight = totals.tolist()
    return loss / weight if weight else None


def spike_limit(recent: list[float]) -> float | None:
    """Return the loss above which one stands out from `recent`; None while these are too few to tell."""
    if len(recent) < LEAST:
        return None
    middle = median(recent)
    # Medians, because earlier spikes in the window would raise a mean and a standard deviation.
    deviation = 1.4826 * median(abs(loss - middle) for loss in recent)
    return middle + DEVIATIONS * max(deviation, FLOOR * abs(middle))


def _for_json(value: float | None) -> float | str | None:
    """Return NaN and infinity, which JSON does not have, as words."""
    return value if value is None or math.isfinite(value) else str(value)


WARM_UP = 2
"""First steps of a run, and first validations, that may compile. On XLA:CPU only the first does; a device may lay out
what it computed otherwise than what it was given, and then the second step reads other inputs than the first."""


class RecompileGuard:
    """Finds graphs that a step or a validation compiles and should not, and names what changed.

    `graphs` returns how many were compiled so far (`Backend.graphs`); `pack_tokens` is the planned length of a pack.
    """

    def __init__(self, on_recompile: OnRecompile, graphs: Callable[[], int], pack_tokens: int) -> None:
        self._action, self._graphs, self._planned = on_recompile, graphs, pack_tokens
        self._before = 0
        self._steps: Counter[int] = Counter()  # length of the packs -> steps with such packs
        self._first: dict[str, str] = {}  # signature of the first step with packs of the planned length
        self._validations = 0

    def warms_up(self, batches: Sequence[Batch]) -> bool:
        """Return whether a step on `batches` is one of the first with packs of their length, which may compile."""
        return self._steps[batches[0].input_ids.shape[1]] < WARM_UP

    def begin(self) -> None:
        """Begin a step or a validation: what was compiled until now does not count against it."""
        self._before = self._graphs()

    def end(self, step: int, batches: Sequence[Batch]) -> None:
        """Report an unplanned graph that step `step` compiled on `batches`; with "error", raise ConfigError."""
        compiled = self._graphs() - self._before
        for batch in batches:
            if compiled and (reason := self._reason(batch, len(batches))):
                self._report(f"step {step} compiled {compiled} unplanned graph{'s' * (compiled > 1)}: {reason}")
                return
        length = batches[0].input_ids.shape[1]
        self._steps[length] += 1
        if not self._first and length == self._planned:
            self._first = batches[0].signature()

    def end_validation(self, step: int) -> None:
        """Check what the validation after step `step` compiled; as with steps, the first two may."""
        compiled = self._graphs() - self._before
        self._validations += 1
        if compiled and self._validations > WARM_UP:
            self._report(
                f"the validation after step {step} compiled {compiled} unplanned graph{'s' * (compiled > 1)}: its "
                f"packs have {self._planned} tokens, as before, so another shape or a Python value in the pass changed"
            )

    def _reason(self, batch: Batch, passes: int) -> str | None:
        """Return why the graph is unplanned, None where it was to be expected."""
        found, length = batch.signature(), batch.input_ids.shape[1]
        if length != self._planned:
            return f"its packs have {length} tokens, planned are {self._planned}"
        first = self._first or found
        changed = [f"{name} is {new}, was {first[name]}" for name, new in found.items() if new != first[name]]
        if changed:
            return ", ".join(changed) + " in the first step"
        if self._steps[length] < WARM_UP:
            return None
        return (
            f"the shapes of its {passes} batches are those of the first steps, so a Python value in the step changed "
            "(a number that is not a tensor on the device, or another branch of the code)"
        )

    def _report(self, message: str) -> None:
        if self._action == "error":
            raise ConfigError(f"{message}; loop.on_recompile=warn goes on and compiles it")
        if self._action == "warn":
            logger.warning(message)
