"""Requests and residues per second of `esm-neuron serve` beside one request per forward pass, and times to answers.

    python benchmarks/serve.py --run runs/mine [--requests 512] [--soak 10000] [--output benchmarks/results/serve.json]

Each request holds one protein of the demo. The naive loop predicts for one protein after the other in this process,
without HTTP; clients are threads of this process, each with its own connection per request. `--soak` then sends so many
requests by 64 clients to one server: its memory at each tenth of them says whether it grows.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = (1, 8, 64)


def demo_proteins(count: int) -> list[tuple[str, str]]:
    """Return (id, residues) of some of the demo's test proteins, again from the first where there are fewer."""
    with gzip.open(ROOT / "examples" / "demo" / "localization.tsv.gz", "rt", encoding="utf-8") as file:
        rows = [
            (row["entry"], row["sequence"]) for row in csv.DictReader(file, delimiter="\t") if row["split"] == "test"
        ]
    return list(islice(cycle(rows), count))


def naive(run: Path, proteins: list[tuple[str, str]]) -> dict[str, float]:
    """Return the rates of a loop of one protein per forward pass."""
    from esm_neuron.inference.serving import load

    model = load(run)
    model.predict(proteins[:1])
    begin = time.perf_counter()
    for protein in proteins:
        model.predict([protein])
    return rates(proteins, time.perf_counter() - begin)


def rates(proteins: list[tuple[str, str]], seconds: float) -> dict[str, float]:
    residues = sum(len(residues) for _, residues in proteins)
    return {"requests_per_second": len(proteins) / seconds, "residues_per_second": residues / seconds}


def resident(process: int) -> float:
    """Return the megabytes that a process holds."""
    text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1e3


def served(run: Path, proteins: list[tuple[str, str]], clients: int) -> dict[str, Any]:
    """Return the rates of a server with so many clients, the quantiles of its answers' times, and its memory in MB, at
    the start and after each tenth of the requests."""
    command = [sys.executable, "-m", "esm_neuron.cli", "serve", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        place = next(found[1] for line in server.stderr if (found := re.search(r"answers at (http\S+)/predict", line)))

        def ask(protein: tuple[str, str]) -> float:
            begin, (name, residues) = time.perf_counter(), protein
            body = json.dumps({"records": [{"id": name, "sequence": residues}]}).encode()
            request = urllib.request.Request(f"{place}/predict", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=300) as answer:
                assert json.load(answer)["predictions"][0]["id"] == name
            return time.perf_counter() - begin

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(ask, proteins[: 2 * clients]))  # warm
            memory, times, begin = [resident(server.pid)], list[float](), time.perf_counter()
            for number, took in enumerate(pool.map(ask, proteins), 1):
                times.append(took)
                if number % max(1, len(proteins) // 10) == 0:
                    memory.append(resident(server.pid))
            seconds = time.perf_counter() - begin
        server.terminate()
    times.sort()
    quantiles = {f"p{q}_seconds": times[min(len(times) - 1, len(times) * q // 100)] for q in (50, 95, 99)}
    return {**rates(proteins, seconds), **quantiles, "memory_mb": [round(each) for each in memory]}


def main() -> None:
    """Run the command at the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of a training run")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--soak", type=int, default=0, help="requests of the look at the memory")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    proteins = demo_proteins(args.requests)
    found: dict[str, Any] = {"requests": args.requests, "naive": naive(args.run, proteins)}
    for clients in CLIENTS:
        found[f"{clients} clients"] = served(args.run, proteins, clients)
    if args.soak:
        found[f"{args.soak} requests by 64 clients"] = served(args.run, demo_proteins(args.soak), 64)
    text = json.dumps({name: rounded(value) for name, value in found.items()}, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    return (
        {name: rounded(each) for name, each in value.items()}
        if isinstance(value, dict)
        else (round(value, 4) if isinstance(value, float) else value)
    )


if __name__ == "__main__":
    main()
