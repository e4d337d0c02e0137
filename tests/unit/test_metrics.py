"""Metrics: equal to scikit-learn, in the resamples too, and intervals that mean something."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax
from sklearn import metrics as sk

from esm_neuron.metrics import (
    Scores,
    Value,
    bootstrap,
    classification,
    classification_metrics,
    masked_lm_metrics,
    multi_label_metrics,
    regression_metrics,
)
from esm_neuron.metrics import bootstrap as ranking
from esm_neuron.metrics.bootstrap import Curve
from esm_neuron.metrics.text import show


def number(value: Value) -> float:
    assert isinstance(value, (int, float))
    return value


def example_rows(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, C] in eighths, so that scores tie exactly, and labels [n] they know something of."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = np.round(8 * (rng.normal(size=(n, classes)) + 0.8 * np.eye(classes)[labels])) / 8
    return logits.astype(np.float32), labels


def filled(logits: np.ndarray, labels: np.ndarray, intervals: bool = False, **more: np.ndarray | None) -> Scores:
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    loss = -log_probabilities[np.arange(len(labels)), labels]
    names = "ABCDE"[: logits.shape[1]]
    return classification_metrics(np.exp(log_probabilities), labels, loss, names, intervals, **more)


@pytest.mark.parametrize("classes", [2, 5])
def test_point_values_are_scikit_learns(classes: int) -> None:
    logits, labels = example_rows(300, classes)
    values = filled(logits, labels)
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
    if classes == 2:
        rare = int((labels == 1).sum() * 2 <= 300)
        expected["auprc"] = sk.average_precision_score(labels == rare, p[:, rare])
        assert values.pop("auprc_of") == "AB"[rare]
    assert values == pytest.approx(expected, abs=1e-6)
    assert list(values) == list(expected)


@pytest.mark.parametrize("classes", [2, 4])
def test_resampled_values_are_scikit_learns_on_the_drawn_rows(classes: int) -> None:
    logits, labels = example_rows(60, classes, seed=3)
    p = np.exp(log_softmax(logits.astype(np.float64), axis=1))
    counts = next(bootstrap.resamples(60, seed=1))[:25]
    cells = np.eye(classes * classes)[labels * classes + p.argmax(1)]
    shown = [classification.rarer(labels)] if classes == 2 else range(classes)
    areas = [Curve.of(p[:, c], labels == c, np.arange(60), 60).areas(counts) for c in shown]
    fast = {
        **classification.confusion_scores((counts @ cells).reshape(-1, classes, classes)),
        **dict(zip(("auroc", "auprc"), np.mean(areas, axis=0), strict=True)),
    }
    for draw, multiplicity in enumerate(counts.astype(int)):
        assert multiplicity.sum() == 60
        rows = np.repeat(np.arange(60), multiplicity)
        slow = classification.classification_scores(p[rows], labels[rows], np.zeros(60), p[rows].argmax(1))
        if classes == 2:  # of the class that is the rarer one of all rows, whatever is drawn
            slow["auprc"] = sk.average_precision_score(labels[rows] == shown[0], p[rows, shown[0]])
        for name, drawn in fast.items():
            assert drawn[draw] == pytest.approx(number(slow[name]), abs=1e-12), name


def test_resamples_where_a_value_is_undefined_are_nan_and_do_not_move_the_interval() -> None:
    labels = np.array([0] * 30 + [1])
    counts = np.ones((2, 31))
    counts[1, 30] = 0  # the only row of class 1 is not drawn
    score = np.linspace(0, 1, 31)
    auroc, auprc = Curve.of(score, labels == 1, np.arange(31), 31).areas(counts)
    assert auroc[0] == 1.0
    assert np.isnan(auroc[1]) and np.isnan(auprc[1])
    values = filled(np.stack([1 - score, score], 1), labels, intervals=True)
    assert values["auroc_ci"] == [1.0, 1.0]


def test_a_proteins_metrics_need_no_order_of_its_residues() -> None:
    logits, labels = example_rows(101, 3)
    order = np.random.default_rng(0).permutation(101)
    assert filled(logits[order], labels[order]) == pytest.approx(filled(logits, labels), rel=1e-12)


def test_residues_are_scored_one_by_one_and_their_proteins_resampled() -> None:
    logits, labels = example_rows(300, 2)
    protein = np.repeat(np.arange(30), 10)
    values = filled(logits, labels, True, protein=protein)
    single = filled(logits, labels, True)
    assert (values["n"], values["n_records"]) == (300, 30)
    shared = [name for name in single if not name.endswith("_ci") and name != "per_class"]
    assert [values[name] for name in shared] == [single[name] for name in shared]
    # a protein of copies of one residue is as good as that residue: the intervals are those of 30 rows
    copies = filled(logits[::10].repeat(10, 0), labels[::10].repeat(10), True, protein=protein)
    alone = filled(logits[::10], labels[::10], True)
    for name in alone:
        if name.endswith("_ci"):
            assert copies[name] == pytest.approx(alone[name], rel=1e-9), name


def test_every_class_has_metrics_of_its_own_with_intervals() -> None:
    logits, labels = example_rows(200, 3)
    per_class = filled(logits, labels, True)["per_class"]
    assert isinstance(per_class, dict) and list(per_class) == ["A", "B", "C"]
    p = np.exp(log_softmax(logits.astype(np.float64), axis=1))
    for c, values in enumerate(per_class.values()):
        assert values["n"] == (labels == c).sum()
        assert values["f1"] == pytest.approx(sk.f1_score(labels, p.argmax(1), average=None)[c])
        assert values["auroc"] == pytest.approx(sk.roc_auc_score(labels == c, p[:, c]))
        assert values["auprc"] == pytest.approx(sk.average_precision_score(labels == c, p[:, c]))
        for name in ("f1", "auroc", "auprc"):
            low, high = values[f"{name}_ci"]
            assert low < values[name] < high


def test_many_thresholds_are_binned_in_the_resamples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = (a[:400] for a in example_rows(400, 2))
    logits = logits + np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    exact = filled(logits, labels, True)
    monkeypatch.setattr(ranking, "MOST_THRESHOLDS", 50)
    binned = filled(logits, labels, True)
    assert binned["auroc"] == exact["auroc"]
    assert binned["auroc_ci"] != exact["auroc_ci"]
    assert binned["auroc_ci"] == pytest.approx(exact["auroc_ci"], abs=0.01)
    assert binned["auprc_ci"] == pytest.approx(exact["auprc_ci"], abs=0.01)


def test_undefined_values_are_none_and_valid_json() -> None:
    logits, _ = example_rows(20, 2)
    values = filled(logits, np.ones(20, np.int64), intervals=True)
    for name in ("mcc", "auroc", "auprc"):
        assert values[name] is None
        assert values[f"{name}_ci"] is None
    assert values["accuracy"] is not None
    assert values["accuracy_ci"] is not None
    json.dumps(values, allow_nan=False)

    absent = filled(example_rows(20, 3)[0], np.arange(20) % 2)
    assert absent["auroc"] is None
    assert absent["mcc"] is not None

    empty = filled(np.zeros((0, 2)), np.zeros(0, np.int64), intervals=True)
    assert empty["n"] == 0
    assert empty["loss"] is None
    assert empty["loss_ci"] is None
    json.dumps(empty, allow_nan=False)


def test_a_constant_prediction_has_mcc_zero_as_in_scikit_learn() -> None:
    labels = np.arange(20) % 2
    values = filled(np.tile([1.0, 0.0], (20, 1)), labels, intervals=True)
    assert values["mcc"] == 0.0
    assert values["mcc_ci"] == [0.0, 0.0]


def test_the_interval_of_accuracy_is_the_binomial_one_and_is_repeatable() -> None:
    labels = np.arange(862) % 2
    wrong = np.arange(862) % 10 < 3
    said = np.where(wrong, 1 - labels, labels)
    values = filled(np.eye(2)[said] * 3, labels, intervals=True)
    accuracy = number(values["accuracy"])
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / 862)
    assert values["accuracy_ci"] == pytest.approx([accuracy - half, accuracy + half], abs=0.004)
    assert filled(np.eye(2)[said] * 3, labels, intervals=True) == values


def test_chunks_of_resamples_bound_memory_and_keep_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "CELLS", 700)
    whole = np.concatenate(list(bootstrap.resamples(100, width=40)))
    chunks = list(bootstrap.resamples(100))
    assert (np.concatenate(chunks) == whole).all(), "the draws do not depend on the chunks: differences are of pairs"
    assert {len(chunk) for chunk in chunks} <= {7, 6}
    assert sum(map(len, chunks)) == bootstrap.RESAMPLES
    assert all((chunk.sum(1) == 100).all() for chunk in chunks)


def labelled(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities with ties, labels [n, C] of different frequency, and a loss."""
    rng = np.random.default_rng(seed)
    targets = rng.random((n, classes)) < np.linspace(0.2, 0.6, classes)
    probabilities = np.round(20 * np.clip(rng.normal(0.4, 0.2, targets.shape) + 0.2 * targets, 0, 1)) / 20
    return probabilities, targets, rng.random(n)


