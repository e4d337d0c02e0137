"""Trains over XLA:CPU devices in a process of its own, beside the same runs on the plain CPU; prints metrics as JSON.

python spmd_worker.py mesh FOLDER TASK.yaml...    four devices, tp 2 x dp 2, and the plain CPU
python spmd_worker.py single FOLDER  one device: goes on from a checkpoint that `mesh` left in FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from helpers.device_run import LABELS, GraphCount, Run, configuration, examples
from helpers.refusals import outcome
from helpers.xla_tasks import on_both
from parity import difference
from torch import Tensor

from esm_neuron.backends import create_backend
from esm_neuron.config import (
    ParallelConfig,
    TrainConfig,
)
from esm_neuron.data.tokenizer import decode
from esm_neuron.inference.predict import predict
from esm_neuron.training import run
from esm_neuron.training.evaluation import Evaluator, forward, on_device

FOLDER = Path(sys.argv[2])
STEPS, HALF = 20, 10
TABLES = {"train": examples(40), "valid": examples(24, seed=1)}


def small(name: str, task: str, backend: str, tp: int = 1, **loop: Any) -> TrainConfig:
    """The tiny run; two passes a step on the mesh, four on one device, of the same four packs."""
    settings = {
        "task.name": task,
        "task.labels": LABELS if task == "sequence_classification" else None,
        "data.train": str(FOLDER / "train.csv"),
        "data.valid": str(FOLDER / "valid.csv"),
        "data.window_overlap": 8,
        "parallel.tp": tp,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "loop.max_steps": STEPS,
        "loop.eval_packs_per_device": 1,  # another shape than that of the logits, whose graph an evaluation could use
        "loop.eval_every": HALF,
        "checkpoint.every": HALF,
    }
    return configuration(
        str(FOLDER / name),
        backend=backend,
        set={**settings, **{f"loop.{field}": value for field, value in loop.items()}},
    )


def write_proteins() -> None:
    """Write the proteins of every run as files, for the commands."""
    for name, table in TABLES.items():
        rows = [
            {"id": f"{name} {i}", "sequence": decode(table.sequence(i)[1:-1]), "label": LABELS[table.labels[i]]}
            for i in range(len(table))
        ]
        pd.DataFrame(rows).to_csv(FOLDER / f"{name}.csv", index=False)


def start(*choices: Any, **loop: Any) -> Run:
    """The run of `small(...)`, built."""
    return Run.start(small(*choices, **loop), **TABLES)


def restored(run: Run, source: Path) -> Run:
    """The run at the checkpoint that another run made after half of its steps."""
    folder = Path(run.cfg.output) / "checkpoints"
    shutil.copytree(source / "checkpoints" / f"step-{HALF:08d}", folder / f"step-{HALF:08d}")
    assert run.trainer.restore() == HALF
    return run


def train(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and norms of all steps; gradients of the summed loss of the first, before its update."""
    gradients: dict[str, Tensor] = {}

    def keep() -> None:
        if not gradients:
            gradients.update({name: run.whole(name, grad) for name, grad in run.trained().items()})

    return run.train(keep), gradients


