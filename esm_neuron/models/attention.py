"""Attention over packs: rotary positions that restart at each segment, and segments that do not see each other.

There are three forms of the same sum. `segments`, for the CPU, attends segment by segment (`cpu_attention`) and never
touches padding or pairs across segments. `varlen`, for CUDA, does so in one call of a kernel for segments of any
length. `masked`, for devices that compile, is one block-diagonal product of a static shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esm_neuron.data.tokenizer import CLS, EOS
from esm_neuron.models import cpu_attention

ROTARY_BASE = 10_000.0
END = 50
"""Residues at each end of a protein that `mean+termini` takes means of: sorting signals sit there."""
APART = -1e9
"""Score of a pair that does not see each other: its exp is 0, and unlike float32's lowest it is finite in bfloat16."""


Angle = tuple[Tensor, Tensor]
"""Cosines, and sines with the sign that each half of a head takes them with; each float32 [..., R, L, 1, D]."""


class RotaryTable(nn.Module):
    """Cosines and sines of every position, in float32 whatever the model is cast to.

    A bfloat16 table is off by up to 1.68 at position 1,022, and transformers' lazy cache makes a second graph of each
    shape on XLA; this one is made once and only moves between devices. Formula: RoFormer, arXiv:2104.09864, eq. 34.
    """

    table: Tensor
    """float32 [positions, 2 D]: cosines for both halves of a head, then sines, those of the first half negative."""

    def __init__(self, head_dim: int, positions: int) -> None:
        super().__init__()
        self._shape = head_dim, positions
        self.register_buffer("table", self._values(), persistent=False)

    def _values(self) -> Tensor:
        head_dim, positions = self._shape
        with torch.device("cpu"):  # real values even while the model around is built on meta
            exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
            angles = torch.outer(torch.arange(positions, dtype=torch.float32), 1.0 / ROTARY_BASE**exponent)
            cos, sin = angles.cos(), angles.sin()
            return torch.cat((cos, cos, -sin, sin), dim=-1)

    def fill(self) -> None:
        """Compute the table again, in place: transformers 5 empties buffers that the folder it loads does not hold."""
        with torch.no_grad():
            self.table.copy_(self._values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        # Follow a move to another device but no cast: `fn` is tried on one row, only to learn the device.
        self.table = self.table.to(fn(self.table[:1]).device)
        return self

    def forward(self, positions: Tensor) -> Angle:
        """Return the angle [R, L, 1, D] of `positions` int64 [R, L]."""
        cos, sin = F.embedding(positions, self.table).unsqueeze(-2).chunk(2, dim=-1)
        return cos, sin


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # The two halves turn like the parts of a complex number, in float32 whatever the type of `x`. They are swapped by
    # two slices and a concatenation: a roll or an index would be a dynamic slice, which Neuron's compiler may refuse.
    whole = x.float()
    left, right = whole.chunk(2, dim=-1)
    return (whole * cos + torch.cat((right, left), dim=-1) * sin).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the rotation back: autograd's own would take three times the memory traffic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # a key's gradient has the layout of its transpose in the scores, and NxD's linears want to view it as a matrix
        return _rotated(grad, cos, -sin).contiguous(), None, None


def rotate(x: Tensor, angle: Angle) -> Tensor:
    """Rotate the halves of `x` [R, L, H, D] by its position's angle, in float32."""
    rotated: Tensor = _Rotation.apply(x, *angle)
    return rotated


class _RotatedHeads(torch.autograd.Function):
    """Queries, keys and values [R H, L, D] of all three, [3, R L, H D]; queries and keys rotated at once."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        packs, _, length, width = cos.shape[1:]
        by_head = joined.view(3, packs, length, -1, width).transpose(2, 3)
        query, key = _rotated(by_head.narrow(0, 0, 2), cos, sin).flatten(0, 2).chunk(2)
        return query, key, by_head.narrow(0, 2, 1).flatten(0, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        packs, _, length, width = cos.shape[1:]
        heads = len(grads[2]) // packs
        both, value = (x.view(-1, packs, heads, length, width) for x in (torch.cat(grads[:2]), grads[2]))
        parts = [
            x.transpose(2, 3).reshape(-1, packs * length, heads * width) for x in (_rotated(both, cos, -sin), value)
        ]
        return torch.cat(parts), None, None


Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(query, key, value, dropout), each [R, L, H, D] with the query already scaled -> [R, L, H, D]."""


@dataclass(frozen=True)
class Pack:
    """What a forward pass knows of its packs; made once and shared by all blocks."""

    membership: Tensor
    """float32 [R, S, L]: 1 where a token belongs to a segment."""
    residues: Tensor
    """float32 [R, S, L]: the same without <cls> and <eos>."""
    first: Tensor
    """float32 [R, S, L]: 1 at the first token (<cls>) of each segment."""
    positions: Tensor
    """int64 [R, L]: position within the segment, from 0 at <cls>."""
    query_angle: Angle
    """Rotation of queries, which also scales them by 1 / sqrt(D) as ESM-2 does before its scores."""
    key_angle: Angle
    """Rotation of keys."""
    attend: Attention

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        segment_ids: Tensor,
        positions: Tensor,
        segments: int,
        rotary: RotaryTable,
        attention: str,
    ) -> Pack:
        """Derive everything from `input_ids`, `segment_ids` and `positions`, each int64 [R, L]."""
        slots = torch.arange(segments, device=segment_ids.device)
        membership = (segment_ids.unsqueeze(1) == slots.view(1, -1, 1)).float()
        residue = ((input_ids != CLS) & (input_ids != EOS)).float().unsqueeze(1)
        cos, sin = rotary(positions)
        scale = cos.shape[-1] ** -0.5
        return cls(
            membership=membership,
            residues=membership * residue,
            first=membership * (positions == 0).float().unsqueeze(1),
            positions=positions,
            query_angle=(cos * scale, sin * scale),
            key_angle=(cos, sin),
            attend=ATTENTIONS[attention](segment_ids),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Packs and their length, (R, L)."""
        return self.membership.shape[0], self.membership.shape[2]

    @cached_property
    def termini(self) -> Tensor:
        """Return float32 [R, 2 S, L]: the first END residues of each segment, then the last END of each."""
        place, count = self.positions.unsqueeze(1), self.residues.sum(-1, keepdim=True)
        return torch.cat((self.residues * (place <= END), self.residues * (place > count - END)), dim=1)

    @cached_property
    def both_angles(self) -> Angle:
        """Rotation of queries and keys at once, [2, R, 1, L, D]."""
        cos, sin = (
            torch.stack(tables).transpose(2, 3) for tables in zip(self.query_angle, self.key_angle, strict=True)
        )
        return cos, sin

    def attend_joined(self, joined: Tensor, dropout: float) -> Tensor:
        """Rotate and attend, with queries, keys and values in one tensor [3, R L, H D], on a device that compiles."""
        masked: Any = self.attend
        attended: Tensor = masked.by_head(*_RotatedHeads.apply(joined, *self.both_angles), dropout)
        return attended


def mean_over(membership: Tensor, hidden: Tensor) -> Tensor:
    """Return float32 [R, S, H]: mean of `hidden` [R, L, H] over the tokens of each segment; 0 for an empty one."""
    # Autocast would round the sum over a segment to bfloat16.
    with torch.autocast(hidden.device.type, enabled=False):
        total = membership @ hidden.float()
        return total / membership.sum(-1, keepdim=True).clamp_min(1.0)


def pooled(pooling: str, pack: Pack, hidden: Tensor) -> Tensor:
    """Return float32 [R, S, P H], the mean of each segment of `hidden` [R, L, H] as `model.pooling` says.

    P is 1; with `mean+termini` 3: all residues, the first END, and the last END.
    """
    if pooling != "mean+termini":
        return mean_over(pack.first if pooling == "cls" else pack.residues, hidden)
    means = mean_over(torch.cat((pack.residues, pack.termini), dim=1), hidden)
    return means.unflatten(1, (3, -1)).transpose(1, 2).flatten(2)


class MaskedAttention:
    """One product per pack, with everything outside a token's own segment masked away; static shapes."""

    def __init__(self, segment_ids: Tensor) -> None:
        """Make the mask of packs of `segment_ids` int64 [R, L]."""
        ids = segment_ids.int()
        same = ids.unsqueeze(1).unsqueeze(-1) == ids.unsqueeze(1).unsqueeze(-2)
        # Padding has an id of its own and so sees itself: no softmax is taken over nothing.
        bias = torch.where(same, 0.0, APART)
        self._packs, self._bias = len(bias), bias.squeeze(0)  # of one pack [1, L, L], of several [R, 1, L, L]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        return self.by_head(query, key, value, dropout)

    def by_head(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Attend with each [R H, L, D]; return [R, L, H, D]."""
        self._bias = self._bias.to(query.dtype)  # once per pass, not in each block
        scores = torch.bmm(query, key.transpose(1, 2))
        if self._packs == 1:
            scores = scores + self._bias
        else:
            scores = (scores.unflatten(0, (self._packs, -1)) + self._bias).flatten(0, 1)
        # The softmax is taken in float32, also where the products around it are bfloat16. It is
        # torch.nn.functional's, which torch_neuronx replaces by one kernel.
        weights = F.dropout(F.softmax(scores.float(), dim=-1).to(value.dtype), p=dropout, training=dropout > 0)
        return torch.bmm(weights, value).unflatten(0, (self._packs, -1)).transpose(1, 2)


def segment_attention(segment_ids: Tensor) -> Attention:
    """Return attention segment by segment; reads the segment bounds on the host once per pass."""
    sizes, real = _runs(segment_ids)
    # A batch of padding alone attends to itself: every weight then has a gradient, of zeros, which FSDP must sum.
    return partial(_attend_segments, sizes, real if any(real) else [True] * len(real))


def _runs(segment_ids: Tensor) -> tuple[list[int], list[bool]]:
    """Return the tokens of each run of equal ids, one pack after the other, and whether the run is a segment."""
    flat = segment_ids.cpu()
    # A run begins where the id differs from the one to its left, and at the start of each pack: none crosses packs.
    starts = torch.ones_like(flat, dtype=torch.bool)
    starts[:, 1:] = flat[:, 1:] != flat[:, :-1]
    begin = starts.flatten().nonzero().flatten()
    sizes = torch.diff(begin, append=torch.tensor([flat.numel()])).tolist()
    real = (flat.flatten()[begin] >= 0).tolist()
    return sizes, real


def _attend_segments(
    sizes: list[int], real: list[bool], query: Tensor, key: Tensor, value: Tensor, dropout: float
) -> Tensor:
    # split of the flat tokens, not a slice of the rows: its backward pass is one concatenation
    pieces = zip(*(x.flatten(0, 1).split(sizes) for x in (query, key, value)), real, strict=True)
    out = [cpu_attention.attend(q, k, v, dropout) if used else torch.zeros_like(v) for q, k, v, used in pieces]
    return torch.cat(out).view(query.shape)


def varlen_attention(segment_ids: Tensor) -> Attention:
    """Return torch's attention over sequences of unlike lengths (nested tensors), all segments in one kernel.

    On CUDA this is FlashAttention-2's variable-length form for 16-bit numbers, and the memory-efficient kernel for
    float32; padding attends to itself. The bounds are read on the host once per pass.
    """
    sizes, _ = _runs(segment_ids)
    offsets = torch.tensor([0, *sizes], device="cpu").cumsum(0).to(segment_ids.device)
    return partial(_attend_nested, offsets, min(sizes), max(sizes))


def _attend_nested(
    offsets: Tensor, shortest: int, longest: int, query: Tensor, key: Tensor, value: Tensor, dropout: float
) -> Tensor:
    # The lengths' bounds come from the host: torch would derive them from the offsets, waiting for the device.
    query_nested, key_nested, value_nested = (
        torch.nested.nested_tensor_from_jagged(
            x.flatten(0, 1), offsets, min_seqlen=shortest, max_seqlen=longest
        ).transpose(1, 2)
        for x in (query, key, value)
    )
    attended = F.scaled_dot_product_attention(query_nested, key_nested, value_nested, dropout_p=dropout, scale=1.0)
    joined: Tensor = attended.transpose(1, 2).values()
    return joined.view(query.shape)


ATTENTIONS: dict[str, Callable[[Tensor], Attention]] = {
    "masked": MaskedAttention,
    "segments": segment_attention,
    "varlen": varlen_attention,
}
"""Name (`Backend.attention`) -> from `segment_ids` int64 [R, L] to the attention of one pass."""
