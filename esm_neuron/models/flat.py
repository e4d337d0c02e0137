"""What a LoRA run trains as a few float32 vectors, so that an update is a few operations whatever the model's depth.

A vector holds one group of parameters end to end. Its modules keep their names; each pass gives them slices of it, and
collects the slices' gradients. Checkpoints and adapters hold tensors by name, as without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slice:
    """One parameter's place in its vector."""

    name: str
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()


class FlatVectors(nn.Module):
    """The trained parameters of a model, which are no longer parameters of their modules."""

    def __init__(
        self, model: nn.Module, groups: Iterable[Mapping[str, Any]], shared: Callable[[str, Tensor], bool]
    ) -> None:
        """Join each of `groups` (`params` and their `names`) and take them from `model`.

        In a vector, parameters that the tensor-parallel ranks have in common (`shared`) come after all others.
        """
        super().__init__()
        self.slices: list[list[Slice]] = []
        self.cut: list[int] = []
        """By vector: how many of its values this tensor-parallel rank alone has; they come first."""
        vectors = []
        for group in groups:
            named = list(zip(group["names"], group["params"], strict=True))
            common = {name: shared(name, parameter) for name, parameter in named}
            named.sort(key=lambda pair: common[pair[0]])
            self.cut.append(sum(parameter.numel() for name, parameter in named if not common[name]))
            vectors.append(nn.Parameter(torch.cat([parameter.detach().float().flatten() for _, parameter in named])))
            self.slices.append([_take(model, name) for name, _ in named])
        self.vectors = nn.ParameterList(vectors)

    def hand_out(self, *_: Any) -> None:
        """Give every module its slice, a leaf of the pass to come."""
        for vector, slices in zip(self.vectors, self.slices, strict=True):
            parts = vector.detach().split([piece.size for piece in slices])
            for piece, part in zip(slices, parts, strict=True):
                leaf = part.view(piece.shape).requires_grad_(torch.is_grad_enabled())
                piece.module.__dict__[piece.attribute] = leaf

    def take_back(self, *_: Any) -> None:
        """Take the slices back after a pass without gradients: as long as they live, they are results of its graph."""
        if not torch.is_grad_enabled():
            for piece in (piece for slices in self.slices for piece in slices):
                piece.module.__dict__.pop(piece.attribute, None)

    def collect(self) -> None:
        """Add the slices' gradients to their vectors' after a backward pass, and take the slices back."""
        for vector, slices in zip(self.vectors, self.slices, strict=True):
            leaves = [piece.module.__dict__.pop(piece.attribute) for piece in slices]
            grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            if vector.grad is None:
                raise RuntimeError(
                    "a vector of trained values has no gradient buffer: Backend.optimizer was not called"
                )
            vector.grad += torch.cat([grad.flatten() for grad in grads])

    def by_name(self, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return views of tensors laid out as the vectors are."""
        found: dict[str, Tensor] = {}
        for vector, slices in zip(vectors, self.slices, strict=True):
            parts = vector.split([piece.size for piece in slices])
            found |= {piece.name: part.view(piece.shape) for piece, part in zip(slices, parts, strict=True)}
        return found


def flatten(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], shared: Callable[[str, Tensor], bool]
) -> list[dict[str, Any]]:
    """Make the trained parameters of `groups` vectors of `model`, in place; return the groups of these instead."""
    flat = FlatVectors(model, groups, shared)
    model.add_module("flat", flat)
    model.register_forward_pre_hook(flat.hand_out)
    model.register_forward_hook(flat.take_back)
    return [
        {**group, "params": [vector], "names": [f"flat.vectors.{number}"]}
        for number, (group, vector) in enumerate(zip(groups, flat.vectors, strict=True))
    ]


def flat_of(model: nn.Module) -> FlatVectors | None:
    """Return the vectors of a model that `flatten` has changed, None for any other."""
    flat = model._modules.get("flat")
    return flat if isinstance(flat, FlatVectors) else None


def _take(model: nn.Module, name: str) -> Slice:
    """Make a parameter no parameter of its module."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    shape = tuple(getattr(module, attribute).shape)
    module._parameters[attribute] = None
    return Slice(name, module, attribute, shape)
