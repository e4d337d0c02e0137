"""How charts look: colours that the page changes with its theme, and a figure as inline SVG and as PNG."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

COLOURS = {
    "ink": "#1b2430", "muted": "#5b6573", "line": "#d9dee5", "accent": "#2460c4", "second": "#c2530a",
    "third": "#71808f",
}  # fmt: skip
"""Name of a variable of page.css -> its colour in the light theme, which PNGs have. Charts use no other colours."""
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
    """A drawn chart."""

    name: str
    """Of the file, without .png, and of the place in the page."""
    title: str
    caption: str
    """What is shown and how to read it, for the page and for who cannot see it."""
    svg: str
    """An `<svg>` element whose colours are the page's variables; safe to embed."""
    png: bytes


def draw(name: str, title: str, caption: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> Chart:
    """Let `paint` fill a figure of `size` (inches) and keep it as SVG and PNG.

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
    """matplotlib's file as an element of a page: its own ids, the page's colours and width, no metadata."""
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


def save_png(chart: Chart, folder: Path) -> None:
    """Write the chart as `name`.png."""
    (folder / f"{chart.name}.png").write_bytes(chart.png)
