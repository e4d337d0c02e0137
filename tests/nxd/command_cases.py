"""What a rank answers with finished runs: the commands that users give, on files, in a world of any size."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from helpers.device_run import LABELS, configuration
from parity import COMMANDS

from esm_neuron.config import BackendName
from esm_neuron.data.tokenizer import RESIDUES
from esm_neuron.inference.embed import embed
from esm_neuron.inference.evaluate import evaluate
from esm_neuron.inference.predict import predict
from esm_neuron.inference.score import Method, score
from esm_neuron.training import run

SMALL = ("--data.max_residues=46", "--data.pack_tokens=48", "--loop.eval_packs_per_device=1")
"""So that there are several pieces for the copies of the model to share."""
METHODS: dict[str, Method] = {"score": "pseudo-perplexity", "score marginals": "masked-marginal"}
"""A pass a residue, shared by all; or one piece, while a copy of the model has nothing to do."""


def make_runs(output: str) -> None:
    """A classifier and a language model with LoRA, trained on one CPU process; proteins and variants as files."""
    folder, rng = Path(output), random.Random(0)
    sequences = ["".join(rng.choices(RESIDUES[:20], k=rng.randint(4, 44))) for _ in range(90)]
    rows = [f"p{i},{sequence},{LABELS[i % 3]}" for i, sequence in enumerate(sequences)]
    (folder / "labelled.csv").write_text("\n".join(["id,sequence,label", *rows, ""]), encoding="utf-8")
    wild = "".join(rng.choices(RESIDUES[:20], k=44))
    variants = [f"{wild[at]}{at + 1}{rng.choice(RESIDUES[:20])}" for at in range(0, 44, 4)]
    (folder / "variants.csv").write_text("\n".join(["variant", *variants, ""]), encoding="utf-8")
    (folder / "wild.fasta").write_text(f">wild\n{wild}\n", encoding="utf-8")
    for name, task in (("cls", "sequence_classification"), ("mlm", "masked_lm")):
        labels = LABELS if name == "cls" else None
        few = {"task.name": task, "task.labels": labels, "loop.max_steps": 4, "optim.lr": 0.02}
        cfg = configuration(str(folder / name), set=few)
        data = replace(cfg.data, train=str(folder / "labelled.csv"), valid_fraction=0.1, homologs="off")
        run.train(replace(cfg, data=data, log=replace(cfg.log, baselines=False, predictions=False)), str)


def train_probe(output: str, file: Path, backend: BackendName, tp: int) -> None:
    """Fit a probe of every layer; it predicts for what it was fitted to."""
    reads = {"model.layers": "concat", "model.pooling": "mean+termini", "model.composition": True}
    cfg = configuration(output, backend=backend, set={**reads, "adapter.kind": "probe", "parallel.tp": tp})
    data = replace(cfg.data, train=str(file), test=str(file), valid_fraction=0.2, homologs="off")
    run.train(replace(cfg, data=data, log=replace(cfg.log, baselines=False)), str)


def answer(output: str, command: str, made: str, backend: BackendName, tp: int = 1) -> None:
    """One command of COMMANDS with a run of the folder `made`, on all ranks."""
    if command == "probe":
        train_probe(output, Path(made) / "labelled.csv", backend, tp)
        return
    name, source, target = COMMANDS[command]
    model, wanted, into = Path(made) / name, Path(made) / source, Path(output) / target
    words = (*SMALL, f"--parallel.tp={tp}")
    if command == "evaluate":
        evaluate(model, wanted, into, backend, str, words)
    elif command.startswith("predict"):
        predict(str(model), wanted, into, backend=backend, settings=words, log=str)
    elif command.startswith("embed"):
        pooling = "residue" if "residues" in command else "mean"
        embed(str(model), wanted, into, pooling, backend=backend, settings=words, log=str)
    else:
        method, wild = METHODS[command], Path(made) / "wild.fasta"
        score(str(model), wanted, into, method, wild_type=wild, backend=backend, settings=words, log=str)
