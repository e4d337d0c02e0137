"""Weights into models: every name and shape agrees, or one line says what does not; ranks read their slices."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import weights as small_weights
from helpers.weights import (
    DECODER,
    QUERY,
    WORDS,
    nothing_new,
    on_meta,
    one_line_of,
    state_of,
    tiny,
    write_safetensors_folder,
)
from transformers import EsmConfig, EsmForMaskedLM, EsmForSequenceClassification, EsmModel

from esm_neuron.errors import CheckpointError
from esm_neuron.models.hf_folder import SafetensorsFolder
from esm_neuron.models.tensor_parallel import join, shard_of
from esm_neuron.models.weights import Draw, RandomWeights, load_into

folder = small_weights.folder


def classifier(config: EsmConfig) -> EsmForSequenceClassification:
    config.num_labels = 3
    return EsmForSequenceClassification(config)


def in_head(name: str) -> bool:
    return name.startswith("classifier.")


def test_a_masked_lm_is_filled_and_stays_tied(folder: Path) -> None:
    model, state = on_meta(EsmForMaskedLM, tiny()), state_of()
    report = load_into(model, SafetensorsFolder(folder), Draw(0, 0.02), nothing_new)
    assert dict.fromkeys(state, True) == {k: torch.equal(v, state[k]) for k, v in model.state_dict().items()}
    assert model.lm_head.decoder.weight is model.esm.embeddings.word_embeddings.weight
    assert set(report.loaded) == {n for n, _ in model.named_parameters()}
    assert report.drawn == ()
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    # the computed buffers are those of a model that transformers builds off meta
    reference = EsmForMaskedLM(tiny())
    reference.load_state_dict(state)
    tokens = torch.tensor([[0, 5, 6, 32, 7, 2]])
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, reference.eval()(tokens).logits)


def test_a_real_model_is_filled_in_place(folder: Path) -> None:
    model = EsmForMaskedLM(tiny())
    before = model.get_parameter(QUERY)
    load_into(model, SafetensorsFolder(folder), Draw(0, 0.02), nothing_new)
    assert model.get_parameter(QUERY) is before
    assert torch.equal(before, state_of()[QUERY])


@pytest.mark.parametrize("drop_decoder", [True, False])
def test_the_decoder_may_be_left_out_but_not_differ(tmp_path: Path, drop_decoder: bool) -> None:
    state = state_of()
    state[DECODER] = state[DECODER] + 1
    if drop_decoder:
        del state[DECODER]
    write_safetensors_folder(state.items(), tiny(), tmp_path / "base")
    model = on_meta(EsmForMaskedLM, tiny())
    if drop_decoder:
        load_into(model, SafetensorsFolder(tmp_path / "base"), Draw(0, 0.02), nothing_new)
        assert torch.equal(model.lm_head.decoder.weight, state[WORDS])
    else:
        with pytest.raises(CheckpointError, match="are one tensor in the model, but differ"):
            load_into(model, SafetensorsFolder(tmp_path / "base"), Draw(0, 0.02), nothing_new)


@pytest.mark.parametrize("prefixed", [True, False])
def test_both_prefixes_load_and_a_new_head_is_drawn(tmp_path: Path, prefixed: bool) -> None:
    state = state_of(partial(EsmModel, add_pooling_layer=True))
    stored = {f"esm.{key}" if prefixed else key: value for key, value in state.items()}
    del stored[next(key for key in stored if "contact_head.regression.weight" in key)]
    stored["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, 32)
    write_safetensors_folder(stored.items(), tiny(), tmp_path / "base")
    model, draw = on_meta(classifier, tiny()), Draw(5, 0.02)
    report = load_into(model, SafetensorsFolder(tmp_path / "base"), draw, in_head)
    loaded = {f"esm.{key}" for key in state if not key.startswith("pooler.") and "inv_freq" not in key}
    assert set(report.loaded) == loaded - {"esm.contact_head.regression.weight"}
    for name in report.loaded:
        assert torch.equal(model.get_parameter(name), state[name.removeprefix("esm.")])
    heads = {f"classifier.{part}.{leaf}" for part in ("dense", "out_proj") for leaf in ("weight", "bias")}
    assert set(report.drawn) == heads | {"esm.contact_head.regression.weight"}
    assert torch.equal(model.get_parameter("classifier.dense.weight"), draw("classifier.dense.weight", (32, 32)))
    ignored = {key.removeprefix("esm.") for key in report.ignored if not key.endswith("rotary_embeddings.inv_freq")}
    assert {key.split(".")[0] for key in ignored} == {"pooler", "embeddings"}


@pytest.mark.parametrize("bare", [False, True])
def test_the_names_that_transformers_5_saves_are_known(tmp_path: Path, bare: bool) -> None:
    """It gives the blocks' norms TensorFlow's names, and has the frequencies once, at the top."""
    state = state_of(partial(EsmModel, add_pooling_layer=False)) if bare else state_of()
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    stored = {re.sub("LayerNorm.(weight|bias)$", lambda name: old[name[0]], key): value for key, value in state.items()}
    assert sum(key.endswith(("gamma", "beta")) for key in stored) == 2 * 2 * 2
    stored = {key: value for key, value in stored.items() if "inv_freq" not in key}
    stored[f"{'' if bare else 'esm.'}rotary_embeddings.inv_freq"] = torch.zeros(4)
    write_safetensors_folder(stored.items(), tiny(), tmp_path / "base")
    model = on_meta(partial(EsmModel, add_pooling_layer=False) if bare else EsmForMaskedLM, tiny())
    assert load_into(model, SafetensorsFolder(tmp_path / "base"), Draw(0, 0.02), nothing_new).drawn == ()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name]), name


def test_an_encoder_takes_a_masked_lm_checkpoint(folder: Path) -> None:
    model = on_meta(partial(EsmModel, add_pooling_layer=False), tiny())
    report = load_into(model, SafetensorsFolder(folder), Draw(0, 0.02), nothing_new)
    assert torch.equal(model.get_parameter(QUERY.removeprefix("esm.")), state_of()[QUERY])
    assert report.drawn == () and {k.split(".")[0] for k in report.ignored if "inv_freq" not in k} == {"lm_head"}


def damaged(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = state_of() | {k: v for k, v in changes.items() if v is not None}
    return {k: v for k, v in state.items() if changes.get(k, v) is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({QUERY: None}, f"lacks 1 of the model's parameters: {QUERY};"),
        ({"lm_head.bias": None}, "lacks 1 .* lm_head.bias"),
        ({QUERY: torch.zeros(32, 16)}, rf"{QUERY} is \[32, 16\].* the model wants \[32, 32\]"),
        ({QUERY: torch.zeros(32, 32, dtype=torch.int8)}, f"{QUERY} is torch.int8, no float"),
        ({"esm.encoder.layer.2.output.dense.bias": torch.zeros(32)}, "has 1 tensors .* esm.encoder.layer.2.output"),
        ({"trunk.x": torch.zeros(1)}, "has 1 tensors that the model does not: trunk.x"),
        ({"lm_head.extra": torch.zeros(1)}, "has 1 tensors .* lm_head.extra"),
        ({QUERY.removeprefix("esm."): torch.zeros(32, 32)}, "has both"),
    ],
)
def test_a_checkpoint_that_does_not_match_is_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    write_safetensors_folder(damaged(**changes).items(), tiny(), tmp_path / "base")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_into(on_meta(EsmForMaskedLM, tiny()), SafetensorsFolder(tmp_path / "base"), Draw(0, 0.02), nothing_new)
    one_line_of(caught)


def test_many_missing_keys_are_counted(tmp_path: Path) -> None:
    config = tiny()
    config.num_hidden_layers = 3
    write_safetensors_folder(state_of().items(), tiny(), tmp_path / "base")
    with pytest.raises(CheckpointError, match="lacks 16 of .* and 13 more"):
        load_into(on_meta(EsmForMaskedLM, config), SafetensorsFolder(tmp_path / "base"), Draw(0, 0.02), nothing_new)


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    state = EsmForSequenceClassification(tiny()).state_dict()  # 2 classes
    write_safetensors_folder(state.items(), tiny(), tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"classifier.out_proj.weight is \[2, 32\].* wants \[3, 32\]"):
        load_into(on_meta(classifier, tiny()), SafetensorsFolder(tmp_path / "base"), Draw(0, 0.02), in_head)


def test_the_dtype_is_the_models(folder: Path) -> None:
    model = on_meta(EsmForMaskedLM, tiny()).to(torch.bfloat16)
    load_into(model, SafetensorsFolder(folder), Draw(0, 0.02), nothing_new)
    assert torch.equal(model.get_parameter(QUERY), state_of()[QUERY].bfloat16())


class Recorder:
    """A source that notes how many numbers each read brought."""

    def __init__(self, source: SafetensorsFolder) -> None:
        self.source, self.name, self.reference, self.read_sizes = source, source.name, source.reference, {}
        self.keys, self.shape = source.keys, source.shape

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        tensor = self.source.read(key, index)
        self.read_sizes[key] = tensor.numel()
        return tensor


@pytest.mark.parametrize("tp", [2, 4, 8])  # 8 pads the 4 heads with 4 zero ones
def test_ranks_read_their_slices_and_the_slices_make_the_whole(folder: Path, tp: int) -> None:
    state, heads = state_of(), tiny().num_attention_heads
    parts: dict[str, list[torch.Tensor]] = {}
    for rank in range(tp):
        model, source = on_meta(EsmForMaskedLM, tiny()), Recorder(SafetensorsFolder(folder))
        for name, parameter in list(model.named_parameters()):
            local = shard_of(name, parameter.shape, heads, tp, rank).shape
            if local != tuple(parameter.shape):
                owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                shrunk = torch.nn.Parameter(torch.empty(local, device="meta"))
                shrunk.tensor_model_parallel = True
                setattr(owner, leaf, shrunk)
        load_into(model, source, Draw(0, 0.02), nothing_new, partial(shard_of, heads=heads, tp=tp, tp_rank=rank))
        for name, parameter in model.named_parameters():
            parts.setdefault(name, []).append(parameter.detach())
        assert source.read_sizes["esm.encoder.layer.1.intermediate.dense.weight"] == 128 * 32 // tp
        assert model.get_parameter(QUERY).tensor_model_parallel, "the marks of a parallel layer must stay"
    for name, pieces in parts.items():
        assert torch.equal(join(name, pieces, heads), state[name])
    query = torch.cat(parts[QUERY])
    assert query.shape[0] == max(32, 8 * tp) and not query[32:].any()


def test_every_source_gives_equal_random_shards() -> None:
    source = RandomWeights(tiny(), 0)
    whole = source.read(QUERY)
    halves = [shard_of(QUERY, (32, 32), 4, 2, rank).read(partial(source.read, QUERY)) for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole)
