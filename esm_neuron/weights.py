"""Where weights come from: safetensors, read slice by slice, or a seed."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import EsmConfig

from esm_neuron.config import ModelConfig, require
from esm_neuron.errors import ConfigError
from esm_neuron.files import read_json
from esm_neuron.parallel.slices import Index
from esm_neuron.safetensors_folder import BaseReference, SafetensorsFolder, one_line
from esm_neuron.shapes import PAD_TOKEN, SHAPES, VOCABULARY, EsmShape, esm_config


class WeightSource(Protocol):
    """Named tensors that can be read in part."""

    name: str
    """What a person calls these weights."""

    def keys(self) -> frozenset[str]:
        """Names of all tensors."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ...

    def read(self, key: str, index: Index | None = None) -> Tensor:
        """The tensor, or its part `index` (one slice a dimension), in memory of its own."""
        ...

    @property
    def reference(self) -> BaseReference:
        """Which weights these are."""
        ...


_BARE = re.compile(r"(embeddings|encoder|pooler|contact_head)\.")


def canonical(key: str) -> str:
    """The key as EsmForMaskedLM has it: a bare EsmModel's `encoder...` becomes `esm.encoder...`."""
    return f"esm.{key}" if _BARE.match(key) else key


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
        """float32 [`shape`]: norms start as the identity, biases and the padding token's embedding as 0."""
        module, _, leaf = canonical(name).rpartition(".")
        if leaf == "bias":
            return torch.zeros(shape)
        if "norm" in module.rpartition(".")[2].lower():
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}/{canonical(name)}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
        drawn = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).mul_(self.std)
        if module.endswith("word_embeddings"):
            drawn[PAD_TOKEN] = 0.0
        return drawn


