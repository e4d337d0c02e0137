"""What a rank reads and what all ranks give back, for the six ESM-2 shapes and every tp that fits them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esm_neuron.errors import ConfigError
from esm_neuron.models.tensor_parallel import PLAN, Cut, cut_of, join, padded_heads, shard_of, whole_shape

# heads, hidden, intermediate of esm2_t6_8M, t12_35M, t30_150M, t33_650M, t36_3B, t48_15B
SHAPES = [
    (20, 320, 1280),
    (20, 480, 1920),
    (20, 640, 2560),
    (20, 1280, 5120),
    (40, 2560, 10240),
    (40, 5120, 20480),
]
TPS = [1, 2, 4, 8, 16, 32]
SIZES = {"intermediate.dense": ("intermediate", "hidden"), "output.dense": ("hidden", "intermediate")}


def _parameters(hidden: int, intermediate: int, r: int = 3) -> dict[str, tuple[int, ...]]:
    size = {"hidden": hidden, "intermediate": intermediate}
    shapes: dict[str, tuple[int, ...]] = {"esm.embeddings.word_embeddings.weight": (33, hidden)}
    for linear in PLAN:
        out, into = (size[name] for name in SIZES.get(linear, ("hidden", "hidden")))
        at = f"esm.encoder.layer.1.{linear}"
        shapes |= {
            f"{at}.weight": (out, into),
            f"{at}.bias": (out,),
            f"base_model.model.{at}.lora_A.default.weight": (r, into),
            f"base_model.model.{at}.lora_B.weight": (out, r),
        }
    return shapes


@pytest.mark.parametrize("heads,hidden,intermediate", SHAPES)
@pytest.mark.parametrize("tp", TPS)
def test_parts_of_all_ranks_join_to_the_whole(heads: int, hidden: int, intermediate: int, tp: int) -> None:
    for name, shape in _parameters(hidden, intermediate).items():
        shards = [shard_of(name, shape, heads, tp, rank) for rank in range(tp)]
        cut = cut_of(name, shape, heads, tp)
        assert all(whole_shape(name, shard.shape, heads, tp) == shape for shard in shards), name
        if cut.dim is None:
            assert all(shard.shape == shape for shard in shards)
            continue
        # the index along the cut dimension, instead of a parameter of 400 MB
        line = torch.arange(shape[cut.dim])
        view = tuple(-1 if dim == cut.dim else 1 for dim in range(len(shape)))
        narrow = [tuple(s.shape[d] if d == cut.dim else 1 for d in range(len(shape))) for s in shards]
        parts = []
        for shard, local in zip(shards, narrow, strict=True):
            real = line[shard.index[cut.dim]]
            part = torch.full((local[cut.dim],), -1)
            part[: len(real)] = real
            parts.append(part.view(view))
        assert join(name, parts, heads).flatten().equal(line), name


@pytest.mark.parametrize("heads,tp", [(4, 2), (4, 8), (5, 4), (20, 8), (20, 32)])
def test_read_appends_zero_heads_and_join_strips_them(heads: int, tp: int) -> None:
    width = 2
    generator = torch.Generator().manual_seed(0)
    for name, shape in _parameters(heads * width, 64).items():
        whole = torch.randn(shape, generator=generator)
        parts = [shard_of(name, shape, heads, tp, rank).read(whole.__getitem__) for rank in range(tp)]
        assert {part.shape for part in parts} == {parts[0].shape}
        assert join(name, parts, heads).equal(whole), name
        cut = cut_of(name, shape, heads, tp)
        if cut.dim is not None:
            added = torch.cat(parts, cut.dim).narrow(cut.dim, shape[cut.dim], cut.padded - shape[cut.dim])
            assert not added.any()


def test_a_rank_of_zero_heads_alone_reads_nothing() -> None:
    def read(index: tuple[slice, ...]) -> torch.Tensor:
        raise AssertionError(f"read {index} though the rank has no real head")

    part = shard_of("esm.encoder.layer.0.attention.self.query.weight", (40, 40), 20, 32, 31).read(read)
    assert part.shape == (2, 40) and not part.any()


@pytest.mark.parametrize(
    "name,dim",
    [
        ("esm.encoder.layer.10.attention.self.key.weight", 0),
        ("base_model.model.esm.encoder.layer.10.attention.self.key.base_layer.bias", 0),
        ("encoder.layer.0.attention.output.dense.weight", 1),
        ("encoder.layer.0.attention.output.dense.bias", None),
        ("encoder.layer.0.output.dense.lora_A.default.weight", 1),
        ("encoder.layer.0.output.dense.lora_B.default.weight", None),
        ("encoder.layer.0.intermediate.dense.lora_A.weight", None),
        ("encoder.layer.0.intermediate.dense.lora_B.weight", 0),
        ("encoder.layer.0.attention.LayerNorm.weight", None),
        ("esm.embeddings.word_embeddings.weight", None),
        ("lm_head.dense.weight", None),
        ("classifier.dense.weight", None),
    ],
)
def test_the_name_says_the_cut(name: str, dim: int | None) -> None:
    assert cut_of(name, (64, 64)[: 1 if name.endswith("bias") else 2], 4, 2).dim == dim


def test_head_padding_lengthens_only_dimensions_of_heads() -> None:
    assert cut_of("encoder.layer.0.attention.self.query.weight", (320, 320), 20, 8) == Cut(0, 384)
    assert cut_of("encoder.layer.0.attention.output.dense.weight", (320, 320), 20, 8) == Cut(1, 384)
    assert cut_of("encoder.layer.0.intermediate.dense.weight", (1280, 320), 20, 8) == Cut(0, 1280)


def test_a_width_that_tp_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="tp=3 does not divide dimension 0 of .*intermediate.dense.bias, 64 long"):
        cut_of("encoder.layer.0.intermediate.dense.bias", (64,), 4, 3)


@pytest.mark.parametrize("heads,tp", [(5, 4), (3, 2), (4, 8)])
def test_zero_heads_change_no_output_and_no_gradient_and_stay_zero(heads: int, tp: int) -> None:
    """Attention of whole weights against attention of weights with zero heads: outputs, gradients and an AdamW step."""
    torch.manual_seed(0)
    width, names = 4, ("self.query", "self.key", "self.value", "output.dense")
    hidden = heads * width
    plain = {f"encoder.layer.0.attention.{name}.weight": torch.randn(hidden, hidden) for name in names}
    padded = {
        name: torch.cat(
            [shard_of(name, weight.shape, heads, tp, rank).read(weight.__getitem__) for rank in range(tp)],
            1 if "output" in name else 0,
        )
        for name, weight in plain.items()
    }
    inputs, target = torch.randn(2, 6, hidden), torch.randn(2, 6, hidden)
    results = []
    for weights, count in ((plain, heads), (padded, padded_heads(heads, tp))):
        parameters = [nn.Parameter(weight.double()) for weight in weights.values()]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
        query, key, value, out = parameters
        split = [F.linear(inputs.double(), w).view(2, 6, count, width).transpose(1, 2) for w in (query, key, value)]
        context = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        outputs = F.linear(context, out)
        (outputs * target).sum().backward()
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        optimizer.step()
        results.append((outputs, gradients, [p.detach() for p in parameters]))
    (outputs, gradients, weights_), (outputs_, gradients_, padded_) = results
    torch.testing.assert_close(outputs_, outputs)
    for name, gradient, gradient_, weight, weight_ in zip(plain, gradients, gradients_, weights_, padded_, strict=True):
        dim = 1 if "output" in name else 0
        torch.testing.assert_close(gradient_.narrow(dim, 0, hidden), gradient)
        torch.testing.assert_close(weight_.narrow(dim, 0, hidden), weight)
        extra = weight_.shape[dim] - hidden
        assert extra > 0
        assert not gradient_.narrow(dim, hidden, extra).any()
        assert not weight_.narrow(dim, hidden, extra).any()
