"""Build a model from a configuration, ready to train or to predict, in one visible order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from esm_neuron.backends.base import Backend
from esm_neuron.compat import EsmConfig, on_meta
from esm_neuron.config import TrainConfig
from esm_neuron.models.esm2 import encoder_of, freeze_norms, set_attention
from esm_neuron.models.heads import with_head
from esm_neuron.models.lora import adapt, draw_lora, join_qkv, lay_qkv_end_to_end
from esm_neuron.models.tensor_parallel import whole_shape
from esm_neuron.models.weights import Draw, LoadReport, WeightSource, load_into, open_weights
from esm_neuron.tasks.base import Task


@dataclass(frozen=True)
class Built:
    """A model and where it came from."""

    model: nn.Module
    """On its device; `PeftModel` where adapters were added."""
    config: EsmConfig
    source: WeightSource
    report: LoadReport
    head: str
    """A line on the head that the weights came with; "" where they had none."""
    quantized: bool = False


def build_model(
    cfg: TrainConfig,
    task: Task,
    backend: Backend,
    trained: bool = False,
    start: Mapping[str, Tensor] | None = None,
) -> Built:
    """Build on meta, shard, load slices (and quantize each as it comes), adapt, prepare.

    A `trained` model has its head in its weights, under the names and in the order that the task gives them. `start`
    is a head to begin with, by the names of the model.
    """
    pretrained, source = open_weights(cfg.model, cfg.seed)
    config = model_config(cfg, task, pretrained)
    # On meta a model takes no memory, so a rank only ever holds the parts that it reads.
    with on_meta():
        model = task.build(config)
    set_attention(encoder_of(model), cfg.data.max_residues + 2, backend.attention)
    backend.shard(model)
    if cfg.adapter.kind == "qlora":
        from esm_neuron.models.quantize import quantize_linears  # needs bitsandbytes

        compute = torch.bfloat16 if cfg.loop.precision == "bf16" else torch.float32
        quantize_linears(model, cfg.adapter.quantization, compute, backend.device)
    # Under SPMD the process sees whole tensors: cut along tp, the three linears end to end would mix heads.
    joins = backend.attention == "masked" and backend.topology.tp == cfg.parallel.tp and cfg.adapter.kind == "lora"
    if joins:
        lay_qkv_end_to_end(model)
    head = task.head(config)
    draw = Draw(cfg.seed, config.initializer_range)
    new = tuple(f"{part}." for part in head)
    headed, note = (source, "") if trained else with_head(source, pretrained, model, head, start)
    report = load_into(model, headed, draw, lambda name: not trained and name.startswith(new), backend.part)
    if cfg.model.gradient_checkpointing:
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=backend.checkpoint_fn())
    adapted = adapt(model, cfg.adapter, head, backend.lora_modules)
    whole = partial(whole_shape, heads=config.num_attention_heads, tp=backend.topology.tp)
    draw_lora(adapted, cfg.seed, whole, backend.part)
    if backend.attention == "masked":
        freeze_norms(adapted)
    if joins:
        join_qkv(adapted)
    return Built(backend.prepare(adapted), config, source, report, note, quantized=cfg.adapter.kind == "qlora")


def model_config(cfg: TrainConfig, task: Task, pretrained: EsmConfig) -> EsmConfig:
    """Return the configuration of the task's model: the pretrained one's with dropout and length of the run."""
    config = task.configure(pretrained, cfg.model)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = cfg.model.dropout
    config.max_position_embeddings = max(config.max_position_embeddings, cfg.data.max_residues + 2)
    return config
