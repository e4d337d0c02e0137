"""Run `esm-neuron train`, and time what comes before its own clock.

    python benchmarks/timed_train.py FILE --output OUT ...

The run's own seconds begin with its first step. But a user also waits for what is compiled before (weights, gradients
and moments are made by graphs too). So the seconds from the building of the model to the first step are written to
FILE, as JSON; hf_trainer.py starts its clock at the same place. With GPU_MEMORY_GB in the environment, the process gets
no more of a GPU's memory: what fits a smaller GPU is seen on a larger one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from esm_neuron.cli import main
from esm_neuron.training import build
from esm_neuron.training.trainer import Trainer


def watch(target: Path) -> None:
    """Have `run.train` write its set-up seconds to `target`."""
    build_model, fit = build.build_model, Trainer.fit
    began: list[float] = []

    def build_watched(*args: Any, **named: Any) -> Any:
        began.append(time.perf_counter())
        return build_model(*args, **named)

    def fit_watched(self: Trainer) -> Any:
        target.write_text(json.dumps({"setup_seconds": time.perf_counter() - began[0]}))
        return fit(self)

    build.build_model, Trainer.fit = build_watched, fit_watched  # type: ignore[method-assign]


def cap_memory(gigabytes: float) -> None:
    """Give this process so many gigabytes (10^9 bytes) of the first GPU."""
    import torch

    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / whole))


if __name__ == "__main__":
    if "GPU_MEMORY_GB" in os.environ:
        cap_memory(float(os.environ["GPU_MEMORY_GB"]))
    watch(Path(sys.argv[1]))
    sys.exit(main(["train", *sys.argv[2:]]))
