"""One rank of a training that is watched: what it computed, how long its graphs compiled, what the host does in a step.

torchrun starts it with a file that has the arguments of `watch`. The settings are those of the parity tests.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHOWN = ("NEURON_", "XLA_", "PJRT_", "DISABLE_NUMERIC_CC_TOKEN", "FI_", "MALLOC_ARENA_MAX")
"""Beginnings of the names of variables that are shown."""


def watch(output: str, backend: str, values: dict[str, Any], compared: bool) -> None:
    """Train, and leave results.safetensors and facts.json in `output`; `compared`: logits and gradients as well."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
    from helpers.device_run import Run, configuration
    from safetensors.torch import save_file

    run = Run.start(configuration(output, backend=backend, set=values))
    facts: dict[str, Any] = {"environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SHOWN)}}
    results = {}
    if compared:
        results = {"logits": run.logits(), **run.gradients(run.trainer.train_loader.load(0).batches)}
    steps: list[dict[str, float]] = []
    if backend != "cpu":
        facts |= {"steps": steps, "compiled_before": compile_seconds()}
        time_steps(run, steps)
    results |= run.train()
    if backend != "cpu":
        facts["compiled"] = compile_seconds()[len(facts["compiled_before"]) :]
    if run.backend.topology.is_main:
        save_file({name: value.contiguous() for name, value in results.items()}, Path(output) / "results.safetensors")
        (Path(output) / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    run.backend.close()


def compile_seconds() -> list[float]:
    """Return how long each graph of this process took to compile, oldest first."""
    import torch_xla.debug.metrics

    found = torch_xla.debug.metrics.metric_data("CompileTime")
    return [] if found is None else [1e-9 * nanoseconds for _, nanoseconds in found[2]]


def time_steps(run: Any, steps: list[dict[str, float]]) -> None:
    """Have each step of a training measured, with the device idle before and after it.

    `host`: seconds of Python outside torch_xla's `sync`, where it traces or looks up graphs; `all`: until the device is
    done; `graphs`: how many were compiled so far.
    """
    import torch_xla
    import torch_xla.core.xla_model

    sync, step, within = torch_xla.sync, run.trainer.train_step, [0.0]

    def timed_sync(*args: Any, **options: Any) -> None:
        began = time.perf_counter()
        sync(*args, **options)
        within[0] += time.perf_counter() - began

    def timed_step(data: Any) -> None:
        began, within[0] = time.perf_counter(), 0.0
        step(data)
        host = time.perf_counter() - began - within[0]
        torch_xla.core.xla_model.wait_device_ops()
        steps.append({"host": host, "all": time.perf_counter() - began, "graphs": run.backend.graphs()})

    torch_xla.sync, run.trainer.train_step = timed_sync, timed_step


if __name__ == "__main__":
    watch(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
