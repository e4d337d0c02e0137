"""Trainings of the tasks that the other runs of the workers leave out, on XLA:CPU devices and on the plain CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from esm_neuron.config import AdapterConfig, ParallelConfig, TrainConfig, settings
from esm_neuron.training import run
from helpers.processes import saved_config
from helpers.runs import losses

TASKS = ("multi_label", "regression", "residue_classification", "probe", "mix")


def task_runs(task_toys: dict[str, TrainConfig]) -> list[Path]:
    """Write the configurations of TASKS; return their files."""
    base = task_toys["multi_label"]
    reads = replace(base.model, layers="mix", pooling="mean+termini", composition=True)
    probe = {"model": replace(base.model, layers="concat", pooling="mean"), "adapter": AdapterConfig(kind="probe")}
    more = {"probe": replace(base, **probe), "mix": replace(base, model=reads)}
    runs = {**task_toys, **{name: replace(cfg, output=f"{base.output}_{name}") for name, cfg in more.items()}}
    return [saved_config(replace(runs[name], output=str(Path(runs[name].output).with_name(name)))) for name in TASKS]


def on_both(configs: Sequence[Path], tp: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Return task -> what its run gave on the plain CPU and over all XLA devices of this process."""
    # The device first: autograd makes its queues, one per device, at the first backward pass of the process.
    runs = [settings.read_config(path) for path in configs]
    xla = [_train(cfg, "xla", tp) for cfg in runs]
    return {Path(cfg.output).name: [_train(cfg, "cpu"), found] for cfg, found in zip(runs, xla, strict=True)}


def _train(cfg: TrainConfig, backend: Any, tp: int = 1) -> dict[str, Any]:
    """Return the test metrics that a run ends with, and the loss of each step."""
    packs = 1 if tp > 1 else cfg.loop.packs_per_device
    cfg = replace(
        cfg, output=f"{cfg.output}_{backend}_{tp}", backend=backend, parallel=ParallelConfig(tp=tp),
        loop=replace(cfg.loop, packs_per_device=packs), log=replace(cfg.log, baselines=False),
    )  # fmt: skip
    result = run.train(cfg, str).result
    return {"losses": losses(cfg), "test": result["test"]}
