"""What a run leaves behind: a plain PEFT adapter, or a plain Hugging Face folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EsmConfig

from esm_neuron.adapters import saved_key
from esm_neuron.backends import create_backend
from esm_neuron.backends.base import Backend
from esm_neuron.build import Built, ModelMaker, build_model, model_config
from esm_neuron.card import model_card
from esm_neuron.config import BackendName, ParallelConfig, TrainConfig, require
from esm_neuron.data.tokenizer import hf_tokenizer
from esm_neuron.errors import CheckpointError
from esm_neuron.files import new_folder, write_json
from esm_neuron.finished import read_result
from esm_neuron.folders import ADAPTER, BASE, CARD, CONFIG, MODEL
from esm_neuron.loading import load_into
from esm_neuron.model import PooledEsmConfig
from esm_neuron.safetensors_folder import BaseReference, write_shards
from esm_neuron.settings import read_config
from esm_neuron.tasks import Task, create_task
from esm_neuron.weights import Draw, is_carried, open_weights

log = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAY_CHANGE = ("data.", "loop.eval_rows_per_device", "loop.precision", "parallel.")
"""Settings of a finished run that evaluating and answering may overrule."""
REFERENCE = "base_reference.json"
"""Beside an adapter: which weights it was trained on."""


def plain_model(cfg: TrainConfig, task: Task) -> tuple[nn.Module, EsmConfig]:
    """The task's model on the CPU with its starting weights: whole, without adapters."""
    pretrained, source = open_weights(cfg.model, cfg.seed)
    config = model_config(cfg, task, pretrained)
    with torch.device("meta"):
        model = task.build(config)
    load_into(
        model,
        source,
        Draw(cfg.seed, config.initializer_range),
        lambda name: name.startswith(tuple(f"{part}." for part in task.head(config))),
    )
    return model, config


def write_model(model: nn.Module, config: EsmConfig, folder: Path, card: str = "") -> None:
    """A Hugging Face folder: config.json, sharded safetensors, the tokenizer, and `card` as its model card if any.

    With `cls` pooling, for classes of residues and for masked LM it loads in plain transformers; other poolings, and
    regression, name a model type of their own, known after `import esm_neuron.model`.
    """

    def state() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.state_dict().items():
            yield name, tensor.float()

    with new_folder(folder) as aside:
        write_shards(state(), aside)
        _write_config(model, config, aside)
        hf_tokenizer().save_pretrained(str(aside))
        if card:
            (aside / CARD).write_text(card, encoding="utf-8")


def _write_config(model: nn.Module, config: EsmConfig, folder: Path) -> None:
    saved = config.__class__.from_dict(config.to_dict())
    name = type(model).__name__
    saved.architectures = [name.replace("Packed", "Esm") if saved.model_type == "esm" else name]
    saved.dtype = "float32"
    saved.to_json_file(folder / "config.json", use_diff=False)


def write_results(
    cfg: TrainConfig, task: Task, built: Built, trained: Mapping[str, Tensor], result: Mapping[str, Any]
) -> Path:
    """Write OUT/adapter (and OUT/base where the base has no other home), or OUT/model, with a model card.

    Args:
        trained: whole trained parameters by name, as `Backend.gather_state` gives them.
        result: what result.json is to hold.

    Returns:
        The folder to load.
    """
    out = Path(cfg.output)
    if isinstance(built.model, PeftModel):
        return _write_adapter(cfg, task, built, built.model, trained, result)
    model, config = plain_model(cfg, task)
    with torch.no_grad():
        for name, value in trained.items():
            model.get_parameter(name).copy_(value)
    write_model(model, config, out / MODEL, model_card(cfg, result, built.source.reference, "model"))
    return out / MODEL


def _write_adapter(
    cfg: TrainConfig,
    task: Task,
    built: Built,
    adapted: PeftModel,
    trained: Mapping[str, Tensor],
    result: Mapping[str, Any],
) -> Path:
    out = Path(cfg.output)
    reference = built.source.reference
    if is_carried(cfg.model):
        model, config = plain_model(cfg, task)
        write_model(model, config, out / BASE)
        base = replace(cfg.model, name=str((out / BASE).resolve()), init="pretrained", revision=None, sha256=None)
        reference = open_weights(base, cfg.seed)[1].reference
    lora = adapted.peft_config["default"]
    lora.base_model_name_or_path, lora.revision = reference.name, reference.revision
    if built.config.model_type == PooledEsmConfig.model_type and not is_carried(cfg.model):
        # With the pretrained repository for its base the adapter would load in plain transformers, PEFT would pass over
        # the head it does not find, and a random <cls> head would answer. A config of our type is refused there.
        with new_folder(out / BASE) as aside, torch.device("meta"):
            _write_config(task.build(built.config), built.config, aside)
        lora.base_model_name_or_path, lora.revision = str((out / BASE).resolve()), None
    lora.inference_mode = True
    with new_folder(out / ADAPTER) as aside:
        save_file({saved_key(n): t.contiguous() for n, t in trained.items()}, aside / ADAPTER_WEIGHTS, {"format": "pt"})
        lora.save_pretrained(str(aside))
        write_json(aside / REFERENCE, asdict(reference))
        (aside / CARD).write_text(model_card(cfg, result, reference, "adapter"), encoding="utf-8")
    return out / ADAPTER


