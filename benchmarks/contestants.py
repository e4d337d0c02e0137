"""The ways to train that throughput.py compares; each run of one is a process of its own."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from machine import load

from esm_neuron.models.shapes import SHAPES

HERE = Path(__file__).parent
OURS = "esm-neuron packed"
LOG_TAIL = 2000
"""Characters of a failed run's output that are kept."""
BF16_TFLOPS = {
    "A10G": 70, "A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "L40S": 362, "L40": 181,
    "L4": 121,
}  # fmt: skip
"""Part of a GPU's name -> its peak with float32 accumulation; the first match counts."""
MEASURED_FILE, SETUP_FILE = "measured.json", "setup.json"
"""What hf_trainer.py and timed_train.py measured."""
NEVER = 1_000_000
"""More steps than a run has: for what should not happen."""


@dataclass(frozen=True)
class Contestant:
    """One way to train."""

    name: str
    """`esm-neuron packed`, or `HF` and how its batches are padded."""
    precision: str
    """fp32 or bf16."""
    adapter: str = "lora"
    """none (everything is trained), lora or qlora."""
    again: bool = False
    """Whether blocks are recomputed in the backward pass (gradient checkpointing)."""
    compiled: bool = False
    """Ours: whether blocks go through torch.compile."""

    @property
    def label(self) -> str:
        """Return what distinguishes it from the others."""
        adapter = "full" if self.adapter == "none" else self.adapter
        more = [*["checkpointing"] * self.again, *["torch.compile"] * self.compiled]
        return " ".join([self.name, adapter, self.precision, *more])


def write_rows(args: argparse.Namespace, folder: Path) -> int:
    """Write the training proteins and a few validation proteins (ours asks for some); return our packs per step."""
    table = pd.read_csv(args.data, sep="\t", dtype=str)
    train = table[table["split"] == "train"].sample(args.rows, random_state=0)
    train.to_csv(folder / "train.tsv", sep="\t", index=False)
    valid = table[(table["split"] == "valid") & table["label"].isin(train["label"])]
    valid.groupby("label").head(4).to_csv(folder / "valid.tsv", sep="\t", index=False)
    tokens = train["sequence"].str.len().clip(upper=args.max_residues).mean() + 2
    return max(1, round(args.batch * tokens / (args.max_residues + 2)))


def command(who: Contestant, args: argparse.Namespace, folder: Path, packs_per_step: int) -> list[str]:
    """Return the command line of one contestant's process."""
    if who.name != OURS:
        options = {
            "data": folder / "train.tsv",
            "output": folder / MEASURED_FILE,
            "setting": who.name.removeprefix("HF "),
            "precision": who.precision,
            "backend": args.backend,
            "shape": args.shape,
            "batch": args.batch,
            "max-residues": args.max_residues,
            "lr": args.lr,
            "warmup": args.warmup,
            "max-steps": args.max_steps or -1,
            "threads": args.threads,
            "adapter": who.adapter,
        }
        switches = ["--gradient-checkpointing"] * who.again
        return [sys.executable, str(HERE / "hf_trainer.py"), *flags(options), *switches]
    words = ours(who, args, folder, packs_per_step)
    return [sys.executable, str(HERE / "timed_train.py"), str(folder / SETUP_FILE), *words]


def ours(who: Contestant, args: argparse.Namespace, folder: Path, packs_per_step: int) -> list[str]:
    """Return the flags of `esm-neuron train`."""
    return flags({
        "output": folder / "out",
        "backend": args.backend,
        "model.name": args.shape,
        "model.init": "random",
        "model.pooling": "cls",
        "model.gradient_checkpointing": str(who.again).lower(),
        "adapter.kind": who.adapter,
        "data.train": folder / "train.tsv",
        "data.valid": folder / "valid.tsv",
        "data.id_column": "entry",
        "data.max_residues": args.max_residues,
        "data.pack_tokens": args.max_residues + 2,
        "data.window_overlap": 0,  # nothing is windowed, and the default is longer than short caps
        "data.homologs": "off",
        "optim.lr": args.lr,
        "optim.schedule": "linear",
        "loop.epochs": 1,
        **({"loop.max_steps": args.max_steps} if args.max_steps else {}),
        "loop.packs_per_step": packs_per_step,
        "loop.packs_per_device": packs_per_step,
        "loop.eval_packs_per_device": packs_per_step,  # no more memory than training takes
        "loop.precision": who.precision,
        "loop.torch_compile": str(who.compiled).lower(),
        "loop.eval_every": NEVER,
        "checkpoint.every": NEVER,
        # A line at the end of the warm-up; without one, none, since a line makes an XLA device wait.
        "log.every": args.warmup or NEVER,
        "log.baselines": "false",
        "log.predictions": "false",
        "log.tensorboard": "false",
    })  # fmt: skip


