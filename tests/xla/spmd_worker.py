"""Trains over XLA:CPU devices in a process of its own, beside the same runs on the plain CPU; prints figures as JSON.

python spmd_worker.py mesh FOLDER TASK.yaml...    four devices, tp 2 x dp 2, and the plain CPU
python spmd_worker.py single FOLDER  one device: goes on from a checkpoint that `mesh` left in FOLDER
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from helpers.xla_tasks import on_both
from parity import difference
from torch import Tensor, nn

from esm_neuron.backends import create_backend
from esm_neuron.backends.base import Backend, Trained
from esm_neuron.build import Built, build_model
from esm_neuron.config import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TaskConfig,
    TrainConfig,
)
from esm_neuron.data.loader import EvalLoader
from esm_neuron.data.splits import load_splits
from esm_neuron.errors import ConfigError
from esm_neuron.inference.predict import predict
from esm_neuron.models.weights import Draw
from esm_neuron.tasks import create_task, task_class
from esm_neuron.tasks.base import Task
from esm_neuron.training import run
from esm_neuron.training.evaluation import forward, on_device, run_passes
from esm_neuron.training.run import Loaders
from esm_neuron.training.trainer import Trainer

FOLDER = Path(sys.argv[2])
LABELS = ("a", "b", "c")
STEPS, HALF = 20, 10


def configuration(name: str, task: str, backend: str, tp: int = 1, **loop: Any) -> TrainConfig:
    """A tiny LoRA run; two passes a step on the mesh, four on one device, of the same four rows."""
    return TrainConfig(
        output=str(FOLDER / name),
        backend=backend,
        seed=7,
        model=ModelConfig(name="tiny", init="random"),
        task=TaskConfig(name=task, labels=LABELS if task == "sequence_classification" else None),
        data=DataConfig(
            train=str(FOLDER / "train.csv"),
            valid=str(FOLDER / "valid.csv"),
            pack_tokens=48,
            max_residues=46,
            window_overlap=8,
            max_segments=6,
        ),
        adapter=AdapterConfig(r=4, alpha=8),
        parallel=ParallelConfig(tp=tp),
        optim=OptimConfig(lr=1e-3, schedule="constant", max_grad_norm=0.5),
        loop=LoopConfig(**{
            "max_steps": STEPS, "packs_per_step": 4, "packs_per_device": 1, "eval_packs_per_device": 2,
            "eval_every": HALF, **loop,
        }),
        checkpoint=CheckpointConfig(every=HALF),
        log=LogConfig(every=1, tensorboard=False),
    )  # fmt: skip


def write_proteins() -> None:
    """Random proteins of 4 to 24 residues with random labels."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("valid", 24)):
        with (FOLDER / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["id", "sequence", "label"])
            for number in range(count):
                residues = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), rng.integers(4, 25)))
                rows.writerow([f"{name} {number}", residues, LABELS[number % 3]])


