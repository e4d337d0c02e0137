"""The example notebooks run from top to bottom, without a network, and are kept with the outputs that they give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = {
    "notebook": ["largest difference of a probability", "| accuracy |"],
    "fasta": ["faults: none", ">O02051 label=Membrane p_Membrane=0."],
    "sagemaker": ["cost: at most 3.04 dollars", "model.tar.gz"],
}
"""Notebook -> what its prints hold."""
LEFT = {"notebook": "run/report/index.html", "fasta": "answers.fasta", "sagemaker": "model.tar.gz"}
"""Notebook -> a file that it has written at its end."""
PICTURES = {"notebook": 4, "fasta": 1, "sagemaker": 0}


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> set[tuple[str, ...]]:
    """What a cell shows: prints, tables, pictures; not what goes to stderr, which differs from machine to machine."""
    shown = [output for output in cell.outputs if output.get("name") != "stderr"]
    return {(output.output_type, *sorted(output.get("data", {}))) for output in shown}


def text(cells: list[Any]) -> str:
    return "".join(output.text for cell in cells for output in cell.outputs if output.output_type == "stream")


@pytest.mark.parametrize("name", SAID)
def test_a_notebook_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what it writes goes with the test
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    kept = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    for cell in code(notebook):
        cell.outputs = []
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    assert [kinds(cell) for cell in code(kept)] == [kinds(cell) for cell in code(notebook)], "outputs of older code"
    for cells in (code(kept), code(notebook)):
        assert all(words in text(cells) for words in SAID[name])
        pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == PICTURES[name]
    assert list(tmp_path.glob(f"esm-neuron-*/{LEFT[name]}"))


@pytest.mark.parametrize("name", SAID)
def test_what_is_kept_is_valid_and_names_no_place_of_a_machine(name: str) -> None:
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert "colab.research.google.com" in notebook.cells[0].source
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = json.dumps([cell.outputs for cell in code(notebook)])
    assert re.search(r"/(tmp|home|root|work|usr)/", outputs) is None
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < 400_000
