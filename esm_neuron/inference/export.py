"""Export a trained model as a plain Hugging Face folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from esm_neuron.backends import create_backend
from esm_neuron.compat import PeftModel
from esm_neuron.config import ParallelConfig, require
from esm_neuron.config.settings import read_config
from esm_neuron.inference import push
from esm_neuron.inference.load import build_trained, find_trained
from esm_neuron.metrics.calibration import Calibration
from esm_neuron.models.heads import PER_CLASS
from esm_neuron.reports.card import model_card
from esm_neuron.run_dir import CONFIG, read_result
from esm_neuron.training.build import Built
from esm_neuron.training.results import write_model

logger = logging.getLogger(__name__)


def merged(built: Built) -> nn.Module:
    """Return the trained model as one plain float network: weights dequantized, LoRA merged into them."""
    if built.quantized:
        from esm_neuron.models.quantize import dequantize_linears

        dequantize_linears(built.model)
    return built.model.merge_and_unload() if isinstance(built.model, PeftModel) else built.model


def fold_temperature(model: nn.Module, calibration: Calibration) -> Calibration:
    """Divide the last layer by the temperature, so that plain transformers divides too; return what is left to do."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if PER_CLASS.fullmatch(name):
                parameter.div_(calibration.temperature)
    return replace(calibration, temperature=1.0)


def export(
    model: str | Path, target: Path, settings: Sequence[str] = (), push_to_hub: str | None = None, public: bool = False,
    log: Callable[[str], None] = logger.info,
) -> None:  # fmt: skip
    """Merge the adapter of a trained model, on the CPU, write a plain Hugging Face folder, and upload it if asked to.

    Its head has the temperature of the calibration in its weights. A finished run's has a model card. Raise
    ConfigError where `target` exists, a run is not finished, or an upload fails (the folder stays), CheckpointError
    where files are damaged. `model` and `settings` are as for `predict`, the others as for `push`.
    """
    require(not os.path.lexists(target), f"--output {target}: exists already; name a new folder")
    require(not public or push_to_hub is not None, "--public is about --push-to-hub OWNER/NAME; give both, or neither")
    if push_to_hub is not None:
        push.check(push_to_hub)
    cfg, task = find_trained(model, "cpu", settings, "export")
    cfg = replace(cfg, loop=replace(cfg.loop, precision="fp32"), parallel=ParallelConfig())
    built = build_trained(cfg, task, create_backend(cfg))
    network = merged(built)
    left = fold_temperature(network, task.calibration)
    run, card = Path(model), ""
    if (run / CONFIG).is_file():
        result = read_result(run)
        if result.get("calibration"):
            result = {**result, "calibration": asdict(left)}
        card = model_card(read_config(run / CONFIG), result, built.source.reference, "model")
    write_model(network, built.config, target, card, left)
    log(f"Hugging Face folder written to {target}")
    if push_to_hub is not None:
        push.push(target, push_to_hub, public, log)
