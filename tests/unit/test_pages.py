"""Pages that are made from the code or from saved results say what these say today."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import errors_page
import neuron_page
import pages
import pytest
import rooms
import screens
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


MODULE = '''"""Do | this.

More."""
from typing import TYPE_CHECKING
def f():
    from esm_neuron.low import x
if TYPE_CHECKING:
    from esm_neuron.top import T
'''
SOURCES = {
    "__init__.py": "from esm_neuron.top import nothing",
    "top.py": '"""Begin."""\nfrom esm_neuron import low\nimport esm_neuron.middle.one',
    "middle/__init__.py": "",
    "middle/one.py": MODULE,
    "low.py": '"""End."""\nimport os',
}
"""`top` imports `middle`, which imports `low` within a function; a type alone is no import."""


def test_rooms_stand_above_what_they_import(tmp_path: Path) -> None:
    for name, text in SOURCES.items():
        (tmp_path / "esm_neuron" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "esm_neuron" / name).write_text(text)
    found = rooms.read(tmp_path)
    assert found.modules == {"top": {"top": "Begin."}, "middle": {"one": "Do | this."}, "low": {"low": "End."}}
    assert found.imports == {"top": {"low", "middle"}, "middle": {"low"}, "low": frozenset()}
    assert found.arrows == [("middle", "low"), ("top", "middle")], "that top imports low follows"
    assert found.floors == [["top"], ["middle"], ["low"]]
    drawing = ElementTree.fromstring(rooms.picture(found))
    names = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert names == ["top.py", "middle/", "one", "low.py"]
    assert "| `one` | Do \\| this. |" in rooms.page(found) and rooms.page(found) == rooms.page(rooms.read(tmp_path))


def test_an_arrow_passes_the_rooms_of_the_floors_between() -> None:
    imports = {"a": {"b", "c", "d"}, "b": {"d"}, "c": {"e"}, "d": {"e"}, "e": set()}
    found = rooms.Rooms({room: {"m": ""} for room in imports}, {room: frozenset(to) for room, to in imports.items()})
    assert ["a", "a>c", "c"] in found.ways
    assert [set(floor) for floor in found.floors] == [{"a"}, {"b", "a>c"}, {"c", "d"}, {"e"}]


def test_a_terminal_s_screen_is_what_a_command_leaves_there(tmp_path: Path) -> None:
    write = "import sys; sys.stderr.write(sys.argv[1].encode().decode('unicode_escape')); assert sys.stderr.isatty()"
    words = [sys.executable, "-c", write, r"first\nbar: 1\rbar: 22\n\nup\x1b[A\x1b[A\rgone\x1b[K\n\nlast" + "x" * 120]
    then, end = screens.recorded(words, tmp_path, os.environ, "last")
    assert end == ["first", "gone", "", "lastx" + "x" * 115, "xxxx"] and then[0] == "first"
    drawing = ElementTree.fromstring(screens.picture(["  a < b", ""]))
    [text] = drawing.iter("{http://www.w3.org/2000/svg}text")
    assert text.text == "  a < b"
