"""The tensor-parallel table covers a block of the real model, no more and no less."""

from __future__ import annotations

import pytest
from torch import nn

from esm_neuron.models.tensor_parallel import HEADED, PLAN, in_block, padded_heads


def test_the_table_names_every_linear_of_a_block() -> None:
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        vocab_size=33,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        position_embedding_type="rotary",
        pad_token_id=1,
    )
    linears = {name for name, module in EsmForMaskedLM(config).named_modules() if isinstance(module, nn.Linear)}
    planned = {f"esm.encoder.layer.{block}.{name}" for block in range(2) for name in PLAN}
    assert {name for name in linears if in_block(name)} == planned
    assert all(in_block(name) in PLAN for name in planned)
    assert not any(in_block(name) in PLAN for name in linears - planned)
    assert HEADED < set(PLAN)


@pytest.mark.parametrize(
    "module,name",
    [
        ("esm.encoder.layer.12.output.dense", "output.dense"),
        ("encoder.layer.0.attention.self.query", "attention.self.query"),
        ("base_model.model.esm.encoder.layer.1.output.dense", "output.dense"),
        ("encoder.layer.0", None),
        ("lm_head.dense", None),
        ("encoder.emb_layer_norm_after", None),
    ],
)
def test_in_block(module: str, name: str | None) -> None:
    assert in_block(module) == name


def test_columns_are_followed_by_rows() -> None:
    assert [PLAN[name] for name in ("attention.self.query", "attention.self.key", "attention.self.value")] == [
        "column"
    ] * 3
    assert PLAN["attention.output.dense"] == PLAN["output.dense"] == "row"
    assert PLAN["intermediate.dense"] == "column"


@pytest.mark.parametrize("heads,tp,padded", [(20, 4, 20), (20, 8, 24), (20, 16, 32), (20, 32, 32), (40, 8, 40)])
def test_padded_heads(heads: int, tp: int, padded: int) -> None:
    assert padded_heads(heads, tp) == padded


def test_padded_heads_of_the_largest_models() -> None:
    assert padded_heads(40, 32) == 64
    assert padded_heads(40, 16) == 48
