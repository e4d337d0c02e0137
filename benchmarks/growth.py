"""How residues per second change with the data size and with the sequence length: ours and HF Trainer's best, in turn.

Every point is one process of `throughput.py`; who comes first alternates from point to point and from repeat to
repeat. Writes `results/growth-BACKEND-SHAPE.json` after every point, and a plot at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import throughput
from contestants import HERE, OURS, Contestant, flags, run, write_rows
from machine import machine

mpl.use("Agg")
from matplotlib import pyplot as plt

CONTESTANTS = (Contestant(OURS, "fp32"), Contestant("HF group_by_length", "fp32"))
COLOURS = {OURS: "#c8553d", "HF group_by_length": "#6b7f99"}
AXES = {"rows": "training proteins", "max-residues": "longest protein, residues"}


def measure(who: Contestant, axis: str, value: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one contestant at one value of `--axis`."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = run(who, args, Path(folder), write_rows(args, Path(folder)))
    shown = metrics.get("error") or f"{metrics['residues_per_second']:.0f} residues/s"
    print(f"{axis}={value}, {who.name}: {shown}", file=sys.stderr, flush=True)
    return {"axis": axis, "value": value, "setting": who.name, **metrics}


def plot(points: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw one panel per axis, and per contestant a line of medians with its range."""
    figure, panels = plt.subplots(1, len(AXES), figsize=(5 * len(AXES), 3.4), sharey=True)
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        for who in CONTESTANTS:
            rates: dict[int, list[float]] = {}
            for point in points:
                if (point["axis"], point["setting"]) == (axis, who.name) and "error" not in point:
                    rates.setdefault(point["value"], []).append(point["residues_per_second"])
            medians = [statistics.median(seen) for seen in rates.values()]
            colour = COLOURS[who.name]
            panel.plot(list(rates), medians, marker="o", color=colour, label=who.name)
            panel.vlines(list(rates), [min(r) for r in rates.values()], [max(r) for r in rates.values()], color=colour)
        panel.set_xlabel(label)
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(rates), [f"{value:,}" for value in rates])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)  # of both, which share it; sooner it would leave out what is drawn later
    panels[0].set_ylabel("residues per second (median, range)")
    panels[0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def point_of(args: argparse.Namespace, rows: int, max_residues: int) -> argparse.Namespace:
    """Return the options for `throughput.py`: one pass over the proteins, or `--max-steps` if that is less."""
    options = {
        "backend": args.backend, "shape": args.shape, "precision": "fp32", "threads": args.threads, "rows": rows,
        "max-residues": max_residues,
    }  # fmt: skip
    asked = throughput.arguments(flags(options))
    fewer = {"max-steps": args.max_steps} if math.ceil(rows / asked.batch) > args.max_steps else {}
    return throughput.arguments(flags(options | fewer))


def main() -> int:
    """Measure every point and write them; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cpu", "xla"), default="cpu", help="xla is XLA:CPU, compilation included")
    parser.add_argument("--shape", default="esm2_t6_8M")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 192, 512, 1600], help="data sizes, in proteins")
    parser.add_argument("--max-residues", type=int, nargs="+", default=[126, 254, 510, 1022], help="lengths")
    parser.add_argument("--fixed-rows", type=int, default=192, help="proteins while lengths grow")
    parser.add_argument("--fixed-length", type=int, default=510, help="longest protein while the data grow")
    parser.add_argument("--max-steps", type=int, default=52, help="most optimizer steps of a point, warm-up included")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    sizes = [("rows", rows, rows, args.fixed_length) for rows in args.rows]
    lengths = [("max-residues", longest, args.fixed_rows, longest) for longest in args.max_residues]
    wanted = [(axis, value, point_of(args, rows, longest)) for axis, value, rows, longest in [*sizes, *lengths]]
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"growth-{args.backend}-{args.shape}"
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    described, points = machine(), list[dict[str, Any]]()
    for repeat in range(args.repeats):
        for number, (axis, value, asked) in enumerate(wanted):
            for who in CONTESTANTS[:: 1 if (repeat + number) % 2 == 0 else -1]:
                points.append(measure(who, axis, value, asked))
                record = {"machine": described, "settings": settings, "points": points}
                stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(points, f"LoRA fine-tuning, {args.shape} on {args.backend}, fp32", stem.with_suffix(".png"))
    print(f"written: {stem}.json, {stem}.png")
    return int(any("error" in point for point in points))


if __name__ == "__main__":
    sys.exit(main())
