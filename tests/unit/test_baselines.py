"""Baselines: features counted by hand, windows joined, and metrics that a composition signal must give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from esm_neuron.config import TaskConfig
from esm_neuron.data.alignment import Proteins
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.tasks import baselines, create_task, features
from esm_neuron.tasks.baselines import Baseline, capped

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
    row = composition(table([sequence], [0]))[0]
    a, w = ALPHABET.index("A"), ALPHABET.index("W")
    expected = np.zeros(61)
    expected[a], expected[w] = 0.5, 0.4  # X counts in the length and has no column
    expected[20 + a], expected[40 + w] = 1.0, 0.8
    expected[60] = np.log(100)
    assert row == pytest.approx(expected)


def composition(of: ExampleTable) -> np.ndarray:
    return features.composition(Proteins.of(of))


def test_windows_of_a_record_are_one_protein_and_residues_that_they_share_count_once() -> None:
    cut = windows_of_two()
    whole = table(["A" * 60 + "W" * 40, "L" * 60], [0, 1])
    assert composition(cut) == pytest.approx(composition(whole))
    assert (features.kmers(Proteins.of(cut)) != features.kmers(Proteins.of(whole))).nnz == 0
    part = features.taken(cut, np.array([1]))
    assert composition(part) == pytest.approx(composition(whole)[[1]])
    part = features.taken(cut, np.array([1, 0]))
    assert composition(part) == pytest.approx(composition(whole)[[1, 0]])


def windows_of_two() -> ExampleTable:
    """A protein in windows 0-59 and 50-99, and another between them."""
    cut = table(["A" * 60, "L" * 60, "A" * 10 + "W" * 40], [0, 1], record=[0, 1, 0])
    return replace(
        cut,
        starts=np.array([[0, 30], [0, 30], [50, 75]], np.int32),
        residues=np.array([100, 60], np.int32),
    )


def test_kmers_are_counted_within_proteins_alone() -> None:
    found = features.kmers(Proteins.of(table(["AAAA", "AAXAAA", "LL", "LLW"], [0] * 4)))
    assert found.shape == (4, 8000) and found.nnz == 3
    a = ALPHABET.index("A")
    assert found[0, a * 421] == pytest.approx(1.0) == found[1, a * 421]
    assert found[3, ALPHABET.index("W")] == 1.0, "LLW is 0 x 400 + 0 x 20 + W"


def test_sites_are_those_that_differ_from_the_wild_type() -> None:
    wild = Proteins.of(table(["MKVA"], [0])).residues
    found = features.sites(Proteins.of(table(["MKVA", "MRVA", "MKVW"], [0] * 3)), wild).toarray()
    assert found.shape == (3, 4 + 42) and not found[0].any()
    k, r, a, w = (ALPHABET.index(c) for c in "KRAW")
    assert np.flatnonzero(found[1]).tolist() == [1, 4 + k, 4 + 21 + r]
    assert np.flatnonzero(found[2]).tolist() == [3, 4 + a, 4 + 21 + w]
    hot = features.one_hot(Proteins.of(table(["MKVA", "MK"], [0] * 2)), 4)
    assert hot.sum(1).A1.tolist() == [4, 2]


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
    values = metrics(TaskConfig(name="masked_lm", mask_probability=1.0), train, test)["unigram"]
    counts = np.array([101, 301, *[1] * 18])
    p = counts / counts.sum()
    loss = -(3 * np.log(p[ALPHABET.index("A")]) + np.log(p[ALPHABET.index("L")])) / 4
    assert values["perplexity"] == pytest.approx(np.exp(loss)), "X is no target"
    assert (values["n"], values["accuracy"]) == (4, 0.75)


def test_a_sample_is_fitted_on_and_said_where_there_are_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MOST_ROWS", 50)
    fitted = fit_baselines(AB, signal(200, 0, 0.15))
    named = {baseline.name: baseline for baseline in fitted}
    assert "composition on 50 of 200, k-mers on 50 of 200, one-hot on 50 of 200" in capped(fitted)
    assert named["composition"].metrics(create_task(AB, ("A", "B")), signal(100, 1, 0.15))["fitted_on"] == 50
    monkeypatch.setattr(baselines, "MOST_ENTRIES", 2 * 120 * 30)
    some = {baseline.name: baseline.fitted_on for baseline in fit_baselines(AB, signal(200, 0, 0.15))}
    assert (some["composition"], some["k-mers"], some["one-hot"]) == (50, 30, 30)
    monkeypatch.setattr(baselines, "MOST_ROWS", 200)
    monkeypatch.setattr(baselines, "MOST_ENTRIES", 1 << 30)
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
    monkeypatch.setattr(baselines, "MOST_ROWS", 5)
    sizes: list[int] = []

    described = features.composition

    def noted(proteins: Proteins) -> np.ndarray:
        sizes.append(len(proteins))
        return described(proteins)

    monkeypatch.setattr(baselines.features, "composition", noted)
    test = signal(3, 1, 0.15)
    for task in (AB, TaskConfig(name="regression", target_mean=0.0, target_sd=1.0)):
        for baseline in fit_baselines(task, signal(50, 0, 0.15)):
            baseline.predict(test)
    assert 3 in sizes and max(sizes) <= 6


def rare(n: int, seed: int, weights: TaskConfig) -> tuple[TaskConfig, ExampleTable]:
    """A tenth of the proteins are of class B, which has a little more of L."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.1).astype(int).tolist()
    rows = ["".join(rng.choice(list(ALPHABET[:20]), 120, p=[s, *[(1 - s) / 19] * 19]))
            for s in (0.05 + 0.02 * np.array(labels))]  # fmt: skip
    return weights, table(rows, labels)


