"""Does anything grow while a run goes on? Memory, open files, threads and compiled graphs over half an hour.

python benchmarks/long_run.py                  30 minutes on the CPU
python benchmarks/long_run.py --backend xla    on XLA:CPU, where graphs are counted

A tiny model trains with accumulation, packs, an evaluation every 200 steps and a checkpoint every 100, and is asked to
stop by SIGTERM when the time is over. Samples are averaged by the minute, since neighbouring ones are alike. Slopes are
least squares over these minutes, without the first fifth, with 95 % intervals by Student's t.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("USE_TORCH_XLA", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import tiny_run
from scipy import stats

from esm_neuron.training import run

RESULTS = Path(__file__).resolve().parent / "results"
QUANTITIES = {"memory_mb": "MB of resident memory", "files": "open files", "threads": "threads", "graphs": "graphs"}
WARM_UP = 0.2
"""Share of the time that is left out: allocators and caches fill."""


class Sampler:
    """A callback that notes what this process holds, at most once per second, and ends the run after `seconds`.

    It adds up by the minute in memory that it took at the start: a growing list would be part of what is measured.
    """

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds = time.monotonic(), seconds
        self.last, self.step = -1.0, 0
        self.sums = np.zeros((int(seconds / 60) + 10, len(QUANTITIES)))
        self.counts = np.zeros(len(self.sums), dtype=np.int64)

    def on_log(self, step: int, total: int, record: Any) -> None:
        now, self.step = time.monotonic() - self.began, step
        if now - self.last >= 1:
            self.last, values = now, {**held(), "graphs": record["graphs"]}
            self.sums[int(now / 60)] += [values[name] for name in QUANTITIES]
            self.counts[int(now / 60)] += 1
        if now > self.seconds:
            signal.raise_signal(signal.SIGTERM)

    def on_eval(self, step: int, record: Any) -> None:
        """Nothing."""

    def on_end(self, result: Any) -> None:
        """Nothing."""


def held() -> dict[str, float]:
    """Return what this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return {"memory_mb": memory, "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


def slope(sums: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Return the growth of a quantity per hour, with its 95 % interval, from the means of minutes after the warm-up.

    Args:
        sums: [minutes] the quantity's values, added up.
        counts: [minutes] how many.
    """
    at = np.flatnonzero(counts)
    at = at[at >= at[-1] * WARM_UP]
    means = sums[at] / counts[at]
    fit = stats.linregress(at / 60, means)
    error = fit.stderr if np.ptp(means) else 0.0  # of values that never change scipy has none
    half = float(stats.t.ppf(0.975, len(at) - 2) * error)
    return {
        "first": float(means[0]), "last": float(means[-1]), "per_hour": float(fit.slope),
        "low": float(fit.slope) - half, "high": float(fit.slope) + half, "points": len(at),
    }  # fmt: skip


def main() -> None:
    """Train, sample, and write the slopes."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--minutes", type=float, default=30.0)
    words.add_argument("--backend", choices=["cpu", "xla"], default="cpu")
    words.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    args = words.parse_args()
    sampler = Sampler(60 * args.minutes)
    make = run._callbacks
    run._callbacks = lambda *of: [make(*of)[0], sampler]  # the file, not the console
    with tempfile.TemporaryDirectory(prefix="long-run-") as name:
        folder = Path(name)
        tiny_run.write_proteins(folder)
        cfg = tiny_run.configuration(folder, "run", tiny_run.Mode(backend=args.backend), steps=10**8)
        cfg = replace(
            cfg,
            loop=replace(cfg.loop, eval_every=200),
            checkpoint=replace(cfg.checkpoint, every=100, asynchronous=True),
            log=replace(cfg.log, every=10),
        )
        outcome = run.train(cfg, str)
    if outcome.stopped_by != "SIGTERM":
        sys.exit("the run ended before its time")
    slopes = {name: slope(sampler.sums[:, index], sampler.counts) for index, name in enumerate(QUANTITIES)}
    content = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "backend": args.backend, "minutes": args.minutes,
        "steps": sampler.step, "samples": int(sampler.counts.sum()), "slopes": slopes,
    }  # fmt: skip
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"long_run-{args.backend}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for quantity, words_for_it in QUANTITIES.items():
        found = slopes[quantity]
        print(f"{words_for_it}: {found['per_hour']:+.3f} an hour ({found['low']:+.3f} to {found['high']:+.3f})")


if __name__ == "__main__":
    main()