def moved(cfg: TrainConfig, backend: BackendName) -> TrainConfig:
    """A run's configuration on another device, without what only its own has: as many cores, its number formats.

    A CPU answers in float32: those without bf16 units emulate it, at a fraction of the speed.
    """
    precision = "fp32" if backend == "cpu" else cfg.loop.precision
    return replace(
        cfg,
        backend=backend,
        parallel=ParallelConfig(),
        loop=replace(cfg.loop, tf32=False, torch_compile=False, precision=precision),
        optim=replace(cfg.optim, kind="adamw"),
    )


def read_run(folder: Path, backend: BackendName | None = None) -> tuple[TrainConfig, Task]:
    """Configuration and task of a finished run, ready for `build_trained`.

    Raises:
        ConfigError: `folder` is no finished run.
    """
    path = folder / CONFIG
    require(path.is_file(), f"--model {folder}: no {CONFIG} there; name the output folder of a training run")
    cfg = read_config(path)
    found = [name for name in (ADAPTER, MODEL) if (folder / name).is_dir()]
    require(
        bool(found),
        f"--model {folder}: no adapter and no model there; let its training finish (--checkpoint.resume auto)",
    )
    model = cfg.model
    if found == [MODEL]:
        model = replace(model, name=str(folder / MODEL), init="pretrained", revision=None, sha256=None)
    elif is_carried(model):
        model = replace(model, name=str(folder / BASE), init="pretrained", revision=None, sha256=None)
    cfg = replace(cfg, output=str(folder), model=model)
    if backend is not None and backend != cfg.backend:
        cfg = moved(cfg, backend)
    if not cfg.can_quantize and cfg.adapter.kind == "qlora":
        log.warning("trained on quantized weights, answered from float ones: answers differ by the quantization error")
        cfg = replace(cfg, adapter=replace(cfg.adapter, kind="lora"))
    return cfg, create_task(cfg.task, cfg.task.labels or ())


def build_trained(cfg: TrainConfig, task: ModelMaker, backend: Backend) -> Built:
    """The model of a finished run with its trained weights, on the backend's device.

    Raises:
        CheckpointError: the adapter is damaged, or the base weights are not those it was trained on.
    """
    folder = Path(cfg.output) / ADAPTER
    if cfg.adapter.kind not in ("lora", "qlora"):
        return build_model(cfg, task, backend)
    built = build_model(cfg, task, backend)
    reference = read_reference(folder)
    if built.source.reference.sha256 != reference.sha256:
        raise CheckpointError(
            f"{folder}: was trained on {reference.name} with sha256 {reference.sha256[:12]}, but {cfg.model.name} has "
            f"{built.source.reference.sha256[:12]}; give the weights it was trained on"
        )
    names = {saved_key(n): n for n, p in built.model.named_parameters() if p.requires_grad}
    saved = read_adapter(folder)
    unknown = sorted(set(saved) - set(names))
    if unknown:
        raise CheckpointError(f"{folder}: {len(unknown)} tensors do not fit the model, the first is {unknown[0]}")
    backend.load_weights(built.model, {names[key]: value for key, value in saved.items()})
    return built


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter. Raises CheckpointError where the file is missing or damaged."""
    path = folder / ADAPTER_WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); export it again") from error


def read_reference(folder: Path) -> BaseReference:
    """Which base an adapter belongs to."""
    path = folder / REFERENCE
    try:
        return BaseReference(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); it names the base of the adapter") from error


def merged(built: Built) -> nn.Module:
    """The trained model as one plain float network: quantized weights made whole, LoRA added into them."""
    if built.quantized:
        from esm_neuron.quantize import dequantize_linears

        dequantize_linears(built.model)
    return built.model.merge_and_unload() if isinstance(built.model, PeftModel) else built.model


def export(run: Path, target: Path) -> None:
    """Merge the adapter of a finished run, on the CPU, and write a plain Hugging Face folder with a model card.

    Raises:
        ConfigError: `target` is there already, or `run` is no finished run.
        CheckpointError: the run's weights or its result.json are damaged.
    """
    require(not target.exists(), f"--output {target}: exists already; name a new folder")
    cfg, task = read_run(run, "cpu")
    cfg = replace(cfg, loop=replace(cfg.loop, precision="fp32"), parallel=ParallelConfig())
    backend = create_backend(cfg)
    built = build_trained(cfg, task, backend)
    card = model_card(read_config(run / CONFIG), read_result(run), built.source.reference, "model")
    write_model(merged(built), built.config, target, card)
