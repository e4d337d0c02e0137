"""The charts of a report, each drawn from plain arrays."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from esm_neuron.metrics.reliability import Group, group_means, reliability
from esm_neuron.metrics.text import Shown, drawn_over, name_of, show
from esm_neuron.tasks.view import Confidence, Confusion, Curve, View

SIZE = (4.7, 3.0)  # of a plain chart in inches
MOST_CLASSES = 30  # with a bar each; of more, the most frequent
MOST_CELLS = 14  # classes of a confusion matrix that has its numbers written in the cells
MOST_BASELINES = 3  # beside the model; of more, the best by its metric
MOST_POINTS = 5_000  # of a scatter plot: more would make a page of many megabytes
_MOST_ENDS = 400  # points of a curve: more cannot be told apart
LENGTH_BINS, LEAST_RECORDS = 8, 10  # most bins of length, and about how many records each has at least


def loss_curve(log: Sequence[Mapping[str, Any]], chosen: int) -> Chart | None:
    """Draw the loss over steps, of training and validation; None where nothing was logged."""
    train, valid = _series(log, "loss", None), _series(log, "loss", "valid")
    if not train[0] and not valid[0]:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(*train, color=THIRD, lw=0.7, alpha=0.35)
        axes.plot(train[0], smoothed(train[1]), color=THIRD, label="training")
        if valid[0]:
            axes.plot(*valid, "o-", ms=3.5, color=ACCENT, label="validation")
        _steps(axes, chosen)
        axes.set_ylabel("loss")
        axes.legend()

    caption = (
        "Loss over optimizer steps. Training: on the packs of each step (pale), and a running median of it. "
        f"Validation: on all validation proteins. The dotted line is step {chosen}, whose weights were kept."
    )
    return draw("loss", "Loss", caption, SIZE, paint)


def metric_curve(log: Sequence[Mapping[str, Any]], chosen: int, metric: str) -> Chart | None:
    """Draw the metric that chose the weights over steps; None where it is the loss, or there is no validation."""
    points = _series(log, metric, "valid")
    if metric == "loss" or not points[0]:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(*points, "o-", ms=3.5, color=ACCENT)
        _steps(axes, chosen)
        axes.set_ylabel(f"validation {name_of(metric)}")

    caption = f"{name_of(metric)} on the validation proteins, which chose the weights of step {chosen} (dotted)."
    return draw("metric", f"Validation {name_of(metric)}", caption, SIZE, paint)


def together(logs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, split: str | None, title: str) -> Chart | None:
    """Draw what the logs of several runs say of a metric; None where fewer than two have it. `split` None: training."""
    series = {run: points for run, log in logs.items() if (points := _series(log, name, split))[0]}
    if len(series) < 2:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        colours = [ACCENT, SECOND, THIRD, INK]
        for number, (run, (steps, values)) in enumerate(series.items()):
            look: Any = {"color": colours[number % 4], "ls": ("-", "--", ":")[number // 4 % 3]}
            axes.plot(steps, smoothed(values) if split is None else values, label=_short(run), **look)
        axes.set(xlabel="optimizer step", ylabel=name_of(name))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=3)

    what = "a running median over the packs of each step" if split is None else "on all validation proteins"
    return draw(f"{split or 'train'}-{name}", title, f"{name_of(name)} over optimizer steps, {what}.", SIZE, paint)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Return the running median over a tenth of the values, at most 51 of them: single steps drown a curve."""
    half = min(len(values) // 20, 25)
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def comparison(metrics: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Chart:
    """Draw the model beside at most MOST_BASELINES baselines, one row per metric."""
    models = {"this model": metrics, **baselines}
    colours = [ACCENT, *[SECOND, THIRD, MUTED][: len(baselines)]]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for m, ((model, values), colour) in enumerate(zip(models.items(), colours, strict=True)):
            places = np.arange(len(names)) + (m - (len(models) - 1) / 2) * 0.22
            points = [(place, show(values, name)) for place, name in zip(places, names, strict=True)]
            _dots(axes, [(place, point) for place, point in points if point.value is not None], colour, model)
        axes.set_yticks(range(len(names)), [show(metrics, name).name for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper center", ncols=min(len(models), 3))

    caption = (
        f"This model and its best baselines on the same proteins, with 95 % bootstrap intervals over "
        f"{drawn_over(metrics)}."
    )
    return draw("comparison", "Beside baselines", caption, (SIZE[0], 1.1 + 0.42 * len(names)), paint)


def confusion(found: Confusion, names: Sequence[str], unit: str, several: bool) -> Chart:
    """Draw targets against predictions; cells are shaded by their share of the row."""
    left_out = len(names) - len(found.classes)
    names = [names[c] for c in found.classes]
    share = np.divide(found.counts, found.totals[:, None], out=np.zeros_like(found.counts),
                      where=found.totals[:, None] > 0)  # fmt: skip
    crowd = sum(len(_short(name)) for name in names)
    side = float(np.clip(1.6 + 0.3 * len(names), 2.8, 7.5))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for row, column in np.argwhere(found.counts).tolist():
            part = share[row, column]
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=ACCENT, alpha=0.65 * part, lw=0))
            if len(names) <= MOST_CELLS:
                large = len(names) <= 4
                text = f"{found.counts[row, column]:,.0f}" + (f"\n{part:.0%}" if large else "")
                axes.text(column, row, text, ha="center", va="center", color=INK, size=9.5 if large else 6.5)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), xlabel="predicted", ylabel="target")
        axes.set_xticks(range(len(names)), [_short(n) for n in names], rotation=0 if crowd <= 26 else 90)
        axes.set_yticks(range(len(names)), [_short(n) for n in names])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(True)

    title = "Predictions by label" if several else "Confusion matrix"
    caption = f"{unit.capitalize()} of each class (row) by the predicted class (column). Shade: share of the row."
    if several:
        caption = (
            "Of the proteins that have a label (row), how many were predicted to have each label (column). A protein "
            "with several labels counts in several rows and columns, so only the diagonal is right for certain."
        )
    if left_out:
        caption += f" The {left_out:,} rarest classes are left out."
    return draw("confusion", title, caption, (side + 1.2, side), paint)


