"""Weights: what is read is what was written, by slice as well; what does not fit is refused in one line."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import weights as small_weights
from helpers.weights import QUERY, WORDS, nothing_new, on_meta, one_line_of, state_of, tiny, write_safetensors_folder
from safetensors.torch import load_file, save_file
from transformers import EsmForMaskedLM, EsmModel

from esm_neuron.config import ModelConfig
from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.models.hf_folder import SafetensorsFolder
from esm_neuron.models.shapes import SHAPES, EsmShape, esm_config
from esm_neuron.models.weights import Draw, RandomWeights, load_into, open_weights, read_config

folder = small_weights.folder


# --- shapes


@pytest.mark.parametrize("name", ["tiny", "esm2_t6_8M", "esm2_t33_650M"])
def test_the_parameter_table_is_that_of_transformers(name: str) -> None:
    model = on_meta(EsmForMaskedLM, esm_config(SHAPES[name]))
    expected = {k: tuple(p.shape) for k, p in model.named_parameters()}
    assert SHAPES[name].parameters() == expected
    assert SHAPES[name].parameter_count() == sum(math.prod(shape) for shape in expected.values())


def test_shapes_are_the_published_ones() -> None:
    nominal = {"8M": 8e6, "35M": 35e6, "150M": 150e6, "650M": 650e6, "3B": 3e9, "15B": 15e9}
    counts = {name.rpartition("_")[2]: shape.parameter_count() for name, shape in SHAPES.items() if shape.hub_id}
    assert counts == pytest.approx(nominal, rel=0.07)
    assert SHAPES["esm2_t36_3B"].hub_id == "facebook/esm2_t36_3B_UR50D"
    assert EsmShape.of(tiny()) == SHAPES["tiny"]


# --- random weights


def test_a_draw_does_not_depend_on_order_head_or_slice() -> None:
    source = RandomWeights(tiny(), 7)
    backwards = {key: source.read(key) for key in sorted(source.keys(), reverse=True)}
    again = RandomWeights(tiny(), 7)
    for key in again.keys():  # noqa: SIM118
        assert torch.equal(again.read(key), backwards[key])
    index = (slice(8, 16), slice(0, 32))
    assert torch.equal(source.read(QUERY, index), backwards[QUERY][8:16])

    bare = on_meta(partial(EsmModel, add_pooling_layer=False), tiny())
    load_into(bare, source, source.draw, nothing_new)
    assert torch.equal(bare.get_parameter(QUERY.removeprefix("esm.")), backwards[QUERY])


def test_draws_follow_transformers_initialisation() -> None:
    source = RandomWeights(esm_config(SHAPES["esm2_t6_8M"]), 0)
    query, words = source.read(QUERY), source.read(WORDS)
    assert query.dtype == torch.float32
    assert query.std().item() == pytest.approx(0.02, rel=0.02)
    assert query.mean().abs().item() < 5 * 0.02 / math.sqrt(query.numel())
    assert not words[1].any() and words[[0, *range(2, 33)]].abs().amin(dim=1).gt(0).all()
    assert not source.read(QUERY.replace("weight", "bias")).any()
    for norm in ("esm.encoder.layer.0.LayerNorm", "esm.encoder.emb_layer_norm_after", "lm_head.layer_norm"):
        assert source.read(f"{norm}.weight").eq(1).all() and not source.read(f"{norm}.bias").any()


def test_seeds_and_names_give_different_draws() -> None:
    draw = Draw(0, 0.02)
    assert not torch.equal(draw("a.weight", (4, 4)), draw("b.weight", (4, 4)))
    assert not torch.equal(draw("a.weight", (4, 4)), Draw(1, 0.02)("a.weight", (4, 4)))
    assert RandomWeights(tiny(), 0).reference != RandomWeights(tiny(), 1).reference
    assert RandomWeights(tiny(), 0).reference == RandomWeights(tiny(), 0).reference


# --- folders


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_a_folder_reads_back_whole_and_by_slice(tmp_path: Path, max_shard_bytes: int) -> None:
    state = state_of()
    write_safetensors_folder(state.items(), tiny(), tmp_path / "base", max_shard_bytes)
    files = sorted(p.name for p in (tmp_path / "base").glob("*.safetensors"))
    sharded = max_shard_bytes < 10**9
    assert (files == ["model.safetensors"]) != sharded
    source = SafetensorsFolder(tmp_path / "base")
    assert source.keys() == set(state)
    for key, tensor in state.items():
        assert source.shape(key) == tuple(tensor.shape)
        assert torch.equal(source.read(key), tensor)
    for index in [(slice(8, 16), slice(0, 32)), (slice(0, 32), slice(8, 16)), (slice(4, 4), slice(0, 32))]:
        piece = source.read(QUERY, index)
        assert torch.equal(piece, state[QUERY][index])
    # and transformers reads the same folder
    loaded = EsmForMaskedLM.from_pretrained(tmp_path / "base")
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_what_is_loaded_has_memory_of_its_own(folder: Path) -> None:
    with torch.device("meta"):
        model = EsmForMaskedLM(tiny())
    load_into(model, SafetensorsFolder(folder), Draw(0, 0.02), lambda name: False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for file in folder.glob("*.safetensors"):  # in place: where it is mapped, it changes too
        with file.open("r+b") as opened:
            opened.seek(-4000, os.SEEK_END)
            opened.write(bytes(4000))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, "a slice must not keep the whole tensor"


def test_the_content_sum_does_not_depend_on_place_and_changes_with_a_weight(folder: Path, tmp_path: Path) -> None:
    state = state_of()
    write_safetensors_folder(state.items(), tiny(), tmp_path / "copy")
    state[QUERY][0, 0] += 1
    write_safetensors_folder(state.items(), tiny(), tmp_path / "other")
    sums = [SafetensorsFolder(tmp_path / name).reference.sha256 for name in ("base", "copy", "other")]
    assert sums[0] == sums[1] != sums[2]
    reference = SafetensorsFolder(folder, "facebook/x", "abc").reference
    assert (reference.name, reference.revision) == ("facebook/x", "abc")


def test_writing_is_all_or_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        write_safetensors_folder(state_of().items(), tiny(), folder)

    def breaks_off():
        yield "a", torch.zeros(100)
        yield "b", torch.zeros(100)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors_folder(breaks_off(), tiny(), tmp_path / "new", max_shard_bytes=400)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def sharded(tmp_path: Path) -> Path:
    write_safetensors_folder(state_of().items(), tiny(), tmp_path / "sharded", max_shard_bytes=20_000)
    return tmp_path / "sharded"


def test_a_missing_shard_names_the_file(tmp_path: Path) -> None:
    base = sharded(tmp_path)
    victim = sorted(base.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"{victim.name} is missing") as caught:
        SafetensorsFolder(base)
    one_line_of(caught)


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged") as caught:
        SafetensorsFolder(folder)
    one_line_of(caught)


@pytest.mark.parametrize(
    "evil", ["../outside.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", 3, ".."]
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, evil: object) -> None:
    base = sharded(tmp_path)
    save_file({QUERY: torch.zeros(2, 2)}, tmp_path / "outside.safetensors")
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][QUERY] = evil
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="a shard is a file beside it") as caught:
        SafetensorsFolder(base)
    one_line_of(caught)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    base = sharded(tmp_path)
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][QUERY]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"unlisted {QUERY}"):
        SafetensorsFolder(base)
    for text in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json (is no index|lists no)") as caught:
            SafetensorsFolder(base)
        one_line_of(caught)


def test_files_are_plain_safetensors(folder: Path) -> None:
    assert set(load_file(folder / "model.safetensors")) == set(state_of())


# --- open_weights


def test_a_bare_shape_needs_random_weights() -> None:
    with pytest.raises(ConfigError, match="facebook/esm2_t33_650M_UR50D or model.init=random"):
        open_weights(ModelConfig(name="esm2_t33_650M"), 0)
    with pytest.raises(ConfigError, match="use model.init=random"):
        open_weights(ModelConfig(name="tiny"), 0)
    config, source = open_weights(ModelConfig(name="tiny", init="random"), 0)
    assert config.to_dict() == tiny().to_dict()
    assert source.shape(QUERY) == (32, 32)


def test_a_folder_gives_its_config_and_weights(folder: Path) -> None:
    config, source = open_weights(ModelConfig(name=str(folder)), 0)
    assert EsmShape.of(config) == SHAPES["tiny"]
    assert torch.equal(source.read(QUERY), state_of()[QUERY])
    assert source.reference.name == str(folder)
    (folder / "model.safetensors").unlink()
    _, drawn = open_weights(ModelConfig(name=str(folder), init="random"), 3)
    assert torch.equal(drawn.read(QUERY), RandomWeights(tiny(), 3).read(QUERY))


def test_a_classifier_of_this_package_is_a_base_too(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text()) | {"model_type": "esm_neuron", "pooling": "mean"}
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_config(folder).model_type == "esm"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "bert"),
        ("model_type", None),
        ("position_embedding_type", "absolute"),
        ("vocab_size", 34),
        ("is_folding_model", True),
        ("emb_layer_norm_before", True),
        ("rope_theta", 500.0),
    ],
)
def test_what_is_no_esm2_is_refused(folder: Path, key: str, value: object) -> None:
    raw = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=f"not of an ESM-2: {key} is") as caught:
        open_weights(ModelConfig(name=str(folder)), 0)
    one_line_of(caught)


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("num_hidden_layers", 10**12, "must be a whole number, 1 to 1000; use an ESM-2 model"),
        ("num_hidden_layers", 2.0, "must be a whole number"),
        ("num_attention_heads", True, "must be a whole number"),
        ("num_attention_heads", 5, "hidden_size 32 is no even multiple of 5 attention heads"),
        ("hidden_size", "32", "must be a whole number"),
        ("max_position_embeddings", 10**15, "1 to 1048576"),
        ("layer_norm_eps", float("nan"), "layer_norm_eps is nan, must be 0.0 to 1.0"),
        ("hidden_act", "evil", "not of an ESM-2: hidden_act is 'evil'"),
        ("mask_token_id", 5, "not of an ESM-2: mask_token_id is 5"),
        ("is_decoder", True, "not of an ESM-2: is_decoder is True"),
        ("token_dropout", "no", "token_dropout is 'no', must be one of"),
        ("problem_type", ["x"], "problem_type is .'x'., must be one of"),
        ("target_sd", float("nan"), "target_sd is nan, must be"),
        ("target_mean", "0", "target_mean is '0', must be"),
    ],
)
def test_a_config_cannot_ask_for_the_moon(folder: Path, key: str, value: object, limit: str) -> None:
    raw = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=f"{folder}/config.json.*{limit}") as caught:
        open_weights(ModelConfig(name=str(folder), init="random"), 0)
    one_line_of(caught)


def test_what_transformers_itself_leaves_out_of_a_config_is_an_esm2s(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    for key in ("hidden_act", "rope_theta"):
        raw.pop(key, None)
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_config(folder).hidden_size == 32


FOREIGN = {
    "auto_map": {"AutoConfig": "evil.Evil"},
    "_attn_implementation": "some/repo@main",
    "_attn_implementation_internal": "some/repo@main",
    "attn_implementation": "some/repo@main",
    "_experts_implementation": "some/repo@main",
    "quantization_config": {"quant_method": "evil"},
    "torch_dtype": "float16",
    "return_dict": False,
    "pruned_heads": {"0": [1]},
    "chunk_size_feed_forward": 7,
    "output_hidden_states": True,
    "num_labels": 10**9,
    "mask_token_id": None,
    "anything": {"else": [1]},
}
"""Fields that an ESM-2 does not need; transformers acts on most of them, and of some fetches and runs code."""


@pytest.mark.parametrize("key", FOREIGN)
def test_only_fields_of_an_esm2_are_taken_from_a_config(folder: Path, key: str) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    raw = json.loads((folder / "config.json").read_text())
    plain = read_config(folder)
    (folder / "config.json").write_text(json.dumps(raw | {key: FOREIGN[key]}))
    found = read_config(folder)
    assert found.to_dict() == plain.to_dict()
    assert found._attn_implementation == plain._attn_implementation is None


@pytest.mark.parametrize("content", [None, "", "{", "[]", "[" * 100_000])
def test_an_unreadable_config_is_named(folder: Path, content: str | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read") as caught:
        open_weights(ModelConfig(name=str(folder)), 0)
    one_line_of(caught)


@pytest.mark.parametrize(("key", "value"), [("id2label", {"a": 1}), ("id2label", 3)])
def test_a_config_of_wrong_types_is_named(folder: Path, key: str, value: object) -> None:
    """Of fields that are not an ESM-2's own, whose types transformers checks: version 5 in errors of its own kind."""
    raw = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"config\.json cannot be read") as caught:
        read_config(folder)
    one_line_of(caught)


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_can_be_pinned_by_their_sum(tmp_path: Path, shards: int) -> None:
    """The sums are those of sha256sum, so that a hub page or a shell can tell them."""
    write_safetensors_folder(state_of().items(), tiny(), tmp_path / "base", 10**9 if shards == 1 else 40_000)
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    sums = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    assert (len(files) > 1) == (shards > 1)
    pinned = sums[0] if shards == 1 else hashlib.sha256("".join(f"{each}\n" for each in sums).encode()).hexdigest()
    cfg = ModelConfig(name=str(tmp_path / "base"), sha256=pinned.upper())
    open_weights(cfg, 0)
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"have SHA-256 [0-9a-f]{{64}}, model.sha256 is {pinned.upper()}; "
    ) as caught:
        open_weights(cfg, 0)
    one_line_of(caught)
    with pytest.raises(ConfigError, match=r"leave it out with model.init=random"):
        open_weights(replace(cfg, init="random"), 0)


