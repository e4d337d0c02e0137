"""A backend is one class and one row: a dummy one, the CPU's under another name, goes through the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from esm_neuron import cli
from esm_neuron.backends.cpu import CpuBackend
from esm_neuron.config import AdapterConfig, ParallelConfig, TrainConfig, settings
from esm_neuron.config.backends import BACKENDS
from esm_neuron.config.rules import check_backend
from esm_neuron.inference.load import move_to
from esm_neuron.models.shapes import SHAPES
from esm_neuron.planning.doctor import lacks
from esm_neuron.planning.memory import predict_memory

TIMES = {"seconds", "residues_per_second", "backend"}
"""What may differ between two results."""


class DummyBackend(CpuBackend):
    """The CPU's backend, which counts its updates."""

    steps = 0

    def step(self, *of: Any) -> Any:
        DummyBackend.steps += 1
        return super().step(*of)


@pytest.fixture(autouse=True)
def one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one row that a new backend needs."""
    row = replace(BACKENDS["cpu"], make=f"{DummyBackend.__module__}:{DummyBackend.__name__}")
    monkeypatch.setitem(BACKENDS, "dummy", row)


def plain(found: Any) -> Any:
    """A result without what the clock and the name decide."""
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items() if key not in TIMES}
    return found


def test_it_trains_evaluates_and_predicts_as_the_cpu_does_to_the_bit(
    toy: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    DummyBackend.steps = 0
    made: dict[str, tuple[Any, ...]] = {}
    for name in ("cpu", "dummy"):
        cfg = toy(f"on-{name}")
        config = tmp_path / f"{name}.yaml"
        config.write_text(settings.dump(cfg))
        assert cli.main(["train", "--config", str(config), "--backend", name]) == 0
        model = ["--model", cfg.output, "--input", str(cfg.data.test)]
        files = [str(tmp_path / f"{name}-{each}") for each in ("metrics.json", "predictions.csv")]
        assert cli.main(["evaluate", *model, "--output", files[0]]) == 0
        assert cli.main(["predict", *model, "--output", files[1]]) == 0
        out = Path(cfg.output)
        assert settings.read_config(out / "config.yaml").backend == name, (
            "evaluate and predict run where it was trained"
        )
        weights = {
            key: value.numpy().tobytes() for key, value in load_file(out / "adapter/adapter_model.safetensors").items()
        }
        result = plain(json.loads((out / "result.json").read_text()))
        made[name] = (weights, result, plain(json.loads(Path(files[0]).read_text())), Path(files[1]).read_bytes())
    assert made["dummy"] == made["cpu"]
    assert DummyBackend.steps == 8


def test_plans_rules_and_doctor_know_it_from_its_row(
    toy: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = toy()
    dummy = replace(cpu, backend="dummy")
    for change in ({}, {"adapter": AdapterConfig(kind="qlora")}, {"parallel": ParallelConfig(fsdp=True)}):
        check_backend(replace(dummy, **change))
    for kind in ("none", "lora"):
        here, there = (replace(cfg, adapter=AdapterConfig(kind=kind)) for cfg in (cpu, dummy))  # type: ignore[arg-type]
        assert predict_memory(there, SHAPES["tiny"], 1) == predict_memory(here, SHAPES["tiny"], 1)
    bf16 = replace(cpu, loop=replace(cpu.loop, precision="bf16"))
    assert replace(move_to("dummy", bf16), backend="cpu") == move_to("cpu", bf16)
    assert lacks("dummy") == lacks("cpu")
