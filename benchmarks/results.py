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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

os.environ.setdefault("USE_TORCH_XLA", "0")  # accelerate, under peft, would import torch_xla: half a minute

from esm_neuron.config import TrainConfig, settings
from esm_neuron.data.dataset import select_records
from esm_neuron.data.records import LIST_JOINER
from esm_neuron.data.splits import load_splits
from esm_neuron.metrics.bootstrap import Curve, bootstrap, interval
from esm_neuron.metrics.classification import confusion_scores
from esm_neuron.metrics.regression import correlations, ranks
from esm_neuron.metrics.text import NAMES, counted, number, show
from esm_neuron.run_dir import RESULT, as_table, read_finished
from esm_neuron.tasks import create_task, task_class
from esm_neuron.training import run

HERE = Path(__file__).parent
CONFIGS, SAVED, PAGE = HERE.parent / "configs", HERE / "results" / "tasks.json", HERE.parent / "docs" / "results.md"
INITS = ("pretrained", "random")
SHOWN = ("model", "chosen_step", "adapter", "parameters", "train")
"""What the page shows of a run."""

Metric = Callable[[np.ndarray], np.ndarray]
"""From multiplicities [k, proteins] to a metric per resample [k]."""


@dataclass(frozen=True)
class Experiment:
    """One task of the page."""

    name: str
    """Name of its file in configs/."""
    title: str
    metrics: tuple[str, ...]
    """Metrics that are compared; the first one decides."""
    baseline: str
    """What has to be beaten besides the newly initialized network."""
    all_related: str = ""
    """Why there are no clean proteins, if there are none."""


