"""Finished runs of every kind without their training, and what plain transformers and PEFT make of them.

As a program, it writes them in one environment or reads them in another: `test_lanes.py` starts it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
)

from esm_neuron.backends import create_backend
from esm_neuron.config import AdapterConfig, DataConfig, LoopConfig, ModelConfig, TaskConfig, TrainConfig
from esm_neuron.config.settings import dump
from esm_neuron.data.tokenizer import PAD
from esm_neuron.files import write_json, write_text
from esm_neuron.inference.export import export
from esm_neuron.inference.load import build_trained, read_run
from esm_neuron.models.esm2 import PackedForPooledClassification
from esm_neuron.tasks import create_task
from esm_neuron.tasks.base import Task
from esm_neuron.training.build import Built, build_model
from esm_neuron.training.results import write_results

LABELS = ("cytosol", "membrane", "nucleus")
IDS = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 2], [0, 20, 19, 2, PAD, PAD, PAD, PAD]])


class Kind(NamedTuple):
    """A task with a pooling, and how a user of transformers loads such a folder."""

    pooling: str
    task: TaskConfig
    auto: Any
    cls: type
    """What `auto` makes of it: transformers' own class but for our own pooling."""


def _pooled(name: str, pooling: str) -> Kind:
    labelled = name != "regression"
    task = TaskConfig(name=name, **({"labels": LABELS} if labelled else {"target_mean": 30.0, "target_sd": 2.0}))
    own = EsmForSequenceClassification if pooling == "cls" and labelled else PackedForPooledClassification
    return Kind(pooling, task, AutoModelForSequenceClassification, own)


POOLINGS = ("cls", "mean", "attention")
KINDS = {
    **{pooling: _pooled("sequence_classification", pooling) for pooling in POOLINGS},
    **{f"{name}_{pooling}": _pooled(name, pooling) for name in ("multi_label", "regression") for pooling in POOLINGS},
    "residues": Kind(
        "mean",
        TaskConfig(name="residue_classification", labels=LABELS),
        AutoModelForTokenClassification,
        EsmForTokenClassification,
    ),
    "masked_lm": Kind("cls", TaskConfig(name="masked_lm"), AutoModelForMaskedLM, EsmForMaskedLM),
}
"""Every task with every pooling that it has."""
ADAPTERS = ("lora", "head", "none")
RESULT = {
    "task": "", "metric": "mcc", "model": "tiny", "init": "random", "backend": "cpu", "adapter": "lora",
    "parameters": {"trainable": 10, "total": 1000}, "chosen_step": 4, "valid": None, "test": None,
    "data": {"train": {"records": 50, "residues": 3000}},
    "train": {"steps": 8, "residues": 9000, "seconds": 3.0, "residues_per_second": 3e3, "padding_efficiency": 1.0},
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run without its training: every trained parameter was moved at random."""

    out: Path
    cfg: TrainConfig
    task: Task
    built: Built
    trained: dict[str, Tensor]
    logits: Tensor


def logits_of(model: nn.Module) -> Tensor:
    """Of two sequences, one of them padded."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=(IDS != PAD).long()).logits


def same(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, padding left out."""
    real = (IDS != PAD) if a.ndim == 3 else slice(None)
    return a.shape == b.shape and float((a - b)[real].abs().max()) <= 1e-5 * float(b[real].abs().max())


def finish(out: Path, kind: str, adapter: str, base: str = "tiny", precision: str = "fp32") -> Run:
    """Write the output folder of a run of `kind`."""
    pooling, task_config, *_ = KINDS[kind]
    cfg = TrainConfig(
        output=str(out),
        model=ModelConfig(name=base, init="random" if base == "tiny" else "pretrained", pooling=pooling),
        task=task_config,
        data=DataConfig(max_residues=62, pack_tokens=64),
        adapter=AdapterConfig(kind=adapter, r=4, alpha=8),
        loop=LoopConfig(precision=precision),
    )
    task = create_task(cfg.task, cfg.task.labels or ())
    backend = create_backend(cfg)
    built = build_model(cfg, task, backend)
    generator = torch.Generator().manual_seed(1)
    trained = {}
    for name, parameter in built.model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
            trained[name] = parameter.detach().clone()
    with backend.autocast():
        logits = logits_of(built.model)
    write_results(cfg, task, built, trained, RESULT)
    write_json(out / "result.json", RESULT)
    write_text(out / "config.yaml", dump(cfg))
    return Run(out, cfg, task, built, trained, logits)


def each() -> Iterator[tuple[str, str]]:
    """Yield every kind with every adapter that it has; a masked LM has no head of its own."""
    for kind in KINDS:
        for adapter in ADAPTERS:
            if (kind, adapter) != ("masked_lm", "head"):
                yield kind, adapter


def write(folder: Path) -> None:
    """Write a run and its export of each kind, and the logits of the model that was trained."""
    for kind, adapter in each():
        run = finish(folder / f"{kind}-{adapter}", kind, adapter)
        export(run.out, folder / f"{kind}-{adapter}-export")
        save_file({"logits": run.logits.contiguous()}, folder / f"{kind}-{adapter}.safetensors")


def read(folder: Path) -> dict[str, bool]:
    """Return for each kind whether this package, plain transformers and plain PEFT answer as the trained model did."""
    equal = {}
    for kind, adapter in each():
        name, auto = f"{kind}-{adapter}", KINDS[kind].auto
        out, expected = folder / name, load_file(folder / f"{name}.safetensors")["logits"]
        cfg, task = read_run(out, "cpu")
        models = {
            "esm_neuron": build_trained(cfg, task, create_backend(cfg)).model,
            "transformers": auto.from_pretrained(folder / f"{name}-export"),
        }
        if adapter == "lora":
            models["peft"] = PeftModel.from_pretrained(auto.from_pretrained(out / "base"), out / "adapter")
        equal |= {f"{name} by {reader}": same(logits_of(model), expected) for reader, model in models.items()}
    return equal


if __name__ == "__main__":
    action, path = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(write(path) if action == "write" else read(path)))
