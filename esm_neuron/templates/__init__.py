"""Texts with places to fill, and how they are filled."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def environment() -> Environment:
    """Fills the templates of this folder: every value is escaped, so none can become markup, and an unknown name is an
    error. In Markdown values are written `{{ value | text }}`."""
    made = Environment(
        loader=PackageLoader("esm_neuron"),
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
