"""What is trained: the whole model, the head alone, or LoRA adapters and the head; and a faster LoRA linear.

PEFT makes the adapters. Their first values are drawn here, so that they do not depend on the number of devices, and on
CPU and CUDA their layers get a fused forward and backward pass (`fuse_lora`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import model as peft_lora
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from esm_neuron.config import AdapterConfig, require
from esm_neuron.models.tensor_parallel import Shard
from esm_neuron.models.weights import seeded

Shape = tuple[int, ...]

BLOCK = r"(?:.*\.)?encoder\.layer\.\d+\."
"""A block's name in a transformers ESM-2, whatever wraps the model."""

NEVER_TRAINED = re.compile(r"(?:.*\.)?(contact_head|pooler)\..*")
"""Parts of a transformers ESM-2 that no task here uses; kept for whoever loads the result."""


def adapt(
    model: PreTrainedModel, cfg: AdapterConfig, head: Collection[str], lora_modules: Mapping[type, type]
) -> nn.Module:
    """Freeze what is not trained and add adapters; return the model itself, or a `PeftModel` around it.

    The modules named in `head` belong to the task and are always trained; `lora_modules` as in `Backend`.
    """
    for name, parameter in model.named_parameters():
        in_head = any(name == part or name.startswith(f"{part}.") for part in head)
        parameter.requires_grad_((cfg.kind == "none" or in_head) and not NEVER_TRAINED.fullmatch(name))
    if cfg.kind in ("lora", "qlora"):
        return _add_lora(model, cfg, head, lora_modules)
    require(
        any(p.requires_grad for p in model.parameters()),
        "adapter.kind=head leaves nothing to train: this task has no head of its own; use lora or none",
    )
    return model


def _add_lora(
    model: PreTrainedModel, cfg: AdapterConfig, head: Collection[str], lora_modules: Mapping[type, type]
) -> nn.Module:
    require(bool(cfg.targets), "adapter.targets is empty: name at least one layer, or use adapter.kind=head")
    for target in cfg.targets:
        check_target(model, target)
    pattern = BLOCK + "(?:" + "|".join(re.escape(t) for t in cfg.targets) + ")"
    lora = LoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=pattern,
        modules_to_save=sorted(head) or None,
    )
    if lora_modules:
        lora._register_custom_module(dict(lora_modules))
    # PEFT looks for linears of bitsandbytes, and imports it for that; ours are quantized another way (`quantize`).
    with mock.patch.multiple(peft_lora, is_bnb_available=lambda: False, is_bnb_4bit_available=lambda: False):
        return get_peft_model(model, lora)


def check_target(model: nn.Module, target: str) -> None:
    """Raise ConfigError unless `target` names a linear layer within a block of `model`."""
    linear = re.compile(BLOCK + r"(.+\.)?(query|key|value|dense)")
    known = sorted({re.sub(f"^{BLOCK}", "", n) for n, _ in model.named_modules() if linear.fullmatch(n)})
    require(
        target in known,
        f"adapter.targets: {target!r} is no linear layer of a block; the layers are {', '.join(known)}",
    )


def store_frozen_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen linears to `dtype`; norms, embeddings, whatever is trained or quantized keep their own."""
    # the LM head's decoder is the embedding's own tensor: the cast would reach the embedding through it
    tied = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for module in model.modules():
        keeps = any(p.requires_grad or id(p) in tied for p in module.parameters())
        if isinstance(module, nn.Linear) and module.weight.is_floating_point() and not keeps:
            module.to(dtype)


def draw_lora(
    model: nn.Module,
    seed: int,
    whole: Callable[[str, Shape], Shape],
    part: Callable[[str, Shape], Shard | None],
) -> None:
    """Draw every LoRA `A` from a generator of its own, so that its values depend on the seed and its name alone.

    PEFT draws them one after the other from the global generator, which would tie them to the order of layers and,
    under tensor parallelism, to the sharding. The distribution is PEFT's kaiming_uniform: uniform within
    1 / sqrt(inputs). `whole` gives the shape without tensor parallelism, `part` is `Backend.part`.
    """
    for name, parameter in model.named_parameters():
        if ".lora_A." not in name:
            continue
        shape = whole(name, tuple(parameter.shape))
        generator = seeded(seed, name)
        bound = shape[1] ** -0.5
        # Every rank draws the whole matrix and keeps its part, so the values are those of a run without tp.
        drawn = torch.from_numpy(generator.uniform(-bound, bound, shape).astype(np.float32))
        mine = part(name, shape)
        with torch.no_grad():
            parameter.copy_(drawn if mine is None else mine.read(drawn.__getitem__))


def saved_key(parameter: str) -> str:
    """Return the name in a PEFT adapter file of a trained parameter of a `PeftModel` with the adapter `default`."""
    return parameter.replace(".modules_to_save.default.", ".").replace(".default.", ".")


# A faster LoRA linear for eager devices: y = x W^T + b + s (x A^T) B^T, as in arXiv:2106.09685, with one matmul fewer
# per pass. PEFT computes the second term as a tensor of its own and adds it; here it is accumulated into the first. And
# autograd takes B's gradient as g^T h: with h of 8 columns MKL needs up to ten times as long for it as for (h^T g)^T.


class _LowRank(torch.autograd.Function):
    """x W^T + b + scale * (x A^T) B^T, with W and b frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        # Cast once here and keep the results for the backward pass; autocast would cast in each product.
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
    """PEFT's LoRA layer around a plain, frozen linear, computed by `_LowRank`; any other use of it goes PEFT's way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute [..., outputs] from [..., inputs]."""
        if args or kwargs or self.disable_adapters or self.merged or not self._is_plain():
            whole: Tensor = super().forward(x, *args, **kwargs)
            return whole
        name, base = self.active_adapters[0], self.get_base_layer()
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        out: Tensor = _LowRank.apply(x, base.weight, base.bias, a, b, self.scaling[name])
        return out

    def _is_plain(self) -> bool:
        """Return whether there is one adapter without dropout, bias or variant, and the linear is frozen."""
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
        # Exact types: a quantized linear is an nn.Linear too, but its weight is packed.
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = FusedLoraLinear
