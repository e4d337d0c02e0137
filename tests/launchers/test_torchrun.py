"""What torchrun.sh would run, from the variables of each way of starting it; its --dry-run starts nothing."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from esm_neuron.backends.neuron_env import SETTINGS
from esm_neuron.config import TrainConfig

ROOT = Path(__file__).parents[2]
STANDINS = Path(__file__).with_name("standins")

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node-1,node-2"}
SLURM |= {"SLURM_PROCID": "1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
KUBERNETES = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "MASTER_ADDR": "loc-master-0", "HOSTNAME": "loc-worker-0"}


def dry(*words: str, standins: tuple[str, ...] = (), **env: str) -> tuple[int, list[str], dict[str, str], str]:
    """Exit code, words of the command, variables it would set, and what was said, on a machine without devices."""
    path = ":".join([*(str(STANDINS / name) for name in standins), "/usr/bin", "/bin"])
    script = str(ROOT / "launchers" / "torchrun.sh")
    done = subprocess.run(
        [script, "--dry-run", *words],
        env={"PATH": path, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    *variables, command = done.stdout.splitlines() or [""]
    return done.returncode, shlex.split(command), dict(line.split("=", 1) for line in variables), done.stderr


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/x.csv", "s3://***@bucket/x.csv"),
        ("https://me:se/cret@example.org/x", "https://***@example.org/x"),
        ("hf://owner/name@main/train", "hf://owner/name@main/train"),
        ("http://localhost:9000/x", "http://localhost:9000/x"),
    ],
)
def test_a_dry_run_shows_no_password(url: str, shown: str) -> None:
    code, command, _, _ = dry("--data.train", url)
    assert code == 0 and command[command.index("--data.train") + 1] == shown


def where(command: list[str]) -> dict[str, str]:
    """The command's --name=value words."""
    return dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--") and "=" in word)


def test_one_node_needs_nothing() -> None:
    code, command, variables, _ = dry("--config", "c.yaml")
    assert code == 0 and variables == {}
    assert command[0] == sys.executable and "--standalone" in command and "--nproc_per_node=1" in command
    assert command[-7:] == ["-m", "esm_neuron.cli", "train", "--config", "c.yaml", "--resume", "auto"]
    assert where(command)["max_restarts"] == "3"
    assert where(dry(MAX_RESTARTS="0")[1])["max_restarts"] == "0"


@pytest.mark.parametrize("given", [["--resume", "no"], ["--checkpoint.resume=no"]])
def test_resuming_is_asked_for_unless_the_user_has_spoken(given: list[str]) -> None:
    assert dry("--config", "c.yaml", *given)[1][-2 - len(given) :] == ["--config", "c.yaml", *given]


@pytest.mark.parametrize(
    ("env", "endpoint"),
    [
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}, "10.0.0.1:29500"),
        (SLURM, "node-1:29500"),
        ({**MPI, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7777"}, "10.0.0.1:7777"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "1", "MASTER_ADDR": "10.0.0.1"}, "10.0.0.1:29500"),
        (KUBERNETES, "loc-master-0:29500"),
        ({**SLURM, **MPI, "OMPI_COMM_WORLD_RANK": "0"}, "node-1:29500"),
    ],
    ids=["by hand", "Slurm", "Open MPI", "PMI", "Kubernetes", "MPI's variables under Slurm"],
)
def test_several_nodes(env: dict[str, str], endpoint: str) -> None:
    code, command, variables, said = dry("--config", "c.yaml", standins=("slurm",), **env)
    assert code == 0, said
    found = where(command)
    assert (found["nnodes"], found["rdzv_backend"], found["rdzv_endpoint"]) == ("2", "c10d", endpoint)
    assert found["rdzv_conf"].startswith("is_host=false,")
    assert variables == {}, "neither Trainium nor EFA here"


def test_open_mpis_hostfile_names_the_first_node(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# hosts\n\n  node-3 slots=1\nnode-4 slots=1\n")
    for name in ("OMPI_MCA_orte_default_hostfile", "PRTE_MCA_prte_default_hostfile"):
        found = where(dry(**{**MPI, name: str(hosts), "OMPI_COMM_WORLD_RANK": "0"})[1])
        assert found["rdzv_endpoint"] == "node-3:29500" and found["rdzv_conf"].startswith("is_host=true,")


def test_what_the_user_sets_wins() -> None:
    found = where(dry(standins=("slurm",), **SLURM, NNODES="4", NODE_RANK="3", MASTER_ADDR="a", NPROC_PER_NODE="8")[1])
    assert (found["nnodes"], found["rdzv_endpoint"], found["nproc_per_node"]) == ("4", "a:29500", "8")


def test_trainium_nodes_get_the_variables_of_the_library() -> None:
    ours = {s.name: s.value(TrainConfig(), True) for s in SETTINGS if s.name.startswith("FI_")}
    _, command, variables, _ = dry(standins=("neuron",), NC_COUNT="32", NNODES="2", NODE_RANK="0", MASTER_ADDR="a")
    assert where(command)["nproc_per_node"] == "32"
    assert variables == {**ours, "MALLOC_ARENA_MAX": "64"}
    assert dry(standins=("neuron",), NC_COUNT="2")[2] == {"MALLOC_ARENA_MAX": "64"}, "EFA is for several nodes"
    theirs = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "FI_PROVIDER": "tcp", "MALLOC_ARENA_MAX": "8"}
    kept = dry(standins=("neuron",), NC_COUNT="32", **theirs)[2]
    assert (kept["FI_PROVIDER"], kept["MALLOC_ARENA_MAX"]) == ("tcp", "8")


