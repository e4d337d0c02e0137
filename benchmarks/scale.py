"""How the cost of every stage grows with the data, beside peers: `make bench-scale`, the table of docs/performance.md.

Each figure is one process: processor seconds without imports, and the peak of its resident memory beyond them. The
proteins are made (log-normal lengths, median 300). `--million` adds 1,000,000; `--against FOLDER` measures another
checkout too, by turns; a peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import ROOT, load, machine

SIZES = (1_000, 10_000, 100_000)
HERE = Path(__file__).parent

SMALL = 100
"""Proteins of what is done once before the clock starts, so that no library is imported later."""
START = f"""
import contextlib, dataclasses, json, resource, sys, time
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.compute as pc
from pyarrow import csv
folder, size, cache = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
table, fasta = str(folder / (sys.argv[2] + ".csv")), str(folder / (sys.argv[2] + ".fasta"))
small = dict(table=str(folder / "{SMALL}.csv"), fasta=str(folder / "{SMALL}.fasta"), cache=cache + "-small")
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
"""
OURS = """
from esm_neuron.config import DataConfig, TaskConfig, TrainConfig
from esm_neuron.data import labels
from esm_neuron.data.check import check_file
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.sources import read_chunks
from esm_neuron.data.splits import load_splits
from esm_neuron.data.tokenizer import encode_many
data = DataConfig(train=table, valid_fraction=0.1, test_fraction=0.1, homologs="off")
"""
END = """
print(json.dumps({"seconds": time.process_time() - begin, "mb": peak() - before}))
"""


def timed(prepare: str, act: str) -> str:
    """Return code that prepares, acts on the small files, and measures how it acts on the others."""
    warm = "small['data'] = dataclasses.replace(data, train=small['table'], cache=data.cache and small['cache'])\n"
    return (
        f"{START}{prepare}\nact = {act!r}\n{warm if 'DataConfig' in prepare else ''}exec(act, globals() | small)\n"
        f"begin, before = time.process_time(), peak()\nexec(act, globals())\n{END}"
    )


STAGES: dict[str, tuple[str, str]] = {
    "read CSV": ("", "for chunk in read_chunks(table, data, ''): pass"),
    "read FASTA": ("", "for chunk in read_chunks(fasta, data): pass"),
    "data check, CSV": ("", "check_file(table, data, labels.Labels.of(TaskConfig(), data), 'train', None)"),
    "train: data, in memory": ("", "load_splits(TrainConfig(data=data), labels.Labels)"),
    "train: data, cache made": (
        "data = dataclasses.replace(data, cache=cache)",
        "load_splits(TrainConfig(data=data), labels.Labels)",
    ),
    "train: data, cache there": (
        "data = dataclasses.replace(data, cache=cache)",
        "load_splits(TrainConfig(data=data), labels.Labels)",
    ),
    "predict: its reading": (
        "import tempfile; from esm_neuron.inference.predict import TableSource\n"
        "from esm_neuron.inference.spool import Spool, scan",
        "source = TableSource(InputChunks(Path(fasta), data), 262_144)\n"
        "with tempfile.TemporaryDirectory() as place:\n"
        "  pieces = Spool(Path(place), source, scan(Path(place), source, None, False))\n"
        "  for number in range(len(pieces.scanned.rows)): pieces[number]",
    ),
    "metrics with intervals, 100 classes": (
        "from esm_neuron.metrics import classification_metrics; rng = np.random.default_rng(0)\n"
        "p = rng.dirichlet(np.ones(100), size); right = rng.integers(0, 100, size)",
        "classification_metrics(p, right, -np.log(p[np.arange(size), right]), list(map(str, range(100))), True)",
    ),
}
"""Stage -> what is prepared, and what is measured."""
PEERS: dict[str, tuple[str, str, str]] = {
    "pyarrow read_csv": ("read CSV", "", "csv.read_csv(table, csv.ReadOptions(use_threads=False))"),
    "polars read_csv": ("read CSV", "import polars", "polars.read_csv(table)"),
    "pyfastx": ("read FASTA", "import pyfastx", "for name, residues in pyfastx.Fastx(fasta): pass"),
    "polars check": (
        "data check, CSV",
        "import polars as pl",
        """
frame = pl.read_csv(table)
frame["sequence"].str.len_bytes().describe(); frame["label"].value_counts(); frame["sequence"].n_unique()
frame["id"].n_unique(); frame["sequence"].str.contains("[^ACDEFGHIKLMNPQRSTVWYXBUZO]").sum()
frame.group_by("sequence").agg(pl.col("label").n_unique()).filter(pl.col("label") > 1)
""",
    ),
    "30 lines of pyarrow and numpy": (
        "train: data, in memory",
        "from esm_neuron.data.tokenizer import encode_residues",
        """
with open(folder / "tokens", "wb") as out:
    reader = csv.open_csv(table, csv.ReadOptions(use_threads=False, block_size=1 << 24))
    for batch in reader:
        column = batch["sequence"].cast(pa.large_string())
        assert not pc.any(pc.match_substring_regex(column, "[^A-Z]")).as_py()
        pc.index_in(batch["label"], pc.unique(batch["label"]))
        data = column.buffers()[2]
        lengths = pc.binary_length(column).to_numpy()
        out.write(encode_residues(bytes(data)[: int(lengths.sum())], lengths)[0])