def class_bars(per_class: Mapping[str, Mapping[str, Any]], unit: str) -> Chart:
    """Draw F1 of each class with its interval; of very many classes the most frequent ones."""
    order = sorted(per_class, key=lambda name: -int(per_class[name]["n"]))[:MOST_CLASSES]
    scores = [show(per_class[name], "f1") for name in order]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        bars = [(place, score) for place, score in enumerate(scores) if score.value is not None]
        places, values = [place for place, _ in bars], [score.value or 0.0 for _, score in bars]
        axes.barh(places, values, 0.62, color=ACCENT, alpha=0.45)
        _dots(axes, bars, INK, None)
        axes.set_yticks(range(len(order)), [f"{_short(name)}  n = {per_class[name]['n']:,}" for name in order])
        axes.set(xlim=(0, 1), ylim=(len(order) - 0.4, -0.6), xlabel="F1")
        axes.grid(axis="y", visible=False)

    left_out = len(per_class) - len(order)
    more = f" The {left_out} rarest classes are in the table only." if left_out else ""
    caption = f"F1 of each class against the rest, with 95 % intervals; n counts {unit} of the class.{more}"
    return draw("classes", "Classes", caption, (SIZE[0], max(SIZE[1], 1.0 + 0.3 * len(order))), paint)


def calibration(found: Confidence, several: bool) -> Chart | None:
    """Draw the reliability diagram with the expected calibration error; None without predictions."""
    seen = reliability(found.probability, found.right, found.protein)
    if seen is None:
        return None
    what = "labels that are there" if several else "predictions that are right"

    def paint(figure: Figure) -> None:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        axes.plot([0, 1], [0, 1], color=THIRD, lw=1, ls=":")
        axes.plot(seen.confidence, [group.mean for group in seen.right], color=ACCENT)
        _bars_up(axes, seen.confidence, seen.right)
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel=f"share of {what}")
        axes.text(0.04, 0.9, f"ECE {seen.ece:.3f}", transform=axes.transAxes, color=INK, weight="bold")
        below.bar(seen.confidence, [group.rows for group in seen.right], 0.05, color=THIRD)
        below.set(xlabel="predicted probability", ylabel="count")
        below.yaxis.set_major_locator(MaxNLocator(2, integer=True))

    given = "each label's probability" if several else "the probability of the predicted class"
    caption = (
        f"Share of {what} by {given}, in 10 bins with 95 % intervals over proteins. Calibrated probabilities "
        f"lie on the dotted line. Expected calibration error (ECE): {seen.ece:.3f}."
    )
    return draw("calibration", "Calibration", caption, (SIZE[0], 3.5), paint)


