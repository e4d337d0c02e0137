"""How each linear of an ESM block is cut over tensor-parallel ranks: one table, read by NxD and by torch_xla SPMD."""

from __future__ import annotations

from typing import Literal

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

BLOCKS = "encoder.layer."
"""What stands before a block's number in Hugging Face's parameter names."""


def in_block(module: str) -> str | None:
    """Name within its block of a module: "esm.encoder.layer.3.output.dense" -> "output.dense"; None outside blocks."""
    _, found, rest = module.partition(BLOCKS)
    number, dot, name = rest.partition(".")
    return name if found and dot and number.isdigit() else None


def style_of(module: str) -> Style | None:
    """Style of the linear of this full module name; None where it is replicated."""
    name = in_block(module)
    return PLAN.get(name) if name is not None else None


def padded_heads(heads: int, tp: int) -> int:
    """Least number of heads, at least `heads`, that `tp` divides: 20 -> 24 at tp 8, 20 -> 32 at 16, 40 -> 64 at 32."""
    return -(-heads // tp) * tp
