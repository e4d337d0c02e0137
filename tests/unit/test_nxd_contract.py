"""Our calls of neuronx_distributed against the signatures that `make test-nxd` wrote from the real package."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def vendor_calls() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "nxd" / "vendor_calls.py"
    spec = importlib.util.spec_from_file_location("vendor_calls", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_call_fits_its_signature(vendor_calls: ModuleType) -> None:
    contract = json.loads(vendor_calls.CONTRACT.read_text(encoding="utf-8"))
    calls = vendor_calls.vendor_calls()
    assert vendor_calls.misfits(calls, contract) == []
    assert set(contract) == set(calls), "run make test-nxd, which rewrites the contract"
    layers = "neuronx_distributed.parallel_layers.layers"
    assert {f"{layers}.ColumnParallelLinear", f"{layers}.RowParallelLinear"} < set(calls)


def test_a_call_that_does_not_fit_is_found(vendor_calls: ModuleType) -> None:
    source = "def f(self):\n    grads = self._nxd.grads\n    more = {'size': 1}\n    grads.reduce(1, 2, **more)\n"
    calls = vendor_calls.vendor_calls(source)
    name = "neuronx_distributed.grads.reduce"
    assert list(calls) == [name]
    assert vendor_calls.misfits(calls, {name: ["a", "b", "size"]}) == []
    assert vendor_calls.misfits(calls, {name: ["a", "b"]}) == [f"line 4: {name} takes ['a', 'b'], not ['size']"]
    assert vendor_calls.misfits(calls, {name: ["size"]}) == [f"line 4: {name} takes ['size'], not 2"]
    assert vendor_calls.misfits(calls, {}) == [f"{name} is not in contract.json"]


def test_peft_still_has_the_private_door_that_neuron_lora_enters_by() -> None:
    from peft import LoraConfig

    config = LoraConfig()
    config._register_custom_module({int: str})
    assert config._custom_modules == {int: str}
