"""Convert pickled checkpoints (`pytorch_model*.bin`) to sharded safetensors; code in a pickle is never run."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.models.hf_folder import (
    SHARD_BYTES,
    SafetensorsFolder,
    check_keys,
    fresh_folder,
    one_line,
    read_index,
    write_shards,
)
from esm_neuron.models.weights import read_config

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
COMPANIONS = ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
"""What a tokenizer needs; copied where it is there."""


def convert(source: Path, target: Path, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write the weights of the Hugging Face folder `source` to a new folder `target` as safetensors.

    Every key stays, in its dtype; a tied tensor is written under each of its names. At most one shard is held in memory
    (the source is mapped), and `target` appears complete or not at all. A tensor larger than `max_shard_bytes` gets a
    shard of its own. Raise ConfigError where `source` is no ESM-2 in pickles or `target` exists, CheckpointError where
    a shard is missing, damaged, disagrees with the index, or holds anything but tensors.
    """
    if not source.is_dir():
        raise ConfigError(f"{source} is no folder; give the Hugging Face folder with {PICKLE} or {PICKLE_INDEX}")
    read_config(source)
    files = _pickles(source)
    with fresh_folder(target) as aside:
        write_shards(_tensors(source, files), aside, max_shard_bytes)
        for name in ("config.json", *(n for n in COMPANIONS if (source / n).is_file())):
            shutil.copyfile(source / name, aside / name)
        listed = {key for keys in files.values() if keys is not None for key in keys}
        if listed:
            check_keys(source / PICKLE_INDEX, set(SafetensorsFolder(aside).keys()), listed)


def _pickles(source: Path) -> dict[str, set[str] | None]:
    """Return each file with the keys that the index says it has; None where there is no index."""
    if (source / PICKLE_INDEX).is_file():
        return {file: set(keys) for file, keys in read_index(source / PICKLE_INDEX, ".bin").items()}
    if (source / PICKLE).is_file():
        return {PICKLE: None}
    if any(source.glob("*.safetensors")):
        raise ConfigError(f"{source} holds safetensors already; use it as it is: model.name={source}")
    raise ConfigError(f"{source} holds neither {PICKLE} nor {PICKLE_INDEX}; give the folder that holds the weights")


def _tensors(source: Path, files: dict[str, set[str] | None]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of every file, one file mapped at a time; all files are known to be there before the first."""
    absent = [file for file in files if not (source / file).is_file()]
    if absent:
        raise CheckpointError(f"{source / absent[0]} is missing, as its index lists it; fetch the checkpoint again")
    for file, listed in files.items():
        state = read_pickle(source / file)
        if listed is not None:
            check_keys(source / file, set(state), listed)
        yield from state.items()


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a torch file, mapped where its format allows. Code in the file is refused, never run."""
    mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another format, which cannot be mapped
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle raises almost anything, and the cure is one
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}, which may run code" if asked else one_line(error)
        raise CheckpointError(f"{path} is refused: {reason}; get the weights from a source you trust") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and _plain(v) for k, v in state.items()):
        raise CheckpointError(f"{path} is no mapping of names to dense tensors; give the weights of a model alone")
    return state


def _plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
