"""Runs on XLA:CPU in a process of its own, beside the same runs on the plain CPU; prints what happened as JSON.

python worker.py CONFIG.yaml FOLDER TASK.yaml...
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["PJRT_DEVICE"] = "CPU"
os.environ["USE_TORCH_XLA"] = "0"

import numpy as np
import pandas as pd
import torch_xla
import torch_xla.debug.metrics as met

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import runs
from helpers.device_run import GraphCount, patched
from helpers.packs import LAYOUTS, build, difference, gradients, predictions, proteins
from helpers.signals import stopping_after
from helpers.xla_tasks import on_both

from esm_neuron import cli
from esm_neuron.config import TrainConfig, settings
from esm_neuron.data.loader import TrainLoader
from esm_neuron.files import sha256
from esm_neuron.inference.embed import embed
from esm_neuron.inference.evaluate import evaluate
from esm_neuron.inference.predict import predict
from esm_neuron.inference.score import score
from esm_neuron.training import run
from esm_neuron.training.trainer import Trainer


def compiled() -> int:
    data = met.metric_data("CompileTime")
    return int(data[0]) if data else 0


def moved_to_host() -> int:
    data = met.metric_data("TransferFromDeviceTime")
    return int(data[0]) if data else 0


def count_graphs(cfg: TrainConfig) -> dict[str, int]:
    """Train; part of the loop -> graphs compiled there that no earlier run of this process has compiled."""
    with GraphCount(compiled) as graphs:
        run.train(cfg, str)
    return graphs.totals()


def count_reads(cfg: TrainConfig) -> list[int]:
    """Train; tensors that each step brought from the device to the host."""
    found = []

    def train_step(original: Any) -> Any:
        def wrapped(self: Trainer, data: Any) -> None:
            before = moved_to_host()
            original(self, data)
            found.append(moved_to_host() - before)

        return wrapped

    with patched(Trainer, "train_step", train_step):
        run.train(cfg, str)
    return found


def metrics(cfg: TrainConfig) -> dict[str, Any]:
    out = Path(cfg.output)
    return {
        "losses": runs.losses(cfg),
        "norms": [line["grad_norm"] for line in runs.step_lines(cfg)],
        "rates": [line["lr"] for line in runs.step_lines(cfg)],
        "steps": [line["step"] for line in runs.log_lines(cfg)],
        "weights": sha256(max((out / "checkpoints").iterdir()) / "model.safetensors"),
        "result": runs.result(cfg),
    }


def train(cfg: TrainConfig) -> dict[str, Any]:
    outcome = run.train(cfg, str)
    assert outcome.stopped_by is None
    return metrics(cfg)


def stop_and_go_on(cfg: TrainConfig, at: int) -> dict[str, Any]:
    """`cfg` stopped by SIGTERM after step `at` and resumed: how it ended, steps and programs of the second, and all."""
    trained = []

    def train_step(original: Any) -> Any:
        def wrapped(self: Trainer, data: Any) -> None:
            trained.append(data.step + 1)
            original(self, data)

        return wrapped

    with stopping_after(at):
        stopped_by = run.train(cfg, str).stopped_by
    with patched(Trainer, "train_step", train_step):
        counts = count_graphs(replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto")))
    return {"stopped_by": stopped_by, "trained": trained, "counts": counts, **metrics(cfg)}


def leave_out(cfg: TrainConfig, bad: int) -> dict[str, Any]:
    """`cfg` with a step whose loss is no number: what it compiled, and the weights and moments of each step."""

    def load(original: Any) -> Any:
        def spoiled(self: TrainLoader, step: int) -> Any:
            data = original(self, step)
            if step + 1 == bad:
                data = replace(data, batches=[replace(b, weights=b.weights * float("nan")) for b in data.batches])
            return data

        return spoiled

    with patched(TrainLoader, "load", load):
        counts = count_graphs(cfg)
    folders = sorted((Path(cfg.output) / "checkpoints").iterdir())
    names = ("model.safetensors", "optimizer.safetensors")
    return {"counts": counts, "saved": [[sha256(folder / name) for name in names] for folder in folders]}


def answer(folder: Path, source: Path) -> dict[str, Any]:
    """The run `cpu` asked on both devices, in pieces whose last batches are short; programs of each command."""
    small = ("--loop.eval_packs_per_device=1", "--data.pack_tokens=64", "--data.max_segments=2")
    found: dict[str, Any] = {}
    for name in ("cpu", "xla"):
        before = compiled()
        predict(str(folder / "cpu"), source, folder / f"{name}.csv", backend=name, settings=small)
        middle = compiled()
        embed(str(folder / "cpu"), source, folder / f"{name}.parquet", "residue", backend=name, settings=small)
        frame = pd.read_parquet(folder / f"{name}.parquet")
        found[name] = {
            "p": list(pd.read_csv(folder / f"{name}.csv")["p_alpha"]),
            "ids": list(frame["id"]),
            "embeddings": np.concatenate([np.stack(each).ravel()[::29] for each in frame["embedding"]]).tolist(),
            "graphs": [middle - before, compiled() - middle],
        }
    return found


def score_variants(folder: Path) -> dict[str, Any]:
    """Variants of one protein scored by the masked-LM run `mlm_cpu` on both devices; programs of the second's."""
    wild = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIE"
    (folder / "wild.fasta").write_text(f">wild\n{wild}\n")
    others = ["A" if residue == "G" else "G" for residue in wild]
    variants = [f"{wild[at]}{at + 1}{others[at]}" for at in range(0, 30, 3)]
    pd.DataFrame({"variant": variants}).to_csv(folder / "v.csv", index=False)
    small = ("--loop.eval_packs_per_device=2", "--data.pack_tokens=64", "--data.max_residues=62")
    found, before = {}, compiled()
    for name in ("cpu", "xla"):
        target = folder / f"scored-{name}.csv"
        score(
            str(folder / "mlm_cpu"),
            folder / "v.csv",
            target,
            wild_type=folder / "wild.fasta",
            backend=name,
            settings=small,
        )
        found[name] = list(pd.read_csv(target)["masked_marginal"])
    return {**found, "graphs": compiled() - before}


