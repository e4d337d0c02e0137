"""Metrics: equal to scikit-learn, equal over any batching, every record once, intervals that mean something."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from esm_neuron import metrics
from esm_neuron.metrics import ClassificationState, MaskedLMState, Value


def number(value: Value) -> float:
    assert isinstance(value, (int, float))
    return value


def example_rows(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, C] in eighths, so that scores tie exactly, and labels [n] they know something of."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = np.round(8 * (rng.normal(size=(n, classes)) + 0.8 * np.eye(classes)[labels])) / 8
    return logits.astype(np.float32), labels


def filled(logits: np.ndarray, labels: np.ndarray) -> ClassificationState:
    state = ClassificationState(logits.shape[1])
    state.update(np.arange(len(labels)), np.ones(len(labels), np.float32), logits, labels)
    return state


@pytest.mark.parametrize("classes", [2, 5])
def test_point_values_are_scikit_learns(classes: int) -> None:
    logits, labels = example_rows(300, classes)
    values = filled(logits, labels).compute()
    p = torch.softmax(torch.from_numpy(logits).double(), 1).numpy()
    said = p.argmax(1)
    score, one_hot = (p[:, 1], labels) if classes == 2 else (p, np.eye(classes)[labels])
    expected = {
        "n": 300,
        "loss": sk.log_loss(labels, p),
        "accuracy": sk.accuracy_score(labels, said),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, said),
        "mcc": sk.matthews_corrcoef(labels, said),
        "macro_f1": sk.f1_score(labels, said, average="macro"),
        "auroc": sk.roc_auc_score(labels, score, multi_class="ovr"),
        "auprc": sk.average_precision_score(one_hot, score, average="macro"),
    }
    assert values == pytest.approx(expected, abs=1e-6)
    assert list(values) == list(expected)


@pytest.mark.parametrize("classes", [2, 4])
def test_resampled_values_are_scikit_learns_on_the_drawn_rows(classes: int) -> None:
    logits, labels = example_rows(60, classes, seed=3)
    p = np.exp(metrics.log_softmax(logits.astype(float)))
    counts = next(metrics.resamples(60, seed=1))[:25]
    fast = {
        **metrics.confusion_scores(metrics.confusions(counts, labels, p.argmax(1), classes)),
        **metrics.ranking_scores(counts, metrics._score_columns(p), labels),
    }
    for draw, multiplicity in enumerate(counts.astype(int)):
        assert multiplicity.sum() == 60
        rows = np.repeat(np.arange(60), multiplicity)
        slow = metrics.classification_scores(p[rows], labels[rows], np.zeros(60))
        for name, drawn in fast.items():
            assert drawn[draw] == pytest.approx(number(slow[name]), abs=1e-12), name


def test_resamples_where_a_value_is_undefined_are_nan_and_do_not_move_the_interval() -> None:
    labels = np.array([0] * 30 + [1])
    counts = np.ones((2, 31))
    counts[1, 30] = 0  # the only row of class 1 is not drawn
    score = np.linspace(0, 1, 31)
    ranked = metrics.ranking_scores(counts, {1: score}, labels)
    assert ranked["auroc"][0] == 1.0
    assert np.isnan(ranked["auroc"][1])
    assert np.isnan(ranked["auprc"][1])
    values = filled(np.stack([1 - score, score], 1), labels).compute(intervals=True)
    assert values["auroc_ci"] == [1.0, 1.0]


def test_any_batching_and_any_world_give_the_same_figures() -> None:
    logits, labels = example_rows(101, 3)
    whole = filled(logits, labels).compute(intervals=True)
    ranks = [ClassificationState(3) for _ in range(3)]
    for start in range(0, 101, 7):
        rows = np.arange(start, min(start + 7, 101))
        filler = np.zeros(7 - len(rows))
        ranks[start // 7 % 3].update(
            np.concatenate([rows, filler - 1]).astype(np.int64),
            np.concatenate([np.ones(len(rows)), filler]),
            np.concatenate([logits[rows], np.full((len(filler), 3), 1e9)]),
            np.concatenate([labels[rows], filler - 1]).astype(np.int64),
        )
    total = pickle.loads(pickle.dumps(ranks[2]))  # as a host gather sends it
    total.merge(ranks[0])
    total.merge(ranks[1])
    assert total.compute(intervals=True) == whole


def test_windows_average_their_probabilities_before_scoring() -> None:
    state = ClassificationState(2)
    logits = np.log(np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]))
    state.update(np.array([5, 9, 9]), np.array([1, 0.5, 0.5], np.float32), logits, np.array([0, 1, 1]))
    record, probabilities, labels, loss = state.records()
    assert record.tolist() == [5, 9]
    assert labels.tolist() == [0, 1]
    assert probabilities == pytest.approx(np.array([[0.9, 0.1], [0.35, 0.65]]))
    assert loss == pytest.approx([-np.log(0.9), -(np.log(0.6) + np.log(0.7)) / 2])
    assert state.compute()["n"] == 2


def test_a_record_twice_and_a_missing_window_are_errors() -> None:
    logits, labels = example_rows(10, 2)
    state = filled(logits, labels)
    state.merge(filled(logits[:1], labels[:1]))
    with pytest.raises(ValueError, match=r"record 0 was evaluated more than once.*sum to 2.0000"):
        state.compute()
    half = ClassificationState(2)
    half.update(np.array([4]), np.array([0.5]), logits[:1], labels[:1])
    with pytest.raises(ValueError, match="record 4 misses windows"):
        half.compute()


def test_many_windows_in_float32_still_sum_to_one() -> None:
    state = ClassificationState(2)
    k = 41
    state.update(np.zeros(k, np.int64), np.full(k, 1 / k, np.float32), np.zeros((k, 2)), np.zeros(k, np.int64))
    assert state.compute()["n"] == 1


def test_misfitting_input_is_refused() -> None:
    state = ClassificationState(2)
    with pytest.raises(ValueError, match=r"label 2 is outside 0..1"):
        state.update(np.array([0]), np.array([1.0]), np.zeros((1, 2)), np.array([2]))
    with pytest.raises(ValueError, match="do not fit"):
        state.update(np.array([0]), np.array([1.0]), np.zeros((1, 3)), np.array([1]))
    with pytest.raises(ValueError, match="2 and 3 classes"):
        state.merge(ClassificationState(3))
    state.update(np.array([7, 7]), np.array([0.5, 0.5]), np.zeros((2, 2)), np.array([0, 1]))
    with pytest.raises(ValueError, match="record 7 has windows with different labels"):
        state.compute()


def test_undefined_values_are_none_and_valid_json() -> None:
    logits, _ = example_rows(20, 2)
    values = filled(logits, np.ones(20, np.int64)).compute(intervals=True)
    for name in ("mcc", "auroc", "auprc"):
        assert values[name] is None
        assert values[f"{name}_ci"] is None
    assert values["accuracy"] is not None
    assert values["accuracy_ci"] is not None
    json.dumps(values, allow_nan=False)

    absent = filled(example_rows(20, 3)[0], np.arange(20) % 2).compute()
    assert absent["auroc"] is None
    assert absent["mcc"] is not None

    empty = ClassificationState(2).compute(intervals=True)
    assert empty["n"] == 0
    assert empty["loss"] is None
    assert empty["loss_ci"] is None
    json.dumps(MaskedLMState().compute(intervals=True), allow_nan=False)


def test_a_constant_prediction_has_mcc_zero_as_in_scikit_learn() -> None:
    labels = np.arange(20) % 2
    values = filled(np.tile([1.0, 0.0], (20, 1)), labels).compute(intervals=True)
    assert values["mcc"] == 0.0
    assert values["mcc_ci"] == [0.0, 0.0]


def test_the_interval_of_accuracy_is_the_binomial_one_and_is_repeatable() -> None:
    labels = np.arange(862) % 2
    wrong = np.arange(862) % 10 < 3
    said = np.where(wrong, 1 - labels, labels)
    values = filled(np.eye(2)[said] * 3, labels).compute(intervals=True)
    accuracy = number(values["accuracy"])
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / 862)
    assert values["accuracy_ci"] == pytest.approx([accuracy - half, accuracy + half], abs=0.004)
    assert filled(np.eye(2)[said] * 3, labels).compute(intervals=True) == values


def test_chunks_of_resamples_bound_memory_and_keep_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CELLS", 700)
    chunks = list(metrics.resamples(100, seed=0))
    assert {len(chunk) for chunk in chunks} <= {7, 6}
    assert sum(map(len, chunks)) == metrics.RESAMPLES
    assert all((chunk.sum(1) == 100).all() for chunk in chunks)


def masked_tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    example = np.repeat(np.arange(40), 25)
    weight = (rng.random(1000) < 0.15).astype(np.float32)
    return example, example // 2, rng.random(1000) * 5 * weight, weight, (rng.random(1000) < 0.4) * weight


def test_masked_lm_figures_over_any_batching() -> None:
    tokens = masked_tokens()
    example, _, loss, weight, correct = tokens
    whole = MaskedLMState()
    whole.update(*tokens)
    values = whole.compute(intervals=True)
    assert values["n"] == weight.sum()
    assert values["n_records"] == 20
    assert values["loss"] == pytest.approx(loss.sum() / weight.sum())
    assert values["perplexity"] == pytest.approx(np.exp(loss.sum() / weight.sum()))
    assert values["accuracy"] == pytest.approx(correct.sum() / weight.sum())
    low, high = values["perplexity_ci"]  # type: ignore[misc]
    assert low < number(values["perplexity"]) < high

    ranks = [MaskedLMState(), MaskedLMState()]
    for part in range(8):
        chosen = (example % 8) == part
        ranks[part % 2].update(*(a[chosen] for a in tokens))
    ranks[1].merge(ranks[0])
    merged = ranks[1].compute(intervals=True)
    assert {k: v for k, v in merged.items() if k.endswith("ci")}.keys() == {"loss_ci", "perplexity_ci", "accuracy_ci"}
    for name in values:
        assert merged[name] == pytest.approx(values[name], rel=1e-12)


def test_masked_lm_refuses_an_example_twice() -> None:
    state = MaskedLMState()
    state.update(*masked_tokens())
    state.update(*(a[:25] for a in masked_tokens()))
    with pytest.raises(ValueError, match="example 0 was evaluated 2 times"):
        state.compute()
    with pytest.raises(ValueError, match="are not one"):
        state.update(np.arange(2), np.arange(2), np.ones(3), np.ones(2), np.ones(2))
