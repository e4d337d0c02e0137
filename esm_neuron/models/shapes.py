"""The sizes of ESM-2 by name, and the parameters of each. No torch: plans and help texts need only numbers."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_neuron.config import AUTO_MODEL, ModelConfig, require
from esm_neuron.errors import ConfigError
from esm_neuron.models.adapter_folder import ADAPTER_CONFIG, AdapterFolder, is_adapter, read_adapter_folder

if TYPE_CHECKING:
    from esm_neuron.compat import EsmConfig

VOCABULARY_SIZE = 33
"""Tokens of the ESM alphabet."""
PAD_TOKEN = 1
MASK_TOKEN = 32
MAX_POSITIONS = 1026
"""`max_position_embeddings` of the hub's ESM-2: 1,024 tokens and the two numbers that fairseq kept free."""


@dataclass(frozen=True, kw_only=True)
class EsmShape:
    """What decides the parameters of an ESM-2."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    hub_id: str | None = None
    """Repository of the pretrained weights; None where there are none."""

    @classmethod
    def of(cls, config: EsmConfig) -> EsmShape:
        """Return the shape that a transformers configuration describes."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            intermediate=config.intermediate_size,
        )

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter of transformers' EsmForMaskedLM, the tied decoder left out."""
        encoder, head = "esm.encoder", "lm_head"
        sizes: dict[str, tuple[int, ...]] = {"esm.embeddings.word_embeddings.weight": (VOCABULARY_SIZE, self.hidden)}
        for layer in range(self.layers):
            block = f"{encoder}.layer.{layer}"
            for linear in ("self.query", "self.key", "self.value", "output.dense"):
                sizes |= _linear(f"{block}.attention.{linear}", self.hidden, self.hidden)
            sizes |= _norm(f"{block}.attention.LayerNorm", self.hidden)
            sizes |= _linear(f"{block}.intermediate.dense", self.intermediate, self.hidden)
            sizes |= _linear(f"{block}.output.dense", self.hidden, self.intermediate)
            sizes |= _norm(f"{block}.LayerNorm", self.hidden)
        sizes |= _norm(f"{encoder}.emb_layer_norm_after", self.hidden)
        sizes |= _linear("esm.contact_head.regression", 1, self.layers * self.heads)
        sizes |= _linear(f"{head}.dense", self.hidden, self.hidden)
        sizes |= _norm(f"{head}.layer_norm", self.hidden)
        return sizes | {f"{head}.bias": (VOCABULARY_SIZE,)}

    def parameter_count(self) -> int:
        """Return the parameters of transformers' EsmForMaskedLM, the tied decoder counted once."""
        return sum(math.prod(size) for size in self.parameters().values())


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def read_width(pooling: str, hidden: int, layers: int, shares: bool) -> int:
    """Return the numbers that a head gets per protein from so many layers, with or without `model.composition`."""
    means = 3 if pooling == "mean+termini" else 1
    return means * hidden * layers + (20 * means + 1 if shares else 0)


def _released(name: str, layers: int, hidden: int, heads: int) -> EsmShape:
    hub_id = f"facebook/{name}_UR50D"
    return EsmShape(layers=layers, hidden=hidden, heads=heads, intermediate=4 * hidden, hub_id=hub_id)


SHAPES: dict[str, EsmShape] = {
    "tiny": EsmShape(layers=2, hidden=32, heads=4, intermediate=128),
    "small": EsmShape(layers=4, hidden=128, heads=8, intermediate=512),
    "mini": EsmShape(layers=6, hidden=192, heads=8, intermediate=768),
    "esm2_t6_8M": _released("esm2_t6_8M", 6, 320, 20),
    "esm2_t12_35M": _released("esm2_t12_35M", 12, 480, 20),
    "esm2_t30_150M": _released("esm2_t30_150M", 30, 640, 20),
    "esm2_t33_650M": _released("esm2_t33_650M", 33, 1280, 20),
    "esm2_t36_3B": _released("esm2_t36_3B", 36, 2560, 40),
    "esm2_t48_15B": _released("esm2_t48_15B", 48, 5120, 40),
}
"""Name -> shape: `tiny` for tests, `small` and `mini` for a laptop, and six of Lin et al. 2023 (Science 379:1123)."""


SHIPPED = Path(__file__).parent / "pretrained"
"""Folders of weights that this project trained and carries, by the name of their shape; a model card in each."""


def is_carried(cfg: ModelConfig) -> bool:
    """Return whether a run keeps a copy of its base weights, because nobody else could name them."""
    return cfg.init == "random" or cfg.name in SHAPES or is_adapter(Path(cfg.name).expanduser())


def in_folder(cfg: ModelConfig, folder: Path) -> ModelConfig:
    """Return the model with its weights taken from a folder, whatever they were taken from before."""
    return replace(cfg, name=str(folder), init="pretrained", base=None, revision=None, sha256=None)