def test_baselines_have_the_class_weights_of_the_task() -> None:
    plain, train = rare(800, 0, AB)
    weighted = replace(AB, class_weights={"A": 1 / 1.8, "B": 5.0})
    _, test = rare(400, 1, AB)
    without, having = (metrics(task, train, test) for task in (plain, weighted))
    assert without["composition"]["balanced_accuracy"] + 0.03 < having["composition"]["balanced_accuracy"]
    assert having["majority"]["accuracy"] == without["majority"]["accuracy"] > 0.8
    # the weights of scikit-learn's own `balanced` are the same, whatever their scale
    counts = np.bincount(train.labels)
    balanced = {"A": 400 / counts[0], "B": 400 / counts[1]}
    scaled = {name: 7 * weight for name, weight in balanced.items()}
    one, other = (metrics(replace(AB, class_weights=w), train, test)["composition"] for w in (balanced, scaled))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=5000))
    model.fit(composition(train), train.labels)
    assert one["auroc"] == pytest.approx(roc_auc_score(test.labels, model.predict_proba(composition(test))[:, 1]))
    assert one["mcc"] == pytest.approx(matthews_corrcoef(test.labels, model.predict(composition(test))))


def test_labels_of_a_set_and_of_residues_are_weighted_too() -> None:
    _, train = rare(800, 0, AB)
    _, test = rare(400, 1, AB)
    several = [replace(t, labels=np.stack([t.labels, 1 - t.labels], 1).astype(np.uint8)) for t in (train, test)]
    task = TaskConfig(name="multi_label", labels=("B", "A"))
    without, having = (metrics(t, *several) for t in (task, replace(task, class_weights={"B": 15.0, "A": 1.0})))
    assert without["composition"]["per_class"]["B"]["n"] == having["composition"]["per_class"]["B"]["n"]
    weighted = create_task(replace(task, class_weights={"B": 9.0, "A": 1.0}), ("B", "A"))
    found = weighted.baselines(several[0])[1].predict(several[1])[0]
    times = np.array([1.0, 9.0])[train.labels]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(composition(train), train.labels, logisticregression__sample_weight=times / times.mean())
    assert found[:, 0] == pytest.approx(model.decision_function(composition(test)), rel=1e-3, abs=1e-3)
    # fifteen times the odds of one in ten is more than even: the constant baseline has the weights as well
    assert having["majority"]["per_class"]["B"]["f1"] > without["majority"]["per_class"]["B"]["f1"] == 0
    train, test = residue_signal(20, 0), residue_signal(10, 1)
    rng = np.random.default_rng(3)
    for of in (train, test):  # half of the places behind W are of class B: plain odds are even, weighted ones are not
        of.labels[(of.labels == 1) & (rng.random(len(of.labels)) < 0.6)] = 0
    task = TaskConfig(name="residue_classification", labels=("A", "B"))
    without, having = (metrics(t, train, test) for t in (task, replace(task, class_weights={"A": 1.0, "B": 4.0})))
    assert without["window"]["per_class"]["B"]["f1"] < having["window"]["per_class"]["B"]["f1"]


