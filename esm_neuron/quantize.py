"""Frozen linears kept in 4 or 8 bits: QLoRA (arXiv:2305.14314) and 8-bit LoRA (weights as in arXiv:2208.07339).

bitsandbytes quantizes and restores, on CUDA and on the CPU; its own linears are not used. Its 4-bit one repacks the
weights for good on a CPU with AVX512-BF16 as soon as the model answers, after which gradients no longer flow; its 8-bit
one rounds activations too, and differently in training and in evaluation. Here a weight is made whole for each product,
forward and backward, and what is kept never changes.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esm_neuron.config import Quantization
from esm_neuron.errors import ConfigError
from esm_neuron.parallel.plan import PLAN, in_block

try:
    import bitsandbytes.functional as bnb
except ImportError as error:
    raise ConfigError(
        f"adapter.kind=qlora needs bitsandbytes ({error}); pip install -e '.[cuda]', or use adapter.kind=lora "
        "with loop.precision=bf16"
    ) from error


class QuantizedLinear(nn.Linear):
    """A frozen linear on meta until `receive` gives it a weight, which it keeps quantized."""

    def __init__(self, linear: nn.Linear, compute: torch.dtype, device: torch.device) -> None:
        """Take the place of `linear`; products are in `compute`, on `device`."""
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.requires_grad_(False)
        self.compute, self.place = compute, device

    def receive(self, weight: Tensor) -> None:
        """Keep `weight`, float [outputs, inputs], quantized; its float form is not held."""
        self.weight = nn.Parameter(self.quantized(weight.to(self.place)), requires_grad=False)

    @abstractmethod
    def quantized(self, weight: Tensor) -> Tensor:
        """The integers to keep; scales are put aside in the module."""

    @abstractmethod
    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight [outputs, inputs] as the integers and scales have it."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x.to(self.compute), self)
        return product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)
        self._move(self.weight.device)
        return self

    @abstractmethod
    def _move(self, device: torch.device) -> None:
        """Take the scales along."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, compute={self.compute}"


class _Product(torch.autograd.Function):
    """x W^T + b with a weight that exists only while it is used; nothing of `x` is kept, since nothing here learns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.whole(x.dtype), linear.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.linear.whole(grad.dtype), None


class Nf4Linear(QuantizedLinear):
    """Blocks of 64 weights in the 16 levels of NormalFloat; the blocks' scales are quantized again, 256 together."""

    _state: Any = None

    def quantized(self, weight: Tensor) -> Tensor:
        packed, self._state = bnb.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
        return packed

    def whole(self, dtype: torch.dtype) -> Tensor:
        state = copy.copy(self._state)
        state.dtype = dtype
        restored: Tensor = bnb.dequantize_4bit(self.weight, state)
        return restored

    def _move(self, device: torch.device) -> None:
        if self._state is not None:
            self._state.to(device)


class Int8Linear(QuantizedLinear):
    """Each output's weights in 255 even steps up to the largest of them."""

    _scale: Any = None

    def quantized(self, weight: Tensor) -> Tensor:
        integers, self._scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        return integers

    def whole(self, dtype: torch.dtype) -> Tensor:
        restored: Tensor = bnb.int8_vectorwise_dequant(self.weight, self._scale)
        return restored.to(dtype)

    def _move(self, device: torch.device) -> None:
        if self._scale is not None:
            self._scale = self._scale.to(device)


KINDS: dict[Quantization, type[QuantizedLinear]] = {"nf4": Nf4Linear, "int8": Int8Linear}


def quantize_linears(model: nn.Module, kind: Quantization, compute: torch.dtype, device: torch.device) -> None:
    """Swap the linears of the blocks for quantized ones that wait for their weights; the task's head is none of them.

    Args:
        model: on meta, so that the float weights are never there together.
        kind: how weights are kept.
        compute: type of products.
        device: where weights are quantized and stay.
    """
    for name, module in list(model.named_modules()):
        if in_block(name) in PLAN and isinstance(module, nn.Linear):
            _swap(model, name, KINDS[kind](module, compute, device))


def dequantize_linears(model: nn.Module) -> None:
    """Swap quantized linears for plain float32 ones with the same values, in place, one at a time."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.in_features, module.out_features, device="meta").requires_grad_(False)
            linear.weight = nn.Parameter(module.whole(torch.float32), requires_grad=False)
            linear.bias = nn.Parameter(module.bias.float(), requires_grad=False)
            _swap(model, name, linear)


def _swap(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
