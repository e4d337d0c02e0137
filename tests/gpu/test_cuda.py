"""The cuda backend trains, resumes and answers as the cpu backend does; `make test-gpu`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esm_neuron import run
from esm_neuron.config import TrainConfig

Toy = Callable[..., TrainConfig]

pytestmark = pytest.mark.gpu


def lines(cfg: TrainConfig) -> list[dict[str, Any]]:
    text = (Path(cfg.output) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "split" not in line]


def losses(cfg: TrainConfig) -> list[float]:
    run.train(cfg, str)
    return [line["loss"] for line in lines(cfg)]


@pytest.mark.parametrize("kind", ["none", "lora", "qlora"])
def test_losses_are_those_of_the_cpu(toy: Toy, kind: str) -> None:
    cpu = toy("cpu", adapter={"kind": kind})
    cuda = replace(toy("cuda", adapter={"kind": kind}), backend="cuda")
    assert losses(cuda) == pytest.approx(losses(cpu), rel=1e-2 if kind == "qlora" else 1e-4)
    assert all(line["peak_memory_gb"] > 0 for line in lines(cuda))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["none", "qlora"])
def test_it_learns_with_8_bit_moments_and_recomputed_blocks(toy: Toy, kind: str, precision: str) -> None:
    cfg = toy(
        adapter={"kind": kind},
        optim={"lr": 1e-2, "kind": "adamw8bit"},
        model={"gradient_checkpointing": True},
        loop={"max_steps": 40, "precision": precision},
    )
    seen = losses(replace(cfg, backend="cuda"))
    assert sum(seen[:4]) / 4 > 0.6 > 0.4 > sum(seen[-4:]) / 4


def test_compiled_blocks_and_tf32_compute_the_same(toy: Toy) -> None:
    plain = replace(toy("plain"), backend="cuda")
    fast = replace(toy("fast", loop={"torch_compile": True, "tf32": True}), backend="cuda")
    assert losses(fast) == pytest.approx(losses(plain), rel=2e-2)
