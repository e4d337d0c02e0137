"""Plan an epoch of a corpus that is planned and shuffled by shards: `python benchmarks/billion.py`.

A shard is a file of a million proteins. An epoch draws the order of the shards, takes some at a time (a window), and
plans the packs of each window as an epoch is planned today; docs/dev/scale.md says why. Prints a JSON line, and writes
it with the machine to `results/billion-SHARDSxPROTEINS-WINDOW.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from machine import machine
from packing import drawn_lengths

from esm_neuron.data.packing import pack_histogram, plan_epoch

PACK_TOKENS, MAX_SEGMENTS = 1024, 32


def windows(shards: int, window: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Give the shards of each window of an epoch, int64 [up to `window`]."""
    order = rng.permutation(shards)
    return (order[start : start + window] for start in range(0, shards, window))


def lengths_of(shards: np.ndarray, proteins: int) -> np.ndarray:
    """Return the lengths of the proteins of some shards, int32: drawn, since no corpus of this size lies here."""
    return np.concatenate([drawn_lengths(proteins, PACK_TOKENS, np.random.default_rng(int(s))) for s in shards])


def simulate(shards: int, proteins: int, window: int, packs_per_step: int) -> dict[str, float]:
    """Plan every window of one epoch; return seconds, memory, steps, and how well proteins are mixed."""
    planning, steps, packs, tokens, origins = [0.0], 0, 0, 0, []
    histograms = []
    for number, chosen in enumerate(windows(shards, window, np.random.default_rng(0))):
        lengths = lengths_of(chosen, proteins)
        start = time.process_time()
        plan = plan_epoch(lengths, PACK_TOKENS, MAX_SEGMENTS, packs_per_step, np.random.default_rng((0, 0, number)))
        planning.append(time.process_time() - start)
        histograms.append(np.bincount(lengths, minlength=PACK_TOKENS + 1))
        steps, packs, tokens = steps + len(plan), packs + plan.packs, tokens + int(lengths.sum(dtype=np.int64))
        some = [np.concatenate(plan.step(at)) // proteins for at in range(0, len(plan), max(1, len(plan) // 20))]
        origins += [float((each[:, None] == each[None]).mean()) for each in some]
    start = time.process_time()
    found = sum(
        -(-sum(r.packs for r in pack_histogram(h, PACK_TOKENS, MAX_SEGMENTS)) // packs_per_step) for h in histograms
    )
    seek = time.process_time() - start
    assert found == steps, (found, steps)
    return {
        "proteins": shards * proteins,
        "windows": len(histograms),
        "steps": steps,
        "planning_s": round(sum(planning), 1),
        "planning_s_per_window": round(max(planning), 2),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "seek_any_step_s": round(seek, 2),
        "index_mib": round(sum(h.nbytes for h in histograms) * window / 2**20, 1),
        "efficiency": round(tokens / (steps * packs_per_step * PACK_TOKENS), 4),
        "pairs_of_a_step_from_one_shard": round(float(np.mean(origins)), 4),
    }


def main() -> None:
    """Plan an epoch and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--proteins", type=int, default=1_000_000, help="of a shard")
    parser.add_argument("--window", type=int, default=32, help="shards that are planned together")
    parser.add_argument("--packs_per_step", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    result = simulate(args.shards, args.proteins, args.window, args.packs_per_step)
    print(json.dumps(result))
    target = args.output / f"billion-{args.shards}x{args.proteins}-{args.window}.json"
    target.write_text(
        json.dumps({"machine": machine(), "packs_per_step": args.packs_per_step, **result}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
