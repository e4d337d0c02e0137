"""Attention on a CPU: both forms give the same, and the choice between them is a rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from esm_neuron.models import cpu_attention

HEADS, WIDTH = 5, 16


def given(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    drawn = [torch.randn(length, HEADS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [tensor.to(dtype).requires_grad_(number < 3) for number, tensor in enumerate(drawn)]


def by_formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("hij,jhd->ihd", torch.einsum("ihd,jhd->hij", query, key).softmax(-1), value)


def answered(function, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Output and the gradients of queries, keys and values, in float64."""
    *inputs, grad = given(length, dtype)
    out = function(*inputs)
    out.backward(grad)
    return [out.detach().double(), *(x.grad.double() for x in inputs)]


def errors(function, length: int, dtype: torch.dtype) -> list[float]:
    exact = answered(by_formula, length, torch.float64)
    return [float((a - b).norm() / b.norm()) for a, b in zip(answered(function, length, dtype), exact, strict=True)]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return cpu_attention.attend(query, key, value, 0.0)


@pytest.mark.parametrize("group", [1, 4 << 20], ids=["a head at a time", "all heads"])
@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
def test_products_give_what_the_formula_gives(length: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "by_products", lambda dtype: True)
    monkeypatch.setattr(cpu_attention, "GROUP", group)
    assert max(errors(attend, length, torch.float64)) < 1e-14
    assert max(errors(attend, length, torch.float32)) < 2e-6


@pytest.mark.parametrize("length", [7, 128, 300])
def test_in_bfloat16_products_are_as_near_as_the_fused_kernel(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for products in (True, False):
        monkeypatch.setattr(cpu_attention, "by_products", lambda dtype, chosen=products: chosen)
        found[products] = errors(attend, length, torch.bfloat16)
    # scores are rounded to 8 bits before the softmax, which the fused kernel keeps in float32
    assert all(mine < 3 * theirs for mine, theirs in zip(found[True], found[False], strict=True))


def test_under_autocast_it_computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "by_products", lambda dtype: dtype == torch.bfloat16)
    *inputs, grad = given(20, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*inputs)
    assert out.dtype == torch.bfloat16
    out.backward(grad)
    assert all(x.grad.dtype == torch.float32 for x in inputs)


def test_dropout_is_left_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_Products", None)
    *inputs, _ = given(20, torch.float32)
    assert cpu_attention.attend(*inputs, 0.5).shape == (20, HEADS, WIDTH)


CPUS = {
    "AVX2": "flags : fpu avx2",
    "AVX-512": "flags : fpu avx2 avx512f avx512_bf16",
    "AMX": "flags : fpu avx2 avx512f avx512_bf16 amx_bf16",
    "Arm": "Features : fp asimd bf16",
    "a Mac": None,
}


@pytest.mark.parametrize("name", CPUS)
def test_the_choice_is_a_rule_of_type_and_processor(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if CPUS[name] is not None:
        cpuinfo.write_text(f"processor : 0\n{CPUS[name]}\n")
    flags = cpu_attention.cpu_flags(cpuinfo)
    monkeypatch.setattr(cpu_attention, "cpu_flags", lambda: flags)
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    assert [cpu_attention.by_products(dtype) for dtype in dtypes] == [False, name == "AVX-512", False]
