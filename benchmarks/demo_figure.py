"""Draw the README's picture: the demo's learning curve, and its test metrics beside the baselines on the same proteins.

Run `make demo` first, then `python benchmarks/demo_figure.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
METRICS = {"accuracy": "accuracy", "mcc": "MCC", "auroc": "AUROC"}


def draw(run: Path, target: Path) -> None:
    """Write the figure and print its numbers."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "split" not in line]
    valid = [line for line in lines if line.get("split") == "valid"]
    result = json.loads((run / "result.json").read_text())
    metrics = {"this run": result["test"], **result["baselines"]["test"]}

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    left.plot([r["step"] for r in train], [r["loss"] for r in train], color="0.6", lw=1, label="training")
    left.plot([r["step"] for r in valid], [r["loss"] for r in valid], "o-", color="C0", label="validation")
    left.axvline(result["chosen_step"], color="C0", ls=":", lw=1)
    left.set(xlabel="optimizer step", ylabel="cross entropy (nats)", title="learning curve (dotted: chosen on valid)")
    left.legend(frameon=False)
    width = 0.8 / len(metrics)
    colors = ["C0", *(str(0.85 - 0.15 * i) for i in range(len(metrics) - 1))]
    for i, (name, values) in enumerate(metrics.items()):
        shown = [(j, m) for j, m in enumerate(METRICS) if values.get(m) is not None]
        heights = [values[m] for _, m in shown]
        bounds = [values.get(f"{m}_ci") or (values[m], values[m]) for _, m in shown]
        error = [[h - low for h, (low, _) in zip(heights, bounds, strict=True)],
                 [high - h for h, (_, high) in zip(heights, bounds, strict=True)]]  # fmt: skip
        places = [j + (i - (len(metrics) - 1) / 2) * width for j, _ in shown]
        right.bar(places, heights, width, yerr=error, capsize=2, label=name, color=colors[i])
    right.set_xticks(range(len(METRICS)), list(METRICS.values()))
    right.set(ylim=(0, 1), title=f"{result['test']['n']} clean test proteins, 95 % intervals")
    right.legend(frameon=False, ncols=3, loc="upper left", fontsize=8)
    figure.savefig(target, dpi=120)
    for name, values in metrics.items():
        print(name, {m: values.get(m) for m in METRICS})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=HERE.parent / "runs/demo")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs/demo.png")
    args = parser.parse_args()
    draw(args.run, args.output)
