"""Folders of safetensors in the Hugging Face layout: read by slice, written whole or not at all."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.files import new_folder, read_json, save_tensors, sha256, write_json
from esm_neuron.models.tensor_parallel import Index

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Largest shard that transformers writes by default."""


_BARE = re.compile(r"(embeddings|encoder|pooler|contact_head)\.")
_OLD_NORM = re.compile(r"\.LayerNorm\.(gamma|beta)$")


def canonical(key: str) -> str:
    """Return the key as EsmForMaskedLM has it: a bare EsmModel's `encoder...` becomes `esm.encoder...`.

    What transformers 5 saves has TensorFlow's names for the blocks' norms, `gamma` and `beta`.
    """
    key = _OLD_NORM.sub(lambda old: ".LayerNorm." + {"gamma": "weight", "beta": "bias"}[old[1]], key)
    return f"esm.{key}" if _BARE.match(key) else key


@dataclass(frozen=True)
class BaseReference:
    """Which weights a model started from, so that an adapter can name its base."""

    name: str
    """Hub id, folder, or a description of random weights."""
    revision: str | None
    """Commit of the hub repository; None elsewhere."""
    sha256: str
    """Of the content: over the sorted sums of the weight files, or over what decides random weights."""


class SafetensorsFolder:
    """The weights of a Hugging Face folder, mapped and not loaded: a slice costs only its own bytes."""

    def __init__(self, path: Path, name: str | None = None, revision: str | None = None, file: str = WEIGHTS) -> None:
        """Open the headers of the weight files; an adapter will call these weights `name` (None: the folder's)."""
        self.path, self.name, self.revision = path, name or str(path), revision
        index = path / INDEX
        if not (path / file).is_file() and index.is_file():
            keys_of = read_index(index, ".safetensors")
            self._files = {shard: open_safetensors(path / shard) for shard in keys_of}
            for shard, keys in keys_of.items():
                check_keys(path / shard, set(self._files[shard].keys()), keys)
        elif (path / file).is_file():
            self._files = {file: open_safetensors(path / file)}
        else:
            raise ConfigError(_no_weights(path))
        self._file_of = {key: name for name, opened in self._files.items() for key in list(opened.keys())}

    def keys(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._files[self._file_of[key]].get_slice(key).get_shape())

    def read(self, key: str, index: Index | None = None) -> torch.Tensor:
        """Return the tensor, or its part `index`, in the dtype of the file, as a view of the mapped file."""
        opened = self._files[self._file_of[key]]
        tensor: torch.Tensor = opened.get_tensor(key) if index is None else opened.get_slice(key)[index]
        return tensor

    @cached_property
    def _sums(self) -> list[str]:
        """Return the SHA-256 of each weight file, sorted; the first call reads every byte."""
        return sorted(sha256(self.path / file) for file in self._files)

    @property
    def reference(self) -> BaseReference:
        sums = "\n".join(self._sums)
        return BaseReference(self.name, self.revision, hashlib.sha256(sums.encode()).hexdigest())

    def check_sum(self, wanted: str) -> None:
        """Raise CheckpointError unless the weights have the SHA-256 `wanted`, which is `model.sha256`."""
        lines = "".join(f"{each}\n" for each in self._sums)
        found = self._sums[0] if len(self._sums) == 1 else hashlib.sha256(lines.encode()).hexdigest()
        if found != wanted.lower():
            raise CheckpointError(
                f"{self.path}: its weights have SHA-256 {found}, model.sha256 is {wanted}; these are not the weights "
                "that were pinned, fetch them again or correct model.sha256"
            )


def _no_weights(path: Path) -> str:
    if any(path.glob("pytorch_model*.bin")):
        return (
            f"{path} holds pickle weights (pytorch_model*.bin), which can run code and cannot be read by slice; "
            f"run: esm-neuron convert {path} NEW_FOLDER, then model.name=NEW_FOLDER"
        )
    return f"{path} holds neither {WEIGHTS} nor {INDEX}; give the folder that holds the weights"


FETCH = "fetch or convert the checkpoint again"


