"""Pages that are made from the code or from saved results say what these say today."""

from __future__ import annotations

import re
from pathlib import Path

import errors_page
import neuron_page
import pages
import pytest
import settings_page

from esm_neuron.backends.neuron_env import SETTINGS
from esm_neuron.config.settings import known_keys


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_is_current(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(pages.ROOT / "benchmarks")
    committed = (pages.ROOT / name).read_text(encoding="utf-8")
    assert pages.comparable(name, committed) == pages.comparable(name, pages.PAGES[name]()), "run make pages"


def test_a_page_that_is_not_current_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: pages.PAGES[name] for name in ("docs/settings.md", "docs/neuron-environment.md")}
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/settings.md").write_text(settings_page.page() + "x")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", made)
    assert pages.stale() == list(made), "one differs, one is missing"
    for name, make in made.items():
        (tmp_path / name).write_text(make())
    assert pages.stale() == []


def test_every_setting_and_variable_has_its_meaning() -> None:
    text = settings_page.page()
    assert [key for key in known_keys() if f"| `{key}` |" not in text] == []
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert {line.count("|") for line in rows} == {5} and " |  |" not in text
    assert all(f"| `{setting.name}` |" in neuron_page.page() for setting in SETTINGS)


def test_versions_of_libraries_may_word_their_part_of_an_error() -> None:
    name, text = "docs/errors.md", errors_page.page()
    assert len(errors_page.CASES) >= 30 and text.count("\n```\n") == 2 * len(errors_page.CASES) - 1 + 1
    reworded = re.sub(r"\([^()]*\)", "(worded (otherwise))", text)
    assert pages.comparable(name, reworded) == pages.comparable(name, text)
    assert pages.comparable(name, text.replace("close the quotes", "x")) != pages.comparable(name, text)
