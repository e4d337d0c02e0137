"""docs/api.md: the Python API, from the signatures and docstrings of `esm_neuron/api.py`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "esm_neuron" / "api.py"
NAMES = ("train", "load", "Run", "predict", "evaluate", "embed", "score", "export")


def page() -> str:
    """Return the whole page."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    found = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    lines = ["# Python API", "Made from `esm_neuron/api.py` by `make pages`.", "", *text(ast.get_docstring(tree) or "")]
    lines += ["", "Settings are those of [settings.md](settings.md)."]
    for name in NAMES:
        node = found[name]
        lines += ["", f"## {name}", *(of_class(node) if isinstance(node, ast.ClassDef) else of_function(node))]
    return "\n".join(lines) + "\n"


def of_class(node: ast.ClassDef) -> Iterator[str]:
    """Yield the lines about a class: its docstring, then each public property and method."""
    yield from text(ast.get_docstring(node) or "")
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
            yield from ("", f"### {node.name}.{each.name}", *of_function(each))


def of_function(node: ast.FunctionDef) -> Iterator[str]:
    """Yield the lines about a function: its signature unless it is a property, and its docstring."""
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    if not marks & {"property", "cached_property"}:
        arguments = re.sub(r"^self(, )?", "", ast.unparse(node.args))
        yield from (
            "```python",
            f"{node.name}({arguments}) -> {ast.unparse(node.returns or ast.Constant(None))}",
            "```",
        )
    yield from text(ast.get_docstring(node) or "")


def text(docstring: str) -> Iterator[str]:
    """Yield the lines of a docstring as Markdown: indented code in a fence, arguments as a list."""
    body, _, arguments = docstring.partition("\nArgs:\n")
    indented = re.compile(r"\n\n((?:    .*\n|\n)+)(?=\S|\Z)")
    fenced = indented.sub(lambda code: f"\n\n```python\n{outdented(code[1])}\n```\n", f"{body}\n")
    yield from fenced.rstrip().split("\n")
    items = re.sub(r"\n {8}", " ", arguments.rstrip())
    if items:
        yield ""
    yield from (re.sub(r"^ {4}(\*{0,2}\w+):", r"- `\1`:", line) for line in items.split("\n") if line.strip())


def outdented(code: str) -> str:
    """Return indented code without the indent."""
    return re.sub(r"^ {4}", "", code.rstrip(), flags=re.MULTILINE)
