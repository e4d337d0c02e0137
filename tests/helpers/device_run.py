"""One small run on any backend, and what it shows: what every device parity test compares with the plain CPU.

It is used in worker processes, on XLA:CPU devices (`tests/xla`) and under NxD (`tests/nxd`), so that nothing here
imports torch_xla or optimum: whichever of them a process has, the backend imports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esm_neuron.backends import create_backend
from esm_neuron.backends.base import Backend, Trained, copy_to_host, state_of, trainable
from esm_neuron.backends.flat import flat_of
from esm_neuron.backends.graphs import GraphRunner
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
from esm_neuron.metrics import Value
from esm_neuron.models.tensor_parallel import whole_shape
from esm_neuron.models.weights import Draw
from esm_neuron.tasks import create_task
from esm_neuron.tasks.base import Task
from esm_neuron.training.build import Built, build_model
from esm_neuron.training.evaluation import forward, on_device
from esm_neuron.training.trainer import Trainer

LABELS = ("a", "b", "c")
PACKS, PACK_TOKENS = 4, 48
"""Of a training step, and of a pass of the logits that are compared."""


def configuration(output: str, **options: Any) -> TrainConfig:
    """Return a tiny LoRA run; `options` are arguments of TrainConfig, and `set`: fields by dotted name -> value."""
    sections: dict[str, Any] = {
        "model": ModelConfig(name="tiny", init="random"),
        "task": TaskConfig(labels=LABELS),
        "data": DataConfig(train="-", pack_tokens=PACK_TOKENS, max_residues=PACK_TOKENS - 2, max_segments=6),
        "adapter": AdapterConfig(r=4, alpha=8),
        "parallel": ParallelConfig(),
        "optim": OptimConfig(lr=1e-3, warmup_steps=2, max_grad_norm=0.5),
        "loop": LoopConfig(max_steps=20, packs_per_step=PACKS, packs_per_device=1, eval_packs_per_device=PACKS),
        "checkpoint": CheckpointConfig(),
        "log": LogConfig(every=1, tensorboard=False),
    }
    for name, value in options.pop("set", {}).items():
        section, field = name.split(".")
        sections[section] = replace(sections[section], **{field: value})
    return TrainConfig(output=output, seed=7, **sections, **options)


def examples(count: int = 24, seed: int = 0, by_residue: bool = False) -> ExampleTable:
    """Return random proteins of 4 to 23 residues with a class each, or one per residue, a quarter of them unknown."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 26, count)
    tokens = rng.choice(np.asarray(AMINO_ACIDS, np.uint8), lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = CLS, EOS
    labels = rng.integers(0, len(LABELS), count).astype(np.int64)
    if by_residue:
        labels = rng.integers(0, len(LABELS) + 1, tokens.size).astype(np.int16)
        labels[(labels == len(LABELS)) | (tokens == CLS) | (tokens == EOS)] = -1
    return ExampleTable(
        tokens=tokens,
        offsets=offsets,
        record=np.arange(count, dtype=np.int64),
        weight=np.ones(count, np.float32),
        labels=labels,
        ids=[f"protein {i}" for i in range(count)],
    )


def evaluation_batches(cfg: TrainConfig, task: Task, table: ExampleTable) -> list[Batch]:
    """Return a table in passes of one shape, the same for every backend and however many devices share them."""
    cfg = replace(cfg, loop=replace(cfg.loop, eval_packs_per_device=PACKS))
    return list(EvalLoader(table, task, cfg))


@dataclass
class Run:
    """A model on its backend with its data."""

    cfg: TrainConfig
    backend: Backend
    task: Task
    built: Built
    held_out: EvalLoader
    """This rank's share of the proteins that are evaluated."""
    trainer: Trainer

    @property
    def model(self) -> nn.Module:
        """On its device, with its adapters."""
        return self.built.model

    @classmethod
    def start(
        cls,
        cfg: TrainConfig,
        backend: Backend | None = None,
        train: ExampleTable | None = None,
        valid: ExampleTable | None = None,
    ) -> Run:
        """Build; under LoRA every trained weight gets a value of its own, since a `lora_B` of 0 would hide much.

        Proteins that are not given are `examples()`. Only with `valid` does training itself evaluate them.
        """
        proteins = examples(by_residue=cfg.task.name == "residue_classification")
        task = create_task(cfg.task, cfg.task.labels or ())
        backend = backend or create_backend(cfg)
        built = build_model(cfg, task, backend)
        model, heads, tp = built.model, built.config.num_attention_heads, backend.topology.tp  # 1 under SPMD
        if cfg.adapter.kind == "lora":
            draw = Draw(cfg.seed + 1, 0.1)
            trained = {n: whole_shape(n, p.shape, heads, tp) for n, p in model.named_parameters() if p.requires_grad}
            backend.load_weights(model, {name: draw(name, shape) for name, shape in trained.items()})
        where = (backend.topology.dp, backend.topology.dp_rank)
        share = {"local_dp": backend.local_dp, "static_shapes": backend.static_shapes}
        loader = TrainLoader(proteins if train is None else train, task, cfg, *where, **share)
        held_out = EvalLoader(proteins if valid is None else valid, task, cfg, *where, **share)
        trainer = Trainer(cfg, model, task, backend, loader, None if valid is None else held_out, [], {})
        return cls(cfg, backend, task, built, held_out, trainer)

    def logits(self) -> Tensor:
        """Return the logits of all passes over the held-out proteins, the same on every rank."""
        found: list[Tensor] = []
        self.model.eval()
        with torch.no_grad():
            run = self.backend.graph(self._logits, lambda: state_of(self.model))
            for batch in on_device(evaluation_batches(self.cfg, self.task, self.held_out.table), self.backend):
                self.backend.on_host(found.append, *run(batch))
                self.backend.sync()
        self.model.train()
        return torch.cat(found)

    def _logits(self, batch: Batch) -> tuple[Tensor, ...]:
        return (forward(self.model, batch).float(),)

    def trained(self, changed: Callable[[Tensor], Tensor] = lambda gradient: gradient) -> dict[str, Tensor]:
        """Return the gradients of the parameters that training changes, by name, each `changed` on the device."""
        flat = flat_of(self.model)
        owners = trainable(self.model)
        found = [changed(owner.grad) for owner in owners]
        self.backend.sync()  # one graph; reading a lazy tensor would compile one for each
        if flat is not None:
            return flat.by_name(copy_to_host(found[0]))
        names = (name for name, p in self.model.named_parameters() if p.requires_grad)
        return dict(zip(names, found, strict=True))

    def whole(self, name: str, value: Tensor) -> Tensor:
        """Return a gradient joined over tensor-parallel ranks or devices; whole on rank 0."""
        return self.backend.fetch(Trained(name, value, value, {}), value)

    def gradients(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Return the mean loss over all batches and its whole gradients; the buffers are zero again afterwards."""
        totals = torch.zeros(2, device=self.backend.device)
        for batch in on_device(batches, self.backend):
            loss, weight = self.task.loss(forward(self.model, batch), batch)
            self.backend.backward(self.model, loss)
            totals = totals + torch.stack((loss.detach(), weight))
        totals = self.backend.all_reduce(totals)
        loss = totals[0] / totals[1]
        found = self.trained(lambda gradient: self.backend.all_reduce(gradient.clone()) / totals[1])
        for parameter in trainable(self.model):
            parameter.grad.zero_()
        self.backend.sync()
        whole = {f"gradient/{name}": self.whole(name, value) for name, value in found.items()}
        return {"loss": loss.cpu(), **whole}

    def train(self, before_update: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """Return loss and gradient norm of every step until the last; `before_update` is called in each of them."""
        log: list[tuple[float, float]] = []
        update = self.trainer._run_update

        def keep(step: int, rate: float, totals: Tensor, norm: Tensor) -> None:
            log.append((float(totals[0] / totals[1]), float(norm)))

        def watched() -> tuple[Tensor, ...]:
            before_update()
            return update()

        self.trainer._log, self.trainer._run_update = keep, watched
        assert self.trainer.fit() is None
        self.trainer._run_update = update
        losses, norms = zip(*log, strict=True)
        return {"losses": torch.tensor(losses), "norms": torch.tensor(norms)}

    def state(self) -> dict[str, Tensor]:
        """Return the whole weights and moments that a checkpoint has; all ranks call it, rank 0 gets them."""
        weights, moments = self.backend.gather_state(self.model, self.trainer.optimizer)
        kinds = {"weight": weights, "moment": moments}
        return {f"{kind}/{name}": value for kind, held in kinds.items() for name, value in held.items()}

    def metrics(self) -> dict[str, Value]:
        """Return what an evaluation of the weights as they are gives, over all ranks."""
        return self.trainer.evaluate(self.held_out)


@contextmanager
def patched(owner: type, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a method by `make(method)` within the block."""
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


class GraphCount:
    """Counts the graphs that training compiles within the block, by the part of the loop that asked for them.

    `found`: part -> graphs compiled for it, each time that it was done. Any trainer of the process is counted.
    """

    def __init__(self, compiled: Callable[[], int]) -> None:
        self.found: dict[str, list[int]] = {}
        self._compiled, self._seen = compiled, compiled()
        self._step, self._done, self._passes = "", 0, 0
        """`first` or `later` within a step, and how many of its passes are done."""
        self._begin, self._evaluated = 0, False

    def note(self, part: str) -> None:
        """Take everything compiled since the last note as compiled for `part`."""
        now = self._compiled()
        self.found.setdefault(part, []).append(now - self._seen)
        self._seen = now

    def __enter__(self) -> GraphCount:
        with ExitStack() as stack:
            stack.enter_context(patched(GraphRunner, "__call__", self._graph))
            for name in ("fit", "train_step", "evaluate", "save_checkpoint"):
                stack.enter_context(patched(Trainer, name, getattr(self, f"_{name}")))
            self._patches = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()
        self.note("end")

    def _fit(self, fit: Any) -> Any:
        def wrapped(trainer: Trainer) -> Any:
            self._begin = trainer.state.step
            return fit(trainer)

        return wrapped

    def _train_step(self, train_step: Any) -> Any:
        def wrapped(trainer: Trainer, data: StepData) -> None:
            first = data.step == self._begin
            self.note("set-up" if first else "between steps")
            self._step, self._done, self._passes = "first" if first else "later", 0, len(data.batches)
            train_step(trainer, data)
            self.note("after the update")
            self._step = ""

        return wrapped

    def _graph(self, run: Any) -> Any:
        def wrapped(runner: GraphRunner, *batch: Batch) -> Any:
            if self._step:
                self.note("building a graph")
            results = run(runner, *batch)
            if self._step:
                self.note(f"{self._step} {'pass' if self._done < self._passes else 'update'}")
                self._done += 1
            return results

        return wrapped

    def _evaluate(self, evaluate: Any) -> Any:
        def wrapped(trainer: Trainer, loader: EvalLoader) -> Any:
            self.note("between steps")
            values = evaluate(trainer, loader)
            self.note("later evaluation" if self._evaluated else "first evaluation")
            self._evaluated = True
            return values

        return wrapped

    def _save_checkpoint(self, save: Any) -> Any:
        def wrapped(trainer: Trainer) -> None:
            self.note("between steps")
            save(trainer)
            self.note("save")

        return wrapped

    def totals(self) -> dict[str, int]:
        """Return part -> all graphs compiled for it."""
        return {part: sum(counts) for part, counts in self.found.items()}