def multi_label_by_scikit_learn(p: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    said = p >= 0.5
    return {
        "subset_accuracy": sk.accuracy_score(targets, said),
        "macro_f1": sk.f1_score(targets, said, average="macro"),
        "micro_f1": sk.f1_score(targets, said, average="micro"),
        "auroc": sk.roc_auc_score(targets, p, average="macro"),
        "auprc": sk.average_precision_score(targets, p, average="macro"),
    }


def test_multi_label_metrics_are_scikit_learns_in_the_resamples_too(monkeypatch: pytest.MonkeyPatch) -> None:
    p, targets, loss = labelled(80, 3)
    values = multi_label_metrics(p, targets, loss, "ABC")
    assert values == pytest.approx({"n": 80, "loss": loss.mean(), **multi_label_by_scikit_learn(p, targets)})
    counts = next(bootstrap.resamples(80))[:20]
    expected = []
    for multiplicity in counts.astype(int):
        rows = np.repeat(np.arange(80), multiplicity)
        expected.append({**multi_label_by_scikit_learn(p[rows], targets[rows]), "loss": loss[rows].mean()})
    monkeypatch.setattr(bootstrap, "RESAMPLES", 20)
    with_ci = multi_label_metrics(p, targets, loss, "ABC", intervals=True)
    for name in expected[0]:
        assert with_ci.drawn[name] == pytest.approx([e[name] for e in expected]), name
    per_class = with_ci["per_class"]
    assert isinstance(per_class, dict)
    for c, own in enumerate(per_class.values()):
        assert own["n"] == targets[:, c].sum()
        assert own["f1"] == pytest.approx(sk.f1_score(targets[:, c], p[:, c] >= 0.5))
        assert own["auroc"] == pytest.approx(sk.roc_auc_score(targets[:, c], p[:, c]))
        assert own["auprc_ci"][0] < own["auprc"] < own["auprc_ci"][1]


def test_multi_label_metrics_of_a_class_that_nobody_has() -> None:
    p, targets, loss = labelled(30, 3)
    targets[:, 1] = False
    values = multi_label_metrics(p, targets, loss, "ABC", intervals=True)
    assert values["auroc"] is None and values["auroc_ci"] is None
    assert values["macro_f1"] == pytest.approx(sk.f1_score(targets, p >= 0.5, average="macro", zero_division=0))
    assert values["per_class"]["B"]["auprc"] is None  # type: ignore[index]
    json.dumps(values, allow_nan=False)
    json.dumps(multi_label_metrics(p[:0], targets[:0], loss[:0], "ABC", intervals=True), allow_nan=False)


def regression_by_scipy(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    return {
        "loss": sk.mean_squared_error(y, x) / 4,
        "spearman": stats.spearmanr(x, y).statistic,
        "pearson": stats.pearsonr(x, y).statistic,
        "rmse": sk.root_mean_squared_error(y, x),
        "mae": sk.mean_absolute_error(y, x),
        "r2": sk.r2_score(y, x),
    }


def test_regression_metrics_are_scipys_in_the_resamples_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    targets = np.round(rng.normal(1000, 3, 60))  # ties, and a mean that is large against the spread
    predicted = targets + np.round(rng.normal(0, 4, 60))
    assert regression_metrics(predicted, targets, 2.0) == pytest.approx(
        {"n": 60, **regression_by_scipy(predicted, targets)}, rel=1e-9
    )
    expected = []
    for multiplicity in next(bootstrap.resamples(60))[:20].astype(int):
        rows = np.repeat(np.arange(60), multiplicity)
        expected.append(regression_by_scipy(predicted[rows], targets[rows]))
    monkeypatch.setattr(bootstrap, "RESAMPLES", 20)
    values = regression_metrics(predicted, targets, 2.0, intervals=True)
    for name in expected[0]:
        assert values.drawn[name] == pytest.approx([e[name] for e in expected], rel=1e-9), name


def test_a_constant_prediction_has_no_correlation() -> None:
    values = regression_metrics(np.ones(5), np.arange(5.0), intervals=True)
    assert values["spearman"] is None and values["pearson_ci"] is None
    assert values["rmse"] == pytest.approx((11 / 5 + 4 / 5) ** 0.5)
    assert regression_metrics(np.arange(5.0), np.ones(5))["r2"] is None
    json.dumps(regression_metrics(np.ones(0), np.ones(0), intervals=True), allow_nan=False)


def test_masked_lm_metrics_and_their_intervals() -> None:
    rng = np.random.default_rng(0)
    sums = np.stack([rng.random(20) * 50, rng.integers(0, 12, 20), np.zeros(20)], axis=1)
    sums[:, 2] = np.floor(sums[:, 1] / 3)
    sums[:, 0] *= sums[:, 1] > 0
    loss, weight, right = sums.sum(0)
    values = masked_lm_metrics(sums, intervals=True)
    assert values["n"] == weight
    assert values["n_records"] == (sums[:, 1] > 0).sum() < 20
    assert values["loss"] == pytest.approx(loss / weight)
    assert values["perplexity"] == pytest.approx(np.exp(loss / weight))
    assert values["accuracy"] == pytest.approx(right / weight)
    low, high = values["perplexity_ci"]  # type: ignore[misc]
    assert low < number(values["perplexity"]) < high
    assert {name for name in values if name.endswith("ci")} == {"loss_ci", "perplexity_ci", "accuracy_ci"}
    assert masked_lm_metrics(sums[:0], intervals=True)["loss"] is None


def test_of_two_classes_auprc_is_that_of_the_rarer_one_and_is_named() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(5000) < 0.9).astype(np.int64)  # a tenth is of class A, the alphabetically first
    values = filled(rng.normal(size=(5000, 2)), labels, True)
    assert values["auprc_of"] == "A" and values["auprc"] == pytest.approx(0.1, abs=0.02)
    assert show(values, "auprc").name == "AUPRC of A" and show(values, "auroc").name == "AUROC"
    assert values["per_class"]["B"]["auprc"] > 0.85  # type: ignore[index]
    assert "auprc_of" not in filled(*example_rows(60, 3))


@pytest.mark.parametrize(("positives", "negatives", "shift"), [(3, 20_000, 9.0), (3, 20_000, 2.0), (30, 6_000, 1.0)])
def test_a_metric_lies_within_its_interval(positives: int, negatives: int, shift: float) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [positives, negatives])
    score = rng.normal(size=len(labels)) + shift * labels
    values = filled(np.stack([np.zeros_like(score), score], 1), labels, True)
    for name in classification.NAMES:
        low, high = values[f"{name}_ci"]  # type: ignore[misc]
        assert low <= number(values[name]) <= high, name
    # nothing of the resamples is rounded: with every row drawn once they are scikit-learn's values
    curve = Curve.of(score, labels == 1, np.arange(len(labels)), len(labels))
    auroc, auprc = curve.areas(np.ones((1, len(labels))))
    assert auroc[0] == pytest.approx(sk.roc_auc_score(labels, score), abs=1e-12)
    assert auprc[0] == pytest.approx(sk.average_precision_score(labels, score), abs=1e-12)
    if shift == 9:
        assert values["auprc"] == 1.0 and values["auprc_ci"] == [1.0, 1.0]


