"""Adapters that plain PEFT wrote: what their folder says, checked without torch, and their merge into their base.

LoRA, rsLoRA and DoRA of linear layers with ranks and scales by layer, biases, and modules saved whole are read. Their
sum is taken tensor by tensor as weights are read: W + s B A (arXiv:2106.09685), under DoRA scaled to the norm of each
row (arXiv:2402.09353). Whatever else an adapter_config.json asks for is refused by name, for it would be left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from esm_neuron.config import require
from esm_neuron.config.deferred import module
from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from esm_neuron.models import hf_folder
    from esm_neuron.models.hf_folder import BaseReference
    from esm_neuron.models.tensor_parallel import Index
    from esm_neuron.models.weights import WeightSource
else:  # what is wrong with a folder is said before torch is imported
    hf_folder = module("esm_neuron.models.hf_folder")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_READ = {"peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "use_dora",
         "rank_pattern", "alpha_pattern", "init_lora_weights"}  # fmt: skip
_NO_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules", "lora_dropout",
    "bias", "modules_to_save", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
"""Fields that decide how an adapter is trained or found, which the names and shapes of its tensors say as well."""
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to draw an adapter's first values that leave the base as it is; PiSSA and others take something out of it."""
_PATTERN = re.compile(r"[\w.^$|\\\[\]-]*(?:[*+?][\w.^$|\\\[\]-]*){0,3}")
"""Names of layers as PEFT takes them, regular expressions, without groups: one from elsewhere could match forever."""


_TWICE = re.compile(r"\.(modules_to_save|original_module)\.")
"""What `bias: all` saves once more of modules that are saved whole, under the names of their wrappers."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter in PEFT's layout, of any kind."""
    return (folder / ADAPTER_CONFIG).is_file()


