"""What to try next with a finished run, each with its command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esm_neuron.config import TrainConfig
from esm_neuron.metrics.text import use
from esm_neuron.metrics.verdict import BETTER, FEW, UNDECIDED, units_of
from esm_neuron.models.shapes import SHAPES

LARGER = "facebook/esm2_t12_35M_UR50D"
"""What to begin real work with, after a network of the package or Meta's smallest."""
_SMALLEST = "facebook/esm2_t6_8M_UR50D"
MANY = 0.5
"""Share of held-out proteins with a homolog in training from which a split tells little."""


def fine_tuning(probe: Path, output: str) -> str:
    """Return the command that fine-tunes from a probe.

    Its head has large weights along axes of small variance: at the usual rates the first steps of LoRA undo what it
    knows (docs/tuning.md).
    """
    start = f"--adapter.kind lora --optim.lr 3e-5 --adapter.init_from {probe}"
    return f"esm-neuron train --config {probe}/config.yaml --output {output} {start}"


def next_steps(cfg: TrainConfig, result: Mapping[str, Any], folder: Path) -> list[str]:
    """Return what its metrics suggest, the most promising first."""
    split = next((split for split in ("test", "valid") if result.get(split)), None)
    again = f"esm-neuron train --config {folder}/config.yaml --output {folder}-2"
    if split is None:
        return [f"hold proteins out, to know how good it is: {again} --test_fraction 0.1 --sample clusters"]
    found: list[str] = []
    said = (result.get("verdicts") or {}).get(split, {}).get("verdict")
    if cfg.adapter.kind == "probe":
        found.append(f"fine-tune from this probe: {fine_tuning(folder, f'{folder}-2')}")
    elif said != BETTER and result["chosen_step"] == result["train"]["steps"]:
        found.append(f"the last step was the best: train longer, {again} --max_steps {3 * result['chosen_step']}")
    if said != BETTER and (cfg.model.name in SHAPES or cfg.model.name == _SMALLEST):
        own = {"model.revision": cfg.model.revision, "model.sha256": cfg.model.sha256,
               "adapter.init_from": cfg.adapter.init_from}  # fmt: skip
        more = [f"--{name} null" for name, value in own.items() if value is not None]  # of the smaller one
        more += ["--model.layers auto"] if cfg.adapter.kind == "probe" else []
        found.append(f"a larger ESM-2 knows more: {' '.join([again, '--model', LARGER, *more])}")
    sampled = not (cfg.data.test or cfg.data.split_column or cfg.data.valid_column or cfg.data.fold)
    if sampled and (said == UNDECIDED or units_of(result[split]) < FEW):
        found.append(f"few proteins decide little; test on each once: {again} --test_fraction 0 --folds 5")
    if split == "valid":
        found.append(f"these proteins chose the weights; hold others out: {again} --test_fraction 0.1")
    leak = (result.get("leaks") or {}).get(split)
    if leak and leak["homologs"] > MANY * leak["proteins"]:
        found.append(f"most {split} proteins have a homolog in training: hold out families, --sample clusters")
    return [*found, f"use it: {use(folder, cfg.task.mask_rates is not None)}"]
