"""Thousands of classes: metrics by occupied cells, a page that does not grow with them, and weights before metrics."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as sk
from helpers.toys import Toy

from esm_neuron.config import TaskConfig
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.errors import TrainingError
from esm_neuron.metrics import bootstrap, classification, classification_metrics, multi_label_metrics
from esm_neuron.metrics.bootstrap import MOST_CURVES
from esm_neuron.metrics.calibration import Calibration
from esm_neuron.reports import write_report
from esm_neuron.run_dir import ADAPTER, RESULT, as_table
from esm_neuron.tasks import base, features
from esm_neuron.tasks.baselines import MOST_CLASSES
from esm_neuron.tasks.multi_label import MultiLabel
from esm_neuron.tasks.sequence import SequenceClassification
from esm_neuron.tasks.view import MOST_SHOWN, Confusion
from esm_neuron.training import final_eval, run


def guesses(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities that are right for every second row, the classes, and their names."""
    rng = np.random.default_rng(seed)
    probabilities = rng.random((rows, classes))
    labels = rng.integers(0, classes, rows)
    probabilities[np.arange(0, rows, 2), labels[::2]] = 2
    return probabilities / probabilities.sum(1, keepdims=True), labels, [f"c{i}" for i in range(classes)]


@pytest.mark.parametrize("classes", [MOST_CURVES + 1, 3 * MOST_CURVES])
def test_metrics_of_many_classes_are_scikit_learns(classes: int) -> None:
    p, labels, names = guesses(200, classes)
    found = classification_metrics(p, labels, np.zeros(200), names, intervals=True)
    said = p.argmax(1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, said))
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, said))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, said, average="macro", zero_division=0))
    recall = sk.recall_score(labels, said, labels=np.unique(labels), average="macro", zero_division=0)
    assert found["balanced_accuracy"] == pytest.approx(recall)
    drawn = []
    for counts in bootstrap.resamples(200):
        cells = np.zeros((200, classes, classes))
        cells[np.arange(200), labels, said] = 1
        drawn.append(classification.confusion_scores(np.tensordot(counts[:50], cells, 1))["mcc"])
        break
    exact = classification.Cells.of(labels, said, np.arange(200), 200)
    counts = next(bootstrap.resamples(200))[:50]
    assert classification.class_scores(*exact.sums(counts))["mcc"] == pytest.approx(drawn[0], abs=1e-12)
    per_class = found["per_class"]
    assert isinstance(per_class, dict)
    assert set(per_class) == {names[c] for c in {*labels.tolist(), *said.tolist()}}
    f1 = sk.f1_score(labels, said, labels=range(classes), average=None, zero_division=0)
    assert {name: each["f1"] for name, each in per_class.items()} == pytest.approx(
        {name: f1[int(name[1:])] for name in per_class}
    )


def test_labels_by_the_hundred_have_the_metrics_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    target = rng.random((120, 150)) < 0.02
    p = np.where(rng.random(target.shape) < 0.7, target, ~target & (rng.random(target.shape) < 0.01)) * 0.9
    found = multi_label_metrics(p, target, np.zeros(120), [f"c{i}" for i in range(150)], intervals=True)
    assert found["macro_f1"] == pytest.approx(sk.f1_score(target, p >= 0.5, average="macro", zero_division=0))
    low, high = found["micro_f1_ci"]  # type: ignore[misc]
    assert low <= found["micro_f1"] <= high  # type: ignore[operator]
    assert found["per_class"]["c3"]["n"] == target[:, 3].sum()  # type: ignore[index]


@pytest.mark.parametrize("ties", [3, 10**6])
def test_areas_of_each_class_are_scikit_learns(ties: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "SORTED", 500)  # some classes at a time
    rng = np.random.default_rng(ties)
    scores, labels = rng.integers(0, ties, (90, 12)) / ties, rng.integers(0, 11, 90)
    found = bootstrap.class_areas(scores, [np.flatnonzero(labels == c) for c in range(12)])
    for c in range(11):
        expected = [measure(labels == c, scores[:, c]) for measure in (sk.roc_auc_score, sk.average_precision_score)]
        assert found[c] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found[11]).all()
    for one in (scores[:, :1].copy(), np.asfortranarray(scores)):  # whose transposed is no copy
        before = one.copy()
        bootstrap.class_areas(one, [np.flatnonzero(labels == c) for c in range(one.shape[1])])
        assert (one == before).all()


