"""Ahead-of-time compilation and the recompile monitor, on XLA:CPU in a process of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import json_of, saved_config

from esm_neuron.config import TrainConfig

pytestmark = pytest.mark.xla

WORKER = Path(__file__).with_name("compile_worker.py")


@pytest.fixture(scope="module")
def said(
    module_toy: Callable[..., TrainConfig],
    lengthened: Callable[[TrainConfig], TrainConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What the worker saw."""
    cfg = module_toy(
        data={"max_residues": 190, "pack_tokens": 192, "max_segments": 2},
        loop={"max_steps": 20, "eval_every": 10},
    )
    config = saved_config(lengthened(replace(cfg, backend="xla")))
    return json_of([WORKER, config, tmp_path_factory.mktemp("compile")], {"PJRT_DEVICE": "CPU"})


def test_compile_makes_the_planned_graphs(said: dict[str, Any]) -> None:
    assert said["graphs"]["training pass"] == said["graphs"]["evaluation pass"] == 1
    assert said["compiled"] == sum(said["graphs"].values())


def test_compile_writes_nothing(said: dict[str, Any]) -> None:
    assert said["written"] == []


@pytest.mark.parametrize("answer", ["zero", "strict"])
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_no_value_of_the_device_is_read(said: dict[str, Any], answer: str, kind: str) -> None:
    """Where every value read is 0, as in extraction, or an error: compiling ahead, and a training of two steps."""
    assert said[answer][kind] == [True, 2]


def test_a_training_after_it_compiles_nothing(said: dict[str, Any]) -> None:
    assert said["compiled by training"] == 0
    assert said["steps"] == 20


def test_a_changed_shape_ends_the_run_and_is_named(said: dict[str, Any]) -> None:
    error = said["length"]
    assert error.startswith("step 3 compiled ") and "unplanned graph" in error
    assert "its packs have 180 tokens, planned are " in error
    assert "loop.on_recompile=warn" in error


def test_a_changed_number_of_packs_is_named(said: dict[str, Any]) -> None:
    assert "input_ids is 3 x 192 int64, was 4 x 192 int64" in said["packs"]


def test_another_branch_of_the_code_is_named(said: dict[str, Any]) -> None:
    assert "a Python value in the step changed" in said["value"]


def test_a_warning_goes_on(said: dict[str, Any]) -> None:
    assert said["warned"]["steps"] == 6
    assert any("a Python value in the step changed" in line for line in said["warned"]["lines"])
