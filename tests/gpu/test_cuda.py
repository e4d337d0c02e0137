"""The cuda backend trains, resumes and answers as the cpu backend does; `make test-gpu`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.processes import TORCHRUN, output_of, saved_config
from helpers.runs import losses as logged_losses
from helpers.runs import step_lines
from torch import nn

from esm_neuron.config import TrainConfig
from esm_neuron.files import sha256
from esm_neuron.training import run

Toy = Callable[..., TrainConfig]

pytestmark = pytest.mark.gpu


def losses(cfg: TrainConfig) -> list[float]:
    run.train(cfg, str)
    return logged_losses(cfg)


@pytest.mark.parametrize("kind", ["none", "lora", "qlora"])
def test_losses_are_those_of_the_cpu(toy: Toy, kind: str) -> None:
    cpu = toy("cpu", adapter={"kind": kind})
    cuda = replace(toy("cuda", adapter={"kind": kind}), backend="cuda")
    assert losses(cuda) == pytest.approx(losses(cpu), rel=1e-2 if kind == "qlora" else 1e-4)
    assert all(line["peak_memory_gb"] > 0 for line in step_lines(cuda))


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


@pytest.mark.parametrize("kind", ["none", "lora", "qlora"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bytes(toy: Toy, kind: str) -> None:
    def of(name: str, steps: int) -> TrainConfig:
        return replace(
            toy(name, adapter={"kind": kind}, loop={"max_steps": steps, "eval_every": 4}, checkpoint={"every": 4}),
            backend="cuda",
        )

    whole = of("whole", 8)
    run.train(whole, str)
    again = of("again", 8)
    run.train(again, str)
    saved = Path(again.output) / "checkpoints"
    for file in (saved / "step-00000008").iterdir():
        file.unlink()
    (saved / "step-00000008").rmdir()
    (Path(again.output) / "result.json").unlink()
    said: list[str] = []
    run.train(replace(again, checkpoint=replace(again.checkpoint, resume="auto")), said.append)
    assert any(line.startswith("resumed after step 4") for line in said)
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (Path(cfg.output) / "checkpoints" / "step-00000008" / file for cfg in (whole, again))
        assert sha256(one) == sha256(other), file


@pytest.mark.parametrize(("kind", "fsdp", "precision"), [("lora", False, "fp32"), ("none", True, "fp32"),
                                                         ("lora", True, "bf16")])  # fmt: skip
def test_two_gpus_train_as_one_does(toy: Toy, kind: str, fsdp: bool, precision: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"make test-gpu on a machine with two GPUs or more, this one has {torch.cuda.device_count()}")
    loop = {"packs_per_device": 2, "precision": precision}
    one, two = (replace(toy(name, adapter={"kind": kind}, loop=loop), backend="cuda") for name in ("one", "two"))
    two = replace(two, parallel=replace(two.parallel, fsdp=fsdp))
    output_of([*TORCHRUN, "-m", "esm_neuron.cli", "train", "--config", saved_config(two)])
    both = logged_losses(two)
    assert both == pytest.approx(losses(one), rel=2e-2 if precision == "bf16" else 1e-4)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_weight_quantized_here_is_the_one_that_the_cpu_makes(bits: str) -> None:
    """A run is exported by the CPU's quantization of its base, whatever it was trained on."""
    from esm_neuron.models.quantize import Int8Linear, Nf4Linear  # needs bitsandbytes

    torch.manual_seed(0)
    weight = torch.randn(256, 192) * 0.02
    kind = {"nf4": Nf4Linear, "int8": Int8Linear}[bits]
    held = []
    for device in ("cpu", "cuda"):
        linear = kind(nn.Linear(192, 256, device="meta"), torch.float32, torch.device(device))
        linear.receive(weight)
        held.append(linear.whole(torch.float32).cpu())
    apart = (held[0] - held[1]).norm() / (held[0] - weight).norm()
    assert apart < 0.1, "a few weights at the border of two levels, beside the error of quantization itself"
