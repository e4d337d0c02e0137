"""Attention of one protein on a CPU: torch's fused kernel, or plain products where they are faster.

The choice depends on the type of the numbers and the processor, never on a measurement, so a run that is resumed on the
same kind of machine goes on to the bit.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of x86's AVX-512 and AMX, and of Arm, in /proc/cpuinfo."""
GROUP = 4 << 20
"""Bytes of scores that are worked on at a time: what stays in a core's share of the cache."""


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Attend with each [L, H, D] of one protein; return [L, H, D]. Queries are scaled already."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = (x.to(dtype).transpose(0, 1) for x in (query, key, value))
    if dropout == 0 and by_products(query.dtype):
        out: Tensor = _Products.apply(query, key, value)
    else:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=1.0).squeeze(0)
    return out.transpose(0, 1)


def by_products(dtype: torch.dtype) -> bool:
    """Return whether this processor attends by plain products: in bfloat16 on AVX512-BF16, 1.1 to 1.9 times as fast.

    In float32 they gained nothing. With AMX the fused kernel has products of its own; that and Arm were not measured.
    """
    return dtype == torch.bfloat16 and "avx512_bf16" in cpu_flags() and "amx_bf16" not in cpu_flags()


@cache
def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return what the processor can do, in the words of /proc/cpuinfo; nothing where there is no such file."""
    if not cpuinfo.exists():
        return frozenset()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return frozenset(flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split())


def has_bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Return whether the processor multiplies bfloat16 itself; None where the system does not say."""
    return bool(cpu_flags(cpuinfo) & BF16_FLAGS) if cpuinfo.exists() else None


class _Products(torch.autograd.Function):
    """softmax(q k^T) v by groups of heads; the backward pass makes the probabilities anew, so none are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        parts = zip(*_groups(query, key, value), strict=True)
        with torch.autocast("cpu", enabled=False):  # it would take the softmax in float32
            return torch.cat([torch.bmm(_probabilities(q, k), v) for q, k, v in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        found = []
        for q, k, v, g in zip(*_groups(*ctx.saved_tensors, grad), strict=True):
            p = _probabilities(q, k)
            of_p = torch.bmm(g, v.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype)
            found.append(
                (
                    torch.bmm(of_scores, k),
                    torch.bmm(of_scores.transpose(1, 2), q),
                    torch.bmm(p.transpose(1, 2), g),
                )
            )
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    return torch.bmm(query, key.transpose(1, 2)).softmax(-1)


def _groups(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut each [H, L, D] into groups of heads whose scores fit GROUP."""
    heads, length, _ = tensors[0].shape
    size = max(1, min(heads, GROUP // (length * length * tensors[0].element_size())))
    return [tensor.split(size) for tensor in tensors]
