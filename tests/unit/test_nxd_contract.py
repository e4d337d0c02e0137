"""What we use of neuronx_distributed and optimum-neuron against what `make test-nxd` wrote from the real packages."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import parity
import parity_page
import pytest
import torch
import vendor_calls


def test_every_call_fits_its_signature() -> None:
    contract = json.loads(vendor_calls.CONTRACT.read_text(encoding="utf-8"))
    calls = vendor_calls.vendor_calls()
    assert vendor_calls.misfits(calls, contract["calls"]) == []
    assert set(contract["calls"]) == set(calls), "run make test-nxd, which rewrites the contract"
    layers = "neuronx_distributed.parallel_layers.layers"
    assert {f"{layers}.ColumnParallelLinear", f"{layers}.RowParallelLinear"} < set(calls)


def test_every_attribute_and_import_is_there() -> None:
    contract = json.loads(vendor_calls.CONTRACT.read_text(encoding="utf-8"))
    assert set(contract["attributes"]) == vendor_calls.attributes() >= {"max_norm", "grad_norm", "base_optimizer"}
    assert set(contract["names"]) == vendor_calls.imported() != set()
    (lora,) = contract["names"].values()
    linears = {pair.partition(" -> ")[0].rpartition(".")[2] for pair in lora}
    assert {"ColumnParallelLinear", "RowParallelLinear"} <= linears, "optimum-neuron has LoRA layers for our linears"


def test_a_call_that_does_not_fit_is_found() -> None:
    source = "def f(self):\n    grads = self._nxd.grads\n    more = {'size': 1}\n    grads.reduce(1, 2, **more)\n"
    calls = vendor_calls.vendor_calls(source)
    name = "neuronx_distributed.grads.reduce"
    assert list(calls) == [name]
    assert vendor_calls.misfits(calls, {name: ["a", "b", "size", "more="]}) == []
    assert vendor_calls.misfits(calls, {name: ["a", "b"]}) == [f"line 4: {name} takes ['a', 'b'], not ['size']"]
    assert vendor_calls.misfits(calls, {name: ["size"]}) == [f"line 4: {name} takes ['size'], not 2"]
    assert vendor_calls.misfits(calls, {name: ["a", "b=", "size=", "d"]}) == [
        f"line 4: {name} takes ['a', 'b=', 'size=', 'd'], not without ['d']"
    ]
    assert vendor_calls.misfits(calls, {}) == [f"{name} is not in contract.json"]


def test_peft_still_has_the_private_door_that_neuron_lora_enters_by() -> None:
    from peft import LoraConfig

    config = LoraConfig()
    config._register_custom_module({int: str})
    assert config._custom_modules == {int: str}


@pytest.mark.parametrize("name", [f"esm_neuron/{parity_page.ENGINE[-1]}", "tests/helpers/device_run.py"])
def test_a_page_whose_sources_have_changed_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(parity_page.ROOT / "esm_neuron", tmp_path / "esm_neuron")
    for folder in ("nxd", "helpers"):
        shutil.copytree(parity.HERE.parent / folder, tmp_path / "tests" / folder)
    (tmp_path / "docs" / "dev").mkdir(parents=True)
    monkeypatch.setattr(parity_page, "ROOT", tmp_path)
    lines = [f"{file} is missing; run make parity NXD_SRC=<folder of {version}> PAGE={file}"
             for file, version in parity_page.PAGES.items()]  # fmt: skip
    assert parity_page.stale() == lines
    for file in parity_page.PAGES:
        page = parity_page.page("0.15", {("xla", "cls"): dict.fromkeys(parity.KINDS, 0.0)}, ["- a fact"])
        (tmp_path / file).write_text(page)
    assert parity_page.stale() == []
    with (tmp_path / name).open("a") as source:
        source.write('\n# a remark\n"""And another."""\n')
    assert parity_page.stale() == []
    with (tmp_path / name).open("a") as source:
        source.write("AHEAD = 3\n")
    changed = [line.replace("is missing", "was made from other sources than these") for line in lines]
    assert parity_page.stale() == changed


def test_a_list_of_sources_that_names_no_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_page, "ENGINE", ("trainer.py",))
    with pytest.raises(FileNotFoundError, match=r"esm_neuron/trainer\.py: there is no such file"):
        parity_page.digest()


def test_a_value_that_is_no_number_is_no_small_difference() -> None:
    good = {"logits/": torch.ones(2), "gradient/w": torch.ones(3)}
    assert parity.differences(good, good)["logits"] == (0.0, "logits/")
    for spoiled in good:
        with pytest.raises(AssertionError, match="no number"):
            parity.differences({**good, spoiled: good[spoiled] * math.nan}, good)
