"""benchmarks/adapters.py: what is compared differs in the adapter alone; differences have their sign and intervals."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from esm_neuron.config.rules import validate
from esm_neuron.errors import ConfigError

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def adapters() -> Iterator[ModuleType]:
    """The program as a module."""
    sys.path.insert(0, BENCHMARKS)
    yield importlib.import_module("adapters")
    sys.path.remove(BENCHMARKS)


def test_runs_of_a_seed_differ_in_what_is_trained_and_how_fast(adapters: ModuleType) -> None:
    args = adapters.arguments(["--steps", "8"])
    runs = [adapters.configured(kind, 3, 0.001, args) for kind in adapters.TITLES]
    for cfg in runs:
        validate(cfg)
        assert replace(cfg, output="", adapter=runs[0].adapter) == replace(runs[0], output="")
    assert len({cfg.output for cfg in runs}) == len({cfg.adapter for cfg in runs}) == 4
    others = [adapters.configured("lora", 3, lr, args) for lr in adapters.RATES["lora"]]
    others += [adapters.configured("lora", 3, 0.001, adapters.arguments(["--steps", "9"]))]
    assert len({cfg.output for cfg in others}) == 4, "another rate or length is another run"


def test_one_seed_has_no_interval(adapters: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        adapters.arguments(["--seeds", "1"])
    assert "needs 2 or more" in capsys.readouterr().err


def test_a_run_with_other_settings_is_not_taken(
    adapters: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cfg = adapters.configured("lora", 0, 0.001, adapters.arguments(["--runs", str(tmp_path)]))
    other = replace(cfg, optim=replace(cfg.optim, warmup_steps=21), output="moved")
    for found, taken in ((replace(cfg, output="moved"), True), (other, False)):
        monkeypatch.setattr(
            adapters, "read_finished", lambda folder, found=found: adapters.Finished(folder, found, {}, [], {}, {}, {})
        )
        if taken:
            assert adapters.finished(cfg).cfg == found
        else:
            with pytest.raises(ConfigError, match="a run with other settings is there; delete it"):
                adapters.finished(cfg)


def test_intervals_are_students_over_seeds_and_wider_over_proteins_too(adapters: ModuleType) -> None:
    found = adapters.difference(np.array([0.01, 0.02, 0.03, 0.02, 0.02]), np.array([0.01, 0.03]))
    assert found["difference"] == pytest.approx(0.02)
    # standard error 0.00316, t(0.975, 4) = 2.776; the variance over proteins is 0.0002, the sum's root 0.01449
    assert found["over_seeds"] == pytest.approx([0.02 - 0.00878, 0.02 + 0.00878], abs=1e-5)
    assert found["over_both"] == pytest.approx([0.02 - 0.04023, 0.02 + 0.04023], abs=1e-4)


def test_a_better_kind_has_a_positive_difference_and_pairs_are_of_one_seed(adapters: ModuleType) -> None:
    """Of 40 proteins in two classes LoRA errs in 4 + seed; the head in two more, all weights in two fewer."""

    def cells(errors: int) -> np.ndarray:
        targets = np.arange(40) % 2
        said = np.where(np.arange(40) < errors, 1 - targets, targets)
        return np.eye(4)[targets * 2 + said]

    more = {"lora": 0, "qlora": 0, "head": 2, "none": -2}
    found = adapters.compared(
        {(kind, seed): cells(4 + seed + extra) for kind, extra in more.items() for seed in range(3)}, ("a", "b"), 3
    )
    accuracy = {kind: row["accuracy"] for kind, row in found["kinds"].items()}
    assert accuracy["lora"]["by_seed"] == pytest.approx([0.9, 0.875, 0.85])
    assert accuracy["none"]["difference"] == pytest.approx(0.05)
    assert accuracy["head"]["difference"] == pytest.approx(-0.05)
    assert accuracy["none"]["over_seeds"] == pytest.approx([0.05, 0.05]), "every pair differs alike"
    low, high = accuracy["none"]["over_both"]
    assert low < 0.05 < high
    assert accuracy["qlora"]["over_both"] == pytest.approx([0, 0])