@dataclass
class Run:
    """A model on its backend with its data, and what training showed."""

    cfg: TrainConfig
    backend: Backend
    task: Task
    built: Built
    loaders: Loaders
    trainer: Trainer
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the summed loss of the first step."""
    graphs: dict[str, list[int]] = field(default_factory=dict)
    """Part of the loop -> programs compiled each time."""

    @property
    def model(self) -> nn.Module:
        return self.built.model

    @classmethod
    def start(cls, cfg: TrainConfig) -> Run:
        """Build; every trained weight gets a value of its own, since a `lora_B` of 0 would hide much."""
        task = create_task(cfg.task, cfg.task.labels or ())
        backend = create_backend(cfg)
        built = build_model(cfg, task, backend)
        draw = Draw(cfg.seed + 1, 0.1)
        trained = {n: tuple(p.shape) for n, p in built.model.named_parameters() if p.requires_grad}
        backend.load_weights(built.model, {name: draw(name, shape) for name, shape in trained.items()})
        loaders = Loaders.of(cfg, load_splits(cfg, task_class(cfg.task.name).label_kind), task, backend)
        trainer = Trainer(cfg, built.model, task, backend, loaders.train, loaders.held_out["valid"], [], {})
        made = cls(cfg, backend, task, built, loaders, trainer)
        made._watch()
        return made

    def _watch(self) -> None:
        """Note losses, the first step's gradients, and what each part of the loop compiles."""
        passed = Counter[str]()
        sync, fetch = self.backend.sync, self.backend.fetch

        def log(number: int, rate: float, totals: Tensor, norm: Tensor) -> None:
            self.losses.append(float(totals[0] / totals[1]))
            self.norms.append(float(norm))

        def watched_sync() -> None:
            sync()
            passed["passes"] += 1
            if passed["passes"] == self.loaders.train.passes:  # the first step's last pass is done, its update is not
                trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
                self.gradients = {n: fetch(Trained(n, p, p, {}), p.grad) for n, p in trained}

        self.trainer._log, self._watched_sync = log, watched_sync
        for part in ("train_step", "evaluate", "save_checkpoint"):
            setattr(self.trainer, part, self._counted(part, getattr(self.trainer, part)))

    def _counted(self, part: str, act: Any) -> Any:
        def counted(*args: Any) -> Any:
            before = self.backend.graphs()
            value = act(*args)
            self.graphs.setdefault(part, []).append(self.backend.graphs() - before)
            return value

        return counted

    def train(self) -> Run:
        """Train from where the trainer stands."""
        before = self.backend.graphs()
        self.backend.sync = self._watched_sync
        assert self.trainer.fit() is None
        inside = sum(map(sum, self.graphs.values()))
        self.graphs["elsewhere"] = [self.backend.graphs() - before - inside]
        return self

    def go_on(self, source: Path, step: int) -> Run:
        """Train on from a checkpoint of another run."""
        folder = Path(self.cfg.output) / "checkpoints"
        shutil.copytree(source / "checkpoints" / f"step-{step:08d}", folder / f"step-{step:08d}")
        assert self.trainer.restore() == step
        return self.train()

    def logits(self, loader: EvalLoader) -> Tensor:
        """Where something is answered, in the order of the loader's rows: [answers, classes]."""
        found = []
        self.model.eval()
        for batch in loader:
            (moved,) = on_device([batch], self.backend)
            with torch.no_grad():
                logits = forward(self.model, moved)
            self.backend.sync()
            found.append(logits.cpu()[batch.weights > 0])
        self.model.train()
        return torch.cat(found)

    def valid_loader(self, rows: int) -> EvalLoader:
        """The validation data in passes of `rows`, however many devices share them."""
        cfg = replace(self.cfg, loop=replace(self.cfg.loop, eval_packs_per_device=rows))
        return EvalLoader(self.loaders.held_out["valid"].table, self.task, cfg)