""",
    ),
}
"""Peer -> the stage it is beside, what is imported, and what is measured."""


def write_proteins(folder: Path, size: int) -> None:
    """Write the same proteins as CSV and as FASTA; a third of them are in families of 10, 90 % alike."""
    rng = np.random.default_rng(size)
    lengths = np.clip(rng.lognormal(np.log(300), 0.6, size), 30, 3000).astype(int).tolist()
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    parent = letters[:0]
    with (folder / f"{size}.csv").open("w") as table, (folder / f"{size}.fasta").open("w") as fasta:
        table.write("id,sequence,label\n")
        for number, length in enumerate(lengths):
            residues = letters[rng.integers(0, 20, length)]
            if number % 30 < 10 and number % 30:
                shared = parent[:length]
                kept = rng.random(len(shared)) < 0.9
                residues[: len(shared)][kept] = shared[kept]
            elif number % 30 == 0:
                parent = residues
            text = residues.tobytes().decode()
            table.write(f"P{number:07d},{text},class{number % 10}\n")
            lines = "\n".join(text[start : start + 60] for start in range(0, length, 60))
            fasta.write(f">P{number:07d} label=class{number % 10}\n{lines}\n")


def run(code: str, checkout: Path, *words: str) -> dict[str, float] | None:
    """Return what a process measured of itself; None where it failed, as where a peer is not installed."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {name: round(value, 5) for name, value in found.items()}


def measured(sizes: list[int], checkouts: dict[str, Path]) -> list[dict[str, Any]]:
    """Return a row for each stage or peer and size: seconds and MB, by checkout."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_proteins(folder, SMALL)
        for size in sizes:
            write_proteins(folder, size)
            for stage, (prepare, act) in STAGES.items():
                if stage.startswith("metrics") and size > max(SIZES):
                    continue  # no test has a million proteins, and curves of 100 classes take minutes
                row: dict[str, Any] = {"what": stage, "proteins": size}
                for which, checkout in checkouts.items():
                    code = timed(f"{OURS}{prepare}", act)
                    row[which] = run(code, checkout, str(folder), str(size), str(folder / f"{which}-{size}"))
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
            for peer, (beside, prepare, act) in PEERS.items():
                code = timed(prepare, act)
                row = {"what": peer, "proteins": size, "beside": beside}
                rows.append(row | {"this": run(code, ROOT, str(folder), str(size), str(folder))})
                print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def slope(sizes: list[int], values: list[float]) -> float | None:
    """Return by which power a cost grows, from its last two sizes."""
    if len(values) < 2 or min(values[-2:]) <= 0:
        return None
    return round(math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2]), 2)


def summary(rows: list[dict[str, Any]], which: str = "this") -> dict[str, dict[str, Any]]:
    """Return for each stage its slope, and its ratio to each peer at the largest size."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["what"], []).append(row)
    found: dict[str, dict[str, Any]] = {}
    for name, of in by_name.items():
        there = [row for row in of if row.get(which)]
        if not there:
            continue
        last = there[-1]
        sizes = [row["proteins"] for row in there]
        values = {kind: [row[which][kind] for row in there] for kind in ("seconds", "mb")}
        found[name] = {"slope": slope(sizes, values["seconds"]), "mb_slope": slope(sizes, values["mb"])}
        if "beside" in last:
            ours = next(r for r in by_name[last["beside"]] if r["proteins"] == last["proteins"])
            found[name] |= {
                "beside": last["beside"],
                "ours_over_it": round(ours["this"]["seconds"] / last[which]["seconds"], 2),
            }
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds and memory against proteins, a line for each stage, dashed for each peer."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4))
    for number, name in enumerate(dict.fromkeys(row["what"] for row in rows)):
        of = [row for row in rows if row["what"] == name and row.get("this")]
        for panel, kind in zip(panels, ("seconds", "mb"), strict=True):
            points = [(row["proteins"], max(row["this"][kind], 1e-3)) for row in of]
            style = "--" if name in PEERS else "-"
            if points:
                panel.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=f"C{number % 10}", label=name)
    for panel, label in zip(panels, ("processor seconds", "MB beyond imports"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="proteins", ylabel=label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].set_ylim(bottom=1)
    panels[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of proteins")
    parser.add_argument("--million", action="store_true", help="also 1,000,000 proteins: minutes, and 1 GB of disk")
    parser.add_argument("--against", type=Path, help="another checkout, measured by turns")
    parser.add_argument("--output", type=Path, default=HERE / "results/scale.json")
    args = parser.parse_args()
    checkouts = ({"against": args.against.resolve()} if args.against else {}) | {"this": ROOT}
    rows = measured(args.sizes + [1_000_000] * args.million, checkouts)
    found = {"rows": rows, "summary": {which: summary(rows, which) for which in checkouts}}
    plot(rows, args.output.with_suffix(".png"))
    args.output.write_text(json.dumps({"machine": machine(), "load": load(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
