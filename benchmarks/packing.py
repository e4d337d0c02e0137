"""Measure the speed, memory and efficiency of packing: `python benchmarks/packing.py --sequences 50000000`.

Lengths are drawn from a log-normal law close to UniProt's (median 300 residues) and cropped, or read from the sequence
column of a TSV file. One plan is made before the clock starts, so that numpy's own set-up is not counted. Prints a
JSON line, and writes it with the machine to
`results/packing-SOURCE-SEQUENCES-PACK_TOKENSxPACKS_PER_STEP-SEGMENTS.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import pandas as pd
from machine import machine

from esm_neuron.data.packing import plan_epoch


def drawn_lengths(sequences: int, pack_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the tokens of each sequence, int32, specials included, a million at a time to leave memory for the plan."""
    lengths = np.empty(sequences, np.int32)
    for start in range(0, sequences, 1_000_000):
        part = lengths[start : start + 1_000_000]
        part[:] = np.clip(rng.lognormal(np.log(300), 0.7, len(part)), 20, pack_tokens - 2) + 2
    return lengths


def read_lengths(path: str, column: str, pack_tokens: int) -> np.ndarray:
    """Return the tokens of each sequence of a TSV file, int64, cropped to the pack."""
    residues = pd.read_csv(path, sep="\t", usecols=[column])[column].str.len()
    return residues.clip(upper=pack_tokens - 2).to_numpy() + 2


def main() -> None:
    """Plan one epoch and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=1_000_000, help="how many lengths to draw")
    parser.add_argument("--tsv", help="read sequences from this file instead")
    parser.add_argument("--column", default="sequence", help="the TSV file's sequence column")
    parser.add_argument("--pack_tokens", type=int, default=1024, help="slots of a pack")
    parser.add_argument("--max_segments", type=int, default=32, help="most sequences in a pack")
    parser.add_argument("--packs_per_step", type=int, default=64, help="packs of a step")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    longest = args.pack_tokens
    lengths = read_lengths(args.tsv, args.column, longest) if args.tsv else drawn_lengths(args.sequences, longest, rng)
    plan_epoch(lengths[:100], longest, args.max_segments, args.packs_per_step, rng)
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    plan = plan_epoch(lengths, longest, args.max_segments, args.packs_per_step, rng)
    seconds = time.perf_counter() - start
    result = {
        "sequences": len(lengths),
        "seconds": round(seconds, 3),
        "sequences_per_second": round(len(lengths) / seconds),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_mib_before_planning": round(before_mib),
        "packs": plan.packs,
        "steps": len(plan),
        "efficiency": round(plan.efficiency(lengths), 4),
        "efficiency_computed": round(plan.efficiency(lengths, batches=1), 4),
        "efficiency_unpacked": round(float(lengths.mean()) / longest, 4),
    }
    print(json.dumps(result))
    source = Path(args.tsv).name if args.tsv else "drawn"
    settings = {**{name: value for name, value in vars(args).items() if name != "output"}, "tsv": source}
    args.output.mkdir(parents=True, exist_ok=True)
    packs = f"{args.pack_tokens}x{args.packs_per_step}-{args.max_segments}segments"
    target = args.output / f"packing-{source.split('.')[0]}-{len(lengths)}-{packs}.json"
    target.write_text(json.dumps({"machine": machine(), "settings": settings, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
