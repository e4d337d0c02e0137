"""A real Slurm on this machine, three nodes of one core: training over two, a stop, and a node that fails."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.processes import wait_for

from esm_neuron.config import TrainConfig, settings

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "salloc")
pytestmark = [
    pytest.mark.launchers,
    pytest.mark.skipif(
        os.geteuid() != 0 or any(shutil.which(name) is None for name in PROGRAMS),
        reason="needs root and apt-get install slurmctld slurmd slurm-client munge; with them: make test-launchers",
    ),
]

ROOT = Path(__file__).parents[2]
PATIENCE = 900
"""Seconds that a job may take on a busy machine."""
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={0}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=50
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={1} CPUs=1 RealMemory=1500
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={2} CPUs=1 RealMemory=1500
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={3} CPUs=1 RealMemory=1500
PartitionName=main Nodes=n[1-3] Default=YES State=UP
"""

Toy = Callable[..., TrainConfig]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a running cluster, which the commands of Slurm reach."""
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    (folder / "slurm.conf").write_text(
        CONF.format(*(free_port() for _ in range(4)), folder=folder, host=socket.gethostname())
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "VENV": sys.prefix}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    munge = [f"--{option}={folder / name}" for option, name in names.items()]
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        with (folder / f"{words[0]}.out").open("ab") as out:
            started.append(subprocess.Popen(words, stdout=out, stderr=out))

    start("munged", "--force", "--foreground", *munge)
    wait_for(lambda: (folder / "munge.socket").exists(), 30, started)
    start("slurmctld", "-D")
    for node in ("n1", "n2", "n3"):
        start("slurmd", "-D", "-N", node)
    wait_for(lambda: run("sinfo", "--noheader", "--format=%T %D") == "idle 3", 60, started)
    yield folder
    run("scancel", "--user=root")
    time.sleep(2)
    for process in reversed(started):
        process.terminate()
        process.wait(30)


def run(*words: str) -> str:
    """What a command prints. Who asks in a loop leaves the cores to the jobs."""
    time.sleep(0.5)
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def submit(slurm: Path, cfg: TrainConfig) -> str:
    """The number of a new job over two nodes."""
    path = slurm / f"{Path(cfg.output).name}.yaml"
    path.write_text(settings.dump(cfg))
    script = str(ROOT / "launchers" / "slurm" / "train.sbatch")
    return run("sbatch", "--parsable", "--nodes=2", f"--output={slurm}/%j.log", script, "--config", str(path))


def field(job: str, name: str) -> str:
    """A field of `scontrol show job`."""
    words = run("scontrol", "show", "job", job).split()
    return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")


def wait_for_step(slurm: Path, job: str, step: int) -> None:
    log = slurm / f"{job}.log"
    wait_for(lambda: log.exists() and f"\nstep={step}/" in log.read_text(), PATIENCE, [])


def wait_until_ended(job: str) -> str:
    """The state in which a job has ended."""
    going = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
    wait_for(lambda: field(job, "JobState") not in going, PATIENCE, [])
    return field(job, "JobState")


def weights(cfg: TrainConfig) -> str:
    return hashlib.sha256((Path(cfg.output) / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_stop_and_a_node_that_fails_lead_to_the_same_weights(
    slurm: Path, toy: Toy, tmp_path: Path, shown: Callable[..., None]
) -> None:
    loop = {"max_steps": 60, "packs_per_step": 4, "packs_per_device": 1, "eval_every": 60}
    cfg = toy(loop=loop, checkpoint={"every": 10}, log={"every": 5})
    whole, stopped, failing = (replace(cfg, output=str(tmp_path / name)) for name in ("whole", "stopped", "failing"))
    job = submit(slurm, whole)
    assert wait_until_ended(job) == "COMPLETED", (slurm / f"{job}.log").read_text()[-3000:]
    assert "mem=3000M" in field(job, "TRES"), "all memory of both nodes, not DefMemPerCPU"

    first = job = submit(slurm, stopped)
    wait_for_step(slurm, job, 20)
    run("scancel", "--signal=TERM", job)
    assert wait_until_ended(job) == "FAILED"  # torchrun's own exit code
    job = submit(slurm, stopped)
    assert wait_until_ended(job) == "COMPLETED", (slurm / f"{job}.log").read_text()[-3000:]
    assert "resumed after step " in (slurm / f"{job}.log").read_text()

    again = (slurm / f"{first}.log").read_text() + (slurm / f"{job}.log").read_text()

    job = submit(slurm, failing)
    wait_for_step(slurm, job, 20)
    run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    wait_for(lambda: field(job, "Restarts") == "1", PATIENCE, [])
    run("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert wait_until_ended(job) == "COMPLETED", (slurm / f"{job}.log").read_text()[-3000:]
    assert "resumed after step " in (slurm / f"{job}.log").read_text()
    final = {Path(cfg.output).name: weights(cfg) for cfg in (whole, stopped, failing)}
    logs = {"stopped": again, "failing": (slurm / f"{job}.log").read_text()}
    shown(final, **logs, slurmctld=(slurm / "slurmctld.out").read_text())
    assert len(set(final.values())) == 1


def test_a_shell_of_salloc_is_told_to_use_srun(slurm: Path) -> None:
    words = ["salloc", "--nodes=2", str(ROOT / "launchers" / "torchrun.sh"), "--dry-run", "--config", "c.yaml"]
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert "2 nodes are allocated and this shell runs on one; start all: srun --ntasks-per-node=1" in done.stderr
