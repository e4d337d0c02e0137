"""Tasks: what is asked of the model, what an answer costs, and figures that do not depend on batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from esm_neuron.backends import create_backend
from esm_neuron.build import build_model
from esm_neuron.config import AdapterConfig, DataConfig, LoopConfig, ModelConfig, TaskConfig, TrainConfig
from esm_neuron.data.batch import PAD_SEGMENT, Batch, ExampleTable
from esm_neuron.data.loader import EvalLoader
from esm_neuron.data.tokenizer import AMINO_ACIDS, CLS, EOS, MASK, X, encode, encode_many
from esm_neuron.evaluate import evaluate
from esm_neuron.metrics import Value
from esm_neuron.tasks import MaskedLM, SequenceClassification, create_task

LABELS = ("A", "B", "C")


def one_protein(sequence: str) -> ExampleTable:
    tokens = encode(sequence)
    return ExampleTable(tokens, np.array([0, len(tokens)]), np.array([0]), np.ones(1, np.float32), np.array([2]), ["p"])


def make_batch(labels: torch.Tensor, weights: torch.Tensor, segment_ids: torch.Tensor, segments: int) -> Batch:
    zeros = torch.zeros_like(segment_ids)
    return Batch(zeros, segment_ids, zeros, labels, weights, np.full((len(labels), segments), -1), segments)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classification_loss_is_torchs_cross_entropy_summed(smoothing: float) -> None:
    task = SequenceClassification(TaskConfig(label_smoothing=smoothing), LABELS)
    logits = 3 * torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 2, 1, 0], [1, 0, 0, 0]])
    used = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    batch = make_batch(labels, used.float(), torch.zeros(2, 5, dtype=torch.long), 4)
    loss, weight = task.loss(logits, batch)
    expected = F.cross_entropy(logits[used], labels[used], reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    assert weight == 4
    logits[~used] = 100 * torch.randn(4, 3)
    assert torch.equal(task.loss(logits, batch)[0], loss)


def test_classification_loss_counts_windows_by_their_weight() -> None:
    task = SequenceClassification(TaskConfig(), LABELS)
    logits = torch.tensor([[[2.0, 0, 0], [0, 1, 0], [0, 0, 3]]])
    labels, weights = torch.tensor([[0, 0, 1]]), torch.tensor([[0.5, 0.5, 1.0]])
    loss, weight = task.loss(logits, make_batch(labels, weights, torch.zeros(1, 9, dtype=torch.long), 3))
    each = F.cross_entropy(logits[0], labels[0], reduction="none")
    torch.testing.assert_close(loss, (each[0] + each[1]) / 2 + each[2])
    assert weight == 2


def test_a_class_target_is_the_records_label_and_none_without_labels() -> None:
    task, table = SequenceClassification(TaskConfig(), LABELS), one_protein("MKV")
    target = task.target(table, 0, np.random.default_rng(0))
    assert (target.tokens.tolist(), int(target.label), float(target.weight)) == (encode("MKV").tolist(), 2, 1.0)
    unlabelled = task.target(replace(table, labels=np.empty(0, np.int64)), 0, np.random.default_rng(0))
    assert (int(unlabelled.label), float(unlabelled.weight)) == (0, 0.0)


def test_masked_lm_rates_are_those_of_bert() -> None:
    # X is no standard amino acid, so each of the three fates shows: <mask>, one of the 20, or X still
    table, task, draws = one_protein("X" * 1000), MaskedLM(TaskConfig(name="masked_lm"), ()), 300
    rng = np.random.default_rng(7)
    chosen, shown = [], []
    for _ in range(draws):
        target = task.target(table, 0, rng)
        assert target.label.tolist() == table.tokens.tolist()
        assert target.tokens[[0, -1]].tolist() == [CLS, EOS]
        assert target.weight[[0, -1]].tolist() == [0, 0]
        at = target.weight == 1
        assert (target.weight[~at] == 0).all()
        assert (target.tokens[~at] == table.tokens[~at]).all()
        chosen.append(at.sum())
        shown.append(target.tokens[at])
    total, residues, seen = sum(chosen), 1000 * draws, np.concatenate(shown)
    within(total, residues, 0.15)
    within((seen == MASK).sum(), total, 0.8)
    within((seen == X).sum(), total, 0.1)
    replaced = seen[(seen != MASK) & (seen != X)]
    within(len(replaced), total, 0.1)
    assert set(replaced.tolist()) == set(AMINO_ACIDS.tolist())
    for amino_acid in AMINO_ACIDS:
        within((replaced == amino_acid).sum(), len(replaced), 1 / 20)


def within(count: int, draws: int, rate: float) -> None:
    """Five standard deviations of the binomial distribution: one run in two million fails by chance."""
    assert abs(count - draws * rate) < 5 * (draws * rate * (1 - rate)) ** 0.5


def test_masks_depend_on_the_generator_alone() -> None:
    table, task = one_protein("MKVLAGTREW" * 20), MaskedLM(TaskConfig(name="masked_lm", mask_probability=0.3), ())
    first, again, other = (task.target(table, 0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first.tokens == again.tokens).all()
    assert (first.weight == again.weight).all()
    assert (first.weight != other.weight).any()
    assert 0.2 < first.weight.mean() < 0.4


def test_masked_lm_answers_are_sums_over_each_segment() -> None:
    task = MaskedLM(TaskConfig(name="masked_lm"), ())
    segment_ids = torch.tensor([[0, 0, 0, 1, 1, PAD_SEGMENT]])
    labels = torch.tensor([[4, 5, 6, 7, 8, 0]])
    weights = torch.tensor([[1.0, 0, 1, 1, 0, 0]])
    logits = torch.randn(1, 6, 33, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 4] = logits[0, 3, 7] = 50
    logits[0, 2, 9] = 50
    batch = make_batch(labels, weights, segment_ids, 3)
    loss, weight, right = task.answers(logits, batch)
    each = F.cross_entropy(logits[0], labels[0], reduction="none")
    torch.testing.assert_close(loss, torch.stack((each[0] + each[2], each[3], torch.tensor(0.0))).view(1, 3))
    assert weight.tolist() == [[2, 1, 0]]
    assert right.tolist() == [[1, 1, 0]]
    total, count = task.loss(logits, batch)
    torch.testing.assert_close(total, loss.sum())
    assert count == 3


def proteins() -> ExampleTable:
    """14 examples of 12 records: the last record has three windows."""
    rng = np.random.default_rng(1)
    letters = np.array(list("LAGVSERTIDPKQNFYMHWC"))
    sequences = ["".join(rng.choice(letters, n)) for n in rng.integers(3, 60, 14)]
    tokens, offsets = encode_many(sequences)
    record = np.array([*range(12), 11, 11])
    weight = np.where(record == 11, 1 / 3, 1).astype(np.float32)
    return ExampleTable(tokens, offsets, record, weight, np.arange(12) % 3, [f"p{i}" for i in range(12)])


@pytest.mark.parametrize("name", ["sequence_classification", "masked_lm"])
def test_figures_do_not_depend_on_how_examples_are_batched(name: str) -> None:
    cfg = TrainConfig(
        model=ModelConfig(name="tiny", init="random"),
        task=TaskConfig(name=name),
        data=DataConfig(max_residues=62, row_tokens=64),
        adapter=AdapterConfig(kind="none"),
    )
    task, table = create_task(cfg.task, LABELS), proteins()
    backend = create_backend(cfg)
    built = build_model(cfg, task, backend)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))

    def figures(packing: bool, row_tokens: int, rows: int, static: bool) -> dict[str, Value]:
        data = replace(cfg.data, packing=packing, row_tokens=row_tokens)
        layout = replace(cfg, data=data, loop=LoopConfig(eval_rows_per_device=rows))
        return evaluate(built.model, task, backend, EvalLoader(table, task, layout, static_shapes=static))

    expected = figures(packing=False, row_tokens=64, rows=1, static=False)
    assert expected["n" if name != "masked_lm" else "n_records"] == 12
    for layout in [(True, 64, 3, True), (True, 200, 2, False), (False, 64, 5, True), (True, 1024, 1, True)]:
        found = figures(*layout)
        assert found == pytest.approx(expected, rel=1e-5)


def test_masked_lm_counts_stay_exact_under_bfloat16() -> None:
    cfg = TrainConfig(
        model=ModelConfig(name="tiny", init="random"),
        task=TaskConfig(name="masked_lm", mask_probability=0.9),
        data=DataConfig(max_residues=1022, row_tokens=1024),
        adapter=AdapterConfig(kind="lora"),
        loop=LoopConfig(precision="bf16"),
    )
    task, table = create_task(cfg.task, ()), one_protein("MKVLAGTREW" * 101)
    backend = create_backend(cfg)
    loader = EvalLoader(table, task, cfg, static_shapes=False)
    values = evaluate(build_model(cfg, task, backend).model, task, backend, loader)
    asked = sum(float(batch.weights.sum()) for batch in loader)
    assert asked > 256  # beyond the whole numbers that bfloat16 can count
    assert values["n"] == asked
