"""Residues per second of esm-neuron against Hugging Face Trainer + PEFT: same rows, same machine, one run.

Every setting runs in a process of its own, in turn, `--repeats` times; the table has medians. Writes a JSON file with
every run and the machine, and a plot, under `benchmarks/results/`. See README.md here for what is held equal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from esm_neuron.shapes import SHAPES

HERE = Path(__file__).parent
OURS = "esm-neuron packed"
SETTINGS = ("ours", "padded", "dynamic", "group_by_length")
VERSIONS = ("torch", "torch_xla", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")
LOG_TAIL = 2000
"""Characters of a failed run's output that are shown."""
FIGURES = (
    "residues_per_second", "tokens_per_second", "mfu", "padding_efficiency", "graphs", "peak_gpu_gb", "peak_rss_mb",
)  # fmt: skip
BF16_TFLOPS = {"A10G": 70, "A100": 312, "H100": 989, "H200": 989, "L40S": 362, "L4": 121}
"""Part of a GPU's name -> its peak with float32 sums."""
FIGURES_FILE = "figures.json"
"""What hf_trainer.py measured."""
NEVER = 1_000_000
"""Steps between things that are not to happen."""


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
    """Whether blocks are computed again in the backward pass (gradient checkpointing)."""

    @property
    def label(self) -> str:
        """All that tells it from others."""
        adapter = "full" if self.adapter == "none" else self.adapter
        return f"{self.name} {adapter} {self.precision}{' checkpointing' if self.again else ''}"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent / "examples/demo/localization.tsv.gz")
    parser.add_argument("--rows", type=int, default=192, help="training proteins, sampled with a fixed seed")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each setting; the table has medians")
    parser.add_argument("--peer-repeats", type=int, help="runs of each HF setting, where these are slow; default: all")
    parser.add_argument("--shape", default="esm2_t6_8M", help="ESM-2 shape, with random weights")
    parser.add_argument(
        "--backend", choices=("cpu", "xla", "cuda"), default="cpu", help="xla is XLA:CPU, compilation included"
    )
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--adapters", nargs="+", choices=("none", "lora", "qlora"), default=["lora"])
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off"], help="of gradients")
    parser.add_argument("--peak-tflops", type=float, help="of the device in this precision; default: by a GPU's name")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, help="which to run")
    parser.add_argument(
        "--batch", type=int, default=8, help="proteins in an optimizer step (ours: as near as rows allow)"
    )
    parser.add_argument("--max-residues", type=int, default=1022, help="longer proteins are cut here")
    parser.add_argument("--warmup", type=int, help="optimizer steps that are not timed; default 2, on xla 0")
    parser.add_argument("--max-steps", type=int, help="stop every run after these optimizer steps")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    if args.warmup is None:
        args.warmup = 0 if args.backend == "xla" else 2
    return args


def write_rows(args: argparse.Namespace, folder: Path) -> int:
    """Write the training rows and a few validation rows (ours asks for some); returns our rows in a step."""
    table = pd.read_csv(args.data, sep="\t", dtype=str)
    train = table[table["split"] == "train"].sample(args.rows, random_state=0)
    train.to_csv(folder / "train.tsv", sep="\t", index=False)
    table[table["split"] == "valid"].groupby("label").head(4).to_csv(folder / "valid.tsv", sep="\t", index=False)
    tokens = train["sequence"].str.len().clip(upper=args.max_residues).mean() + 2
    return max(1, round(args.batch * tokens / (args.max_residues + 2)))


