"""The program of SageMaker's containers (sagemaker-training, sagemaker-pytorch-training) runs our entry point here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import stage
from job import metric_definitions
from safetensors.torch import load_file

from esm_neuron import settings
from esm_neuron.config import TrainConfig

pytestmark = pytest.mark.launchers

STANDINS = Path(__file__).with_name("standins") / "neuron"
PATIENCE = 540
"""Seconds that a job may take on a busy machine."""
STEPS = 120

Toy = Callable[..., TrainConfig]


@dataclass
class Container:
    """One host of a job: its /opt/ml, and the toolkit's process."""

    base: Path
    host: str
    hosts: tuple[str, ...]
    cores: int
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, flags: dict[str, str], source: Path, channel: Path, **env: str) -> subprocess.Popen[str]:
        """Lay out what SageMaker puts into a container, and run what it runs."""
        config, data = self.base / "input" / "config", self.base / "input" / "data" / "train"
        for folder in (config, data, self.base / "model", self.base / "output" / "data"):
            folder.mkdir(parents=True, exist_ok=True)
        (data / channel.name).write_bytes(channel.read_bytes())
        ours = {"sagemaker_submit_directory": str(source), "sagemaker_program": "entry.py"}
        ours |= {"sagemaker_torch_distributed_enabled": "true", "sagemaker_region": "us-west-2"}
        values = {**{name: json.dumps(value) for name, value in {**flags, **ours}.items()}}
        group = {"instance_group_name": "homogeneousCluster", "instance_type": "ml.trn1.2xlarge", "hosts": self.hosts}
        resources = {
            "current_host": self.host,
            "current_instance_type": "ml.trn1.2xlarge",
            "current_group_name": "homogeneousCluster",
            "hosts": self.hosts,
            "instance_groups": [group],
            "network_interface_name": "lo",
        }
        (config / "hyperparameters.json").write_text(json.dumps(values))
        (config / "resourceconfig.json").write_text(json.dumps(resources))
        (config / "inputdataconfig.json").write_text(json.dumps({"train": {"TrainingInputMode": "File"}}))
        path = f"{STANDINS}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        found = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        found |= {"PATH": path, "NC_COUNT": str(self.cores), "SAGEMAKER_BASE_DIR": str(self.base), **env}
        found |= {"SAGEMAKER_TRAINING_MODULE": "sagemaker_pytorch_container.training:main", "AWS_REGION": "us-west-2"}
        words = [sys.executable, "-m", "sagemaker_training.cli.train"]
        with (self.base / "log").open("a") as log:
            process = subprocess.Popen(
                words, env=found, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
        self.processes.append(process)
        return process

    @property
    def log(self) -> str:
        return (self.base / "log").read_text()

    @property
    def failure(self) -> Path:
        return self.base / "output" / "failure"

    def steps(self) -> list[int]:
        path = self.base / "checkpoints" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line["step"] for line in lines if "split" not in line]

    def end(self) -> None:
        """Kill all that runs in it, as the end of an instance does."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def job(toy: Toy, tmp_path: Path) -> Iterator[Callable[..., list[Container]]]:
    """(name, hosts, cores a host) -> fresh containers; ended after the test."""
    made: list[Container] = []

    def make(name: str, hosts: int, cores: int) -> list[Container]:
        names = tuple(f"127.0.0.{n + 1}" for n in range(hosts))  # addresses, since nothing here resolves algo-1
        new = [Container(tmp_path / name / f"host{n}", host, names, cores) for n, host in enumerate(names)]
        made.extend(new)
        return new

    yield make
    for container in made:
        container.end()


@pytest.fixture
def source(toy: Toy, tmp_path: Path) -> Callable[[TrainConfig], Path]:
    """A config's source folder, as the launcher stages it."""

    def make(cfg: TrainConfig) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(settings.dump(cfg))
        return stage.stage(tmp_path / "source", path, "neuron", baked=False)

    return make


@pytest.fixture
def long(toy: Toy) -> TrainConfig:
    """A run of two ranks that takes a while; its validation file is left to the split of the training file."""
    cfg = toy(loop={"max_steps": STEPS, "rows_per_device": 2, "eval_every": 40}, checkpoint={"every": 5})
    return replace(cfg, data=replace(cfg.data, valid=None, test=None))


FLAGS = {"config": "run.yaml", "backend": "cpu", "optim.lr": "1e-4", "loop.eval_rows_per_device": "2"}


def run_all(containers: list[Container], cfg: TrainConfig, source: Path, **env: str) -> list[int]:
    processes = [c.start(FLAGS, source, Path(str(cfg.data.train)), **env) for c in containers]
    return [process.wait(PATIENCE) for process in processes]