def test_a_pinned_commit_must_be_the_one_that_came(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    pinned = ModelConfig(name="facebook/esm2_t6_8M_UR50D", revision=commit)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: str(folder))
    with pytest.raises(ConfigError, match=f"at revision {commit}: the hub gave commit base; check model.revision"):
        open_weights(pinned, 0)
    folder.rename(folder.with_name(commit))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: str(folder.with_name(commit)))
    assert open_weights(pinned, 0)[1].reference.revision == commit


def test_pickle_only_folders_point_at_convert(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"esm-neuron convert {folder} NEW_FOLDER"):
        open_weights(ModelConfig(name=str(folder)), 0)


@pytest.mark.parametrize(
    ("name", "hint"), [("esm2_t33_650m", "did you mean esm2_t33_650M"), ("/no/such/folder", "the shapes are tiny")]
)
def test_an_unknown_name_gets_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        open_weights(ModelConfig(name=name, init="random"), 0)
    with pytest.raises(ConfigError, match="belongs to a hub id"):
        open_weights(ModelConfig(name="tiny", init="random", revision="main"), 0)


def test_the_hub_is_asked_for_config_and_safetensors_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def snapshot(name: str, **how: object) -> str:
        asked.append({"name": name, **how})
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    _, source = open_weights(ModelConfig(name="facebook/esm2_t6_8M_UR50D", revision="abc"), 0)
    assert source.reference.name == "facebook/esm2_t6_8M_UR50D" and source.reference.revision == folder.name
    open_weights(ModelConfig(name="facebook/esm2_t6_8M_UR50D", init="random"), 0)
    wanted = ["config.json", "model*.safetensors", "model*.safetensors.index.json"]
    assert asked[0] == {"name": "facebook/esm2_t6_8M_UR50D", "revision": "abc", "allow_patterns": wanted}
    assert asked[1]["allow_patterns"] == ["config.json"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="hf download facebook/esm2_t36_3B_UR50D .* esm-neuron convert"):
        open_weights(ModelConfig(name="facebook/esm2_t36_3B_UR50D"), 0)


def test_an_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="the hub did not give it .* hf download nobody/nothing") as caught:
        open_weights(ModelConfig(name="nobody/nothing", revision="v1"), 0)
    assert "at revision v1" in one_line_of(caught)
