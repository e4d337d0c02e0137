"""Start a run from the head of another: a probe's, or one that was trained alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from esm_neuron.config import TrainConfig, require
from esm_neuron.config.deferred import module
from esm_neuron.config.settings import read_config
from esm_neuron.run_dir import CONFIG, MODEL
from esm_neuron.tasks.base import Task

if TYPE_CHECKING:
    from torch import Tensor

    from esm_neuron.models import hf_folder, weights
else:
    hf_folder, weights = module("esm_neuron.models.hf_folder"), module("esm_neuron.models.weights")

READ = ("layers", "pooling", "composition", "head")
"""Settings of the model that a head belongs to."""
SAME = ("name", "base", "revision", "init")
"""Settings of the model that two runs must share."""


def adopted(cfg: TrainConfig) -> TrainConfig:
    """Return `cfg` with the settings that belong to the head of `adapter.init_from`.

    Raise ConfigError where there is no such head, or it is of another model or task.
    """
    if cfg.adapter.init_from is None:
        return cfg
    run = Path(cfg.adapter.init_from)
    named = f"adapter.init_from={run}"
    require((run / CONFIG).is_file(), f"{named}: no {CONFIG} there; name the output folder of a probe")
    other = read_config(run / CONFIG)
    require(
        other.adapter.kind in ("probe", "head") and (run / MODEL).is_dir(),
        f"{named}: a run of adapter.kind={other.adapter.kind}, or one that has not finished; name a finished run of "
        "kind probe or head",
    )
    for name in SAME:
        here, there = getattr(cfg.model, name), getattr(other.model, name)
        require(here == there, f"{named}: its model.{name} is {there}, here it is {here}; use the same weights")
    require(
        cfg.task.name == other.task.name,
        f"{named}: its task is {other.task.name}, here it is {cfg.task.name}; use a run of the same task",
    )
    return replace(cfg, model=replace(cfg.model, **{name: getattr(other.model, name) for name in READ}))


def starting_head(cfg: TrainConfig, task: Task) -> dict[str, Tensor]:
    """Return the head of `adapter.init_from` by its parameters' names, {} without one.

    Raise ConfigError where it answers with other classes, or in another unit, than the task of this run's data.
    """
    if cfg.adapter.init_from is None:
        return {}
    run = Path(cfg.adapter.init_from)
    other = read_config(run / CONFIG).task
    for name, here in (("labels", task.labels or None), ("target_mean", cfg.task.target_mean),
                       ("target_sd", cfg.task.target_sd)):  # fmt: skip
        there = getattr(other, name)
        require(
            there == here,
            f"adapter.init_from={run}: its task.{name} is {there}, here it is {here}; give --task.{name} as there, or "
            "start from a probe of this data",
        )
    folder = hf_folder.SafetensorsFolder(run / MODEL)
    return {name: folder.read(name) for name in filter(weights.HEAD.fullmatch, folder.keys())}
