"""Tasks: what is asked of the model, what a prediction costs, and metrics that do not depend on batches."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from esm_neuron.backends import create_backend
from esm_neuron.config import AdapterConfig, DataConfig, LoopConfig, ModelConfig, TaskConfig, TrainConfig
from esm_neuron.data.dataset import PAD_SEGMENT, Batch, ExampleTable
from esm_neuron.data.loader import EvalLoader
from esm_neuron.data.tokenizer import AMINO_ACIDS, CLS, EOS, MASK, VOCABULARY, encode_many
from esm_neuron.errors import ConfigError
from esm_neuron.metrics import Value
from esm_neuron.metrics.verdict import compare
from esm_neuron.tasks import TASKS, create_task
from esm_neuron.tasks.losses import sigmoid_losses, softmax_losses
from esm_neuron.tasks.masked_lm import MaskedLM
from esm_neuron.tasks.sequence import SequenceClassification
from esm_neuron.training.build import build_model
from esm_neuron.training.evaluation import Evaluator

LABELS = ("A", "B", "C")
W = VOCABULARY.index("W")


def one_protein(sequence: str) -> ExampleTable:
    tokens = encode_many([sequence])[0]
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


LOGITS = 3 * torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([[0, 2, 1, 0], [1, 0, 0, 2]])
HAS = torch.tensor([[[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]]] * 2).float()


def test_focal_loss_of_classes_is_the_papers() -> None:
    p = LOGITS.softmax(-1).gather(-1, CLASSES.unsqueeze(-1)).squeeze(-1)
    for gamma in (0.5, 2.0):
        expected = -((1 - p) ** gamma) * p.log()  # arXiv:1708.02002, eq. 4
        torch.testing.assert_close(softmax_losses(LOGITS, CLASSES, gamma=gamma), expected)
    almost = softmax_losses(LOGITS, CLASSES, smoothing=0.2, gamma=1e-9)
    torch.testing.assert_close(almost, softmax_losses(LOGITS, CLASSES, smoothing=0.2))
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    softmax_losses(sure, torch.tensor([0]), gamma=0.5).sum().backward()
    assert torch.isfinite(sure.grad).all()


def test_losses_of_several_labels_are_torchs_and_torchvisions() -> None:
    bce = partial(F.binary_cross_entropy_with_logits, reduction="none")
    torch.testing.assert_close(sigmoid_losses(LOGITS, HAS), bce(LOGITS, HAS))
    torch.testing.assert_close(sigmoid_losses(LOGITS, HAS, smoothing=0.2), bce(LOGITS, HAS * 0.8 + 0.1))
    p = LOGITS.sigmoid()
    p_t = p * HAS + (1 - p) * (1 - HAS)
    expected = bce(LOGITS, HAS) * (1 - p_t) ** 2  # torchvision.ops.sigmoid_focal_loss with alpha=-1
    torch.testing.assert_close(sigmoid_losses(LOGITS, HAS, gamma=2.0), expected)


WEIGHTS = {"A": 0.5, "B": 2.0, "C": 3.0}


def losses_of(name: str, labels: torch.Tensor, used: torch.Tensor, **settings: object) -> torch.Tensor:
    """The mean loss of LOGITS where `used`, by way of the targets that the task makes of class indices."""
    task = create_task(TaskConfig(name=name, class_weights=WEIGHTS, **settings), LABELS)
    table = one_protein("MK")
    rows = labels.flatten(0, 1).numpy()
    found = [
        task.example_target(replace(table, labels=row[None].astype(np.uint8)), 0, np.random.default_rng(0))
        for row in rows
    ]
    made = torch.from_numpy(np.stack([target.label for target in found])).view(labels.shape)
    weights = torch.tensor([float(target.weight) for target in found]).view(used.shape) * used
    loss, weight = task.loss(LOGITS, make_batch(made, weights, torch.zeros(2, 9, dtype=torch.long), 4))
    return loss / weight


def test_class_weights_are_torchs() -> None:
    used = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 1]])
    chosen = used.bool()
    weight = torch.tensor(list(WEIGHTS.values()))
    expected = F.cross_entropy(LOGITS[chosen], CLASSES[chosen], weight=weight)
    torch.testing.assert_close(losses_of("sequence_classification", CLASSES, used), expected)
    several = F.binary_cross_entropy_with_logits(LOGITS[chosen], HAS[chosen], pos_weight=weight)
    torch.testing.assert_close(losses_of("multi_label", HAS, used), several)


def test_residue_targets_weigh_classes_and_leave_out_what_is_not_known() -> None:
    table = replace(one_protein("MKV"), labels=np.array([-1, 2, -1, 0, -1], np.int16))
    task = create_task(TaskConfig(name="residue_classification", class_weights=WEIGHTS), LABELS)
    target = task.example_target(table, 0, np.random.default_rng(0))
    assert (target.label.tolist(), target.weight.tolist()) == ([0, 2, 0, 0, 0], [0, 3, 0, 0.5, 0])
    assert task.example_target(replace(table, labels=np.zeros(0)), 0, np.random.default_rng(0)).weight.sum() == 0


def test_regression_loss_is_the_squared_error_in_standard_deviations() -> None:
    task = create_task(TaskConfig(name="regression", target_mean=3.0, target_sd=2.0), ())
    labels, weights = torch.tensor([[1.0, 5, 0]]), torch.tensor([[1.0, 0.5, 0]])
    batch = make_batch(labels, weights, torch.zeros(1, 9, dtype=torch.long), 3)
    loss, weight = task.loss(torch.tensor([[[2.0], [1.0], [9.0]]]), batch)
    assert (float(loss), float(weight)) == (1 + 0.5 * 16, 1.5)
    table = replace(one_protein("MK"), labels=np.array([7.5]))
    assert float(task.example_target(table, 0, np.random.default_rng(0)).label) == (7.5 - 3) / 2
    assert task.outputs(table, [np.array([2.25], np.float32)])["value"].tolist() == [7.5]
    values = task.metrics(table, [np.array([1.0], np.float32)])
    assert (values["loss"], values["rmse"]) == (1.25**2, 2.5)
    with pytest.raises(ConfigError, match="task.target_mean and task.target_sd are not known"):
        create_task(TaskConfig(name="regression"), ())


def test_values_whose_mean_is_a_million_times_their_spread_keep_their_digits() -> None:
    rng = np.random.default_rng(0)
    task = create_task(TaskConfig(name="regression", target_mean=1e6, target_sd=1.0), ())
    standardised = rng.normal(size=1000).astype(np.float32)
    tokens, offsets = encode_many(["MK"] * 1000)
    table = replace(ExampleTable.of(tokens, offsets), labels=1e6 + standardised.astype(np.float64))
    found = task.outputs(table, [standardised])["value"]
    assert len(np.unique(found)) == 1000 and task.metrics(table, [standardised])["spearman"] == pytest.approx(1)
    targets = [float(task.example_target(table, i, rng).label) for i in range(1000)]
    np.testing.assert_allclose(targets, standardised, atol=1e-6)
    mean = task.baselines(table)[0]
    assert mean.predict(table)[0] == pytest.approx(np.full(1000, standardised.mean()), abs=1e-6)


def windows_of_residues() -> tuple[ExampleTable, np.ndarray]:
    """Records of 4 and 6 residues, the second in windows 0-3 and 2-5, one of 5 cropped to 2; logits [tokens, 2]."""
    tokens, offsets = encode_many(["MKVA", "ACDE", "DEFG", "LV"])
    labels = [-1, 0, 1, 1, 0, -1, -1, 1, 1, 0, 0, -1, -1, 0, 0, 1, -1, -1, -1, 1, 0, -1]
    table = ExampleTable(
        tokens,
        offsets,
        record=np.array([0, 1, 1, 2]),
        weight=np.array([1, 0.5, 0.5, 1], np.float32),
        labels=np.array(labels, np.int16),
        ids=["a", "b", "c"],
        starts=np.array([[0, 2], [0, 2], [2, 4], [0, 1]], np.int32),
        residues=np.array([4, 6, 5], np.int32),
    )
    logits = np.log(np.random.default_rng(0).dirichlet([1, 1], len(tokens)))
    return table, logits.astype(np.float32)


def test_residues_of_overlapping_windows_are_one_residue_with_the_mean_probability() -> None:
    table, logits = windows_of_residues()
    task = create_task(TaskConfig(name="residue_classification"), ("A", "B"))
    p = np.exp(log_softmax(logits.astype(np.float64), axis=1))
    out = task.outputs(table, [logits])
    second = np.stack([p[7], p[8], (p[9] + p[13]) / 2, (p[10] + p[14]) / 2, p[15], p[16]])
    np.testing.assert_allclose(out["p_A"][1], second[:, 0], rtol=1e-6)
    assert out["labels"][1] == "".join("AB"[i] for i in second.argmax(1))
    assert out["labels"][2][2:] == "---" and np.isnan(out["p_B"][2][2:]).all() and len(out["p_A"][2]) == 5
    values = task.metrics(table, [logits])
    targets = np.array([0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0])  # the sixth residue of b has no label
    probabilities = np.concatenate([p[1:5], second[:5], p[19:21]])
    assert values["n"] == 11 and values["n_records"] == 3
    assert values["accuracy"] == pytest.approx((probabilities.argmax(1) == targets).mean())
    assert values["auroc"] == pytest.approx(roc_auc_score(targets, probabilities[:, 1]))


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
    target = task.example_target(table, 0, np.random.default_rng(0))
    assert target.tokens.tolist() == encode_many(["MKV"])[0].tolist()
    assert (int(target.label), float(target.weight)) == (2, 1.0)
    unlabelled = task.example_target(replace(table, labels=np.empty(0, np.int64)), 0, np.random.default_rng(0))
    assert (int(unlabelled.label), float(unlabelled.weight)) == (0, 0.0)


def test_masked_lm_rates_are_those_of_bert() -> None:
    table, task, draws = one_protein("W" * 1000), MaskedLM(TaskConfig(name="masked_lm"), ()), 300
    rng = np.random.default_rng(7)
    chosen, shown = [], []
    for _ in range(draws):
        target = task.example_target(table, 0, rng)
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
    within((seen == W).sum(), total, 0.1 + 0.1 / 20)  # left as it is, or W by chance
    replaced = seen[(seen != MASK) & (seen != W)]
    within(len(replaced), total, 0.1 * 19 / 20)
    assert {*replaced.tolist(), W} == set(AMINO_ACIDS.tolist())
    for amino_acid in set(AMINO_ACIDS.tolist()) - {W}:
        within((replaced == amino_acid).sum(), len(replaced), 1 / 19)


def test_in_evaluation_every_target_is_a_mask_and_no_target_is_an_unknown_residue() -> None:
    task = MaskedLM(TaskConfig(name="masked_lm", mask_probability=0.5), ())
    table = one_protein("MKVXLAGXTBREWUZ" * 40)
    training = task.example_target(table, 0, np.random.default_rng(0))
    for target in (task.evaluation_target(table, 0), training):
        asked = target.weight > 0
        assert 0.3 < asked.mean() < 0.5
        assert set(table.tokens[asked].tolist()) <= set(AMINO_ACIDS.tolist())
        assert (target.tokens[~asked] == table.tokens[~asked]).all()
    asked = task.evaluation_target(table, 0)
    assert (asked.tokens[asked.weight > 0] == MASK).all()
    assert (training.tokens[training.weight > 0] != MASK).any()
    again = MaskedLM(TaskConfig(name="masked_lm", mask_probability=0.5), ()).evaluation_target(table, 0)
    assert (again.tokens == asked.tokens).all()
    assert (task.hidden(table) == (asked.weight > 0)).all()


UNIGRAM = np.random.default_rng(5).dirichlet(np.full(20, 2.0))


def independent_residues(n: int, seed: int) -> ExampleTable:
    """Proteins whose residues are drawn one by one: nothing but their frequencies can be learned."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("LAGVSERTIDPKQNFYMHWC"))
    tokens, offsets = encode_many(["".join(rng.choice(letters, 120, p=UNIGRAM)) for _ in range(n)])
    return ExampleTable.of(tokens, offsets)


