"""All that a LoRA run trains as one float32 vector, so that an update is as many operations at any depth of the model.

The vector holds the parameters end to end. Modules and names stay: each pass hands the modules slices of it and then
collects the slices' gradients. Checkpoints and adapters hold tensors by name, as without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slice:
    """One parameter's part of the vector."""

    name: str
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()


class FlatVector(nn.Module):
    """The trained parameters of a model, which are no parameters of their own modules any more."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Mapping[str, Any]], shared: Callable[[str, Tensor], bool]
    ) -> None:
        """Take the parameters of `groups` (`params`, their `names`, `weight_decay`) from `model`.

        `shared` tells of a parameter whether all tensor-parallel ranks hold the same values of it.
        """
        super().__init__()
        rates = sorted({float(group["weight_decay"]) for group in groups}, reverse=True)
        if len(rates) > 1 and rates[1:] != [0.0]:
            raise ValueError(f"weight decay of {rates}: a vector has one, or none, for each of its values")
        self.weight_decay = rates[0]
        parts: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
        for group in groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                parts.setdefault((group["weight_decay"] > 0, shared(name, parameter)), []).append((name, parameter))
        # Decayed values come first, and those that are this rank's alone first and last, so that both are slices.
        order = ((True, False), (True, True), (False, True), (False, False))
        found = [parts.get(kind, []) for kind in order]
        sizes = [sum(parameter.numel() for _, parameter in named) for named in found]
        self.decayed = sizes[0] + sizes[1]
        self.shared = slice(sizes[0], sizes[0] + sizes[1] + sizes[2])
        joined = [pair for named in found for pair in named]
        self.vector = nn.Parameter(torch.cat([parameter.detach().float().flatten() for _, parameter in joined]))
        self.slices = [_take(model, name) for name, _ in joined]

    def hand_out(self, *_: Any) -> None:
        """Give every module its slice, a leaf of the pass to come."""
        for piece, part in zip(self.slices, self._cut(self.vector.detach()), strict=True):
            piece.module.__dict__[piece.attribute] = part.requires_grad_(torch.is_grad_enabled())

    def take_back(self, *_: Any) -> None:
        """Take the slices back after a pass without gradients: as long as they live, they are results of its graph."""
        if not torch.is_grad_enabled():
            for piece in self.slices:
                piece.module.__dict__.pop(piece.attribute, None)

    def collect(self) -> None:
        """Add the slices' gradients to the vector's after a backward pass, and take the slices back."""
        leaves = [piece.module.__dict__.pop(piece.attribute) for piece in self.slices]
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        if self.vector.grad is None:
            raise RuntimeError("the vector of trained values has no gradient buffer: Backend.optimizer was not called")
        self.vector.grad += torch.cat([grad.flatten() for grad in grads])

    @torch.no_grad()
    def decay(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Shrink the decayed values before AdamW's step, as it would do: by 1 - lr * weight_decay."""
        if self.weight_decay:
            keep = 1 - optimizer.param_groups[0]["lr"] * self.weight_decay
            self.vector.copy_(torch.cat((self.vector[: self.decayed] * keep, self.vector[self.decayed :])))

    def squares(self, gradient: Tensor, tp: int) -> Tensor:
        """Return this rank's part of the squared norm over `tp` ranks, to which each adds shared values alike."""
        squares = gradient.square()
        once = squares[self.shared].sum() / tp
        return squares[: self.shared.start].sum() + once + squares[self.shared.stop :].sum()

    def by_name(self, whole: Tensor) -> dict[str, Tensor]:
        """Return the parameters' views of a tensor that is laid out as the vector is."""
        return dict(zip((piece.name for piece in self.slices), self._cut(whole), strict=True))

    def _cut(self, whole: Tensor) -> list[Tensor]:
        parts = whole.split([piece.size for piece in self.slices])
        return [part.view(piece.shape) for piece, part in zip(self.slices, parts, strict=True)]


def flatten(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], shared: Callable[[str, Tensor], bool]
) -> list[dict[str, Any]]:
    """Make the parameters of `groups` one vector of `model`, in place; return the one group that it is.

    Its weight decay is 0, since `FlatVector.decay` has to be the optimizer's hook before a step.
    """
    flat = FlatVector(model, groups, shared)
    model.add_module("flat", flat)
    model.register_forward_pre_hook(flat.hand_out)
    model.register_forward_hook(flat.take_back)
    return [{"params": [flat.vector], "names": ["flat.vector"], "weight_decay": 0.0}]


def flat_of(model: nn.Module) -> FlatVector | None:
    """Return the vector of a model that `flatten` has changed, None for any other."""
    flat = model._modules.get("flat")
    return flat if isinstance(flat, FlatVector) else None


def _take(model: nn.Module, name: str) -> Slice:
    """Make a parameter no parameter of its module."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    shape = tuple(getattr(module, attribute).shape)
    module._parameters[attribute] = None
    return Slice(name, module, attribute, shape)
