"""What the pages name exists: files behind links, settings, tests, functions of the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from esm_neuron.config.settings import known_keys

ROOT = Path(__file__).parents[2]
FOLDERS = ("*.md", "docs/**/*.md", "*/README.md", "*/*/README.md")
PAGES = sorted({page for pattern in FOLDERS for page in ROOT.glob(pattern) if ".venv" not in page.parts})
HISTORY = {"CHANGELOG.md", "decisions.md", "errors.md"}
"""Pages that also name what there was, or what is wrong."""
SECTIONS = "|".join(sorted({key.split(".")[0] for key in known_keys() if "." in key}))
SUFFIXES = ("md", "yaml", "json", "csv", "py", "safetensors")
"""What follows the point in names of files that look like settings."""
TESTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}


def found(page: Path, pattern: str) -> list[tuple[str, ...]]:
    """Return the groups of a pattern, wherever it is found in a page."""
    return [match.groups() for match in re.finditer(pattern, page.read_text(encoding="utf-8"))]


def pages(*without: str) -> pytest.MarkDecorator:
    """Run a test for each page."""
    chosen = [page for page in PAGES if page.name not in without]
    return pytest.mark.parametrize("page", chosen, ids=lambda page: str(page.relative_to(ROOT)))


@pages()
def test_files_behind_links_exist(page: Path) -> None:
    links = {link for (link,) in found(page, r"\]\(([^)#\s]+)") if "://" not in link}
    assert {link for link in links if not (page.parent / link).exists()} == set()


@pages(*HISTORY)
def test_settings_exist(page: Path) -> None:
    named = {name for (name,) in found(page, rf"(?<![\w./])(?:--)?((?:{SECTIONS})\.[a-z_]+)\b(?![./(])")}
    assert {name for name in named if not name.endswith(SUFFIXES)} - set(known_keys()) == set()


@pages(*HISTORY)
def test_tests_exist(page: Path) -> None:
    assert {name for (name,) in found(page, r"\b(test_\w+\.py)\b")} - TESTS.keys() == set()
    named = found(page, r"\b(test_\w+\.py)::(test_\w+)")
    assert [pair for pair in named if f"def {pair[1]}" not in TESTS[pair[0]]] == []


@pages()
def test_functions_of_the_package_exist(page: Path) -> None:
    for file, name in found(page, r"`(\w+/\w+\.py|\w+\.py)::([A-Z]\w*(?:\.\w+)?|[a-z]\w*)`"):
        if file.startswith("test_"):
            continue
        body = ast.parse((ROOT / "esm_neuron" / file).read_text(encoding="utf-8")).body
        for part in name.split("."):
            body = next((getattr(one, "body", []) for one in body if getattr(one, "name", "") == part), None)
            assert body is not None, f"{file} has no {name}"
