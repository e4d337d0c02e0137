"""Predict and embed on a large FASTA of random proteins: rate, memory over time, and a kill in the middle.

python benchmarks/predict.py --records 200000 --folder FOLDER

The shape is `tiny`, newly initialized: what is measured is the engine around the model. Each command runs in a process
of its own, whose resident memory is read from /proc. The one to be killed gets SIGKILL once half of its shards are
there, and is resumed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from esm_neuron.config import DataConfig, LogConfig, LoopConfig, ModelConfig, TrainConfig
from esm_neuron.data.tokenizer import RESIDUES
from esm_neuron.training import run

AMINO_ACIDS = RESIDUES[:20]


def write_fasta(path: Path, records: int, seed: int = 0) -> int:
    """Write random proteins of 20 to 100 residues; return how many residues they have."""
    rng, total = random.Random(seed), 0
    with path.open("w") as file:
        for number in range(records):
            length = rng.randint(20, 100)
            total += length
            file.write(f">protein_{number}\n{''.join(rng.choices(AMINO_ACIDS, k=length))}\n")
    return total


def make_run(folder: Path) -> Path:
    """Make a finished run: one training step of the shape `tiny`, newly initialized."""
    rng = random.Random(1)
    rows = [f"p{i},{''.join(rng.choices(AMINO_ACIDS, k=50))},{'ab'[i % 2]}" for i in range(40)]
    (folder / "train.csv").write_text("\n".join(["id,sequence,label", *rows]) + "\n")
    cfg = TrainConfig(
        output=str(folder / "run"),
        model=ModelConfig(name="tiny", init="random"),
        data=DataConfig(train=str(folder / "train.csv")),
        loop=LoopConfig(max_steps=1, packs_per_step=1, packs_per_device=1),
        log=LogConfig(tensorboard=False),
    )
    if not (folder / "run" / "result.json").exists():
        run.train(cfg)
    return folder / "run"


def resident(pid: int) -> float:
    """Return the anonymous resident memory in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def watch(words: Sequence[str], parts: Path, kill_at: int | None = None) -> dict[str, Any]:
    """Run a command, noting memory and finished shards every half second; SIGKILL it at `kill_at` shards."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "esm_neuron.cli", *words])
    seen: list[tuple[float, int, float]] = []
    while process.poll() is None:
        try:
            memory = resident(process.pid)
        except (OSError, StopIteration):  # it has just ended
            break
        seen.append((time.monotonic() - began, len(list(parts.glob("[0-9]*"))), memory))
        if kill_at is not None and seen[-1][1] >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.5)
    code = process.wait()
    answering = [row for row in seen if row[1] > 0]
    first, last = answering[0], answering[-1]
    quarter = max(1, len(answering) // 4)
    return {
        "exit": code,
        "seconds": round(time.monotonic() - began, 1),
        "parts": last[1],
        "seconds from first to last part": round(last[0] - first[0], 1),
        "peak MB": round(max(row[2] for row in seen)),
        "peak MB by quarter of the answering": [
            round(max(row[2] for row in answering[i * quarter : (i + 1) * quarter] or [last])) for i in range(4)
        ],
    }


def check(table: Path, records: int) -> dict[str, Any]:
    """Return whether every record is there, once and in order."""
    frame = pd.read_parquet(table, columns=["id"]) if table.suffix == ".parquet" else pd.read_csv(table, usecols=["id"])
    ordered = frame["id"].tolist() == [f"protein_{number}" for number in range(records)]
    return {"rows": len(frame), "each once and in order": ordered}


def main() -> None:
    """Measure everything, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source, trained = args.folder / "proteins.fasta", make_run(args.folder)
    found: dict[str, Any] = {"records": args.records, "residues": write_fasta(source, args.records)}
    for name, command, kills in (
        ("predict", "predict", False),
        ("predict, killed and resumed", "predict", True),
        ("embed", "embed", False),
        ("embed, killed and resumed", "embed", True),
    ):
        target = args.folder / f"{name.replace(', ', '_').replace(' ', '_')}.parquet"
        target.unlink(missing_ok=True)
        words = [command, "--model", str(trained), "--input", str(source), "--output", str(target)]
        parts = target.with_name(f"{target.name}.shards")
        if kills:
            half = found[command]["parts"] // 2
            found[f"{name}: first"] = watch(words, parts, half)
            words.append("--resume")
        found[name] = {**watch(words, parts), **check(target, args.records)}
        found[name]["records a second"] = round(args.records / found[name]["seconds"])
        if kills:
            same = target.read_bytes() == (args.folder / f"{command}.parquet").read_bytes()
            found[name]["bytes equal to those of the run that was not killed"] = same
        print(json.dumps({name: found[name]}), file=sys.stderr)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