def differences(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == expected.keys()
    return {name: difference(got[name], value) for name, value in expected.items()}


def parity(name: str, task: str) -> tuple[dict[str, Any], Run]:
    """The same run on the plain CPU and on the mesh."""
    plain = start(f"{name} cpu", task, "cpu")
    mesh = start(f"{name} mesh", task, "xla", tp=2)
    before = difference(mesh.logits(), plain.logits())
    expected, expected_gradients = train(plain)
    with GraphCount(mesh.backend.graphs) as graphs:
        got, gradients = train(mesh)
        metrics = mesh.metrics()
    compared = {
        "passes": [plain.trainer.train_loader.passes, mesh.trainer.train_loader.passes],
        "batches": [len(plain.held_out), len(mesh.held_out)],
        "local_dp": mesh.backend.local_dp,
        "logits": before,
        **{kind: values.tolist() for kind, values in got.items()},
        **{f"expected_{kind}": values.tolist() for kind, values in expected.items()},
        "gradients": differences(gradients, expected_gradients),
        "largest_gradients": {n: float(g.abs().max()) for n, g in expected_gradients.items()},
        "state": differences(mesh.state(), plain.state()),
        "graphs": graphs.found,
        "metrics": metrics,
        "expected_metrics": plain.metrics(),
        "layout": layout(mesh),
    }
    return compared, mesh


def layout(mesh: Run) -> dict[str, Any]:
    """Parameter -> its shape, how it, its gradient and its moments lie on the devices, and each device's part of it."""
    import torch_xla
    from torch_xla.distributed.spmd.xla_sharding import wrap_as_sharded_tensor

    spec = torch_xla._XLAC._get_xla_sharding_spec
    found = {}
    for name, parameter in mesh.model.named_parameters():
        state = mesh.trainer.optimizer.state[parameter] if parameter.requires_grad else {}
        held = {"value": parameter, **({"gradient": parameter.grad, **state} if parameter.requires_grad else {})}
        found[name] = {
            "shape": list(parameter.shape),
            "specs": {kind: spec(tensor) for kind, tensor in held.items() if kind != "step"},
            "parts": {
                kind: [list(shard.data.shape) for shard in wrap_as_sharded_tensor(tensor.detach()).local_shards]
                for kind, tensor in held.items()
                if kind != "step"
            },
        }
    return found


def left_out(mesh: Run) -> dict[str, Any]:
    """An update whose loss is no number: what it changed, and how everything lies on the devices after it."""
    before = mesh.backend.gather_state(mesh.model, mesh.trainer.optimizer)
    for parameter in mesh.model.parameters():
        if parameter.grad is not None:
            parameter.grad.add_(1.0)
    totals = torch.tensor([float("inf"), 4.0]).to(mesh.backend.device)
    norm = mesh.backend.step(mesh.model, mesh.trainer.optimizer, totals, 1.0)
    mesh.backend.sync()
    after = mesh.backend.gather_state(mesh.model, mesh.trainer.optimizer)
    moved = [n for old, new in zip(before, after, strict=True) for n in old if not torch.equal(old[n], new[n])]
    return {"norm": str(float(norm)), "moved": moved, "layout": layout(mesh)}


def rows_layout(mesh: Run) -> dict[str, str]:
    """How a batch and the logits made of it lie on the devices."""
    import torch_xla

    spec = torch_xla._XLAC._get_xla_sharding_spec
    batch = next(iter(mesh.held_out))
    (moved,) = on_device([batch], mesh.backend)
    with torch.no_grad():
        logits = forward(mesh.model.eval(), moved)
    mesh.backend.sync()
    mesh.model.train()
    return {**{name: spec(tensor) for name, tensor in moved.tensors().items()}, "logits": spec(logits)}


def packs(mesh: Run) -> dict[str, Any]:
    """Logits of proteins that share rows against those of each alone in a batch."""
    predictions: dict[int, np.ndarray] = {}
    table = mesh.held_out.table
    used = []

    def take(members: np.ndarray, values: list[np.ndarray]) -> None:
        used.append(int((members >= 0).sum(1).max()))
        predictions.update({int(e): values[0][r, s] for (r, s), e in np.ndenumerate(members) if e >= 0})

    evaluator = Evaluator(mesh.model, mesh.task, mesh.backend)
    evaluator.run(mesh.held_out, take)
    shared = np.stack([predictions[e] for e in range(len(table))])
    batch = next(iter(mesh.held_out))
    got: list[np.ndarray] = []
    alone = []
    for example in range(len(table)):
        row = blank(batch)
        tokens = torch.from_numpy(table.sequence(example).astype(np.int64))
        place = example % len(row.input_ids)  # so that either half of the mesh answers
        row.input_ids[place, : len(tokens)] = tokens
        row.segment_ids[place, : len(tokens)] = 0
        row.positions[place, : len(tokens)] = torch.arange(len(tokens))
        evaluator.run([row], lambda _, values: got.append(values[0]))
        alone.append(got[-1][place, 0])
    return {
        "most_in_a_row": max(used),
        "difference": difference(torch.from_numpy(shared), torch.from_numpy(np.stack(alone))),
    }


def blank(batch: Any) -> Any:
    """A batch of the same shape that holds padding alone."""
    emptied = {name: torch.zeros_like(tensor) for name, tensor in batch.tensors().items()}
    emptied["input_ids"] += 1
    emptied["segment_ids"] -= 1
    return replace(batch, **emptied)


def messages() -> dict[str, str]:
    cls = "sequence_classification"
    sizes = SimpleNamespace(num_attention_heads=2, hidden_size=32, intermediate_size=128)
    padded = replace(small("-", cls, "xla"), parallel=ParallelConfig(tp=2, pad_heads=True))
    four = create_backend(small("-", cls, "xla", tp=4))
    sizes_3 = SimpleNamespace(num_attention_heads=4, hidden_size=32, intermediate_size=126)
    rows = small("-", cls, "xla", tp=2, packs_per_device=4)
    return {
        "devices": outcome(lambda: create_backend(small("-", cls, "xla", tp=3))),
        "heads": outcome(lambda: four.shard(SimpleNamespace(config=sizes))),
        "intermediate": outcome(lambda: four.shard(SimpleNamespace(config=sizes_3))),
        "padding": outcome(lambda: create_backend(padded)),
        "rows": outcome(lambda: Run.start(rows, **TABLES)),
    }


def commands() -> dict[str, Any]:
    """`train` on the mesh and `predict` on the mesh and on the plain CPU, as the command line calls them."""
    cfg = small("commands", "sequence_classification", "xla", tp=2, max_steps=2)
    outcome = run.train(cfg, str)
    folder = Path(cfg.output)
    predict(str(folder), FOLDER / "valid.csv", FOLDER / "mesh.csv", log=str)
    predict(str(folder), FOLDER / "valid.csv", FOLDER / "cpu.csv", backend="cpu", log=str)
    first, second = pd.read_csv(FOLDER / "mesh.csv"), pd.read_csv(FOLDER / "cpu.csv")
    columns = [f"p_{label}" for label in LABELS]
    gap = np.abs(first[columns].to_numpy() - second[columns].to_numpy()).max()
    return {"steps": outcome.result["train"]["steps"], "ids": list(first["id"]), "difference": float(gap)}


def on_mesh() -> dict[str, Any]:
    write_proteins()
    cls, mesh = parity("cls", "sequence_classification")
    mlm, _ = parity("mlm", "masked_lm")
    resumed = restored(start("cls mesh from cpu", "sequence_classification", "xla", tp=2), FOLDER / "cls cpu")
    with GraphCount(resumed.backend.graphs) as graphs:
        losses = resumed.train()["losses"].tolist()
    plain = restored(start("cls cpu from mesh", "sequence_classification", "cpu"), FOLDER / "cls mesh")
    return {
        "cls": cls,
        "mlm": mlm,
        "rows": rows_layout(mesh),
        "left_out": left_out(mesh),
        "packs": packs(mesh),
        "mesh_after_cpu": {"losses": losses, "graphs": graphs.found, "layout": layout(resumed)},
        "cpu_after_mesh": {"losses": plain.train()["losses"].tolist()},
        "commands": commands(),
        "messages": messages(),
        "tasks": on_both([Path(name) for name in sys.argv[3:]], tp=2),
    }


def on_one_device() -> dict[str, Any]:
    single = restored(start("cls xla from mesh", "sequence_classification", "xla"), FOLDER / "cls mesh")
    losses = single.train()["losses"].tolist()
    message = outcome(lambda: create_backend(small("-", "sequence_classification", "xla", tp=2)))
    return {"losses": losses, "message": message, "local_dp": single.backend.local_dp}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(on_mesh() if sys.argv[1] == "mesh" else on_one_device()))
