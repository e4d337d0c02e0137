"""The network: a protein's prediction is its own, whatever lies beside it, and equals that of plain transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.packs import (
    ATTENTIONS,
    KINDS,
    LAYOUTS,
    LENGTHS,
    PER_TOKEN,
    alone,
    build,
    difference,
    gradients,
    lay,
    predictions,
    proteins,
)
from helpers.processes import output_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForSequenceClassification,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
)

from esm_neuron.data.tokenizer import PAD
from esm_neuron.models.attention import RotaryTable, mean_over
from esm_neuron.models.esm2 import encoder_of, head_name, parameter_count, set_attention
from esm_neuron.training.results import write_model


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_neither_padding_nor_neighbours_change_a_prediction_or_a_gradient(kind: str, attention: str) -> None:
    model, sequences = build(kind, attention), proteins(masked=True)
    expected = alone(model, sequences)
    expected_gradients = gradients(model, expected)
    trained = {n for n, _ in model.named_parameters() if ".contact_head." not in n}
    assert set(expected_gradients) == trained
    for layout, (rows, width) in LAYOUTS.items():
        found = predictions(model, sequences, rows, width)
        for number, logits in expected.items():
            assert difference(found[number], logits) <= 1e-5, (layout, number)
        for name, gradient in gradients(model, found).items():
            assert difference(gradient, expected_gradients[name]) <= 1e-4, (layout, name)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_other_neighbours_leave_a_prediction_as_it_is(attention: str) -> None:
    model = build("masked_lm", attention)
    first, others = proteins(masked=True), proteins(masked=True, seed=9)
    before = predictions(model, first, [[4, 1]], 104)
    after = predictions(model, [others[0], first[1], *others[2:]], [[4, 1]], 104)
    assert difference(after[1], before[1]) <= 1e-5
    assert difference(after[4], before[4]) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_both_attentions_are_one_function(kind: str) -> None:
    model, sequences = build(kind), proteins(masked=True)
    rows, width = LAYOUTS["packed"]
    with torch.no_grad():
        eager = predictions(model, sequences, rows, width)
        set_attention(encoder_of(model), 1024, "masked")
        compiled = predictions(model, sequences, rows, width)
    assert all(difference(compiled[i], eager[i]) <= 1e-5 for i in eager)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        ("cls", EsmForSequenceClassification),
        ("residues", EsmForTokenClassification),
        ("masked_lm", EsmForMaskedLM),
    ],
)
def test_equals_plain_transformers(kind: str, plain: type[nn.Module], masked: bool) -> None:
    model, sequences = build(kind), proteins(masked)
    theirs = plain(model.config).eval()
    report = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(key.endswith("rotary_embeddings.inv_freq") for key in report.missing_keys)
    with torch.no_grad():
        ours = alone(model, sequences)
        for number, sequence in enumerate(sequences):
            ids = sequence.unsqueeze(0)
            expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            assert difference(ours[number], expected) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizers_padded_rows_need_no_packs(kind: str) -> None:
    model, sequences = build(kind), proteins(masked=False)
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=PAD)
    with torch.no_grad():
        expected = alone(model, sequences)
        logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
    classes = {"masked_lm": 33, "regression": 1}.get(kind, 3)
    assert logits.shape == ((*ids.shape, classes) if kind in PER_TOKEN else (5, classes))
    for number, sequence in enumerate(sequences):
        mine = logits[number, : len(sequence)] if kind in PER_TOKEN else logits[number]
        if kind == "regression":
            mine = (mine - model.config.target_mean) / model.config.target_sd
        assert difference(mine, expected[number]) <= 1e-5


def test_mean_pooling_leaves_out_the_specials() -> None:
    model, sequences = build("mean"), proteins(masked=False)
    with torch.no_grad():
        hidden, _ = model.esm(**lay(sequences, [[1, 3]], 70))
        found = predictions(model, sequences, [[1, 3]], 70)
        inner = hidden[0, 1 : 1 + LENGTHS[1]].mean(0)
        expected = getattr(model, head_name(model.config))(inner.view(1, 1, -1))[0]
    assert difference(found[1], expected) <= 1e-5
    outer = hidden[0, : LENGTHS[1] + 2].mean(0)
    assert difference(outer, inner) > 1e-3


def test_attention_pooling_weighs_the_residues_by_their_scores() -> None:
    model, sequences = build("attention"), proteins(masked=False)
    with torch.no_grad():
        hidden, pack = model.esm(**lay(sequences, [[1, 3]], 70))
        pooled = model.attention_pooling(hidden, pack.residues)
        inner = hidden[0, 1 : 1 + LENGTHS[1]]
        weights = (inner @ model.attention_pooling.score.weight[0]).softmax(0)
        assert weights.max() > 1.5 * weights.min()
        assert difference(pooled[0, 0], weights @ inner) <= 1e-5
        assert (pooled[0, 2:] == 0).all(), "segments that are not there"
        model.attention_pooling.score.weight.zero_()
        even = model.attention_pooling(hidden, pack.residues)
    assert difference(even, mean_over(pack.residues, hidden)) <= 1e-6


def test_a_regression_predicts_in_the_values_own_unit_but_in_packs() -> None:
    model, sequences = build("regression"), proteins(masked=False)
    with torch.no_grad():
        standardized = alone(model, sequences)
        for number, sequence in enumerate(sequences):
            value = float(model(input_ids=sequence.unsqueeze(0)).logits)
            assert value == pytest.approx(30 + 5 * float(standardized[number]), rel=1e-6)


def test_the_mean_of_an_empty_segment_is_zero() -> None:
    hidden = torch.ones(1, 4, 2)
    membership = torch.tensor([[[1.0, 1, 1, 0], [0, 0, 0, 0]]])
    assert mean_over(membership, hidden).tolist() == [[[1.0, 1.0], [0.0, 0.0]]]


def test_the_rotary_table_stays_exact_in_a_bfloat16_model() -> None:
    model = build("masked_lm").to(torch.bfloat16)
    rotary = encoder_of(model).rotary
    assert next(model.parameters()).dtype == torch.bfloat16
    assert rotary.table.dtype == torch.float32
    cos, sin = rotary(torch.tensor([[0, 1, 1021]]))
    exponent = torch.arange(0, 8, 2, dtype=torch.float64) / 8
    angles = torch.tensor([0.0, 1, 1021], dtype=torch.float64).unsqueeze(1) / 10_000**exponent
    # the angle itself, up to 1,021 rad, is a float32: its rounding is all that may be lost
    # of both halves of a head, and the first half takes sines with a minus
    torch.testing.assert_close(cos[0, :, 0].double(), angles.cos().repeat(1, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(sin[0, :, 0].double(), torch.cat((-angles.sin(), angles.sin()), 1), atol=1e-4, rtol=0)


def test_the_rotary_table_has_values_in_a_model_built_on_meta() -> None:
    with torch.device("meta"):
        table = RotaryTable(8, 16).table
    assert table.device.type == "cpu"
    assert torch.equal(table, RotaryTable(8, 16).table)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradient_checkpointing_changes_memory_and_not_gradients(attention: str) -> None:
    model, sequences = build("mean", attention, dropout=0.1).train(), proteins(masked=True)
    passes: list[str] = []
    model.esm.encoder.layer[0].attention.self.register_forward_hook(lambda *_: passes.append("block 0"))

    def run() -> dict[str, Tensor]:
        torch.manual_seed(5)
        return gradients(model, predictions(model, sequences, *LAYOUTS["packed"]))

    def recompute(fn: Callable[..., Tensor], *args: Tensor) -> Tensor:
        return checkpoint(fn, *args, use_reentrant=False)

    expected = run()
    assert len(passes) == 1
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=recompute)
    found = run()
    assert len(passes) == 3  # forward, and once more in the backward pass
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0)


def test_dropout_acts_in_training_only() -> None:
    model, sequences = build("mean", dropout=0.5), proteins(masked=False)
    with torch.no_grad():
        assert torch.equal(alone(model, sequences)[1], alone(model, sequences)[1])
        model.train()
        assert not torch.equal(alone(model, sequences)[1], alone(model, sequences)[1])


OWN = ("mean", "attention", "regression")
"""Kinds that plain transformers has no class for."""
LOAD_PLAINLY = """
import sys
from transformers import AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    try:
        AutoModelForSequenceClassification.from_pretrained(folder)
    except ValueError as error:
        print("refused:", "model type `esm_neuron`" in str(error))
