"""What measurements depend on: the processor, the memory, versions, the commit, and the load."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("torch", "torch_xla", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")


def machine() -> dict[str, Any]:
    """Return processor, memory, versions and commit."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions: dict[str, str | None] = {}
    for package in VERSIONS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory, 1),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "gpu": gpu(),
    }


def gpu() -> str | None:
    """Return name, memory, driver, power limit and clock of the first GPU; None if there is none."""
    asked = "name,memory.total,driver_version,power.limit,clocks.max.sm"
    try:
        words = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "--id=0"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def commit() -> str | None:
    """Return the commit, with `+changes` if tracked files other than results differ from it; None without git."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return f"{head}+changes" if changed else head


def load() -> float:
    """Return the mean number of running processes in the last minute, a run that has just ended included."""
    return round(os.getloadavg()[0], 2)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
