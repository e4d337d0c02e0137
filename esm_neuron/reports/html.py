"""The page: what a run has left is put in order, drawn and written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from esm_neuron import __version__
from esm_neuron.config import settings
from esm_neuron.files import new_folder
from esm_neuron.metrics.text import NAMES, Shown, clean_of, counted, leak_text, show, shown, trained_text, verdict
from esm_neuron.reports import charts
from esm_neuron.reports.charts import COLOURS, Chart, save_png
from esm_neuron.reports.views import View, view
from esm_neuron.run_dir import REJECTED, REPORT, Finished, read_finished

PAGE = "index.html"
SPLITS = {"test": "test", "valid": "validation"}
"""Split -> its name for people; the first that a run has is the one that charts are of."""


@dataclass(frozen=True)
class Table:
    """Figures of a split beside each other."""

    title: str
    note: str
    columns: list[str]
    rows: list[tuple[str, list[Shown]]]
    """Name of a figure, and a cell a column."""


def write_report(run: Path) -> Path:
    """Write OUT/report/index.html, which asks for nothing outside itself, and a PNG a chart beside it.

    Args:
        run: output folder of a finished run.

    Returns:
        The page. An older report is replaced whole.

    Raises:
        ConfigError: `run` is no run, or has not finished.
        CheckpointError: one of its files is damaged.
    """
    finished = read_finished(run)
    split = next((split for split in SPLITS if finished.result.get(split)), None)
    found = None
    if split in finished.predictions:
        found = view(finished.cfg.task.name, finished.cfg.task.labels or (), finished.predictions[split])
    drawn = list(_charts(finished, split, found))
    text = _render(finished, split, found, drawn)
    with new_folder(run / REPORT) as aside:
        (aside / PAGE).write_text(text, encoding="utf-8")
        for chart in drawn:
            save_png(chart, aside)
    return run / REPORT / PAGE


def _charts(finished: Finished, split: str | None, found: View | None) -> Iterator[Chart]:
    """Every chart that the run has something for, in the page's order."""
    result, task = finished.result, finished.cfg.task
    log, chosen, labels = finished.log, result["chosen_step"], task.labels or ()
    curves = [charts.loss_curve(log, chosen), charts.metric_curve(log, chosen, result["metric"])]
    yield from (chart for chart in curves if chart is not None)
    if split is None:
        return
    metrics, several = result[split], task.name == "multi_label"
    baselines = _baselines(finished, split)
    compared = [name for name in _order(metrics, result["metric"]) if name in COMPARED[task.name]]
    if baselines and compared:
        yield charts.comparison(metrics, baselines, compared)
    unit = "residues" if task.name == "residue_classification" else "proteins"
    if metrics.get("per_class"):
        yield charts.class_bars(metrics["per_class"], unit)
    if found is None:
        return
    if found.confusion is not None:
        yield charts.confusion(found.confusion, labels, unit, several)
    if found.values is not None and len(found.residues):
        yield charts.scatter(*found.values)
        yield charts.residuals(*found.values)
    if found.spread is not None and len(found.spread):
        yield charts.spread(found.spread)
    reliability = None if found.confidence is None else charts.calibration(found.confidence, several)
    yield from (chart for chart in (reliability, charts.length_chart(found)) if chart is not None)


COMPARED = {
    "sequence_classification": {"accuracy", "balanced_accuracy", "mcc", "macro_f1", "auroc", "auprc"},
    "multi_label": {"subset_accuracy", "macro_f1", "micro_f1", "auroc", "auprc"},
    "regression": {"spearman", "pearson"},
    "residue_classification": {"accuracy", "balanced_accuracy", "mcc", "macro_f1", "auroc", "auprc"},
    "masked_lm": {"perplexity"},
}
"""Task -> figures of one scale, so that they can share an axis."""


def _order(metrics: dict[str, Any], metric: str) -> list[str]:
    """Names of the figures that are defined, the one that chose the weights first and the loss of others last."""
    names = [figure.key for figure in shown(metrics) if figure.value is not None]
    return sorted(names, key=lambda name: (name != metric, name == "loss"))


def _baselines(finished: Finished, split: str) -> dict[str, dict[str, Any]]:
    return dict((finished.result.get("baselines") or {}).get(split, {}))


def _render(finished: Finished, split: str | None, found: View | None, drawn: list[Chart]) -> str:
    cfg, result, metric = finished.cfg, finished.result, finished.result["metric"]
    metrics = result[split] if split else {}
    rejected = finished.folder / REJECTED
    template = environment().get_template("report.html.jinja")
    return template.render(
        title=f"{cfg.task.name.replace('_', ' ')} · {Path(cfg.model.name).name}",
        folder=finished.folder.resolve().name,
        cfg=cfg,
        result=result,
        trained=trained_text(cfg.adapter),
        split=split and SPLITS[split],
        scored=counted(metrics, cfg.task.name) if split else "",
        tiles=[show(metrics, name) for name in _order(metrics, metric)[:4]],
        verdict=verdict(metrics, _baselines(finished, split), metric) if split else "",
        leaks=leak_text(result, split) if split else "",
        kept=found is not None,
        charts=[(chart, Markup(chart.svg)) for chart in drawn],  # noqa: S704 - matplotlib has escaped its texts
        tables=list(_tables(finished)),
        per_class=_per_class(metrics),
        worst=found.worst if found is not None else [],
        settings=settings.dump(cfg),
        rejected=len(rejected.read_text(encoding="utf-8").splitlines()) - 1 if rejected.is_file() else 0,
        colours=COLOURS,
        version=__version__,
    )


def _tables(finished: Finished) -> Iterator[Table]:
    """The figures of each split, and where some of its rows have homologs in training, of the others alone."""
    result = finished.result
    for split, name in SPLITS.items():
        if result.get(split):
            yield _table(finished, f"{name.capitalize()} rows", result[split], _baselines(finished, split))
        if split in (result.get("clean") or {}):
            title = f"{name.capitalize()} rows {clean_of(result, split)}"
            yield _table(finished, title, result["clean"][split], result["clean_baselines"].get(split, {}))


def _table(finished: Finished, title: str, metrics: dict[str, Any], baselines: dict[str, Any]) -> Table:
    everyone = [metrics, *baselines.values()]
    rows = [(NAMES.get(own.key, own.key), [show(each, own.key) for each in everyone]) for own in shown(metrics)]
    sampled = [f"{name} on {values['fitted_on']:,} of {values['training']:,}" for name, values in baselines.items()
               if values.get("fitted_on", 0) < values.get("training", 0)]  # fmt: skip
    note = f"Baselines fitted on a sample of the training rows: {', '.join(sampled)}." if sampled else ""
    scored = f"{title}: {counted(metrics, finished.cfg.task.name)}"
    return Table(scored, note, ["this model", *baselines], rows)


def _per_class(metrics: dict[str, Any]) -> list[tuple[str, int, list[Shown]]]:
    """Class, its rows, and its F1, AUROC and AUPRC."""
    names = ("f1", "auroc", "auprc")
    return [
        (name, values["n"], [show(values, figure) for figure in names])
        for name, values in (metrics.get("per_class") or {}).items()
    ]


def environment() -> Environment:
    """Fills the templates of this folder: every value is escaped, so none can become markup, and an unknown name is an
    error. In Markdown values are written `{{ value | text }}`."""
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
    """Text on one line that Markdown, and HTML within it, leave as it is."""
    safe = str(escape(" ".join(str(value).split())))
    return Markup(re.sub(r"([\\`*_\[\]|#~])", r"\\\1", safe))  # noqa: S704 - escaped above
