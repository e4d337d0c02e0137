"""benchmarks/adapters.py: runs that are compared differ in the adapter alone, and the page says what was found."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from esm_neuron.rules import validate


@pytest.fixture(scope="module")
def adapters() -> Iterator[ModuleType]:
    """The program as a module."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("adapters")
    sys.path.pop(0)


def test_runs_of_a_seed_differ_in_what_is_trained_and_how_fast(adapters: ModuleType) -> None:
    args = adapters.arguments(["--steps", "8"])
    runs = [adapters.configured(kind, 3, 0.001, args) for kind in adapters.TITLES]
    for cfg in runs:
        validate(cfg)
        assert replace(cfg, output="", adapter=runs[0].adapter) == replace(runs[0], output="")
    assert len({cfg.output for cfg in runs}) == len({cfg.adapter for cfg in runs}) == 4
    assert len({adapters.configured("lora", 3, lr, args).output for lr in adapters.RATES["lora"]}) == 3


def test_an_interval_over_seeds_is_students(adapters: ModuleType) -> None:
    found = adapters.difference(np.array([0.01, 0.02, 0.03, 0.02, 0.02]))
    assert found["difference"] == pytest.approx(0.02)
    # sd 0.00707, standard error 0.00316, t(0.975, 4) = 2.776
    assert found["over_seeds"] == pytest.approx([0.02 - 0.00878, 0.02 + 0.00878], abs=1e-5)


def test_the_page_is_that_of_the_saved_figures(adapters: ModuleType) -> None:
    saved = json.loads(adapters.SAVED.read_text(encoding="utf-8"))
    assert adapters.page(saved) == adapters.PAGE.read_text(encoding="utf-8")
