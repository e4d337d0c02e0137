"""What the steps of a run have shown once their values are on the host: losses that stand out, or are no numbers."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

import torch

from esm_neuron.backends.base import LARGEST
from esm_neuron.config import OnRecompile
from esm_neuron.data.dataset import Batch
from esm_neuron.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

WINDOW, LEAST = 64, 16
"""Losses that a spike is measured by: at most, and at least."""
DEVIATIONS = 8.0
"""How far above the median a spike is, in deviations by the median of absolute ones (times 1.4826: the normal's)."""
FLOOR = 0.01
"""Least deviation as a share of the median, for losses that hardly move."""
GIVE_UP = 10
"""Steps that are not finite, one after the other, after which no setting goes on."""


@dataclass
class StepWatch:
    """The losses of a run, as its guards need them: plain values, the same on every rank, kept in checkpoints."""

    recent: list[float] = field(default_factory=list)
    """The newest finite mean losses, at most WINDOW."""
    spikes: int = 0
    """Losses that stood out since the last line of the log."""
    nonfinite: list[dict[str, Any]] = field(default_factory=list)
    """Step, loss and gradient norm of the steps that moved nothing, until something is done about them."""
    in_a_row: int = 0
    """Such steps up to the last one."""

    def take_in(self, step: int, loss: float | None, norm: float) -> None:
        """The mean loss of a step (None: nothing was to be learnt) and its gradient's norm; warns of a spike."""
        if not norm < LARGEST:  # NaN is not, either
            self.nonfinite.append({"step": step, "loss": _sayable(loss), "grad_norm": _sayable(norm)})
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

    def taken(self) -> list[dict[str, Any]]:
        """The non-finite steps that nothing has been done about; from now on something has."""
        found, self.nonfinite = self.nonfinite, []
        return found

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, valid JSON."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; an empty one is that of a checkpoint from before there was a watch.

        Raises:
            CheckpointError: it is not what `state_dict` gives.
        """
        mine = self.state_dict()
        losses, steps = state.get("recent", []), state.get("nonfinite", [])
        if (
            any(type(value) is not type(mine.get(name)) for name, value in state.items())
            or not all(isinstance(loss, (int, float)) for loss in losses)
            or not all(isinstance(step, dict) and set(step) == {"step", "loss", "grad_norm"} for step in steps)
        ):
            raise CheckpointError("state.json: no sound `watch`; delete the checkpoint's folder")
        for name, value in state.items():
            setattr(self, name, value)


def spike_limit(recent: list[float]) -> float | None:
    """The loss above which one stands out from `recent`; None while these are too few to say."""
    if len(recent) < LEAST:
        return None
    middle = median(recent)
    deviation = 1.4826 * median(abs(loss - middle) for loss in recent)
    return middle + DEVIATIONS * max(deviation, FLOOR * abs(middle))


def _sayable(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: they become words."""
    return value if value is None or math.isfinite(value) else str(value)


WARM_UP = 2
"""First steps of a run, and first validations, that may compile. On XLA:CPU only the first does; a device may lay out
what it computed otherwise than what it was given, and then the second step reads other inputs than the first."""

Signature = tuple[tuple[str, str], ...]
"""What a compiled program depends on: (field, shape and type, or value) of a batch, by field."""


def signature(batch: Batch) -> Signature:
    """Shapes and types of the tensors of a batch, and the values that become part of the program."""
    held = [(f.name, getattr(batch, f.name)) for f in fields(batch) if f.name != "members"]
    return tuple((name, _describe(value)) for name, value in held)


class RecompileGuard:
    """Watches the steps and validations of one run.

    Args:
        on_recompile: what to do about an unplanned program.
        graphs: programs compiled so far (`Backend.graphs`).
        pack_tokens: the planned length of a pack.
    """

    def __init__(self, on_recompile: OnRecompile, graphs: Callable[[], int], pack_tokens: int) -> None:
        self._action, self._graphs, self._planned = on_recompile, graphs, pack_tokens
        self._before = 0
        self._steps: Counter[int] = Counter()  # length of the packs -> steps with such packs
        self._first: Signature | None = None  # of the first step with packs of the planned length
        self._validations = 0

    def warms_up(self, batches: Sequence[Batch]) -> bool:
        """Return whether a step on `batches` is one of the first with packs of their length, which may compile."""
        return self._steps[batches[0].input_ids.shape[1]] < WARM_UP

    def begin(self) -> None:
        """A step or a validation begins: what was compiled until now does not count against it."""
        self._before = self._graphs()

    def end(self, step: int, batches: Sequence[Batch]) -> None:
        """Step `step` on `batches` is done.

        Raises:
            ConfigError: with `on_recompile` "error", it compiled a program that was not planned.
        """
        compiled = self._graphs() - self._before
        for batch in batches:
            found, length = signature(batch), batch.input_ids.shape[1]
            if compiled and (reason := self._reason(found, length, len(batches))):
                self._report(f"step {step} compiled {compiled} unplanned program{'s' * (compiled > 1)}: {reason}")
                return
        length = batches[0].input_ids.shape[1]
        self._steps[length] += 1
        if self._first is None and length == self._planned:
            self._first = signature(batches[0])

    def end_validation(self, step: int) -> None:
        """A validation after step `step` is done: as with steps, the first two may compile.

        Raises:
            ConfigError: with `on_recompile` "error", it compiled a program that was not planned.
        """
        compiled = self._graphs() - self._before
        self._validations += 1
        if compiled and self._validations > WARM_UP:
            self._report(
                f"the validation after step {step} compiled {compiled} unplanned program{'s' * (compiled > 1)}: its "
                f"packs have {self._planned} tokens, as before, so another shape or a Python value in the pass changed"
            )

    def weights_were_given(self) -> None:
        """Weights came from a checkpoint: a device may lay them out otherwise than what it computed."""
        self._validations = 0

    def _reason(self, found: Signature, length: int, passes: int) -> str | None:
        """Why the program is unplanned, None where it was to be expected."""
        if length != self._planned:
            return f"its packs have {length} tokens, planned are {self._planned}"
        first = self._first or found
        changed = [(name, new, old) for (name, new), (_, old) in zip(found, first, strict=True) if new != old]
        if changed:
            return ", ".join(f"{name} is {new}, was {old}" for name, new, old in changed) + " in the first step"
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


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{' x '.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
    return str(value)