class RandomWeights:
    """Weights of transformers' EsmForMaskedLM drawn from a seed; the head of another task is drawn by `load_into`."""

    def __init__(self, config: EsmConfig, seed: int) -> None:
        self.shapes = EsmShape.of(config).parameters()
        self.draw = Draw(seed, config.initializer_range)
        self.name = f"random weights of seed {seed}"

    def keys(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self.shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.shapes[key]

    def read(self, key: str, index: Index | None = None) -> Tensor:
        """float32: the tensor, or the part `index` of the same draw."""
        whole = self.draw(key, self.shapes[key])
        return whole if index is None else whole[index].clone()

    @property
    def reference(self) -> BaseReference:
        """The sum is over the seed, the standard deviation, and all names and shapes."""
        content = json.dumps([self.draw.seed, self.draw.std, sorted(self.shapes.items())])
        return BaseReference(
            f"random weights of seed {self.draw.seed}", None, hashlib.sha256(content.encode()).hexdigest()
        )


SHIPPED = Path(__file__).parent / "pretrained"
"""Folders of weights that this project trained and carries, by the name of their shape; a model card in each."""


def is_carried(cfg: ModelConfig) -> bool:
    """Whether a run keeps a copy of its base weights: nobody else could name them."""
    return cfg.init == "random" or cfg.name in SHAPES


def open_weights(cfg: ModelConfig, seed: int) -> tuple[EsmConfig, WeightSource]:
    """Find what `model.name` means; weights are opened, not read.

    Args:
        cfg: `name`, `revision`, `sha256` and `init` are used.
        seed: of random weights.

    Raises:
        ConfigError: no such shape, folder or hub repository, one that is no ESM-2, or one without safetensors.
        CheckpointError: the weight files are damaged, incomplete or not those of `sha256`.
    """
    shape, random = SHAPES.get(cfg.name), cfg.init == "random"
    require(
        not (random and cfg.sha256), "model.sha256 is of weights that are read; leave it out with model.init=random"
    )
    if shape is not None:
        require(cfg.revision is None, f"model.revision={cfg.revision} belongs to a hub id, not to the shape {cfg.name}")
        config, shipped = esm_config(shape), SHIPPED / cfg.name
        if not random and shipped.is_dir():
            return config, _checked(SafetensorsFolder(shipped, cfg.name, None), cfg.sha256)
        cure = f"model.name={shape.hub_id} or model.init=random" if shape.hub_id else "model.init=random"
        require(random, f"model.name={cfg.name} is a bare shape, without weights; use {cure}")
        return config, RandomWeights(config, seed)
    folder, commit = _find_folder(cfg)
    config = read_config(folder)
    if random:
        return config, RandomWeights(config, seed)
    if commit is not None and not any(folder.glob("*.safetensors*")):
        raise ConfigError(
            f"model.name={cfg.name} has no safetensors in {folder} (pickle weights only, or offline with half of it "
            f"cached); run: hf download {cfg.name} --local-dir PICKLES; esm-neuron convert PICKLES NEW_FOLDER; then "
            "model.name=NEW_FOLDER"
        )
    return config, _checked(SafetensorsFolder(folder, cfg.name, commit), cfg.sha256)


def _checked(opened: SafetensorsFolder, wanted: str | None) -> SafetensorsFolder:
    if wanted is not None:
        opened.check_sum(wanted)
    return opened


def _find_folder(cfg: ModelConfig) -> tuple[Path, str | None]:
    folder = Path(cfg.name).expanduser()
    if folder.is_dir():
        require(
            cfg.revision is None, f"model.revision={cfg.revision} belongs to a hub id, not to the folder {cfg.name}"
        )
        return folder, None
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", cfg.name):
        near = difflib.get_close_matches(cfg.name, SHAPES, 1)
        hint = f"did you mean {near[0]}?" if near else f"the shapes are {', '.join(SHAPES)}"
        raise ConfigError(f"model.name={cfg.name} is no folder, no hub id (owner/name) and no shape; {hint}")
    return _download(cfg)


def _download(cfg: ModelConfig) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    wanted = (
        ["config.json"]
        if cfg.init == "random"
        else ["config.json", "model*.safetensors", "model*.safetensors.index.json"]
    )
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
    pinned = cfg.revision is not None and re.fullmatch(r"[0-9a-f]{40}", cfg.revision) is not None
    if pinned and commit != cfg.revision:
        raise ConfigError(
            f"model.name={cfg.name} at revision {cfg.revision}: the hub gave commit {commit}; check model.revision"
        )
    return folder, commit


def read_config(folder: Path) -> EsmConfig:
    """The ESM-2 configuration of a Hugging Face folder; no code that it may point to is run.

    Raises:
        ConfigError: config.json is missing or unreadable, or describes something else than an ESM-2.
    """
    path = folder / "config.json"
    try:
        raw = read_json(path)
        model_type = raw.pop(
            "model_type", None
        )  # a classifier written by this package has its own: the encoder is equal
        raw.pop("auto_map", None)
        config = EsmConfig.from_dict(raw)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        cure = "give a Hugging Face model folder with its config.json"
        raise ConfigError(f"{path} cannot be read ({one_line(error)}); {cure}") from error
    facts: list[tuple[str, object, object]] = [
        ("model_type", model_type, "esm" if model_type != "esm_neuron" else model_type),
        ("position_embedding_type", config.position_embedding_type, "rotary"),
        ("vocab_size", config.vocab_size, VOCABULARY),
        ("pad_token_id", config.pad_token_id, PAD_TOKEN),
        ("emb_layer_norm_before", bool(config.emb_layer_norm_before), False),
        ("is_folding_model", config.is_folding_model, False),
        ("hidden_act", getattr(config, "hidden_act", None), "gelu"),  # EsmConfig has no default of its own
    ]
    for name, value, esm2 in facts:
        require(value == esm2, f"{path} is not of an ESM-2: {name} is {value!r}, must be {esm2!r}; use an ESM-2 model")
    for name, low, high in _LIMITS:
        value = getattr(config, name)
        kinds, what = ((int,), "a whole number, ") if isinstance(low, int) else ((int, float), "")
        fits = type(value) in kinds and low <= value <= high
        require(fits, f"{path}: {name} is {value!r}, must be {what}{low} to {high}; use an ESM-2 model")
    hidden, heads = config.hidden_size, config.num_attention_heads
    require(hidden % (2 * heads) == 0, f"{path}: hidden_size {hidden} is no even multiple of {heads} attention heads")
    return config


_LIMITS: tuple[tuple[str, float, float], ...] = (
    ("num_hidden_layers", 1, 1_000),
    ("hidden_size", 2, 1 << 16),
    ("num_attention_heads", 1, 1 << 10),
    ("intermediate_size", 1, 1 << 18),
    ("max_position_embeddings", 1, 1 << 24),
    ("initializer_range", 0.0, 10.0),
    ("layer_norm_eps", 0.0, 1.0),
)
"""What a config.json can ask for, far more than any ESM-2: whole numbers, or others where the bounds are floats."""
