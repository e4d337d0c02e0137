"""How each linear of an ESM block is cut over tensor-parallel ranks: one table, read by NxD and by torch_xla SPMD.

From the table follows what one rank holds of each parameter (`shard_of`), and how the parts are joined (`join`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from esm_neuron.config.deferred import module
from esm_neuron.errors import ConfigError

if TYPE_CHECKING:
    import torch
else:
    torch = module("torch")

Style = Literal["column", "row"]
"""`column`: cut along the outputs (weight dimension 0, and the bias); the outputs stay cut.
`row`: cut along the inputs (weight dimension 1); the outputs are summed over ranks, then the whole bias is added."""

PLAN: dict[str, Style] = {
    "attention.self.query": "column",
    "attention.self.key": "column",
    "attention.self.value": "column",
    "attention.output.dense": "row",
    "intermediate.dense": "column",
    "output.dense": "row",
}
"""Linear within a block -> style. Everything else (embedding, norms, heads, LM head: 33 tokens) is replicated."""

HEADED = frozenset({"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"})
"""Linears whose cut dimension is attention heads times head width, so that head padding concerns them."""

_DIM: dict[Style, dict[str, int]] = {
    "column": {"weight": 0, "bias": 0, "lora_B": 0},
    "row": {"weight": 1, "lora_A": 1},
}
"""Style -> parameter of the linear -> dimension that is cut; what is not here is replicated."""

BLOCKS = "encoder.layer."
"""What stands before a block's number in Hugging Face's parameter names."""

Index = tuple[slice, ...]
"""One slice per dimension of the whole parameter: what `WeightSource.read` takes."""


def in_block(module: str) -> str | None:
    """Return a module's name in its block: "esm.encoder.layer.3.output.dense" -> "output.dense"; None outside."""
    _, found, rest = module.partition(BLOCKS)
    number, dot, name = rest.partition(".")
    return name if found and dot and number.isdigit() else None


def block_of(module: str) -> int | None:
    """Return the number of the block that a module or parameter is in; None outside."""
    number = module.partition(BLOCKS)[2].partition(".")[0]
    return int(number) if number.isdigit() else None


def padded_heads(heads: int, tp: int) -> int:
    """Return the least number of heads that `tp` divides: 20 -> 24 at tp 8, 20 -> 32 at 16, 40 -> 64 at 32."""
    return -(-heads // tp) * tp


@dataclass(frozen=True)
class Cut:
    """How one parameter is cut over the ranks of a tensor-parallel group."""

    dim: int | None
    """The dimension that is cut; None: every rank holds the whole."""
    padded: int
    """Length of that dimension with zero heads appended (the plain length without padding); 0 when `dim` is None."""


@dataclass(frozen=True)
class Shard:
    """The part of one rank: what to read of the whole, and how large the part is with its zeros."""

    index: Index
    """Slices of the whole parameter that exist in a checkpoint."""
    shape: tuple[int, ...]
    """Shape of the rank's part. Where `index` covers less, the rest, at the end, is zero heads."""

    def read(self, read: Callable[[Index], torch.Tensor]) -> torch.Tensor:
        """Return the rank's part [`shape`], zero heads appended; `read` is not called where all of it is zeros."""
        real = tuple(cut.stop - cut.start for cut in self.index)
        if real == self.shape:
            return read(self.index)
        if 0 in real:
            return torch.zeros(self.shape)
        piece = read(self.index)
        part = piece.new_zeros(self.shape)
        part[tuple(slice(0, length) for length in real)] = piece
        return part


def cut_of(parameter: str, shape: Sequence[int], heads: int, tp: int) -> Cut:
    """Return how the parameter of this full name, with or without PEFT's wrapping, is cut.

    `shape` is the whole parameter's, and `heads` the model's; both without zero heads.
    """
    linear, dim = _parse(parameter)
    if dim is None:
        return Cut(None, 0)
    length = shape[dim]
    if linear in HEADED:
        length = padded_heads(heads, tp) * (length // heads)
    if length % tp:
        raise ConfigError(f"tp={tp} does not divide dimension {dim} of {parameter}, {length} long; use a smaller tp")
    return Cut(dim, length)


def shard_of(parameter: str, shape: Sequence[int], heads: int, tp: int, tp_rank: int) -> Shard:
    """Return the part of `parameter` that belongs to `tp_rank`; arguments as in `cut_of`."""
    cut = cut_of(parameter, shape, heads, tp)
    index, local = [slice(0, length) for length in shape], list(shape)
    if cut.dim is not None:
        step, most = cut.padded // tp, shape[cut.dim]
        # Zero heads lie at the end and are in no checkpoint: slices stop at the real length, and the last may be empty.
        index[cut.dim] = slice(min(tp_rank * step, most), min((tp_rank + 1) * step, most))
        local[cut.dim] = step
    return Shard(tuple(index), tuple(local))


def whole_shape(parameter: str, local: Sequence[int], heads: int, tp: int) -> tuple[int, ...]:
    """Return the shape of the whole parameter, without zero heads, from that of one rank's part."""
    linear, dim = _parse(parameter)
    shape = list(local)
    if dim is not None:
        shape[dim] *= tp
        if linear in HEADED:
            # Divide first: the padded length is a whole number of heads.
            shape[dim] = shape[dim] // padded_heads(heads, tp) * heads
    return tuple(shape)


def join(parameter: str, parts: Sequence[torch.Tensor], heads: int) -> torch.Tensor:
    """Join the parts of all ranks of one tensor-parallel group, in order, and strip zero heads.

    A parameter that is not cut is taken from the first rank.
    """
    shape = whole_shape(parameter, parts[0].shape, heads, len(parts))
    dim = cut_of(parameter, shape, heads, len(parts)).dim
    return parts[0] if dim is None else torch.cat(list(parts), dim).narrow(dim, 0, shape[dim])


def _parse(parameter: str) -> tuple[str, int | None]:
    """Return linear and cut dimension: `...layer.0.output.dense.lora_A.default.weight` -> ("output.dense", 1)."""
    name = in_block(parameter) or ""
    for linear, style in PLAN.items():
        if name.startswith(linear + "."):
            leaf = name[len(linear) + 1 :].removeprefix("base_layer.").removeprefix("linear.")
            return linear, _DIM[style].get(leaf.split(".")[0])
    return name, None
