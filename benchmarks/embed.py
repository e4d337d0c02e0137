"""Residues per second of `esm-neuron embed` beside transformers with batches sorted by length: same proteins, one run.

python benchmarks/embed.py --backend cuda --shape esm2_t33_650M

Both read the same FASTA, have the same newly initialized weights, and write the mean over a protein's residues. Whole
processes are timed: imports, reading and writing are part of what a user waits for. Rows go to `results/embed-*.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from contestants import HERE
from machine import load, machine

DEMO = HERE.parent / "examples/demo/localization.tsv.gz"
PEER = """
import sys, numpy as np, torch
from transformers import AutoTokenizer, EsmModel
model, fasta, target, device, precision, batch = sys.argv[1:]
names = {"cuda": "cuda", "cpu": "cpu"}
net = EsmModel.from_pretrained(model, add_pooling_layer=False).eval().to(names[device])
tokenizer = AutoTokenizer.from_pretrained(model)
text = [record.split("\\n", 1)[1].replace("\\n", "") for record in open(fasta).read().split(">")[1:]]
order = sorted(range(len(text)), key=lambda i: len(text[i]))
found = [None] * len(text)
with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
    for start in range(0, len(order), int(batch)):
        some = order[start : start + int(batch)]
        inputs = tokenizer([text[i] for i in some], return_tensors="pt", padding=True).to(names[device])
        states = net(**inputs).last_hidden_state.float()
        for i, state in zip(some, states):
            found[i] = state[1 : len(text[i]) + 1].mean(0).cpu().numpy()
np.save(target, np.stack(found))
"""


def seconds(words: list[str]) -> float:
    """Run a command and return how long it took; its failure ends the benchmark."""
    began = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def folder_of(shape: str, folder: Path) -> Path:
    """Write a newly initialized network of the shape as a Hugging Face folder."""
    from transformers import EsmForMaskedLM

    from esm_neuron.data.tokenizer import hf_tokenizer
    from esm_neuron.models.shapes import SHAPES, esm_config

    target = folder / "model"
    EsmForMaskedLM(esm_config(SHAPES[shape])).save_pretrained(target)
    hf_tokenizer().save_pretrained(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="esm2_t6_8M")
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="proteins in a batch of the peer")
    parser.add_argument("--max-residues", type=int, default=1022)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    sequences = pd.read_csv(DEMO, sep="\t")["sequence"].str[: args.max_residues].head(args.rows).tolist()
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, fasta = Path(name), Path(name) / "in.fasta"
        fasta.write_text("".join(f">p{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
        model = folder_of(args.shape, folder)
        ours = [sys.executable, "-m", "esm_neuron.cli", "embed", "--model", str(model), "--input", str(fasta)]
        ours += ["--backend", args.backend, "--loop.precision", args.precision]
        peer = [sys.executable, "-c", PEER, str(model), str(fasta), str(folder / "peer.npy"), args.backend]
        peer += [args.precision, str(args.batch)]
        for number in range(args.repeats):
            times = {"ours": seconds([*ours, "--output", str(folder / f"{number}.parquet")]), "peer": seconds(peer)}
            runs.append({who: sum(map(len, sequences)) / spent for who, spent in times.items()})
            print(f"ours {runs[-1]['ours']:,.0f} residues/s, peer {runs[-1]['peer']:,.0f}")
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items()}
    record = {"machine": machine(), "load": load(), "settings": settings, "residues_per_second": runs}
    path = args.output / f"embed-{args.backend}-{args.shape}-{args.precision}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
