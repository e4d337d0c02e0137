"""Folders as transformers' Trainer and plain PEFT write them, and what these libraries answer from them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    EsmConfig,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
    Trainer,
    TrainingArguments,
)

from esm_neuron.data.tokenizer import PAD, hf_tokenizer
from esm_neuron.models.shapes import SHAPES, esm_config
from helpers.finished import IDS, logits_of

CLASSES = ("cyto", "memb", "nucl")
SEQUENCES = ("MKVLAAGGYWE", "ACDEFGHIKLMNPQRSTVWY", "GGSGGAAWK")

KINDS: dict[str, tuple[type, dict[str, Any], Any]] = {
    "single": (EsmForSequenceClassification, {"labels": CLASSES}, [2, 0]),
    "multi": (EsmForSequenceClassification, {"labels": CLASSES}, [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
    "regression": (EsmForSequenceClassification, {"labels": ("melting",)}, [40.0, 55.0]),
    "tokens": (EsmForTokenClassification, {"labels": ("-", "H", "E")}, None),
    "lm": (EsmForMaskedLM, {}, None),
}
"""What is trained -> transformers' class, names of its outputs, and labels of the two sequences of `IDS`."""


def small(labels: Sequence[str] = (), **more: Any) -> EsmConfig:
    """A tiny configuration that names its outputs."""
    named = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {}
    return EsmConfig.from_dict(esm_config(SHAPES["tiny"]).to_dict() | named | more)


def moved(model: nn.Module, seed: int = 0) -> Any:
    """The model with every parameter, and so every head and adapter, moved at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def fit(model: nn.Module, labels: Any, folder: Path) -> None:
    """Two steps of Trainer, which writes checkpoint-2, and then the model itself."""
    targets = IDS.tolist() if labels is None else labels
    if labels is None and model.config.num_labels == 3:
        targets = [[token % 3 for token in row] for row in targets]
    rows = [
        {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.tensor(target)}
        for ids, target in zip(IDS, targets, strict=True)
    ]
    options = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=2, learning_rate=0.05, per_device_train_batch_size=2,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=options, train_dataset=rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    trainer.save_model()


def by_trainer(kind: str, folder: Path) -> Tensor:
    """Train and save a model of a kind with Trainer; return what transformers answers when it loads the folder."""
    cls, config, labels = KINDS[kind]
    fit(moved(cls(small(**config))).train(), labels, folder)
    return logits_of(cls.from_pretrained(folder))


def base(folder: Path, cls: type = EsmForMaskedLM, labels: Sequence[str] = ()) -> Path:
    """A pretrained model's folder."""
    moved(cls(small(labels)), seed=1).save_pretrained(folder)
    return folder


def adapted(start: Path, cls: type, labels: Sequence[str] = (), **lora: Any) -> PeftModel:
    """A model under PEFT with all that an adapter trains moved at random."""
    more = {"num_labels": len(labels)} if labels else {}
    model = cls.from_pretrained(start, **more)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"]}
    model = get_peft_model(model, LoraConfig(**settings | lora))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def answers(model: nn.Module, sequences: Sequence[str] = SEQUENCES) -> list[np.ndarray]:
    """Logits of transformers' model for each sequence alone; of a residue model without <cls> and <eos>."""
    found = []
    for sequence in sequences:
        ids = hf_tokenizer()(sequence, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        found.append((logits[1:-1] if logits.ndim == 2 else logits).double().numpy())
    return found


def fasta(path: Path, labels: Sequence[str] = ()) -> Path:
    """The sequences as records, with their labels where there are any."""
    named = labels or [""] * len(SEQUENCES)
    path.write_text("".join(
        f">p{number} {f'label={label}' if label else ''}\n{sequence}\n"
        for number, (sequence, label) in enumerate(zip(SEQUENCES, named, strict=True))
    ))  # fmt: skip
    return path


__all__ = ["CLASSES", "KINDS", "SEQUENCES", "EsmModel", "adapted", "answers", "base", "by_trainer", "fasta", "fit"]
