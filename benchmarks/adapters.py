"""docs/adapters.md: the demo's task with all weights, LoRA, QLoRA and the head alone trained, `--seeds` times each.

    python benchmarks/adapters.py              # train what has not finished, write the page
    python benchmarks/adapters.py --only lora head   # train these alone; no page

Every run starts from `mini` and has the rows, steps and residues of the others of its seed; the seed decides the order
of rows, the drawn weights and nothing of the data. Validation chooses the step of a run, and the learning rate of a
kind in runs with a seed of its own; test rows are answered once. As it stands: about 130 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import results  # sets what must be set before torch is imported
from scipy import stats

from esm_neuron import settings
from esm_neuron.config import TrainConfig
from esm_neuron.finished import read_finished
from esm_neuron.metrics.bootstrap import bootstrap, interval
from esm_neuron.metrics.text import NAMES

RATES = {"none": (2.5e-4, 5e-4, 1e-3), "lora": (1e-3, 2e-3, 4e-3), "head": (2.5e-3, 5e-3, 1e-2)}
"""adapter.kind -> learning rates to choose from."""
TITLES = {"none": "all weights", "lora": "LoRA", "qlora": "QLoRA (NF4)", "head": "head alone"}
"""adapter.kind -> what the page calls it."""
REFERENCE = "lora"
"""What the others are compared with; QLoRA, the same with fewer bits, takes its learning rate."""
METRICS = ("mcc", "accuracy")
SAVED = results.HERE / "results" / "adapters.json"
PAGE = results.PAGE.with_name("adapters.md")


def configured(kind: str, seed: int, lr: float, args: argparse.Namespace) -> TrainConfig:
    """The demo's configuration for one run."""
    own = settings.read_config(results.CONFIGS / "demo.yaml")
    return replace(
        own,
        output=str(args.runs / f"{kind}-{lr:g}-{seed}"),
        seed=seed,
        data=replace(own.data, train=str(results.HERE.parent / str(own.data.train))),
        adapter=replace(own.adapter, kind=kind),  # type: ignore[arg-type]
        optim=replace(own.optim, lr=lr),
        loop=replace(own.loop, max_steps=args.steps, eval_every=max(1, args.steps // 4)),
        checkpoint=replace(own.checkpoint, resume="auto"),
        log=replace(own.log, baselines=False, tensorboard=False),
    )


def valid_mcc(kind: str, lr: float, args: argparse.Namespace) -> float:
    """Of the run that tries a learning rate, at the step it chose; its seed is none of the comparison's."""
    cfg = configured(kind, args.seeds, lr, args)
    results.train(cfg)
    return float(read_finished(Path(cfg.output)).result["valid"]["mcc"])


def search(kind: str, args: argparse.Namespace) -> dict[float, float]:
    """Learning rate -> validation MCC."""
    searched = REFERENCE if kind == "qlora" else kind
    return {lr: valid_mcc(searched, lr, args) for lr in RATES[searched]}


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of every run, and differences to LoRA with both kinds of interval."""
    seeds = range(args.seeds)
    tried = {kind: search(kind, args) for kind in TITLES}
    rates = {kind: max(found, key=found.__getitem__) for kind, found in tried.items()}
    finished = {
        (kind, seed): read_finished(Path(configured(kind, seed, rates[kind], args).output))
        for kind, seed in product(TITLES, seeds)
    }
    labels = finished[REFERENCE, 0].cfg.task.labels or ()
    cells = {
        key: results.confusion_cells(labels, one.answers["test"].to_pandas(), per_residue=False)
        for key, one in finished.items()
    }

    def scores(kind: str, counts: np.ndarray, metric: str) -> np.ndarray:
        """[seeds, k]: `metric` of each run of `kind` on each resample."""
        shape = (-1, len(labels), len(labels))
        drawn = [results.confusion_scores((counts @ cells[kind, seed]).reshape(shape))[metric] for seed in seeds]
        return np.stack(drawn)

    def apart(kind: str, counts: np.ndarray, metric: str) -> np.ndarray:
        """[seeds, k]: what `kind` has more than the reference."""
        return scores(kind, counts, metric) - scores(REFERENCE, counts, metric)

    proteins = len(cells[REFERENCE, 0])
    once = np.ones((1, proteins))
    rows: dict[str, dict[str, Any]] = {}
    for kind in TITLES:
        trainable = finished[kind, 0].result["parameters"]["trainable"]
        rows[kind] = {"parameters": trainable, "lr": rates[kind], "tried": list(tried[kind].items())}
        for metric in METRICS:
            by_seed = scores(kind, once, metric)[:, 0]
            rows[kind][metric] = {"by_seed": by_seed.tolist(), "mean": float(by_seed.mean())}
            if kind != REFERENCE:
                drawn = bootstrap(proteins, lambda counts: {"d": apart(kind, counts, metric).mean(0)})  # noqa: B023
                rows[kind][metric] |= difference(apart(kind, once, metric)[:, 0])
                rows[kind][metric]["over_proteins"] = interval(drawn["d"])
    return {"seeds": args.seeds, "steps": args.steps, "proteins": proteins, "rows": rows}


def difference(by_seed: np.ndarray) -> dict[str, Any]:
    """Mean of paired differences and its 95 % interval over seeds by Student's t."""
    low, high = stats.t.interval(0.95, len(by_seed) - 1, by_seed.mean(), stats.sem(by_seed))
    return {"difference": float(by_seed.mean()), "over_seeds": [float(low), float(high)]}


def page(saved: Mapping[str, Any]) -> str:
    """docs/adapters.md."""
    seeds, steps, proteins = (saved[name] for name in ("seeds", "steps", "proteins"))
    lines = [
        "# What to train: all weights, LoRA, QLoRA or the head",
        f"Made by `python benchmarks/adapters.py`: `mini` on cytoplasm or membrane (scl2205), {steps} steps on the",
        f"CPU, {seeds} seeds; {proteins} test proteins without a relative in training, answered once by each run with",
        "the step that validation chose. Learning rates were chosen by validation MCC in runs with a seed of their own",
        "(below). A difference to LoRA is of runs with the same seed; its first interval is over seeds (Student's t),",
        "its second over proteins (bootstrap of the mean over seeds). Both are 95 %.",
    ]
    for metric in METRICS:
        head = (NAMES[metric], "parameters", "mean (lowest to highest)", "less LoRA", "over seeds", "over proteins")
        lines += ["", *heading(head)]
        for kind, row in saved["rows"].items():
            found = row[metric]
            spread = f"{found['mean']:.3f} ({min(found['by_seed']):.3f} to {max(found['by_seed']):.3f})"
            apart = ["", "", ""]
            if kind != REFERENCE:
                bounds = [f"[{low:+.3f}, {high:+.3f}]" for low, high in (found["over_seeds"], found["over_proteins"])]
                apart = [f"{found['difference']:+.3f}", *bounds]
            lines.append(f"| {' | '.join([TITLES[kind], format(row['parameters'], ','), spread, *apart])} |")
    lines += ["", *heading(("Learning rate", "tried: validation MCC", "chosen"))]
    for kind, row in saved["rows"].items():
        tried = ", ".join(f"{lr:g}: {mcc:.3f}" for lr, mcc in row["tried"])
        tried = "LoRA's" if kind == "qlora" else tried
        lines.append(f"| {TITLES[kind]} | {tried} | {row['lr']:g} |")
    return "\n".join([*lines, ""])


def heading(cells: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/adapters"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=TITLES, help="train these kinds; no page")
    return parser.parse_args(argv)


def main() -> None:
    """See the top of the file."""
    args = arguments()
    for kind in args.only or TITLES:
        tried = search(kind, args)
        for seed in range(args.seeds):
            results.train(configured(kind, seed, max(tried, key=tried.__getitem__), args))
    if args.only:
        return
    saved = collect(args)
    SAVED.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(saved), encoding="utf-8")


if __name__ == "__main__":
    main()
