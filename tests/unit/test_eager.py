"""What the CPU and CUDA share, and what of the cuda backend needs no GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import packs
from torch import nn
from torch._dynamo.utils import counters

from esm_neuron.backends import create_backend, cuda
from esm_neuron.backends.base import Backend, buckets
from esm_neuron.backends.cuda import paged_adamw8bit
from esm_neuron.config import (
    AdapterConfig,
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from esm_neuron.config.rules import validate
from esm_neuron.errors import ConfigError
from esm_neuron.models.attention import ATTENTIONS, varlen_attention
from esm_neuron.models.esm2 import encoder_of
from esm_neuron.models.shapes import SHAPES
from esm_neuron.tasks import create_task
from esm_neuron.training.build import build_model


def test_gradients_are_summed_in_buckets_that_keep_their_order() -> None:
    tensors = [torch.zeros(n) for n in (3, 1, 9, 2, 2)]
    made = list(buckets(tensors, most=16))
    assert [[t.numel() for t in bucket] for bucket in made] == [[3, 1], [9], [2, 2]]
    assert list(buckets([], most=16)) == []


def test_one_kernel_over_all_segments_is_attention_within_each() -> None:
    torch.manual_seed(0)
    segments = torch.tensor([[0] * 7 + [1] * 5 + [-1] * 4, [0] * 16])
    used = segments >= 0
    inputs = [torch.randn(2, 16, 4, 8, requires_grad=True) for _ in range(3)]
    outputs = {name: ATTENTIONS[name](segments)(*inputs, 0.0)[used] for name in ("segments", "varlen")}
    torch.testing.assert_close(outputs["varlen"], outputs["segments"])
    gradients = {name: torch.autograd.grad(out.square().sum(), inputs) for name, out in outputs.items()}
    torch.testing.assert_close(gradients["varlen"], gradients["segments"], rtol=1e-4, atol=1e-4)


def test_compiled_blocks_compute_the_same_by_few_graphs_whatever_the_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By dynamo and aot_autograd, which decide what is a graph; no compiler of kernels is needed for that.

    More blocks than torch.compile makes graphs of a function, which all blocks therefore have to share. QLoRA has every
    kind of layer: quantized, frozen and trained. Without adapters, `make test-gpu` compares real kernels.
    """
    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["tiny"], layers=10))
    cfg = TrainConfig(
        data=DataConfig(train="train.csv", max_residues=62),
        model=ModelConfig(name="tiny", init="random"),
        adapter=AdapterConfig(kind="qlora", r=4),
    )
    task, backend = create_task(cfg.task, packs.CLASSES), create_backend(cfg)
    model = build_model(cfg, task, backend).model.train()
    encoder = encoder_of(model)
    encoder.attention = cuda.UNCOMPILED
    laid = [
        packs.lay(packs.proteins(False, seed), rows, width)
        for width, seed in ((72, 0), (96, 1))
        for rows in ([[1, 0], [3, 2]], [[4], [1, 3]], [[0, 2, 3], [1]], [[2, 0], [4]], [[3], [0]], [[2, 0, 3], [3, 2]])
    ]

    def learnt(given: dict[str, Any]) -> list[torch.Tensor]:
        model.zero_grad()
        predictions = model(**given).logits
        predictions.square().sum().backward()
        return [predictions.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = [learnt(given) for given in laid]
    torch._dynamo.reset()
    counters.clear()
    for block in encoder.encoder.layer:
        block.compile(backend="aot_eager")
    graphs = []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for given, plain in zip(laid, expected, strict=True):
            torch.testing.assert_close(learnt(given), plain)
            graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[5], "another pack is no other graph"
    assert graphs[6] == graphs[-1] <= 3 * graphs[0], "another length of packs is one, or one for any length"


def test_the_bounds_of_segments_are_those_of_the_rows() -> None:
    """A segment that ends a row and one of the same number that begins the next are two."""
    attend: Any = varlen_attention(torch.tensor([[0, 0, 1], [1, 1, 1], [0, -1, -1]]))
    offsets, shortest, longest = attend.args
    assert offsets.tolist() == [0, 2, 3, 6, 7, 9]
    assert (shortest, longest) == (1, 3)


def test_a_gpu_that_is_not_there_is_an_error_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="backend cuda: .*or use --backend cpu"):
        create_backend(TrainConfig(backend="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert cuda.choose_device(3) == torch.device("cuda", 3)
    with pytest.raises(ConfigError, match="process 4 of this node has no GPU.*at most 4"):
        cuda.choose_device(4)


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"backend": "xla", "parallel": ParallelConfig(fsdp=True)}, "use parallel.tp"),
        (
            {"backend": "cuda", "parallel": ParallelConfig(fsdp=True), "adapter": AdapterConfig(kind="qlora")},
            "use parallel.fsdp=false",
        ),
        ({"optim": OptimConfig(kind="adamw8bit")}, "use optim.kind=adamw"),
        ({"backend": "neuron", "loop": LoopConfig(torch_compile=True)}, "use loop.torch_compile=false"),
        ({"backend": "cpu", "loop": LoopConfig(torch_compile=True)}, "use loop.torch_compile=false"),
        ({"loop": LoopConfig(tf32=True)}, "use loop.tf32=false"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_with_what_it_can(changes: dict[str, Any], cure: str) -> None:
    cfg = replace(TrainConfig(data=DataConfig(train="train.csv")), **changes)
    with pytest.raises(ConfigError, match=cure):
        validate(cfg)


def test_nothing_is_shared_by_one_process() -> None:
    with pytest.raises(ConfigError, match="start several with torchrun"):
        create_backend(TrainConfig(parallel=ParallelConfig(fsdp=True)))


def test_moments_in_8_bits_are_saved_and_put_back() -> None:
    """The small matrix keeps float32 moments, which bitsandbytes can also step on a CPU."""

    def made() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        linear = nn.Linear(8, 4)
        groups = [{"params": list(linear.parameters()), "weight_decay": 0.01}]
        return linear, paged_adamw8bit(groups, OptimConfig(kind="adamw8bit"))

    def step(linear: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        linear.zero_grad()
        linear(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()

    (one, first), (other, second) = made(), made()
    step(one, first)
    backend = Backend(TrainConfig())
    weights, moments = backend.gather_state(one, first)
    assert moments["weight/step"].item() == 1
    backend.load_state(other, second, weights, moments)
    step(one, first)
    step(other, second)
    assert torch.equal(one.weight, other.weight)
    large = nn.Linear(128, 64)
    state = paged_adamw8bit([{"params": [large.weight], "weight_decay": 0.0}], OptimConfig()).state[large.weight]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
