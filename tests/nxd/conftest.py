"""Real torchrun worlds on gloo with the real neuronx_distributed, whose sources NXD_SRC names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from parity import LAZY, Case, World
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
WORLD_TIMEOUT = 1200
"""Seconds for a world of up to 8 processes, most of them imports: NxD takes 8 to 20 s a process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder but the tests of the stand-ins' source needs the real NxD."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.nxd)
            if not os.environ.get("NXD_SRC"):
                item.add_marker(pytest.mark.skip(reason="make test-nxd NXD_SRC=<folder>: no neuronx_distributed there"))


@dataclass(frozen=True)
class Ended:
    """How a world ended."""

    code: int
    output: str
    at: float
    """When, in seconds since the epoch."""


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """(world, cases for `worker.py`) -> how it ended; a world that hangs fails the test."""

    def start(kind: World, cases: list[dict[str, Any]]) -> Ended:
        folder = tmp_path_factory.mktemp("world")
        file = folder / "cases.json"
        file.write_text(json.dumps(cases), encoding="utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": os.environ["NXD_SRC"],
            "PJRT_DEVICE": "CPU",
            "OMP_NUM_THREADS": "1",
            **({"CPU_NUM_DEVICES": str(LAZY[kind])} if isinstance(kind, str) else {"NXD_CPU_MODE": "1"}),
        }
        processes = 1 if isinstance(kind, str) else kind
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(HERE / "worker.py"), str(file)]
        with (folder / "log").open("w+") as log:
            ended = subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=WORLD_TIMEOUT, check=False
            )
            log.seek(0)
            return Ended(ended.returncode, log.read(), time.time())

    return start


@pytest.fixture(scope="session")
def world(
    torchrun: Callable[..., Ended], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[World, list[Case]], World], dict[str, Path]]:
    """(all worlds, which) -> folder of each case; a world is one torchrun, started when first asked for.

    `{root}/N/NAME` in an argument is the folder of a case in world N, which then runs before.
    """
    root = tmp_path_factory.mktemp("worlds")
    started: set[World] = set()

    def folders(worlds: dict[World, list[Case]], kind: World) -> dict[str, Path]:
        cases = {name: (function, arguments) for name, function, arguments in worlds[kind]}
        if kind not in started:
            started.add(kind)
            runs = []
            for name, (function, arguments) in cases.items():
                (root / str(kind) / name).mkdir(parents=True)
                text = json.dumps({"output": f"{{root}}/{kind}/{name}", **arguments})
                for needed in worlds:
                    if needed != kind and f"{{root}}/{needed}/" in text:
                        folders(worlds, needed)
                runs.append({"run": function, "with": json.loads(text.replace("{root}", str(root)))})
            ended = torchrun(kind, runs)
            if ended.code:
                pytest.fail(f"world {kind} ended with {ended.code}:\n{ended.output[-6000:]}", pytrace=False)
        return {name: root / str(kind) / name for name in cases}

    return folders


@pytest.fixture(scope="session")
def tensors() -> Callable[[Path], dict[str, Tensor]]:
    """What a case left in its folder."""
    return lambda folder: load_file(folder / "results.safetensors")
