"""What a rank does in a test: build on the real backend, train with the real trainer, leave whole tensors behind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from esm_neuron.adapters import adapt
from esm_neuron.backends.cpu import CpuBackend
from esm_neuron.backends.neuron import NeuronBackend
from esm_neuron.config import (
    AdapterConfig,
    DataConfig,
    LogConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TaskConfig,
    TrainConfig,
)
from esm_neuron.data.batch import ExampleTable
from esm_neuron.data.loader import EvalLoader, TrainLoader
from esm_neuron.data.tokenizer import AMINO_ACIDS, CLS, EOS
from esm_neuron.evaluate import forward
from esm_neuron.model import set_attention
from esm_neuron.parallel.slices import whole_shape
from esm_neuron.tasks import Task, create_task
from esm_neuron.trainer import Trainer
from esm_neuron.weights import Draw, load_into, open_weights

LABELS = ("a", "b", "c")
ROWS, ROW_TOKENS = 4, 48


def configuration(output: str, **options: Any) -> TrainConfig:
    """A tiny run; `options` are fields of any section, by name."""
    sections: dict[str, Any] = {
        "model": ModelConfig(name="tiny", init="random"),
        "task": TaskConfig(labels=LABELS),
        "data": DataConfig(train="-", row_tokens=ROW_TOKENS, max_residues=ROW_TOKENS - 2, max_segments=6),
        "adapter": AdapterConfig(r=4, alpha=8.0),
        "parallel": ParallelConfig(),
        "optim": OptimConfig(lr=1e-3, warmup_steps=2, max_grad_norm=0.5),
        "loop": LoopConfig(max_steps=20, rows_per_step=ROWS, rows_per_device=1, eval_rows_per_device=ROWS),
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


@dataclass
class Run:
    """A model on its backend with its data."""

    cfg: TrainConfig
    backend: CpuBackend | NeuronBackend
    task: Task
    model: nn.Module
    trainer: Trainer

    @classmethod
    def start(cls, cfg: TrainConfig) -> Run:
        """Build, shard, load, adapt, prepare; every trained weight gets a value that depends on its name alone."""
        task = create_task(cfg.task, LABELS)
        backend: Any = NeuronBackend(cfg) if cfg.backend == "neuron" else CpuBackend(cfg)
        pretrained, source = open_weights(cfg.model, cfg.seed)
        config = task.configure(pretrained, cfg.model)
        with torch.device("meta"):
            bare = task.build(config)
        set_attention(bare.base_model, cfg.data.max_residues + 2, backend.attention)
        backend.shard(bare)
        head = task.head(config)
        part = backend.part if isinstance(backend, NeuronBackend) else None
        load_into(bare, source, Draw(cfg.seed, 0.02), lambda name: name.startswith(head), part)
        if cfg.model.gradient_checkpointing:
            bare._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=backend.checkpoint_fn())
        model = backend.prepare(adapt(bare, cfg.adapter, head, backend.lora_modules))
        draw, heads, tp = Draw(cfg.seed + 1, 0.1), config.num_attention_heads, backend.topology.tp
        trained = {n: whole_shape(n, p.shape, heads, tp) for n, p in model.named_parameters() if p.requires_grad}
        if cfg.adapter.kind == "lora":
            backend.load_weights(model, {name: draw(name, shape) for name, shape in trained.items()})
        table, where = examples(), (backend.topology.dp, backend.topology.dp_rank)
        loader = TrainLoader(table, task, cfg, *where)
        return cls(cfg, backend, task, model, Trainer(cfg, model, task, backend, loader, None, [], {}))

    def outputs(self) -> Tensor:
        """Logits of all rows of the first evaluation batch, the same on every rank."""
        batch = next(iter(EvalLoader(examples(), self.task, self.cfg)))
        with torch.no_grad():
            logits: Tensor = forward(self.model.eval(), batch).logits
        self.model.train()
        return logits.float()

    def first_step(self) -> dict[str, Tensor]:
        """Loss and whole gradients of the mean loss of step 0; the buffers are zero again afterwards."""
        totals = torch.zeros(2)
        for batch in self.trainer.train_loader.load(0).batches:
            loss, weight = self.task.loss(forward(self.model, batch), batch)
            loss.backward()
            totals += torch.stack((loss.detach(), weight))
        totals = self.backend.all_reduce(totals)
        results = {"loss": totals[0] / totals[1]}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                grad = self.backend.all_reduce(parameter.grad.clone()) / totals[1]
                results[f"gradient/{name}"] = self.whole(name, grad)
                parameter.grad.zero_()
        return results

    def whole(self, name: str, value: Tensor) -> Tensor:
        """`value` of a parameter joined over tensor-parallel ranks."""
        if isinstance(self.backend, NeuronBackend):
            return self.backend._sharded()._whole(name, value, None)
        return value.clone()


def parity(output: str, **options: Any) -> None:
    """Logits, loss and gradients of step 0, the norms of all steps, and the weights and moments after the last."""
    run = Run.start(configuration(output, **options))
    results = {"logits": run.outputs(), **run.first_step()}
    norms: list[float] = []
    run.trainer._log = lambda step, rate, totals, norm: norms.append(float(norm))
    run.trainer.fit()
    weights, moments = run.backend.gather_state(run.model, run.trainer.optimizer)
    results |= {f"weight/{name}": value for name, value in weights.items()}
    results |= {f"moment/{name}": value for name, value in moments.items()}
    results["norms"] = torch.tensor(norms)
    if run.backend.topology.is_main:
        save_file({k: v.contiguous() for k, v in results.items()}, Path(output) / "results.safetensors")
    run.backend.close()
    assert not dist.is_initialized()
