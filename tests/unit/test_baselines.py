"""Baselines: features counted by hand, windows joined, and figures that a composition signal must give."""

from __future__ import annotations

import numpy as np
import pytest

from esm_neuron.baselines import composition_baseline, composition_features, majority_baseline
from esm_neuron.data.batch import ExampleTable
from esm_neuron.metrics import Value

ALPHABET = "LAGVSERTIDPKQNFYMHWCXBUZO"


def number(value: Value) -> float:
    assert isinstance(value, (int, float))
    return value


def table(sequences: list[str], labels: list[int], record: list[int] | None = None) -> ExampleTable:
    parts = [np.array([0, *(ALPHABET.index(c) + 4 for c in s), 2], np.uint8) for s in sequences]
    record = record if record is not None else list(range(len(sequences)))
    return ExampleTable(
        tokens=np.concatenate(parts),
        offsets=np.concatenate([[0], np.cumsum([len(p) for p in parts])]),
        record=np.array(record, np.int64),
        weight=1 / np.bincount(record)[record].astype(np.float32),
        labels=np.array(labels, np.int64),
        ids=[f"P{i}" for i in range(len(labels))],
    )


def test_features_are_frequencies_of_whole_first_and_last_fifty_and_log_length() -> None:
    sequence = "A" * 50 + "X" * 10 + "W" * 40
    row = composition_features(table([sequence], [0]))[0]
    a, w = ALPHABET.index("A"), ALPHABET.index("W")
    expected = np.zeros(61)
    expected[a], expected[w] = 0.5, 0.4  # X counts in the length and has no column
    expected[20 + a], expected[40 + w] = 1.0, 0.8
    expected[60] = np.log(100)
    assert row == pytest.approx(expected)


def test_windows_of_a_record_are_one_protein() -> None:
    split = composition_features(table(["A" * 60, "L" * 60, "W" * 60], [0, 1], record=[0, 1, 0]))
    whole = composition_features(table(["A" * 60 + "W" * 60, "L" * 60], [0, 1]))
    assert split == pytest.approx(whole)


def signal(n: int, seed: int, shift: float) -> ExampleTable:
    """Class 1 has more of L; `shift` 0 makes the classes alike."""
    rng = np.random.default_rng(seed)
    labels = [int(x) for x in rng.integers(0, 2, n)]
    share = [0.05 + shift * label for label in labels]
    rows = ["".join(rng.choice(list(ALPHABET[:20]), 120, p=[s, *[(1 - s) / 19] * 19])) for s in share]
    return table(rows, labels)


def test_the_baseline_finds_a_composition_signal_and_none_where_there_is_none() -> None:
    found = composition_baseline(signal(200, 0, 0.15), signal(100, 1, 0.15), 2)
    assert found["n"] == 100
    assert number(found["auroc"]) > 0.9
    interval = found["auroc_ci"]
    assert isinstance(interval, list)
    low, high = interval
    assert low <= number(found["auroc"]) <= high
    blind = composition_baseline(signal(200, 0, 0.0), signal(100, 1, 0.0), 2, intervals=False)
    assert 0.3 < number(blind["auroc"]) < 0.7
    assert "auroc_ci" not in blind


def test_a_class_without_training_rows_gets_probability_zero() -> None:
    values = composition_baseline(table(["A" * 60, "L" * 60], [0, 1]), table(["A" * 60, "L" * 60], [0, 2]), 3)
    assert values["accuracy"] == 0.5
    assert np.isfinite(number(values["loss"]))


def test_majority_answers_the_commonest_training_class() -> None:
    train = np.array([0, 1, 1, 2])
    assert majority_baseline(train, np.array([1, 0, 0, 1, 1]), 3) == {"n": 5, "class": 1, "accuracy": 0.6}
    assert majority_baseline(train, np.array([], np.int64), 3)["accuracy"] is None