def ranking(found: Sequence[Curve], thresholds: Mapping[int, float]) -> Chart:
    """Draw ROC and precision-recall curves; a dot is the threshold that decides, by the number of its class."""

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=LINE, lw=1, ls=":")
        for number, curve in enumerate(found):
            colour, line = (ACCENT, SECOND, THIRD)[number % 3], "-" if number < 3 else "--"
            order = np.argsort(-curve.score, kind="stable")
            score, hits = curve.score[order], np.cumsum(curve.truth[order])
            ends = np.flatnonzero(np.append(np.diff(score) != 0, True))  # equal scores are one threshold
            ends = ends[np.unique(np.linspace(0, len(ends) - 1, min(len(ends), _MOST_ENDS)).astype(int))]
            decides = [value for c, value in thresholds.items() if c == curve.number]
            above = [int((score >= value).sum()) - 1 for value in decides if (score >= value).any()]
            for style, at in ((line, ends), ("o", np.array(above, int))):
                recall, false = hits[at] / hits[-1], (at + 1 - hits[at]) / (len(score) - hits[-1])
                left.plot(false, recall, style, color=colour, label=_short(curve.name) if at is ends else None)
                right.plot(recall, hits[at] / (at + 1), style, color=colour)
        left.set(xlim=(0, 1), ylim=(0, 1), xlabel="false positive rate", ylabel="recall")
        right.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision")
        figure.legend(loc="outside upper center", ncols=3)

    alone = len(found) == 1
    caption = f"Left: ROC; right: precision and recall; {'of this class' if alone else 'each class against the rest'}."
    caption += (
        f" Dots are the thresholds that decide{f', here {min(thresholds.values()):.3f}' if alone else ''}."
        * bool(thresholds)
    )
    return draw("ranking", "ROC and precision-recall", caption, SIZE, paint)


