"""The limits of the house: how many rooms, how long a module and a function may be."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "esm_neuron"


def test_there_are_at_most_ten_packages_and_nine_modules_beside_them() -> None:
    assert len([folder for folder in SOURCE.iterdir() if (folder / "__init__.py").is_file()]) <= 10
    assert len(list(SOURCE.glob("*.py"))) <= 9


def test_modules_have_at_most_600_lines_and_functions_fit_on_a_screen() -> None:
    """Of a function 50 lines, its docstring not counted."""
    modules, functions = {}, {}
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        modules[str(file.relative_to(SOURCE))] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                said = len((ast.get_docstring(node, clean=False) or "").splitlines())
                functions[f"{file.name}: {node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1 - said
    assert {name: lines for name, lines in modules.items() if lines > 600} == {}
    assert {name: lines for name, lines in functions.items() if lines > 50} == {}
