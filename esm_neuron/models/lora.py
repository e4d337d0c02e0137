"""What is trained: the whole model, the head alone, or LoRA adapters and the head; and a faster LoRA linear.

PEFT makes the adapters. Their first values are drawn here, so that they do not depend on the number of devices, and
their layers get a fused forward and backward pass. Where graphs are compiled, queries, keys and values are one product.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esm_neuron.compat import LoraConfig, LoraLinear, PreTrainedModel, get_peft_model
from esm_neuron.config import AdapterConfig, require
from esm_neuron.models.esm2 import PackedSelfAttention
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
        cfg.kind != "head" or any(p.requires_grad for p in model.parameters()),
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
    adapted = get_peft_model(model, lora)
    fuse_lora(adapted)
    return adapted


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


# A faster LoRA linear: y = x W^T + b + s (x A^T) B^T, as in arXiv:2106.09685, in one function of autograd and in the
# type of the activations; A and B, kept in float32, are cast once per pass. PEFT's and optimum-neuron's layers compute
# the second term as a tensor of its own, optimum-neuron's in float32, and a block takes twice the operations. And
# autograd takes B's gradient as g^T h: with h of 8 columns MKL needs up to ten times as long for it as for (h^T g)^T.

Sum = Callable[[Tensor], Tensor]


class Sums(NamedTuple):
    """Sums over the tensor-parallel ranks among which a linear is cut; none for a whole one. Styles as in `PLAN`."""

    forward: Sum | None = None
    """`row`, of outputs and rank-r activations: a rank has some of the inputs."""
    backward: Sum | None = None
    """`column`, of the gradients of inputs and rank-r activations: a rank has some of the outputs."""


def _summed(tensor: Tensor, over: Sum | None) -> Tensor:
    return tensor if over is None else over(tensor)


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.flatten(0, -2)  # torch_xla records a reshape to the same shape too


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows if len(shape) == 1 else rows.unflatten(0, shape)


def _compute_type(x: Tensor) -> torch.dtype:
    """Return the type of a linear's product: autocast's where it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _LowRank(torch.autograd.Function):
    """x W^T + b + scale * (d A^T) B^T, with W and b frozen; d is `x` after LoRA's dropout, None where it has none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, base: Any, a: Tensor, b: Tensor, scale: float, sums: Sums
    ) -> Tensor:
        dtype, weight, bias = _compute_type(x), base.weight, base.bias
        # Cast once here and keep the results for the backward pass; autocast would cast in each product.
        with torch.autocast(x.device.type, enabled=False):
            rows, w, down = _rows(x).to(dtype), weight.to(dtype), a.to(dtype)
            up = (b.t() * scale).to(dtype).contiguous()
            kept = rows if dropped is None else _rows(dropped).to(dtype)
            hidden = _summed(kept @ down.t(), sums.forward)
            bias = None if bias is None else bias.to(dtype)
            if sums.forward is None:
                out = F.linear(rows, w, bias)
            else:  # the bias is whole on every rank
                out = sums.forward(F.linear(rows, w))
                out = out if bias is None else out + bias
            out = torch.addmm(out, hidden, up)
        ctx.save_for_backward(kept, w, down, up, hidden)
        ctx.shape, ctx.dtypes, ctx.scale, ctx.sum = x.shape, (x.dtype, a.dtype, b.dtype), scale, sums.backward
        ctx.drops = dropped is not None
        return _shaped(out, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor, Tensor, None, None]:
        kept, w, down, up, hidden = ctx.saved_tensors
        kinds = ctx.dtypes
        g = _rows(grad)
        inner = _summed(g @ up.t(), ctx.sum)
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = _summed(g @ w, ctx.sum)
            if not ctx.drops:
                of_x = torch.addmm(of_x, inner, down)
            of_x = _shaped(of_x, ctx.shape[:-1]).to(kinds[0])
        if ctx.drops and ctx.needs_input_grad[1]:
            of_dropped = _shaped(inner @ down, ctx.shape[:-1]).to(kinds[0])
        of_a = (inner.t() @ kept).to(kinds[1])
        of_b = (hidden.t() @ g).t().to(kinds[2]) * ctx.scale
        return of_x, of_dropped, None, of_a, of_b, None, None


class FusedLora(nn.Module):
    """A LoRA layer around a frozen linear, computed by `_LowRank`; any other use of it goes its own class's way."""

    sums = Sums()
    # what LoRA layers of PEFT and optimum-neuron have
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    scaling: Any
    lora_A: Any  # noqa: N815
    lora_B: Any  # noqa: N815
    lora_dropout: Any
    lora_variant: Any
    get_base_layer: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute [..., outputs] from [..., inputs]."""
        if args or kwargs or not self.is_plain():
            whole: Tensor = super().forward(x, *args, **kwargs)
            return whole
        name = self.active_adapters[0]
        a, b, dropout = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name]
        dropped = dropout(x) if dropout.training and not isinstance(dropout, nn.Identity) else None
        out: Tensor = _LowRank.apply(x, dropped, self.get_base_layer(), a, b, self.scaling[name], self.sums)
        return out

    def is_plain(self) -> bool:
        """Return whether there is one adapter at work, without bias or variant, and the linear is frozen."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        name, base = self.active_adapters[0], self.get_base_layer()
        return (
            name in self.lora_A
            and name not in self.lora_variant
            and self.lora_B[name].bias is None
            and not base.weight.requires_grad
            and not (base.bias is not None and base.bias.requires_grad)
        )


class FusedLoraLinear(FusedLora, LoraLinear):
    """PEFT's LoRA layer around a plain linear."""


