"""docs/results.md: every task on real data, from the shipped checkpoint, newly initialized, and by baselines.

    python benchmarks/results.py --data data              # train what has not finished, score, write the page
    python benchmarks/results.py --only demo --init random   # train one run alone
    python benchmarks/results.py --from-saved             # train nothing: the page from what there is

`examples/datasets/get.py scl2205`, `disorder` and `amyloid` make the data. Each run is `esm-neuron train` with a file
of configs/; it can be stopped and started again. The test set is scored once, at the end of a run, with the step that
validation chose. Baselines are fitted on the same training proteins and see whole sequences.
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

from esm_neuron.config import TrainConfig, settings
from esm_neuron.data.dataset import ExampleTable, select_records
from esm_neuron.data.families import independent_units
from esm_neuron.data.splits import load_splits
from esm_neuron.metrics import Scores
from esm_neuron.metrics.calibration import Calibration
from esm_neuron.metrics.text import NAMES, counted, drawn_over, show
from esm_neuron.metrics.verdict import alarms, signed, verdict
from esm_neuron.run_dir import RESULT, read_finished
from esm_neuron.tasks import create_task, task_class
from esm_neuron.tasks.base import Task
from esm_neuron.training import run

HERE = Path(__file__).parent
CONFIGS, SAVED, PAGE = HERE.parent / "configs", HERE / "results" / "tasks.json", HERE.parent / "docs" / "results.md"
INITS = ("pretrained", "random")
SHOWN = ("model", "chosen_step", "adapter", "parameters", "train")
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


def configured(experiment: Experiment, init: str, data: Path, runs: Path) -> TrainConfig:
    """Return the configuration of a run: its file, with the user's data folder and the start of the weights."""
    path = CONFIGS / f"{experiment.name}.yaml"
    own = settings.read_config(path)
    train = Path(str(own.data.train))
    source = HERE.parent / train if train.parts[0] == "examples" else data / train.name
    return replace(
        own,
        output=str(runs / f"{experiment.name}-{init}"),
        model=replace(own.model, init=init),  # type: ignore[arg-type]
        data=replace(own.data, train=str(source)),
        checkpoint=replace(own.checkpoint, resume="auto"),
        log=replace(own.log, baselines=False),
    )


def train(cfg: TrainConfig) -> None:
    """Train it, or what is left of it."""
    if not (Path(cfg.output) / RESULT).exists():
        print(f"== {cfg.output}", flush=True)
        run.train(cfg, lambda text: print(text, flush=True))


def collect(experiment: Experiment, data: Path, runs: Path) -> dict[str, Any]:
    """Return the metrics of both runs and the baselines, of all test proteins and the clean ones, and verdicts."""
    cfg = configured(experiment, "pretrained", data, runs)
    finished = {init: read_finished(runs / f"{experiment.name}-{init}") for init in INITS}
    kept = {init: one.predictions["test"] for init, one in finished.items()}
    has_homolog = kept["pretrained"]["has_homolog"].to_numpy().astype(bool)
    if cfg.task.name != "masked_lm":  # where the residues that are hidden depend on how sequences are cut
        cfg = replace(cfg, data=replace(cfg.data, max_residues=100_000, pack_tokens=100_002, long_sequences="refuse"))
    splits = load_splits(cfg, task_class(cfg.task.name).label_kind)
    assert splits.test is not None and list(splits.test.ids) == kept["pretrained"]["id"].to_pylist()
    task, table = create_task(splits.task, splits.labels), splits.test
    units = independent_units(table, "kmer")
    parts = {"all": np.ones(len(has_homolog), dtype=bool)}
    if has_homolog.any() and not has_homolog.all():
        parts["clean"] = ~has_homolog
    predictions = {init: as_predictions(task, table, one) for init, one in kept.items()}
    # each contestant has thresholds of its own, from the same proteins; what a run kept has its temperature already
    readers = {init: task.read_by(thresholds_of(one.result["calibration"])) for init, one in finished.items()}
    seconds = {}
    for baseline in task.baselines(splits.train):
        begin = perf_counter()
        readers[baseline.name] = task
        if splits.valid is not None:
            readers[baseline.name] = task.read_by(task.calibrate(splits.valid, baseline.predict(splits.valid)))
        predictions[baseline.name] = baseline.predict(table)
        seconds[baseline.name] = perf_counter() - begin
    scores: dict[str, dict[str, Scores]] = {}
    for name, keep in parts.items():
        part, examples, tokens = select_records(table, keep)
        index = tokens if task.predictions_per_token else examples
        own = None if units is None else units[keep]
        scores[name] = {
            model: readers[model].metrics(part, [values[index] for values in found], True, own)
            for model, found in predictions.items()
        }
    metrics = {model: {name: scores[name][model] if name in scores else None for name in ("all", "clean")}
               for model in predictions}  # fmt: skip
    for init, one in finished.items():  # of the cut sequences, which the network saw: all metrics, not those compared
        metrics[init] = {"all": one.result["test"], "clean": one.result["clean"].get("test")}
    first = finished["pretrained"]
    return {
        "task": cfg.task.name,
        "homologs": int(has_homolog.sum()),
        "rows": len(has_homolog),
        "training": first.result["data"]["train"],
        "runs": {init: {key: one.result[key] for key in SHOWN} for init, one in finished.items()},
        "metrics": metrics,
        "seconds": seconds,
        "verdicts": {name: {metric: judged(of, metric) for metric in experiment.metrics}
                     for name, of in scores.items()},
        "alarms": {init: alarms(scores["all"][init]) for init in INITS},
    }  # fmt: skip


def thresholds_of(saved: Mapping[str, Any] | None) -> Calibration:
    """Return what a run's result.json says of reading predictions, without the temperature."""
    return Calibration(saved["proteins"], 1.0, tuple(saved["thresholds"])) if saved else Calibration()


def judged(scores: Mapping[str, Scores], metric: str) -> dict[str, Any]:
    """Return the verdict on `mini` beside the network without its weights, and beside the baselines."""
    lower = metric in LOWER_IS_BETTER
    others = {name: of for name, of in scores.items() if name not in INITS}
    return {
        "random": verdict(scores["pretrained"], {"newly initialized": scores["random"]}, metric, not lower),
        "baselines": verdict(scores["pretrained"], others, metric, not lower),
    }


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
    # one that was saved before there were verdicts has figures of another measure
    known = [experiment for experiment in EXPERIMENTS if "verdicts" in saved.get(experiment.name, {})]
    found = [(experiment, saved[experiment.name]) for experiment in known]
    return environment.get_template("results.md.jinja").render(
        found=found,
        names=NAMES,
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
    parser.add_argument("--init", choices=INITS, help="with --only: from these weights alone")
    parser.add_argument(
        "--from-saved",
        action="store_true",
        help=f"train nothing: score finished runs, keep the others of {SAVED.name}",
    )
    args = parser.parse_args()
    if args.only:
        experiment = next(one for one in EXPERIMENTS if one.name == args.only)
        for init in [args.init] if args.init else INITS:
            train(configured(experiment, init, args.data, args.runs))
        return
    for experiment, init in product(() if args.from_saved else EXPERIMENTS, INITS):
        train(configured(experiment, init, args.data, args.runs))
    saved = json.loads(SAVED.read_text(encoding="utf-8")) if SAVED.exists() else {}
    for experiment in EXPERIMENTS:
        if all((args.runs / f"{experiment.name}-{init}" / RESULT).exists() for init in INITS):
            saved[experiment.name] = collect(experiment, args.data, args.runs)
    SAVED.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(saved), encoding="utf-8")


if __name__ == "__main__":
    main()
