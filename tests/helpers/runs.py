"""What a run has left in its folder, and comparing it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from esm_neuron.config import TrainConfig


def log_lines(cfg: TrainConfig) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, none where it has not begun to write."""
    path = Path(cfg.output) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def step_lines(cfg: TrainConfig) -> list[dict[str, Any]]:
    """Return the lines of training steps, without those of validations."""
    return [line for line in log_lines(cfg) if "split" not in line]


def losses(cfg: TrainConfig) -> list[float]:
    """Return the loss of each logged step."""
    return [line["loss"] for line in step_lines(cfg)]


def result(cfg: TrainConfig) -> dict[str, Any]:
    """Return what a finished run wrote to result.json."""
    found: dict[str, Any] = json.loads((Path(cfg.output) / "result.json").read_text())
    return found


def assert_same_metrics(found: Mapping[str, Any], expected: Mapping[str, Any], **tolerance: float) -> None:
    """The same names and values within `tolerance` (see `pytest.approx`), in nested metrics too."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        if isinstance(value, Mapping):
            assert_same_metrics(found[name], value, **tolerance)
        else:
            assert found[name] == (value if isinstance(value, str) else pytest.approx(value, **tolerance)), name
