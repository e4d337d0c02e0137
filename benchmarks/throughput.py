"""Measure residues per second of esm-neuron and of Hugging Face Trainer + PEFT: same proteins, same machine, one run.

Every setting runs in a process of its own, in turn, `--repeats` times; the table has medians. Writes a JSON file with
every run and the machine, and a plot, under `benchmarks/results/`. See README.md here for what is held equal.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from contestants import HERE, OURS, Contestant, run, write_rows
from machine import machine

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from esm_neuron.backends.cpu import has_bf16_units
from esm_neuron.data.cache import content_key

SETTINGS = ("ours", "padded", "dynamic", "group_by_length")
MEASURES = (
    "residues_per_second", "tokens_per_second", "mfu", "padding_efficiency", "graphs", "graphs_in_all",
    "graphs_planned", "peak_gpu_gb", "predicted_gpu_gb", "peak_rss_mb",
)  # fmt: skip
TRIAL_RESIDUES = 254
"""Longest protein of the trial steps that show whether bf16 is worth the time."""
TOO_SLOW = 4
"""Times as long as in fp32."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
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
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off"], help="ours, by torch.compile")
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
    parser.add_argument("--keep", type=Path, help="copy what each run printed and its metrics.jsonl to this folder")
    args = parser.parse_args(argv)
    if args.warmup is None:
        args.warmup = 0 if args.backend == "xla" else 2
    steps = min(args.max_steps or math.inf, math.ceil(args.rows / args.batch))
    if steps <= args.warmup:
        parser.error(
            f"--max-steps {args.max_steps} and --rows {args.rows} by --batch {args.batch} make {steps} optimizer "
            f"steps, no more than --warmup {args.warmup}: none would be timed"
        )
    return args


def stem_of(args: argparse.Namespace) -> str:
    """Return the files' name: every option that is not the default, so that no measurement overwrites another."""
    parts = [args.backend, args.shape, "+".join(args.precision), "+".join(args.adapters)]
    for option, name in ((args.checkpointing, "checkpointing"), (args.compile, "compiled")):
        if "on" in option:
            parts.append(name if option == ["on"] else f"{name}_off_on")
    parts.append(f"{args.rows}rows")
    usual = arguments(["--backend", args.backend])
    for name in (
        "max_steps", "repeats", "peer_repeats", "batch", "max_residues", "warmup", "threads", "lr", "peak_tflops"
    ):  # fmt: skip
        value = getattr(args, name)
        if value != getattr(usual, name):
            parts.append(f"{value:g}{name.removeprefix('max_').replace('_', '')}")
    if set(args.settings) != set(SETTINGS):
        parts.append("+".join(args.settings))
    if args.data != usual.data:
        parts.append(f"{args.data.name.split('.')[0]}_{content_key([str(args.data.resolve())])[:8]}")
    return "-".join(parts)


def too_slow(who: Contestant, args: argparse.Namespace, folder: Path) -> str | None:
    """Return why bf16 is not measured: a CPU without bf16 units emulates it, and a step of one pack takes too long.

    Both precisions make two steps of one short protein (or pack of them); the second is timed. A failure here keeps
    nothing from being measured, where it will say why.
    """
    if args.backend != "cpu" or who.precision != "bf16" or has_bf16_units() is not False:
        return None
    short = {"batch": 1, "warmup": 1, "max_steps": 2, "max_residues": min(args.max_residues, TRIAL_RESIDUES)}
    trial = argparse.Namespace(**{**vars(args), **short})
    fast, slow = (run(replace(who, precision=precision), trial, folder, 1) for precision in ("fp32", "bf16"))
    if "error" in fast or "error" in slow:
        return None
    times = fast["residues_per_second"] / slow["residues_per_second"]
    if times <= TOO_SLOW:
        return None
    return f"no bf16 units, and a step takes {times:.1f} times as long as in fp32 (limit {TOO_SLOW})"


