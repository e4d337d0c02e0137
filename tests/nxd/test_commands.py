"""`evaluate`, `predict`, `embed` and `score` by two copies of a model cut in two, against one plain CPU process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import parity
import pytest
from parity import COMMANDS, WORLDS, Case
from safetensors.numpy import load_file

World = Callable[[dict[parity.World, list[Case]], parity.World], dict[str, Path]]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""Sums in another order, in a file's last digits."""
OF_FITTED = {"rtol": 1e-3, "atol": 2e-4}
"""A head and a temperature that are searched for until little changes, on states that differ in their last digits."""
OF_FIGURES = {"rtol": 1e-2, "atol": 1e-5}
"""Two proteins that nearly tie may change places, which moves a metric of ranks by a step."""


def columns(path: Path) -> dict[str, np.ndarray]:
    """What a file holds, in its order."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".json":
        return {name: np.asarray(value) for name, value in flat(json.loads(path.read_text(encoding="utf-8"))).items()}
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    return {name: np.stack(list(frame[name])) for name in frame}


def flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Metrics within metrics by their whole names."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_parallel_world_answers_as_one_process(command: str, world: World) -> None:
    target = COMMANDS[command][2]
    expected = columns(world(WORLDS, 1)[command] / target)
    found = columns(world(WORLDS, 4)[command] / target)
    assert list(found) == list(expected) != []
    for name, values in expected.items():
        if values.dtype.kind in "fiu":
            near = OF_FIGURES if target.endswith(".json") else OF_FITTED if command == "probe" else TOLERANCE
            np.testing.assert_allclose(found[name].astype(float), values.astype(float), **near, err_msg=name)
        else:
            assert found[name].tolist() == values.tolist(), name