@pytest.mark.parametrize("kind", [SequenceClassification, MultiLabel])
def test_predictions_read_in_pieces_are_the_same(
    kind: type[SequenceClassification | MultiLabel], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    classes, records = [f"c{i}" for i in range(MOST_CURVES + 20)], 40
    record = np.sort(np.concatenate([np.arange(records), rng.integers(0, records, 25)]))  # some have several windows
    weight = (1 / np.bincount(record)[record]).astype(np.float32)
    logits = [rng.normal(0, 3, (len(record), len(classes))).astype(np.float32)]
    labels = rng.integers(0, len(classes), records)
    if kind is MultiLabel:
        labels = (rng.random((records, len(classes))) < 0.05).astype(np.uint8)
    offsets = np.arange(len(record) + 1) * 3
    ids, starts, residues = [str(i) for i in range(40)], np.zeros((len(record), 2), np.int32), np.ones(40, np.int32)
    table = ExampleTable(np.zeros(offsets[-1], np.uint8), offsets, record, weight, labels, ids, starts, residues)
    task = kind(TaskConfig(), classes).read_by(Calibration(40, 1.5, (), (0.2,) * 40))
    whole = task.metrics(table, logits, True), task.outputs(table, logits), task.kept(table, logits)
    monkeypatch.setattr(base, "CELLS", 1000)
    parts = task.metrics(table, logits, True), task.outputs(table, logits), task.kept(table, logits)
    assert parts[0].pop("per_class") == whole[0].pop("per_class")
    for name, value in parts[0].items():  # probabilities are float32 there
        assert value == whole[0][name] if value is None else value == pytest.approx(whole[0][name], rel=1e-5), name
    for some, all_of_them in zip(parts[1:], whole[1:], strict=True):
        assert some["label"] == all_of_them["label"]
    assert set(parts[2]) == {"label", "probability" if kind is SequenceClassification else "probabilities"}
    kept = task.view(as_table(task, table, logits))
    assert kept is not None and kept.confidence is not None
    assert kept.confidence.probability.max() == pytest.approx(max(max(c) for n, c in whole[1].items() if n != "label"))
    assert task.calibrate(table, logits).proteins == 5  # every eighth of 40


def test_memory_follows_rows_and_classes_not_their_squares() -> None:
    peaks = []
    for classes in (1_000, 10_000):
        p, labels, names = guesses(300, classes)
        tracemalloc.start()
        classification_metrics(p, labels, np.zeros(300), names, intervals=True)
        Confusion.of(labels, p.argmax(1), classes)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 400e6
    assert peaks[1] < 12 * peaks[0]


def test_a_confusion_matrix_shows_the_most_frequent_classes() -> None:
    target = np.repeat(np.arange(200), np.arange(200, 0, -1))
    found = Confusion.of(target, target, 200)
    assert found.classes.tolist() == list(range(MOST_SHOWN))
    assert (found.counts == np.diag(np.arange(200, 200 - MOST_SHOWN, -1))).all()


def many(toy: Toy, folder: Path, classes: int) -> Path:
    letters = "ACDEFGHIKLMNPQRSTVWY"
    rng = np.random.default_rng(0)
    rows = [f"p{i},{''.join(rng.choice(list(letters), 20))},EC:{i // 3}" for i in range(3 * classes)]
    (folder / "many.csv").write_text("id,sequence,label\n" + "\n".join(rows) + "\n")
    return folder / "many.csv"


def test_a_run_with_more_classes_than_baselines_can_fit(toy: Toy, tmp_path: Path) -> None:
    path = many(toy, tmp_path, MOST_CLASSES + 50)
    said: list[str] = []
    data = {"train": str(path), "valid": None, "test": None, "homologs": "off"}
    cfg = toy(data=data, loop={"max_steps": 1, "eval_every": 0})
    run.train(cfg, said.append)
    result = json.loads((Path(cfg.output) / RESULT).read_text())
    assert list(result["baselines"]["valid"]) == ["majority", "nearest homolog"]
    assert any("classes are more than" in line for line in said)
    page = write_report(Path(cfg.output))
    assert page.stat().st_size < 1_000_000
    assert "rarest classes are left out" in page.read_text() or "rarest classes are in the table" in page.read_text()


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_a_failing_evaluation_loses_no_weights(toy: Toy, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TrainingError("no metrics today")

    said: list[str] = []
    cfg = toy(adapter={"kind": kind}, loop={"max_steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(final_eval, "score_splits", fail)
        with pytest.raises(TrainingError, match="no metrics today"):
            run.train(cfg, said.append)
    folder = Path(cfg.output)
    assert list((folder / (ADAPTER if kind == "lora" else "model")).glob("*.safetensors"))
    assert not (folder / RESULT).exists()
    assert any("the trained weights of step 1 are in" in line for line in said)
    from esm_neuron.inference.evaluate import evaluate

    assert evaluate(folder, Path(str(cfg.data.test)), None)["n"] == 20


@pytest.mark.parametrize("error", [ValueError, MemoryError, FloatingPointError])
def test_failing_baselines_are_a_warning(toy: Toy, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    from esm_neuron.tasks.sequence import SequenceClassification

    def fail(*_: object) -> None:
        raise error("singular")

    monkeypatch.setattr(SequenceClassification, "baselines", fail)
    said: list[str] = []
    cfg = toy(loop={"max_steps": 1})
    result = run.train(cfg, said.append).result
    assert result["test"]["n"] == 20 and result["baselines"] == {} == result["verdicts"]
    assert any(line.startswith("WARNING: the baselines could not be fitted (singular)") for line in said)


def test_one_baseline_that_fails_leaves_the_others(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("singular")

    monkeypatch.setattr(features, "kmers", fail)
    said: list[str] = []
    result = run.train(toy(loop={"max_steps": 1}), said.append).result
    assert {"majority", "composition", "nearest homolog"} <= result["baselines"]["test"].keys()
    assert "k-mers" not in result["baselines"]["test"]
    line = "WARNING: the k-mers baseline failed (singular); the model's metrics do not depend on it"
    assert said.count(line) == 1
