"""Trains runs on XLA:CPU and on the plain CPU, in a process of its own; prints their losses and figures as JSON.

PJRT_DEVICE=CPU [CPU_NUM_DEVICES=4] python tasks_worker.py TP CONFIG.yaml...
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from esm_neuron.config import ParallelConfig, TrainConfig, settings
from esm_neuron.training import run


def train(cfg: TrainConfig, backend: Any, tp: int = 1) -> dict[str, Any]:
    """What a run ends with, and the loss of each step."""
    rows = 1 if tp > 1 else cfg.loop.packs_per_device
    cfg = replace(
        cfg, output=f"{cfg.output}_{backend}_{tp}", backend=backend, parallel=ParallelConfig(tp=tp),
        loop=replace(cfg.loop, packs_per_device=rows), log=replace(cfg.log, baselines=False),
    )  # fmt: skip
    result = run.train(cfg, str).result
    lines = map(json.loads, (Path(cfg.output) / "metrics.jsonl").read_text().splitlines())
    return {"losses": [line["loss"] for line in lines if "split" not in line], "test": result["test"]}


if __name__ == "__main__":
    runs = [settings.read_config(Path(path)) for path in sys.argv[2:]]
    # the device first: autograd makes its queues, one a device, at the first backward pass of the process
    found = {cfg.task.name: train(cfg, "xla", int(sys.argv[1])) for cfg in runs}
    print(json.dumps({cfg.task.name: [train(cfg, "cpu"), found[cfg.task.name]] for cfg in runs}))
