"""Other processes: starting them and waiting for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from esm_neuron.config import TrainConfig, settings

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
"""The words before a program that two processes shall run."""
PATIENCE = 900
"""Seconds that a program may take on a busy machine."""


def wait_for(
    condition: Callable[[], bool], seconds: float = 60, processes: Iterable[subprocess.Popen[str]] = ()
) -> None:
    """Return when `condition` holds; it must, within so many seconds and before one of the processes ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.001)


def output_of(words: Sequence[object], env: Mapping[str, str] | None = None) -> str:
    """Run a program that must succeed; return what it printed to stdout."""
    done = subprocess.run(
        [str(word) for word in words], env={**os.environ, **(env or {})}, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return done.stdout


def json_of(words: Sequence[object], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a Python program that prints a JSON object in its last line; return the object."""
    found: dict[str, Any] = json.loads(output_of([sys.executable, *words], env).splitlines()[-1])
    return found


def saved_config(cfg: TrainConfig) -> Path:
    """Write a run's configuration beside its output folder; return the file."""
    path = Path(f"{cfg.output}.yaml")
    path.write_text(settings.dump(cfg))
    return path


def on_two_ranks(jobs: Sequence[Sequence[str]]) -> str:
    """Do the jobs of `two_ranks.py` in two processes on gloo; return what rank 0 printed."""
    return output_of([*TORCHRUN, Path(__file__).with_name("two_ranks.py"), json.dumps(jobs)])