def differences(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == expected.keys()
    return {name: difference(got[name], value) for name, value in expected.items()}


def parity(name: str, task: str) -> tuple[dict[str, Any], Run]:
    """The same run on the plain CPU and on the mesh."""
    plain = Run.start(configuration(f"{name} cpu", task, "cpu"))
    mesh = Run.start(configuration(f"{name} mesh", task, "xla", tp=2))
    before = difference(mesh.logits(mesh.valid_loader(4)), plain.logits(plain.valid_loader(4)))
    plain.train()
    mesh.train()
    weights, moments = mesh.backend.gather_state(mesh.model, mesh.trainer.optimizer)
    expected, expected_moments = plain.backend.gather_state(plain.model, plain.trainer.optimizer)
    predictions = mesh.trainer.evaluate(mesh.loaders.held_out["valid"])
    compared = {
        "passes": [plain.loaders.train.passes, mesh.loaders.train.passes],
        "batches": [len(plain.loaders.held_out["valid"]), len(mesh.loaders.held_out["valid"])],
        "local_dp": mesh.backend.local_dp,
        "logits": before,
        "losses": mesh.losses,
        "expected_losses": plain.losses,
        "norms": mesh.norms,
        "expected_norms": plain.norms,
        "gradients": differences(mesh.gradients, plain.gradients),
        "largest_gradients": {n: float(g.abs().max()) for n, g in plain.gradients.items()},
        "weights": differences(weights, expected),
        "moments": differences(moments, expected_moments),
        "graphs": mesh.graphs,
        "metrics": predictions,
        "expected_figures": plain.trainer.evaluate(plain.loaders.held_out["valid"]),
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
    batch = next(iter(mesh.loaders.held_out["valid"]))
    (moved,) = on_device([batch], mesh.backend)
    with torch.no_grad():
        logits = forward(mesh.model.eval(), moved)
    mesh.backend.sync()
    mesh.model.train()
    return {**{name: spec(tensor) for name, tensor in moved.tensors().items()}, "logits": spec(logits)}


def packs(mesh: Run) -> dict[str, Any]:
    """Logits of proteins that share rows against those of each alone in a batch."""
    predictions: dict[int, np.ndarray] = {}
    table = mesh.loaders.held_out["valid"].table
    used = []

    def take(members: np.ndarray, values: list[np.ndarray]) -> None:
        used.append(int((members >= 0).sum(1).max()))
        predictions.update({int(e): values[0][r, s] for (r, s), e in np.ndenumerate(members) if e >= 0})

    run_passes(mesh.model, mesh.task, mesh.backend, mesh.loaders.held_out["valid"], take)
    shared = np.stack([predictions[e] for e in range(len(table))])
    batch = next(iter(mesh.loaders.held_out["valid"]))
    got: list[np.ndarray] = []
    alone = []
    for example in range(len(table)):
        row = blank(batch)
        tokens = torch.from_numpy(table.sequence(example).astype(np.int64))
        place = example % len(row.input_ids)  # so that either half of the mesh answers
        row.input_ids[place, : len(tokens)] = tokens
        row.segment_ids[place, : len(tokens)] = 0
        row.positions[place, : len(tokens)] = torch.arange(len(tokens))
        run_passes(mesh.model, mesh.task, mesh.backend, [row], lambda _, values: got.append(values[0]))
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


def refused(act: Any) -> str:
    """The message of the ConfigError that `act` raises, "" where it raises none."""
    try:
        act()
    except ConfigError as error:
        return str(error)
    return ""


def messages() -> dict[str, str]:
    cls = "sequence_classification"
    sizes = SimpleNamespace(num_attention_heads=2, hidden_size=32, intermediate_size=128)
    padded = replace(configuration("-", cls, "xla"), parallel=ParallelConfig(tp=2, pad_heads=True))
    four = create_backend(configuration("-", cls, "xla", tp=4))
    sizes_3 = SimpleNamespace(num_attention_heads=4, hidden_size=32, intermediate_size=126)
    rows = configuration("-", cls, "xla", tp=2, packs_per_device=4)
    return {
        "devices": refused(lambda: create_backend(configuration("-", cls, "xla", tp=3))),
        "heads": refused(lambda: four.shard(SimpleNamespace(config=sizes))),
        "intermediate": refused(lambda: four.shard(SimpleNamespace(config=sizes_3))),
        "padding": refused(lambda: create_backend(padded)),
        "rows": refused(lambda: Run.start(rows)),
    }


def commands() -> dict[str, Any]:
    """`train` on the mesh and `predict` on the mesh and on the plain CPU, as the command line calls them."""
    cfg = configuration("commands", "sequence_classification", "xla", tp=2, max_steps=2)
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
    resumed = Run.start(configuration("cls mesh from cpu", "sequence_classification", "xla", tp=2))
    resumed.go_on(FOLDER / "cls cpu", HALF)
    plain = Run.start(configuration("cls cpu from mesh", "sequence_classification", "cpu"))
    plain.go_on(FOLDER / "cls mesh", HALF)
    return {
        "cls": cls,
        "mlm": mlm,
        "rows": rows_layout(mesh),
        "left_out": left_out(mesh),
        "packs": packs(mesh),
        "mesh_after_cpu": {"losses": resumed.losses, "graphs": resumed.graphs, "layout": layout(resumed)},
        "cpu_after_mesh": {"losses": plain.losses},
        "commands": commands(),
        "messages": messages(),
        "tasks": on_both([Path(name) for name in sys.argv[3:]], tp=2),
    }


def on_one_device() -> dict[str, Any]:
    single = Run.start(configuration("cls xla from mesh", "sequence_classification", "xla"))
    single.go_on(FOLDER / "cls mesh", HALF)
    tp = configuration("-", "sequence_classification", "xla", tp=2)
    message = refused(lambda: create_backend(tp))
    return {"losses": single.losses, "message": message, "local_dp": single.backend.local_dp}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(on_mesh() if sys.argv[1] == "mesh" else on_one_device()))
