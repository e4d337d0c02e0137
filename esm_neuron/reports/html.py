"""The report: read a finished run, draw its charts and write one HTML page."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from esm_neuron import __version__
from esm_neuron.config import AdapterConfig, settings
from esm_neuron.errors import CheckpointError
from esm_neuron.files import check_ours, count_lines, new_folder, note, write_bytes, write_text
from esm_neuron.metrics.classification import THRESHOLD
from esm_neuron.metrics.text import Shown, clean_of, counted, drawn_over, leak_text, reading_text, show, shown
from esm_neuron.reports import charts
from esm_neuron.reports.advice import next_steps
from esm_neuron.reports.charts import COLOURS, Chart
from esm_neuron.run_dir import CONFIG, REJECTED, REPORT, RESULT, Finished, read_finished
from esm_neuron.tasks import create_task
from esm_neuron.tasks.base import Task
from esm_neuron.tasks.view import View

PAGE = "index.html"
MOST_ROWS = 200
"""Classes with a row of their own; of more, the most frequent. result.json has all."""
SPLITS = {"test": "test", "valid": "validation"}  # split -> its name; charts are of the first that a run has


@dataclass(frozen=True)
class Table:
    """Metrics of a split, the model's beside the baselines'."""

    title: str
    note: str
    columns: list[str]
    rows: list[tuple[str, list[Shown]]]  # name of a metric, and one cell per column


_MISFIT = (ArithmeticError, AttributeError, LookupError, MemoryError, NotImplementedError, TypeError, ValueError)
"""What numpy, pyarrow and matplotlib raise where columns are missing, of another type, or of another length."""


def write_report(run: Path) -> Path:
    """Write report/index.html, which loads nothing from elsewhere, and one PNG per chart beside it; return the page.

    `run` is the output folder of a finished run. An older report is replaced whole; where others put files there, that
    is a ConfigError. Raises as `read_finished` does besides.
    """
    finished = read_finished(run)
    check_ours(run, [REPORT])
    note(run, [])
    split = next((split for split in SPLITS if finished.result.get(split)), None)
    task = create_task(finished.cfg.task, finished.cfg.task.labels or ())
    try:
        found = task.view(finished.predictions[split]) if split in finished.predictions else None
        drawn = list(_charts(finished, task, split, found))
        text = _render(finished, task, split, found, drawn)
    except _MISFIT as error:
        raise CheckpointError(
            f"{run}: its predictions, {RESULT} and {CONFIG} do not fit each other ({error!r}); train again, or remove "
            "the predictions"
        ) from error
    with new_folder(run / REPORT) as aside:
        write_text(aside / PAGE, text)
        for chart in drawn:
            write_bytes(aside / f"{chart.name}.png", chart.png)
    return run / REPORT / PAGE


def _charts(finished: Finished, task: Task, split: str | None, found: View | None) -> Iterator[Chart]:
    """Yield every chart that the run has data for, in the page's order."""
    result, log, chosen = finished.result, finished.log, finished.result["chosen_step"]
    curves = [charts.loss_curve(log, chosen), charts.metric_curve(log, chosen, result["metric"])]
    yield from (chart for chart in curves if chart is not None)
    if split is None:
        return
    metrics, baselines = result[split], _baselines(finished, split)
    compared = [name for name in _order(metrics, result["metric"]) if name in task.compared]
    if baselines and compared:
        yield charts.comparison(metrics, _best(baselines, task), compared)
    if metrics.get("per_class"):
        yield charts.class_bars(metrics["per_class"], task.unit)
    if found is None:
        return
    if found.confusion is not None:
        yield charts.confusion(found.confusion, task.labels, task.unit, found.several)
    if found.curves:
        yield charts.ranking(found.curves, _thresholds(result, task, found))
    if found.values is not None and len(found.residues):
        yield charts.scatter(*found.values)
        yield charts.residuals(*found.values)
    if found.spread is not None and len(found.spread):
        yield charts.spread(found.spread)
    reliability = None if found.confidence is None else charts.calibration(found.confidence, found.several)
    yield from (chart for chart in (reliability, charts.length_chart(found)) if chart is not None)


def _thresholds(result: dict[str, Any], task: Task, found: View) -> dict[int, float]:
    """Return what decides for a class, by its number: of two the second; of several labels each its own."""
    chosen = (result.get("calibration") or {}).get("thresholds") or [THRESHOLD] * len(task.labels)
    if found.several:
        return dict(enumerate(chosen))
    return {1: float(chosen[0])} if len(task.labels) == 2 else {}


def _best(baselines: dict[str, dict[str, Any]], task: Task) -> dict[str, dict[str, Any]]:
    """Return the baselines that a chart has room for: the best by the task's metric, in their order."""
    sign = 1 if task.greater_is_better else -1
    known = {name: values for name, values in baselines.items() if values.get(task.metric) is not None}
    best = sorted(known, key=lambda name: sign * known[name][task.metric], reverse=True)[: charts.MOST_BASELINES]
    return {name: values for name, values in baselines.items() if name in best}


def _order(metrics: dict[str, Any], metric: str) -> list[str]:
    """Return the metrics that are defined, the one that chose the weights first and any other's loss last."""
    names = [one.key for one in shown(metrics) if one.value is not None]
    return sorted(names, key=lambda name: (name != metric, name == "loss"))


