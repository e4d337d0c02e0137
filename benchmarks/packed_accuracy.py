"""Does packing change what is learnt? The demo's data, seeds and residues a step, packed and one protein a row.

Trains `--seeds` times each way and draws the validation curves of all runs on one plot against residues seen; prints
the paired difference at the end. Writes `results/packed-accuracy.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import throughput

mpl.use("Agg")
from matplotlib import pyplot as plt

CONFIG = throughput.HERE.parent / "configs" / "demo.yaml"
PACKED_ROWS, ROW_TOKENS, MAX_RESIDUES = 8, 1024, 254
"""Of the demo's step."""
WAYS = {"packed": "#c8553d", "unpacked": "#6b7f99"}
MEASURES = {"loss": "validation loss, nats", "mcc": "validation MCC"}


def train(way: str, seed: int, args: argparse.Namespace, proteins_per_row: float, folder: Path) -> list[dict[str, Any]]:
    """Step, residues seen and validation figures of one run."""
    options: dict[str, Any] = {
        "output": folder / f"{way}-{seed}", "seed": seed, "loop.max_steps": args.steps, "loop.eval_every": args.every,
        "checkpoint.every": throughput.NEVER, "log.every": args.every, "log.tensorboard": "false",
    }  # fmt: skip
    if way == "unpacked":
        rows = round(PACKED_ROWS * proteins_per_row)
        options |= {"data.packing": "false", "data.row_tokens": MAX_RESIDUES + 2}
        options |= {"loop.rows_per_step": rows, "loop.rows_per_device": rows, "loop.eval_rows_per_device": rows}
    words = [sys.executable, "-m", "esm_neuron.cli", "train", "--config", str(CONFIG), *throughput.flags(options)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out = Path(options["output"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())["train"]
    per_step = result["residues"] / result["steps"]
    return [
        {"step": line["step"], "residues": line["step"] * per_step, **{name: line[name] for name in MEASURES}}
        for line in lines
        if line.get("split") == "valid"
    ]


def plot(curves: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """A panel a measure, a thin line a seed, the mean of each way in bold."""
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(10, 3.6))
    for panel, (name, title) in zip(panels, MEASURES.items(), strict=True):
        for way, colour in WAYS.items():
            for curve in curves[way]:
                panel.plot([p["residues"] for p in curve], [p[name] for p in curve], color=colour, alpha=0.35, lw=0.9)
            mean = [statistics.mean(point[name] for point in points) for points in zip(*curves[way], strict=True)]
            panel.plot([p["residues"] for p in curves[way][0]], mean, color=colour, lw=2.2, label=way)
        panel.set_xlabel("training residues seen")
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
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="optimizer steps between validations")
    parser.add_argument("--output", type=Path, default=throughput.HERE / "results")
    args = parser.parse_args()
    curves: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        per_row = proteins_per_row()
        for seed in range(args.seeds):
            for way in WAYS:
                curves[way].append(train(way, seed, args, per_row, Path(folder)))
                print(f"{way}, seed {seed}: {curves[way][-1][-1]}", file=sys.stderr, flush=True)
    last = {way: [curve[-1] for curve in curves[way]] for way in WAYS}
    paired = {
        name: [packed[name] - alone[name] for packed, alone in zip(last["packed"], last["unpacked"], strict=True)]
        for name in MEASURES
    }
    for name, differences in paired.items():
        print(f"packed - unpacked, {name} at the end: {', '.join(f'{d:+.4f}' for d in differences)}")
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / "packed-accuracy"
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    stem.with_suffix(".json").write_text(json.dumps({"settings": settings, "curves": curves}, indent=1) + "\n")
    plot(curves, stem.with_suffix(".png"))
    print(f"written: {stem}.json, {stem}.png")


def proteins_per_row() -> float:
    """Proteins in a packed row, so that a step of either way holds as many residues."""
    from esm_neuron import settings
    from esm_neuron.data.splits import load_splits

    lengths = load_splits(settings.read_config(CONFIG), True).train.lengths
    return ROW_TOKENS / float(lengths.mean())


if __name__ == "__main__":
    main()