def command(who: Contestant, args: argparse.Namespace, folder: Path, rows_per_step: int) -> list[str]:
    """The process of one contestant."""
    if who.name != OURS:
        options = {
            "data": folder / "train.tsv",
            "figures": folder / FIGURES_FILE,
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
    options = {
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
        "data.row_tokens": args.max_residues + 2,
        "optim.lr": args.lr,
        "optim.schedule": "linear",
        "loop.epochs": 1,
        **({"loop.max_steps": args.max_steps} if args.max_steps else {}),
        "loop.rows_per_step": rows_per_step,
        "loop.rows_per_device": rows_per_step,
        "loop.precision": who.precision,
        "loop.eval_every": NEVER,
        "checkpoint.every": NEVER,
        # A line at the end of the warm-up; without one, none, since a line makes an XLA device wait.
        "log.every": args.warmup or NEVER,
        "log.tensorboard": "false",
    }
    return [sys.executable, "-m", "esm_neuron.cli", "train", *flags(options)]


def flags(options: dict[str, Any]) -> list[str]:
    """`--name value` of every option."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run(who: Contestant, args: argparse.Namespace, folder: Path, rows_per_step: int) -> dict[str, Any]:
    """Run one contestant once.

    Returns:
        residues_per_second, padding_efficiency, steps, peak_rss_mb; or `error`, the end of what it printed.
    """
    threads = str(args.threads)
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if args.backend == "xla":
        env["PJRT_DEVICE"] = "CPU"
    with tempfile.TemporaryDirectory(dir=folder) as own, open(Path(own) / "log", "w+") as log:
        own_folder = Path(own)
        for name in ("train.tsv", "valid.tsv"):
            (own_folder / name).symlink_to(folder / name)
        process = subprocess.Popen(
            command(who, args, own_folder, rows_per_step), stdout=log, stderr=subprocess.STDOUT, env=env
        )
        _, status, usage = os.wait4(process.pid, 0)  # the one call that has the peak memory of this child alone
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
        if process.returncode:
            return {"error": f"exit code {process.returncode}: {text[-LOG_TAIL:]}"}
        if who.name == OURS:
            figures = read_ours(own_folder / "out", args.warmup)
        else:
            figures = json.loads((own_folder / FIGURES_FILE).read_text())
    return {**figures, **speeds(who, args, folder, figures), "peak_rss_mb": usage.ru_maxrss / 1024}


def speeds(who: Contestant, args: argparse.Namespace, folder: Path, figures: dict[str, Any]) -> dict[str, float]:
    """tokens_per_second (specials counted, padding not) and, where the device's peak is known, mfu from 0 to 1.

    Floating-point operations that the model asks for, a token: 2 a weight of the linears and 4 a neighbour and channel
    in attention (PaLM, arXiv:2204.02311, appendix B), once forward and once for the inputs' gradients, and once more
    for the weights' where they are trained. Computing a block again is not counted.
    """
    lengths = pd.read_csv(folder / "train.tsv", sep="\t")["sequence"].str.len().clip(upper=args.max_residues)
    tokens = figures["residues_per_second"] * (lengths.sum() + 2 * len(lengths)) / lengths.sum()
    if args.peak_tflops is None:
        return {"tokens_per_second": tokens}
    shape = SHAPES[args.shape]
    linears = shape.layers * (4 * shape.hidden**2 + 2 * shape.hidden * shape.intermediate)
    neighbours = ((lengths + 2) ** 2).sum() / (lengths + 2).sum()
    passes = 3 if who.adapter == "none" else 2
    asked = passes * (2 * linears + 4 * shape.layers * shape.hidden * neighbours)
    return {"tokens_per_second": tokens, "mfu": asked * tokens / (args.peak_tflops * 1e12)}


def known_peak(precision: str) -> float | None:
    """Dense matrix products of this machine's GPU, TFLOP/s (NVIDIA's data sheets); None where it is not known."""
    import torch

    if not torch.cuda.is_available() or precision != "bf16":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for gpu, peak in BF16_TFLOPS.items() if gpu in name), None)


def read_ours(out: Path, warmup: int) -> dict[str, Any]:
    """Our figures from result.json and, to leave the warm-up out, from the lines of metrics.jsonl after it.

    A line has the rate since the line before; rates are averaged over time, with steps (packs of equal length) for
    residues.
    """
    train = json.loads((out / "result.json").read_text())["train"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    marks = [(line["step"], line["residues_per_second"]) for line in lines if "residues_per_second" in line]
    rate = train["residues_per_second"]
    if warmup:
        steps = [step - before for (before, _), (step, _) in zip(marks, marks[1:], strict=False)]
        rate = sum(steps) / sum(n / rate for n, (_, rate) in zip(steps, marks[1:], strict=True))
    peaks = [line["peak_memory_gb"] for line in lines if "peak_memory_gb" in line]
    return {
        **({"peak_gpu_gb": max(peaks)} if peaks else {}),
        "residues_per_second": rate,
        "padding_efficiency": train["padding_efficiency"],
        "steps": train["steps"] - warmup,
        "graphs": train["graphs"],
    }


def summary(contestants: Iterable[Contestant], runs: dict[Contestant, list[dict[str, Any]]]) -> pd.DataFrame:
    """One row a contestant: medians over its runs, the ratio to the fastest HF setting, and how much of ours over it is
    padding: the ratio of the padding efficiencies, which is what packing alone could give."""
    rows = []
    for who in contestants:
        done = [r for r in runs[who] if "error" not in r]
        row: dict[str, Any] = {"setting": who.name, "label": who.label, "precision": who.precision, "runs": len(done)}
        for name in FIGURES:
            values = [r[name] for r in done if name in r]
            row[name] = statistics.median(values) if values else float("nan")
        row["low"] = min((r["residues_per_second"] for r in done), default=float("nan"))
        row["high"] = max((r["residues_per_second"] for r in done), default=float("nan"))
        rows.append(row)
    table = pd.DataFrame(rows)
    fastest = table.loc[table["setting"] != OURS, "residues_per_second"].max()
    table["to_fastest_hf"] = table["residues_per_second"] / fastest
    ours = table.loc[table["setting"] == OURS, "padding_efficiency"].max()
    table["padding_alone"] = ours / table["padding_efficiency"]
    return table.dropna(axis=1, how="all")


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, memory, versions."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions: dict[str, str | None] = {}
    for package in VERSIONS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
    }


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The command's options, the data by its name alone."""
    return {**{k: v for k, v in vars(args).items() if k not in ("data", "output")}, "data": args.data.name}


