"""What the steps of a run have shown once their values are on the host: losses that stand out, or are no numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from esm_neuron.errors import CheckpointError

log = logging.getLogger(__name__)

WINDOW, LEAST = 64, 16
"""Losses that a spike is measured by: at most, and at least."""
DEVIATIONS = 8.0
"""How far above the median a spike is, in deviations by the median of absolute ones (times 1.4826: the normal's)."""
FLOOR = 0.01
"""Least deviation as a share of the median, for losses that hardly move."""
LARGEST = 3e38
"""A loss or norm from here on is infinite: Neuron's compiler writes infinity as float32's largest number, 3.4e38."""
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
            log.warning(
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