def summary(contestants: Iterable[Contestant], runs: dict[Contestant, list[dict[str, Any]]]) -> pd.DataFrame:
    """Return one line per contestant: medians over its runs, the ratio to the fastest HF setting with the same adapter
    and checkpointing in any precision, and the ratio of padding efficiencies, what packing alone could give."""
    rows = []
    for who in contestants:
        done = [r for r in runs[who] if "error" not in r]
        row: dict[str, Any] = {"setting": who.name, "label": who.label, "precision": who.precision}
        row |= {"adapter": who.adapter, "checkpointing": who.again, "runs": len(done)}
        for name in MEASURES:
            values = [r[name] for r in done if name in r]
            row[name] = statistics.median(values) if values else float("nan")
        row["low"] = min((r["residues_per_second"] for r in done), default=float("nan"))
        row["high"] = max((r["residues_per_second"] for r in done), default=float("nan"))
        rows.append(row)
    table = pd.DataFrame(rows)
    peers = table["residues_per_second"].where(table["setting"] != OURS)
    table["to_fastest_hf"] = table["residues_per_second"] / peers.groupby(
        [table["adapter"], table["checkpointing"]]
    ).transform("max")
    ours = table.loc[table["setting"] == OURS, "padding_efficiency"].max()
    table["padding_alone"] = ours / table["padding_efficiency"]
    return table.dropna(axis=1, how="all")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the command's options, with the data by its name alone."""
    return {**{k: v for k, v in vars(args).items() if k not in ("data", "output", "keep")}, "data": args.data.name}


def write_record(
    path: Path, described: dict[str, Any], settings: dict[str, Any], skipped: dict[Contestant, str],
    table: pd.DataFrame, runs: dict[Contestant, list[dict[str, Any]]],
) -> None:  # fmt: skip
    """Write every run so far, and the summary, as JSON."""
    record = {
        "machine": described,
        "settings": settings,
        "skipped": [{**asdict(who), "why": why} for who, why in skipped.items()],
        "summary": json.loads(table.to_json(orient="records")),
        "runs": [{**asdict(who), **metrics} for who, done in runs.items() for metrics in done],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def plot(table: pd.DataFrame, title: str, path: Path) -> None:
    """Draw residues per second and padding efficiency; the fastest HF setting of one kind of run is marked."""
    labels = table["label"].tolist()
    colours = ["#c8553d" if setting == OURS else "#6b7f99" for setting in table["setting"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.5 * len(labels) + 1.4), sharey=True)
    rate = table["residues_per_second"]
    spread = [rate - table["low"], table["high"] - rate]
    bars = left.barh(labels, rate, xerr=spread, color=colours, ecolor="#333333", capsize=3)
    if len(table[["adapter", "checkpointing"]].drop_duplicates()) == 1:
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


def main(words: list[str] | None = None) -> int:
    """Run everything that `words`, by default the command line, ask for; exit code 1 if a setting failed."""
    args = arguments(words)
    names = [OURS if name == "ours" else f"HF {name}" for name in args.settings]
    ways = product(args.precision, args.adapters, args.checkpointing, names, args.compile)
    contestants = [
        Contestant(name, precision, adapter, again == "on", compiled == "on")
        for precision, adapter, again, name, compiled in ways
        if name == OURS or compiled == "off"
    ]
    described = machine()
    args.output.mkdir(parents=True, exist_ok=True)
    record = args.output / f"{stem_of(args)}.json"
    with tempfile.TemporaryDirectory() as folder:
        packs_per_step = write_rows(args, Path(folder))
        settings = {**settings_of(args), "ours_rows_per_step": packs_per_step}
        skipped = {who: why for who in contestants if (why := too_slow(who, args, Path(folder)))}
        for who, why in skipped.items():
            print(f"{who.label} is left out: {why}", file=sys.stderr, flush=True)
        contestants = [who for who in contestants if who not in skipped]
        if not contestants:
            sys.exit("nothing is left to run")
        runs: dict[Contestant, list[dict[str, Any]]] = {who: [] for who in contestants}
        for repeat in range(args.repeats):
            for who in contestants[repeat % len(contestants) :] + contestants[: repeat % len(contestants)]:
                if who.name != OURS and repeat >= (args.peer_repeats or args.repeats):
                    continue
                metrics = run(who, args, Path(folder), packs_per_step)
                runs[who].append(metrics)
                shown = metrics.get("error") or f"{metrics['residues_per_second']:.0f} residues/s"
                print(f"{who.label}, run {repeat + 1} of {args.repeats}: {shown}", file=sys.stderr, flush=True)
                table = summary(contestants, runs)
                # now, so that an interruption loses one run
                write_record(record, described, settings, skipped, table, runs)
    if "residues_per_second" not in table:
        sys.exit(f"no run came to its end; {record} says why")
    print(table.round(3).to_string(index=False))
    title = f"Fine-tuning, {args.shape} on {args.backend}, {args.threads} threads, {args.rows} proteins"
    plot(table, title, record.with_suffix(".png"))
    print(f"written: {record}, {record.with_suffix('.png')}")
    return int(any("error" in metrics for who in contestants for metrics in runs[who]))


if __name__ == "__main__":
    sys.exit(main())
