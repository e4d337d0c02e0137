"""docs/adapters.md: train the demo's task with all weights, LoRA, QLoRA and the head alone, `--seeds` times each.

    python benchmarks/adapters.py              # train what has not finished, write the page
    python benchmarks/adapters.py --only lora qlora   # train these alone; no page

Every run starts from `mini` and trains on the same proteins for as many steps and residues as the others of its seed.
The seed decides the order of the proteins and the newly initialized weights, not the data. Validation chooses the step
of a run. It also chooses the learning rate of a kind, by one run per rate with another seed, whose test metrics nobody
looks at. OMP_NUM_THREADS sets the number of cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import results  # sets what must be set before torch is imported
import torch
from scipy import stats

from esm_neuron.backends import create_backend
from esm_neuron.config import TrainConfig, require, settings
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.inference.load import build_trained, read_run
from esm_neuron.metrics.bootstrap import bootstrap
from esm_neuron.metrics.classification import confusion_scores
from esm_neuron.metrics.text import NAMES
from esm_neuron.run_dir import Finished, read_finished
from esm_neuron.tasks.base import Task

RATES = {"none": (2.5e-4, 5e-4, 1e-3), "lora": (1e-3, 2e-3, 4e-3), "head": (2.5e-3, 5e-3, 1e-2)}
"""adapter.kind -> learning rates to choose from."""
TITLES = {"none": "all weights", "lora": "LoRA", "qlora": "QLoRA (NF4)", "head": "head alone"}
"""adapter.kind -> what the page calls it."""
REFERENCE = "lora"
"""What the others are compared with. QLoRA, the same with fewer bits, takes its learning rate."""
METRICS = ("mcc", "accuracy")
TRAVELLERS = 100
"""Test proteins whose logits are compared on a quantized base and on a float one."""
PRECISIONS: dict[str, Any] = {"float32": "fp32", "bf16": "bf16"}
"""What the page calls a precision -> loop.precision."""
SAVED = results.HERE / "results" / "adapters.json"
PAGE = results.PAGE.with_name("adapters.md")


def configured(kind: str, seed: int, lr: float, args: argparse.Namespace) -> TrainConfig:
    """Return the demo's configuration, changed for one run."""
    own = settings.read_config(results.CONFIGS / "demo.yaml")
    return replace(
        own,
        output=str(args.runs / f"{kind}-{lr:g}-{args.steps}steps-{seed}"),
        seed=seed,
        data=replace(own.data, train=str(results.HERE.parent / str(own.data.train))),
        adapter=replace(own.adapter, kind=kind),  # type: ignore[arg-type]
        optim=replace(own.optim, lr=lr),
        loop=replace(own.loop, max_steps=args.steps, eval_every=max(1, args.steps // 2)),
        checkpoint=replace(own.checkpoint, resume="auto"),
        log=replace(own.log, baselines=False, tensorboard=False),
    )


def search(kind: str, args: argparse.Namespace) -> dict[float, float]:
    """Return the best validation MCC by learning rate, with a seed that the comparison does not use."""
    searched = REFERENCE if kind == "qlora" else kind
    found = {}
    for lr in RATES[searched]:
        cfg = configured(searched, args.seeds, lr, args)
        results.train(cfg)
        found[lr] = float(finished(cfg).result["valid"]["mcc"])
    return found


def finished(cfg: TrainConfig) -> Finished:
    """Return the finished run of a configuration.

    Raises:
        ConfigError: its folder holds a run with other settings.
    """
    one = read_finished(Path(cfg.output))
    same = replace(one.cfg, output=cfg.output, task=cfg.task) == cfg
    require(same, f"{cfg.output}: a run with other settings is there; delete it, or name another folder: --runs")
    return one


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Return the metrics of every run, and differences from LoRA with both kinds of interval."""
    seeds = range(args.seeds)
    tried = {kind: search(kind, args) for kind in TITLES}
    rates = {kind: max(found, key=found.__getitem__) for kind, found in tried.items()}
    runs = {(kind, seed): finished(configured(kind, seed, rates[kind], args)) for kind, seed in product(TITLES, seeds)}
    predictions = {key: one.predictions["test"].to_pandas() for key, one in runs.items()}
    require(len({tuple(one["id"]) for one in predictions.values()}) == 1, "runs have answered other test proteins")
    labels, data = runs[REFERENCE, 0].cfg.task.labels or (), runs[REFERENCE, 0].cfg.data
    table = pd.read_csv(str(data.train), sep="\t", dtype=str).set_index(data.id_column)
    answered = predictions[REFERENCE, 0]["id"].tolist()
    cells = {key: confusion_cells(labels, one) for key, one in predictions.items()}
    return compared(cells, labels, args.seeds) | {
        "steps": args.steps,
        "trainable": {kind: runs[kind, 0].result["parameters"]["trainable"] for kind in TITLES},
        "tried": {kind: list(found.items()) for kind, found in tried.items()},
        "clusters": int(table.loc[answered, "cluster30"].nunique()),
        "travelled": [travelled(runs["qlora", seed], table.loc[answered, "sequence"]) for seed in seeds],
    }


def travelled(one: Finished, proteins: pd.Series) -> dict[str, float]:
    """Return how far a QLoRA run's logits move when its adapter is put on a base that is not quantized.

    Returns:
        `proteins`: how many were drawn, of those that need no crop; `float32` and `bf16`: root mean
        square of the difference over that of the logits; `changed`: proteins that get another class in either.
    """
    cfg, task = read_run(Path(one.cfg.output))
    short = proteins[proteins.str.len() <= cfg.data.max_residues]
    sequences = short.sample(min(TRAVELLERS, len(short)), random_state=0)
    here = logits(cfg, task, sequences)
    elsewhere, task = read_run(Path(one.cfg.output), "xla")  # a backend that cannot quantize, so by its rules
    found: dict[str, float] = {"proteins": len(sequences), "changed": 0}
    for name, precision in PRECISIONS.items():
        there = replace(elsewhere, backend="cpu", loop=replace(elsewhere.loop, precision=precision))
        moved = logits(there, task, sequences)
        found[name] = float((moved - here).square().mean().sqrt() / here.square().mean().sqrt())
        found["changed"] = max(found["changed"], int((moved.argmax(1) != here.argmax(1)).sum()))
    return found


def logits(cfg: TrainConfig, task: Task, sequences: Iterable[str]) -> torch.Tensor:
    """Return the logits of a finished run, float32 [proteins, classes], one protein at a time."""
    backend = create_backend(cfg)
    model = build_trained(cfg, task, backend).model.eval()
    with torch.no_grad(), backend.autocast():
        given = [torch.from_numpy(encode_many([sequence])[0].astype("int64"))[None] for sequence in sequences]
        return torch.cat([model(input_ids=ids).logits.float() for ids in given])


def confusion_cells(labels: Sequence[str], predictions: pd.DataFrame) -> np.ndarray:
    """Return which pair of target and prediction each protein is, float64 [proteins, C * C]."""
    place = {label: i for i, label in enumerate(labels)}
    pairs = zip(predictions["target"], predictions["label"], strict=True)
    cell = [place[target] * len(labels) + place[predicted] for target, predicted in pairs]
    return np.eye(len(labels) ** 2)[cell]


def compared(cells: Mapping[tuple[str, int], np.ndarray], labels: Sequence[str], seeds: int) -> dict[str, Any]:
    """Return the metrics of every run, and differences from LoRA with their intervals.

    Args:
        cells: (kind, seed) -> float64 [proteins, C * C], see `confusion_cells`.
        labels: the C classes.
        seeds: how many seeds of each kind, from 0.
    """

    def scores(kind: str, counts: np.ndarray, metric: str) -> np.ndarray:
        """Return `metric` of each run of `kind` on each resample, [seeds, k]."""
        shape = (-1, len(labels), len(labels))
        drawn = [confusion_scores((counts @ cells[kind, seed]).reshape(shape))[metric] for seed in range(seeds)]
        return np.stack(drawn)

    def apart(kind: str, counts: np.ndarray, metric: str) -> np.ndarray:
        """Return by how much `kind` is above the reference, [seeds, k]."""
        return scores(kind, counts, metric) - scores(REFERENCE, counts, metric)

    proteins = len(cells[REFERENCE, 0])
    once = np.ones((1, proteins))
    kinds: dict[str, dict[str, Any]] = {}
    for kind, metric in product(TITLES, METRICS):
        by_seed = scores(kind, once, metric)[:, 0]
        found = kinds.setdefault(kind, {})[metric] = {"by_seed": by_seed.tolist(), "mean": float(by_seed.mean())}
        if kind != REFERENCE:
            drawn = bootstrap(proteins, lambda counts: {"d": apart(kind, counts, metric).mean(0)})  # noqa: B023
            found |= difference(apart(kind, once, metric)[:, 0], np.asarray(drawn["d"]))
    return {"seeds": seeds, "proteins": proteins, "kinds": kinds}


def difference(by_seed: np.ndarray, over_proteins: np.ndarray) -> dict[str, Any]:
    """Return the mean of paired differences, with 95 % intervals by Student's t.

    Args:
        by_seed: [seeds] difference of each pair of runs.
        over_proteins: [k] the mean over seeds in each resample of the test proteins.

    Returns:
        `difference`; `over_seeds`, for these test proteins; `over_both`, for other such proteins too: the variances
        of the mean over seeds and over proteins are added. The degrees of freedom are the seeds', which is cautious.
    """
    mean, freedom = float(by_seed.mean()), len(by_seed) - 1
    of_seeds = stats.sem(by_seed) ** 2
    found: dict[str, Any] = {"difference": mean}
    for name, variance in (("over_seeds", of_seeds), ("over_both", of_seeds + over_proteins.var(ddof=1))):
        reach = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
        found[name] = [float(mean - reach), float(mean + reach)]
    return found


def page(saved: Mapping[str, Any]) -> str:
    """Return docs/adapters.md."""
    seeds, steps, proteins = (saved[name] for name in ("seeds", "steps", "proteins"))
    lines = [
        "# What to train: all weights, LoRA, QLoRA or the head",
        f"Made by `python benchmarks/adapters.py`: `mini` on cytoplasm or membrane (scl2205), {steps} steps on the",
        f"CPU, {seeds} seeds. Each run predicts {proteins} test proteins without a homolog in training once, with the",
        "step that validation chose. Learning rates were chosen by the validation MCC of one run each with another",
        "seed (below).",
        "",
        "Differences from LoRA are between runs with the same seed. Their 95 % intervals are Student's t, once over",
        "seeds for these test proteins, and once over seeds and proteins, with the bootstrap's variance over proteins",
        f"added: go by the latter. The bootstrap draws single proteins; they are of {saved['clusters']} clusters.",
    ]
    head = ("parameters", "mean (lowest to highest)", "minus LoRA", "over seeds", "over seeds and proteins")
    for metric in METRICS:
        lines += ["", *heading((NAMES[metric], *head))]
        for kind, row in saved["kinds"].items():
            found = row[metric]
            spread = f"{found['mean']:.3f} ({min(found['by_seed']):.3f} to {max(found['by_seed']):.3f})"
            apart = ["", "", ""]
            if kind != REFERENCE:
                bounds = [f"[{low:+.3f}, {high:+.3f}]" for low, high in (found["over_seeds"], found["over_both"])]
                apart = [f"{found['difference']:+.3f}", *bounds]
            lines.append(f"| {' | '.join([TITLES[kind], format(saved['trainable'][kind], ','), spread, *apart])} |")
    lines += ["", *heading(("Learning rate", "tried: validation MCC", "chosen"))]
    for kind, tried in saved["tried"].items():
        chosen = max(tried, key=lambda one: one[1])[0]
        edge = " (at the edge of what was tried)" if chosen in (tried[0][0], tried[-1][0]) else ""
        shown = "LoRA's" if kind == "qlora" else ", ".join(f"{lr:g}: {mcc:.3f}" for lr, mcc in tried)
        lines.append(f"| {TITLES[kind]} | {shown} | {chosen:g}{edge} |")
    far = saved["travelled"]
    apart = {name: f"{min(one[name] for one in far):.1%} to {max(one[name] for one in far):.1%}" for name in PRECISIONS}
    lines += [
        "",
        "If the adapter of a QLoRA run is put on a base that is not quantized, as on trn1 or in plain PEFT, the logits",
        f"of {far[0]['proteins']} test proteins change by {apart['float32']} of their root mean square in float32 and",
        f"by {apart['bf16']} in bf16, depending on the run. Per run, {max(one['changed'] for one in far)} of them at",
        "most gets another class.",
    ]
    return "\n".join([*lines, ""])


def heading(cells: Sequence[str]) -> list[str]:
    """Return the first two lines of a table."""
    return [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/adapters"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=TITLES, help="train these kinds; no page")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: an interval over seeds needs 2 or more")
    return args


def main() -> None:
    """Train, score and write the page."""
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
