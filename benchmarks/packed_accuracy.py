"""Does packing change what is learnt? The demo's data, packed, and with one protein per pack.

Trains `--seeds` times each way and draws the validation curves of all runs on one plot against residues seen; prints
the paired difference at the end. Writes `results/packed-accuracy.json` after every run, and `.png` at the end; the runs
and their logs are kept in `--folder`. It takes about 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from contestants import HERE, LOG_TAIL, NEVER, flags
from machine import ROOT, load, machine

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

CONFIG = ROOT / "configs" / "demo.yaml"
WAYS = {"packed": "#c8553d", "unpacked": "#6b7f99"}
MEASURES = {"loss": "validation loss, nats", "mcc": "validation MCC"}


def settings_of(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a way: as many proteins per step, in packs of its own kind."""
    rows = args.packs_per_step
    own: dict[str, Any] = {}
    if way == "unpacked":
        longest, rows = of_demo(args)
        own = {"data.packing": "false", "data.pack_tokens": longest}
    return {
        **own,
        **({"model.name": args.shape, "model.init": "random"} if args.shape else {}),
        "loop.packs_per_step": rows,
        "loop.packs_per_device": rows,
        "loop.eval_packs_per_device": rows,
        "loop.max_steps": args.steps,
        "loop.eval_every": args.every,
        "data.homologs": "off",
        "checkpoint.every": NEVER,
        "log.every": args.every,
        "log.baselines": "false",
        "log.predictions": "false",
        "log.tensorboard": "false",
    }


def of_demo(args: argparse.Namespace) -> tuple[int, int]:
    """Return the tokens of the demo's longest protein, and how many proteins `--rows-per-step` packs hold."""
    from esm_neuron.config import settings
    from esm_neuron.data.labels import Labels
    from esm_neuron.data.packing import plan_epoch
    from esm_neuron.data.splits import load_splits

    cfg = settings.read_config(CONFIG)
    data = replace(cfg.data, train=str(ROOT / str(cfg.data.train)))
    lengths = load_splits(replace(cfg, data=data), Labels).train.lengths
    rng = np.random.default_rng(0)
    plan = plan_epoch(lengths, cfg.data.pack_tokens, cfg.data.max_segments, args.packs_per_step, rng)
    return cfg.data.max_residues + 2, round(len(lengths) / len(plan))


def train(options: dict[str, Any], threads: int) -> dict[str, Any]:
    """Train once; return the load before it, its seconds, and its curve: step, residues seen, validation metrics."""
    out = Path(options["output"])
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_suffix(".log")
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    words = [sys.executable, "-m", "esm_neuron.cli", "train", "--config", str(CONFIG), *flags(options)]
    before, began = load(), time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run(words, check=False, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{out.name}: exit code {done.returncode}, {log}: {log.read_text()[-LOG_TAIL:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())["train"]
    per_step = result["residues"] / result["steps"]
    curve = [
        {"step": line["step"], "residues": line["step"] * per_step, **{name: line[name] for name in MEASURES}}
        for line in lines
        if line.get("split") == "valid"
    ]
    return {"load_before": before, "wall_seconds": time.perf_counter() - began, "curve": curve}


def plot(curves: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Draw one panel per metric, a thin line per seed, and the mean of each way in bold."""
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(10, 3.6))
    for panel, (name, title) in zip(panels, MEASURES.items(), strict=True):
        for way, colour in WAYS.items():
            for curve in curves[way]:
                panel.plot([p["residues"] for p in curve], [p[name] for p in curve], color=colour, alpha=0.35, lw=0.9)
            mean = [statistics.mean(point[name] for point in points) for points in zip(*curves[way], strict=True)]
            panel.plot([p["residues"] for p in curves[way][0]], mean, color=colour, lw=2.2, label=way)
        panel.set_xlabel("training residues seen")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panel.set_ylabel(title)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Train both ways, in turn, and write the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=40, help="optimizer steps between validations")
    parser.add_argument("--rows-per-step", type=int, default=2, help="packed; unpacked, one for each of their proteins")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", help="a shape with random weights instead of the demo's checkpoint, for a trial")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "packed-accuracy", help="runs and their logs")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / "packed-accuracy"
    asked = {name: value for name, value in vars(args).items() if name not in ("folder", "output")}
    ways = {way: settings_of(way, args) for way in WAYS}
    described = {"machine": machine(), "settings": asked, "ways": ways}
    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for way in list(WAYS)[:: 1 if seed % 2 == 0 else -1]:
            options = {"output": args.folder.resolve() / f"{way}-{seed}", "seed": seed, **ways[way]}
            runs.append({"way": way, "seed": seed, **train(options, args.threads)})
            print(f"{way}, seed {seed}: {runs[-1]['curve'][-1]}", file=sys.stderr, flush=True)
            stem.with_suffix(".json").write_text(json.dumps({**described, "runs": runs}, indent=1) + "\n")
    runs.sort(key=lambda run: run["seed"])
    curves = {way: [run["curve"] for run in runs if run["way"] == way] for way in WAYS}
    for name in MEASURES:
        pairs = zip(curves["packed"], curves["unpacked"], strict=True)
        differences = ", ".join(f"{packed[-1][name] - alone[-1][name]:+.4f}" for packed, alone in pairs)
        print(f"packed - unpacked, {name} at the end: {differences}")
    plot(curves, stem.with_suffix(".png"))
    print(f"written: {stem}.json, {stem}.png")


if __name__ == "__main__":
    main()