def fuse_lora(model: nn.Module) -> None:
    """Give the LoRA layers of `model` around plain linears their fused class, in place; parameters stay as they are."""
    for module in model.modules():
        # Exact types: a quantized linear is an nn.Linear too, but its weight is packed.
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = FusedLoraLinear


# Queries, keys and values as one product: they read the same input. On a device that compiles this spares a fifth of a
# block's operations, and under tensor parallelism four of six sums of the backward pass.


class _LowRankQkv(torch.autograd.Function):
    """`_LowRank` of three linears of one input and one scale, [3, tokens, outputs]; W and b are theirs end to end."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: float, over: Sum | None, *matrices: Tensor
    ) -> Tensor:
        dtype = _compute_type(x)
        with torch.autocast(x.device.type, enabled=False):
            rows, w = _rows(x).to(dtype), weight.to(dtype)
            down = torch.cat(matrices[:3]).to(dtype)
            up = (torch.cat(matrices[3:]) * scale).to(dtype).unflatten(0, (3, -1))
            hidden = _parted(rows @ down.t())
            out = _parted(F.linear(rows, w, bias.to(dtype))) + torch.bmm(hidden, up.transpose(1, 2))
        ctx.save_for_backward(rows, w, down, up, hidden)
        ctx.shape, ctx.dtypes, ctx.scale, ctx.sum = x.shape, (x.dtype, matrices[0].dtype), scale, over
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, w, down, up, hidden = ctx.saved_tensors
        inner = _summed(torch.bmm(g, up).transpose(0, 1).flatten(1), ctx.sum)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _summed(g.transpose(0, 1).flatten(1) @ w, ctx.sum)
            of_x = _shaped(torch.addmm(of_x, inner, down), ctx.shape[:-1]).to(ctx.dtypes[0])
        of_a = (inner.t() @ rows).to(ctx.dtypes[1]).chunk(3)
        of_b = (torch.bmm(g.transpose(1, 2), hidden).to(ctx.dtypes[1]) * ctx.scale).unbind()
        return of_x, None, None, None, None, *of_a, *of_b


def _parted(joined: Tensor) -> Tensor:
    """Return [3, T, N] of [T, 3 N]."""
    return joined.unflatten(1, (3, -1)).transpose(0, 1)


class JoinedBase(nn.Module):
    """Stands in a LoRA layer for the linear that `JoinedQkv` has taken; alone, the layer can compute nothing now."""


class JoinedQkv(nn.Linear):
    """The frozen linears of queries, keys and values end to end; their LoRA matrices stay in the layers they are in."""

    def __init__(self, layers: Sequence[FusedLora]) -> None:
        """Take the weights of the layers' linears out of them."""
        bases = [layer.get_base_layer() for layer in layers]
        weight, bias = (_end_to_end([getattr(base, name).detach() for base in bases]) for name in ("weight", "bias"))
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.weight, self.bias = (nn.Parameter(whole, requires_grad=False) for whole in (weight, bias))
        self.layers = tuple(layers)  # a tuple, so that they are not modules of this one too
        for layer in layers:
            layer.base_layer = JoinedBase()

    def forward(self, x: Tensor) -> Tensor:
        """Compute queries, keys and values, [3, tokens, outputs of each], of `x` [..., inputs]."""
        name = self.layers[0].active_adapters[0]
        scale, over = self.layers[0].scaling[name], self.layers[0].sums.backward
        matrices = [getattr(layer, kind)[name].weight for kind in ("lora_A", "lora_B") for layer in self.layers]
        joined: Tensor = _LowRankQkv.apply(x, self.weight, self.bias, scale, over, *matrices)
        return joined


def lay_qkv_end_to_end(model: nn.Module) -> None:
    """Have weights that are still to be read lie in memory as `join_qkv` needs them, so that it copies none.

    The copies would come one after the other while the originals lie scattered, and leave holes of their size.
    """
    for module in model.modules():
        if isinstance(module, PackedSelfAttention):
            linears = (module.query, module.key, module.value)
            for name in ("weight", "bias"):
                parts = [getattr(linear, name) for linear in linears]
                whole = torch.empty((3, *parts[0].shape), dtype=parts[0].dtype)  # takes no memory until it is written
                for linear, part, place in zip(linears, parts, whole, strict=True):
                    laid = nn.Parameter(place, requires_grad=part.requires_grad)
                    laid.__dict__.update(part.__dict__)  # the marks of parallel layers
                    setattr(linear, name, laid)


def _end_to_end(parts: list[Tensor]) -> Tensor:
    """Return three tensors of one shape as one: a view where `lay_qkv_end_to_end` has laid them so, else a copy."""
    first = parts[0]
    places = [(part.untyped_storage().data_ptr(), part.storage_offset()) for part in parts]
    if places == [(places[0][0], number * first.numel()) for number in range(3)]:
        return first.as_strided((3 * first.shape[0], *first.shape[1:]), first.stride())
    return torch.cat(parts)


def join_qkv(model: nn.Module) -> None:
    """Join queries, keys and values of each block whose three linears are frozen and have like adapters, in place.

    Each layer's LoRA dropout draws a mask of its own, so with dropout they stay apart.
    """
    for module in model.modules():
        if isinstance(module, PackedSelfAttention):
            layers: Any = (module.query, module.key, module.value)
            if all(isinstance(layer, FusedLora) and layer.is_plain() for layer in layers):
                name = layers[0].active_adapters[0]
                if all(isinstance(layer.lora_dropout[name], nn.Identity) for layer in layers):
                    module.qkv = JoinedQkv(layers)
