"""What a search tries: a range or a list of values for each setting, the default ones or those of a file.

space.yaml has a line per setting: `optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}`, or `adapter.r: [4, 8, 16]`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_neuron.config import TrainConfig, require
from esm_neuron.config.deferred import module
from esm_neuron.config.settings import known_keys, override, read_yaml
from esm_neuron.errors import ConfigError
from esm_neuron.tasks import task_class

if TYPE_CHECKING:
    from optuna import distributions
else:
    distributions = module("optuna.distributions")

Params = Mapping[str, Any]
"""Setting -> the value that a trial has; a list is written as JSON."""

SEARCHED = ("model.", "adapter.", "optim.", "loop.")
SEARCHED_TOO = {
    "task.class_weights", "task.label_smoothing", "task.focal_gamma", "data.max_residues", "data.long_sequences",
    "data.window_overlap", "data.pack_tokens", "data.max_segments",
}  # fmt: skip
"""Settings that may be searched. The others decide on what trials are compared, or where they run."""
RATES = {"none": (2e-5, 2e-3), "head": (3e-4, 3e-2), "lora": (2e-4, 1e-2), "qlora": (2e-4, 1e-2)}
"""Kind of adapter -> the learning rates that are tried: a decade on both sides of those in docs/tuning.md."""
OF_STEPS = ("loop.max_steps", "loop.min_steps", "loop.eval_every", "optim.warmup_steps")
"""Settings that count steps: with steps of other size, they are changed so that trials see as many proteins."""


@dataclass(frozen=True)
class Space:
    """The settings that are searched, with their ranges."""

    ranges: Mapping[str, Any]
    """Setting -> a list of values, or a mapping with `low`, `high` and perhaps `log` and `step`."""

    def distributions(self, cfg: TrainConfig) -> dict[str, Any]:
        """Return the ranges as optuna's distributions; whole numbers where the setting of `cfg` is one."""
        found: dict[str, Any] = {}
        for name, of in self.ranges.items():
            if isinstance(of, list):
                found[name] = distributions.CategoricalDistribution([_plain(value) for value in of])
                continue
            now = attrgetter(name)(cfg)
            whole = isinstance(now, int) and isinstance(of["low"], int) and isinstance(of["high"], int)
            kind = distributions.IntDistribution if whole else distributions.FloatDistribution
            found[name] = kind(**of)
        return found

    def start(self, cfg: TrainConfig) -> dict[str, Any]:
        """Return the values that `cfg` has itself, as far as they are in the ranges: the first trial."""
        found = {}
        for name, of in self.ranges.items():
            value = _plain(attrgetter(name)(cfg))
            inside = value in map(_plain, of) if isinstance(of, list) else _within(value, of)
            if inside and not (name == "optim.warmup_ratio" and cfg.optim.warmup_steps):
                found[name] = value
        return found

    def apply(self, cfg: TrainConfig, params: Params) -> TrainConfig:
        """Return `cfg` with the values of a trial, and with what has to follow from them.

        LoRA's alpha stays in proportion to r; the packs of a pass divide those of a step; steps of other size are more
        or fewer, so that every trial sees as many proteins; and a probe chooses its layers itself. Raise ConfigError
        where a value cannot be.
        """
        if params.get("adapter.kind") == "probe":
            params = {**params, "model.head": "linear"}  # nothing else is fitted at once
            if "model.layers" in params or cfg.model.layers == "mix":
                params["model.layers"] = "auto"
        packs = params.get("loop.packs_per_step", cfg.loop.packs_per_step)
        changed = _with(cfg, {**params, **_passes(cfg, packs)})
        values: dict[str, Any] = {}
        if "optim.warmup_ratio" in params:
            values["optim.warmup_steps"] = 0
        if "adapter.r" in params and "adapter.alpha" not in params:
            values["adapter.alpha"] = max(1, round(cfg.adapter.alpha * changed.adapter.r / cfg.adapter.r))
        if packs != cfg.loop.packs_per_step:
            for name in OF_STEPS:
                if attrgetter(name)(cfg) and name not in {*params, *values}:
                    values[name] = max(1, round(attrgetter(name)(cfg) * cfg.loop.packs_per_step / packs))
        return _with(changed, values)


