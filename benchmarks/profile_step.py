"""Show where the time of a training step goes: `python benchmarks/profile_step.py`, `--backend cuda` on a GPU.

Trains as `throughput.py` does, ours alone, and records steps after a warm-up with torch's profiler. An operation's
own time counts, on a GPU that of its kernels, without that of the operations it calls; the rest is Python, and waiting
for the next batch.
Prints the shares by kind and writes them, with the 25 longest operations and the machine, to `results/profile-*.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["USE_TORCH_XLA"] = "0"

import throughput
import torch
from contestants import HERE, OURS, Contestant, ours, write_rows
from machine import load, machine

from esm_neuron.backends.eager import EagerBackend
from esm_neuron.cli import main as train
from esm_neuron.training.trainer import Trainer

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

KINDS = {
    "matrix products": ("addmm", "addmm_", "mm", "bmm", "baddbmm"),
    "attention": ("attention",),
    "GELU": ("gelu",),
    "layer norm": ("layer_norm",),
    "copies": ("copy_", "cat", "index", "gather", "embedding", "clone", "pad"),
}
"""Kind -> names of matrix products, and parts of the other operations' names; the rest is element-wise."""
UPDATE, REST, BETWEEN = "update", "element-wise and the rest", "between operations"
LONGEST = 25


def kind_of(name: str) -> str:
    """Return an operation's kind: the first that matches."""
    operation = name.removeprefix("aten::")
    if operation in KINDS["matrix products"]:
        return "matrix products"
    others = (kind for kind, parts in KINDS.items() if kind != "matrix products")
    return next((kind for kind in others if any(part in operation for part in KINDS[kind])), REST)


def in_update(event: FunctionEvent) -> bool:
    """Return whether an operation was called, at any depth, by the clipping or the optimizer."""
    caller: FunctionEvent | None = event
    while caller is not None and caller.name != UPDATE:
        caller = caller.cpu_parent
    return caller is not None


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """Return shares of the time of the recorded steps."""
    torch.set_num_threads(args.threads)
    step, update, on_gpu = Trainer.train_step, EagerBackend.step, args.backend == "cuda"
    kinds = torch.profiler.ProfilerActivity
    recorder = torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])])
    clock = [0.0]

    def recorded(self: Trainer, data: Any) -> None:
        if on_gpu:
            torch.cuda.synchronize()
        if self.state.step == args.warmup:
            recorder.start()
            clock[0] = -time.perf_counter()
        step(self, data)
        if self.state.step == args.max_steps:
            if on_gpu:
                torch.cuda.synchronize()
            clock[0] += time.perf_counter()
            recorder.stop()

    def named_update(*given: Any) -> Any:
        with torch.profiler.record_function(UPDATE):
            return update(*given)

    Trainer.train_step, EagerBackend.step = recorded, named_update  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        packs_per_step = write_rows(args, Path(name))
        words = ours(Contestant(OURS, args.precision[0], args.adapters[0]), args, Path(name), packs_per_step)
        if code := train(["train", *words]):
            sys.exit(code)
    shares, operations = Counter[str](), Counter[str]()
    for event in recorder.events() or ():
        if event.device_type == torch.autograd.DeviceType.CPU:  # a kernel's time is that of who started it
            spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
            operations[event.name] += spent
            shares[UPDATE if in_update(event) else kind_of(event.name)] += spent
    shares[BETWEEN] = clock[0] - shares.total()
    return {
        "steps": args.max_steps - args.warmup,
        "packs_per_step": packs_per_step,
        "seconds": clock[0],
        "kinds": {kind: spent / clock[0] for kind, spent in shares.most_common()},
        "longest": {operation: spent / clock[0] for operation, spent in operations.most_common(LONGEST)},
    }


def main() -> None:
    """Train, record, and write the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="esm2_t6_8M")
    parser.add_argument("--adapter", choices=("none", "lora"), default="lora")
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    own = parser.parse_args()
    words = ["--shape", own.shape, "--adapters", own.adapter, "--backend", own.backend, "--precision", own.precision]
    words += ["--rows", "64", "--max-steps", "6"]
    args = throughput.arguments(words)
    before = load()
    record = {"machine": machine(), "load_before": before, "settings": throughput.settings_of(args), **profile(args)}
    own.output.mkdir(parents=True, exist_ok=True)
    path = own.output / f"profile-{throughput.stem_of(args)}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, share in record["kinds"].items():
        print(f"{share:6.1%}  {name}")


if __name__ == "__main__":
    main()
