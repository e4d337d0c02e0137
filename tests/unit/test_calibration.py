"""What validation proteins teach: temperatures, thresholds, and how often sets and ranges hold the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from esm_neuron.config import TaskConfig, TrainConfig
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.inference.evaluate import evaluate
from esm_neuron.inference.export import export
from esm_neuron.inference.predict import predict
from esm_neuron.metrics import calibration
from esm_neuron.metrics.calibration import Calibration, best_threshold, f1, fit_temperature, kept_scores, mcc
from esm_neuron.run_dir import read_calibration
from esm_neuron.tasks import create_task
from esm_neuron.tasks.base import Task
from esm_neuron.training import run

Toy = Callable[..., TrainConfig]
Proteins = Callable[..., Path]


def table(labels: np.ndarray) -> ExampleTable:
    """A protein of one residue for each label."""
    n = len(labels)
    tokens, offsets = encode_many(["M"] * n)
    return ExampleTable(tokens, offsets, np.arange(n), np.ones(n, np.float32), labels, [str(i) for i in range(n)])


def classes(names: str) -> Task:
    return create_task(TaskConfig(labels=tuple(names)), tuple(names))


def drawn(n: int, classes: int, seed: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax, after a division by `scale`, is the probability that each label was drawn with."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return logits * scale, np.array([rng.choice(classes, p=row) for row in p])


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_known_temperature_is_found(scale: float) -> None:
    logits, labels = drawn(4000, 4, 0, scale)
    found = classes("ABCD").calibrate(table(labels), [logits])
    assert found.temperature == pytest.approx(scale, rel=0.06)  # its standard error, by repetition, is 2.5 %
    assert found.thresholds == ()


def test_of_several_labels_too() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (3000, 2))
    has = rng.random((3000, 2)) < 1 / (1 + np.exp(-logits))
    task = create_task(TaskConfig(name="multi_label", labels=("A", "B")), ("A", "B"))
    found = task.calibrate(table(has.astype(np.float32)), [logits * 2.5])
    assert found.temperature == pytest.approx(2.5, rel=0.06)


def test_a_handful_of_right_answers_does_not_make_a_model_certain() -> None:
    labels = np.array([0, 1, 0])
    found = classes("AB").calibrate(table(labels), [np.eye(2)[labels]])
    assert 0.3 < found.temperature < 1


def test_the_temperature_is_where_the_loss_is_least() -> None:
    found = fit_temperature(lambda t: (np.log(t) - 1) ** 2, 1_000_000)
    assert np.log(found) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("value", "score"), [(f1, f1_score), (mcc, matthews_corrcoef)])
def test_a_threshold_is_as_good_as_the_best_on_new_proteins(
    value: calibration.Value, score: Callable[..., float]
) -> None:
    rng = np.random.default_rng(2)
    p = rng.beta(0.4, 3.6, 40_000)  # 10 % positives, probabilities that are true
    target = rng.random(len(p)) < p
    chosen = best_threshold(p[:1000], target[:1000], value)
    p, target = p[1000:], target[1000:]
    best = max(score(target, p > cut) for cut in np.linspace(0.05, 0.95, 91))
    assert score(target, p > chosen) > best - 0.02 > score(target, p > 0.5)


def test_values_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    target, said = rng.random(50) < 0.3, rng.random(50) < 0.4
    counts = (np.array([(said & target).sum()]), np.array([(said & ~target).sum()]), target.sum(), (~target).sum())
    assert f1(*counts)[0] == pytest.approx(f1_score(target, said))
    assert mcc(*counts)[0] == pytest.approx(matthews_corrcoef(target, said))


def test_of_few_proteins_of_a_kind_the_threshold_stays() -> None:
    target = np.arange(100) < 9
    assert best_threshold(np.where(target, 0.3, 0.1), target, f1) == 0.5
    assert best_threshold(np.where(target, 0.3, 0.1), np.arange(100) < 10, f1) != 0.5


def test_a_constant_score_gives_the_likelier_class_and_keeps_its_threshold() -> None:
    target = np.arange(100) < 70
    assert best_threshold(np.full(100, 0.7), target, mcc) == 0.5
    assert best_threshold(np.full(100, 0.3), target, f1) == 0.3  # F1 gains where every row is given the label
    task = classes("ab")
    logits = [np.tile([0.0, 1.0], (100, 1))]
    found = task.read_by(task.calibrate(table(target.astype(np.int64)), logits))
    assert found.metrics(table(target.astype(np.int64)), logits)["accuracy"] == 0.7


def test_residues_that_say_the_same_count_as_one_protein() -> None:
    rng = np.random.default_rng(4)
    score = rng.random(80)
    target, protein = rng.random(80) < score, np.arange(80)
    longer = best_threshold(score.repeat(7), target.repeat(7), mcc, protein.repeat(7))
    assert longer == best_threshold(score, target, mcc, protein) == best_threshold(score, target, mcc)


def test_sets_hold_the_truth_as_often_as_was_asked_for() -> None:
    """Over many draws the coverage lies in [c, c + 1 / (n + 1)], whatever the model is worth."""
    n, covered, sizes = 99, [], []
    for seed in range(200):
        logits, labels = drawn(n + 50, 5, seed, 2.0)
        task = classes("ABCDE")
        task = task.read_by(task.calibrate(table(labels[:n]), [logits[:n]]))
        sets = task.covering(table(labels[n:]), [logits[n:]], 0.8)["set"]
        names = np.array(list("ABCDE"))[labels[n:]]
        covered.append(np.mean([name in text.split(";") for name, text in zip(names, sets, strict=True)]))
        sizes.append(np.mean([len(text.split(";")) for text in sets]))
    error = np.std(covered) / len(covered) ** 0.5
    assert 0.8 - 3 * error < np.mean(covered) < 0.8 + 1 / (n + 1) + 3 * error
    assert 1 < np.mean(sizes) < 4


def test_ranges_hold_the_truth_as_often_as_was_asked_for() -> None:
    covered = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        value = rng.normal(3, 2, 149)
        predicted = (value + rng.standard_t(3, 149) - 3) / 2
        task = create_task(TaskConfig(name="regression", target_mean=3.0, target_sd=2.0), ())
        task = task.read_by(task.calibrate(table(value[:99]), [predicted[:99]]))
        found = task.covering(table(value[99:]), [predicted[99:]], 0.9)
        covered.append(np.mean((found["low"] <= value[99:]) & (value[99:] <= found["high"])))
    error = np.std(covered) / len(covered) ** 0.5
    assert 0.9 - 3 * error < np.mean(covered) < 0.91 + 3 * error


def test_of_many_proteins_a_part_of_the_errors_is_kept_on_the_safe_side() -> None:
    errors = np.random.default_rng(0).random(12_345)
    kept = kept_scores(errors)
    assert len(kept) == calibration.KEPT and kept[-1] == errors.max()
    every = Calibration(len(errors), scores=tuple(np.sort(errors).tolist()))
    some = Calibration(len(errors), scores=kept)
    for coverage in (0.01, 0.5, 0.9, 0.999):
        assert 0 <= some.radius(coverage) - every.radius(coverage) < 2 / calibration.KEPT


@pytest.mark.parametrize(
    ("coverage", "message"),
    [(0.95, "10 validation proteins tell up to 0.9091.* train with 19"), (1.0, "between 0 and 1"), (-1, "between")],
)
def test_what_cannot_be_told_is_refused(coverage: float, message: str) -> None:
    known = Calibration(10, scores=tuple(np.arange(10) / 10))
    assert known.radius(0.9) == 0.9 and known.reaches(0.9)
    with pytest.raises(ConfigError, match=message):
        known.radius(coverage)
    with pytest.raises(ConfigError, match="nothing was calibrated"):
        Calibration().radius(0.5)


@pytest.fixture(scope="module")
def finished(module_toy: Toy) -> TrainConfig:
    cfg = module_toy(optim={"lr": 1e-2}, loop={"max_steps": 4})
    run.train(cfg)
    return cfg


def test_result_evaluate_predict_and_export_read_alike(finished: TrainConfig, tmp_path: Path) -> None:
    out = Path(finished.output)
    result = json.loads((out / "result.json").read_text())
    saved = read_calibration(out / "adapter", 2)
    assert result["calibration"] == json.loads(json.dumps(asdict(saved)))
    assert saved.proteins == result["valid"]["n"] and saved.temperature != 1.0
    assert result["coverage"]["test"]["level"] == 0.9
    test = pd.read_parquet(out / "predictions-test.parquet")
    source = Path(str(finished.data.test))
    found = evaluate(out, source, None)
    assert found["loss"] == pytest.approx(result["test"]["loss"], rel=1e-6)
    assert found["mcc"] == pytest.approx(result["test"]["mcc"])
    export(out, tmp_path / "exported")
    assert read_calibration(tmp_path / "exported", 2) == replace(saved, temperature=1.0)  # which the weights have
    for model in (out, tmp_path / "exported"):
        predict(str(model), source, tmp_path / "p.csv", coverage=0.8)
        made = pd.read_csv(tmp_path / "p.csv")
        assert made["label"].tolist() == test["label"].tolist()
        names = [name for name in made if str(name).startswith("p_")]
        np.testing.assert_allclose(made[names], test[names], atol=1e-5)
        assert made["set"].notna().all()


def test_another_coverage_is_another_prediction(finished: TrainConfig, tmp_path: Path) -> None:
    """What a killed command left is not gone on with by a command that asks for something else."""
    source, target = Path(str(finished.data.train)), tmp_path / "p.csv"
    predict(finished.output, source, target)
    assert "set" not in pd.read_csv(target)
    predict(finished.output, source, target, coverage=0.5, resume=True)
    assert "set" in pd.read_csv(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": "1"}, "temperature"),
        ({"thresholds": [0.1, 0.2, 0.3]}, "3 thresholds for 2 classes"),
        ({"thresholds": [1.5]}, "no probability"),
        ({"scores": [0.5, 0.1]}, "must rise"),
    ],
)
def test_a_damaged_calibration_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    good = asdict(Calibration(3, 1.5, (0.4,), (0.1, 0.2, 0.3)))
    (tmp_path / "calibration.json").write_text(json.dumps(good))
    assert read_calibration(tmp_path, 2) == Calibration(3, 1.5, (0.4,), (0.1, 0.2, 0.3))
    (tmp_path / "calibration.json").write_text(json.dumps(good | change))
    with pytest.raises(CheckpointError, match=message):
        read_calibration(tmp_path, 2)
