"""PEFT's LoRA layer with one product less each way and none that a CPU's library is slow at: for eager devices.

y = x W^T + b + s (x A^T) B^T, as in arXiv:2106.09685. PEFT adds the second term to the first as a tensor of its own,
and autograd takes B's gradient as g^T h: with h of 8 columns MKL needs up to ten times as long for it as for (h^T g)^T.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _LowRank(torch.autograd.Function):
    """The linear and its adapter, of a frozen W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            rows, w, down, up = x.flatten(0, -2).to(dtype), weight.to(dtype), a.to(dtype), b.to(dtype)
            hidden = rows @ down.t()
            out = F.linear(rows, w, None if bias is None else bias.to(dtype))
            out.addmm_(hidden, up.t(), alpha=scale)
        ctx.save_for_backward(rows, w, down, up, hidden)
        ctx.shape, ctx.dtypes, ctx.scale = x.shape, (x.dtype, a.dtype, b.dtype), scale
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, w, down, up, hidden = ctx.saved_tensors
        kinds = ctx.dtypes
        g = grad.flatten(0, -2)
        inner = (g @ up.t().contiguous().t()).mul_(ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.addmm(g @ w, inner, down).view(ctx.shape).to(kinds[0])
        of_a = (inner.t() @ rows).to(kinds[1])
        of_b = (hidden.t() @ g).mul_(ctx.scale).t().to(kinds[2])
        return of_x, None, None, of_a, of_b, None


class FusedLoraLinear(LoraLinear):
    """A LoRA layer around a plain, frozen linear. Whatever else PEFT can do with one goes its own way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., inputs] in, [..., outputs] out."""
        if args or kwargs or self.disable_adapters or self.merged or not self._is_plain():
            whole: Tensor = super().forward(x, *args, **kwargs)
            return whole
        name, base = self.active_adapters[0], self.get_base_layer()
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        out: Tensor = _LowRank.apply(x, base.weight, base.bias, a, b, self.scaling[name])
        return out

    def _is_plain(self) -> bool:
        """Whether there is one adapter without dropout, bias or variant, and nothing of the linear is trained."""
        if len(self.active_adapters) != 1 or (name := self.active_adapters[0]) not in self.lora_A:
            return False
        dropout = self.lora_dropout[name]
        return (
            name not in self.lora_variant
            and self.lora_B[name].bias is None
            and (isinstance(dropout, nn.Identity) or not dropout.training)
            and not any(parameter.requires_grad for parameter in self.get_base_layer().parameters())
        )


def fuse_lora(model: nn.Module) -> None:
    """Give the LoRA layers of `model` around plain linears their fused class, in place; parameters stay as they are."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = FusedLoraLinear
