"""transformers' and PEFT's common tests, on our pooled classes and exports and on EsmForSequenceClassification.

Their tests come from their source archives, in the folder that PEERS names: `tools/peers.py` fetches them and runs this
file. What a test of theirs imports from folders that an archive leaves out (generation, exporters) is stood in for.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import tempfile
import unittest
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.finished import finish
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, EsmForSequenceClassification

from esm_neuron.compat import EsmConfig
from esm_neuron.inference.export import export
from esm_neuron.models.esm2 import PackedForPooledClassification, PackedForSequenceClassification, PooledEsmConfig
from esm_neuron.models.shapes import SHAPES, esm_config

FOLDER = Path(os.environ["PEERS"])
sys.path.append(str(FOLDER / "packages"))


class Absent(ModuleType):
    """A module that is not there; whatever is asked of it is an empty class."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def theirs(library: str, name: str) -> Any:
    """A module of a library's tests."""
    package = ModuleType(f"{library}_tests")
    package.__path__ = [str(FOLDER / f"{library}-{version(library)}" / "tests")]
    sys.modules.setdefault(package.__name__, package)
    while True:
        try:
            return importlib.import_module(f"{package.__name__}.{name}")
        except ModuleNotFoundError as error:
            sys.modules[str(error.name)] = Absent(str(error.name))


def inputs() -> dict[str, torch.Tensor]:
    """Three proteins of seven residues."""
    ids = torch.randint(4, 24, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 0, 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def config_of(pooling: str) -> EsmConfig:
    kind = EsmConfig if pooling in ("control", "cls") else PooledEsmConfig
    values = esm_config(SHAPES["tiny"]).to_dict() | {"pooling": "cls" if pooling == "control" else pooling}
    values.pop("model_type", None)
    return kind.from_dict(values)


class Model:
    """What transformers' mixin asks for inputs and sizes."""

    batch_size, seq_length, is_training = 3, 9, True

    def __init__(self, pooling: str) -> None:
        shape = SHAPES["tiny"]
        self.pooling, self.hidden_size = pooling, shape.hidden
        self.num_hidden_layers, self.num_attention_heads = shape.layers, shape.heads

    def get_config(self) -> EsmConfig:
        return config_of(self.pooling)

    def prepare_config_and_inputs_for_common(self) -> tuple[EsmConfig, dict[str, torch.Tensor]]:
        return self.get_config(), inputs()


CLASSES = {
    "control": EsmForSequenceClassification,
    "cls": PackedForSequenceClassification,
    "mean": PackedForPooledClassification,
    "attention": PackedForPooledClassification,
}


def in_transformers(pooling: str) -> type:
    """transformers' tests of a model, for one class."""
    common = theirs("transformers", "test_modeling_common").ModelTesterMixin

    class Common(common, unittest.TestCase):
        all_model_classes = (CLASSES[pooling],)
        all_generative_model_classes = ()
        test_mismatched_shapes = False

        def setUp(self) -> None:
            torch.manual_seed(0)
            self.model_tester = Model(pooling)

        def _prepare_for_class(self, inputs_dict: Any, model_class: type, return_labels: bool = False) -> Any:
            # labels are given by the name of the class
            return super()._prepare_for_class(inputs_dict, EsmForSequenceClassification, return_labels)

    return Common


TestControl, TestCls, TestMean, TestAttention = map(in_transformers, CLASSES)

PEFT = theirs("peft", "testing_common").PeftCommonTester
TAKEN = ["self", "model_id", "config_cls", "config_kwargs"]
METHODS = [
    name
    for name, method in inspect.getmembers(PEFT, inspect.isfunction)
    if name.startswith("_test") and list(inspect.signature(method).parameters)[:4] == TAKEN
    if all(p.default is not p.empty for p in list(inspect.signature(method).parameters.values())[4:])
    if "generate" not in name
]
EXPORTS = tempfile.TemporaryDirectory(prefix="esm-neuron-peers-")


def exported(kind: str) -> str:
    """The folder of a model: transformers' own, or our export of a run."""
    folder = Path(EXPORTS.name) / kind
    if not folder.exists() and kind == "control":
        EsmForSequenceClassification(config_of(kind)).save_pretrained(folder)
    elif not folder.exists():
        run = finish(Path(EXPORTS.name) / f"{kind}-run", kind, "lora")
        export(run.out, folder)
    return str(folder)


class TestPeft(PEFT):
    transformers_class = AutoModelForSequenceClassification
    torch_device = "cpu"

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        return inputs()

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("kind", ["control", "cls", "mean", "attention"])
    def test_common(self, method: str, kind: str) -> None:
        # drawn, so that an adapter changes the answers before it is trained
        drawn = {"init_lora_weights": False}
        lora = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 4, "lora_alpha": 8, **drawn}
        torch.manual_seed(0)
        getattr(self, method)(exported(kind), LoraConfig, lora)
