"""Threads: what a control group allows, what OpenMP is told, and that torch hears of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from esm_neuron.config.threads import cpu_limit, set_threads

TREES = {
    "v2, in a container": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
    "v2, a parent's limit": (
        {
            "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            "sys/fs/cgroup/slurm/job_7/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/slurm/job_7/step_0/cpu.max": "max 100000\n",
        },
        4,
    ),
    "v2, half a core": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "v1": (
        {
            "proc/self/cgroup": "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "v1 without a limit": (
        {
            "proc/self/cgroup": "4:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "v2 without a limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "no control groups": ({}, None),
}


def tree(folder: Path, name: str) -> Path:
    for path, text in TREES[name][0].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.mark.parametrize("name", TREES)
def test_a_control_groups_limit_is_read(tmp_path: Path, name: str) -> None:
    assert cpu_limit(tree(tmp_path, name)) == TREES[name][1]


def test_threads_sleep_and_are_no_more_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    found: dict[str, str] = {}
    set_threads(found, tree(tmp_path, "v2, a parent's limit"))
    assert found == {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "4"}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))  # fewer cores than the group allows
    found = {}
    set_threads(found, tmp_path)
    assert found == {"OMP_WAIT_POLICY": "passive"}


def test_what_the_user_sets_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    mine = {"OMP_NUM_THREADS": "6", "GOMP_SPINCOUNT": "100"}
    found = dict(mine)
    set_threads(found, tree(tmp_path, "v2, in a container"))
    assert found == mine


def test_torch_is_loaded_after_a_command_has_set_them() -> None:
    """And torch's own count follows."""
    code = """
import os, sys
from pathlib import Path
from esm_neuron import cli
from esm_neuron.config import threads
threads.cpu_limit = lambda root: 1
os.sched_getaffinity = lambda pid: range(4)
sys.argv = ["esm-neuron", "--version"]
cli.main()
assert "torch" not in sys.modules
import torch
print(torch.get_num_threads(), os.environ["OMP_WAIT_POLICY"])
"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_"))}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["1", "passive"]
