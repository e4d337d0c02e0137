"""Measure all that a GPU can show in 45 minutes, each stage within its time, and keep what was printed.

python benchmarks/gpu_day.py            # on a CUDA GPU; `make gpu-day` installs first
python benchmarks/gpu_day.py --smoke    # the same commands on the CPU, with the shape `tiny`: whether they run

When a stage fails or is out of time, the next ones still run. What they print and write is under `results/gpu-NAME/`,
with a table of the stages in `summary.md`.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from machine import ROOT, gpu


@dataclass(frozen=True)
class Stage:
    """A command of the day."""

    name: str
    minutes: float
    """It is ended after these."""
    command: str
    """Words between blanks; {names} stand for what ON_GPU and ON_CPU have."""
    environment: dict[str, str] = field(default_factory=dict)
    needs_gpu: bool = False
    """Left out by --smoke."""


SPEED = "{python} benchmarks/throughput.py --backend {device} --output {output} --precision bf16 --rows {rows}"
RESUME = "tests/gpu/test_cuda.py::test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bytes"
STAGES = (
    Stage("tests", 8, "{python} -m pytest -q -m gpu", needs_gpu=True),
    Stage(
        "650M against HF",
        12,
        f"{SPEED} --shape {{650M}} --max-steps {{steps}} --adapters lora qlora none --checkpointing off on "
        "--settings ours group_by_length",
    ),
    Stage("exact resume", 3, f"{{python}} -m pytest -q -m gpu {RESUME}", needs_gpu=True),
    Stage(
        "3B QLoRA in 24 GB",
        4,
        f"{SPEED} --shape {{3B}} --max-steps 4 --adapters qlora --checkpointing on --settings ours",
        {"GPU_MEMORY_GB": "24"},
    ),
    Stage(
        "profile",
        4,
        "{python} benchmarks/profile_step.py --backend {device} --shape {650M} --precision bf16 --output {output}",
    ),
    Stage("3B LoRA", 3, f"{SPEED} --shape {{3B}} --max-steps 4 --settings ours"),
    Stage(
        "15B LoRA and QLoRA",
        7,
        f"{SPEED} --shape {{15B}} --max-steps 4 --adapters lora qlora --checkpointing on --settings ours",
    ),
    Stage(
        "embed 650M against HF",
        4,
        "{python} benchmarks/embed.py --backend {device} --shape {650M} --precision bf16 --rows {rows} "
        "--output {output}",
    ),
)
"""In the order of what would be missed most."""
ON_GPU = {
    "device": "cuda", "650M": "esm2_t33_650M", "3B": "esm2_t36_3B", "15B": "esm2_t48_15B", "rows": "416", "steps": "26",
}  # fmt: skip
ON_CPU = {"device": "cpu", "650M": "tiny", "3B": "tiny", "15B": "tiny", "rows": "32", "steps": "3"}


def run(stage: Stage, values: dict[str, str], log: Path) -> tuple[str, float]:
    """Run a stage; return how it ended and its minutes. What it printed is in `log`."""
    words = [word.format_map(values) for word in stage.command.split()]
    began = time.monotonic()
    with log.open("w") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **(stage.environment if values["device"] == "cuda" else {})},
        )  # fmt: skip
        try:
            code = process.wait(60 * stage.minutes)
            ended = "done" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"ended after {stage.minutes:g} minutes"
    return ended, (time.monotonic() - began) / 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="on the CPU, with the shape `tiny`")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-NAME")
    parser.add_argument("--only", nargs="+", default=[stage.name for stage in STAGES], help="names of stages")
    args = parser.parse_args()
    found = gpu()
    if found is None and not args.smoke:
        print("no GPU: nvidia-smi does not answer; --smoke tries the commands on the CPU", file=sys.stderr)
        return 2
    name = "smoke" if args.smoke else re.sub(r"[^a-z0-9]+", "-", str(found).split(",")[0].lower()).strip("-")
    output = (args.output or ROOT / "benchmarks/results" / f"gpu-{name}").resolve()
    output.mkdir(parents=True, exist_ok=True)
    values = {**(ON_CPU if args.smoke else ON_GPU), "output": str(output), "python": sys.executable}
    lines = [f"# {found or 'no GPU'}", "", "| stage | ended | minutes |", "|---|---|---|"]
    failed = False
    for stage in STAGES:
        if stage.name in args.only and not (stage.needs_gpu and args.smoke):
            log = output / f"{re.sub('[^a-z0-9]+', '-', stage.name.lower())}.log"
            ended, minutes = run(stage, values, log)
            failed |= ended != "done"
            lines.append(f"| {stage.name} | {ended} | {minutes:.1f} |")
            print(lines[-1], flush=True)
            (output / "summary.md").write_text("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
