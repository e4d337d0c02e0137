"""Converting pickles: the same tensors come out, nothing that a pickle asks for runs, nothing half-written stays."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import EsmForMaskedLM

from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.models.convert import convert
from esm_neuron.models.hf_folder import SafetensorsFolder
from esm_neuron.models.shapes import SHAPES, esm_config


def state_of() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(EsmForMaskedLM(esm_config(SHAPES["tiny"])).state_dict())


def write_pickles(folder: Path, shards: int, legacy: bool = False) -> dict[str, torch.Tensor]:
    """A folder such as the hub's: config, vocabulary, pickle shards and their index."""
    folder.mkdir()
    esm_config(SHAPES["tiny"]).to_json_file(folder / "config.json")
    (folder / "vocab.txt").write_text("<cls>\n")
    state = state_of()
    keys = list(state)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin" if shards > 1 else "pytorch_model.bin"
        mine = keys[number::shards]
        torch.save({k: state[k] for k in mine}, folder / file, _use_new_zipfile_serialization=not legacy)
        weight_map |= dict.fromkeys(mine, file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_tensor_comes_out_equal(tmp_path: Path, shards: int, legacy: bool) -> None:
    state = write_pickles(tmp_path / "old", shards, legacy)
    convert(tmp_path / "old", tmp_path / "new", max_shard_bytes=30_000)
    source = SafetensorsFolder(tmp_path / "new")
    assert source.keys() == set(state)
    assert all(torch.equal(source.read(key), tensor) for key, tensor in state.items())
    files = list((tmp_path / "new").glob("*.safetensors"))
    assert len(files) > 1
    assert (tmp_path / "new" / "vocab.txt").read_text() == "<cls>\n"
    assert not list((tmp_path / "new").glob("*.bin*"))
    loaded = EsmForMaskedLM.from_pretrained(tmp_path / "new").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_tied_and_sliced_tensors_are_written_in_full(tmp_path: Path) -> None:
    write_pickles(tmp_path / "old", 1)
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"a": whole, "b": whole, "c": whole[1:], "d": whole.T}, tmp_path / "old" / "pytorch_model.bin")
    convert(tmp_path / "old", tmp_path / "new")
    source = SafetensorsFolder(tmp_path / "new")
    expected = {"a": whole, "b": whole, "c": whole[1:], "d": whole.T}
    assert all(torch.equal(source.read(key), tensor) for key, tensor in expected.items())


def test_the_dtype_stays(tmp_path: Path) -> None:
    write_pickles(tmp_path / "old", 1)
    torch.save({"a": torch.ones(3, dtype=torch.float16)}, tmp_path / "old" / "pytorch_model.bin")
    convert(tmp_path / "old", tmp_path / "new")
    assert SafetensorsFolder(tmp_path / "new").read("a").dtype == torch.float16


class Malice:
    """Unpickled by a careless reader, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def is_one_line(caught: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    write_pickles(tmp_path / "old", 1)
    trace = tmp_path / "was-here"
    file = tmp_path / "old" / "pytorch_model.bin"
    torch.save({"a": torch.ones(1), "b": Malice(trace)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused: it asks for \w+\.mkdir") as caught:
        convert(tmp_path / "old", tmp_path / "new")
    assert is_one_line(caught)
    assert not trace.exists() and not (tmp_path / "new").exists()
    # the pickle was a live one
    torch.load(file, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip"])
def test_a_damaged_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    write_pickles(tmp_path / "old", 1)
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused") as caught:
        convert(tmp_path / "old", tmp_path / "new")
    assert is_one_line(caught) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"model": {"a": torch.ones(1)}}, {"step": 3}, {3: torch.ones(1)}])
def test_what_is_no_mapping_of_tensors_is_refused(tmp_path: Path, content: object) -> None:
    write_pickles(tmp_path / "old", 1)
    torch.save(content, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no mapping of names to dense tensors"):
        convert(tmp_path / "old", tmp_path / "new")


def test_a_fault_in_the_last_shard_leaves_nothing(tmp_path: Path) -> None:
    write_pickles(tmp_path / "old", 3)
    last = tmp_path / "old" / "pytorch_model-00003-of-00003.bin"
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="00003-of-00003"):
        convert(tmp_path / "old", tmp_path / "new")
    last.unlink()
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.bin is missing"):
        convert(tmp_path / "old", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_an_index_must_agree_with_its_shards(tmp_path: Path) -> None:
    write_pickles(tmp_path / "old", 2)
    path = tmp_path / "old" / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    key = next(iter(index["weight_map"]))
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"ghost": index["weight_map"][key]}}))
    with pytest.raises(CheckpointError, match="missing ghost, unlisted none"):
        convert(tmp_path / "old", tmp_path / "new")
    path.write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != key}}))
    with pytest.raises(CheckpointError, match=f"missing none, unlisted {key}"):
        convert(tmp_path / "old", tmp_path / "new")
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {key: "../old/pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(CheckpointError, match="a shard is a file beside it"):
        convert(tmp_path / "old", tmp_path / "new")


def test_refusals(tmp_path: Path) -> None:
    write_pickles(tmp_path / "old", 1)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "precious").write_text("kept")
    with pytest.raises(ConfigError, match="exists"):
        convert(tmp_path / "old", tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["precious"]
    with pytest.raises(ConfigError, match="is no folder"):
        convert(tmp_path / "nowhere", tmp_path / "other")
    convert(tmp_path / "old", tmp_path / "other")
    with pytest.raises(ConfigError, match="holds safetensors already"):
        convert(tmp_path / "other", tmp_path / "again")
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="neither pytorch_model.bin nor"):
        convert(tmp_path / "other", tmp_path / "again")
    (tmp_path / "old" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        convert(tmp_path / "old", tmp_path / "again")
