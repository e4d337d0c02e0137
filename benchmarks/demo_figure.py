"""Draw the README's picture: the demo's learning curve, and its test metrics beside two baselines on the same proteins.

Run `make demo` first, then `python benchmarks/demo_figure.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from esm_neuron.config.settings import read_config
from esm_neuron.data.labels import Labels
from esm_neuron.data.splits import load_splits
from esm_neuron.tasks import create_task

HERE = Path(__file__).parent
METRICS = {"accuracy": "accuracy", "mcc": "MCC", "auroc": "AUROC"}


def baselines(run: Path) -> dict[str, dict[str, Any]]:
    """Return majority and amino-acid composition on the run's test proteins, fitted on its training proteins."""
    cfg = read_config(run / "config.yaml")
    whole = {"max_residues": 100_000, "pack_tokens": 100_002}
    data = type(cfg.data)(**{**vars(cfg.data), **whole})
    splits = load_splits(type(cfg)(**{**vars(cfg), "data": data}), Labels)
    assert splits.test is not None
    task = create_task(splits.task, splits.labels)
    return {baseline.name: baseline.metrics(task, splits.test) for baseline in task.baselines(splits.train)}


def draw(run: Path, target: Path) -> None:
    """Write the figure and print its numbers."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "split" not in line]
    valid = [line for line in lines if line.get("split") == "valid"]
    result = json.loads((run / "result.json").read_text())
    metrics = {**baselines(run), "this run": result["test"]}

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    left.plot([r["step"] for r in train], [r["loss"] for r in train], color="0.6", lw=1, label="training")
    left.plot([r["step"] for r in valid], [r["loss"] for r in valid], "o-", color="C0", label="validation")
    left.axvline(result["chosen_step"], color="C0", ls=":", lw=1)
    left.set(xlabel="optimizer step", ylabel="cross entropy (nats)", title="learning curve (dotted: chosen on valid)")
    left.legend(frameon=False)
    width = 0.26
    for i, (name, values) in enumerate(metrics.items()):
        shown = [(j, m) for j, m in enumerate(METRICS) if values.get(m) is not None]
        heights = [values[m] for _, m in shown]
        bounds = [values.get(f"{m}_ci") or (values[m], values[m]) for _, m in shown]
        error = [[h - low for h, (low, _) in zip(heights, bounds, strict=True)],
                 [high - h for h, (_, high) in zip(heights, bounds, strict=True)]]  # fmt: skip
        right.bar([j + (i - 1) * width for j, _ in shown], heights, width, yerr=error, capsize=3,
                  label=name, color=("0.8", "0.6", "C0")[i])  # fmt: skip
    right.set_xticks(range(len(METRICS)), list(METRICS.values()))
    right.set(ylim=(0, 1), title=f"{result['test']['n']} clean test proteins, 95 % intervals")
    right.legend(frameon=False, ncols=3, loc="upper left")
    figure.savefig(target, dpi=120)
    for name, values in metrics.items():
        print(name, {m: values.get(m) for m in METRICS})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=HERE.parent / "runs/demo")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs/demo.png")
    args = parser.parse_args()
    draw(args.run, args.output)