def assert_laid_out(container: Container, cfg: TrainConfig) -> None:
    model = container.base / "model"
    assert {"config.yaml", "result.json", "metrics.jsonl", "adapter", "base"} <= {path.name for path in model.iterdir()}
    saved = settings.read_config(model / "config.yaml")
    assert (saved.data.train, saved.model.name, saved.optim.lr) == (cfg.data.train, "tiny", 1e-4)
    assert container.steps() == list(range(1, STEPS + 1))
    for definition in metric_definitions():
        if definition["Name"] in ("train:loss", "valid:accuracy"):
            hits = [re.search(definition["Regex"], line) for line in container.log.splitlines()]
            found = [float(hit[1]) for hit in hits if hit]
            assert len(found) >= 3, f"{definition} in what the toolkit printed"


def weights(container: Container) -> dict[str, Any]:
    return load_file(container.base / "model" / "adapter" / "adapter_model.safetensors")


def test_two_hosts_train_are_killed_and_go_on_from_what_s3_kept(
    long: TrainConfig, job: Callable[..., list[Container]], source: Callable[[TrainConfig], Path]
) -> None:
    staged = source(long)
    whole = job("whole", 2, 1)
    assert run_all(whole, long, staged) == [0, 0], whole[0].log[-4000:]
    assert_laid_out(whole[0], long)
    assert not any((whole[1].base / "model").iterdir()), "one host writes the model; SageMaker merges the folders"
    assert not (whole[1].base / "checkpoints").exists()
    assert whole[0].log.count("step=5/") == 1, "one rank speaks, in one write"
    assert (whole[0].base / "output" / "success").exists() and not whole[0].failure.exists()

    first = job("first", 2, 1)
    for container in first:
        container.start(FLAGS, staged, Path(str(long.data.train)))
    deadline = time.monotonic() + PATIENCE
    while len(first[0].steps()) < 20:
        assert time.monotonic() < deadline and first[0].processes[0].poll() is None, first[0].log[-4000:]
        time.sleep(0.02)
    for container in first:
        container.end()

    second = job("second", 2, 1)
    for container in second:  # SageMaker copies the checkpoints of S3 to every host
        container.base.mkdir(parents=True)
        subprocess.run(["cp", "-r", first[0].base / "checkpoints", container.base], check=True)
    assert run_all(second, long, staged) == [0, 0], second[0].log[-4000:]
    assert re.search(rf"resumed after step \d+ of {STEPS}", second[0].log)
    assert second[0].steps() == list(range(1, STEPS + 1))
    one, other = weights(whole[0]), weights(second[0])
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_one_host_of_two_cores_and_a_planted_error(
    long: TrainConfig, job: Callable[..., list[Container]], source: Callable[[TrainConfig], Path], tmp_path: Path
) -> None:
    staged = source(long)
    (container,) = job("one", 1, 2)
    assert run_all([container], long, staged) == [0], container.log[-4000:]
    assert_laid_out(container, long)

    bad = tmp_path / "bad" / Path(str(long.data.train)).name
    bad.parent.mkdir()
    bad.write_text(Path(str(long.data.train)).read_text().replace("alpha\n", "alpha,surplus\n", 1))
    (failing,) = job("bad", 1, 2)
    process = failing.start(FLAGS, staged, bad)
    assert process.wait(PATIENCE) != 0
    reason = failing.failure.read_text()
    assert reason.startswith("esm-neuron: error: ") and bad.name in reason and len(reason) <= 1024, reason


def test_a_crash_leaves_its_traceback_as_the_reason(
    long: TrainConfig, job: Callable[..., list[Container]], source: Callable[[TrainConfig], Path]
) -> None:
    staged = source(long)
    loss = staged / "esm_neuron" / "optim.py"
    loss.write_text(loss.read_text() + "\nraise RuntimeError('planted')\n")
    (container,) = job("crash", 1, 1)
    assert run_all([container], long, staged) == [1]
    assert container.failure.read_text().rstrip().endswith("RuntimeError: planted")


def test_compiling_ahead_runs_the_same_entry_point(
    long: TrainConfig, job: Callable[..., list[Container]], source: Callable[[TrainConfig], Path]
) -> None:
    """On the cpu backend, whose refusal shows that `compile` was run, under the compiler's prefix."""
    (container,) = job("ahead", 1, 1)
    assert run_all([container], long, source(long), RUN_NEURON_PARALLEL_COMPILE="1") != [0]
    assert "backend=cpu compiles nothing" in container.failure.read_text()
