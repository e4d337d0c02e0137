"""docs/results.md: every task on real data, by a probe, LoRA and all weights of the checkpoint, and by baselines.

    python benchmarks/results.py --data data              # train what has not finished, score, write the page
    python benchmarks/results.py --only demo --by probe   # train one run alone
    python benchmarks/results.py --from-saved             # train nothing: the page from what there is

`examples/datasets/get.py scl2205`, `disorder` and `amyloid` make the data. Each run is `esm-neuron train` with a file
of configs/; it can be stopped and started again. The test set is scored once, at the end of a run, with the step that
validation chose. Which way of training stands for a task is chosen by validation proteins too. Baselines are fitted on
the same training proteins and see whole sequences.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined

os.environ.setdefault("USE_TORCH_XLA", "0")  # accelerate, under peft, would import torch_xla: half a minute

from esm_neuron.config import AdapterConfig, DataConfig, TrainConfig, settings
from esm_neuron.data.dataset import ExampleTable, select_records
from esm_neuron.data.families import independent_units
from esm_neuron.data.splits import load_splits
from esm_neuron.metrics import Scores
from esm_neuron.metrics.calibration import Calibration
from esm_neuron.metrics.text import NAMES, counted, drawn_over, show
from esm_neuron.metrics.verdict import alarms, signed, verdict
from esm_neuron.run_dir import RESULT, Finished, read_finished
from esm_neuron.tasks import create_task, task_class
from esm_neuron.tasks.base import Task
from esm_neuron.training import run

HERE = Path(__file__).parent
CONFIGS, SAVED, PAGE = HERE.parent / "configs", HERE / "results" / "tasks.json", HERE.parent / "docs" / "results.md"
WAYS = {
    "probe": "probe", "lora": "LoRA", "full": "all weights", "random": "newly initialized",
}  # fmt: skip
"""Ways of training -> their names on the page; `random` is the file's own way, without the checkpoint's weights."""
SHOWN = ("model", "chosen_step", "adapter", "parameters", "train", "coverage")
"""What the page shows of a run."""


@dataclass(frozen=True)
class Experiment:
    """One task of the page."""

    name: str
    """Name of its file in configs/."""
    title: str
    metrics: tuple[str, ...]
    """Metrics that are compared; the first one decides."""
    all_related: str = ""
    """Why there are no clean proteins, if there are none."""


EXPERIMENTS = (
    Experiment("demo", "Cytoplasm or membrane (scl2205, 2 classes)", ("mcc", "accuracy")),
    Experiment("classes", "Subcellular location (scl2205, 13 classes)", ("mcc", "accuracy")),
    Experiment(
        "multi_label", "All locations of a protein (scl2205, multi-label)", ("macro_f1", "auroc"),
    ),
    Experiment("residues", "Disordered residues (AA_LDR)", ("mcc", "accuracy")),
    Experiment(
        "regression", "Nucleation of amyloid-beta variants (Seuma et al. 2021)", ("spearman",),
        "all rows are variants of one protein",
    ),
    Experiment("masked_lm", "Hidden residues (scl2205)", ("perplexity",)),
)  # fmt: skip


def configured(experiment: Experiment, way: str, data: Path, runs: Path) -> TrainConfig | None:
    """Return the configuration of a run: its file, with the user's data folder and a way of training; None: no such."""
    own = settings.read_config(CONFIGS / f"{experiment.name}.yaml")
    train = Path(str(own.data.train))
    cfg = replace(
        own,
        output=str(runs / f"{experiment.name}-{way}"),
        data=replace(own.data, train=str(HERE.parent / train if train.parts[0] == "examples" else data / train.name)),
        checkpoint=replace(own.checkpoint, resume="auto"),
        log=replace(own.log, baselines=False),
    )
    if way == "random":
        return replace(cfg, model=replace(own.model, init="random"))
    if way == "probe":
        return None if own.task.name == "masked_lm" else _as_probe(cfg)
    kind = {"lora": "lora", "full": "none"}[way]
    if kind == own.adapter.kind:
        return cfg
    rates = {"lora": 2e-3, "full": 5e-4}
    adapter = AdapterConfig(kind="lora", r=16, alpha=32) if way == "lora" else AdapterConfig(kind="none")
    return replace(cfg, adapter=adapter, optim=replace(own.optim, lr=rates[way]))


