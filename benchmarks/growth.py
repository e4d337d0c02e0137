"""How residues per second grow with data size and with sequence length: ours and HF Trainer's best, in turn, one run.

Every point is one process of `throughput.py`'s; the points of a curve alternate between the contestants. Writes
`results/growth-BACKEND.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import throughput

mpl.use("Agg")
from matplotlib import pyplot as plt

CONTESTANTS = (throughput.Contestant(throughput.OURS, "fp32"), throughput.Contestant("HF group_by_length", "fp32"))
COLOURS = {throughput.OURS: "#c8553d", "HF group_by_length": "#6b7f99"}


def measure(axis: str, value: int, base: list[str]) -> list[dict[str, Any]]:
    """Both contestants at one value of `--axis`."""
    args = throughput.arguments([*base, f"--{axis}", str(value)])
    points = []
    with tempfile.TemporaryDirectory() as folder:
        rows_per_step = throughput.write_rows(args, Path(folder))
        for who in CONTESTANTS:
            figures = throughput.run(who, args, Path(folder), rows_per_step)
            if "error" in figures:
                sys.exit(f"{who.label}, {axis}={value}: {figures['error']}")
            points.append({"axis": axis, "value": value, "setting": who.name, **figures})
            print(f"{axis}={value}, {who.name}: {figures['residues_per_second']:.0f} residues/s", file=sys.stderr)
    return points


def plot(points: list[dict[str, Any]], title: str, path: Path) -> None:
    """A panel an axis, a line a contestant."""
    axes = list(dict.fromkeys(point["axis"] for point in points))
    figure, panels = plt.subplots(1, len(axes), figsize=(5 * len(axes), 3.4), sharey=True, squeeze=False)
    for panel, axis in zip(panels[0], axes, strict=True):
        for who in CONTESTANTS:
            mine = [point for point in points if (point["axis"], point["setting"]) == (axis, who.name)]
            values, rates = [p["value"] for p in mine], [p["residues_per_second"] for p in mine]
            panel.plot(values, rates, marker="o", color=COLOURS[who.name], label=who.name)
        panel.set_xlabel({"rows": "training proteins", "max-residues": "longest protein, residues"}[axis])
        panel.set_ylim(bottom=0)
        panel.set_xscale("log", base=2)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("residues per second")
    panels[0][0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Measure every point and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cpu", "xla"), default="cpu", help="xla is XLA:CPU, compilation included")
    parser.add_argument("--shape", default="esm2_t6_8M")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 128], help="data sizes, in proteins")
    parser.add_argument("--max-residues", type=int, nargs="+", default=[126, 254, 510, 1022], help="lengths")
    parser.add_argument("--fixed-rows", type=int, default=48, help="proteins while lengths grow")
    parser.add_argument("--fixed-length", type=int, default=510, help="longest protein while the data grow")
    parser.add_argument("--output", type=Path, default=throughput.HERE / "results")
    args = parser.parse_args()
    base = ["--backend", args.backend, "--shape", args.shape, "--precision", "fp32"]
    by_size = [*base, "--max-residues", str(args.fixed_length)]
    points = [point for rows in args.rows for point in measure("rows", rows, by_size)]
    by_length = [*base, "--rows", str(args.fixed_rows)]
    points += [point for length in args.max_residues for point in measure("max-residues", length, by_length)]
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"growth-{args.backend}"
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    record = {"machine": throughput.machine(), "settings": settings, "points": points}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(points, f"LoRA fine-tuning, {args.shape} on {args.backend}, fp32", stem.with_suffix(".png"))
    print(f"written: {stem}.json, {stem}.png")


if __name__ == "__main__":
    main()
