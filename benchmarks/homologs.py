"""How well homologs are found at every length, and what it costs: the tables of docs/dev/homologs.md.

python benchmarks/homologs.py                       # by length, on made proteins whose truth is known
python benchmarks/homologs.py --tsv scl2205.tsv.gz  # against MMseqs2: columns sequence, split, leaky
python benchmarks/homologs.py --scale 10000 100000  # seconds and memory to cluster families, and variants of a protein

Proteins are made of residues by their frequency in UniProt. Processor seconds are counted, for other jobs may run.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import ROOT, load, machine

from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.homology import find_clusters, find_homologs
from esm_neuron.data.tokenizer import encode_many

LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
FREQUENCY = np.array([
    8.26, 1.39, 5.46, 6.72, 3.87, 7.07, 2.28, 5.91, 5.80, 9.65,
    2.41, 4.06, 4.74, 3.93, 5.53, 6.64, 5.36, 6.86, 1.10, 2.92,
])  # fmt: skip
"""Percent of residues in Swiss-Prot, release 2023_01."""
LENGTHS = (8, 12, 16, 21, 30, 40, 60, 100, 200, 300, 500, 1000)
TARGETS, QUERIES = 10_000, 500


def made(rng: np.random.Generator, length: int) -> str:
    """Return a protein of independent residues."""
    return "".join(rng.choice(LETTERS, length, p=FREQUENCY / FREQUENCY.sum()))


def mutated(rng: np.random.Generator, sequence: str, number: int) -> str:
    """Return the sequence with so many residues replaced by others."""
    residues = list(sequence)
    for place in rng.choice(len(residues), number, replace=False).tolist():
        residues[place] = rng.choice([letter for letter in LETTERS if letter != residues[place]])
    return "".join(residues)


def related(rng: np.random.Generator, sequence: str, identity: float) -> str:
    """Return a homolog of about this identity, with a gap of 1 to 5 residues for each 60."""
    residues = list(mutated(rng, sequence, round((1 - identity) * len(sequence))))
    for _ in range(len(sequence) // 60):
        place, size = int(rng.integers(len(residues))), int(rng.integers(1, 6))
        if rng.random() < 0.5:
            del residues[place : place + size]
        else:
            residues[place:place] = list(made(rng, size))
    return "".join(residues)


def table_of(sequences: list[str]) -> ExampleTable:
    return ExampleTable.of(*encode_many(sequences))


def kinds_of(rng: np.random.Generator, own: list[str]) -> dict[str, list[str]]:
    """Return queries made from some targets, by what was done to them."""
    after = [made(rng, len(sequence)) for sequence in own]
    return {
        "random": after,
        "shuffled": ["".join(rng.permutation(list(sequence))) for sequence in own],
        **{f"{number} changed": [mutated(rng, sequence, number) for sequence in own] for number in (1, 2)},
        "moved by a third": [(s + more)[len(s) // 3 :][: len(s)] for s, more in zip(own, after, strict=True)],
        **{f"{percent} %": [related(rng, sequence, percent / 100) for sequence in own] for percent in (70, 50, 40)},
    }


def by_length(lengths: list[int]) -> list[dict[str, Any]]:
    """Return the share of queries with a homolog among TARGETS proteins, by length and by what the queries are."""
    rows = []
    for length in lengths:
        rng = np.random.default_rng(length)
        targets = [made(rng, length) for _ in range(TARGETS)]
        table, found = table_of(targets), {"length": float(length)}
        for kind, queries in kinds_of(rng, targets[:QUERIES]).items():
            found[kind] = float(find_homologs(table_of(queries), table, "kmer").mean())
        rows.append(found)
        print(json.dumps(found), file=sys.stderr)
    return rows


def agreement(path: Path) -> dict[str, float]:
    """Return how held-out proteins with a homolog, and clusters, agree with MMseqs2's."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    train, held = ([row for row in rows if (row["split"] == "train") is wanted] for wanted in (True, False))
    leaky = np.array([row["leaky"].lower() == "true" for row in held])
    began = time.process_time()
    queries, targets = (table_of([row["sequence"] for row in part]) for part in (held, train))
    found = find_homologs(queries, targets, "kmer")
    seconds = time.process_time() - began
    numbers: dict[str, float] = {
        "seconds": round(seconds, 1),
        "by MMseqs2": int(leaky.sum()),
        "found": int(found.sum()),
    }
    for split in ("valid", "test"):
        own = np.array([row["split"] == split for row in held])
        both = (found & leaky & own).sum()
        numbers |= {f"{split} recall": both / (leaky & own).sum(), f"{split} precision": both / (found & own).sum()}
    return numbers


def scale(sizes: list[int]) -> list[dict[str, Any]]:
    """Return what clustering costs: a third of proteins in families of 2 to 20, and variants of one protein."""
    rows = []
    for size in sizes:
        rng = np.random.default_rng(size)
        lengths = np.exp(rng.normal(np.log(300), 0.6, size)).clip(30, 3000).astype(int).tolist()
        families = [made(rng, length) for length in lengths]
        place = 0
        while place < size // 3:
            number = int(rng.integers(2, 21))
            for member in range(place + 1, place + number):
                families[member] = related(rng, families[place], rng.uniform(0.4, 0.9))
            place += number
        wild = made(rng, 300)
        for kind, sequences in (
            ("families", families),
            ("variants", [mutated(rng, wild, int(rng.integers(1, 6))) for _ in range(size)]),
        ):
            table = table_of(sequences)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            began = time.process_time()
            clusters = len(np.unique(find_clusters(table, "kmer")))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            seconds = round(time.process_time() - began, 1)
            rows.append({"kind": kind, "proteins": size, "seconds": seconds, "clusters": clusters})
            rows[-1] |= {"peak_mb": peak // 1024, "grown_mb": (peak - before) // 1024}
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tsv", type=Path, help="scl2205.tsv.gz")
    parser.add_argument("--scale", type=int, nargs="+", help="numbers of proteins")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/homologs.json")
    args = parser.parse_args()
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    if args.tsv:
        found["agreement"] = agreement(args.tsv)
    elif args.scale:
        found["scale"] = scale(args.scale)
    else:
        found["by_length"] = by_length(args.lengths)
    found |= {"machine": machine(), "load": load()}
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
