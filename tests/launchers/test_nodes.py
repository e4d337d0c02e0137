"""torchrun.sh on two "nodes" of this machine, by hand, under Slurm's and MPI's variables: stopped, killed, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.processes import wait_for
from helpers.runs import step_lines
from safetensors.torch import load_file

from esm_neuron.config import TrainConfig, settings

pytestmark = pytest.mark.launchers

ROOT = Path(__file__).parents[2]
STANDINS = Path(__file__).with_name("standins")
PATIENCE = 540
"""Seconds that a run of two processes may take on a busy machine."""
STEPS = 150

Toy = Callable[..., TrainConfig]


def start(words: list[str], cwd: Path, log: Path, **env: str) -> subprocess.Popen[str]:
    """A process with the stand-ins in reach, its output in `log`."""
    path = f"{STANDINS / 'slurm'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "1", "PATH": path, **env}
    found["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    with log.open("a") as file:
        return subprocess.Popen(words, cwd=cwd, env=found, stdout=file, stderr=subprocess.STDOUT, text=True)


def torchrun(cfg: TrainConfig, config: Path, log: Path, **env: str) -> subprocess.Popen[str]:
    """A node of a job, started by torchrun.sh from its own folder."""
    cwd = log.parent / log.stem
    cwd.mkdir(exist_ok=True)
    script = str(ROOT / "launchers" / "torchrun.sh")
    return start([script, "--config", str(config), "--output", cfg.output], cwd, log, **env)


@pytest.fixture(scope="module")
def long(module_toy: Toy) -> TrainConfig:
    """A run long enough to be interrupted, whose weights are best at its first validation: later ones are no better."""
    loop = {"max_steps": STEPS, "packs_per_device": 2, "eval_every": 50}
    return module_toy("long", loop=loop, optim={"lr": 1e-20}, checkpoint={"every": 10, "keep": 3})


@pytest.fixture(scope="module")
def config(long: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`long` as a file."""
    path = tmp_path_factory.mktemp("config") / "long.yaml"
    path.write_text(settings.dump(long))
    return path


def adapter(out: Path) -> dict[str, Any]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def last_state(out: Path) -> dict[str, Any]:
    return load_file(out / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


def steps(out: Path) -> list[int]:
    return [line["step"] for line in step_lines(TrainConfig(output=str(out)))]


def stopped_after(out: Path, log: Path) -> int:
    """The step after which a signal has stopped a run, with its state saved."""
    said, step = log.read_text(), steps(out)[-1]
    assert "stopped by SIGTERM; the state is saved" in said, said[-3000:]
    assert 20 < step < STEPS and (out / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    return step


def assert_same_end(one: Path, other: Path) -> None:
    for read in (adapter, last_state):
        mine, theirs = read(one), read(other)
        assert mine.keys() == theirs.keys()
        assert all((mine[name] == theirs[name]).all() for name in mine)
    assert steps(one) == steps(other) == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def whole(long: TrainConfig, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run of two nodes, started by hand, that share no folder."""
    folder = tmp_path_factory.mktemp("by-hand")
    cfg = replace(long, output="out")
    by_hand = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    nodes = [torchrun(cfg, config, folder / f"node{n}.log", NODE_RANK=str(n), **by_hand) for n in range(2)]
    codes = [node.wait(PATIENCE) for node in nodes]
    assert codes == [0, 0], "\n".join((folder / f"node{n}.log").read_text()[-3000:] for n in range(2))
    written = [folder / f"node{n}" / "out" for n in range(2) if (folder / f"node{n}" / "out" / "result.json").exists()]
    assert len(written) == 1, "one node writes"
    return written[0]


def test_nodes_that_share_no_folder_end_with_the_best_weights(whole: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    assert result["chosen_step"] == 50 < result["train"]["steps"] == STEPS
    assert steps(whole) == list(range(1, STEPS + 1))


def test_slurm_signals_every_process_and_the_requeued_job_goes_on(
    long: TrainConfig, config: Path, whole: Path, tmp_path: Path
) -> None:
    out, log, groups = tmp_path / "out", tmp_path / "job.log", tmp_path / "groups"
    words = ["bash", "launchers/slurm/train.sbatch", "--config", str(config), "--output", str(out)]
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.2",
        "MASTER_PORT": "29622",
        "SRUN_GROUPS": str(groups),
        "VENV": sys.prefix,
    }
    job = start(words, ROOT, log, **slurm)
    wait_for(lambda: len(steps(out)) > 20, PATIENCE, [job])
    agents = [psutil.Process(int(group)) for group in groups.read_text().split()]
    for process in [*agents, *(worker for agent in agents for worker in agent.children(recursive=True))]:
        process.send_signal(signal.SIGTERM)  # as Slurm does: torchrun and workers alike; torchrun passes its own on
    assert job.wait(PATIENCE) != 0
    stopped = stopped_after(out, log)
    assert start(words, ROOT, log, **slurm).wait(PATIENCE) == 0, log.read_text()[-3000:]
    assert f"resumed after step {stopped} of {STEPS}" in log.read_text()
    assert_same_end(out, whole)


def test_a_signal_to_torchrun_alone_saves_and_the_same_command_goes_on(
    long: TrainConfig, config: Path, whole: Path, tmp_path: Path
) -> None:
    """As a container's runtime or a supervisor stops it: one signal to the process that was started, torchrun.sh's."""
    out, log = tmp_path / "out", tmp_path / "node.log"
    cfg = replace(long, output=str(out))
    node = torchrun(cfg, config, log, NPROC_PER_NODE="2")
    wait_for(lambda: len(steps(out)) > 20, PATIENCE, [node])
    node.send_signal(signal.SIGTERM)
    assert node.wait(PATIENCE) != 0
    stopped = stopped_after(out, log)
    assert torchrun(cfg, config, log, NPROC_PER_NODE="2").wait(PATIENCE) == 0, log.read_text()[-3000:]
    assert f"resumed after step {stopped} of {STEPS}" in log.read_text()
    assert_same_end(out, whole)


def test_mpi_a_killed_worker_is_restarted_and_nothing_is_lost(
    long: TrainConfig, config: Path, whole: Path, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# made by mpirun\n127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    cfg = replace(long, output=str(tmp_path / "out"))
    mpi = {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "OMPI_MCA_orte_default_hostfile": str(hosts),
        "MASTER_PORT": "29633",
    }
    logs = [tmp_path / f"node{n}.log" for n in range(2)]
    nodes = [torchrun(cfg, config, log, OMPI_COMM_WORLD_RANK=str(n), **mpi) for n, log in enumerate(logs)]
    wait_for(lambda: len(steps(tmp_path / "out")) > 20, PATIENCE, nodes)
    worker = int(Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split()[0])
    os.kill(worker, signal.SIGKILL)
    codes = [node.wait(PATIENCE) for node in nodes]
    said = "\n".join(log.read_text() for log in logs)
    assert codes == [0, 0], said[-6000:]
    assert "resumed after step" in said
    assert_same_end(tmp_path / "out", whole)