@dataclass(frozen=True)
class AdapterFolder:
    """A folder of PEFT whose adapter_config.json was checked; see `read_adapter_folder`."""

    path: Path
    base: str | None
    """Hub id or folder of the weights that it was trained on; None where it does not say."""
    revision: str | None
    fields: dict[str, Any]
    """Those of `_READ` that decide what the matrices compute."""

    def rank_and_scale(self, layer: str) -> tuple[int, float]:
        """Return the rank of a layer's matrices, and what their product is multiplied by."""
        rank = self._of(layer, "rank_pattern", "r")
        alpha = self._of(layer, "alpha_pattern", "lora_alpha")
        return rank, alpha / (math.sqrt(rank) if self.fields["use_rslora"] else rank)

    def _of(self, layer: str, patterns: str, default: str) -> Any:
        found = (value for key, value in self.fields[patterns].items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", layer))
        return next(found, self.fields[default])


def read_adapter_folder(path: Path) -> AdapterFolder:
    """Read the adapter_config.json of a folder. Raise ConfigError where it is not of an adapter that can be merged."""
    file = path / ADAPTER_CONFIG
    said = read_json(file, {}, ConfigError, "save the adapter again with PEFT")
    kind = said.get("peft_type")
    merge = "merge it with PEFT (merge_and_unload), save the model and name its folder"
    require(kind == "LORA", f"{file}: peft_type is {kind!r}, and only LORA is read; {merge}")
    for name, value in said.items():
        known = name in _READ or name in _NO_EFFECT or value in (None, False, {}, [])
        require(known, f"{file}: {name} is {value!r}, which is not read; {merge}")
    initial = said.get("init_lora_weights", True)
    require(initial in _INITIAL, f"{file}: init_lora_weights is {initial!r}, which changes the base; {merge}")
    fields = {"r": 8, "lora_alpha": 8, "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    fields = {name: default if said.get(name) is None else said[name] for name, default in fields.items()}
    base, revision = said.get("base_model_name_or_path"), said.get("revision")
    faults = [name for name in ("r", "lora_alpha") if not _is_number(fields[name], whole=name == "r")]
    faults += [name for name in ("use_rslora", "use_dora") if not isinstance(fields[name], bool)]
    faults += [name for name in ("rank_pattern", "alpha_pattern") if not _is_patterns(fields[name], name)]
    faults += [name for name, text in (("base_model_name_or_path", base), ("revision", revision))
               if not isinstance(text, str | None)]  # fmt: skip
    if faults:
        raise ConfigError(f"{file}: {faults[0]} is {said[faults[0]]!r}, which is not read; {merge}")
    require(
        (path / ADAPTER_WEIGHTS).is_file(),
        f"{path} has no {ADAPTER_WEIGHTS}; save the adapter again with PEFT's save_pretrained, which writes it",
    )
    return AdapterFolder(path, base or None, revision, fields)


def _is_number(value: Any, whole: bool) -> bool:
    kinds = (int,) if whole else (int, float)
    return type(value) in kinds and 0 < value < 1 << 20


def _is_patterns(value: Any, name: str) -> bool:
    return isinstance(value, dict) and all(
        len(key) <= 200 and _PATTERN.fullmatch(key) and _compiles(key) and _is_number(number, name == "rank_pattern")
        for key, number in value.items()
    )


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def layer_keys(keys: list[str]) -> dict[str, str]:
    """Return key in the file -> name in the model, of an adapter file, without the names of PEFT's wrappers."""
    used = (key for key in keys if not _TWICE.search(key))
    return {key: key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in used}


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the name in the model of each tensor of an adapter, and its shape, without torch."""
    path = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="np") as file:
            names = layer_keys(list(file.keys()))
            return {name: tuple(file.get_slice(key).get_shape()) for key, name in names.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); save the adapter again with PEFT") from error


class MergedWeights:
    """Weights with an adapter merged into them, tensor by tensor as they are read; otherwise as the base's."""

    def __init__(self, base: WeightSource, adapter: AdapterFolder) -> None:
        """Open the adapter's file. Raise CheckpointError where its tensors do not fit the base or its configuration."""
        self.base, self.adapter, self.name = base, adapter, str(adapter.path)
        self.tensors = hf_folder.SafetensorsFolder(adapter.path, self.name, file=ADAPTER_WEIGHTS)
        theirs = base.keys()
        self._of_base = {hf_folder.canonical(key): key for key in theirs}
        if len(self._of_base) < len(theirs):
            self._refuse(f"its base {base.name} has two tensors of one name")
        self._whole: dict[str, str] = {}
        self._low: dict[str, dict[str, str]] = {}
        """Layer -> part of its adapter -> key."""
        self._theirs: dict[str, str] = {}
        """Layer -> its name in the model that PEFT adapted, which patterns are for."""
        for key, name in layer_keys(sorted(self.tensors.keys())).items():
            layer, lora, part = name.partition(".lora_")
            part = part.removesuffix(".weight")
            if lora and part in ("A", "B", "magnitude_vector"):
                ours = hf_folder.canonical(f"{layer}.")
                self._low.setdefault(ours, {})[part] = key
                self._theirs[ours] = layer
            elif lora or not key.startswith("base_model.model.") or name.rpartition(".")[2] not in ("weight", "bias"):
                self._refuse(f"{key} is no tensor of a LoRA adapter of linear layers")
            else:
                self._whole[hf_folder.canonical(name)] = key
        self._low = {layer: parts for layer, parts in self._low.items() if not self._is_unused(layer)}
        for layer, parts in self._low.items():
            self._check(layer, parts)

    def _is_unused(self, layer: str) -> bool:
        """Return whether the adapter is of a part that no task here uses, and the base lacks."""
        return layer.startswith(("esm.contact_head.", "esm.pooler.")) and f"{layer}weight" not in self._of_base

    def _check(self, layer: str, parts: dict[str, str]) -> None:
        weight, (rank, _) = f"{layer}weight", self.adapter.rank_and_scale(self._theirs[layer])
        wanted = {"A", "B", "magnitude_vector"} if self.adapter.fields["use_dora"] else {"A", "B"}
        if parts.keys() != wanted:
            self._refuse(f"{layer}lora_ has {', '.join(sorted(parts))}, wanted {', '.join(sorted(wanted))}")
        if weight not in self._of_base and weight not in self._whole:
            self._refuse(f"it adapts {layer[:-1]}, which its base {self.base.name} does not have")
        outputs, inputs = (*self.shape(weight), 0, 0)[:2]
        shapes = {"A": (rank, inputs), "B": (outputs, rank), "magnitude_vector": (outputs,)}
        for part, key in parts.items():
            found = self.tensors.shape(key)
            if found != shapes[part]:
                made = f"rank {rank} and the base {self.base.name} make {list(shapes[part])}"
                self._refuse(f"{key} is {list(found)}, but {made}")

    def _refuse(self, what: str) -> None:
        cure = "name the base that it was trained on (model.base), or save it again with PEFT"
        raise CheckpointError(f"{self.adapter.path}: {what}; {cure}")

    def keys(self) -> frozenset[str]:
        return frozenset(self._of_base) | frozenset(self._whole)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.tensors.shape(self._whole[key]) if key in self._whole else self.base.shape(self._of_base[key])

    def read(self, key: str, index: Index | None = None) -> Tensor:
        """Return the tensor, or its part `index`; what an adapter is merged into is float32."""
        layer, _, leaf = key.rpartition(".")
        parts = self._low.get(f"{layer}.") if leaf == "weight" else None
        if parts is None:
            whole = key in self._whole
            return self.tensors.read(self._whole[key], index) if whole else self.base.read(self._of_base[key], index)
        weight = self.tensors.read(self._whole[key]) if key in self._whole else self.base.read(self._of_base[key])
        hf_folder.check_values(self.base.name, key, weight)
        _, scale = self.adapter.rank_and_scale(self._theirs[f"{layer}."])
        low = {part: self._checked(name).float() for part, name in parts.items()}
        merged = weight.float() + scale * (low["B"] @ low["A"])
        if "magnitude_vector" in low:
            merged *= (low["magnitude_vector"] / merged.norm(dim=1)).unsqueeze(1)
        return merged if index is None else merged[index]

    def _checked(self, name: str) -> Tensor:
        tensor = self.tensors.read(name)
        hf_folder.check_values(self.name, name, tensor)
        return tensor

    @property
    def reference(self) -> BaseReference:
        """Return a reference whose sum is over the base's, the adapter's tensors, and what decides their scale."""
        content = [self.base.reference.sha256, self.tensors.reference.sha256, self.adapter.fields]
        return hf_folder.BaseReference(
            self.name, None, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        )
