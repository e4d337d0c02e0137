"""Weights of a model: where they come from (safetensors, read slice by slice, or a seed), and how a model is filled.

From top to bottom: what a source of weights is; drawing from a seed; what `model.name` means, with the check of its
config.json; and `load_into`, which fills a model on meta or on a device.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from esm_neuron.compat import EsmConfig
from esm_neuron.config import ModelConfig, require
from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.files import read_json
from esm_neuron.models.adapter_folder import MergedWeights, is_adapter
from esm_neuron.models.attention import ROTARY_BASE
from esm_neuron.models.hf_folder import (
    WEIGHTS,
    BaseReference,
    SafetensorsFolder,
    canonical,
    check_values,
    one_line,
    some,
)
from esm_neuron.models.shapes import (
    MASK_TOKEN,
    PAD_TOKEN,
    SHAPES,
    VOCABULARY_SIZE,
    EsmShape,
    base_of,
    check_layers,
    esm_config,
    find,
    locate,
)
from esm_neuron.models.tensor_parallel import Index, Shard, block_of

HEAD = re.compile(r"((\w+_)?(classifier|regressor)|attention_pooling|layer_mix)\..*")
"""Parameters of a head, of transformers or of this package."""


class WeightSource(Protocol):
    """Named tensors that can be read in part."""

    name: str
    """What a person calls these weights."""

    def keys(self) -> frozenset[str]:
        """Return the names of all tensors."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""

    def read(self, key: str, index: Index | None = None) -> Tensor:
        """Return the tensor, or its part `index` (one slice per dimension), to be copied: it may be a file's memory."""

    @property
    def reference(self) -> BaseReference:
        """Return which weights these are."""


def seeded(seed: int, name: str) -> np.random.Generator:
    """Return a generator for one parameter, so that its values depend on the seed and its name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


@dataclass(frozen=True)
class Draw:
    """New values for parameters, each from a generator of its own.

    A value depends on the seed, the parameter's name and its whole shape only: not on the order of drawing, on
    sharding, on which head the model has, or on the processor's vector instructions (as in torch).
    """

    seed: int
    std: float
    """Standard deviation of linear and embedding weights: `initializer_range` of the configuration."""

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return float32 [`shape`]: norms start as the identity, biases and the padding token's embedding as 0."""
        module, _, leaf = canonical(name).rpartition(".")
        if leaf == "bias":
            return torch.zeros(shape)
        if "norm" in module.rpartition(".")[2].lower():
            return torch.ones(shape)
        generator = seeded(self.seed, canonical(name))
        drawn = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).mul_(self.std)
        if module.endswith("word_embeddings"):
            drawn[PAD_TOKEN] = 0.0
        return drawn


@dataclass
class Changed:
    """Weights without some of their tensors, and with others."""

    source: WeightSource
    hidden: Set[str] = frozenset()
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """What is read under a name instead of the source's tensor."""

    def __post_init__(self) -> None:
        self.name = self.source.name

    @property
    def reference(self) -> BaseReference:
        return self.source.reference

    def keys(self) -> frozenset[str]:
        return frozenset(self.source.keys()) - self.hidden | self.given.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.given[key].shape) if key in self.given else self.source.shape(key)

    def read(self, key: str, index: Index | None = None) -> Tensor:
        if key not in self.given:
            return self.source.read(key, index)
        return self.given[key] if index is None else self.given[key][index]


