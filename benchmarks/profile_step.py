"""Where the time of a training step goes on the CPU: `python benchmarks/profile_step.py [--shape ...] [--adapter ...]`.

Trains as `throughput.py` does, ours alone, and records steps after a warm-up with torch's profiler. An operation's own
time counts, without that of those it calls. Prints the shares by kind and writes them, with the 25 longest operations
and the machine, to `results/profile-SHAPE-ADAPTER.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["USE_TORCH_XLA"] = "0"

import throughput
from contestants import HERE, OURS, Contestant, ours, write_rows
from machine import load, machine

KINDS = {
    "matrix products": ("addmm", "mm", "bmm", "baddbmm"),
    "attention": ("attention",),
    "GELU": ("gelu",),
    "layer norm": ("layer_norm",),
    "copies": ("copy_", "cat", "index", "gather", "embedding", "clone", "pad"),
    "optimizer": ("adam", "foreach", "_linalg"),
}
"""Kind -> parts of names of its operations; what has none of them is element-wise, or waits."""
LONGEST = 25


def kind_of(name: str) -> str:
    """An operation's kind, the first that fits."""
    operation = name.removeprefix("aten::")
    if operation in KINDS["matrix products"]:
        return "matrix products"
    others = {kind: parts for kind, parts in KINDS.items() if kind != "matrix products"}
    found = (kind for kind, parts in others.items() if any(part in operation.lower() for part in parts))
    return next(found, "element-wise and the rest")


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """Shares of the recorded steps' time."""
    import torch
    from torch.profiler import ProfilerActivity

    from esm_neuron.cli import main as train
    from esm_neuron.trainer import Trainer

    torch.set_num_threads(args.threads)
    step, recorder = Trainer._train_step, torch.profiler.profile(activities=[ProfilerActivity.CPU])

    def recorded(self: Trainer, data: Any) -> None:
        if self.state.step == args.warmup:
            recorder.start()
        step(self, data)
        if self.state.step == args.max_steps:
            recorder.stop()

    Trainer._train_step = recorded  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        rows_per_step = write_rows(args, Path(name))
        words = ours(Contestant(OURS, "fp32", args.adapters[0]), args, Path(name), rows_per_step)
        if code := train(["train", *words]):
            sys.exit(code)
    times: Counter[str] = Counter()
    for event in recorder.key_averages():
        times[event.key] += event.self_cpu_time_total
    total, kinds = sum(times.values()), Counter[str]()
    for operation, spent in times.items():
        kinds[kind_of(operation)] += spent
    return {
        "steps": args.max_steps - args.warmup,
        "rows_per_step": rows_per_step,
        "seconds": total / 1e6,
        "kinds": {kind: spent / total for kind, spent in kinds.most_common()},
        "longest": {operation: spent / total for operation, spent in times.most_common(LONGEST)},
    }


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="esm2_t6_8M")
    parser.add_argument("--adapter", choices=("none", "lora"), default="lora")
    parser.add_argument("--max-residues", type=int, default=1022)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    own = parser.parse_args()
    words = [*("--shape", own.shape), *("--adapters", own.adapter), *("--max-residues", str(own.max_residues))]
    args = throughput.arguments([*words, *["--rows", "64", "--warmup", "2", "--max-steps", "6"]])
    before = load()
    found = profile(args)
    record = {"machine": machine(), "load_before": before, "shape": own.shape, "adapter": own.adapter, **found}
    own.output.mkdir(parents=True, exist_ok=True)
    path = own.output / f"profile-{own.shape}-{own.adapter}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, share in found["kinds"].items():
        print(f"{share:6.1%}  {name}")


if __name__ == "__main__":
    main()
