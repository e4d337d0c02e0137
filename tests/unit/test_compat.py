"""What differs between libraries stays in one module, and none of it reaches a user."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path

import pytest
from helpers import finished

from esm_neuron.compat import hidden

SOURCE = Path(__file__).resolve().parents[2] / "esm_neuron"


def test_no_other_module_asks_for_a_librarys_version() -> None:
    asks = re.compile(r"(__version__|version\([^)]*\)\)?) *[<>=!]=|[<>=!]= *(Version|parse)\(")
    found = [str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*.py") if asks.search(file.read_text())]
    # what doctor says of packages and of the driver decides nothing that is computed
    assert set(found) <= {"compat.py", "planning/doctor.py", "backends/neuron_sdk.py"}


def test_a_hidden_package_is_as_if_not_installed_and_back_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "anew.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with hidden("anew"), pytest.raises(ImportError):
        importlib.import_module("anew")
    assert importlib.import_module("anew")
    with hidden("anew"):  # imported before: it stays what it is
        assert importlib.import_module("anew")


def test_adapters_are_added_without_a_word(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finished.finish(tmp_path / "run", "mean", "lora")
