"""Labels: every form a task reads, every fault named in one line, and what the training rows decide."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.inputs import load_inputs

from esm_neuron.config import DataConfig, TaskConfig, TrainConfig, settings
from esm_neuron.data.check import check_file
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.labels import Numbers, ResidueLabels
from esm_neuron.data.splits import Splits, load_splits
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.tasks import check_task, task_class

Row = tuple[str, str]
"""Sequence and label."""


def load(folder: Path, task: str, rows: list[Row], split: list[str] | None = None, **settings: Any) -> Splits:
    """The splits of a TSV file of `rows`, of which `settings` for data and task are told apart by name."""
    split = split or ["train"] * len(rows)
    lines = [f"p{i}\t{s}\t{label}\t{part}" for i, ((s, label), part) in enumerate(zip(rows, split, strict=True))]
    path = folder / "x.tsv"
    path.write_text("\n".join(["id\tsequence\tlabel\tsplit", *lines]) + "\n")
    own = {name: settings.pop(name) for name in list(settings) if name in TaskConfig.__dataclass_fields__}
    data = DataConfig(train=str(path), **{"split_column": "split", "valid_fraction": 0.0, **settings})
    return load_splits(TrainConfig(task=TaskConfig(name=task, **own), data=data), task_class(task).label_kind)


RESIDUES: list[Row] = [("MKVA", "HHEE"), ("MK", "E-"), ("ACDEFGHIKL", "HHHHEEEE?E"), ("W", "H")]


def test_several_labels_a_protein_are_ones_in_a_row(tmp_path: Path) -> None:
    splits = load(tmp_path, "multi_label", [("MK", "B;A"), ("MKV", "B"), ("MA", "A; C")])
    assert splits.labels == ("A", "B", "C")
    assert splits.train.labels.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert splits.train.labels.dtype == np.uint8


def test_labels_of_residues_lie_along_the_tokens_and_unknown_ones_are_counted(tmp_path: Path) -> None:
    splits = load(tmp_path, "residue_classification", RESIDUES)
    assert splits.labels == ("E", "H")
    assert splits.train.labels.tolist() == [
        *(-1, 1, 1, 0, 0, -1),
        *(-1, 0, -1, -1),
        *(-1, 1, 1, 1, 1, 0, 0, 0, 0, -1, 0, -1),
        *(-1, 1, -1),
    ]
    assert "2 residues without a label (task.ignore)" in splits.summary()
    assert load(tmp_path, "residue_classification", RESIDUES, ignore=("?",)).labels == ("-", "E", "H")


def test_a_dash_for_many_residues_is_asked_about(tmp_path: Path) -> None:
    rows = [("MKVA", "HHE-"), ("ACDEFGHIKL", "HHHHEEEE--")]
    with pytest.raises(
        DataError, match=r"x.tsv: column 'label' has '-' for 21% of the training residues: a class"
    ) as e:
        load(tmp_path, "residue_classification", rows)
    assert "task.ignore=[?, .]" in str(e.value) and "task.ignore=[-, ?, .]" in str(e.value)
    assert load(tmp_path, "residue_classification", rows, ignore=("?", ".")).labels == ("-", "E", "H")
    assert load(tmp_path, "residue_classification", rows, ignore=("-",)).labels == ("E", "H")
    named = load(tmp_path, "residue_classification", rows, labels=("H", "E", "-"))
    assert named.labels == ("H", "E", "-") and 2 in named.train.labels
    labels = ResidueLabels(TaskConfig(name="residue_classification"), "label")
    found = check_file(str(tmp_path / "x.tsv"), DataConfig(), labels, "train", None)
    assert found.faults == 1 and "has '-' for 21%" in found.first_faults[0]


def test_residue_labels_may_be_a_list(tmp_path: Path) -> None:
    rows = [(s, ",".join(label)) for s, label in RESIDUES]
    assert (
        load(tmp_path, "residue_classification", rows).fingerprint
        == load(tmp_path, "residue_classification", RESIDUES).fingerprint
    )
    long = load(tmp_path, "residue_classification", [("MKV", "helix,coil,helix"), ("W", "coil")])
    assert long.labels == ("coil", "helix")
    path = tmp_path / "x.jsonl"
    lines = [{"id": str(i), "sequence": s, "label": list(label)} for i, (s, label) in enumerate(RESIDUES)]
    path.write_text("\n".join(map(json.dumps, lines)))
    table, _ = load_inputs(path, DataConfig(), ResidueLabels(TaskConfig(labels=("E", "H")), "label"))
    assert table.labels.tolist() == load(tmp_path, "residue_classification", RESIDUES).train.labels.tolist()


@pytest.mark.parametrize(
    ("choice", "pieces"),
    [("crop", ["HHHHE"]), ("crop_ends", ["HHH?E"]), ("window", ["HHHHE", "EEEE?", "EEE?E"])],
)
def test_labels_are_cut_with_their_sequence(tmp_path: Path, choice: str, pieces: list[str]) -> None:
    rows = [("ACDEFGHIKL", "HHHHEEEE?E")]
    splits = load(tmp_path, "residue_classification", rows, long_sequences=choice, max_residues=5, window_overlap=1)
    table = splits.train
    index = {"H": 1, "E": 0, "?": -1}
    assert table.labels.tolist() == [i for piece in pieces for i in (-1, *(index[c] for c in piece), -1)]
    slot, bounds = table.residue_slots()
    assert bounds.tolist() == [0, 10]
    whole = np.array([index[c] for c in "HHHHEEEE?E"])
    assert (table.labels[slot >= 0] == whole[slot[slot >= 0]]).all()
    assert (slot[[0, 6]] == -1).all()


def test_values_of_a_regression(tmp_path: Path) -> None:
    splits = load(tmp_path, "regression", [("MK", "1"), ("MKV", "-2.5e1"), ("MA", "3")])
    assert splits.train.labels.tolist() == [1.0, -25.0, 3.0]
    assert splits.labels == ()
    assert splits.task.target_mean == pytest.approx(-7)
    assert splits.task.target_sd == pytest.approx(np.std([1, -25, 3]))
    given = load(tmp_path, "regression", [("MK", "1"), ("MKV", "2")], target_mean=0.0, target_sd=2.0)
    assert (given.task.target_mean, given.task.target_sd) == (0.0, 2.0)


FAULTS: dict[str, tuple[str, list[Row], str]] = {
    "an empty part": ("multi_label", [("MK", "A;B"), ("MK", "A;;B")], "label 'A;;B' has an empty part; "),
    "a label twice": ("multi_label", [("MK", "A;B"), ("MK", "B;B")], "label 'B;B' has 'B' twice; keep one"),
    "too few": ("residue_classification", [("MK", "AB"), ("MKV", "AB")], "2 residue labels for a sequence of 3 resid"),
    "too many in a list": ("residue_classification", [("MK", "AB"), ("MK", "A,B,A")], "3 residue labels for a sequ"),
    "an empty one": ("residue_classification", [("MK", "AB"), ("MKV", "A,,B")], "the label of residue 2 is empty"),
    "a word": ("regression", [("MK", "1"), ("MK", "high")], "'high' is no finite number; write such as 1234.5, or"),
    "infinity": ("regression", [("MK", "1"), ("MK", "inf")], "'inf' is no finite number; "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_label_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, fault: str) -> None:
    task, rows, message = FAULTS[fault]
    with pytest.raises(DataError, match=rf"^\S+x.tsv:3: column 'label' of 'p1': {message}") as caught:
        load(tmp_path, task, rows)
    assert "\n" not in str(caught.value)


def test_words_in_place_of_numbers_are_told_once_with_the_first_rows(tmp_path: Path) -> None:
    rows = [("MK", ("in", "out")[number % 2]) for number in range(30)]
    with pytest.raises(DataError) as caught:
        load(tmp_path, "regression", rows)
    head, *lines = str(caught.value).splitlines()
    assert "31 problems (the first of each kind)" in head and len(lines) == 4
    assert "'in' is no finite number" in lines[0] and lines[2].endswith("(and 27 more like it)")
    assert "column 'label' has no number at all; name a column of numbers" in lines[3]


def test_faults_of_all_chunks_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sources", "parts"):
        monkeypatch.setattr(f"esm_neuron.data.{module}.CHUNK_ROWS", 2)
    rows = [("MK", text) for text in ("1", "high", "2", "low", "3", "none")]
    with pytest.raises(DataError, match=r"3 problems \(all listed\):\n.*'high'.*\n.*'low'.*\n.*column 'label' of 'p5'"):
        load(tmp_path, "regression", rows)
    path = tmp_path / "y.csv"
    path.write_text("id,sequence,label\na,MK,1\nb,MK,high\nc,MK,\nd,M*K,2\ne,MK,low\nf,MK,3\n")
    with pytest.raises(DataError, match=r"4 problems \(all listed\):(\n.*){4}$") as caught:
        InputChunks(path, DataConfig(), Numbers(TaskConfig(), "label")).read()
    assert [line.split(": ")[0].rsplit(":")[-1] for line in str(caught.value).splitlines()[1:]] == ["3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("task", "same", "other"),
    [
        ("multi_label", ("A;B", "B; A"), "A"),
        ("regression", ("1", "1.0"), "1.5"),
        ("residue_classification", ("HE", "H, E"), "HH"),
    ],
)
def test_labels_that_say_the_same_do_not_conflict(tmp_path: Path, task: str, same: tuple[str, str], other: str) -> None:
    rows = [("MK", same[0]), ("MK", same[1]), ("AC", same[0]), ("AC", other)]
    splits = load(tmp_path, task, rows)
    assert splits.reports[1].conflicting == 2
    labels = task_class(task).label_kind(TaskConfig(name=task), "label")
    assert check_file(str(tmp_path / "x.tsv"), DataConfig(split_column=None), labels, "train", None).conflicting == 2


@pytest.mark.parametrize(
    ("task", "strange", "message"),
    [
        ("multi_label", "A;D", "label 'D' is not one of the classes 'A', 'B'; correct it, "),
        ("residue_classification", "AD", "label 'D' of residue 2 is not one of the classes 'A', 'B'; "),
    ],
)
def test_a_label_that_training_does_not_know_is_refused(tmp_path: Path, task: str, strange: str, message: str) -> None:
    label = "A;B" if task == "multi_label" else "AB"
    with pytest.raises(DataError, match=rf"x.tsv:3: column 'label' of 'p1': {message}"):
        load(tmp_path, task, [("MK", label), ("MK", strange)], ["train", "test"])


@pytest.mark.parametrize(
    ("task", "rows", "settings", "message"),
    [
        ("multi_label", [("MK", "A")], {}, "has one class only, 'A', in the training proteins"),
        ("residue_classification", [("MK", "--")], {}, "has no class in the training proteins"),
        ("regression", [("MK", "2"), ("MKV", "2")], {}, "every training value is 2: there is nothing to learn"),
        ("multi_label", [("MK", "A;B")], {"class_weights": {"A": 1.0}}, "task.class_weights: 'B' has no weight; weigh"),
        ("multi_label", [("MK", "A;B")], {"class_weights": {"A": 1, "B": 1, "C": 2}}, "'C' is no class; weigh each"),
        (
            "multi_label",
            [("MK", "A;B")],
            {"labels": ("A", "B", "C"), "class_weights": "balanced"},
            "every training protein is of class 'A'; weigh the classes by hand",
        ),
        (
            "residue_classification",
            [("MK", "AB")],
            {"labels": ("A", "B", "C"), "class_weights": "balanced"},
            "no training protein is of class 'C'",
        ),
    ],
)
def test_training_rows_that_decide_nothing(
    tmp_path: Path, task: str, rows: list[Row], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        load(tmp_path, task, rows, **settings)
    assert "\n" not in str(caught.value)


def test_balanced_weights_are_scikit_learns_and_read_back_from_the_runs_configuration(tmp_path: Path) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = ["1", "1", "1", "0", "B 2"]
    rows = [("MK" + "A" * i, label) for i, label in enumerate(labels)]
    task = load(tmp_path, "sequence_classification", rows, class_weights="balanced").task
    expected = compute_class_weight("balanced", classes=np.array(["0", "1", "B 2"]), y=labels)
    assert task.class_weights == dict(zip(["0", "1", "B 2"], expected.round(6), strict=True))
    cfg = TrainConfig(task=task)
    (tmp_path / "c.yaml").write_text(settings.dump(cfg))
    assert settings.read_config(tmp_path / "c.yaml") == cfg
    per_residue = load(
        tmp_path, "residue_classification", [("MKVA", "HHH?"), ("M", "E")], class_weights="balanced"
    ).task
    assert per_residue.class_weights == {"E": 2.0, "H": pytest.approx(2 / 3, abs=1e-6)}
    several = load(
        tmp_path, "multi_label", [("MK", "A"), ("MV", "A;B"), ("MA", "A"), ("M", "B")], class_weights="balanced"
    )
    assert several.task.class_weights == {"A": pytest.approx(1 / 3, abs=1e-6), "B": 1.0}


def test_sampled_validation_rows_are_spread_over_labels_and_values(tmp_path: Path) -> None:
    rows = [("M" + "K" * i, "rare;common" if i % 10 == 0 else "common") for i in range(100)]
    splits = load(tmp_path, "multi_label", rows, split_column=None, valid_fraction=0.2)
    assert splits.valid is not None
    assert splits.valid.labels.sum(0).tolist() == [20, 2]
    values = [("M" + "K" * i, str(i)) for i in range(100)]
    splits = load(tmp_path, "regression", values, split_column=None, valid_fraction=0.2)
    assert splits.valid is not None
    assert np.bincount((splits.valid.labels // 10).astype(int)).tolist() == [2] * 10
    assert splits.task.target_mean == pytest.approx(splits.train.labels.mean()), "of the rows that are trained on"


@pytest.mark.parametrize(
    ("task", "setting", "value"),
    [
        ("regression", "label_smoothing", 0.1),
        ("masked_lm", "class_weights", "balanced"),
        ("multi_label", "mask_probability", 0.5),
        ("sequence_classification", "ignore", ("x",)),
        ("sequence_classification", "target_sd", 2.0),
    ],
)
def test_a_setting_that_a_task_would_pass_over_is_refused(task: str, setting: str, value: Any) -> None:
    cfg = TrainConfig(task=replace(TaskConfig(name=task), **{setting: value}), data=DataConfig(train="x"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"task.{setting}=.* has no effect on {task}; leave it out \(it is for "):
        check_task(cfg.task)