def _as_probe(cfg: TrainConfig) -> TrainConfig:
    """Return a run by configs/probe.yaml, which reads longer proteins, as `esm-neuron train` does by default."""
    probe, whole = settings.read_config(CONFIGS / "probe.yaml"), DataConfig(train=cfg.data.train)
    model = replace(probe.model, name=cfg.model.name)
    data = replace(
        cfg.data, cache=str(Path(cfg.output).parent / "cache")
    )  # of the states: proteins are in several tasks
    if task_class(cfg.task.name).pools:
        lengths = {name: getattr(whole, name) for name in ("max_residues", "long_sequences", "pack_tokens")}
        data = replace(data, **lengths)
    else:
        model = replace(model, pooling="mean")  # of a residue there is none; windows, so that each is predicted
    return replace(cfg, model=model, data=data, adapter=probe.adapter, optim=probe.optim, loop=probe.loop)


def train(cfg: TrainConfig) -> None:
    """Train it, or what is left of it."""
    if not (Path(cfg.output) / RESULT).exists():
        print(f"== {cfg.output}", flush=True)
        run.train(cfg, lambda text: print(text, flush=True))


def collect(experiment: Experiment, data: Path, runs: Path) -> dict[str, Any]:
    """Return metrics of finished runs and baselines, of all test proteins and the clean ones, and verdicts."""
    planned = {way: cfg for way in WAYS if (cfg := configured(experiment, way, data, runs))}
    finished = {
        way: read_finished(Path(cfg.output)) for way, cfg in planned.items() if (Path(cfg.output) / RESULT).exists()
    }
    kept = {way: one.predictions["test"] for way, one in finished.items()}
    first = next(iter(finished.values()))
    has_homolog = first.predictions["test"]["has_homolog"].to_numpy().astype(bool)
    cfg = planned["lora"]
    if cfg.task.name != "masked_lm":  # where the residues that are hidden depend on how sequences are cut
        cfg = replace(cfg, data=replace(cfg.data, max_residues=100_000, pack_tokens=100_002, long_sequences="refuse"))
    splits = load_splits(cfg, task_class(cfg.task.name).label_kind)
    assert splits.test is not None and all(list(splits.test.ids) == of["id"].to_pylist() for of in kept.values())
    task, table = create_task(splits.task, splits.labels), splits.test
    parts = {"all": np.ones(len(has_homolog), dtype=bool)}
    if has_homolog.any() and not has_homolog.all():
        parts["clean"] = ~has_homolog
    # each contestant has thresholds of its own, from the same proteins; what a run kept has its temperature already
    readers = {way: task.read_by(thresholds_of(one.result["calibration"])) for way, one in finished.items()}
    predictions = {way: as_predictions(task, table, one) for way, one in kept.items()}
    seconds = {way: float(one.result["train"]["seconds"]) for way, one in finished.items()}
    for baseline in task.baselines(splits.train):
        begin = perf_counter()
        readers[baseline.name] = task
        if splits.valid is not None:
            readers[baseline.name] = task.read_by(task.calibrate(splits.valid, baseline.predict(splits.valid)))
        predictions[baseline.name] = baseline.predict(table)
        seconds[baseline.name] = perf_counter() - begin
    scores = scored(table, parts, readers, predictions)
    metrics = {name: {part: of.get(name) for part, of in scores.items()} for name in predictions}
    for way, one in finished.items():  # of the cut sequences, which the network saw: all metrics, not those compared
        metrics[way] = {"all": one.result["test"], "clean": one.result["clean"].get("test")}
    return {
        "task": cfg.task.name,
        "homologs": int(has_homolog.sum()),
        "rows": len(has_homolog),
        "training": first.result["data"]["train"],
        "chosen": chosen(experiment, finished),
        "runs": {way: {key: one.result[key] for key in SHOWN} for way, one in finished.items()},
        "metrics": metrics,
        "seconds": seconds,
        "verdicts": {name: {metric: judged(of, metric) for metric in experiment.metrics}
                     for name, of in scores.items()},
        "alarms": {way: alarms(scores["all"][way], probe=way == "probe") for way in finished},
    }  # fmt: skip


def scored(
    table: ExampleTable,
    parts: Mapping[str, np.ndarray],
    readers: Mapping[str, Task],
    predictions: Mapping[str, list[np.ndarray]],
) -> dict[str, dict[str, Scores]]:
    """Return part -> contestant -> metrics on the same resamples of families; `parts` says which records each has."""
    units = independent_units(table, "kmer")
    scores: dict[str, dict[str, Scores]] = {}
    for name, keep in parts.items():
        part, examples, tokens = select_records(table, keep)
        own = None if units is None else units[keep]
        scores[name] = {}
        for model, found in predictions.items():
            index = tokens if readers[model].predictions_per_token else examples
            scores[name][model] = readers[model].metrics(part, [values[index] for values in found], True, own)
    return scores


