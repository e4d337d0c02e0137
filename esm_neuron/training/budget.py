"""As many steps as a time allows: the first ones are timed, the model they have moved is thrown away.

The number is saved as `loop.max_steps`, so that a run is repeated, and resumed, by its config.yaml and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from time import perf_counter

from esm_neuron.config import LoopConfig
from esm_neuron.config.rules import seconds
from esm_neuron.data.loader import EvalLoader, eval_interval
from esm_neuron.distributed import from_main_rank
from esm_neuron.errors import ConfigError
from esm_neuron.training.trainer import Trainer

TIMED = 4
"""Steps that are timed, after two that may compile."""


@dataclass(frozen=True)
class Pace:
    """Seconds that parts of a run take."""

    step: float
    """An optimizer step."""
    validation: float
    end: float
    """The evaluation at the end."""

    def of(self, steps: int, loop: LoopConfig, steps_per_epoch: int) -> float:
        """Return the seconds of so many steps with their validations, and of the end."""
        every = eval_interval(steps_per_epoch, replace(loop, max_steps=steps))
        return steps * self.step + math.ceil(steps / every) * self.validation + self.end

    def steps_within(self, time: float, loop: LoopConfig, steps_per_epoch: int) -> int:
        """Return the most steps that take no longer than `time` seconds, 0 where not even one fits."""
        interval = loop.eval_every or steps_per_epoch  # at most: `min_evals` may make validations denser
        most = int(max(0.0, time - self.end) / (self.step + self.validation / interval))
        return next((n for n in range(most, 0, -1) if self.of(n, loop, steps_per_epoch) <= time), 0)


def measure(trainer: Trainer, held_out: Mapping[str, EvalLoader]) -> Pace:
    """Return how long steps and evaluations take. The model is of no use afterwards."""
    trainer.compile(list(held_out.values()))
    begun = perf_counter()
    for step in range(TIMED):
        trainer.train_step(trainer.train_loader.load(step))
    trainer.monitors.flush()  # it waits for the device
    step_seconds = (perf_counter() - begun) / TIMED
    passes = dict.fromkeys(("valid", "test"), 0.0)
    for split, loader in held_out.items():
        begun = perf_counter()
        trainer.evaluator.run(islice(loader, 1), lambda members, predictions: None)
        passes[split] = (perf_counter() - begun) * len(loader)
    return Pace(step_seconds, passes["valid"], passes["test"])


def within_budget(trainer: Trainer, held_out: Mapping[str, EvalLoader], log: Callable[[str], None]) -> LoopConfig:
    """Return the loop with the steps that `loop.budget` has time for, the same on every rank.

    Raise ConfigError where there is no time for one.
    """
    loop, epoch = trainer.cfg.loop, trainer.train_loader.steps_per_epoch
    measured = measure(trainer, held_out)
    pace = from_main_rank(trainer.backend, lambda: measured)
    steps = pace.steps_within(seconds(str(loop.budget)), loop, epoch)
    told = f"a step takes {pace.step:.2g} s, a validation {pace.validation:.2g} s, the end {pace.end:.2g} s"
    if not steps:
        least = math.ceil(pace.of(1, loop, epoch))
        raise ConfigError(f"loop.budget={loop.budget}: {told}; give at least {least}s")
    log(f"loop.budget={loop.budget} is time for {steps} steps, {steps / epoch:.2g} passes over the proteins: {told}")
    return replace(loop, budget=None, max_steps=steps)