def length_chart(found: View) -> Chart | None:
    """Draw errors by sequence length; None where there are too few records, or lengths, for two bins."""
    counted = found.weight > 0
    lengths = found.residues[counted]
    bins = min(len(lengths) // LEAST_RECORDS, LENGTH_BINS)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, bins + 1)))[1:-1] if bins > 1 else np.empty(0)
    if not len(edges):
        return None
    group = np.searchsorted(edges, lengths, side="right")
    groups = group_means(found.error[counted], found.weight[counted], group, len(edges) + 1, np.arange(len(lengths)))
    shown = [(float(np.median(lengths[group == g])), made) for g, made in enumerate(groups) if made is not None]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([x for x, _ in shown], [made.mean for _, made in shown], color=ACCENT)
        _bars_up(axes, [x for x, _ in shown], [made for _, made in shown])
        axes.set(xlabel="residues (median of each bin)", ylabel=found.error_name)
        axes.set_ylim(bottom=0)

    caption = (
        f"{found.error_name.capitalize()} by length of the whole sequence, in {len(shown)} bins of about equally many "
        "proteins, with 95 % intervals over proteins."
    )
    return draw("length", "Length against error", caption, SIZE, paint)


def scatter(target: np.ndarray, predicted: np.ndarray) -> Chart:
    """Draw predictions against targets."""
    rows, note = _few(len(target))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        ends = [float(min(target.min(), predicted.min())), float(max(target.max(), predicted.max()))]
        axes.plot(ends, ends, color=THIRD, lw=1, ls=":")
        axes.plot(target[rows], predicted[rows], "o", ms=3, mew=0, color=ACCENT, alpha=0.5)
        axes.set(xlabel="target", ylabel="prediction")

    caption = f"One point per protein; the dotted line is y = x.{note}"
    return draw("scatter", "Predictions against targets", caption, SIZE, paint)


def residuals(target: np.ndarray, predicted: np.ndarray) -> Chart:
    """Draw errors against predictions, and how they are spread."""
    rows, note = _few(len(target))
    error = predicted - target

    def paint(figure: Figure) -> None:
        axes, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        axes.axhline(0, color=THIRD, lw=1, ls=":")
        axes.plot(predicted[rows], error[rows], "o", ms=3, mew=0, color=ACCENT, alpha=0.5)
        axes.set(xlabel="prediction", ylabel="prediction - target")
        right.hist(error, bins=24, orientation="horizontal", color=THIRD)
        right.set_xlabel("proteins")

    caption = f"Errors by the prediction: above 0 it is too high, below too low. Right: how often they occur.{note}"
    return draw("residuals", "Residuals", caption, SIZE, paint)


def spread(perplexity: np.ndarray) -> Chart:
    """Draw how perplexity is spread over proteins."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.hist(perplexity, bins=30, color=ACCENT, alpha=0.6)
        axes.axvline(20, color=THIRD, lw=1, ls=":")
        axes.set(xlabel="perplexity of the hidden residues", ylabel="proteins")

    caption = "Perplexity per protein. The dotted line is 20: 20 amino acids guessed with equal probability."
    return draw("perplexity", "Perplexity by protein", caption, SIZE, paint)


def _series(log: Sequence[Mapping[str, Any]], name: str, split: str | None) -> tuple[list[int], list[float]]:
    points = [
        (line["step"], line[name])
        for line in log
        if line.get("split") == split and isinstance(line.get(name), (int, float))
    ]
    return [step for step, _ in points], [value for _, value in points]


def _steps(axes: Axes, chosen: int) -> None:
    axes.axvline(chosen, color=SECOND, lw=1, ls=":")
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _dots(axes: Axes, points: Sequence[tuple[float, Shown]], colour: str, label: str | None) -> None:
    """Draw points along x with their intervals, at places along y."""
    for place, point in points:
        if point.interval is not None:
            axes.plot(point.interval, [place, place], color=colour, lw=1.4, solid_capstyle="butt")
    axes.plot([point.value or 0.0 for _, point in points], [place for place, _ in points], "o", ms=4.5, color=colour,
              label=label)  # fmt: skip


def _bars_up(axes: Axes, places: Sequence[float], groups: Sequence[Group]) -> None:
    """Draw points with intervals along y."""
    for place, group in zip(places, groups, strict=True):
        if group.interval is not None:
            axes.plot([place, place], group.interval, color=ACCENT, lw=1.2)
    axes.plot(places, [group.mean for group in groups], "o", ms=4, color=ACCENT)


def _few(rows: int) -> tuple[np.ndarray, str]:
    """Return the rows to draw, and a sentence about the others."""
    if rows <= MOST_POINTS:
        return np.arange(rows), ""
    chosen = np.sort(np.random.default_rng(0).choice(rows, MOST_POINTS, replace=False))
    return chosen, f" {MOST_POINTS:,} of {rows:,} proteins are drawn, chosen at random."


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


COLOURS = {
    "ink": "#1b2430", "muted": "#5b6573", "line": "#d9dee5", "accent": "#2460c4", "second": "#c2530a",
    "third": "#71808f",
}  # fmt: skip
"""Name of a variable of report.css -> its colour in the light theme, which PNGs have. Charts use no other colours."""
INK, MUTED, LINE, ACCENT, SECOND, THIRD = COLOURS.values()

_SETTINGS: Any = {
    "font.size": 8.5, "font.family": "sans-serif", "text.color": INK, "text.parse_math": False,
    "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "axes.linewidth": 0.8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "axes.facecolor": "none",
    "axes.formatter.useoffset": False, "figure.facecolor": "none", "grid.color": LINE, "grid.linewidth": 0.6,
    "legend.frameon": False, "lines.linewidth": 1.6, "xtick.color": LINE, "ytick.color": LINE,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "svg.fonttype": "none", "svg.hashsalt": "esm-neuron",
}  # fmt: skip
_DPI = 180


@dataclass(frozen=True)
class Chart:
    name: str  # of the file, without .png, and of the place in the page
    title: str
    caption: str  # what is shown and how to read it, also for screen readers
    svg: str  # an `<svg>` element whose colours are the page's variables; safe to embed
    png: bytes


def draw(name: str, title: str, caption: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> Chart:
    """Let `paint` fill a figure of `size` (inches) and return it as SVG and PNG.

    Texts are taken as they are: a `$` in a class name begins no formula.
    """
    svg, png = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box in the PNG; the page has the browser's
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return Chart(name, title, caption, _inline(svg.getvalue().decode(), name, caption), png.getvalue())


def _inline(svg: str, name: str, caption: str) -> str:
    """Return matplotlib's file as an element of a page: its own ids, the page's colours and width, no metadata."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    tag, rest = svg.split(">", 1)
    svg = re.sub(r' (width|height)="[^"]*"', "", tag) + ">" + rest
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    label = html.escape(caption, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