def flags(options: dict[str, Any]) -> list[str]:
    """Return `--name value` of every option."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run(who: Contestant, args: argparse.Namespace, folder: Path, packs_per_step: int) -> dict[str, Any]:
    """Run one contestant once.

    Returns:
        residues_per_second, padding_efficiency, steps, graphs, peak_rss_mb (MiB), load_before, wall_seconds (of the
        whole process); or load_before and `error`, the end of what it printed.
    """
    before = {"load_before": load()}
    threads = str(args.threads)
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # or its pool of compilers starts beside the first steps, for nothing
    if args.backend == "xla":
        env["PJRT_DEVICE"] = "CPU"
    if args.backend == "cuda":  # of several GPUs Trainer would make one by DataParallel, and its batch larger
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    with tempfile.TemporaryDirectory(dir=folder) as own, open(Path(own) / "log", "w+") as log:
        own_folder = Path(own)
        for name in ("train.tsv", "valid.tsv"):
            (own_folder / name).symlink_to(folder / name)
        began = time.perf_counter()
        process = subprocess.Popen(
            command(who, args, own_folder, packs_per_step), stdout=log, stderr=subprocess.STDOUT, env=env
        )
        _, status, usage = os.wait4(process.pid, 0)  # the one call that has the peak memory of this child alone
        process.returncode = os.waitstatus_to_exitcode(status)
        before["wall_seconds"] = time.perf_counter() - began
        log.seek(0)
        text = log.read()
        if args.keep:
            keep(args.keep, who, own_folder)
        if process.returncode:
            return {**before, "error": f"exit code {process.returncode}: {text[-LOG_TAIL:]}"}
        if who.name == OURS:
            setup = json.loads((own_folder / SETUP_FILE).read_text())["setup_seconds"]
            metrics = read_ours(own_folder / "out", args.warmup, setup)
            metrics |= planned(ours(who, args, own_folder, packs_per_step), args.backend)
        else:
            metrics = json.loads((own_folder / MEASURED_FILE).read_text())
    if metrics["steps"] <= 0:
        return {**before, "error": f"no step is left after a warm-up of {args.warmup}; use more --rows"}
    return {**before, **metrics, **speeds(who, args, folder, metrics), "peak_rss_mb": usage.ru_maxrss / 1024}


def speeds(who: Contestant, args: argparse.Namespace, folder: Path, metrics: dict[str, Any]) -> dict[str, float]:
    """Return tokens_per_second (specials counted, padding not) and, if the device's peak is known, mfu from 0 to 1.

    Counted are the floating-point operations that the model needs per token: 2 per weight of the linears, and 4 per
    neighbour and channel in attention (PaLM, arXiv:2204.02311, appendix B). The linears count once forward, once for
    the inputs' gradients, and once more for the weights' gradients if they are trained. Attention, whose products have
    two inputs, counts three times. Recomputing a block is not counted.
    """
    lengths = pd.read_csv(folder / "train.tsv", sep="\t")["sequence"].str.len().clip(upper=args.max_residues)
    tokens = metrics["residues_per_second"] * (lengths.sum() + 2 * len(lengths)) / lengths.sum()
    peak = args.peak_tflops or (known_peak(who.precision) if args.backend == "cuda" else None)
    if peak is None:
        return {"tokens_per_second": tokens}
    shape = SHAPES[args.shape]
    linears = shape.layers * (4 * shape.hidden**2 + 2 * shape.hidden * shape.intermediate)
    neighbours = ((lengths + 2) ** 2).sum() / (lengths + 2).sum()
    passes = 3 if who.adapter == "none" else 2
    asked = passes * 2 * linears + 3 * 4 * shape.layers * shape.hidden * neighbours
    return {"tokens_per_second": tokens, "mfu": asked * tokens / (peak * 1e12)}


def known_peak(precision: str) -> float | None:
    """Return the peak of this GPU for dense matrix products, TFLOP/s (NVIDIA's data sheets); None if unknown."""
    import torch

    if not torch.cuda.is_available() or precision != "bf16":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for gpu, peak in BF16_TFLOPS.items() if gpu in name), None)


def keep(folder: Path, who: Contestant, run_folder: Path) -> None:
    """Copy what a run printed and wrote down, under a number of its own."""
    number = len(list(folder.glob("*"))) if folder.exists() else 0
    kept = folder / f"{number:03d}-{who.label.replace(' ', '-')}"
    kept.mkdir(parents=True)
    for file in (run_folder / "log", run_folder / MEASURED_FILE, *(run_folder / "out").glob("*.json*")):
        if file.exists():
            shutil.copy(file, kept)


def planned(words: list[str], backend: str) -> dict[str, float]:
    """Return what `esm-neuron plan` expects: on xla the graphs, the evaluation's included; on cuda the memory."""
    from esm_neuron.config import settings
    from esm_neuron.data.labels import Labels
    from esm_neuron.data.splits import load_splits
    from esm_neuron.planning.plan import make_plan

    if backend == "cpu":
        return {}
    cfg = settings.parse(words)
    plan = make_plan(cfg, load_splits(cfg, Labels))
    if backend == "xla":
        return {"graphs_planned": plan.graphs}
    return {"predicted_gpu_gb": plan.memory.total / 1e9} if plan.memory else {}


def read_ours(out: Path, warmup: int, setup_seconds: float) -> dict[str, Any]:
    """Return our numbers from result.json and metrics.jsonl.

    Without a warm-up, seconds count from the building of the model on. With one, they are those of the lines of
    metrics.jsonl after it. A line has the rate since the line before; rates are averaged over time, weighted by steps
    (packs of equal length).

    Returns:
        residues_per_second is NaN and steps is not above 0 if there was nothing after the warm-up. `graphs` are those
        up to the last step; `graphs_in_all` includes those of the evaluation after it.
    """
    train = json.loads((out / "result.json").read_text())["train"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    marks = [line for line in lines if "residues_per_second" in line]
    if warmup:
        timed = [(b["step"] - a["step"], b["residues_per_second"]) for a, b in zip(marks, marks[1:], strict=False)]
        rate = sum(n for n, _ in timed) / sum(n / rate for n, rate in timed) if timed else math.nan
    else:
        rate = train["residues"] / (setup_seconds + train["seconds"])
    peaks = [line["peak_memory_gb"] for line in lines if "peak_memory_gb" in line]
    return {
        **({"peak_gpu_gb": max(peaks)} if peaks else {}),
        "residues_per_second": rate,
        "padding_efficiency": train["padding_efficiency"],
        "steps": train["steps"] - warmup,
        "setup_seconds": setup_seconds,
        "graphs": marks[-1]["graphs"],
        "graphs_in_all": train["graphs"],
    }
