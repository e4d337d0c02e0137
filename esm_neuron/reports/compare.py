"""Runs on the same test proteins beside each other: paired differences, curves, and the settings that differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from esm_neuron import __version__
from esm_neuron.config import require, settings
from esm_neuron.errors import ConfigError
from esm_neuron.files import check_ours, note, write_text
from esm_neuron.metrics import Scores
from esm_neuron.metrics.text import Shown, counted, drawn_over, name_of, show
from esm_neuron.metrics.verdict import compare, signed
from esm_neuron.reports import charts
from esm_neuron.reports.charts import COLOURS, Chart
from esm_neuron.reports.html import SPLITS, environment
from esm_neuron.run_dir import RESAMPLES, Finished, load_resamples, read_finished
from esm_neuron.tasks import task_class
from esm_neuron.tasks.base import Task

MOST = 12
"""Runs on a page: of more, no curve could be told from the others."""
Runs = Mapping[str, Finished]


def write_comparison(folders: Sequence[Path], page: Path) -> Path:
    """Write one HTML page about finished runs of one task on the same held-out proteins; return it.

    Raise ConfigError where they cannot be compared, and as `run_dir.read_finished` does.
    """
    require(2 <= len(folders) <= MOST, f"{len(folders)} runs to compare; name 2 to {MOST}")
    runs = dict(zip(_names(folders), map(read_finished, folders), strict=True))
    split = _check(runs)
    check_ours(page.parent, [page.name])
    task = task_class(next(iter(runs.values())).cfg.task.name)
    scores = {name: _scores(name, run, split) for name, run in runs.items()}
    drawn = [chart for chart in _curves(runs) if chart is not None]
    first = next(iter(scores.values()))
    text = environment().get_template("compare.html.jinja").render(
        title=f"{len(runs)} runs · {task.summary}",
        split=SPLITS[split],
        scored=counted(first, task.unit),
        over=drawn_over(first),
        names=list(runs),
        metrics=_metrics(scores, task),
        metric=name_of(task.metric),
        pairs=[(one, [_pair(scores[one], scores[other], task) if one != other else None for other in runs])
               for one in runs],
        charts=[(chart, Markup(chart.svg)) for chart in drawn],  # noqa: S704 - matplotlib has escaped its texts
        settings=_differing(runs),
        colours=COLOURS,
        version=__version__,
    )  # fmt: skip
    page.parent.mkdir(parents=True, exist_ok=True)
    note(page.parent, [page.name])
    write_text(page, text)
    return page


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders without what they share at their beginning."""
    whole = [os.path.realpath(folder) for folder in folders]
    require(len(set(whole)) == len(whole), "a run is named twice; name each once")
    start = os.path.commonpath(whole)
    return [os.path.relpath(folder, start) for folder in whole]


def _check(runs: Runs) -> str:
    """Return the split that all runs were scored on. Raise ConfigError where they cannot be compared."""
    (first, one), *others = runs.items()
    split = next((split for split in SPLITS if one.result.get(split)), None)
    if split is None:
        raise ConfigError(f"{one.folder}: no proteins were held out, so there is nothing to compare")
    for name, run in runs.items():
        kept = split in run.predictions
        cure = f"train it with the same proteins and log.predictions=true, or leave {name} out"
        require(bool(run.result.get(split)) and kept, f"{run.folder}: no predictions for {split} proteins; {cure}")
    for name, run in others:
        pair = f"{first} and {name} cannot be compared:"
        for what, mine, theirs in (("tasks", one.cfg.task.name, run.cfg.task.name),
                                   ("classes", one.cfg.task.labels, run.cfg.task.labels)):  # fmt: skip
            require(mine == theirs, f"{pair} they have different {what}, {mine!s:.200} and {theirs!s:.200}")
        own, other = (_proteins(each, split) for each in (one, run))
        shared = len(own.keys() & other.keys())
        what = f"{len(own)} and {len(other)} {split} proteins, of which they share {shared}"
        cure = "give both the same data.test file, or the same split column, data.sample and data.sample_seed"
        require(own.keys() == other.keys(), f"{pair} they have {what}; {cure}")
        require(list(own) == list(other), f"{pair} their {split} proteins are in another order; {cure}")
        wrong = next((key for key in own if own[key] != other[key]), None)
        what = f"{wrong!r} has another label, or other hidden residues, in each"
        require(wrong is None, f"{pair} {what}; {cure}, and the same task.mask_probability or mask_rates")
        units = [each.result[split].get("n_clusters") for each in (one, run)]
        require(units[0] == units[1], f"{pair} their intervals draw other units; train both with one data.homologs")
    return split


def _proteins(run: Finished, split: str) -> dict[str, Any]:
    """Return the held-out proteins of a run: name -> label, or the number of residues that were hidden."""
    table = run.predictions[split]
    column = next((name for name in ("target", "hidden") if name in table.column_names), "id")
    return dict(zip(table["id"].to_pylist(), table[column].to_pylist(), strict=True))


def _scores(name: str, run: Finished, split: str) -> Scores:
    """Return the metrics of a run with those of every resample."""
    drawn = load_resamples(run.folder, split)
    cure = "an earlier version trained it; score it again: esm-neuron train --config RUN/config.yaml --resume auto"
    require(bool(drawn), f"{run.folder}: no {RESAMPLES} there for {split} proteins; {cure}")
    return Scores(run.result[split], drawn)


def _metrics(scores: Mapping[str, Scores], task: type[Task]) -> list[tuple[str, list[Shown]]]:
    """Return a row per metric, the task's own first."""
    first = next(iter(scores.values()))
    names = [name for name in dict.fromkeys((task.metric, *task.compared, "loss")) if name in first]
    return [(show(first, name).name, [show(each, name) for each in scores.values()]) for name in names]


def _pair(one: Scores, other: Scores, task: type[Task]) -> tuple[str, str, str] | None:
    """Return how a run differs from another: the difference, its interval, the verdict; None where it is undefined."""
    found = compare(one, other, task.metric, task.greater_is_better)
    if found is None:
        return None
    bounds: Any = found["difference_ci"]
    shown = "" if bounds is None else f"[{signed(bounds[0])}, {signed(bounds[1])}]"
    return signed(float(found["difference"])), shown, str(found["verdict"])  # type: ignore[arg-type]


def _curves(runs: Runs) -> list[Chart | None]:
    """Return the losses of training and validation, and the metric that chose the weights, of all runs together."""
    metric = next(iter(runs.values())).result["metric"]
    logs = {name: run.log for name, run in runs.items()}
    return [
        charts.together(logs, "loss", None, "Training loss"),
        charts.together(logs, "loss", "valid", "Validation loss"),
        None if metric == "loss" else charts.together(logs, metric, "valid", f"Validation {name_of(metric)}"),
    ]


def _differing(runs: Runs) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, with the value in each."""
    plain = [_flat("", settings.plain(run.cfg)) for run in runs.values()]
    names = [name for name in plain[0] if name != "output" and len({str(each.get(name)) for each in plain}) > 1]
    return [(name, [str(each.get(name)) for each in plain]) for name in names]


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: one for name, inner in value.items() for key, one in _flat(f"{prefix}.{name}".strip("."), inner).items()
    }
