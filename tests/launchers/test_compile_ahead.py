"""`torchrun.sh --compile-only` with the real neuronx_distributed, behind a stand-in for neuron_parallel_compile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.processes import saved_config

from esm_neuron.config import TrainConfig

TESTS = Path(__file__).parents[1]
STANDINS = Path(__file__).with_name("standins")

pytestmark = [
    pytest.mark.nxd,
    pytest.mark.skipif("NXD_SRC" not in os.environ, reason="make test-nxd NXD_SRC=<folder>: no neuronx_distributed"),
]


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_every_graph_is_collected_where_all_values_are_0(toy: Callable[..., TrainConfig], kind: str) -> None:
    cfg = replace(toy("ahead", adapter={"kind": kind}, loop={"packs_per_device": 2}), backend="neuron")
    paths = [STANDINS / "extraction", TESTS / "nxd", TESTS, TESTS.parent, Path(os.environ["NXD_SRC"])]
    env = {
        **os.environ,
        "PATH": f"{STANDINS / 'neuron'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": ":".join(map(str, paths)),
        "PJRT_DEVICE": "CPU",
        "OMP_NUM_THREADS": "1",
        "NC_COUNT": "2",
        "NPROC_PER_NODE": "1",
    }
    words = [TESTS.parent / "launchers" / "torchrun.sh", "--compile-only", "--config", saved_config(cfg)]
    done = subprocess.run(list(map(str, words)), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    found = re.search(r"(\d+) graphs compiled", done.stderr)
    assert found is not None and int(found[1]) >= 3, done.stderr[-3000:]
    assert not Path(cfg.output).exists()