def test_macro_f1_of_many_single_proteins_lies_within_its_interval() -> None:
    labels = np.array([0] * 100 + list(range(1, 60)))  # 59 classes of one protein each, none of them found
    values = classification_metrics(
        np.eye(60)[np.zeros(159, int)], labels, np.ones(159), list(map(str, range(60))), True
    )
    low, high = values["macro_f1_ci"]  # type: ignore[misc]
    assert low <= number(values["macro_f1"]) <= high
    assert values["only_answer"] == "0"


def families(seed: int, count: int, size: int, shared: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Which proteins are predicted right, and their families: `shared` of a latent variance is the family's."""
    rng = np.random.default_rng(seed)
    family = np.repeat(np.arange(count), size)
    latent = shared**0.5 * rng.normal(size=count)[family] + (1 - shared) ** 0.5 * rng.normal(size=count * size)
    return latent < stats.norm.ppf(0.7), family


def test_95_percent_holds_the_truth_where_families_are_drawn_and_not_where_proteins_are() -> None:
    found = {"proteins": 0, "families": 0}
    samples = 200
    for seed in range(samples):
        right, family = families(seed, 40, 10)
        labels = np.random.default_rng(seed).integers(0, 2, len(right))
        p = np.eye(2)[np.where(right, labels, 1 - labels)]
        for name, units in (("proteins", None), ("families", family)):
            # accuracy of the whole, which is 0.7 by construction, from the sums of each unit alone
            size, unit = bootstrap.numbered(units, len(right))
            hits, rows = np.bincount(unit, right, size), np.bincount(unit, minlength=size)
            drawn = bootstrap.bootstrap(size, lambda k, h=hits, r=rows: {"a": (k @ h) / (k @ r)})
            low, high = bootstrap.interval(drawn["a"], float(right.mean()), size)  # type: ignore[misc]
            found[name] += low <= 0.7 <= high
            if seed == 0:
                values = classification_metrics(p, labels, np.zeros(len(labels)), "AB", True, units=units)
                assert values["accuracy_ci"] == pytest.approx([low, high])
                assert values.get("n_clusters") == (40 if name == "families" else None)
    assert found["proteins"] < 0.75 * samples
    assert 0.91 * samples <= found["families"] <= 0.99 * samples


def test_intervals_of_few_proteins_are_as_wide_as_students_t_makes_them() -> None:
    for freedom in (4, 10, 50, 1000):
        assert bootstrap.student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)
    held, samples, n = 0, 400, 8
    for seed in range(samples):
        x = np.random.default_rng(seed).normal(size=n)
        drawn = bootstrap.bootstrap(n, lambda k, x=x: {"mean": k @ x / n})["mean"]
        low, high = bootstrap.interval(drawn, float(x.mean()), n)  # type: ignore[misc]
        held += low <= 0 <= high
    assert 0.92 * samples <= held <= 0.98 * samples  # 0.88 by plain percentiles
    assert bootstrap.interval(drawn, 0.0, 1) is None


