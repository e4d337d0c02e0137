"""How long it takes to read, check, split and encode proteins, and how much memory: `python benchmarks/reading.py`.

Writes a CSV and a FASTA file of the same random proteins (lengths by a law close to UniProt's, mean about 300 residues,
ten classes) and reads each in a fresh process with `load_splits`, a tenth each sampled for validation and for test.
`--against FOLDER` reads them with the code of another checkout too, by turns, and says whether both make the same
tables to the bit. Prints a line of JSON per file, and writes them with the machine to `results/reading-PROTEINS.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from machine import ROOT, machine

CLASSES = 10
FASTA_WIDTH = 60
FORMATS = (".csv", ".fasta")

# Runs in a process of its own, with the code of either checkout: peak memory is the process's, imports not timed.
READ = """
import json, resource, sys, time
from dataclasses import asdict
from esm_neuron.config import DataConfig, TrainConfig
from esm_neuron.data import labels
from esm_neuron.data.splits import load_splits

data = DataConfig(train=sys.argv[1], valid_fraction=0.1, test_fraction=0.1)
before, cpu = time.perf_counter(), time.process_time()
splits = load_splits(TrainConfig(data=data), getattr(labels, "Labels", True))
print(json.dumps({
    "seconds": time.perf_counter() - before,
    "cpu_seconds": time.process_time() - cpu,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "made": [splits.fingerprint, splits.labels, [asdict(report) for report in splits.reports], splits.sampled],
}))
"""


def write_proteins(folder: Path, proteins: int) -> None:
    """The same proteins in each format."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(240), 0.67, proteins), 20, 3000).astype(int)
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    with (folder / "proteins.csv").open("w") as table, (folder / "proteins.fasta").open("w") as fasta:
        table.write("id,sequence,label\n")
        for number, length in enumerate(lengths.tolist()):
            residues = letters[rng.integers(0, len(letters), length)].tobytes().decode()
            label = f"class{rng.integers(CLASSES)}"
            table.write(f"P{number:06d},{residues},{label}\n")
            lines = [residues[start : start + FASTA_WIDTH] for start in range(0, length, FASTA_WIDTH)]
            fasta.write(f">P{number:06d} label={label}\n" + "\n".join(lines) + "\n")


def read(path: Path, checkout: Path) -> dict[str, Any]:
    """What one process needed to read a file with the code of a checkout."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, str(path)]  # which looks for modules in the working folder first
    done = subprocess.run(command, cwd=checkout, env=env, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compared(path: Path, checkouts: dict[str, Path], repeats: int) -> dict[str, Any]:
    """Medians of each checkout over runs by turns, and the ratios to this one."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(repeats):
        for name, checkout in checkouts.items():
            runs[name].append(read(path, checkout))
    measures = ("seconds", "cpu_seconds", "peak_mib")
    result: dict[str, Any] = {"file": path.name}
    for name, made in runs.items():
        result[name] = {measure: round(median(run[measure] for run in made), 2) for measure in measures}
    if "against" in runs:
        result["ratio"] = {m: round(result["against"][m] / result["this"][m], 2) for m in measures}
        result["same"] = runs["against"][0]["made"] == runs["this"][0]["made"]
    return result


def main() -> None:
    """Write the files, read them, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proteins", type=int, default=200_000, help="how many proteins each file has")
    parser.add_argument("--against", type=Path, help="another checkout to compare with")
    parser.add_argument("--repeats", type=int, default=3, help="processes per file and checkout")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    checkouts = {"against": args.against.resolve()} if args.against else {}
    with tempfile.TemporaryDirectory() as folder:
        write_proteins(Path(folder), args.proteins)
        paths = [Path(folder, f"proteins{suffix}") for suffix in FORMATS]
        results = [compared(path, {**checkouts, "this": ROOT}, args.repeats) for path in paths]
    for result in results:
        print(json.dumps(result))
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {"proteins": args.proteins, "repeats": args.repeats}
    target = args.output / f"reading-{args.proteins}.json"
    target.write_text(json.dumps({"machine": machine(), "settings": settings, "files": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