def test_the_nearest_homolog_gives_its_label() -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list(ALPHABET[:20]))
    ancestors = [rng.choice(letters, n) for n in rng.integers(80, 200, 40)]

    def relatives(seed: int) -> list[str]:
        own = np.random.default_rng(seed)
        changed = [np.where(own.random(len(a)) < 0.15, own.choice(letters, len(a)), a) for a in ancestors]
        return ["".join(c) for c in changed]

    labels = rng.integers(0, 2, 40).tolist()
    train, test = table(relatives(1), labels), table(relatives(2), labels)
    found = metrics(AB, train, test)
    assert found["nearest homolog"]["accuracy"] > 0.95
    strangers = table(["".join(rng.choice(letters, 100)) for _ in range(20)], [0, 1] * 10)
    alone = create_task(AB, ("A", "B"))
    majority, *_, nearest = alone.baselines(train)
    assert nearest.predict(strangers)[0] == pytest.approx(majority.predict(strangers)[0]), "none is close"
    values = [replace(t, labels=10.0 * np.array(labels)) for t in (train, test)]
    regression = TaskConfig(name="regression", target_mean=5.0, target_sd=5.0)
    assert metrics(regression, *values)["nearest homolog"]["pearson"] > 0.9
    several = [replace(t, labels=np.stack([t.labels, 1 - t.labels], 1).astype(np.uint8)) for t in (train, test)]
    assert metrics(TaskConfig(name="multi_label", labels=("A", "B")), *several)["nearest homolog"]["macro_f1"] > 0.95


def test_a_residue_gets_the_label_of_the_one_that_faces_it_in_the_nearest_protein() -> None:
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(list(ALPHABET[:20]), 90)) for _ in range(10)]
    of = [rng.integers(0, 2, 90) for _ in rows]

    def labelled(cut: slice) -> ExampleTable:
        labels = np.concatenate([[-1, *own[cut], -1] for own in of])
        return replace(table([row[cut] for row in rows], [0] * 10), labels=labels.astype(np.int16))

    task = TaskConfig(name="residue_classification", labels=("A", "B"))
    found = metrics(task, labelled(slice(None)), labelled(slice(5, 85)))
    assert found["nearest homolog"]["accuracy"] == 1.0 > 0.8 > found["window"]["accuracy"]


def variants(n: int, seed: int) -> ExampleTable:
    """Variants of one protein of 40 residues with one to three substitutions; what a site does adds up."""
    fixed, rng = np.random.default_rng(9), np.random.default_rng(seed)
    wild, effect = fixed.choice(list(ALPHABET[:20]), 40), fixed.normal(0, 1, 40)
    rows, values = [], []
    for _ in range(n):
        at = rng.choice(40, rng.integers(1, 4), replace=False)
        row = wild.copy()
        row[at] = [rng.choice([c for c in ALPHABET[:20] if c != wild[i]]) for i in at]
        rows.append("".join(row))
        values.append(effect[at].sum() + rng.normal(0, 0.1))
    return replace(table(rows, [0] * n), labels=np.array(values))


def test_variants_of_one_protein_have_a_baseline_of_their_sites() -> None:
    task = TaskConfig(name="regression", target_mean=0.0, target_sd=1.0)
    found = metrics(task, variants(150, 0), variants(100, 1))
    assert set(found) == {"mean", "composition", "k-mers", "one-hot", "site-independent", "nearest homolog"}
    best = max((name for name in found if name != "mean"), key=lambda name: found[name]["spearman"])
    assert best == "site-independent" and found[best]["spearman"] > 0.95
    assert found["one-hot"]["spearman"] > found["composition"]["spearman"]
    others = (replace(t, labels=1.0 * t.labels) for t in (signal(60, 0, 0.1), signal(40, 1, 0.1)))
    assert {"one-hot"} == {"one-hot", "site-independent"} & metrics(task, *others).keys()