def test_compiling_ahead_is_the_same_command_behind_the_compiler() -> None:
    words = ("--config", "c.yaml", "--backend", "neuron")
    compiling = dry("--compile-only", *words, standins=("neuron",), NC_COUNT="2")[1]
    training = dry(*words, standins=("neuron",), NC_COUNT="2")[1]
    assert compiling[0] == "neuron_parallel_compile"
    assert [word for word in compiling[1:] if not word.startswith("--max_restarts")] == [
        "compile" if word == "train" else word
        for word in training
        if not word.startswith("--max_restarts") and word not in ("--resume", "auto")
    ]
    assert dry("--compile-only", *words)[1][0] == sys.executable, "other backends compile in the process"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NNODES": "2", "NODE_RANK": "0"}, "2 nodes and no address of the first one; set MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "node 2 of 2: must be two numbers"),
        ({"NNODES": "two"}, "node 0 of two: must be two numbers"),
        ({**SLURM, "SLURM_NTASKS": "64"}, "64 Slurm tasks on 2 nodes; start one a node: srun --ntasks-per-node=1"),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "start one a node: mpirun --map-by ppr:1:node"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0", "MPI_LOCALNRANKS": "2"}, "start one a node: mpirun -ppn 1"),
        (
            {**SLURM, "SLURM_PROCID": "", "SLURM_NODEID": "0"},
            "2 nodes are allocated and this shell runs on one; start all: srun --ntasks-per-node=1",
        ),
        ({"NC_COUNT": "0"}, "0 devices found; check the driver, or set NPROC_PER_NODE"),
        ({"NC_COUNT": "none"}, "neuron-ls lists no NeuronCores; check the driver"),
    ],
)
def test_what_cannot_work_is_one_line(env: dict[str, str], message: str) -> None:
    standins = ("slurm", "neuron") if "NC_COUNT" in env else ("slurm",)
    code, _, _, said = dry(standins=standins, **env)
    assert code == 2 and message in said and said.count("\n") == 1, said


def gpus(folder: Path, script: str) -> str:
    """A PATH with a stand-in for nvidia-smi."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


TWO = "echo 'GPU 0: NVIDIA A100 (UUID: GPU-1)'; echo '  MIG 3g.20gb Device 0: (UUID: MIG-1)'; echo 'GPU 1: NVIDIA A100'"


@pytest.mark.parametrize(
    ("script", "env", "processes"),
    [
        (TWO, {}, "2"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "1"}, "1"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2,MIG-3"}, "3"),
        ("echo broken; exit 9", {"NPROC_PER_NODE": "4"}, "4"),
    ],
)
def test_gpus_are_counted_as_the_processes_see_them(
    script: str, env: dict[str, str], processes: str, tmp_path: Path
) -> None:
    code, command, _, said = dry("--config", "c.yaml", PATH=gpus(tmp_path, script), **env)
    assert code == 0, said
    assert where(command)["nproc_per_node"] == processes


def test_a_driver_that_fails_is_one_line(tmp_path: Path) -> None:
    path = gpus(tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    code, _, _, said = dry("--config", "c.yaml", PATH=path)
    assert code == 2 and said.count("\n") == 1
    assert "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch; check the driver" in said


def test_a_job_gets_the_memory_of_its_nodes() -> None:
    """Without --mem a partition's DefMemPerCPU is all that an exclusive job gets, too."""
    for name in ("train", "compile"):
        assert "#SBATCH --mem=0" in (ROOT / "launchers" / "slurm" / f"{name}.sbatch").read_text().splitlines()


def test_hyperpod_restarts_the_step(tmp_path: Path) -> None:
    """train.sbatch gives srun --auto-resume where HyperPod's folder is; here there is none."""
    script = (ROOT / "launchers" / "slurm" / "train.sbatch").read_text()
    assert not Path("/opt/sagemaker_cluster").exists()
    fake = tmp_path / "srun"
    fake.write_text('#!/usr/bin/env bash\necho "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": sys.prefix}
    for folder, options in (("/opt/sagemaker_cluster", []), (str(tmp_path), ["--auto-resume=1"])):
        words = ["bash", "-c", script.replace("/opt/sagemaker_cluster", folder), "train.sbatch", "--config", "c"]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
        wanted = ["--kill-on-bad-exit=1", *options, "launchers/torchrun.sh", "--config", "c"]
        assert done.stdout.split() == wanted
