"""What a head reads: a model that is cut off is transformers' own; mixed and joined layers, termini, composition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.packs import build, difference, proteins
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, EsmForMaskedLM, EsmForSequenceClassification

from esm_neuron.backends import create_backend
from esm_neuron.config import AdapterConfig, DataConfig, ModelConfig, TaskConfig, TrainConfig
from esm_neuron.data.alignment import Proteins
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.errors import ConfigError
from esm_neuron.inference.export import export
from esm_neuron.inference.predict import predict
from esm_neuron.models.esm2 import composition, encoder_of, vector_width
from esm_neuron.models.shapes import SHAPES, esm_config, shape_of
from esm_neuron.tasks import create_task, task_class
from esm_neuron.tasks.features import composition as counted
from esm_neuron.training import run
from esm_neuron.training.build import build_model

LABELS = ("LABEL_0", "LABEL_1", "LABEL_2")  # as transformers calls them


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four layers of random weights, norms and biases too, as transformers saves it."""
    config = esm_config(SHAPES["small"], num_labels=3)
    model, generator = EsmForSequenceClassification(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("pretrained")
    model.save_pretrained(folder)
    return folder


def built(folder: Path, **model: Any) -> nn.Module:
    cfg = TrainConfig(model=ModelConfig(name=str(folder), **model), adapter=AdapterConfig(kind="none"))
    return build_model(cfg, create_task(TaskConfig(), LABELS), create_backend(cfg)).model.eval()


def states(folder: Path, ids: Tensor) -> list[Tensor]:
    """The states [L, H] of every layer of transformers' own model, each after the final norm."""
    model = EsmForMaskedLM.from_pretrained(folder).esm.eval()
    *inner, last = model(ids[None], output_hidden_states=True).hidden_states
    return [*(model.encoder.emb_layer_norm_after(hidden)[0] for hidden in inner), last[0]]


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_a_model_that_is_cut_off_is_that_of_transformers_in_outputs_and_gradients(
    pretrained: Path, layers: int
) -> None:
    ours = built(pretrained, layers=layers, pooling="cls")
    theirs = EsmForSequenceClassification.from_pretrained(
        pretrained, num_hidden_layers=layers, ignore_mismatched_sizes=True
    ).eval()
    theirs.classifier.load_state_dict(ours.classifier.state_dict())
    assert len(encoder_of(ours).encoder.layer) == layers
    for ids in proteins(masked=True):
        logits, expected = ours(input_ids=ids[None]).logits, theirs(input_ids=ids[None]).logits
        assert difference(logits, expected) <= 1e-5
        for found in (logits, expected):
            F.cross_entropy(found, torch.tensor([1])).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) > 16 * layers
    for name, parameter in ours.named_parameters():
        if name in gradients:
            assert difference(parameter.grad, gradients[name]) <= 1e-4, name


def reads(states: list[Tensor], ids: Tensor, pooling: str) -> list[Tensor]:
    """What is pooled of each layer, by hand."""
    end = len(ids) - 1  # of <eos>
    parts = [slice(1, end), slice(1, min(51, end)), slice(max(1, end - 50), end)][: 3 if "+" in pooling else 1]
    return [torch.cat([hidden[part].mean(0) for part in parts]) for hidden in states]


@pytest.mark.parametrize("pooling", ["mean", "mean+termini"])
def test_mixed_and_joined_layers_are_those_of_plain_transformers(pretrained: Path, pooling: str) -> None:
    mixed = built(pretrained, layers="mix", pooling=pooling)
    joined = built(pretrained, layers="concat", pooling=pooling, head="linear", composition=True)
    with torch.no_grad():
        mixed.layer_mix.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7]))
    for ids in proteins(masked=False):
        expected = reads(states(pretrained, ids), ids, pooling)
        weights = torch.tensor([0.5, -1.0, 2.0, 0.1, 0.7]).softmax(0)
        found = mixed._vectors(ids[None], None)[0, 0]
        assert difference(found, sum(w * vector for w, vector in zip(weights, expected, strict=True))) <= 1e-5
        shares = counted(Proteins.of(ExampleTable.of(ids.numpy().astype(np.uint8), np.array([0, len(ids)]))))[0]
        shares = shares if pooling == "mean+termini" else np.delete(shares, np.s_[20:-1])
        found = joined._vectors(ids[None], None)[0, 0]
        assert difference(found, torch.cat([*expected, torch.from_numpy(shares).float()])) <= 1e-5
        assert len(found) == vector_width(joined.config)


def test_the_weights_of_a_mix_have_the_gradients_of_autograd(pretrained: Path) -> None:
    model, ids = built(pretrained, layers="mix", pooling="mean+termini"), proteins(masked=False)[4]
    weight = model.layer_mix.weight.detach().clone().requires_grad_()
    layers = reads(states(pretrained, ids), ids, "mean+termini")
    head = model.mean_termini_mix_classifier
    vector = (weight.softmax(0)[:, None] * torch.stack(layers)).sum(0)
    F.cross_entropy(head(vector[None, None]), torch.tensor([1])).backward()
    expected, dense = weight.grad, head.dense.weight.grad
    assert expected is not None and dense is not None
    model.zero_grad()
    F.cross_entropy(model(input_ids=ids[None]).logits, torch.tensor([1])).backward()
    assert difference(model.layer_mix.weight.grad, expected) <= 1e-4
    assert difference(head.dense.weight.grad, dense) <= 1e-4


