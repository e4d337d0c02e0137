"""Cross-validation: a run per fold, each in a folder of its own, and the mean and spread of what they reached.

Every protein is tested on once, by a model that has not seen it: each run chooses its checkpoint by validation proteins
among the other folds, and opens its own fold at the end. The spread over folds is no standard error, since folds share
their training proteins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from esm_neuron.config import TrainConfig
from esm_neuron.files import check_ours, claimed, finite, note, read_json, write_json
from esm_neuron.redact import Lines
from esm_neuron.run_dir import FOLDS, RESULT
from esm_neuron.tasks import task_class
from esm_neuron.training import run

Scores = dict[str, dict[str, Any]]
"""Metric -> its mean, standard deviation and values by fold."""


def train_folds(cfg: TrainConfig, log: Callable[[str], None]) -> run.Outcome:
    """Train and test on each fold of `data.folds`; write OUT/fold-1 and so on, and OUT/folds.json.

    With `checkpoint.resume: auto`, finished folds stay as they are. Raise EsmNeuronError as `run.train` does.
    """
    out, writes = Path(cfg.output), os.environ.get("RANK", "0") == "0"
    with claimed(out) if writes else nullcontext():
        if writes:
            check_ours(out, [FOLDS])
        results: list[Mapping[str, Any]] = []
        for number in range(1, int(cfg.data.folds or 0) + 1):
            own = replace(cfg, output=str(out / f"fold-{number}"), data=replace(cfg.data, fold=str(number)))
            finished = Path(own.output) / RESULT
            if cfg.checkpoint.resume == "auto" and finished.is_file():
                results.append(read_json(finished))
                continue
            log(f"fold {number} of {cfg.data.folds}, in {own.output}")
            outcome = run.train(own, log)
            if outcome.stopped_by is not None:
                return outcome
            results.append(outcome.result)
        summary = summarize(results)
        if writes:
            note(out, [FOLDS])
            write_json(out / FOLDS, summary)
            log(render(summary, task_class(cfg.task.name).greater_is_better))
    return run.Outcome(summary, None)


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what folds.json holds, of the folds' results: metrics of the test proteins, ours and the baselines'."""
    first = results[0]
    baselines = first["baselines"].get("test", {})
    summary: dict[str, Any] = finite(
        {
            "task": first["task"],
            "metric": first["metric"],
            "folds": len(results),
            "proteins": [result["data"]["test"]["records"] for result in results],
            "metrics": _scores([result["test"] for result in results]),
            "clean": _scores([result["clean"].get("test", {}) for result in results]),
            "baselines": {
                name: _scores([result["baselines"]["test"].get(name, {}) for result in results]) for name in baselines
            },
        }
    )
    return summary


def _scores(folds: Sequence[Mapping[str, Any]]) -> Scores:
    """Return mean and standard deviation (of a sample, n - 1) of each number that some fold has."""
    found: Scores = {}
    for name in dict.fromkeys(name for fold in folds for name in fold):
        values = [fold.get(name) for fold in folds]
        known = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if known:
            sd = stdev(known) if len(known) > 1 else None
            found[name] = {"mean": mean(known), "sd": sd, "values": values}
    return found


def render(summary: Mapping[str, Any], greater_is_better: bool) -> str:
    """Return a line per contestant: mean, spread and values of the task's metric, and how many folds it wins."""
    metric, own = summary["metric"], summary["metrics"]
    lines = [f"{summary['folds']} folds of {', '.join(map(str, summary['proteins']))} test proteins, {metric}:"]
    for name, scores in {"this model": own, **summary["baselines"]}.items():
        if metric not in scores:
            continue
        values = scores[metric]["values"]
        shown = " ".join("-" if value is None else f"{value:.3f}" for value in values)
        line = f"  {name}: {scores[metric]['mean']:.3f}, sd {scores[metric]['sd'] or 0:.3f} ({shown})"
        if scores is not own:
            pairs = [pair for pair in zip(own[metric]["values"], values, strict=True) if None not in pair]
            won = sum((ours > theirs) if greater_is_better else (ours < theirs) for ours, theirs in pairs)
            line += f"; ours is better in {won} of {len(pairs)}"
        lines.append(line)
    return Lines.of(lines)
