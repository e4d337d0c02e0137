"""How many threads a command computes with and how they wait, decided before torch is loaded, which reads it once."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path


def prepare() -> None:
    """Set what libraries read from the environment when they are imported, unless the user has."""
    set_threads()
    # accelerate, which peft imports, would import torch_xla wherever it is installed: seconds, and it claims a device
    os.environ.setdefault("USE_TORCH_XLA", "0")
    # torch_xla imports torch's inductor, which would start a pool of compiler processes that nobody uses
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def set_threads(environ: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Set what OpenMP reads, unless the user has: threads that sleep while they wait, and no more than are allowed.

    By default a thread that waits for the others spins. Where another process needs its core, that keeps the very
    thread from working that it waits for: two threads then do less than one.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environ.keys():
        environ["OMP_WAIT_POLICY"] = "passive"
    most = cpu_limit(root)
    if most is not None and most < len(os.sched_getaffinity(0)) and "OMP_NUM_THREADS" not in environ:
        environ["OMP_NUM_THREADS"] = str(most)  # OpenMP sees the cores of the process and not its share of them


def cpu_limit(root: Path = Path("/")) -> int | None:
    """Return how many whole cores this process's control group may use, at least 1; None where nothing limits it."""
    shares = [quota / period for quota, period in _quotas(root) if quota > 0 and period > 0]
    return max(1, int(min(shares))) if shares else None


def _quotas(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (quota, period) of this process's group and of all above it, by both versions of control groups."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        folder = top / group.lstrip("/")
        # within a container the path may be the host's, and the group's own files lie at the top
        for place in (top, *(p for p in (folder, *folder.parents) if p.is_relative_to(top))):
            yield from _read_quota(place)


def _read_quota(folder: Path) -> Iterator[tuple[int, int]]:
    files = [("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    for names in files:
        try:
            words = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
            yield int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):  # no such file, or "max": no limit
            continue
