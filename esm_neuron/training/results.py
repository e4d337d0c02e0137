"""Write the trained weights of a run: a plain PEFT adapter, or a plain Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from esm_neuron.compat import EsmConfig, PeftModel, on_meta
from esm_neuron.config import TrainConfig
from esm_neuron.data.tokenizer import hf_tokenizer
from esm_neuron.files import LEDGER, new_folder, note, save_tensors, sha256, write_json, write_text
from esm_neuron.metrics.calibration import Calibration
from esm_neuron.models.adapter_folder import ADAPTER_WEIGHTS
from esm_neuron.models.esm2 import PooledEsmConfig
from esm_neuron.models.heads import with_head
from esm_neuron.models.hf_folder import BaseReference, write_shards
from esm_neuron.models.lora import saved_key
from esm_neuron.models.shapes import in_folder, is_carried
from esm_neuron.models.weights import Draw, inverse_frequencies, load_into, open_weights
from esm_neuron.reports.card import model_card
from esm_neuron.run_dir import ADAPTER, BASE, CALIBRATION, CARD, DECIDING, MODEL, REFERENCE
from esm_neuron.tasks.base import Task
from esm_neuron.training.build import Built, model_config


def plain_model(cfg: TrainConfig, task: Task) -> tuple[nn.Module, EsmConfig]:
    """Return the task's model on the CPU with its starting weights: whole, without adapters."""
    pretrained, source = open_weights(cfg.model, cfg.seed)
    config = model_config(cfg, task, pretrained)
    with on_meta():
        model = task.build(config)
    head = task.head(config)
    source, _ = with_head(source, pretrained, model, head)
    new = tuple(f"{part}." for part in head)
    load_into(model, source, Draw(cfg.seed, config.initializer_range), lambda name: name.startswith(new))
    return model, config


def write_model(
    model: nn.Module, config: EsmConfig, folder: Path, card: str = "", calibration: Calibration | None = None
) -> None:
    """Write a Hugging Face folder: config.json, sharded safetensors, the tokenizer, and `card` as its model card.

    A `calibration` says how `predict` reads its predictions; plain transformers does not know of it.

    Plain transformers loads it for `cls` pooling, residue classification and masked LM. Other poolings and regression
    have a model type of their own, known after `import esm_neuron.models.esm2`.
    """
    with new_folder(folder) as aside:
        write_shards(_as_published(model.state_dict(), config), aside)
        _write_config(model, config, aside)
        hf_tokenizer().save_pretrained(str(aside))
        if card:
            write_text(aside / CARD, card)
        if calibration is not None and calibration.proteins:
            write_json(aside / CALIBRATION, asdict(calibration))


def _as_published(state: Mapping[str, Tensor], config: EsmConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder in float32, and the rotary frequencies that transformers' own classes look for.

    Without these plain transformers would say that parameters are newly initialized, where it makes them itself.
    """
    yield from ((name, tensor.float()) for name, tensor in state.items())
    for layer in range(config.num_hidden_layers if config.model_type == EsmConfig.model_type else 0):
        name = f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"
        yield name, inverse_frequencies(config.hidden_size // config.num_attention_heads)


def _write_config(model: nn.Module, config: EsmConfig, folder: Path) -> None:
    saved = config.__class__.from_dict(config.to_dict())
    name = type(model).__name__
    saved.architectures = [name.replace("Packed", "Esm") if saved.model_type == "esm" else name]
    saved.dtype = "float32"
    write_text(folder / "config.json", saved.to_json_string(use_diff=False))


@dataclass(frozen=True)
class Written:
    """Trained weights that have been written."""

    folder: Path
    reference: BaseReference
    kind: Literal["adapter", "model"]

    def describe(self, cfg: TrainConfig, result: Mapping[str, Any]) -> None:
        """Write the model card and the calibration beside the weights; `result` is what result.json holds."""
        if (self.folder.parent / LEDGER).is_file():
            note(self.folder.parent, [f"{self.folder.name}/{name}" for name in (CARD, CALIBRATION)])
        if result.get("calibration"):
            write_json(self.folder / CALIBRATION, result["calibration"])
        write_text(self.folder / CARD, model_card(cfg, result, self.reference, self.kind))


def write_results(
    cfg: TrainConfig, task: Task, built: Built, trained: Mapping[str, Tensor], result: Mapping[str, Any] | None = None
) -> Written:
    """Write OUT/adapter (and OUT/base where the base has no other home), or OUT/model; a card if there is a result.

    `trained` holds whole parameters by name, as `Backend.gather_state` gives them.
    """
    written = _write_weights(cfg, task, built, trained)
    if result is not None:
        written.describe(cfg, result)
    return written


def _write_weights(cfg: TrainConfig, task: Task, built: Built, trained: Mapping[str, Tensor]) -> Written:
    out, reference = Path(cfg.output), built.source.reference
    if not isinstance(built.model, PeftModel):
        model, config = plain_model(cfg, task)
        with torch.no_grad():
            for name, value in trained.items():
                model.get_parameter(name).copy_(value)
        write_model(model, config, out / MODEL)
        written = open_weights(in_folder(cfg.model, (out / MODEL).resolve()), cfg.seed)[1].reference
        write_json(out / MODEL / REFERENCE, {"sha256": written.sha256})
        note(out, [f"{MODEL}/{REFERENCE}"])
        return Written(out / MODEL, reference, "model")
    if is_carried(cfg.model):
        model, config = plain_model(cfg, task)
        write_model(model, config, out / BASE)
        reference = open_weights(in_folder(cfg.model, (out / BASE).resolve()), cfg.seed)[1].reference
    lora = built.model.peft_config["default"]
    lora.base_model_name_or_path, lora.revision = reference.name, reference.revision
    own_type = built.config.model_type == PooledEsmConfig.model_type
    if (own_type or isinstance(cfg.model.layers, int)) and not is_carried(cfg.model):
        # If the adapter named the pretrained repository as its base, plain transformers would load it, PEFT would pass
        # over the head it does not find, and a random <cls> head would predict. A config of our type is refused there,
        # and one that is cut off after some blocks has no weights there.
        with new_folder(out / BASE) as aside, on_meta():
            _write_config(task.build(built.config), built.config, aside)
        lora.base_model_name_or_path, lora.revision = str((out / BASE).resolve()), None
    lora.inference_mode = True
    # For SEQ_CLS PEFT trains whatever is called "score", and would look for the one of attention pooling twice.
    lora.task_type = None if "attention_pooling" in task.head(built.config) else task.peft_task
    if lora.task_type is None:  # AutoPeftModel then asks for the class
        lora.auto_mapping = {"base_model_class": task.auto_class, "parent_library": "transformers"}
    with new_folder(out / ADAPTER) as aside:
        save_tensors(aside / ADAPTER_WEIGHTS, {saved_key(n): t.contiguous() for n, t in trained.items()})
        lora.save_pretrained(str(aside))
        # the folder of the base is told by its place beside the adapter, not by where this machine had it
        named = replace(reference, name=cfg.model.name) if is_carried(cfg.model) else reference
        deciding = {name: getattr(built.config, name) for name in DECIDING}
        own = {"labels": list(cfg.task.labels or ()), "adapter": sha256(aside / ADAPTER_WEIGHTS), "config": deciding}
        write_json(aside / REFERENCE, {**asdict(named), **own})
    return Written(out / ADAPTER, reference, "adapter")
