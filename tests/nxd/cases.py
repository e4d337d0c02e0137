"""What a rank does in a test: build on the real backend, train with the real trainer, leave whole tensors behind."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from helpers.device_run import LABELS, Run, configuration, evaluation_batches, examples
from helpers.graph_size import counted
from helpers.reads import reads, strict
from optimum.neuron.peft.tuners.lora.layer import NeuronLoraLayer
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from esm_neuron.backends import create_backend, neuron, opened_backend
from esm_neuron.backends.spmd import SpmdBackend
from esm_neuron.data.loader import EvalLoader, StepData
from esm_neuron.errors import TrainingError
from esm_neuron.inference.load import read_adapter
from esm_neuron.models.esm2 import encoder_of, set_attention
from esm_neuron.models.lora import saved_key
from esm_neuron.models.shapes import SHAPES
from esm_neuron.models.tensor_parallel import cut_of, whole_shape
from esm_neuron.tasks import create_task
from esm_neuron.training.evaluation import Evaluator, forward
from esm_neuron.training.results import plain_model, write_results
from esm_neuron.training.run import train
from esm_neuron.training.trainer import Trainer

RESULTS = "results.safetensors"


def leave(run: Run, results: dict[str, Tensor]) -> None:
    """Write what a test compares, from rank 0, and leave the world."""
    if run.backend.topology.is_main:
        save_file({k: v.contiguous() for k, v in results.items()}, Path(run.cfg.output) / RESULTS)
    run.backend.close()
    assert not dist.is_initialized()


def metrics(run: Run) -> dict[str, Tensor]:
    """What an evaluation gives, as tensors."""
    return {f"metric/{name}": torch.tensor(float(v)) for name, v in run.metrics().items() if v is not None}


def parity(output: str, **options: Any) -> None:
    """Logits, loss and gradients of step 0, all losses and norms; after the last step weights, moments and metrics."""
    run = Run.start(configuration(output, **options))
    results = {"logits": run.logits(), **run.gradients(run.trainer.train_loader.load(0).batches)}
    results |= run.train()
    leave(run, {**results, **run.state(), **metrics(run)})


def same_masks(output: str, **options: Any) -> None:
    """`parity` with dropout, each rank of a model taking its part of the masks that one process draws.

    By themselves ranks drop alike, so that each part of the heads and features meets the same mask.
    """
    shape, tp = SHAPES["tiny"], options["set"]["parallel.tp"]
    parts = {size // tp: size for size in (shape.heads, shape.intermediate, shape.hidden)}
    draws = itertools.count()

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        dim = 0 if x.ndim == 3 else x.ndim - 1  # heads of attention, whose passes have one pack here, or features
        rank_part = x.shape[dim] not in (shape.heads, shape.hidden, shape.intermediate)
        whole = [*x.shape[:dim], parts[x.shape[dim]] if rank_part else x.shape[dim], *x.shape[dim + 1 :]]
        kept = torch.rand(whole, generator=torch.Generator().manual_seed(next(draws))) >= p
        mine = kept.chunk(tp, dim)[dist.get_rank() % tp] if rank_part else kept
        return x * mine / (1 - p)

    with mock.patch.object(functional, "dropout", dropout):
        parity(output, **options)
    assert next(draws) > 100


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
    leave(run, {**results, "finite": torch.tensor(finite), "seen": torch.tensor([len(found) for found in norms])})


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
    leave(run, {**results, "masks": masks, **{name: torch.tensor(count) for name, count in counts.items()}})


def held_parts(run: Run) -> Iterator[tuple[str, int | None, str]]:
    """Of each trained weight, for each device of this process: name, which tensor-parallel part, None for all of it,
    and a hash of its values."""
    heads, spmd = run.built.config.num_attention_heads, isinstance(run.backend, SpmdBackend)
    topology = run.backend._grid if isinstance(run.backend, SpmdBackend) else run.backend.topology
    held = (
        [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
        if spmd
        else [(item.name, item.parameter) for item in run.backend.trained(run.model)]
    )
    for name, parameter in ((name, value.detach()) for name, value in held):
        shape = parameter.shape if spmd else whole_shape(name, parameter.shape, heads, topology.tp)
        cut = cut_of(name, shape, heads, topology.tp).dim is not None
        shards = run.backend._wrap(parameter).local_shards if isinstance(run.backend, SpmdBackend) else None
        parts = [parameter.cpu()] if shards is None else [shard.data.cpu() for shard in shards]
        for device, values in enumerate(parts):
            tp_rank = device % topology.tp if spmd else topology.tp_rank
            yield (
                name,
                tp_rank if cut else None,
                hashlib.sha256(values.contiguous().view(torch.uint8).numpy()).hexdigest(),
            )


def by_protein(output: str, **options: Any) -> None:
    """Logits of every protein, in a data-parallel world of one, and the gradients of the mean loss of all."""
    run = Run.start(configuration(output, **options))
    logits = torch.empty(len(run.held_out.table), len(LABELS))

    def take(members: np.ndarray, predictions: list[np.ndarray]) -> None:
        used = members >= 0
        logits[members[used]] = torch.from_numpy(predictions[0][used])

    Evaluator(run.model, run.task, run.backend).run(run.held_out, take)
    leave(run, {"logits": logits, **run.gradients(run.held_out)})


def lazy(output: str, **options: Any) -> None:
    """Compile ahead, then train and evaluate on XLA:CPU in a world of one.

    Losses, and the number of graphs after compiling, before each update and after the evaluation.
    """
    neuron.neuron_cores = lambda: 2  # a trn1.2xlarge, as far as the backend can see
    cfg = configuration(output, **options)
    with reads(strict):  # extraction of graphs gives 0 for every value
        ahead = Run.start(cfg, create_backend(cfg))
        ahead.trainer.compile([ahead.held_out])
    ahead.backend.sync()
    graphs = [ahead.backend.graphs()]
    run = Run.start(cfg, ahead.backend)
    run.backend.sync()
    results = {**run.train(lambda: graphs.append(run.backend.graphs())), **metrics(run)}
    leave(run, {**results, "graphs": torch.tensor([*graphs, run.backend.graphs()])})


def hashed(output: str, **options: Any) -> None:
    """Train on XLA:CPU in a world of one, tracing always, once and both ways: everything that each way gives."""
    neuron.neuron_cores = lambda: 2
    found, backend = {}, None
    for tracing in ("always", "once", "compare"):
        cfg = configuration(output, **{**options, "set": {**options.get("set", {}), "loop.tracing": tracing}})
        backend = create_backend(cfg) if backend is None else backend
        backend._tracing = tracing
        run = Run.start(cfg, backend)
        found |= {f"{tracing}/{name}": value for name, value in {**run.train(), **run.state()}.items()}
    leave(run, found)


def graph(output: str) -> None:
    """Count a training pass of NxD's layers and optimum-neuron's LoRA, as traced on a trn1."""
    neuron.neuron_cores = lambda: 2
    Path(output, "sizes.json").write_text(json.dumps(counted(Path(output), "neuron")), encoding="utf-8")


def resume(output: str, source: str | None = None, **options: Any) -> None:
    """Losses and norms of the steps after the newest checkpoint of the run in `source`, or of all steps."""
    run = Run.start(configuration(output, **options))
    if source is not None:
        run.trainer.checkpoints.folder = Path(source) / "checkpoints"
    begin = run.trainer.restore()
    leave(run, {"begin": torch.tensor(begin), **run.train()})


def export(output: str, **options: Any) -> None:
    """Train, write the plain PEFT adapter as a finished run does, and keep the logits."""
    run = Run.start(configuration(output, **options))
    run.train()
    weights, _ = run.backend.gather_state(run.model, run.trainer.optimizer)
    if run.backend.topology.is_main:
        unscored = {"metric": run.task.metric, "parameters": {"trainable": 0, "total": 0}, "chosen_step": 0,
                    "train": {"steps": 0}, "data": {}}  # fmt: skip
        write_results(run.cfg, run.task, run.built, weights, unscored)
    leave(run, {"logits": run.logits()})


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
        logits = torch.cat([forward(plain, batch) for batch in evaluation_batches(cfg, task, examples())])
    save_file({"logits": logits}, Path(output) / RESULTS)
    dist.destroy_process_group()


def load_sharded(output: str, adapter: str, **options: Any) -> None:
    """Logits of the sharded model with a plain PEFT adapter."""
    run = Run.start(configuration(output, **options))
    names = {saved_key(item.name): item.name for item in run.backend.trained(run.model)}
    run.backend.load_weights(run.model, {names[key]: value for key, value in read_adapter(Path(adapter)).items()})
    leave(run, {"logits": run.logits()})


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
