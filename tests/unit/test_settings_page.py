"""docs/settings.md has every setting as it is."""

from __future__ import annotations

from pathlib import Path

from settings_page import page

from esm_neuron.config.settings import known_keys


def test_the_page_is_that_of_the_code_and_has_every_setting() -> None:
    text = page()
    assert (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8") == text
    assert [key for key in known_keys() if f"| `{key}` |" not in text] == []
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert {line.count("|") for line in rows} == {5} and " |  |" not in text, "every setting has its meaning"