EXPERIMENTS = (
    Experiment("demo", "Cytoplasm or membrane (scl2205, 2 classes)", ("mcc", "accuracy"), "composition"),
    Experiment("classes", "Subcellular location (scl2205, 13 classes)", ("mcc", "accuracy"), "composition"),
    Experiment(
        "multi_label", "All locations of a protein (scl2205, multi-label)", ("macro_f1", "auroc"), "composition",
    ),
    Experiment("residues", "Disordered residues (AA_LDR)", ("mcc", "accuracy"), "window"),
    Experiment(
        "regression", "Nucleation of amyloid-beta variants (Seuma et al. 2021)", ("spearman",), "composition",
        "all rows are variants of one protein",
    ),
    Experiment("masked_lm", "Hidden residues (scl2205)", ("perplexity",), "unigram"),
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
    """Return the metrics of both runs and the baselines, of all test proteins and the clean ones, and differences."""
    cfg = configured(experiment, "pretrained", data, runs)
    finished = {init: read_finished(runs / f"{experiment.name}-{init}") for init in INITS}
    predictions = {init: one.predictions["test"].to_pandas() for init, one in finished.items()}
    has_homolog = predictions["pretrained"]["has_homolog"].to_numpy(dtype=bool)
    cfg = replace(cfg, data=replace(cfg.data, max_residues=100_000, pack_tokens=100_002, long_sequences="refuse"))
    splits = load_splits(cfg, task_class(cfg.task.name).label_kind)
    assert splits.test is not None and list(splits.test.ids) == predictions["pretrained"]["id"].tolist()
    task, labels = create_task(splits.task, splits.labels), splits.labels
    clean = has_homolog.any() and not has_homolog.all()
    metrics = {
        init: {"all": one.result["test"], "clean": one.result["clean"].get("test")} for init, one in finished.items()
    }
    for baseline in task.baselines(splits.train):
        own = baseline.predict(splits.test)
        _, examples, tokens = selected = select_records(splits.test, ~has_homolog)
        part = [values[tokens if task.predictions_per_token else examples] for values in own]
        metrics[baseline.name] = {
            "all": task.metrics(splits.test, own, intervals=True),
            "clean": task.metrics(selected[0], part, intervals=True) if clean else None,
        }
        if baseline.name == experiment.baseline:
            predictions[baseline.name] = as_table(task, splits.test, own).to_pandas()
    differences = {
        other: {metric: paired(cfg.task.name, metric, labels, predictions["pretrained"], predictions[other])
                for metric in experiment.metrics}
        for other in ("random", experiment.baseline)
    }  # fmt: skip
    first = finished["pretrained"]
    return {
        "task": cfg.task.name,
        "homologs": int(has_homolog.sum()),
        "rows": len(has_homolog),
        "training": first.result["data"]["train"],
        "runs": {init: {key: one.result[key] for key in SHOWN} for init, one in finished.items()},
        "metrics": metrics,
        "differences": differences,
        "silent": [name for name, made in predictions.items() if "label" in made and (made["label"] == "").all()],
    }  # fmt: skip


def paired(task: str, metric: str, labels: tuple[str, ...], one: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    """Return the difference of a metric between two sets of predictions, scored on the same resamples of proteins."""
    a, b = (scorer(task, metric, labels, predictions) for predictions in (one, other))
    drawn = bootstrap(len(one), lambda counts: {"difference": a(counts) - b(counts)}, width=len(one) * 4)
    once = np.ones((1, len(one)))
    return {"difference": float((a(once) - b(once))[0]), "difference_ci": interval(drawn["difference"])}


def scorer(
    task: str, metric: str, labels: tuple[str, ...], predictions: pd.DataFrame
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from how often each protein was drawn to `metric` of these predictions."""
    if task in ("sequence_classification", "residue_classification"):
        cells = confusion_cells(labels, predictions, task == "residue_classification")
        return lambda counts: confusion_scores((counts @ cells).reshape(-1, len(labels), len(labels)))[metric]
    if task == "multi_label" and metric == "auroc":
        everyone = np.arange(len(predictions))
        curves = [
            Curve.of(
                predictions[f"p_{label}"].to_numpy(),
                has_label(predictions["target"], label),
                everyone,
                len(predictions),
            )
            for label in labels
        ]
        return lambda counts: np.asarray(np.mean([curve.areas(counts)[0] for curve in curves], axis=0))
    if task == "multi_label":
        target, predicted = (
            np.stack([has_label(predictions[name], label) for label in labels], axis=1).astype(float)
            for name in ("target", "label")
        )
        return lambda counts: macro_f1(counts @ (target * predicted), counts @ (target + predicted))
    if task == "regression":
        x, y = predictions["value"].to_numpy(float), predictions["target"].to_numpy(float)
        return lambda counts: correlations(counts, ranks(counts, x), ranks(counts, y))
    hidden = predictions["hidden"].to_numpy(float)
    loss = np.where(hidden > 0, predictions["loss"], 0.0) * hidden
    return lambda counts: np.exp((counts @ loss) / (counts @ hidden))


def has_label(texts: pd.Series, label: str) -> np.ndarray:
    """Return whether `label` is among those that each text joins, bool [proteins]."""
    return np.array([label in text.split(LIST_JOINER) for text in texts])


def confusion_cells(labels: tuple[str, ...], predictions: pd.DataFrame, per_residue: bool) -> np.ndarray:
    """Return how often each pair of target and prediction occurs in a protein, float64 [proteins, C * C]."""
    place = {label: i for i, label in enumerate(labels)}
    cells = np.zeros((len(predictions), len(labels) ** 2))
    for row, (target, predicted) in enumerate(
        zip(predictions["target"], predictions["labels" if per_residue else "label"], strict=True)
    ):
        for pair in zip(target, predicted, strict=True) if per_residue else [(target, predicted)]:
            if pair[0] is not None:
                cells[row, place[pair[0]] * len(labels) + place[pair[1]]] += 1
    return cells


def macro_f1(right: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Return macro-F1 [k] from sums over proteins [k, C]; a class neither present nor predicted counts 0."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(marked > 0, 2 * right / marked, 0.0).mean(1))


LOWER_IS_BETTER = {"loss", "rmse", "mae", "perplexity"}


def verdict(metric: str, difference: Mapping[str, Any]) -> str:
    """Return `better`, `worse`, or `undecided` if the interval of the difference contains 0."""
    low, high = difference["difference_ci"]
    if low <= 0 <= high:
        return "undecided"
    return "better" if (difference["difference"] < 0) == (metric in LOWER_IS_BETTER) else "worse"


def page(saved: Mapping[str, Any]) -> str:
    """Return docs/results.md."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    found = [(experiment, saved[experiment.name]) for experiment in EXPERIMENTS if experiment.name in saved]
    return environment.get_template("results.md.jinja").render(
        found=found,
        names=NAMES,
        show=show,
        number=number,
        counted=lambda found, task: counted(found, task_class(task).unit),
        verdict=verdict,
        missing=[experiment.title for experiment in EXPERIMENTS if experiment.name not in saved],
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