class Copies(torch.nn.Module):
    """The best that there is for independent residues: the letter that it sees, else the frequencies."""

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        frequencies = torch.full((33,), -60.0)
        frequencies[torch.from_numpy(AMINO_ACIDS.astype(int))] = torch.from_numpy(np.log(UNIGRAM)).float()
        # of what is shown at a target in training, 10 of 10.5 letters are the right ones
        seen = F.one_hot(input_ids, 33) * 5.3
        return SimpleNamespace(logits=frequencies + torch.where(input_ids == MASK, 0, 1)[..., None] * seen)


def test_on_independent_residues_nothing_beats_the_unigram_and_the_loss_is_that_of_a_hand() -> None:
    cfg = TrainConfig(
        model=ModelConfig(name="mini"), task=TaskConfig(name="masked_lm"), adapter=AdapterConfig(kind="none"),
        data=DataConfig(max_residues=126, pack_tokens=128),
    )  # fmt: skip
    task, backend = create_task(cfg.task, ()), create_backend(cfg)
    table, train = independent_residues(150, 0), independent_residues(300, 1)
    loader = EvalLoader(table, task, cfg, static_shapes=False)
    (unigram,) = task.baselines(train)
    base = task.metrics(table, unigram.predict(table), intervals=True)

    predictions = Evaluator(Copies(), task, backend).collect(loader)
    own = task.metrics(table, predictions, intervals=True)
    hidden = task.hidden(table)
    by_hand = -np.log(UNIGRAM[table.tokens[hidden] - AMINO_ACIDS[0]]).mean()
    assert own["n"] == base["n"] == hidden.sum()
    assert own["loss"] == pytest.approx(by_hand, rel=1e-6)
    found = compare(own, base, "loss", greater_is_better=False)
    # the true frequencies against those of 36,000 residues: without a visible letter there is no more to gain
    assert found["difference"] == pytest.approx(0, abs=2e-3) and found["verdict"] == "undecided"

    mini = task.metrics(table, Evaluator(build_model(cfg, task, backend).model, task, backend).collect(loader), True)
    assert compare(mini, base, "loss", greater_is_better=False)["verdict"] == "worse"