def test_composition_in_packs_is_that_of_each_protein() -> None:
    model = build("concat")
    ids = proteins(masked=False)
    _, pack = encoder_of(model).embed(ids[4][None])
    whole = composition("cls", pack, ids[4][None])
    assert whole.shape == (1, 1, 21)
    assert float(whole[0, 0, :20].sum()) == pytest.approx(1)
    assert float(whole[0, 0, 20]) == pytest.approx(float(np.log(len(ids[4]) - 2)))


@pytest.mark.parametrize("kind", ["lora", "none", "head"])
@pytest.mark.parametrize(
    "model",
    [
        {"layers": 1, "pooling": "cls"},
        {"layers": 1, "pooling": "mean+termini"},
        {"layers": "mix", "pooling": "mean+termini", "composition": True},
        {"layers": "concat", "head": "linear"},
    ],
)
def test_a_run_is_exported_and_predicts_the_same(
    toy: Callable[..., TrainConfig], tmp_path: Path, model: dict[str, Any], kind: str
) -> None:
    cfg = toy(model=model, adapter={"kind": kind}, loop={"max_steps": 2}, log={"baselines": False})
    trained = run.train(cfg, str).result
    export(cfg.output, tmp_path / "exported")
    said = []
    for folder in (cfg.output, tmp_path / "exported"):
        target = tmp_path / f"{len(said)}.csv"
        predict(str(folder), Path(str(cfg.data.test)), target, settings=["--data.max_residues=62"], log=str)
        said.append(np.loadtxt(target, delimiter=",", skiprows=1, usecols=2))
    np.testing.assert_allclose(said[0], said[1], atol=1e-6)
    layers = 1 if model["layers"] == 1 else 2
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert loaded.config.num_hidden_layers == layers
    assert (type(loaded) is EsmForSequenceClassification) == (model.get("pooling") == "cls")
    assert len(loaded.esm.encoder.layer) == layers
    assert trained["parameters"]["total"] >= sum(p.numel() for p in loaded.parameters())
    if kind == "lora" and model["layers"] == "mix":
        started = run.train(replace(cfg, output=f"{cfg.output}_again", adapter=replace(cfg.adapter, kind="none")), str)
        assert started.result["parameters"]["trainable"] > trained["parameters"]["trainable"]


def test_a_model_that_is_cut_off_takes_no_head_of_the_whole_one(pretrained: Path) -> None:
    whole, cut = built(pretrained, pooling="cls"), built(pretrained, layers=3, pooling="cls")
    assert not torch.equal(whole.classifier.dense.weight, cut.classifier.dense.weight)


def test_plans_know_the_layers() -> None:
    assert shape_of(ModelConfig(name="mini", layers=2)).layers == 2  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="model.layers=9: mini has 6 layers; use 1 to 6, or all"):
        shape_of(ModelConfig(name="mini", layers=9))
    task, shape = task_class("sequence_classification"), SHAPES["mini"]
    for model in (ModelConfig(layers="mix"), ModelConfig(layers="concat", head="linear", composition=True)):
        cfg = TrainConfig(model=replace(model, name="mini", pooling="mean+termini"), adapter=AdapterConfig(kind="head"))
        made = build_model(cfg, create_task(TaskConfig(), LABELS), create_backend(cfg)).model
        sizes = sorted(p.numel() for p in made.parameters() if p.requires_grad)
        assert sorted(task.head_sizes(cfg.model, shape, 3)) == sizes


@pytest.mark.parametrize(
    ("task", "model", "adapter", "message"),
    [
        ("sequence_classification", {"layers": "auto"}, {}, "model.layers=auto is chosen by a probe"),
        ("sequence_classification", {"layers": 0}, {}, "model.layers=0 is outside 1 to 1000"),
        ("sequence_classification", {"layers": "mix"}, {"kind": "probe"}, "use concat, which can weigh each layer"),
        ("sequence_classification", {"layers": "mix", "pooling": "attention"}, {}, "use mean, mean.termini or cls"),
        ("sequence_classification", {"pooling": "attention"}, {"kind": "probe"}, "use mean, mean.termini or cls"),
        ("sequence_classification", {"head": "tanh"}, {"kind": "probe"}, "only a linear head is fitted at once"),
        ("residue_classification", {"layers": "mix"}, {}, "model.layers=mix is for tasks with one vector per protein"),
        ("residue_classification", {"pooling": "mean+termini"}, {}, "model.pooling=mean.termini is for tasks with one"),
        ("masked_lm", {}, {"kind": "probe"}, "its head is the language model's own"),
        ("masked_lm", {"composition": True}, {}, "model.composition=True is for tasks with one vector"),
    ],
)
def test_what_cannot_be_read_is_refused(
    task: str, model: dict[str, Any], adapter: dict[str, Any], message: str
) -> None:
    cfg = TrainConfig(task=TaskConfig(name=task), model=ModelConfig(**model), adapter=AdapterConfig(**adapter))
    with pytest.raises(ConfigError, match=message):
        run.check(replace(cfg, data=DataConfig(train="none.csv")))
