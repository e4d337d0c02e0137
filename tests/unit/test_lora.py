"""What is trained: adapters where they belong, the task's head, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn

from esm_neuron.backends import create_backend
from esm_neuron.config import AdapterConfig, DataConfig, LoopConfig, ModelConfig, TaskConfig, TrainConfig
from esm_neuron.errors import ConfigError
from esm_neuron.models.esm2 import encoder_of
from esm_neuron.models.lora import adapt, draw_lora, saved_key, store_frozen_linears
from esm_neuron.models.shapes import SHAPES, esm_config
from esm_neuron.models.tensor_parallel import Shard
from esm_neuron.tasks import create_task
from esm_neuron.training.build import build_model

LINEARS = {
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
}  # fmt: skip


def adapted(cfg: AdapterConfig, task_name: str = "sequence_classification", pooling: str = "mean") -> nn.Module:
    task = create_task(TaskConfig(name=task_name), ("A", "B"))
    config = task.configure(esm_config(SHAPES["tiny"]), ModelConfig(pooling=pooling))
    return adapt(task.build(config), cfg, task.head(config), {})


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def adapters_of(model: nn.Module) -> set[str]:
    """Names of the layers with a LoRA adapter, counted from the model."""
    return {
        name.partition(".lora_A")[0].removeprefix("base_model.model.") for name in trained(model) if "lora_A" in name
    }


@pytest.mark.parametrize("task", ["sequence_classification", "masked_lm"])
def test_by_default_the_six_linears_of_each_block_get_adapters(task: str) -> None:
    model = adapted(AdapterConfig(), task)
    assert isinstance(model, PeftModel)
    assert adapters_of(model) == {f"esm.encoder.layer.{block}.{linear}" for block in (0, 1) for linear in LINEARS}
    rest = {n for n in trained(model) if ".lora_" not in n}
    head = "base_model.model.mean_classifier.modules_to_save.default."
    layers = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    assert rest == ({head + layer for layer in layers} if task != "masked_lm" else set())


def test_a_chosen_target_is_hit_exactly() -> None:
    model = adapted(AdapterConfig(targets=("output.dense",), r=3, alpha=6))
    assert adapters_of(model) == {"esm.encoder.layer.0.output.dense", "esm.encoder.layer.1.output.dense"}
    layer = model.base_model.model.esm.encoder.layer[0].output.dense
    assert layer.lora_A["default"].weight.shape == (3, 128)
    assert layer.scaling["default"] == 2.0


@pytest.mark.parametrize(
    "target", ["q_proj", "attention", "dense", "attention.LayerNorm", "classifier.dense", "", ".*"]
)
def test_a_target_that_is_no_linear_is_refused_with_those_there_are(target: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(target))) as caught:
        adapted(AdapterConfig(targets=("output.dense", target)))
    assert all(linear in str(caught.value) for linear in LINEARS)


def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="adapter.targets is empty"):
        adapted(AdapterConfig(targets=()))


@pytest.mark.parametrize(("pooling", "head"), [("mean", "mean_classifier"), ("cls", "classifier")])
def test_head_only_trains_the_head(pooling: str, head: str) -> None:
    model = adapted(AdapterConfig(kind="head"), pooling=pooling)
    assert not isinstance(model, PeftModel)
    assert trained(model) == [
        f"{head}.{part}" for part in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    ]


def test_head_only_is_refused_where_there_is_no_head() -> None:
    with pytest.raises(ConfigError, match="adapter.kind=head leaves nothing to train"):
        adapted(AdapterConfig(kind="head"), "masked_lm")


@pytest.mark.parametrize("task", ["sequence_classification", "masked_lm"])
def test_everything_is_trained_but_the_contact_head(task: str) -> None:
    model = adapted(AdapterConfig(kind="none"), task)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["esm.contact_head.regression.weight", "esm.contact_head.regression.bias"]


def drawn(targets: tuple[str, ...], seed: int = 1) -> dict[str, torch.Tensor]:
    model = adapted(AdapterConfig(targets=targets))
    torch.manual_seed(len(targets))
    draw_lora(model, seed, lambda _, shape: shape, lambda *_: None)
    return {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}


def test_a_draw_depends_on_the_seed_and_the_name_alone() -> None:
    few, many = drawn(("output.dense",)), drawn(tuple(sorted(LINEARS)))
    assert set(few) < set(many)
    assert all(torch.equal(value, many[name]) for name, value in few.items())
    a = {name: value for name, value in many.items() if ".lora_A." in name}
    other = drawn(("output.dense",), seed=2)
    assert not any(torch.equal(other[name], value) for name, value in few.items() if ".lora_A." in name)
    assert len({float(value.sum()) for value in a.values()}) == len(a) == 12
    for value in a.values():
        bound = value.shape[1] ** -0.5
        assert float(value.abs().max()) <= bound
        assert float(value.std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    assert all((value == 0).all() for name, value in many.items() if ".lora_B." in name)


def test_a_rank_draws_its_part_of_the_whole_tensor() -> None:
    whole = drawn(("output.dense",))
    model = adapted(AdapterConfig(targets=("output.dense",)))
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.data = parameter.data[:, :64]  # as on the first of two tensor-parallel ranks
    half = Shard((slice(0, 8), slice(0, 64)), (8, 64))
    draw_lora(model, 1, lambda _, shape: (shape[0], 128), lambda *_: half)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            assert torch.equal(parameter, whole[name][:, :64])


@pytest.mark.parametrize("task_name", ["sequence_classification", "masked_lm"])
def test_bfloat16_storage_is_for_frozen_linears_only(task_name: str) -> None:
    model = adapted(AdapterConfig(), task_name)
    store_frozen_linears(model, torch.bfloat16)
    assert all(model.get_parameter(name).dtype == torch.float32 for name in trained(model))
    halved = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    blocks = {
        f"esm.encoder.layer.{b}.{linear}.base_layer.{p}"
        for b in (0, 1)
        for linear in LINEARS
        for p in ("weight", "bias")
    }
    assert {f"base_model.model.{name}" for name in blocks} <= halved
    # the LM head's decoder is the embedding itself, which stays float32 with the norms
    assert not [n for n in halved if "Norm" in n or "norm" in n or "word_embeddings" in n or "decoder" in n]
    assert encoder_of(model).rotary.table.dtype == torch.float32


def test_a_bfloat16_run_learns_in_float32() -> None:
    cfg = TrainConfig(
        model=ModelConfig(name="tiny", init="random"),
        task=TaskConfig(name="sequence_classification"),
        data=DataConfig(max_residues=30, pack_tokens=32),
        loop=LoopConfig(precision="bf16"),
    )
    backend, task = create_backend(cfg), create_task(cfg.task, ("A", "B"))
    model = build_model(cfg, task, backend).model
    with backend.autocast():
        logits = model(input_ids=torch.tensor([[0, 5, 6, 7, 2]])).logits
    logits.float().sum().backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learning)
    assert any((p.grad != 0).any() for p in learning)


def test_saved_names_are_without_the_adapters_name() -> None:
    lora = "base_model.model.esm.encoder.layer.0.output.dense.lora_A.default.weight"
    assert saved_key(lora) == "base_model.model.esm.encoder.layer.0.output.dense.lora_A.weight"
    head = "base_model.model.mean_classifier.modules_to_save.default.dense.bias"
    assert saved_key(head) == "base_model.model.mean_classifier.dense.bias"


def test_a_new_head_starts_alike_whatever_is_trained() -> None:
    def head(kind: str) -> torch.Tensor:
        cfg = TrainConfig(model=ModelConfig(name="tiny", init="random"), adapter=AdapterConfig(kind=kind))
        cfg = replace(cfg, data=DataConfig(max_residues=30, pack_tokens=32))
        model = build_model(cfg, create_task(cfg.task, ("A", "B")), create_backend(cfg)).model
        (weight,) = (
            p
            for n, p in model.named_parameters()
            if n.endswith("dense.weight") and "classifier" in n and p.requires_grad
        )
        return weight.detach()

    assert torch.equal(head("lora"), head("head"))
    assert torch.equal(head("lora"), head("none"))