@pytest.mark.parametrize("task", ["classes", "residues", "labels", "values", "masked"])
def test_intervals_over_clusters_are_those_of_whole_clusters_drawn(task: str) -> None:
    """Each cluster is one protein and its copies: drawn as a cluster, they are as good as that protein alone."""
    rng = np.random.default_rng(0)
    units, once = np.repeat(np.arange(40), 5), np.arange(40)
    logits, labels = example_rows(40, 2)
    p, several, loss = labelled(40, 3)
    x, y = rng.normal(size=40), rng.normal(size=40)
    sums = np.stack([rng.random(40) * 9, rng.integers(1, 5, 40), np.zeros(40)], 1)

    def score(rows: np.ndarray, of: np.ndarray | None) -> Scores:
        if task == "classes":
            return filled(logits[rows], labels[rows], True, units=of)
        if task == "residues":
            protein = np.arange(len(rows)) // (5 if len(rows) > 40 else 1)
            return filled(logits[rows], labels[rows], True, protein=protein, units=None if of is None else once)
        if task == "labels":
            return multi_label_metrics(p[rows], several[rows], loss[rows], "ABC", True, of)
        if task == "values":
            return regression_metrics(x[rows] + y[rows], y[rows], 1.0, True, of)
        return masked_lm_metrics(sums[rows], True, of)

    alone, copies = score(once, None), score(units, units)
    for name, value in alone.items():
        if name.endswith("_ci"):
            assert copies[name] == pytest.approx(value, rel=1e-9), name
    for name, drawn in alone.drawn.items():
        if name != "spearman":  # ranks of copies are their mean rank: the same correlation
            np.testing.assert_allclose(copies.drawn[name], drawn, rtol=1e-9, err_msg=name)


def test_a_model_that_answers_one_thing_is_known() -> None:
    labels = np.arange(40) % 2
    assert filled(np.tile([0.0, 2.0], (40, 1)), labels)["only_answer"] == "B"
    assert "only_answer" not in filled(*example_rows(40, 2))
    assert "only_answer" not in filled(np.tile([0.0, 2.0], (40, 1)), np.ones(40, int)), "all are of that class"
    p, targets, loss = labelled(40, 3)
    assert multi_label_metrics(p * 0, targets, loss, "ABC")["only_answer"] == "no label"
    assert multi_label_metrics(p * 0 + [1, 0, 1], targets, loss, "ABC")["only_answer"] == "A, C"
    assert "only_answer" not in multi_label_metrics(p, targets, loss, "ABC")
    y = np.arange(40.0)
    assert regression_metrics(np.full(40, 7.5) + 1e-3 * y, y)["only_answer"] == "7.5195"
    assert "only_answer" not in regression_metrics(0.1 * y, y)
