"""Tasks on XLA:CPU, one device and four (tp 2 x dp 2): the losses and figures of the plain CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from esm_neuron.config import TrainConfig, settings

pytestmark = pytest.mark.xla

NEW = ("multi_label", "regression", "residue_classification")


@pytest.mark.parametrize("tp", [1, 2])
def test_every_task_trains_and_scores_as_on_the_cpu(
    tp: int, task_toys: dict[str, TrainConfig], tmp_path: Path, same_metrics: Callable[..., None]
) -> None:
    paths = [tmp_path / f"{task}.yaml" for task in NEW]
    for task, path in zip(NEW, paths, strict=True):
        cfg = task_toys[task]
        path.write_text(settings.dump(cfg).replace(f"output: {cfg.output}", f"output: {tmp_path / task}"))
    words = [sys.executable, str(Path(__file__).with_name("tasks_worker.py")), str(tp), *map(str, paths)]
    devices = {"CPU_NUM_DEVICES": "4"} if tp > 1 else {}
    environment = os.environ | {"PJRT_DEVICE": "CPU", "USE_TORCH_XLA": "0"} | devices
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(NEW)
    for task, (cpu, xla) in found.items():
        assert len(cpu["losses"]) == 6
        assert xla["losses"] == pytest.approx(cpu["losses"], rel=1e-4), task
        same_metrics(xla["test"], cpu["test"], abs=1e-3)