"""


def test_a_folder_of_our_own_type_predicts_rightly_or_not_at_all(tmp_path: Path) -> None:
    models = {kind: build(kind) for kind in OWN}
    for kind, model in models.items():
        write_model(model, model.config, tmp_path / kind)
    # without our package, whose import makes the type known
    words = [sys.executable, "-c", LOAD_PLAINLY, *(tmp_path / kind for kind in OWN)]
    assert output_of(words, {"USE_TORCH_XLA": "0", "USE_TF": "0"}).splitlines() == ["refused: True"] * len(OWN)
    sequences = proteins(masked=False)
    for kind, model in models.items():
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / kind).eval()
        with torch.no_grad():
            expected, found = alone(model, sequences), alone(loaded, sequences)
        assert all(difference(found[i], expected[i]) <= 1e-6 for i in expected), kind


def test_parameters_are_counted_by_what_is_trained() -> None:
    model = build("cls")
    total = sum(p.numel() for p in model.parameters())
    model.esm.requires_grad_(False)
    assert parameter_count(model) == (32 * 32 + 32 + 3 * 32 + 3, total)


class ByMask(nn.Module):
    """A model as exporters see it: tensors in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def rows_of(*lengths: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Padded proteins and their mask."""
    width, sequences = max(LENGTHS) + 2, [proteins(masked=False)[number] for number in lengths]
    ids = torch.full((len(sequences), width), PAD)
    for row, sequence in zip(ids, sequences, strict=True):
        row[slice(-len(sequence), None) if left else slice(len(sequence))] = sequence
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("kind", ["cls", "mean", "attention"])
@torch.no_grad()
def test_padding_may_come_first(kind: str) -> None:
    model = ByMask(build(kind))
    assert difference(model(*rows_of(0, 2, left=True)), model(*rows_of(0, 2))) <= 1e-5


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_a_mask_with_a_hole_hides_residues_and_cuts_nothing(attention: str) -> None:
    model = build("cls", attention)
    config = model.config
    plain = EsmForSequenceClassification(config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    ids, mask = rows_of(2, 3)
    mask[:, 4:7] = 0
    assert difference(ByMask(model)(ids, mask), plain(input_ids=ids, attention_mask=mask).logits) <= 1e-5


@pytest.mark.parametrize("kind", ["cls", "mean", "attention"])
@torch.no_grad()
def test_a_traced_model_answers_for_other_masks(kind: str) -> None:
    model = ByMask(build(kind))
    traced = torch.jit.trace(model, rows_of(0, 2))
    exported = torch.export.export(model, rows_of(0, 2)).module()
    other = rows_of(3, 1)
    for made in (traced, exported):
        assert difference(made(*other), model(*other)) <= 1e-5
