"""Runs on a trn1 instance and the page they write, docs/dev/trn1-report.md; or a rehearsal of them on XLA:CPU.

With TRN1_REHEARSAL=1 the backend is `xla`, NeuronCores are virtual CPU devices of one process, and every model is
`tiny`: it shows that the tests' own code runs, and nothing about a trn1. Its page is TRN1_REPORT.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import losses
from helpers.trn1_report import REHEARSAL, Report
from safetensors.torch import load_file
from torch import Tensor

from esm_neuron.config import TrainConfig, settings

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "dev" / "trn1-report.md"
TIMEOUT = 3 * 3600
"""Seconds for one command: neuronx-cc takes minutes a graph, and up to an hour for a large model."""


@pytest.fixture(scope="session")
def report() -> Report:
    """The page of this session."""
    page = Path(os.environ["TRN1_REPORT"]) if REHEARSAL else PAGE
    title = "Rehearsal on XLA:CPU: no figure here is a trn1's" if REHEARSAL else "Report of a trn1 instance"
    words = [sys.executable, "-m", "esm_neuron.cli", "doctor"]
    doctor = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return Report(page, title, doctor, float(os.environ.get("TRN1_MINUTES", "60")))


def ran(module: list[str], cores: int, before: tuple[str, ...] = (), variables: dict[str, str] | None = None) -> str:
    """Run a program on so many cores, none for the plain CPU; return what it printed. A failure fails the test.

    `variables` are added to its environment.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(cores)]
    environment = {"MALLOC_ARENA_MAX": "64", **os.environ, **(variables or {})}
    if REHEARSAL:
        environment |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(cores)}
    if REHEARSAL or not cores:
        launch = [sys.executable]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # sockets of all peers, as launchers/torchrun.sh does
    # A group of its own: on a timeout the workers must not go on holding the NeuronCores.
    process = subprocess.Popen(
        [*before, *launch, *module], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=environment,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, said[-6000:]
    return said


@dataclass(frozen=True)
class Watched:
    """What `worker.py` left."""

    results: dict[str, Tensor]
    facts: dict[str, Any]


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Watched]:
    """(cores, none for the plain CPU; variables; settings by dotted name) -> a training of 8 steps, each made once."""
    done: dict[str, Watched] = {}

    def run(cores: int, compared: bool = True, variables: dict[str, str] | None = None, **values: Any) -> Watched:
        chosen = {"loop.max_steps": 8, **{name.replace("__", "."): value for name, value in values.items()}}
        if REHEARSAL:
            chosen = {name: value for name, value in chosen.items() if name not in ("loop.tf32", "loop.optlevel")}
            if chosen.get("model.name"):
                chosen["model.name"] = "tiny"
        device = "xla" if REHEARSAL else "neuron"
        folder = tmp_path_factory.mktemp("watched")
        arguments = {"backend": device if cores else "cpu", "values": chosen, "compared": compared}
        key = json.dumps([cores, arguments, variables])
        if key not in done:
            (folder / "case.json").write_text(json.dumps({"output": str(folder), **arguments}), encoding="utf-8")
            ran([str(HERE / "worker.py"), str(folder / "case.json")], cores, variables=variables)
            facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
            done[key] = Watched(load_file(folder / "results.safetensors"), facts)
        return done[key]

    return run


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., str]:
    """(command of the CLI, configuration, cores, words before torchrun) -> its output."""

    def run(name: str, cfg: TrainConfig, cores: int, before: tuple[str, ...] = ()) -> str:
        path = tmp_path / f"{name}-{Path(cfg.output).name}.yaml"
        path.write_text(settings.dump(cfg))
        return ran(["-m", "esm_neuron.cli", name, "--config", str(path)], cores, before)

    return run


@pytest.fixture
def train(command: Callable[..., str]) -> Callable[..., list[float]]:
    """(configuration, cores, tp) -> the losses of a training on the device."""

    def run(cfg: TrainConfig, cores: int, tp: int) -> list[float]:
        parallel = replace(cfg.parallel, tp=tp)
        command("train", replace(cfg, backend="xla" if REHEARSAL else "neuron", parallel=parallel), cores)
        return losses(cfg)

    return run