def packs() -> dict[str, dict[str, list[float]]]:
    """Kind of model -> how far proteins in packs are from each in a row of its own, in logits and in each gradient."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind in ("mean", "masked_lm"):
        model, sequences = build(kind, "masked").to(torch_xla.device()), proteins(masked=True)
        made = []
        for layout in ("padded", "packed otherwise, a filler pack"):
            answered = predictions(model, sequences, *LAYOUTS[layout])
            made.append((answered, gradients(model, answered)))
            torch_xla.sync()  # one program for all of them, not one for each that is read
        (alone, expected), (packed, learnt) = made
        found[kind] = {
            "logits": [difference(packed[number], logits) for number, logits in alone.items()],
            "gradients": [difference(learnt[name], gradient) for name, gradient in expected.items()],
        }
    return found


def in_two_processes(config: Path) -> dict[str, Any]:
    """How the command ends where torchrun has started two of them."""
    world = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    with mock.patch.dict(os.environ, world), redirect_stderr(io.StringIO()) as log:
        code = cli.main(["train", "--config", str(config), "--backend", "xla"])
    left = Path(settings.read_config(config).output).exists()
    return {"code": code, "line": log.getvalue().splitlines()[-1], "left": left}


def main(config: Path, folder: Path, tasks: list[Path]) -> None:
    base = settings.read_config(config)

    def make(name: str, backend: str = "xla", **sections: dict[str, Any]) -> TrainConfig:
        changed = {section: replace(getattr(base, section), **values) for section, values in sections.items()}
        return replace(base, output=str(folder / name), backend=backend, **changed)

    said: dict[str, Any] = {"two processes": in_two_processes(config)}
    torch_xla.device()  # before the first backward pass, even one on the CPU: autograd counts devices then
    accumulate, drop = {"packs_per_device": 2}, {"dropout": 0.1}
    said["packs"] = packs()
    said["cpu"] = train(make("cpu", "cpu"))
    said["counts"] = {"lora": count_graphs(make("xla"))}
    said["xla"] = metrics(make("xla"))
    said["evaluated"] = {
        name: evaluate(folder / "cpu", Path(str(base.data.test)), None, name, str) for name in ("cpu", "xla")
    }
    said["answered"] = answer(folder, Path(str(base.data.train)))
    said["counts"]["accumulated"] = count_graphs(make("accumulated", loop=accumulate))
    said["accumulated"] = metrics(make("accumulated", loop=accumulate))
    said["counts"]["full, dropout"] = count_graphs(
        make("whole", model=drop, adapter={"kind": "none"}, loop={**accumulate, "max_steps": 8})
    )
    said["whole"] = metrics(make("whole"))
    said["resumed"] = stop_and_go_on(
        make("resumed", model=drop, adapter={"kind": "none"}, loop={**accumulate, "max_steps": 8}), at=5
    )
    skip = make("skipped", loop={"on_nonfinite": "skip", "max_steps": 5, "eval_every": 5})
    said["skipped"] = leave_out(replace(skip, checkpoint=replace(skip.checkpoint, every=1, keep=9)), bad=3)
    masked = {"task": {"name": "masked_lm"}, "adapter": {"kind": "none"}}
    said["counts"]["masked_lm"] = count_graphs(make("mlm", **masked, loop={"max_steps": 6}))
    said["mlm"] = metrics(make("mlm"))
    said["mlm_cpu"] = train(make("mlm_cpu", "cpu", **masked, loop={"max_steps": 6}))
    said["scored"] = score_variants(folder)
    said["counts"]["bf16"] = count_graphs(make("bf16", loop={"precision": "bf16", "max_steps": 6}))
    said["bf16"] = metrics(make("bf16"))
    said["counts"]["checkpointing"] = count_graphs(
        make("again", model={"gradient_checkpointing": True}, loop={"max_steps": 6})
    )
    said["again"] = metrics(make("again"))
    quiet = replace(make("quiet", loop={"max_steps": 6, "eval_every": 6}), log=replace(base.log, every=6))
    said["reads"] = count_reads(replace(quiet, checkpoint=replace(quiet.checkpoint, every=6)))
    said["tasks"] = on_both(tasks)
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
