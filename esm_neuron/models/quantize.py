"""Frozen linears kept in 4 or 8 bits: QLoRA (arXiv:2305.14314) and 8-bit LoRA (weights as in arXiv:2208.07339).

bitsandbytes quantizes and restores, on CUDA and on the CPU; its own linears are not used. Its 4-bit one repacks the
weights for good on a CPU with AVX512-BF16 as soon as it predicts, after which gradients no longer flow; its 8-bit
one rounds activations too, and differently in training and in evaluation. Here a weight is made whole for each product,
forward and backward, and what is kept never changes.
"""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esm_neuron.compat import hidden
from esm_neuron.config import Quantization
from esm_neuron.errors import ConfigError
from esm_neuron.models.tensor_parallel import PLAN, in_block

logger = logging.getLogger(__name__)

_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 levels of NormalFloat (arXiv:2305.14314, appendix E)."""
_BLOCK = 64
"""Weights that share a scale."""

_trusted: dict[tuple[Any, ...], bool] = {}
"""(class, weight shape, type, device) -> whether bitsandbytes restores such weights rightly in this process."""


def bitsandbytes(module: str, needed_by: str, instead: str) -> Any:
    """Import a module of bitsandbytes, which nothing but 8-bit and 4-bit training should do.

    At its first import on a CPU with AVX512-BF16, bitsandbytes downloads and runs code from the Hugging Face hub if the
    package `kernels` is installed, and warns on stderr if it is not. Neither is wanted: the kernel is never used here.
    `needed_by` and `instead` are settings for the message where it is not installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        with hidden("kernels"):
            return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{needed_by} needs bitsandbytes ({error}); pip install 'esm-neuron[cuda]', or use {instead}"
        ) from error