def _baselines(finished: Finished, split: str) -> dict[str, dict[str, Any]]:
    return dict((finished.result.get("baselines") or {}).get(split, {}))


def _render(finished: Finished, task: Task, split: str | None, found: View | None, drawn: list[Chart]) -> str:
    cfg, result, metric = finished.cfg, finished.result, finished.result["metric"]
    metrics = result[split] if split else {}
    rejected = finished.folder / REJECTED
    per_class = metrics.get("per_class") or {}
    order = sorted(per_class, key=lambda name: -int(per_class[name]["n"]))[:MOST_ROWS]
    frequent = [(name, values) for name, values in per_class.items() if name in set(order)]
    template = environment().get_template("report.html.jinja")
    return template.render(
        title=f"{cfg.task.name.replace('_', ' ')} · {Path(cfg.model.name).name}",
        folder=finished.folder.resolve().name,
        cfg=cfg,
        result=result,
        trained=trained_text(cfg.adapter),
        split=split and SPLITS[split],
        scored=counted(metrics, task.unit) if split else "",
        tiles=[show(metrics, name) for name in _order(metrics, metric)[:4]],
        verdict=(result.get("verdicts") or {}).get(split, {}),
        alarms=(result.get("alarms") or {}).get(split, []),
        leaks=leak_text(result, split) if split else "",
        reading=reading_text(result).replace("`", ""),
        kept=split in finished.predictions,
        charts=[(chart, Markup(chart.svg)) for chart in drawn],  # noqa: S704 - matplotlib has escaped its texts
        tables=list(_tables(finished, task)),
        per_class=[
            (name, values["n"], [show(values, kind) for kind in ("f1", "auroc", "auprc")]) for name, values in frequent
        ],
        more_classes=len(per_class) - len(frequent),
        listed=found.worst if found is not None else [],
        script=Markup(_script()),  # noqa: S704 - a file of this package
        policy=_digest(_script()),
        made=finished.made,
        followed=[url for each in finished.trackers.values() if (url := each["url"] or "").startswith("http")],
        counts=_counts(result),
        next_steps=next_steps(finished.cfg, result, finished.folder),
        settings=settings.dump(cfg),
        rejected=count_lines(rejected) - 1 if rejected.is_file() else 0,
        colours=COLOURS,
        version=__version__,
    )


def _script() -> str:
    """Return what sorts and searches the table of proteins, without a network."""
    return environment().get_template("table.js").render()


def _digest(script: str) -> str:
    """Return what a page's policy calls a script by, so that it runs no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _counts(result: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Return each class with how many proteins, or residues, each split has of it; the most frequent ones."""
    splits = [size.get("classes") or {} for size in result["data"].values()]
    order = sorted(splits[0], key=lambda name: -int(splits[0][name]))[:MOST_ROWS] if splits and all(splits) else []
    return [(name, [int(split.get(name, 0)) for split in splits]) for name in order]


def _tables(finished: Finished, task: Task) -> Iterator[Table]:
    """Yield the metrics of each split and, if some of its proteins have homologs in training, of the others alone."""
    result = finished.result
    for split, name in SPLITS.items():
        if result.get(split):
            yield _table(task, f"{name.capitalize()} set", result[split], _baselines(finished, split))
        if split in (result.get("clean") or {}):
            title = f"{name.capitalize()} set {clean_of(result, split)}"
            yield _table(task, title, result["clean"][split], (result.get("clean_baselines") or {}).get(split, {}))


def _table(task: Task, title: str, metrics: dict[str, Any], baselines: dict[str, Any]) -> Table:
    everyone = [metrics, *baselines.values()]
    rows = [(own.name, [show(each, own.key) for each in everyone]) for own in shown(metrics)]
    sampled = [f"{name} on {values['fitted_on']:,} of {values['training']:,}" for name, values in baselines.items()
               if values.get("fitted_on", 0) < values.get("training", 0)]  # fmt: skip
    note = f"In brackets: 95 % bootstrap intervals over {drawn_over(metrics)}."
    note += f" Baselines fitted on a sample of the training set: {', '.join(sampled)}." if sampled else ""
    return Table(f"{title}: {counted(metrics, task.unit)}", note, ["this model", *baselines], rows)


def trained_text(adapter: AdapterConfig) -> str:
    """Say what of a model was trained, such as `LoRA` or `QLoRA (nf4)`."""
    if adapter.kind == "qlora":
        return f"QLoRA ({adapter.quantization})"
    known = {"none": "full fine-tuning", "head": "head only", "lora": "LoRA", "probe": "linear probe"}
    return known[adapter.kind]


def environment() -> Environment:
    """Return what fills the templates of this folder: every value is escaped, so none can become markup, and an unknown
    name is an error. In Markdown values are written `{{ value | text }}`."""
    made = Environment(
        loader=PackageLoader("esm_neuron.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["text"] = markdown
    return made


def markdown(value: object) -> Markup:
    """Return text on one line that Markdown, and HTML within it, leave as it is."""
    safe = str(escape(" ".join(str(value).split())))
    return Markup(re.sub(r"([\\`*_\[\]|#~])", r"\\\1", safe))  # noqa: S704 - escaped above
