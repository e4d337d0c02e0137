"""Runs on a trn1 instance, and the report they write: docs/dev/trn1-report.md."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from esm_neuron.backends.neuron_env import installed_version, neuron_cores
from esm_neuron.config import TrainConfig, settings
from esm_neuron.planning.doctor import SHOWN

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dev" / "trn1-report.md"
TIMEOUT = 3 * 3600
"""Seconds for one command: neuronx-cc takes minutes a program."""


@dataclass
class Report:
    """What was found, line by line."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, what: str, found: str, wanted: str) -> None:
        """Note a figure before it is asserted, so that a failure is in the report too."""
        self.rows.append((what, found, wanted))

    def page(self) -> str:
        """The report in Markdown."""
        versions = ", ".join(f"{name} {installed_version(name)}" for name in SHOWN)
        head = ["# Report of a trn1 instance", "", f"Written by `make test-trn1` on {time.strftime('%Y-%m-%d')}:"]
        head += [f"{neuron_cores()} NeuronCores; {versions}.", "", "| What | Found | Wanted |", "| --- | --- | --- |"]
        return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in self.rows), ""])


@pytest.fixture(scope="session")
def report() -> Iterator[Report]:
    """Collects figures; written at the end, also after failures."""
    found = Report()
    yield found
    PAGE.write_text(found.page(), encoding="utf-8")


@dataclass(frozen=True)
class Run:
    """A finished training."""

    losses: list[float]
    graphs: list[int]
    """Programs compiled after each step."""
    residues_per_second: float
    """Of the last logged step."""
    result: dict[str, Any]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., str]:
    """(command of the CLI, configuration, processes, words before torchrun) -> its output; a failure fails the test."""

    def run(name: str, cfg: TrainConfig, processes: int = 1, before: tuple[str, ...] = ()) -> str:
        path = tmp_path / f"{name}-{Path(cfg.output).name}.yaml"
        path.write_text(settings.dump(cfg))
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        if cfg.backend == "cpu":
            launch = [sys.executable]
        words = [*before, *launch, "-m", "esm_neuron.cli", name, "--config", str(path)]
        # A group of its own: on a timeout the workers must not go on holding the NeuronCores.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # sockets of all peers, as launchers/torchrun.sh does
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={"MALLOC_ARENA_MAX": "64", **os.environ},
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, said[-6000:]
        return said

    return run


@pytest.fixture
def train(command: Callable[..., str]) -> Callable[..., Run]:
    """(configuration, processes) -> how the training went."""

    def run(cfg: TrainConfig, processes: int = 1) -> Run:
        command("train", cfg, processes)
        out = Path(cfg.output)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line and "split" not in line]
        return Run(
            losses=[line["loss"] for line in steps],
            graphs=[line["graphs"] for line in steps],
            residues_per_second=steps[-1]["residues_per_second"],
            result=json.loads((out / "result.json").read_text()),
        )

    return run