class QuantizedLinear(nn.Linear):
    """A frozen linear on meta until `receive` gives it a weight, which it keeps quantized."""

    def __init__(self, linear: nn.Linear, compute: torch.dtype, device: torch.device) -> None:
        """Take the place of `linear`; products are in `compute`, on `device`."""
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.requires_grad_(False)
        self.compute, self.place, self.trusted = compute, device, True

    def receive(self, weight: Tensor) -> None:
        """Keep `weight`, float [outputs, inputs], quantized; its float form is not held."""
        weight = weight.to(self.place)
        self.weight = nn.Parameter(self.quantized(weight), requires_grad=False)
        self._check_quantized(weight)
        self.trusted = self._restores_rightly(self.compute) and self._restores_rightly(torch.float32)

    def _check_quantized(self, weight: Tensor) -> None:
        key = (type(self), "quantize", *self.weight_shape, weight.dtype, self.place.type)
        if key not in _trusted:
            _trusted[key] = bool(((self.reference() - weight.float()).abs() <= self.rounding(weight)).all())
        if not _trusted[key]:
            raise ConfigError(
                f"bitsandbytes {version('bitsandbytes')} quantizes a weight of {list(weight.shape)} wrongly on this "
                f"{self.place.type}; use adapter.kind=lora with loop.precision=bf16"
            )

    def _restores_rightly(self, dtype: torch.dtype) -> bool:
        """Compare what bitsandbytes restores with `reference`, once per shape and process; warn where it is wrong.

        Kernels differ by processor: that of 0.50.2 for AVX512-BF16 takes the scales of other rows where 64 does not
        divide the width.
        """
        key = (type(self), "restore", *self.weight_shape, dtype, self.place.type)
        if key not in _trusted:
            reference, restored = self.reference(), self.restored(dtype)
            allowed = 2 * torch.finfo(dtype).eps * float(reference.abs().max())
            error = float((restored.float() - reference).abs().max())
            _trusted[key] = error <= allowed
            if not _trusted[key]:
                logger.warning(
                    "bitsandbytes %s restores %s weights of %d x %d wrongly on this %s (error %.2g, rounding %.2g); "
                    "torch restores them instead, which is slower",
                    version("bitsandbytes"), type(self).__name__, *self.weight_shape, self.place.type, error, allowed,
                )  # fmt: skip
        return _trusted[key]

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [outputs, inputs] that the integers and scales stand for."""
        return self.restored(dtype) if self.trusted else self.reference().to(dtype)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @abstractmethod
    def quantized(self, weight: Tensor) -> Tensor:
        """Return the integers to keep; put the scales aside in the module."""

    @abstractmethod
    def restored(self, dtype: torch.dtype) -> Tensor:
        """Restore the weight by bitsandbytes."""

    @abstractmethod
    def reference(self) -> Tensor:
        """Restore the weight, float32, by torch alone, as the papers define it."""

    @abstractmethod
    def rounding(self, weight: Tensor) -> Tensor:
        """Return how far a restored weight may be from `weight`: half the widest gap between levels, per weight."""

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
        packed, self._state = _functional().quantize_4bit(_blocks(weight), compress_statistics=True, quant_type="nf4")
        return packed

    def restored(self, dtype: torch.dtype) -> Tensor:
        import bitsandbytes.functional as bnb

        # On a copy, since the type is a field of the state: restoring in another one must leave the kept state as it
        # is.
        state = copy.copy(self._state)
        state.dtype = dtype
        return self._unblocked(bnb.dequantize_4bit(self.weight, state))

    def reference(self) -> Tensor:
        packed, state = self.weight.flatten(), self._state
        levels = torch.tensor(_LEVELS, device=packed.device)
        # Two weights per byte, the first in the upper four bits.
        values = levels[torch.stack((packed >> 4, packed & 15), dim=-1).long()].view(-1, _BLOCK)
        again = state.state2  # how the scales themselves are kept: a level each, and a scale per 256 of them
        scales = again.code[state.absmax.long()] * again.absmax.repeat_interleave(again.blocksize)[: len(state.absmax)]
        return self._unblocked(values * (scales + state.offset).unsqueeze(1))

    def rounding(self, weight: Tensor) -> Tensor:
        # 0.152: half the gap from -1 to -0.696. The rest: scales are kept in 8 bits, relative to the largest of them.
        largest = _blocks(weight.float()).abs().amax(1, keepdim=True)
        return self._unblocked((0.153 * largest + 0.02 * largest.max()).expand(-1, _BLOCK))

    def _unblocked(self, values: Tensor) -> Tensor:
        return values.reshape(-1)[: self.out_features * self.in_features].view(self.weight_shape)

    def _move(self, device: torch.device) -> None:
        if self._state is not None:
            self._state.to(device)


class Int8Linear(QuantizedLinear):
    """Each output's weights in 255 even steps up to the largest of them."""

    _scale: Any = None

    def quantized(self, weight: Tensor) -> Tensor:
        integers, self._scale, _ = _functional().int8_vectorwise_quant(weight.to(torch.float16))
        return integers

    def restored(self, dtype: torch.dtype) -> Tensor:
        import bitsandbytes.functional as bnb

        restored: Tensor = bnb.int8_vectorwise_dequant(self.weight, self._scale)
        return restored.to(dtype)

    def reference(self) -> Tensor:
        return self.weight.float() * (self._scale.view(-1, 1) / 127)

    def rounding(self, weight: Tensor) -> Tensor:
        # half a step, and the rounding of the weight to float16 before it
        largest = weight.float().abs().amax(1, keepdim=True)
        return (largest * (0.5 / 127 + torch.finfo(torch.float16).eps)).expand_as(weight)

    def _move(self, device: torch.device) -> None:
        if self._scale is not None:
            self._scale = self._scale.to(device)


def _functional() -> Any:
    return bitsandbytes("bitsandbytes.functional", "adapter.kind=qlora", "adapter.kind=lora with loop.precision=bf16")


def _blocks(weight: Tensor) -> Tensor:
    """Return [blocks, 64]: the weights one after another, zeros at the end of the last block.

    A row per block: the same bytes as for the whole matrix, and the one width that every kernel restores rightly.
    """
    flat = weight.flatten()
    return F.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)


KINDS: dict[Quantization, type[QuantizedLinear]] = {"nf4": Nf4Linear, "int8": Int8Linear}


def quantize_linears(model: nn.Module, kind: Quantization, compute: torch.dtype, device: torch.device) -> None:
    """Swap the blocks' linears of a `model` on meta for quantized ones, which wait for their weights.

    So the float weights are never there together. Products are in `compute`; quantized weights stay on `device`.
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