class RandomWeights:
    """Weights of transformers' EsmForMaskedLM drawn from a seed; the head of another task is drawn by `load_into`."""

    def __init__(self, config: EsmConfig, seed: int) -> None:
        self.shapes = EsmShape.of(config).parameters()
        self.draw = Draw(seed, config.initializer_range)
        self.name = f"random weights of seed {seed}"

    def keys(self) -> frozenset[str]:
        return frozenset(self.shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.shapes[key]

    def read(self, key: str, index: Index | None = None) -> Tensor:
        """Return float32: the tensor, or the part `index` of the same draw."""
        whole = self.draw(key, self.shapes[key])
        return whole if index is None else whole[index]

    @property
    def reference(self) -> BaseReference:
        """Return a reference whose sum is over the seed, the standard deviation, and all names and shapes."""
        content = json.dumps([self.draw.seed, self.draw.std, sorted(self.shapes.items())])
        return BaseReference(
            f"random weights of seed {self.draw.seed}", None, hashlib.sha256(content.encode()).hexdigest()
        )


def open_weights(cfg: ModelConfig, seed: int) -> tuple[EsmConfig, WeightSource]:
    """Find what `model.name` means, opening its weights without reading them; `seed` is that of random weights.

    The folder of an adapter means its base with the adapter merged in. Blocks above `model.layers` are left out. Raise
    ConfigError where no ESM-2 with safetensors has the name, CheckpointError where its files are damaged, incomplete or
    not those of `sha256`.
    """
    config, source = _open_whole(cfg, seed)
    if not isinstance(cfg.layers, int) or config.num_hidden_layers == cfg.layers:
        return config, source
    config.num_hidden_layers = check_layers(cfg.layers, config.num_hidden_layers, cfg.name)
    # A head, and the regression of contacts on every block's attention, are of a model that is not cut off.
    keys = source.keys()
    hidden = {
        key
        for key in keys
        if (block_of(key) or 0) >= cfg.layers or HEAD.fullmatch(key) or _DRAWABLE.match(canonical(key))
    }
    return config, Changed(source, hidden)


def _open_whole(cfg: ModelConfig, seed: int) -> tuple[EsmConfig, WeightSource]:
    """Return the configuration and the weights with all blocks that are there."""
    found = locate(cfg)
    if found is None or not is_adapter(found):
        return _open(cfg, seed)
    adapter, base = base_of(cfg, found)
    try:
        config, weights = _open(base, seed)
    except ConfigError as error:
        raise ConfigError(f"{found}: its base: {str(error).replace('model.name', 'model.base')}") from error
    merged = MergedWeights(weights, adapter)
    if cfg.sha256 is not None:
        merged.tensors.check_sum(cfg.sha256)
    return config, merged


def _open(cfg: ModelConfig, seed: int) -> tuple[EsmConfig, WeightSource]:
    """Return the configuration and the weights of a model that is no adapter."""
    found = find(cfg)
    folder, commit = (found, None) if found is not None else _download(cfg)
    shape, random = SHAPES.get(cfg.name), cfg.init == "random"
    config = read_config(folder) if shape is None else esm_config(shape)
    if random:
        return config, RandomWeights(config, seed)
    if commit is not None and not any(folder.glob("*.safetensors*")):
        raise ConfigError(
            f"model.name={cfg.name} has no safetensors in {folder} (pickle weights only, or offline with half of it "
            f"cached); run: hf download {cfg.name} --local-dir PICKLES; esm-neuron convert PICKLES NEW_FOLDER; then "
            "model.name=NEW_FOLDER"
        )
    opened = SafetensorsFolder(folder, cfg.name, commit)
    if cfg.sha256 is not None:
        opened.check_sum(cfg.sha256)
    return config, opened


def _download(cfg: ModelConfig) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    wanted = ["config.json"]
    if cfg.init != "random":
        wanted += ["model*.safetensors", "model*.safetensors.index.json"]
    # A pinned commit never changes: what the cache has whole is taken without asking the hub.
    pinned = cfg.revision is not None and re.fullmatch(r"[0-9a-f]{40}", cfg.revision) is not None
    if pinned and (cached := _snapshot(cfg, wanted)) is not None:
        return cached, cached.name
    try:
        folder = Path(snapshot_download(cfg.name, revision=cfg.revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # what huggingface_hub and its HTTP client raise: offline, not found, bad id
        revision = f" at revision {cfg.revision}" if cfg.revision else ""
        raise ConfigError(
            f"model.name={cfg.name}{revision} is no folder here, and the hub did not give it ({one_line(error)}); "
            f"check the name, or where there is a network run: hf download {cfg.name} --local-dir FOLDER, then "
            "model.name=FOLDER"
        ) from error
    commit = folder.name
    # A pinned commit is compared with what came, so that a run never trains on other weights than it names.
    if pinned and commit != cfg.revision:
        raise ConfigError(
            f"model.name={cfg.name} at revision {cfg.revision}: the hub gave commit {commit}; check model.revision"
        )
    return folder, commit


def _snapshot(cfg: ModelConfig, wanted: list[str]) -> Path | None:
    """Return the cached folder of a pinned commit; None where it lacks the configuration or the single weight file."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(cfg.name, revision=cfg.revision, allow_patterns=wanted, local_files_only=True))
    except (OSError, ValueError):
        return None
    whole = (folder / "config.json").is_file() and (cfg.init == "random" or (folder / WEIGHTS).is_file())
    return folder if whole and folder.name == cfg.revision else None


def read_config(folder: Path) -> EsmConfig:
    """Read the ESM-2 configuration of a Hugging Face folder: the fields that we know, and no other.

    A field that we do not know can change what is computed, or name code (`auto_map`, `_attn_implementation`) that
    transformers fetches and runs. Raise ConfigError where config.json is missing or unreadable, or describes something
    else than an ESM-2.
    """
    path = folder / "config.json"
    try:
        raw = read_json(path)
        said: dict[str, Any] = {**EsmConfig().to_dict(), **_IMPLIED, "model_type": None, **raw}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise _unreadable(path, error) from error
    # Checked before transformers sees them: its version 5 refuses a wrong type in words of its own.
    facts: list[tuple[str, object, object]] = [
        # a classifier of this package has a type of its own; its encoder is equal
        ("model_type", said["model_type"], "esm" if said["model_type"] != "esm_neuron" else "esm_neuron"),
        ("position_embedding_type", said["position_embedding_type"], "rotary"),
        ("vocab_size", said["vocab_size"], VOCABULARY_SIZE),
        ("pad_token_id", said["pad_token_id"], PAD_TOKEN),
        ("mask_token_id", MASK_TOKEN if said["mask_token_id"] is None else said["mask_token_id"], MASK_TOKEN),
        *((name, bool(said[name]), False) for name in ("emb_layer_norm_before", "is_folding_model", "is_decoder")),
        ("hidden_act", said["hidden_act"], "gelu"),
        ("rope_theta", said["rope_theta"], ROTARY_BASE),
    ]
    for name, value, esm2 in facts:
        require(value == esm2, f"{path} is not of an ESM-2: {name} is {value!r}, must be {esm2!r}; use an ESM-2 model")
    for name, low, high in _LIMITS:
        value = said[name]
        kinds, what = ((int,), "a whole number, ") if isinstance(low, int) else ((int, float), "")
        fits = type(value) in kinds and low <= value <= high
        require(fits, f"{path}: {name} is {value!r}, must be {what}{low} to {high}; use an ESM-2 model")
    for name, values in _CHOICES.items():
        require(said[name] in values, f"{path}: {name} is {said[name]!r}, must be one of {values}; use an ESM-2 model")
    hidden, heads = said["hidden_size"], said["num_attention_heads"]
    require(hidden % (2 * heads) == 0, f"{path}: hidden_size {hidden} is no even multiple of {heads} attention heads")
    shape = EsmShape(
        layers=said["num_hidden_layers"], hidden=hidden, heads=heads, intermediate=said["intermediate_size"]
    )
    try:
        return esm_config(shape, **{name: said[name] for name in _KEPT if name in raw or name not in _OF_A_HEAD})
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    cure = "give a Hugging Face model folder with its config.json"
    return ConfigError(f"{path} cannot be read ({one_line(error)}); {cure}")


_IMPLIED = {
    "hidden_act": "gelu", "rope_theta": ROTARY_BASE, "is_decoder": False, "tie_word_embeddings": True,
    "problem_type": None, "target_mean": 0.0, "target_sd": 1.0,
}  # fmt: skip
"""Values of fields that a config.json may leave out and that EsmConfig does not have in each version."""
_OF_A_HEAD = ("id2label", "problem_type", "target_mean", "target_sd")
_KEPT = (
    "max_position_embeddings", "initializer_range", "layer_norm_eps", "token_dropout", "tie_word_embeddings",
    *_OF_A_HEAD,
)  # fmt: skip
"""Fields that are taken from a config.json besides its sizes."""
_LIMITS: tuple[tuple[str, float, float], ...] = (
    ("num_hidden_layers", 1, 1_000),
    ("hidden_size", 2, 1 << 16),
    ("num_attention_heads", 1, 1 << 10),
    ("intermediate_size", 1, 1 << 18),
    ("max_position_embeddings", 1, 1 << 20),
    ("initializer_range", 0.0, 10.0),
    ("layer_norm_eps", 0.0, 1.0),
    ("target_mean", -1e300, 1e300),
    ("target_sd", 1e-300, 1e300),
)
"""What a config.json can ask for, far more than any ESM-2: whole numbers, or others where the bounds are floats."""
_CHOICES: dict[str, list[object]] = {
    "token_dropout": [True, False],
    "tie_word_embeddings": [True, False],
    "problem_type": [None, "regression", "single_label_classification", "multi_label_classification"],
}


@dataclass(frozen=True)
class LoadReport:
    """What `load_into` did with each name."""

    loaded: tuple[str, ...]
    drawn: tuple[str, ...]
    """Parameters of the model that the source lacks, drawn anew."""
    ignored: tuple[str, ...]


@runtime_checkable
class Receiver(Protocol):
    """A module that keeps its weight in a form of its own."""

    def receive(self, weight: Tensor) -> None:
        """Take the float weight, of the shape that the meta parameter `weight` had."""


@dataclass(frozen=True)
class _Slot:
    """One tensor of the model and every place that holds it; several where it is tied."""

    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    tensor: Tensor

    def fill(self, value: Tensor) -> None:
        """Copy `value` in; a meta tensor is replaced, in all its places by one and the same."""
        if self.tensor.device.type != "meta":
            with torch.no_grad():
                self.tensor.copy_(value)
            return
        receiver = self.owners[0]
        if isinstance(receiver, Receiver) and self.names[0].endswith(".weight"):
            receiver.receive(value)
            return
        # a view of a mapped file would keep the map, and change with the file
        filled = value.to(self.tensor.dtype, copy=True, memory_format=torch.contiguous_format)
        if isinstance(self.tensor, nn.Parameter):
            filled = nn.Parameter(filled, requires_grad=self.tensor.requires_grad)
            filled.__dict__.update(self.tensor.__dict__)  # the marks of parallel layers, which gradient norms read
        for name, owner in zip(self.names, self.owners, strict=True):
            setattr(owner, name.rpartition(".")[2], filled)


_DERIVED = re.compile(r"(.*\.)?(rotary_embeddings\.inv_freq|embeddings\.position_ids)")
"""Buffers that the shape decides; a checkpoint's copy may have lost precision, so it is never read."""
_OPTIONAL = re.compile(r"esm\.(contact_head|pooler|embeddings\.position_embeddings)\.|lm_head\.")
"""Parts that some ESM-2 checkpoints have and some models lack."""
_DRAWABLE = re.compile(r"esm\.contact_head\.")
"""Not used in fine-tuning, and left out of many checkpoints."""


def load_into(
    model: nn.Module,
    source: WeightSource,
    draw: Draw,
    new_ok: Callable[[str], bool],
    shard: Callable[[str, tuple[int, ...]], Shard | None] | None = None,
) -> LoadReport:
    """Fill every parameter and persistent buffer of `model`; nothing is read before all names and shapes agree.

    What is on meta becomes real on the CPU, in its dtype. Where `new_ok` allows the source to lack a parameter (the
    head of a task), `draw` gives its values; those are replicated, so their shape is the whole one. `shard` gives this
    rank's part of (name, whole shape), or None for all. Raise CheckpointError where names, shapes or ties differ.
    """
    # Names: the source's keys and the model's in one spelling. A key that is left over is a sign of another model.
    keys: dict[str, str] = {}
    for key in sorted(source.keys()):
        twin = keys.setdefault(canonical(key), key)
        _require(twin == key, f"{source.name} has both {twin} and {key}; keep one of them")
    slots = list(_slots(model))
    names = {canonical(name) for slot in slots for name in slot.names}
    unknown = [key for name, key in keys.items() if not _expected(name, names)]
    _require(
        not unknown,
        f"{source.name} has {len(unknown)} tensors that the model does not: {some(unknown)}; {_CURE}",
    )
    # Gaps: only a task's head and what fine-tuning does not use may be drawn.
    plan = [(slot, [name for name in slot.names if canonical(name) in keys]) for slot in slots]
    gaps = [slot.names[0] for slot, found in plan if not found]
    missing = [name for name in gaps if not new_ok(name) and not _DRAWABLE.match(canonical(name))]
    _require(not missing, f"{source.name} lacks {len(missing)} of the model's parameters: {some(missing)}; {_CURE}")
    # Shapes, of this rank's parts where the model is cut; then values.
    parts = [_part(slot, found, source, keys, shard) if found else None for slot, found in plan]
    for (slot, found), part in zip(plan, parts, strict=True):
        if found:
            slot.fill(_read(source, keys[canonical(found[0])], part))
        else:
            slot.fill(draw(slot.names[0], tuple(slot.tensor.shape)))
    _fill_derived(model)
    ignored = tuple(sorted(key for name, key in keys.items() if name not in names))
    return LoadReport(tuple(found[0] for _, found in plan if found), tuple(gaps), ignored)


_CURE = "use a checkpoint of this model"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def _slots(model: nn.Module) -> Iterator[_Slot]:
    # Tensors are told apart by identity: a tied one has several names and must be filled once.
    places: dict[int, list[tuple[str, nn.Module, Tensor]]] = {}
    for prefix, module in model.named_modules():
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for leaf, tensor in (module._parameters | buffers).items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if tensor is not None and not _DERIVED.fullmatch(canonical(name)):
                places.setdefault(id(tensor), []).append((name, module, tensor))
    for same in places.values():
        yield _Slot(tuple(p[0] for p in same), tuple(p[1] for p in same), same[0][2])


def _expected(name: str, names: set[str]) -> bool:
    """Return whether the source may have a key: it is the model's, of a part that the model lacks whole, or derived."""
    part = _OPTIONAL.match(name)
    unused = part is not None and not any(n.startswith(part[0]) for n in names)
    return name in names or unused or _DERIVED.fullmatch(name) is not None


def _part(
    slot: _Slot,
    found: list[str],
    source: WeightSource,
    keys: dict[str, str],
    shard: Callable[[str, tuple[int, ...]], Shard | None] | None,
) -> Shard | None:
    """Return the part of the tensor that belongs in `slot`, after checking its shape and its tied twins."""
    key, *twins = dict.fromkeys(keys[canonical(name)] for name in found)
    whole = source.shape(key)
    part = shard(found[0], whole) if shard is not None else None
    shape = whole if part is None else part.shape
    _require(
        shape == tuple(slot.tensor.shape),
        f"{source.name}: {key} is {list(whole)}, which gives {list(shape)}, but the model wants "
        f"{list(slot.tensor.shape)}; {_CURE}",
    )
    for twin in twins:
        _require(
            source.shape(twin) == whole and torch.equal(source.read(twin), source.read(key)),
            f"{source.name}: {key} and {twin} are one tensor in the model, but differ; untie the model",
        )
    return part


def _read(source: WeightSource, key: str, part: Shard | None) -> Tensor:
    tensor = source.read(key) if part is None else part.read(lambda index: source.read(key, index))
    check_values(source.name, key, tensor)
    return tensor


def inverse_frequencies(width: int) -> Tensor:
    """Return float32 [width / 2], the rotary frequencies of a head: 10000^(-2i/width), RoFormer, arXiv:2104.09864."""
    frequencies: Tensor = 1.0 / ROTARY_BASE ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    return frequencies


def _fill_derived(model: nn.Module) -> None:
    """Compute the buffers that `_DERIVED` names where the model is still on meta."""
    for prefix, module in model.named_modules():
        for leaf, buffer in list(module._buffers.items()):
            if buffer is None or buffer.device.type != "meta" or not _DERIVED.fullmatch(canonical(f"{prefix}.{leaf}")):
                continue
            count = buffer.shape[-1]
            if leaf == "position_ids":
                value = torch.arange(count).expand(buffer.shape)
            else:
                value = inverse_frequencies(2 * count)
            setattr(module, leaf, value)