def chosen(experiment: Experiment, finished: Mapping[str, Finished]) -> str:
    """Return the way of training with the best metric on validation proteins; `random` is not one of them."""
    metric = experiment.metrics[0]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(
        (way for way in finished if way != "random"), key=lambda way: sign * finished[way].result["valid"][metric]
    )


def thresholds_of(saved: Mapping[str, Any] | None) -> Calibration:
    """Return what a run's result.json says of reading predictions, without the temperature."""
    return Calibration(saved["proteins"], 1.0, tuple(saved["thresholds"])) if saved else Calibration()


def judged(scores: Mapping[str, Scores], metric: str) -> dict[str, Any]:
    """Return the verdict on each way of training beside the baselines."""
    others = {name: of for name, of in scores.items() if name not in WAYS}
    better = metric not in LOWER_IS_BETTER
    return {way: verdict(own, others, metric, better) for way, own in scores.items() if way in WAYS}


def as_predictions(task: Task, table: ExampleTable, kept: pa.Table) -> list[np.ndarray]:
    """Return the predictions of whole proteins that a run kept, in the form that `task.metrics` takes.

    A protein's windows are one in what is kept, so each of its examples in `table` gets what the protein got; of hidden
    residues, which add up, its first example gets all.
    """
    if task.cfg.name == "masked_lm":
        hidden = kept["hidden"].to_numpy().astype(float)
        loss = np.where(hidden > 0, np.nan_to_num(kept["loss"].to_numpy()), 0.0) * hidden
        first = np.diff(table.record, prepend=-1) != 0
        return [np.where(first, values[table.record], 0.0) for values in (loss, hidden, 0 * hidden)]
    if task.cfg.name == "regression":
        standardised = (kept["value"].to_numpy() - task.cfg.target_mean) / task.cfg.target_sd
        return [standardised[table.record]]
    if task.cfg.name == "residue_classification":
        slot, _ = table.residue_slots()
        flat = [kept[f"p_{label}"].combine_chunks().flatten().to_numpy(zero_copy_only=False) for label in task.labels]
        p = np.stack(flat, axis=1)[np.maximum(slot, 0)]
        return [np.log(np.maximum(p, LEAST))]
    p = np.stack([kept[f"p_{label}"].to_numpy() for label in task.labels], axis=1)[table.record]
    log_p = np.log(np.maximum(p, LEAST))
    return [log_p if task.cfg.name == "sequence_classification" else log_p - np.log(np.maximum(1 - p, LEAST))]


LOWER_IS_BETTER = {"loss", "rmse", "mae", "perplexity"}
LEAST = 1e-30
"""Least probability that a logarithm is taken of."""


def page(saved: Mapping[str, Any]) -> str:
    """Return docs/results.md."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    # one that was saved before ways of training were compared has other figures
    known = [experiment for experiment in EXPERIMENTS if "chosen" in saved.get(experiment.name, {})]
    found = [(experiment, saved[experiment.name]) for experiment in known]
    return environment.get_template("results.md.jinja").render(
        found=found,
        names=NAMES,
        ways=WAYS,
        show=show,
        signed=signed,
        drawn_over=drawn_over,
        counted=lambda found, task: counted(found, task_class(task).unit),
        missing=[experiment.title for experiment in EXPERIMENTS if experiment not in known],
    )


def main() -> None:
    """Train, score and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of `examples/datasets/get.py`")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="folder of the runs")
    parser.add_argument("--only", choices=[one.name for one in EXPERIMENTS], help="train this one; no page")
    parser.add_argument("--by", choices=WAYS, help="with --only: by this way of training alone")
    parser.add_argument(
        "--from-saved",
        action="store_true",
        help=f"train nothing: score finished runs, keep the others of {SAVED.name}",
    )
    args = parser.parse_args()
    wanted = [one for one in EXPERIMENTS if args.only in (None, one.name)]
    for experiment, way in product(() if args.from_saved else wanted, [args.by] if args.by else WAYS):
        if cfg := configured(experiment, way, args.data, args.runs):
            train(cfg)
    if args.only:
        return
    saved = json.loads(SAVED.read_text(encoding="utf-8")) if SAVED.exists() else {}
    for experiment in EXPERIMENTS:
        if any((args.runs / f"{experiment.name}-{way}" / RESULT).exists() for way in WAYS):
            saved[experiment.name] = collect(experiment, args.data, args.runs)
    SAVED.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(saved), encoding="utf-8")


if __name__ == "__main__":
    main()
