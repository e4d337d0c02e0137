"""What the tests of weights and of loading share: names, tiny models with no constant left in them, their folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from transformers import EsmConfig, EsmForMaskedLM

from esm_neuron.errors import EsmNeuronError
from esm_neuron.models.hf_folder import SHARD_BYTES, fresh_folder, write_shards
from esm_neuron.models.shapes import SHAPES, esm_config

QUERY = "esm.encoder.layer.0.attention.self.query.weight"
WORDS = "esm.embeddings.word_embeddings.weight"
DECODER = "lm_head.decoder.weight"


def write_safetensors_folder(
    state: Iterable[tuple[str, torch.Tensor]], config: EsmConfig, folder: Path, max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a Hugging Face model folder: config.json and the weights, in shards of at most `max_shard_bytes`."""
    with fresh_folder(folder) as aside:
        write_shards(state, aside, max_shard_bytes)
        config.to_json_file(aside / "config.json")


def nothing_new(_: str) -> bool:
    """No parameter may be drawn."""
    return False


def tiny() -> EsmConfig:
    """The configuration of the `tiny` shape."""
    return esm_config(SHAPES["tiny"])


def on_meta(kind: Callable[[EsmConfig], torch.nn.Module], config: EsmConfig) -> torch.nn.Module:
    """A model without memory."""
    with torch.device("meta"):
        return kind(config)


def state_of(kind: Callable[[EsmConfig], torch.nn.Module] = EsmForMaskedLM) -> dict[str, torch.Tensor]:
    """A model's state with no value left at an initial constant, so that a tensor in the wrong place shows."""
    model, generator = kind(tiny()), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return dict(model.state_dict())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights of the `tiny` shape in Hugging Face's layout."""
    write_safetensors_folder(state_of().items(), tiny(), tmp_path / "base")
    return tmp_path / "base"


def one_line_of(caught: pytest.ExceptionInfo[EsmNeuronError]) -> str:
    """The message of an error, which must be one line."""
    message = str(caught.value)
    assert "\n" not in message
    return message