def open_safetensors(path: Path, cure: str = FETCH) -> Any:
    """Map the file. Raises CheckpointError where it is missing, truncated or no safetensors file."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, or no file; {cure}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({one_line(error)}); {cure}") from error


def load_tensors(path: Path, cure: str) -> dict[str, torch.Tensor]:
    """Return all tensors of a file by name, as views of the mapped file. Raises as `open_safetensors` does."""
    opened = open_safetensors(path, cure)
    return {key: opened.get_tensor(key) for key in list(opened.keys())}


def check_values(where: str, key: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointError unless `tensor` holds finite floats of at least 16 bits."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise CheckpointError(
            f"{where}: {key} is {tensor.dtype}, no float of 16 bits or more; use a checkpoint that is not quantized"
        )
    # the least and the largest value are NaN where any value is, and nothing is allocated for them
    if tensor.numel() and not all(math.isfinite(float(bound)) for bound in torch.aminmax(tensor)):
        raise CheckpointError(
            f"{where}: {key} holds NaN or infinity, so every prediction would; train or fetch it again"
        )


def read_index(path: Path, suffix: str) -> dict[str, set[str]]:
    """Read a Hugging Face index: file -> keys that it should hold."""
    try:
        pairs = list(read_json(path, {"weight_map": {}})["weight_map"].items())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no index of shards ({one_line(error)}); fetch the checkpoint again"
        ) from error
    files: dict[str, set[str]] = {}
    for key, file in pairs:  # an index from elsewhere must not make us read outside its folder
        if not isinstance(file, str) or not file.endswith(suffix) or Path(file).name != file or "\\" in file:
            raise CheckpointError(f"{path}: {key} is said to be in {file!r}; a shard is a file beside it, *{suffix}")
        files.setdefault(file, set()).add(key)
    if not files:
        raise CheckpointError(f"{path} lists no tensors; fetch the checkpoint again")
    return files


def check_keys(path: Path, found: set[str], listed: set[str]) -> None:
    """Raise CheckpointError unless the shard at `path` holds exactly the keys that the index lists."""
    if found != listed:
        raise CheckpointError(
            f"{path} and its index disagree: missing {some(listed - found)}, unlisted {some(found - listed)}; "
            "fetch the checkpoint again"
        )


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Make a folder aside to write to; on leaving it becomes `target`, its files safely on disk, or it is removed."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists; name a folder that does not")
    try:
        with new_folder(target) as aside:
            yield aside
    except OSError as error:
        raise CheckpointError(f"cannot write {target} ({one_line(error)}); nothing of it was kept") from error


def write_shards(state: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors to `folder`: one file where they fit `max_shard_bytes`, else shards and an index."""
    shards: list[list[str]] = []
    seen: set[str] = set()
    pending: dict[str, torch.Tensor] = {}
    size = total = 0
    for name, tensor in state:
        if name in seen:
            raise CheckpointError(f"two tensors are called {name}; nothing was written")
        # Write before the next tensor would not fit: `state` may make tensors one by one, and only one shard is held.
        if pending and size + tensor.nbytes > max_shard_bytes:
            shards.append(_write_part(pending, folder, len(shards)))
            pending, size = {}, 0
        seen.add(name)
        pending[name] = tensor.detach().cpu()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if not pending:
        raise CheckpointError("there are no tensors to write")
    shards.append(_write_part(pending, folder, len(shards)))
    _name_parts(shards, folder, total)


def _write_part(tensors: Mapping[str, torch.Tensor], folder: Path, number: int) -> list[str]:
    unshared: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        # tied tensors are written twice, as readers expect every key of the layout; safetensors wants them apart
        owned = tensor.contiguous()
        shared = owned.untyped_storage().data_ptr() in storages
        unshared[name] = owned.clone() if shared else owned
        storages.add(unshared[name].untyped_storage().data_ptr())
    save_tensors(folder / f"part-{number}", unshared)
    return list(tensors)


def _name_parts(shards: list[list[str]], folder: Path, total: int) -> None:
    if len(shards) == 1:
        (folder / "part-0").rename(folder / WEIGHTS)
        return
    # A shard's name says how many there are, which is known only now: until here they were numbered parts.
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(keys, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def some(names: Iterable[str], most: int = 3) -> str:
    """Return the first names and how many more there are: "a, b, c and 12 more"; "none" for none."""
    ordered = sorted(names)
    shown, rest = ", ".join(ordered[:most]) or "none", len(ordered) - most
    return shown if rest <= 0 else f"{shown} and {rest} more"


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__
