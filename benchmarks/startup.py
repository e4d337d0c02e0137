"""Seconds from a command to its answer, as ratios to `python -c "import torch"` in the same run.

python benchmarks/startup.py --against CHECKOUT     # medians of five, interleaved, also of another checkout's code

One protein and the packaged model `mini`; `train` is timed to its first step, which is when metrics.jsonl has it. Each
command is a process of its own. One round, which writes Python's compiled files, is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from machine import ROOT, load, machine

TORCH = "import torch"
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
COMMANDS = {
    "predict": "predict --model run --input one.fasta --output out.csv",
    "embed": "embed --model mini --input one.fasta --output out.parquet",
    "score": "score --model mini --input variants.csv --wild-type one.fasta --output out.csv",
    "train to its first step": "train --model mini --adapter lora --data.train train.csv --output new --log.every 1",
    "report": "report run",
    "--help": "--help",
    "train --help": "train --help",
    "data check": "data check train.csv",
    "doctor --backend cpu": "doctor --backend cpu",
    "a mistyped model": "embed --model minni --input one.fasta --output out.parquet",
    "a mistyped path": "predict --model run --input on.fasta --output out.csv",
    "a mistyped column": "train --model.name mini --data.train train.csv --data.label_column lable --output new",
    "a mistyped setting": "train --model.name mini --data.train train.csv --optim.lrr 1 --output new",
    "a mistyped flag": "predict --modle run --input one.fasta --output out.csv",
}
"""Name -> words after `esm-neuron`."""
GOALS = {"predict": 1.6, "embed": 1.6, "score": 1.6, "train to its first step": 2.0, "report": 1.0}
"""Largest ratio; everything else has a second."""


def prepare(folder: Path, environment: dict[str, str]) -> None:
    """Write the inputs, and train a run of LoRA on `mini` for one step."""
    rows = [f"p{i},{(AMINO_ACIDS[i % 20 :] + AMINO_ACIDS) * 2},{'ab'[i % 2]}" for i in range(40)]
    (folder / "train.csv").write_text("\n".join(["id,sequence,label", *rows]) + "\n")
    (folder / "one.fasta").write_text(f">one\n{AMINO_ACIDS * 5}\n")
    (folder / "variants.csv").write_text("variant\nA1C\nC2D\n")
    words = "train --model.name mini --data.train train.csv --output run --loop.max_steps 1"
    subprocess.run([*program(), *words.split()], cwd=folder, env=environment, check=True, capture_output=True)


def program() -> list[str]:
    return [sys.executable, "-m", "esm_neuron.cli"]


def seconds(name: str, folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Return how long one command takes: seconds of the clock, and of the processor."""
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    _run(name, folder, environment)
    taken, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(taken, 3), round(now.ru_utime + now.ru_stime - cpu.ru_utime - cpu.ru_stime, 3)


def _run(name: str, folder: Path, environment: dict[str, str]) -> None:
    shutil.rmtree(folder / "new", ignore_errors=True)
    words = [sys.executable, "-c", TORCH] if name == TORCH else [*program(), *COMMANDS[name].split()]
    first_step = folder / "new/metrics.jsonl" if name.startswith("train to") else None
    with subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while first_step is not None and process.poll() is None:
            if first_step.exists() and first_step.stat().st_size:
                process.kill()
            time.sleep(0.002)


def measure(checkouts: dict[str, Path], repeats: int) -> Iterator[dict[str, Any]]:
    """Yield after each round: name -> checkout -> the seconds of each repeat, of the clock and of the processor."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="esm-neuron-") as name:
        folder = Path(name)
        shared = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environments = {key: {**shared, "PYTHONPATH": str(path)} for key, path in checkouts.items()}
        prepare(folder, environments["this"])
        for repeat in range(repeats + 1):
            for command in (TORCH, *COMMANDS):
                for checkout, environment in environments.items():
                    if command == TORCH and checkout != "this":
                        continue
                    taken = seconds(command, folder, environment)
                    if repeat:
                        found.setdefault(command, {}).setdefault(checkout, []).append(taken)
            print(f"round {repeat} of {repeats}, load {load()}", file=sys.stderr)
            if repeat:
                yield found


def table(found: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """Return the medians as a table in Markdown: seconds of the clock and of the processor, and ratios of the latter.

    A ratio is to the import of torch. On a busy machine the clock counts what others do.
    """
    lines = ["| | before, s | CPU s | ratio | now, s | CPU s | ratio | goal |", "|---|---|---|---|---|---|---|---|"]
    _, torch = _medians(found[TORCH]["this"])
    for name in (TORCH, *COMMANDS):
        cells = []
        for checkout in ("before", "this"):
            clock, cpu = _medians(found[name].get(checkout, [(math.nan, math.nan)]))
            cells += [f"{clock:.2f}", f"{cpu:.2f}", f"{cpu / torch:.2f}"]
        goal = f"ratio {GOALS[name]}" if name in GOALS else "" if name == TORCH else "1.0 s"
        lines.append(f"| {name} | {' | '.join(cells)} | {goal} |".replace("nan", ""))
    return "\n".join(lines)


def _medians(repeats: Sequence[tuple[float, float]]) -> tuple[float, float]:
    clock, cpu = zip(*repeats, strict=True)
    return median(clock), median(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn as `before`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    checkouts = {"this": ROOT, **({"before": args.against.resolve()} if args.against else {})}
    args.output.mkdir(parents=True, exist_ok=True)
    about, loads = machine(), [load()]
    torch = (about["versions"]["torch"] or "").split("+")[0]
    for found in measure(checkouts, args.repeats):
        loads.append(load())
        result = {"machine": about, "load": loads, "seconds": found}
        (args.output / f"startup-torch{torch}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