def write_record(
    path: Path, described: dict[str, Any], settings: dict[str, Any], table: pd.DataFrame,
    runs: dict[Contestant, list[dict[str, Any]]],
) -> None:  # fmt: skip
    """Every run so far and its summary, as JSON."""
    record = {
        "machine": described,
        "settings": settings,
        "summary": json.loads(table.to_json(orient="records")),
        "runs": [{**asdict(who), **figures} for who, done in runs.items() for figures in done],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def plot(table: pd.DataFrame, title: str, path: Path) -> None:
    """Bars of residues per second and of padding efficiency, fastest HF setting marked."""
    labels = table["label"].tolist()
    colours = ["#c8553d" if setting == OURS else "#6b7f99" for setting in table["setting"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.5 * len(labels) + 1.4), sharey=True)
    rate = table["residues_per_second"]
    spread = [rate - table["low"], table["high"] - rate]
    bars = left.barh(labels, rate, xerr=spread, color=colours, ecolor="#333333", capsize=3)
    left.axvline(rate[table["setting"] != OURS].max(), color="#333333", linewidth=0.8, linestyle="--", zorder=0)
    left.bar_label(bars, [f"{value:,.0f}" for value in rate], padding=6, bbox={"color": "white", "pad": 1})
    left.xaxis.set_major_locator(MaxNLocator(5))
    left.set_xlabel("residues per second (median, range)")
    left.set_xlim(0, table["high"].max() * 1.25)
    bars = right.barh(labels, table["padding_efficiency"], color=colours)
    right.bar_label(bars, [f"{value:.0%}" for value in table["padding_efficiency"]], padding=4)
    right.set_xlabel("share of the slots that hold tokens")
    right.set_xlim(0, 1.15)
    right.set_xticks([0, 0.5, 1])
    left.invert_yaxis()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    """Run everything; exit code 1 where a setting failed."""
    args = arguments()
    names = [OURS if name == "ours" else f"HF {name}" for name in args.settings]
    if args.backend == "cuda" and args.peak_tflops is None:
        args.peak_tflops = known_peak(args.precision[0])
    ways = product(args.precision, args.adapters, args.checkpointing, names)
    contestants = [Contestant(name, precision, adapter, again == "on") for precision, adapter, again, name in ways]
    runs: dict[Contestant, list[dict[str, Any]]] = {who: [] for who in contestants}
    described = machine()
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"{args.backend}-{args.shape}"
    with tempfile.TemporaryDirectory() as folder:
        rows_per_step = write_rows(args, Path(folder))
        for repeat in range(args.repeats):
            for who in contestants[repeat % len(contestants) :] + contestants[: repeat % len(contestants)]:
                if who.name != OURS and repeat >= (args.peer_repeats or args.repeats):
                    continue
                figures = run(who, args, Path(folder), rows_per_step)
                runs[who].append(figures)
                shown = figures.get("error") or f"{figures['residues_per_second']:.0f} residues/s"
                print(f"{who.label}, run {repeat + 1} of {args.repeats}: {shown}", file=sys.stderr, flush=True)
                table = summary(contestants, runs)
                settings = {**settings_of(args), "ours_rows_per_step": rows_per_step}
                # now, so that an interruption loses one run
                write_record(stem.with_suffix(".json"), described, settings, table, runs)
    print(table.round(3).to_string(index=False))
    title = f"Fine-tuning, {args.shape} on {args.backend}, {args.threads} threads, {args.rows} proteins"
    plot(table, title, stem.with_suffix(".png"))
    print(f"written: {stem}.json, {stem}.png")
    return int(any("error" in figures for who in contestants for figures in runs[who]))


if __name__ == "__main__":
    sys.exit(main())