def _passes(cfg: TrainConfig, packs: Any) -> dict[str, int]:
    """Return how many packs of a step are in a pass, where these do not divide those."""
    fits = not isinstance(packs, int) or packs % cfg.loop.packs_per_device == 0
    return {} if fits else {"loop.packs_per_device": math.gcd(packs, cfg.loop.packs_per_device)}


def _with(cfg: TrainConfig, values: Params) -> TrainConfig:
    """Return `cfg` with some values; raise ConfigError where one cannot be."""
    words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]
    return override(cfg, words, tuple(values), "tune") if values else cfg


def _plain(value: Any) -> Any:
    """Return a value as a choice of optuna's, which may be no list."""
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


def _within(value: Any, of: Mapping[str, Any]) -> bool:
    return isinstance(value, (int, float)) and bool(of["low"] <= value <= of["high"])


def default_space(cfg: TrainConfig) -> Space:
    """Return what is searched unless a file says otherwise, by the kind of adapter and the task."""
    task, ranges = task_class(cfg.task.name), dict[str, Any]()
    if cfg.adapter.kind in RATES:
        if not task.keeps_lm_head:
            ranges["adapter.kind"] = [cfg.adapter.kind, "probe"]
        low, high = RATES[cfg.adapter.kind]
        ranges["optim.lr"] = {"low": low, "high": high, "log": True}
        ranges["optim.warmup_ratio"] = {"low": 0.0, "high": 0.3}
        ranges["loop.packs_per_step"] = [1, 2, 4, 8]
    if cfg.adapter.kind in ("lora", "qlora"):
        ranges["adapter.r"] = [4, 8, 16, 32]
    if task.pools and cfg.adapter.init_from is None:  # which says what the head reads
        ranges["model.pooling"] = ["mean", "mean+termini"]
        extra = {"model.layers": ["all", "mix"]} if cfg.adapter.kind in RATES else {"model.composition": [False, True]}
        ranges.update(extra)
    if "class_weights" in task.settings:
        ranges["task.class_weights"] = ["none", "auto", "balanced"]
    for name, of in ranges.items():
        if isinstance(of, list):
            ranges[name] = [value for value in of if _can(cfg, name, value)]
    return Space({name: of for name, of in ranges.items() if isinstance(of, dict) or len(of) > 1})


def _can(cfg: TrainConfig, name: str, value: Any) -> bool:
    """Return whether a setting can have a value beside the others of `cfg`, such as a probe beside FSDP."""
    with suppress(ConfigError):
        return bool(Space({}).apply(cfg, {name: value}))
    return False


def read_space(path: Path, cfg: TrainConfig) -> Space:
    """Return the space of a YAML file; raise ConfigError where a setting, a range or a value cannot be."""
    known, ranges = list(known_keys()), read_yaml(path, "--space", "docs/tuning.md")
    for name, of in ranges.items():
        where = f"--space {path}: {name}"
        near = difflib.get_close_matches(str(name), known, n=1)
        require(name in known, f"{where} is no setting; {f'did you mean {near[0]}?' if near else 'see train --help'}")
        may = str(name).startswith(SEARCHED) or name in SEARCHED_TOO
        require(may, f"{where} is not searched: trials would be compared on other proteins, or run elsewhere")
        _check_range(where, of)
    space = Space(ranges)
    for name, of in ranges.items():
        for value in map(_plain, of) if isinstance(of, list) else (of["low"], of["high"]):
            try:
                space.apply(cfg, {name: value})
            except ConfigError as error:
                raise ConfigError(f"--space {path}: {error}") from error
    return space


def _check_range(where: str, of: Any) -> None:
    """Raise ConfigError unless `of` is a list of two values or more, or a mapping of numbers in order."""
    if isinstance(of, list):
        require(len(of) > 1, f"{where} has {len(of)} values; list two or more, or leave it out")
        return
    cure = "write [A, B, ...], or {low: A, high: B}, with log: true or step: S if wanted"
    require(isinstance(of, dict) and {"low", "high"} <= set(of) <= {"low", "high", "log", "step"}, f"{where}: {cure}")
    low, high = of["low"], of["high"]
    numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (low, high))
    require(numbers and low < high, f"{where}: low {low} must be a number below high {high}")
    require(not of.get("log") or low > 0, f"{where}: log: true with low {low}, must be above 0")
    require(not (of.get("log") and of.get("step")), f"{where}: log and step exclude each other; keep one")
