"""Measure what the host does for a training pass on an XLA device: `python benchmarks/host_time.py`.

Traces passes of 2 and 8 narrow blocks (tracing does not depend on widths), LoRA of rank 16 on six linears, in bfloat16:
this package's, with and without recomputation, and Hugging Face's BERT with all weights trained. Then runs ours by
their hash. In turn, 11 times each, CPU time; a block's is (8 blocks - 2 blocks) / 6 of the medians. Everything runs in
one process on XLA:CPU with functionalization off, as torch-neuronx has it. Prints a table and writes it, with the
machine, to `results/host-time.json`.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {
    "PJRT_DEVICE": "CPU",
    "USE_TORCH_XLA": "0",
    "OMP_NUM_THREADS": "1",
    "XLA_DISABLE_FUNCTIONALIZATION": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}

import numpy as np
import torch
import torch_xla
from machine import machine
from transformers import BertConfig, BertForMaskedLM

from esm_neuron.backends import create_backend
from esm_neuron.config import (
    AdapterConfig,
    DataConfig,
    LogConfig,
    LoopConfig,
    ModelConfig,
    TaskConfig,
    TrainConfig,
)
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.loader import TrainLoader
from esm_neuron.data.tokenizer import AMINO_ACIDS, CLS, EOS
from esm_neuron.models.shapes import EsmShape, esm_config
from esm_neuron.tasks import create_task
from esm_neuron.training.build import build_model
from esm_neuron.training.evaluation import on_device
from esm_neuron.training.trainer import Trainer

HIDDEN, HEADS, WIDE, TOKENS = 160, 20, 640, 64
FEW, MANY, REPEATS = 2, 8, 11
HERE = Path(__file__).parent


@dataclass
class Pass:
    """One pass of a model: how it is traced, and how it is run by its hash (None: it is not)."""

    trace: Callable[[], Any]
    run: Callable[[], Any] | None = None


def ours(folder: Path, blocks: int, recompute: bool) -> Pass:
    """Return a training pass of a classifier of `blocks` blocks."""
    model = folder / f"model-{blocks}"
    esm_config(EsmShape(layers=blocks, hidden=HIDDEN, heads=HEADS, intermediate=WIDE)).save_pretrained(model)
    cfg = TrainConfig(
        output=str(folder / "run"),
        backend="xla",
        model=ModelConfig(name=str(model), init="random", gradient_checkpointing=recompute),
        task=TaskConfig(labels=("a", "b")),
        data=DataConfig(train="-", pack_tokens=TOKENS, max_residues=TOKENS - 2),
        adapter=AdapterConfig(r=16, alpha=32),
        loop=LoopConfig(max_steps=1, packs_per_step=1, packs_per_device=1, precision="bf16"),
        log=LogConfig(tensorboard=False),
    )
    task, backend = create_task(cfg.task, cfg.task.labels or ()), create_backend(cfg)
    built = build_model(cfg, task, backend)
    rng = np.random.default_rng(0)
    tokens = rng.choice(np.asarray(AMINO_ACIDS, np.uint8), 8 * 30)
    offsets = np.arange(0, 8 * 30 + 1, 30)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = CLS, EOS
    table = ExampleTable(tokens, offsets, np.arange(8), np.ones(8, np.float32), rng.integers(0, 2, 8), list("abcdefgh"))
    loader = TrainLoader(table, task, cfg, 1, 0, static_shapes=True)
    trainer = Trainer(cfg, built.model, task, backend, loader, None, [], {})
    trainer.model.train()
    batch = next(iter(on_device(loader.load(0).batches, backend)))
    backend.sync()
    return Pass(lambda: trainer._pass(batch), lambda: trainer._run_pass(batch))


def bert(blocks: int) -> Pass:
    """Return a training pass of Hugging Face's BERT, all weights trained, in float32."""
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": WIDE}
    config = BertConfig(num_hidden_layers=blocks, vocab_size=100, attn_implementation="eager", **sizes)
    model = BertForMaskedLM(config).to(torch_xla.device()).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(0, 100, (1, TOKENS)).to(torch_xla.device())
    mask = torch.ones_like(ids)
    return Pass(lambda: model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward())


def idle() -> None:
    torch_xla.sync()
    torch_xla.core.xla_model.wait_device_ops()


def milliseconds(calls: dict[str, Callable[[], Any]], clock: Callable[[], float]) -> dict[str, float]:
    """Return the median of the CPU milliseconds, by `clock`, of each call; calls take turns."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(REPEATS + 2):  # the first two compile and warm up
        for name, call in calls.items():
            idle()
            begin = clock()
            call()
            if turn >= 2:
                seen[name].append((clock() - begin) * 1e3)
    idle()
    return {name: statistics.median(times) for name, times in seen.items()}


def main() -> None:
    torch.set_num_threads(1)
    makers: dict[str, Callable[[Path, int], Pass]] = {
        "BERT, all weights": lambda folder, blocks: bert(blocks),
        "LoRA": lambda folder, blocks: ours(folder, blocks, False),
        "LoRA, recomputed": lambda folder, blocks: ours(folder, blocks, True),
    }
    with tempfile.TemporaryDirectory() as folder:
        passes = {(name, n): make(Path(folder), n) for name, make in makers.items() for n in (FEW, MANY)}
        # autograd traces the backward pass in a thread of its own; the device of a run would count as the process
        traced = milliseconds({f"{name} {n}": one.trace for (name, n), one in passes.items()}, time.process_time)
        runs = {f"{name} {n}": one.run for (name, n), one in passes.items() if one.run is not None}
        by_hash = milliseconds(runs, time.thread_time)
    yardstick = (traced[f"BERT, all weights {MANY}"] - traced[f"BERT, all weights {FEW}"]) / (MANY - FEW)
    rows = []
    for how, times in (("traced", traced), ("by hash", by_hash)):
        for name in makers:
            if f"{name} {FEW}" in times:
                few, many = times[f"{name} {FEW}"], times[f"{name} {MANY}"]
                block = (many - few) / (MANY - FEW)
                rows.append({"pass": name, "how": how, f"ms, {FEW} blocks": few, f"ms, {MANY} blocks": many,
                             "ms per block": block, "against BERT": block / yardstick})  # fmt: skip
    for row in rows:
        print(*(f"{value:.3f}" if isinstance(value, float) else value for value in row.values()), sep="\t")
    out = HERE / "results" / "host-time.json"
    out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
