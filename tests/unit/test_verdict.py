"""The verdict on a model: it holds what it says on made data, and alarms ring where nothing was learned."""

from __future__ import annotations

import numpy as np
import pytest

from esm_neuron.metrics import Scores, classification_metrics, regression_metrics
from esm_neuron.metrics.bootstrap import bootstrap, numbered, with_intervals
from esm_neuron.metrics.verdict import alarms, compare, decided, verdict


def scored(right: np.ndarray, labels: np.ndarray, units: np.ndarray | None = None) -> Scores:
    """Scores of a classifier that is right where `right` says."""
    p = np.eye(2)[np.where(right, labels, 1 - labels)] * 0.8 + 0.1
    return classification_metrics(p, labels, -np.log(np.where(right, 0.9, 0.1)), "AB", True, units=units)


def accuracy(right: np.ndarray, units: np.ndarray | None = None) -> Scores:
    """The accuracy alone, which takes no time."""
    size, unit = numbered(units, len(right))
    hits, rows = np.bincount(unit, right, size), np.bincount(unit, minlength=size)
    drawn = bootstrap(size, lambda k: {"accuracy": (k @ hits) / (k @ rows)})
    return with_intervals({"n": len(right), "n_clusters": size, "accuracy": float(right.mean())}, drawn, size)


def test_overlapping_intervals_may_be_decided_and_are_compared_in_pairs() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    hard = rng.random(400) < 0.3  # both are wrong about these, so their intervals overlap widely
    own, other = scored(~hard, labels), scored(~hard & (rng.random(400) < 0.95), labels)
    assert own["accuracy_ci"][0] < other["accuracy_ci"][1]
    found = compare(own, other, "accuracy", greater_is_better=True)
    low, high = found["difference_ci"]
    assert 0 < low < found["difference"] < high and found["verdict"] == "better"
    assert compare(other, own, "accuracy", greater_is_better=True)["verdict"] == "worse"
    assert compare(own, other, "loss", greater_is_better=False)["verdict"] == "better"
    assert compare(own, own, "mcc", greater_is_better=True)["verdict"] == "undecided"


def test_two_models_that_are_equally_good_are_told_apart_in_at_most_one_of_twenty() -> None:
    decided_ = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        own, other = (accuracy(rng.random(200) < 0.7) for _ in range(2))
        decided_ += compare(own, other, "accuracy", greater_is_better=True)["verdict"] != "undecided"
    assert decided_ <= 15, "5 % are 7.5"


def test_families_are_drawn_in_pairs_too() -> None:
    wrong = {"proteins": 0, "families": 0}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        family = np.repeat(np.arange(30), 10)
        # each model knows some families and not the others: equally many in the long run
        own, other = ((rng.random(30) < 0.7)[family] for _ in range(2))
        for name, units in (("proteins", None), ("families", family)):
            a, b = accuracy(own, units), accuracy(other, units)
            wrong[name] += compare(a, b, "accuracy", greater_is_better=True)["verdict"] != "undecided"
    assert wrong["proteins"] > 30 and wrong["families"] <= 11


def test_the_best_baseline_is_named_and_every_other_one_has_its_verdict() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1000)
    luck = rng.random(1000)
    own, best, even, poor = (scored(luck < share, labels) for share in (0.75, 0.85, 0.7502, 0.6))
    found = verdict(own, {"poor": poor, "best": best, "even": even}, "accuracy", greater_is_better=True)
    assert (found["best"], found["verdict"], found["metric"]) == ("best", "worse", "accuracy")
    assert {name: one["verdict"] for name, one in found["against"].items()} == {
        "poor": "better", "best": "worse", "even": "undecided"
    }  # fmt: skip
    mine, theirs = own["accuracy"], best["accuracy"]
    assert found["text"].startswith(f"Worse than the best baseline, best, by accuracy: {mine:.3f} [")
    assert f"] against {theirs:.3f} [" in found["text"]
    assert f"a difference of {mine - theirs:+.3f} [-0." in found["text"]
    assert found["text"].endswith("on the same resamples. Also better than poor. Also undecided against even.")
    lower = verdict(own, {"poor": poor, "best": best}, "loss", greater_is_better=False)
    assert lower["best"] == "best" and lower["verdict"] == "worse"
    assert verdict(own, {}, "accuracy", greater_is_better=True) == {}
    assert verdict(Scores({"n": 3, "mcc": 0.2}), {"poor": poor}, "mcc", greater_is_better=True) == {}


