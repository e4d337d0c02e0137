"""What a rank does in a test: build on the real backend, train with the real trainer, leave whole tensors behind."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from optimum.neuron.peft.tuners.lora.layer import NeuronLoraLayer
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from esm_neuron.backends import create_backend, neuron, opened_backend
from esm_neuron.backends.base import Backend
from esm_neuron.backends.neuron import NeuronBackend
from esm_neuron.backends.spmd import SpmdBackend
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
from esm_neuron.data.dataset import Batch, ExampleTable
from esm_neuron.data.loader import EvalLoader, StepData, TrainLoader
from esm_neuron.data.tokenizer import AMINO_ACIDS, CLS, EOS
from esm_neuron.errors import TrainingError
from esm_neuron.inference.load import read_adapter
from esm_neuron.models.esm2 import encoder_of, set_attention
from esm_neuron.models.lora import saved_key
from esm_neuron.models.tensor_parallel import cut_of, whole_shape
from esm_neuron.models.weights import Draw
from esm_neuron.tasks import create_task
from esm_neuron.tasks.base import Task
from esm_neuron.training.evaluation import forward, on_device, run_passes
from esm_neuron.training.results import plain_model, write_results
from esm_neuron.training.run import train
from esm_neuron.training.trainer import Trainer

RESULTS = "results.safetensors"
LABELS = ("a", "b", "c")
ROWS, ROW_TOKENS = 4, 48


def configuration(output: str, **options: Any) -> TrainConfig:
    """A tiny run; `options` are fields of any section, by name."""
    sections: dict[str, Any] = {
        "model": ModelConfig(name="tiny", init="random"),
        "task": TaskConfig(labels=LABELS),
        "data": DataConfig(train="-", pack_tokens=ROW_TOKENS, max_residues=ROW_TOKENS - 2, max_segments=6),
        "adapter": AdapterConfig(r=4, alpha=8),
        "parallel": ParallelConfig(),
        "optim": OptimConfig(lr=1e-3, warmup_steps=2, max_grad_norm=0.5),
        "loop": LoopConfig(max_steps=20, packs_per_step=ROWS, packs_per_device=1, eval_packs_per_device=ROWS),
        "checkpoint": CheckpointConfig(),
        "log": LogConfig(every=1, tensorboard=False),
    }
    for name, value in options.pop("set", {}).items():
        section, field = name.split(".")
        sections[section] = replace(sections[section], **{field: value})
    return TrainConfig(output=output, seed=7, **sections, **options)


def examples(count: int = 24) -> ExampleTable:
    """Random proteins of 4 to 24 residues."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 26, count)
    tokens = rng.choice(np.asarray(AMINO_ACIDS, np.uint8), lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = CLS, EOS
    return ExampleTable(
        tokens=tokens,
        offsets=offsets,
        record=np.arange(count, dtype=np.int64),
        weight=np.ones(count, np.float32),
        labels=rng.integers(0, len(LABELS), count).astype(np.int64),
        ids=[f"protein {i}" for i in range(count)],
    )


def evaluation_batch(cfg: TrainConfig, task: Task) -> Batch:
    """The first rows of an evaluation in one process."""
    return next(iter(EvalLoader(examples(), task, cfg)))


@dataclass
class Run:
    """A model on its backend with its data."""

    cfg: TrainConfig
    backend: Backend
    task: Task
    built: Built
    trainer: Trainer

    @property
    def model(self) -> nn.Module:
        """On its device, with its adapters."""
        return self.built.model

    @classmethod
    def start(cls, cfg: TrainConfig, backend: Backend | None = None) -> Run:
        """Build; under LoRA every trained weight gets a value of its own, since a `lora_B` of 0 would hide much."""
        task = create_task(cfg.task, LABELS)
        backend = backend or create_backend(cfg)
        built = build_model(cfg, task, backend)
        model, heads, tp = built.model, built.config.num_attention_heads, backend.topology.tp  # 1 under SPMD
        draw = Draw(cfg.seed + 1, 0.1)
        trained = {n: whole_shape(n, p.shape, heads, tp) for n, p in model.named_parameters() if p.requires_grad}
        if cfg.adapter.kind == "lora":
            backend.load_weights(model, {name: draw(name, shape) for name, shape in trained.items()})
        table, where = examples(), (backend.topology.dp, backend.topology.dp_rank)
        loader = TrainLoader(table, task, cfg, *where, local_dp=backend.local_dp)
        trainer = Trainer(cfg, model, task, backend, loader, None, [], {})
        return cls(cfg, backend, task, built, trainer)

    def outputs(self) -> Tensor:
        """Logits of `evaluation_batch`, the same on every rank."""
        kept: list[Tensor] = []
        with torch.no_grad():
            (batch,) = on_device([evaluation_batch(self.cfg, self.task)], self.backend)
            self.backend.on_host(kept.append, forward(self.model.eval(), batch).float())
            self.backend.sync()
        self.model.train()
        return kept[0]

    def train(self) -> dict[str, Tensor]:
        """Loss and gradient norm of every step until the last."""
        log: list[tuple[float, float]] = []

        def keep(step: int, rate: float, totals: Tensor, norm: Tensor) -> None:
            log.append((float(totals[0] / totals[1]), float(norm)))

        self.trainer._log = keep
        self.trainer.fit()
        losses, norms = zip(*log, strict=True)
        return {"losses": torch.tensor(losses), "norms": torch.tensor(norms)}

    def leave(self, results: dict[str, Tensor]) -> None:
        """Write what a test compares, from rank 0, and leave the world."""
        if self.backend.topology.is_main:
            save_file({k: v.contiguous() for k, v in results.items()}, Path(self.cfg.output) / RESULTS)
        self.backend.close()
        assert not dist.is_initialized()

    def gradients(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Mean loss over all batches and its whole gradients; the buffers are zero again afterwards."""
        totals = torch.zeros(2, device=self.backend.device)
        for batch in on_device(batches, self.backend):
            loss, weight = self.task.loss(forward(self.model, batch), batch)
            loss.backward()
            totals = totals + torch.stack((loss.detach(), weight))
        totals = self.backend.all_reduce(totals)
        loss, trained = totals[0] / totals[1], {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        gradients = {name: self.backend.all_reduce(grad.clone()) / totals[1] for name, grad in trained.items()}
        for grad in trained.values():
            grad.zero_()
        self.backend.sync()  # one program; reading a lazy tensor would compile one for each
        return {"loss": loss.cpu(), **{f"gradient/{name}": self.whole(name, g) for name, g in gradients.items()}}

    def whole(self, name: str, value: Tensor) -> Tensor:
        """`value` of a parameter joined over tensor-parallel ranks."""
        if isinstance(self.backend, NeuronBackend):
            return self.backend._sharded().whole(name, value, None)
        return value.cpu()

    def held_out(self) -> EvalLoader:
        """This rank's share of all examples."""
        where = (self.backend.topology.dp, self.backend.topology.dp_rank)
        return EvalLoader(examples(), self.task, self.cfg, *where, local_dp=self.backend.local_dp)

    def metrics(self) -> dict[str, Tensor]:
        """What an evaluation of the weights as they are gives, over all ranks."""
        values = self.trainer.evaluate(self.held_out())
        return {f"figure/{name}": torch.tensor(float(value)) for name, value in values.items() if value is not None}


def parity(output: str, **options: Any) -> None:
    """Logits, loss and gradients of step 0, all losses and norms; after the last step weights, moments and figures."""
    run = Run.start(configuration(output, **options))
    results = {"logits": run.outputs(), **run.gradients(run.trainer.train_loader.load(0).batches)}
    results |= run.train()
    weights, moments = run.backend.gather_state(run.model, run.trainer.optimizer)
    results |= {f"weight/{name}": value for name, value in weights.items()}
    results |= {f"moment/{name}": value for name, value in moments.items()}
    run.leave({**results, **run.metrics()})


def left_out(output: str, **options: Any) -> None:
    """Weights and moments after three steps, and after a fourth whose loss is no number on the last rank alone."""
    run = Run.start(configuration(output, **options))
    load = run.trainer.train_loader.load
    for step in range(4):
        data = load(step)
        if step == 3:
            before = run.backend.gather_state(run.model, run.trainer.optimizer)
            if run.backend.topology.rank == run.backend.topology.world - 1:
                spoiled = [replace(batch, weights=batch.weights * math.nan) for batch in data.batches]
                data = replace(data, batches=spoiled)
        run.trainer.train_step(data)
    after = run.backend.gather_state(run.model, run.trainer.optimizer)
    results = {f"{when}/{name}": value for when, held in (("before", before), ("after", after))
               for part in held for name, value in part.items()}  # fmt: skip
    finite = all(bool(torch.isfinite(p).all()) for p in run.model.parameters())
    norms = run.backend.gather_host(run.trainer.monitors.losses.nonfinite)
    run.leave({**results, "finite": torch.tensor(finite), "seen": torch.tensor([len(found) for found in norms])})


def dropout(output: str, **options: Any) -> None:
    """Losses with dropout; every process's random numbers of a pass; copies of trained weights, and how many differ."""
    run = Run.start(configuration(output, **options))
    results = run.train()
    run.backend.seed(1, 2, 3)
    masks = torch.tensor(run.backend.gather_host(torch.rand(8).tolist()))
    copies: dict[tuple[str, int | None], list[str]] = {}
    for name, part, digest in (held for rank in run.backend.gather_host(list(held_parts(run))) for held in rank):
        copies.setdefault((name, part), []).append(digest)
    counts = {"copies": min(map(len, copies.values())), "differ": sum(len(set(found)) > 1 for found in copies.values())}
    run.leave({**results, "masks": masks, **{name: torch.tensor(count) for name, count in counts.items()}})


def held_parts(run: Run) -> Iterator[tuple[str, int | None, str]]:
    """Of each trained weight, for each device of this process: name, which tensor-parallel part, None for all of it,
    and a hash of its values."""
    heads, spmd = run.built.config.num_attention_heads, isinstance(run.backend, SpmdBackend)
    topology = run.backend._grid if isinstance(run.backend, SpmdBackend) else run.backend.topology
    for name, parameter in ((n, p.detach()) for n, p in run.model.named_parameters() if p.requires_grad):
        shape = parameter.shape if spmd else whole_shape(name, parameter.shape, heads, topology.tp)
        cut = cut_of(name, shape, heads, topology.tp).dim is not None
        shards = run.backend._wrap(parameter).local_shards if isinstance(run.backend, SpmdBackend) else None
        parts = [parameter.cpu()] if shards is None else [shard.data.cpu() for shard in shards]
        for device, values in enumerate(parts):
            tp_rank = device % topology.tp if spmd else topology.tp_rank
            yield name, tp_rank if cut else None, hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def by_protein(output: str, **options: Any) -> None:
    """Logits of every protein, in a data-parallel world of one, and the gradients of the mean loss of all."""
    run = Run.start(configuration(output, **options))
    logits = torch.empty(len(run.held_out().table), len(LABELS))

    def take(members: np.ndarray, predictions: list[np.ndarray]) -> None:
        used = members >= 0
        logits[members[used]] = torch.from_numpy(predictions[0][used])

    run_passes(run.model, run.task, run.backend, run.held_out(), take)
    run.leave({"logits": logits, **run.gradients(run.held_out())})


def lazy(output: str, **options: Any) -> None:
    """Compile ahead, then train and evaluate on XLA:CPU in a world of one.

    Losses, and the number of programs after compiling, before each update and after the evaluation.
    """
    neuron.neuron_cores = lambda: 2  # a trn1.2xlarge, as far as the backend can see
    cfg = configuration(output, **options)
    ahead = Run.start(cfg, create_backend(cfg))
    ahead.trainer.compile([ahead.held_out()])
    ahead.backend.sync()
    graphs = [ahead.backend.graphs()]
    run = Run.start(cfg, ahead.backend)
    run.backend.sync()
    step = run.backend.step

    def counted(*args: Any) -> Tensor:
        graphs.append(run.backend.graphs())
        return step(*args)

    run.backend.step = counted
    results = {**run.train(), **run.metrics()}
    run.leave({**results, "graphs": torch.tensor([*graphs, run.backend.graphs()])})


def resume(output: str, source: str | None = None, **options: Any) -> None:
    """Losses and norms of the steps after the newest checkpoint of the run in `source`, or of all steps."""
    run = Run.start(configuration(output, **options))
    if source is not None:
        run.trainer.checkpoints.folder = Path(source) / "checkpoints"
    begin = run.trainer.restore()
    run.leave({"begin": torch.tensor(begin), **run.train()})


def export(output: str, **options: Any) -> None:
    """Train, write the plain PEFT adapter as a finished run does, and keep the logits."""
    run = Run.start(configuration(output, **options))
    run.train()
    weights, _ = run.backend.gather_state(run.model, run.trainer.optimizer)
    if run.backend.topology.is_main:
        unscored = {"metric": run.task.metric, "parameters": {"trainable": 0, "total": 0}, "chosen_step": 0,
                    "train": {"steps": 0}, "data": {}}  # fmt: skip
        write_results(run.cfg, run.task, run.built, weights, unscored)
    run.leave({"logits": run.outputs()})


def finish(output: str, **options: Any) -> None:
    """A run from a file to its adapter, whose validation likes every step less than the one before."""
    evaluated = Trainer.evaluate

    def evaluate(trainer: Trainer, loader: EvalLoader) -> dict[str, Any]:
        return {**evaluated(trainer, loader), trainer.task.metric: -float(trainer.state.step)}

    Trainer.evaluate = evaluate
    data = {"data.train": str(Path(output) / "proteins.csv"), "data.valid_fraction": 0.3, "loop.max_steps": 5,
            "data.window_overlap": 0, "loop.eval_every": 1, "checkpoint.keep": 5}  # fmt: skip
    train(configuration(output, **{**options, "set": {**data, **options.get("set", {})}}), str)


def load_plain(output: str, adapter: str) -> None:
    """Logits of plain PEFT's `from_pretrained` on the whole model, and its own copy: no backend, no NxD."""
    cfg = configuration(output)
    task = create_task(cfg.task, LABELS)
    model, _ = plain_model(cfg, task)
    set_attention(encoder_of(model), cfg.data.max_residues + 2, "segments")
    plain = PeftModel.from_pretrained(model, adapter).eval()
    plain.save_pretrained(Path(output) / "saved")  # as a user of PEFT would pass it on
    assert not any(isinstance(module, NeuronLoraLayer) for module in plain.modules())
    with torch.no_grad():
        logits = forward(plain, evaluation_batch(cfg, task))
    save_file({"logits": logits}, Path(output) / RESULTS)
    dist.destroy_process_group()


def load_sharded(output: str, adapter: str, **options: Any) -> None:
    """Logits of the sharded model with a plain PEFT adapter."""
    run = Run.start(configuration(output, **options))
    names = {saved_key(name): name for name, p in run.model.named_parameters() if p.requires_grad}
    run.backend.load_weights(run.model, {names[key]: value for key, value in read_adapter(Path(adapter)).items()})
    run.leave({"logits": run.outputs()})


def die(output: str, **options: Any) -> None:
    """Rank 1 vanishes in the fourth step, as after a hardware fault; every step before it has been saved."""
    values = {"checkpoint.every": 1, **options.pop("set", {})}
    cfg = configuration(output, set=values, **options)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would race with the survivor's own words
    try:
        with opened_backend(cfg) as backend:
            run = Run.start(cfg, backend)
            step = run.trainer.train_step

            def until_the_fault(data: StepData) -> None:
                if data.step == 3 and backend.topology.rank == 1:
                    Path(output, "died").write_text(str(time.time()))
                    os._exit(13)
                step(data)

            run.trainer.train_step = until_the_fault
            run.trainer.fit()
    except TrainingError as error:
        Path(output, "reason").write_text(str(error), encoding="utf-8")
        raise
