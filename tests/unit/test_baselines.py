"""Baselines: features counted by hand, windows joined, and metrics that a composition signal must give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from esm_neuron.config import TaskConfig
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.tokenizer import UNK, VOCABULARY
from esm_neuron.tasks import baselines, create_task
from esm_neuron.tasks.baselines import Baseline, capped, composition_features

ALPHABET = "LAGVSERTIDPKQNFYMHWCXBUZO"


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


def fit_baselines(task: TaskConfig, train: ExampleTable) -> list[Baseline]:
    return create_task(task, task.labels or ()).baselines(train)


def metrics(task: TaskConfig, train: ExampleTable, test: ExampleTable) -> dict[str, dict[str, Any]]:
    made = create_task(task, task.labels or ())
    return {baseline.name: baseline.metrics(made, test) for baseline in fit_baselines(task, train)}


AB = TaskConfig(labels=("A", "B"))


def signal(n: int, seed: int, shift: float) -> ExampleTable:
    """Class 1 has more of L; `shift` 0 makes the classes alike."""
    rng = np.random.default_rng(seed)
    labels = [int(x) for x in rng.integers(0, 2, n)]
    share = [0.05 + shift * label for label in labels]
    rows = ["".join(rng.choice(list(ALPHABET[:20]), 120, p=[s, *[(1 - s) / 19] * 19])) for s in share]
    return table(rows, labels)


def test_composition_finds_a_composition_signal_and_none_where_there_is_none() -> None:
    found = metrics(AB, signal(200, 0, 0.15), signal(100, 1, 0.15))["composition"]
    assert (found["n"], found["fitted_on"], found["training"]) == (100, 200, 200)
    low, high = found["auroc_ci"]
    assert 0.9 < found["auroc"] and low <= found["auroc"] <= high
    blind = metrics(AB, signal(200, 0, 0.0), signal(100, 1, 0.0))["composition"]
    assert 0.3 < blind["auroc"] < 0.7


def test_a_class_without_training_rows_gets_probability_zero() -> None:
    task = TaskConfig(labels=("A", "B", "C"))
    values = metrics(task, table(["A" * 60, "L" * 60], [0, 1]), table(["A" * 60, "L" * 60], [0, 2]))["composition"]
    assert values["accuracy"] == 0.5
    assert np.isfinite(values["loss"])


def test_majority_predicts_the_training_frequencies() -> None:
    train = table(["A", "L", "LL", "LLL"], [0, 1, 1, 1])
    values = metrics(AB, train, table(["A", "A", "A", "A", "A"], [1, 0, 0, 1, 1]))["majority"]
    assert (values["n"], values["accuracy"], values["mcc"], values["auroc"]) == (5, 0.6, 0.0, 0.5)
    assert values["loss"] == pytest.approx(-(3 * np.log(0.75) + 2 * np.log(0.25)) / 5)


def test_several_labels_and_values_are_found_in_the_composition() -> None:
    train, test = signal(200, 0, 0.15), signal(100, 1, 0.15)
    several = [replace(t, labels=np.stack([t.labels, 1 - t.labels, t.labels * 0], 1).astype(np.uint8))
               for t in (train, test)]  # fmt: skip
    task = TaskConfig(name="multi_label", labels=("A", "B", "nobody"))
    found = metrics(task, *several)
    assert found["composition"]["per_class"]["A"]["auroc"] > 0.9
    assert found["composition"]["subset_accuracy"] > 0.8 > found["majority"]["subset_accuracy"]
    values = [replace(t, labels=100 + 10.0 * t.labels) for t in (train, test)]
    found = metrics(TaskConfig(name="regression", target_mean=105.0, target_sd=5.0), *values)
    assert found["composition"]["pearson"] > 0.8
    assert found["mean"]["pearson"] is None
    assert found["mean"]["rmse"] == pytest.approx(5, abs=0.2)


def residue_signal(n: int, seed: int) -> ExampleTable:
    """A residue is of class 1 where its left neighbour is W; the first is not known."""
    rng = np.random.default_rng(seed)
    rows = ["".join(rng.choice(list("AW"), 30)) for _ in range(n)]
    labels = [np.array([-1, -1, *(int(c == "W") for c in row[:-1]), -1]) for row in rows]
    return replace(table(rows, [0] * n), labels=np.concatenate(labels).astype(np.int16))


def test_residues_are_found_by_their_neighbours() -> None:
    task = TaskConfig(name="residue_classification", labels=("A", "B"))
    found = metrics(task, residue_signal(20, 0), residue_signal(10, 1))
    assert found["window"]["accuracy"] == 1.0
    assert (found["window"]["n"], found["window"]["n_records"], found["window"]["training"]) == (290, 10, 580)
    assert found["majority"]["auroc"] == 0.5


def test_unigram_perplexity_is_that_of_the_frequencies() -> None:
    train, test = table(["AAAL" * 100], [0]), table(["AL", "AAX"], [0, 0])
    values = metrics(TaskConfig(name="masked_lm"), train, test)["unigram"]
    counts = np.array([301, 101, *[1] * (len(VOCABULARY) - UNK - 3)])
    p = counts / counts.sum()
    loss = -(3 * np.log(p[0]) + np.log(p[1]) + np.log(p[2])) / 5
    assert values["perplexity"] == pytest.approx(np.exp(loss))
    assert (values["n"], values["accuracy"]) == (5, 0.6)


def test_a_sample_is_fitted_on_and_said_where_there_are_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MOST_ROWS", 50)
    fitted = fit_baselines(AB, signal(200, 0, 0.15))
    assert capped(fitted) == "baselines fitted on a sample of the training proteins: composition on 50 of 200"
    assert fitted[1].metrics(create_task(AB, ("A", "B")), signal(100, 1, 0.15))["fitted_on"] == 50
    monkeypatch.setattr(baselines, "MOST_ROWS", 200)
    assert capped(fit_baselines(AB, signal(200, 0, 0.15))) == ""


@pytest.mark.parametrize("chunk", [7, 1 << 18])
def test_a_class_that_the_sample_lacks_keeps_a_row(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(baselines, "CHUNK", chunk)
    monkeypatch.setattr(baselines, "MOST_ROWS", 5)
    train, test = signal(100, 0, 0.15), signal(20, 1, 0.15)
    train.labels[:] = 0
    train.labels[37] = 1
    found = metrics(AB, train, test)
    assert found["composition"]["fitted_on"] == 6, "five drawn, and the one of the rare class"
    assert np.isfinite(found["composition"]["loss"]) and found["majority"]["loss"] > 0
    monkeypatch.setattr(baselines, "MOST_RESIDUES", 5)
    train, test = residue_signal(20, 0), residue_signal(10, 1)
    where = np.flatnonzero(train.labels >= 0)
    train.labels[where] = 0
    train.labels[where[301]] = 1
    found = metrics(replace(AB, name="residue_classification"), train, test)
    assert (found["window"]["fitted_on"], found["window"]["training"]) == (6, 580)
    train.labels[where[301]] = 0
    found = metrics(replace(AB, name="residue_classification"), train, test)
    assert found["window"]["loss"] == found["majority"]["loss"], "with one class alone there is nothing to fit"


def test_rows_are_drawn_among_those_with_a_label() -> None:
    labels = residue_signal(20, 0).labels
    counts, rows = baselines._draw(labels, 2, 50)
    known = np.flatnonzero(labels >= 0)
    assert counts.tolist() == np.bincount(labels[known]).tolist()
    assert rows.tolist() == known[baselines._sample(len(known), 50)].tolist()


def test_only_the_sample_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    many = table(["A" * 60, "L" * 60, "W" * 60], [0, 1], record=[0, 1, 0])
    assert (composition_features(many, np.array([1])) == composition_features(many)[[1]]).all()
    monkeypatch.setattr(baselines, "MOST_ROWS", 5)
    sizes: list[int] = []

    def noted(table: ExampleTable, records: np.ndarray | None = None) -> np.ndarray:
        features = composition_features(table, records)
        sizes.append(len(features))
        return features

    monkeypatch.setattr(baselines, "composition_features", noted)
    fit_baselines(AB, signal(50, 0, 0.15))
    fit_baselines(TaskConfig(name="regression", target_mean=0.0, target_sd=1.0), signal(50, 0, 0.15))
    assert max(sizes) <= 6
