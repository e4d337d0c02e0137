"""Seconds of `esm-neuron predict` and of the same by Ray with two actors, on the same cores.

    python benchmarks/ray_predict.py                    # 4,000 proteins of the demo, three rounds, interleaved

Needs `pip install "ray[data]"` beside this package; Ray is in no lock. The run is `mini` after one step of training.
Plain `predict` is one process with a thread per core and reads one file; Ray has two actors, with half of the cores
each, and reads the same proteins from four files. Counted are whole commands, the start of a cluster among them, and
what is left without the start, which is what a command with one protein takes. The rows must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from machine import ROOT, load, machine

GOAL = 1.1
"""Ray's seconds over those of plain predict, at most."""
FILES, ACTORS = 4, 2
RESULTS = Path(__file__).parent / "results" / "ray.json"
CORES = len(os.sched_getaffinity(0))
PLAIN = (sys.executable, "-m", "esm_neuron.cli")
RAY = (sys.executable, str(ROOT / "launchers" / "ray" / "answers.py"))
ANSWER = ("predict", "--model", "run", "--input")


def prepare(folder: Path, proteins: int) -> None:
    """Write proteins of the demo into four files and into one, and train a run for one step."""
    frame = pd.read_csv(ROOT / "examples" / "demo" / "localization.tsv.gz", sep="\t", dtype=str).head(proteins)
    if len(frame) < proteins:
        sys.exit(f"--proteins {proteins}: the demo has {len(frame)}")
    records = [f">{name}\n{sequence}\n" for name, sequence in zip(frame["entry"], frame["sequence"], strict=True)]
    (folder / "in").mkdir()
    for number, rows in enumerate(np.array_split(np.arange(proteins), FILES)):
        (folder / "in" / f"part-{number}.fasta").write_text("".join(records[row] for row in rows))
    (folder / "all.fasta").write_text("".join(records))
    (folder / "one.fasta").write_text(records[0])
    frame.head(64)[["sequence", "label"]].to_csv(folder / "train.csv", index=False)
    words = "train --model.name mini --data.train train.csv --output run --loop.max_steps 1"
    seconds([*PLAIN, *words.split()], folder, CORES)


def seconds(words: Sequence[str], folder: Path, threads: int) -> float:
    """Run a command in `folder`; return its seconds."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **own, "RAY_worker_niceness": "0"}  # 15 by default: behind all others on these cores
    begun = time.perf_counter()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {(done.stdout + done.stderr)[-3000:]}")
    return time.perf_counter() - begun


def a_round(folder: Path, number: int) -> dict[str, dict[str, float]]:
    """Answer all proteins both ways, and one protein each for the start; return name -> seconds."""
    found: dict[str, dict[str, float]] = {"plain": {}, "ray": {}}
    each = max(1, CORES // ACTORS)
    actors = ["--actors", str(ACTORS), "--cpus", str(each)]
    for part, one, several in (("start", "one", "one.fasta"), ("whole", "all", "in")):
        out = f"{one}-{number}"
        found["plain"][part] = seconds([*PLAIN, *ANSWER, f"{one}.fasta", "--output", f"{out}.parquet"], folder, CORES)
        found["ray"][part] = seconds([*RAY, *ANSWER, several, "--output", out, *actors], folder, each)
    answers = pd.concat([pd.read_parquet(path) for path in sorted((folder / out).glob("*.parquet"))], ignore_index=True)
    # to the rounding of other packs and threads
    pd.testing.assert_frame_equal(pd.read_parquet(folder / f"{out}.parquet"), answers, rtol=1e-4, atol=1e-5)
    return found


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proteins", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    found: dict[str, Any] = {"proteins": args.proteins, "machine": machine(), "load_before": load()}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), args.proteins)
        found["rounds"] = [a_round(Path(name), number) for number in range(args.rounds)]
    for part, less in (("whole", 0.0), ("without the start", 1.0)):
        rounds = found["rounds"]
        plain, ray = (
            median(one[way]["whole"] - less * one[way]["start"] for one in rounds) for way in ("plain", "ray")
        )
        found[part] = {"plain": round(plain, 2), "ray": round(ray, 2), "ratio": round(ray / plain, 3), "goal": GOAL}
        print(f"{part:<18} plain {plain:8.2f} s, ray {ray:8.2f} s: ratio {ray / plain:.3f} (goal: at most {GOAL})")
    args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