def locate(cfg: ModelConfig) -> Path | None:
    """Return the folder that `model.name` means; None for a hub id. Raise ConfigError for neither.

    The folder of a shape may be missing, with `init: random`. Of an adapter its base is looked for too; otherwise what
    is in the folder is not looked at, except to say what else to name.
    """
    folder = find(cfg)
    if folder is not None and is_adapter(folder):
        require(cfg.init != "random", f"model.init=random: {cfg.name} is an adapter; name a shape, or its base")
        find(base_of(cfg, folder)[1])
        return folder
    require(
        cfg.base is None, f"model.base={cfg.base} is for the folder of an adapter; {cfg.name} has no {ADAPTER_CONFIG}"
    )
    if folder is not None and cfg.name not in SHAPES and not (folder / "config.json").is_file():
        if (folder / "config.yaml").is_file():
            cure = f"run: esm-neuron export --model {cfg.name} --output FOLDER, then model.name=FOLDER"
            raise ConfigError(f"model.name={cfg.name} is the output folder of a training run; {cure}")
        inner = [
            path.parent for name in ("config.json", ADAPTER_CONFIG) for path in folder.glob(f"checkpoint-*/{name}")
        ]
        if inner:
            last = max(inner, key=lambda path: (len(path.name), path.name))
            raise ConfigError(
                f"model.name={cfg.name} holds checkpoints of transformers' Trainer and no model; name one: {last}"
            )
    return folder


def base_of(cfg: ModelConfig, folder: Path) -> tuple[AdapterFolder, ModelConfig]:
    """Return the adapter in `folder`, and the model that it was trained on: `model.base`, or what the adapter names."""
    adapter = read_adapter_folder(folder)
    base, revision = (cfg.base, cfg.revision) if cfg.base is not None else (adapter.base, adapter.revision)
    cure = "give the hub id or folder of the weights that it was trained on: --model.base BASE"
    if base is None:
        raise ConfigError(f"{folder}: it names no base; {cure}")
    there = Path(base).expanduser()
    here = there.is_dir() or base in SHAPES
    hub = not here and _HUB_ID.fullmatch(base) is not None
    require(here or hub, f"{folder}: its base {base} is not here; {cure}")
    require(
        not is_adapter(there) or (there / "config.json").is_file(),
        f"{folder}: its base {base} is an adapter itself; export that first and give the exported folder: "
        "--model.base FOLDER",
    )
    return adapter, replace(cfg, name=base, base=None, sha256=None, revision=revision if hub else None)


_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def find(cfg: ModelConfig) -> Path | None:
    """Return the folder that a name means, whatever is in it; otherwise as `locate`."""
    shape, random = SHAPES.get(cfg.name), cfg.init == "random"
    if cfg.name == AUTO_MODEL:  # decided when the run begins, see `hub`
        return None
    require(
        not (random and cfg.sha256), "model.sha256 is of weights that are read; leave it out with model.init=random"
    )
    if shape is not None:
        require(cfg.revision is None, f"model.revision={cfg.revision} belongs to a hub id, not to the shape {cfg.name}")
        cure = f"model.name={shape.hub_id} or model.init=random" if shape.hub_id else "model.init=random"
        folder = SHIPPED / cfg.name
        require(random or folder.is_dir(), f"model.name={cfg.name} is a bare shape, without weights; use {cure}")
        return folder
    folder = Path(cfg.name).expanduser()
    if folder.is_dir():
        require(
            cfg.revision is None or cfg.base is not None,
            f"model.revision={cfg.revision} belongs to a hub id, not to the folder {cfg.name}",
        )
        return folder
    if not _HUB_ID.fullmatch(cfg.name):
        near = difflib.get_close_matches(cfg.name, SHAPES, 1)
        hint = f"did you mean {near[0]}?" if near else f"the shapes are {', '.join(SHAPES)}"
        raise ConfigError(f"model.name={cfg.name} is no folder, no hub id (owner/name) and no shape; {hint}")
    return None


def shape_of(cfg: ModelConfig) -> EsmShape | None:
    """Return the shape of the model of a run, cut off after `model.layers`; None where it is not known here."""
    shape = known_shape(cfg.base or cfg.name)
    if shape is None or not isinstance(cfg.layers, int):
        return shape
    return replace(shape, layers=check_layers(cfg.layers, shape.layers, cfg.name))


def check_layers(layers: int, there: int, name: str) -> int:
    """Return `model.layers`. Raise ConfigError where it is more than are there."""
    require(layers <= there, f"model.layers={layers}: {name} has {there} layers; use 1 to {there}, or all")
    return layers


def known_shape(model: str) -> EsmShape | None:
    """Return the shape of a model: a name here, the hub id of a released ESM-2 or a local folder; None for another."""
    by_name = {**SHAPES, **{shape.hub_id: shape for shape in SHAPES.values() if shape.hub_id}}
    by_name[AUTO_MODEL] = SHAPES["esm2_t6_8M"]
    if model in by_name or not Path(model).is_dir():
        return by_name.get(model)
    if is_adapter(Path(model)) and not (Path(model) / "config.json").is_file():
        base = read_adapter_folder(Path(model)).base or ""
        return None if is_adapter(Path(base)) and not (Path(base) / "config.json").is_file() else known_shape(base)
    from esm_neuron.models.weights import read_config  # imports torch, which the names do without

    return EsmShape.of(read_config(Path(model)))


def esm_config(shape: EsmShape, **fields: Any) -> EsmConfig:
    """Return the configuration that the hub's ESM-2 of this shape has in its config.json, but for `fields`."""
    from esm_neuron.compat import EsmConfig  # imports torch

    values: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "mask_token_id": MASK_TOKEN,
        "pad_token_id": PAD_TOKEN,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "token_dropout": True,
        # fields of the hub's files that transformers 5 does not declare, and keeps as they are
        "hidden_act": "gelu",
        "classifier_dropout": None,
    }
    return EsmConfig(**{**values, **fields})
