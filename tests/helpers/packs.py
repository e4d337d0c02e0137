"""Proteins laid into packs by hand, and what a tiny model of any task predicts and learns from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esm_neuron.config import ModelConfig, TaskConfig
from esm_neuron.data.tokenizer import CLS, EOS, MASK, PAD
from esm_neuron.models.esm2 import encoder_of, set_attention
from esm_neuron.models.shapes import SHAPES, esm_config
from esm_neuron.tasks import create_task

LENGTHS = (5, 37, 1, 20, 62)
CLASSES = ("A", "B", "C")
KINDS = ("cls", "mean", "attention", "mix", "concat", "regression", "residues", "masked_lm")
PER_TOKEN = ("residues", "masked_lm")
ATTENTIONS = ("segments", "masked")
Row = Sequence[int]
"""The proteins of one row, by number."""


TASKS = {"regression": "regression", "residues": "residue_classification", "masked_lm": "masked_lm"}
"""Kind -> task, where it is not sequence classification with the kind for its pooling."""
MODELS = {
    "mix": ModelConfig(layers="mix", pooling="mean+termini"),
    "concat": ModelConfig(layers="concat", pooling="mean+termini", composition=True, head="linear"),
    **{kind: ModelConfig(pooling=kind) for kind in ("cls", "mean", "attention")},
}
"""Kind -> what its head reads."""


def build(kind: str, attention: str = "segments", dropout: float = 0.0) -> nn.Module:
    """The tiny model of a task with every parameter random, norms and biases too, so that each of them matters."""
    name = TASKS.get(kind, "sequence_classification")
    scale = {"target_mean": 30.0, "target_sd": 5.0} if kind == "regression" else {}
    task = create_task(TaskConfig(name=name, **scale), CLASSES if name.endswith("classification") else ())
    config = esm_config(SHAPES["tiny"])
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    model = task.build(task.configure(config, MODELS.get(kind, ModelConfig())))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    set_attention(encoder_of(model), 1024, attention)
    return model.eval()


def proteins(masked: bool, seed: int = 0) -> list[Tensor]:
    """Token ids of proteins of LENGTHS residues; `masked` hides a different share of each."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, length in enumerate(LENGTHS):
        residues = torch.randint(4, 24, (length,), generator=generator)
        if masked:
            residues[torch.rand(length, generator=generator) < 0.15 * number] = MASK
        made.append(torch.cat((torch.tensor([CLS]), residues, torch.tensor([EOS]))))
    return made


def lay(sequences: Sequence[Tensor], rows: Sequence[Row], width: int, segments: int = 4) -> dict[str, Tensor | int]:
    """The arguments of a forward pass over packs, on the host."""
    input_ids = torch.full((len(rows), width), PAD)
    segment_ids, positions = torch.full_like(input_ids, -1), torch.zeros_like(input_ids)
    for r, row in enumerate(rows):
        begin = 0
        for s, number in enumerate(row):
            span = slice(begin, begin + len(sequences[number]))
            input_ids[r, span], segment_ids[r, span] = sequences[number], s
            positions[r, span] = torch.arange(len(sequences[number]))
            begin = span.stop
    return {"input_ids": input_ids, "segment_ids": segment_ids, "positions": positions, "max_segments": segments}


def predictions(model: nn.Module, sequences: Sequence[Tensor], rows: Sequence[Row], width: int) -> dict[int, Tensor]:
    """Logits of each protein: [classes], or [its tokens, 33]."""
    device = next(model.parameters()).device
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in lay(sequences, rows, width).items()}
    logits = model(**given).logits
    found = {}
    for r, row in enumerate(rows):
        begin = 0
        for s, number in enumerate(row):
            end = begin + len(sequences[number])
            found[number] = logits[r, begin:end] if logits.shape[1] == width else logits[r, s]
            begin = end
    return found


def alone(model: nn.Module, sequences: Sequence[Tensor]) -> dict[int, Tensor]:
    """The same with each protein in a pass of its own, without padding."""
    return {i: predictions(model, sequences, [[i]], len(s))[i] for i, s in enumerate(sequences)}


def gradients(model: nn.Module, found: dict[int, Tensor]) -> dict[str, Tensor]:
    """Gradients of the proteins' summed cross entropy towards arbitrary classes, or of a single number's square."""
    model.zero_grad()
    losses = []
    for number, logits in found.items():
        flat = logits.view(-1, logits.shape[-1])
        classes = ((torch.arange(len(flat)) + number) % flat.shape[-1]).to(flat.device)
        single = flat.shape[-1] == 1
        losses.append(flat.square().sum() if single else F.cross_entropy(flat, classes, reduction="sum"))
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    a, b = a.detach().cpu(), b.detach().cpu()
    return float((a - b).abs().max() / b.abs().max())


LAYOUTS: dict[str, tuple[list[Row], int]] = {
    "padded": ([[0], [1], [2], [3], [4]], 100),
    "packed": ([[4, 1], [2, 0, 3]], 104),
    "packed otherwise, a filler pack": ([[3, 1, 0], [], [2, 4]], 71),
}