def test_a_verdict_of_few_proteins_says_so() -> None:
    labels = np.arange(30) % 2
    right = np.random.default_rng(0).random(30) < 0.8
    few = verdict(scored(right, labels), {"other": scored(~right, labels)}, "accuracy", greater_is_better=True)
    assert few["text"].endswith("The intervals are of 30 proteins; below 50 they are often too narrow.")
    many, units = np.tile(labels, 10), np.repeat(np.arange(20), 15)
    one, other = (scored(np.tile(r, 10), many, units) for r in (right, ~right))
    clustered = verdict(one, {"other": other}, "accuracy", greater_is_better=True)["text"]
    assert "of 20 independent clusters of proteins; below 50" in clustered


@pytest.mark.parametrize(
    ("bounds", "word"),
    [([0.1, 0.2], "better"), ([-0.2, -0.1], "worse"), ([-0.1, 0.1], "undecided"), ([0.0, 0.0], "undecided"),
     (None, "undecided")],
)  # fmt: skip
def test_the_three_words(bounds: list[float] | None, word: str) -> None:
    assert decided(bounds, greater_is_better=True) == word
    opposite = {"better": "worse", "worse": "better", "undecided": "undecided"}[word]
    assert decided(bounds, greater_is_better=False) == opposite


def classifier(p: np.ndarray, labels: np.ndarray) -> Scores:
    return classification_metrics(np.stack([1 - p, p], 1), labels, np.zeros(len(labels)), ("in", "out"), True)


def test_alarms_ring_where_nothing_was_learned_and_only_there() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(500) < 0.3).astype(np.int64)
    one_class = alarms(classifier(rng.random(500) * 0.4, labels))
    assert one_class[0].startswith("ALARM: it answers 'in' everywhere; it shows nothing that tells proteins apart;")
    assert "task.class_weights=balanced" in one_class[0] and "optim.lr" in one_class[0]
    assert one_class[1].startswith("ALARM: it is not shown to rank better than chance, which is 0.500: AUROC 0.")
    knows = np.clip(0.3 + 0.3 * (labels - 0.5) + rng.normal(0, 0.2, 500), 0, 0.49)
    (only,) = alarms(classifier(knows, labels))
    assert only.startswith("ALARM: it answers 'in' everywhere; yet it ranks better than chance: AUROC 0.")
    assert alarms(classifier(np.clip(knows + 0.25, 0, 1), labels)) == []
    probe = alarms(classifier(np.full(500, 0.2), labels), probe=True)[0]
    assert "fine-tuning from this probe" in probe and "optim.lr" not in probe
    (chance,) = alarms(classifier(rng.random(500), labels))
    assert "not shown to rank better than chance" in chance
    y = rng.normal(size=200)
    constant = alarms(regression_metrics(np.full(200, 2.0), y, intervals=True))
    assert len(constant) == 1 and "answers '2' everywhere" in constant[0] and "class_weights" not in constant[0]
    (noise,) = alarms(regression_metrics(rng.normal(size=200), y, intervals=True))
    assert "chance, which is 0.000: Spearman" in noise
    assert alarms(regression_metrics(y + rng.normal(size=200), y, intervals=True)) == []


def test_without_a_ranking_the_verdict_rings() -> None:
    own = {"n": 9, "loss": 2.9, "loss_ci": [2.8, 3.0]}
    assert alarms(own, {"verdict": "better", "best": "unigram"}) == [] == alarms(own)
    (line,) = alarms(own, {"verdict": "undecided", "best": "unigram"})
    assert line.startswith("ALARM: it is not shown to be better than unigram, which knows frequencies alone; try ")
    (line,) = alarms({**own, "perplexity": 18.0}, {"verdict": "worse", "best": "unigram"})
    assert line.startswith("ALARM: it is worse than unigram") and "labels" not in line, "masked LM has none"