def within(count: int, draws: int, rate: float) -> None:
    """Five standard deviations of the binomial distribution: one run in two million fails by chance."""
    assert abs(count - draws * rate) < 5 * (draws * rate * (1 - rate)) ** 0.5


def test_masks_depend_on_the_generator_alone() -> None:
    table, task = one_protein("MKVLAGTREW" * 20), MaskedLM(TaskConfig(name="masked_lm", mask_probability=0.3), ())
    first, again, other = (task.example_target(table, 0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first.tokens == again.tokens).all()
    assert (first.weight == again.weight).all()
    assert (first.weight != other.weight).any()
    assert 0.2 < first.weight.mean() < 0.4


def test_masked_lm_predictions_are_sums_over_each_segment() -> None:
    task = MaskedLM(TaskConfig(name="masked_lm"), ())
    segment_ids = torch.tensor([[0, 0, 0, 1, 1, PAD_SEGMENT]])
    labels = torch.tensor([[4, 5, 6, 7, 8, 0]])
    weights = torch.tensor([[1.0, 0, 1, 1, 0, 0]])
    logits = torch.randn(1, 6, 33, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 4] = logits[0, 3, 7] = 50
    logits[0, 2, 9] = 50
    batch = make_batch(labels, weights, segment_ids, 3)
    loss, weight, right = task.predictions(logits, batch)
    each = F.cross_entropy(logits[0], labels[0], reduction="none")
    torch.testing.assert_close(loss, torch.stack((each[0] + each[2], each[3], torch.tensor(0.0))).view(1, 3))
    assert weight.tolist() == [[2, 1, 0]]
    assert right.tolist() == [[1, 1, 0]]
    total, count = task.loss(logits, batch)
    torch.testing.assert_close(total, loss.sum())
    assert count == 3


def proteins(task: str) -> ExampleTable:
    """14 examples of 12 records, labelled for `task`: the last record has three windows, each 2 residues on."""
    rng = np.random.default_rng(1)
    letters = np.array(list("LAGVSERTIDPKQNFYMHWC"))
    sequences = ["".join(rng.choice(letters, n)) for n in (*rng.integers(3, 60, 11), 30, 30, 30)]
    tokens, offsets = encode_many(sequences)
    record = np.array([*range(12), 11, 11])
    weight = np.where(record == 11, 1 / 3, 1).astype(np.float32)
    lengths = np.diff(offsets) - 2
    first = np.array([0] * 12 + [2, 4])
    starts = np.stack([first, first + lengths - lengths // 2], axis=1).astype(np.int32)
    residues = np.array([*lengths[:11], 34], np.int32)
    table = ExampleTable(tokens, offsets, record, weight, np.empty(0), [f"p{i}" for i in range(12)], starts, residues)
    slot, bounds = table.residue_slots()
    labels = {
        "sequence_classification": np.arange(12) % 3,
        "multi_label": (rng.random((12, 3)) < 0.5).astype(np.uint8),
        "regression": rng.normal(50, 10, 12),
        "residue_classification": np.where(slot < 0, -1, rng.integers(-1, 3, bounds[-1])[slot]).astype(np.int16),
        "masked_lm": np.empty(0),
    }
    return replace(table, labels=labels[task])


@pytest.mark.parametrize("name", TASKS)
def test_metrics_and_outputs_do_not_depend_on_how_examples_are_batched(name: str) -> None:
    cfg = TrainConfig(
        model=ModelConfig(name="tiny", init="random", pooling="attention"),
        task=TaskConfig(name=name, target_mean=50.0, target_sd=10.0),
        data=DataConfig(max_residues=62, pack_tokens=64),
        adapter=AdapterConfig(kind="none"),
    )
    task, table = create_task(cfg.task, LABELS), proteins(name)
    backend = create_backend(cfg)
    built = build_model(cfg, task, backend)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))

    evaluator = Evaluator(built.model, task, backend)

    def answered(packing: bool, pack_tokens: int, rows: int, static: bool) -> tuple[dict[str, Value], pd.DataFrame]:
        data = replace(cfg.data, packing=packing, pack_tokens=pack_tokens)
        layout = replace(cfg, data=data, loop=LoopConfig(eval_packs_per_device=rows))
        predictions = evaluator.collect(EvalLoader(table, task, layout, static_shapes=static))
        return task.metrics(table, predictions), pd.DataFrame(task.outputs(table, predictions), index=table.ids)

    expected, table_of_answers = answered(packing=False, pack_tokens=64, rows=1, static=False)
    # in a short protein there may be nothing hidden
    asked = (table_of_answers["hidden"] > 0).sum() if name == "masked_lm" else 12
    assert expected.get("n_records", expected["n"]) == asked > 10
    assert expected[task.metric] is not None
    for layout in [(True, 64, 3, True), (True, 200, 2, False), (False, 64, 5, True), (True, 1024, 1, True)]:
        found, frame = answered(*layout)
        assert found.pop("only_answer", None) == expected.get("only_answer")
        assert found == pytest.approx({n: v for n, v in expected.items() if n != "only_answer"}, rel=1e-5)
        columns = [frame.explode(list(frame)[1:]) if name == "residue_classification" else frame
                   for frame in (frame, table_of_answers)]  # fmt: skip
        for column in frame:
            found_values, values = (c[column].to_numpy() for c in columns)
            if isinstance(values[0], str):
                assert (found_values == values).all()
            else:
                np.testing.assert_allclose(found_values.astype(float), values.astype(float), rtol=1e-4, atol=1e-6)


def test_masked_lm_counts_stay_exact_under_bfloat16() -> None:
    cfg = TrainConfig(
        model=ModelConfig(name="tiny", init="random"),
        task=TaskConfig(name="masked_lm", mask_probability=0.9),
        data=DataConfig(max_residues=1022, pack_tokens=1024),
        adapter=AdapterConfig(kind="lora"),
        loop=LoopConfig(precision="bf16"),
    )
    task, table = create_task(cfg.task, ()), one_protein("MKVLAGTREW" * 101)
    backend = create_backend(cfg)
    loader = EvalLoader(table, task, cfg, static_shapes=False)
    values = Evaluator(build_model(cfg, task, backend).model, task, backend).evaluate(loader)
    asked = sum(float(batch.weights.sum()) for batch in loader)
    assert asked > 256  # beyond the whole numbers that bfloat16 can count
    assert values["n"] == asked
