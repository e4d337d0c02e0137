"""The program of SageMaker's containers (sagemaker-training, sagemaker-pytorch-training) runs our entry point here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import stage
import torch
from helpers.processes import wait_for
from helpers.runs import step_lines
from job import Job as Described
from job import metric_definitions
from safetensors.torch import load_file
from transformers import EsmForMaskedLM

from esm_neuron.config import TrainConfig, settings
from esm_neuron.models.shapes import SHAPES, esm_config
from esm_neuron.training import run

pytestmark = pytest.mark.launchers

STANDINS = Path(__file__).with_name("standins") / "neuron"
PATIENCE = 540
"""Seconds that a job may take on a busy machine."""
STEPS = 120
NO_NETWORK = ("unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""Words before a command that leave it its loopback alone, as network isolation does."""

Toy = Callable[..., TrainConfig]
Job = Callable[..., list["Container"]]


@dataclass
class Container:
    """One host of a job: its /opt/ml, and the toolkit's process."""

    base: Path
    host: str
    hosts: tuple[str, ...]
    cores: int
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def channels(self) -> Path:
        return self.base / "input" / "data"

    def start(
        self, flags: dict[str, str], source: Path, inputs: dict[str, Path], *before: str, **env: str
    ) -> subprocess.Popen[str]:
        """Lay out what SageMaker puts into a container, a file or a folder for each channel, and run what it runs."""
        config = self.base / "input" / "config"
        for folder in (config, self.base / "model", self.base / "output" / "data"):
            folder.mkdir(parents=True, exist_ok=True)
        for name, path in inputs.items():
            target = self.channels / name
            if path.is_dir():
                shutil.copytree(path, target)
            else:
                target.mkdir(parents=True)
                shutil.copy2(path, target)
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
        (config / "inputdataconfig.json").write_text(json.dumps({key: {"TrainingInputMode": "File"} for key in inputs}))
        path = f"{STANDINS}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        found = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        found |= {"PATH": path, "NC_COUNT": str(self.cores), "SAGEMAKER_BASE_DIR": str(self.base), **env}
        found |= {"SAGEMAKER_TRAINING_MODULE": "sagemaker_pytorch_container.training:main", "AWS_REGION": "us-west-2"}
        found["PIP_NO_INDEX"] = "1"  # all that a source folder asks pip for is here
        words = [*before, sys.executable, "-m", "sagemaker_training.cli.train"]
        with (self.base / "log").open("a") as log:
            process = subprocess.Popen(words, env=found, stdout=log, stderr=subprocess.STDOUT, text=True)
        self.processes.append(process)
        return process

    @property
    def log(self) -> str:
        return (self.base / "log").read_text()

    @property
    def failure(self) -> Path:
        return self.base / "output" / "failure"

    def steps(self) -> list[int]:
        return [line["step"] for line in step_lines(TrainConfig(output=str(self.base / "checkpoints")))]

    def end(self) -> None:
        """Kill all that runs in it, as the end of an instance does; torchrun's workers have sessions of their own."""
        for process in self.processes:
            if process.poll() is None:
                toolkit = psutil.Process(process.pid)
                for one in [toolkit, *toolkit.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        one.kill()
                process.wait()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """(name, hosts, cores a host) -> fresh containers; ended after the tests."""
    made: list[Container] = []

    def make(name: str, hosts: int, cores: int) -> list[Container]:
        folder = tmp_path_factory.mktemp(name)
        names = tuple(f"127.0.0.{n + 1}" for n in range(hosts))  # addresses, since nothing here resolves algo-1
        new = [Container(folder / f"host{n}", host, names, cores) for n, host in enumerate(names)]
        made.extend(new)
        return new

    yield make
    for container in made:
        container.end()


def staged(cfg: TrainConfig, folder: Path, *overrides: str, **changes: Any) -> Path:
    """A config's source folder, as the launcher stages it for a GPU: its requirements are in this environment."""
    path = folder / "my run.yaml"
    path.write_text(settings.dump(cfg))
    where = {"output": "s3://bucket/esm", "role": "arn:aws:iam::123456789012:role/r", "region": "us-west-2"}
    job = Described(config=path, instance_type="ml.g5.2xlarge", overrides=overrides, **where, **changes)
    with patch.dict(stage.LOCKS, clear=True):  # the lock of this environment
        return stage.stage(folder / "source", job)


@pytest.fixture(scope="module")
def long(module_toy: Toy) -> TrainConfig:
    """A run of two ranks that takes a while; its validation file is left to the split of the training file."""
    cfg = module_toy(loop={"max_steps": STEPS, "packs_per_device": 2, "eval_every": 40}, checkpoint={"every": 5})
    return replace(cfg, data=replace(cfg.data, valid=None, test=None))


@pytest.fixture(scope="module")
def source(long: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source folder of `long`."""
    return staged(long, tmp_path_factory.mktemp("staged"))


FLAGS = {"config": "run.yaml", "backend": "cpu", "optim.lr": "1e-4", "loop.eval_packs_per_device": "2"}


def run_all(containers: list[Container], cfg: TrainConfig, source: Path, **env: str) -> list[int]:
    processes = [c.start(FLAGS, source, {"train": Path(str(cfg.data.train))}, **env) for c in containers]
    return [process.wait(PATIENCE) for process in processes]


def interrupted(containers: list[Container], cfg: TrainConfig, source: Path) -> list[Container]:
    """The containers of a job that is in the middle of its training, the last of them killed."""
    for container in containers:
        container.start(FLAGS, source, {"train": Path(str(cfg.data.train))})
    wait_for(lambda: len(containers[0].steps()) >= 20, PATIENCE, containers[0].processes)
    containers[-1].end()
    return containers


def assert_goes_on(lost: Container, fresh: list[Container], whole: Container, cfg: TrainConfig, source: Path) -> None:
    """Fresh containers with the checkpoints that SageMaker kept in S3, copied to each, end as `whole` did."""
    stopped = lost.steps()[-1]
    assert 20 <= stopped < STEPS and not (lost.base / "checkpoints" / "result.json").exists()
    for container in fresh:
        shutil.copytree(lost.base / "checkpoints", container.base / "checkpoints")
    assert run_all(fresh, cfg, source) == [0] * len(fresh), fresh[0].log[-4000:]
    resumed = re.search(rf"resumed after step (\d+) of {STEPS}", fresh[0].log)
    assert resumed and 0 < int(resumed[1]) <= stopped
    assert_laid_out(fresh[0], cfg)
    one, other = weights(whole), weights(fresh[0])
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


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


@pytest.fixture(scope="module")
def whole(long: TrainConfig, job: Job, source: Path) -> list[Container]:
    """The containers of an uninterrupted job of two hosts."""
    containers = job("whole", 2, 1)
    assert run_all(containers, long, source) == [0, 0], containers[0].log[-4000:]
    return containers


def test_of_two_hosts_one_speaks_and_writes(whole: list[Container], long: TrainConfig) -> None:
    first, second = whole
    assert_laid_out(first, long)
    assert not any((second.base / "model").iterdir()), "SageMaker merges the hosts' folders"
    assert not (second.base / "checkpoints").exists()
    assert first.log.count("step=5/") == 1, "in one write"
    assert (first.base / "output" / "success").exists() and not first.failure.exists()
    assert "Installing dependencies from requirements.txt" in first.log, "by pip, from the source folder"


def test_of_two_hosts_one_is_lost_and_the_job_goes_on(
    whole: list[Container], long: TrainConfig, job: Job, source: Path
) -> None:
    survivor, _ = interrupted(job("lost", 2, 1), long, source)
    assert survivor.processes[0].wait(PATIENCE) != 0
    assert survivor.failure.read_text().startswith("esm-neuron: error: rank 0: a peer has failed")
    assert_goes_on(survivor, job("back", 2, 1), whole[0], long, source)


def test_one_host_of_two_cores_is_killed_and_goes_on(
    whole: list[Container], long: TrainConfig, job: Job, source: Path
) -> None:
    """As a spot interruption: everything ends at once. The arithmetic of two ranks does not ask for their hosts."""
    (killed,) = interrupted(job("spot", 1, 2), long, source)
    assert not killed.failure.exists(), "it had no time to say anything"
    assert_goes_on(killed, job("again", 1, 2), whole[0], long, source)


def test_a_file_that_cannot_be_used_is_the_reason(long: TrainConfig, job: Job, source: Path, tmp_path: Path) -> None:
    bad = tmp_path / Path(str(long.data.train)).name
    bad.write_text(Path(str(long.data.train)).read_text().replace("alpha\n", "alpha,surplus\n", 1))
    (failing,) = job("bad", 1, 2)
    assert failing.start(FLAGS, source, {"train": bad}).wait(PATIENCE) != 0
    reason = failing.failure.read_text()
    assert reason.startswith("esm-neuron: error: ") and bad.name in reason and len(reason) <= 1024, reason


def test_values_that_a_shell_would_change_reach_the_run(long: TrainConfig, job: Job, tmp_path: Path) -> None:
    """The toolkit of the pinned image (5.1.1) joins the words of its command and gives them to a shell."""
    column, data = "Subcellular location [CC]", tmp_path / "train.csv"
    data.write_text(Path(str(long.data.train)).read_text().replace("label", column, 1))
    cfg = replace(long, loop=replace(long.loop, max_steps=2), data=replace(long.data, train=str(data)))
    source = staged(cfg, tmp_path, "--data.label_column", column)
    (container,) = job("shell", 1, 1)
    flags = {"config": "run.yaml", "backend": "cpu"}
    assert container.start(flags, source, {"train": data}).wait(PATIENCE) == 0, container.log[-4000:]
    assert settings.read_config(container.base / "checkpoints" / "config.yaml").data.label_column == column


def test_a_crash_leaves_its_traceback_as_the_reason(long: TrainConfig, job: Job, tmp_path: Path) -> None:
    source = staged(long, tmp_path)
    optim = source / "esm_neuron" / "training" / "optim.py"
    optim.write_text(optim.read_text() + "\nraise RuntimeError('planted')\n")
    (container,) = job("crash", 1, 1)
    assert run_all([container], long, source) == [1]
    assert container.failure.read_text().rstrip().endswith("RuntimeError: planted")


def test_compiling_ahead_runs_the_same_entry_point(long: TrainConfig, job: Job, source: Path) -> None:
    """On the cpu backend, whose refusal shows that `compile` was run, under the compiler's prefix."""
    (container,) = job("ahead", 1, 1)
    assert run_all([container], long, source, RUN_NEURON_PARALLEL_COMPILE="1") != [0]
    assert "backend=cpu compiles nothing" in container.failure.read_text()


def test_without_a_network_code_data_and_weights_come_by_channels(toy: Toy, job: Job, tmp_path: Path) -> None:
    """Network isolation with a baked image, whose package is this environment's: no pip, no hub."""
    if shutil.which("unshare") is None or subprocess.run([*NO_NETWORK, "true"], check=False).returncode:
        pytest.skip("unshare --net --map-root-user is not allowed on this machine; where it is: make test-launchers")
    weights_of, hub_id = tmp_path / "weights", "facebook/esm2_t6_8M_UR50D"
    torch.manual_seed(5)
    EsmForMaskedLM(esm_config(SHAPES["tiny"])).save_pretrained(weights_of)
    plain = toy("here", model={"name": str(weights_of), "init": "pretrained"})
    run.train(plain, str)

    files = {split: Path(str(getattr(plain.data, split))) for split in ("train", "valid", "test")}
    named = {split: f"elsewhere/{path.name}" for split, path in files.items()}
    cfg = replace(plain, model=replace(plain.model, name=hub_id), data=replace(plain.data, **named))
    channels = {split: f"s3://bucket/{split}/" for split in files}
    code = tmp_path / "sourcedir.tar.gz"
    with tarfile.open(code, "w:gz") as archive:
        for path in staged(cfg, tmp_path, baked=True, image="esm:1", **channels).iterdir():
            archive.add(path, path.name)
    (offline, without) = (job(name, 1, 1)[0] for name in ("offline", "without"))
    inputs = {**files, "model": weights_of, "code": code}
    flags = {"config": "run.yaml", "backend": "cpu"}
    source = offline.channels / "code" / code.name
    process = offline.start(flags, source, inputs, *NO_NETWORK, HF_HUB_OFFLINE="0")
    assert process.wait(PATIENCE) == 0, offline.log[-4000:]
    assert "Installing" not in offline.log

    used = settings.read_config(offline.base / "checkpoints" / "config.yaml")
    assert used.model.name == str(offline.channels / "model")
    for split, path in files.items():
        assert getattr(used.data, split) == str(offline.channels / split / path.name)
    kept = settings.read_config(offline.base / "model" / "config.yaml")
    assert kept.model.name == hub_id and {split: getattr(kept.data, split) for split in files} == named
    ours, theirs = (
        json.loads((folder / "result.json").read_text()) for folder in (Path(plain.output), offline.base / "model")
    )
    assert ours["valid"] == theirs["valid"] and ours["test"] == theirs["test"]
    mine = load_file(Path(plain.output) / "adapter" / "adapter_model.safetensors")
    assert all((value == weights(offline)[name]).all() for name, value in mine.items())

    del inputs["model"]
    source = without.channels / "code" / code.name
    assert without.start(flags, source, inputs, *NO_NETWORK, HF_HUB_OFFLINE="0").wait(PATIENCE) != 0
    assert f"model.name={hub_id} is no folder here, and the hub did not give it" in without.failure.read_text()
