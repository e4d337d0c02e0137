"""Real torchrun worlds on gloo with the real neuronx_distributed, whose sources NXD_SRC names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
WORLD_TIMEOUT = 1200
"""Seconds for a world of up to 8 processes, most of them imports: NxD takes 8 to 20 s a process."""

Case = tuple[str, str, dict[str, Any]]
"""Name, function of `cases.py`, its arguments without `output`."""


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


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """(processes, cases for `worker.py`) -> how the world ended; a world that hangs fails the test.

    With `lazy`, one process on XLA:CPU instead of eager ones on gloo.
    """

    def start(processes: int, cases: list[dict[str, Any]], lazy: bool = False) -> Ended:
        folder = tmp_path_factory.mktemp("world")
        file = folder / "cases.json"
        file.write_text(json.dumps(cases), encoding="utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": os.environ["NXD_SRC"],
            "PJRT_DEVICE": "CPU",
            "OMP_NUM_THREADS": "1",
            **({} if lazy else {"NXD_CPU_MODE": "1"}),
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(HERE / "worker.py"), str(file)]
        with (folder / "log").open("w+") as log:
            ended = subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=WORLD_TIMEOUT, check=False
            )
            log.seek(0)
            return Ended(ended.returncode, log.read())

    return start


@pytest.fixture(scope="session")
def world(
    torchrun: Callable[..., Ended], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[int, list[Case]], int], dict[str, Path]]:
    """(all worlds, processes) -> folder of each case; a world is one torchrun, started when first asked for.

    `{root}/N/NAME` in an argument is the folder of a case in the world of N processes, which then runs before.
    """
    root = tmp_path_factory.mktemp("worlds")
    started: set[int] = set()

    def folders(worlds: dict[int, list[Case]], processes: int) -> dict[str, Path]:
        cases = {name: (function, arguments) for name, function, arguments in worlds[processes]}
        if processes not in started:
            started.add(processes)
            runs = []
            for name, (function, arguments) in cases.items():
                (root / str(processes) / name).mkdir(parents=True)
                text = json.dumps({"output": f"{{root}}/{processes}/{name}", **arguments})
                for needed in worlds:
                    if needed != processes and f"{{root}}/{needed}/" in text:
                        folders(worlds, needed)
                runs.append({"run": function, "with": json.loads(text.replace("{root}", str(root)))})
            ended = torchrun(processes, runs)
            if ended.code:
                pytest.fail(f"a world of {processes} ended with {ended.code}:\n{ended.output[-6000:]}", pytrace=False)
        return {name: root / str(processes) / name for name in cases}

    return folders


@pytest.fixture(scope="session")
def tensors() -> Callable[[Path], dict[str, Tensor]]:
    """What a case left in its folder."""
    return lambda folder: load_file(folder / "results.safetensors")
