"""Samples and folds by cluster: quotas, shares of classes, warnings; class weights by counts; cross-validation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.toys import ALPHABETS, Toy

from esm_neuron.config import DataConfig, TaskConfig, TrainConfig
from esm_neuron.data.class_weights import said_weights
from esm_neuron.data.labels import Labels, LabelSets
from esm_neuron.data.sampling import BOUND, assign_folds, sample_clusters, uneven
from esm_neuron.data.splits import load_splits
from esm_neuron.errors import CheckpointError, ConfigError, DataError
from esm_neuron.training import run
from esm_neuron.training.repeats import summarize


def made(rng: np.random.Generator, sizes: list[int], shares: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of the given sizes and the groups of their rows: nine of ten rows have the cluster's own group."""
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    own = rng.choice(len(shares), len(sizes), p=shares)[cluster]
    other = rng.choice(len(shares), len(cluster), p=shares)
    groups = np.where(rng.random(len(cluster)) < 0.9, own, other)
    groups[: len(shares)] = np.arange(len(shares))
    return cluster, groups


def draw(cluster: np.ndarray, groups: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    allowed = np.ones(len(groups), dtype=bool)
    return sample_clusters(cluster, groups, allowed, fraction, seed=seed, split="valid", source="x.csv")


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_by_cluster_is_full_whole_and_in_proportion(seed: int) -> None:
    """Families from one protein to 100, five classes from 60 % to 4 %: as in the sets on which the quota was missed."""
    rng = np.random.default_rng(seed)
    sizes = [*rng.integers(2, 100, 20).tolist(), *rng.integers(1, 6, 500).tolist(), *[1] * 400]
    cluster, groups = made(rng, sizes, [0.6, 0.2, 0.1, 0.06, 0.04])
    chosen = draw(cluster, groups, 0.1, seed)
    assert abs(chosen.sum() - 0.1 * len(groups)) <= 2
    assert not set(cluster[chosen]) & set(cluster[~chosen])
    wanted = 0.1 * np.bincount(groups)
    assert (np.abs(np.bincount(groups[chosen], minlength=5) - wanted) <= np.maximum(1.5, BOUND * wanted + 1)).all()


def test_a_class_of_large_families_alone_is_held_out_too() -> None:
    cluster = np.concatenate([np.repeat(np.arange(8), 12), np.arange(8, 404)])
    groups = np.concatenate([np.full(96, 1), np.zeros(396, np.int64)])
    chosen = draw(cluster, groups, 0.1)
    assert np.bincount(groups[chosen]).tolist()[1] == 12, "one family, though its share is 9.6"


def test_what_cannot_be_sampled_in_proportion_is_said() -> None:
    whole, own = {"in": 900, "out": 100}, {"in": 5, "out": 45}
    lines = uneven("valid", 100, 50, whole, own)
    assert lines[0].startswith("WARNING: valid split: 100 proteins were wanted, 50 could be held out: clusters of")
    assert [line.partition("held out")[0] for line in lines[1:]] == [
        "WARNING: valid split: of class 'in' 45 were wanted, as in all, and 5 could be ",
        "WARNING: valid split: of class 'out' 5 were wanted, as in all, and 45 could be ",
    ]
    assert uneven("valid", 100, 95, whole, {"in": 86, "out": 9}) == []


def test_the_warning_and_the_counts_are_printed(tmp_path: Path) -> None:
    """One family is half of its class, so it stays in training, and few others are left of it."""
    rng, rows = np.random.default_rng(0), []
    letters = list("ACDEFGHIKLMNPQRSTVWY")
    founder = rng.choice(letters, 120)
    for number in range(300):
        family = number < 140
        sequence = (
            np.where(rng.random(120) < 0.1, rng.choice(letters, 120), founder) if family else rng.choice(letters, 120)
        )
        rows.append(f"p{number},{''.join(sequence)},{'in' if number < 150 else 'out'}")
    (tmp_path / "x.csv").write_text("\n".join(["id,sequence,label", *rows]) + "\n")
    data = DataConfig(train=str(tmp_path / "x.csv"), sample="clusters", valid_fraction=0.2)
    splits = load_splits(TrainConfig(data=data), Labels)
    assert splits.valid is not None
    counts = np.bincount(splits.valid.labels, minlength=2)
    lines = splits.summary().split("\n")
    assert f"valid split: in {counts[0]}, out {counts[1]}" in lines
    assert any(line.startswith("WARNING: valid split: 60 proteins were wanted") for line in lines)
    assert any(line.startswith("WARNING: valid split: of class 'in'") for line in lines)
    by_proteins = load_splits(TrainConfig(data=replace(data, sample="proteins")), Labels).summary()
    assert "valid split: in 30, out 30" in by_proteins.split("\n") and "WARNING" not in by_proteins


@pytest.mark.parametrize("clustered", [True, False])
def test_folds_part_the_rows_and_keep_shares(clustered: bool) -> None:
    rng = np.random.default_rng(0)
    cluster, groups = made(rng, rng.integers(1, 8, 200).tolist(), [0.7, 0.2, 0.1])
    fold = assign_folds(cluster if clustered else None, groups, 4, seed=3)
    share = np.bincount(groups) / 4
    for number in range(4):
        counts = np.bincount(groups[fold == number], minlength=3)
        assert (np.abs(counts - share) <= np.maximum(4, 0.1 * share)).all()
        if clustered:
            assert not set(cluster[fold == number]) & set(cluster[fold != number])
    assert (assign_folds(cluster if clustered else None, groups, 4, seed=3) == fold).all()
    assert (assign_folds(cluster if clustered else None, groups, 4, seed=4) != fold).any()


def test_each_protein_is_tested_on_in_one_fold(toy: Toy, tmp_path: Path) -> None:
    cfg = toy(data={"valid": None, "test": None, "folds": 3, "valid_fraction": 0.2})
    tested: list[str] = []
    for number in range(1, 4):
        splits = load_splits(replace(cfg, data=replace(cfg.data, fold=str(number))), Labels)
        assert splits.test is not None and splits.valid is not None
        assert (len(splits.test), len(splits.valid), len(splits.train)) == (20, 8, 32)
        assert not {*splits.test.ids} & {*splits.valid.ids, *splits.train.ids}
        tested += splits.test.ids
    assert len(tested) == len(set(tested)) == 60


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"folds": 3, "test": "x.csv"}, ConfigError, "data.folds=3 samples what is tested on; leave out data.test "),
        ({"folds": 3, "test": None, "fold": 4}, ConfigError, "data.fold=4 is none of data.folds=3; use 1 to 3"),
        ({"folds": 50, "test": None, "fold": 1}, DataError, "60 proteins are too few for data.folds=50; use 30"),
    ],
)
def test_folds_that_cannot_be(toy: Toy, data: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_splits(toy(data={"valid": None, **data}), Labels)


def test_cross_validation_has_a_run_per_fold_and_their_mean(toy: Toy, tmp_path: Path) -> None:
    cfg = toy("cv", data={"valid": None, "test": None, "folds": 3, "valid_fraction": 0.2}, loop={"max_steps": 2})
    said: list[str] = []
    outcome = run.train(cfg, said.append)
    out = Path(cfg.output)
    summary = json.loads((out / "folds.json").read_text())
    assert outcome.result == summary
    single = [json.loads((out / f"fold-{n}" / "result.json").read_text()) for n in (1, 2, 3)]
    values = [result["test"]["mcc"] for result in single]
    assert summary["metrics"]["mcc"]["values"] == values
    assert summary["metrics"]["mcc"]["mean"] == pytest.approx(np.mean(values))
    assert summary["metrics"]["mcc"]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert summary["proteins"] == [20, 20, 20]
    assert f"this model: mean {np.mean(values):.3f}, sd" in said[-1] and "ours is better in" in said[-1]
    # a fold whose result is gone is made anew, the others are not trained again, and the mean is the same
    marks = [(out / f"fold-{n}" / "metrics.jsonl").read_text() for n in (1, 3)]
    (out / "fold-2" / "result.json").unlink()
    again = run.train(replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto")), said.append)
    assert again.result["metrics"]["mcc"]["values"] == values
    assert [(out / f"fold-{n}" / "metrics.jsonl").read_text() for n in (1, 3)] == marks
    with pytest.raises(CheckpointError, match="optim.lr was"):  # folds of other settings make no mean
        run.train(
            replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto"), optim=replace(cfg.optim, lr=1e-5)),
            said.append,
        )


def test_a_metric_that_a_fold_lacks_is_left_out_of_the_mean() -> None:
    fold = {"task": "t", "metric": "mcc", "data": {"test": {"records": 2}}, "clean": {}, "baselines": {}}
    found = summarize([{**fold, "test": {"mcc": 0.5, "ci": [0, 1]}}, {**fold, "test": {"mcc": None}}])
    assert found["metrics"] == {"mcc": {"mean": 0.5, "sd": None, "values": [0.5, None]}}


@pytest.mark.parametrize(
    ("kind", "train", "weights"),
    [
        (Labels, [0] * 20 + [1] * 10, "none"),
        (Labels, [0] * 80 + [1] * 20, {"a": 0.790569, "b": 1.581139}),
        (Labels, [0] * 99_999 + [1], {"a": 0.70711, "b": 10.0}),
        (LabelSets, [[1, 1]] * 30 + [[0, 0]] * 20, "none"),
        (LabelSets, [[1, 1]] * 10 + [[1, 0]] * 150, {"a": 0.031623, "b": 3.872983}),
    ],
)
def test_automatic_class_weights(kind: type[Labels], train: list[object], weights: object) -> None:
    labels = kind(TaskConfig(labels=("a", "b"), class_weights="auto"), "label")
    task = labels.resolve(np.array(train, np.uint8 if kind is LabelSets else np.int64))
    assert task.class_weights == (pytest.approx(weights, abs=1e-5) if isinstance(weights, dict) else weights)
    assert ("some classes are rare: b " in said_weights(task)) == isinstance(weights, dict)


def test_weights_of_rare_classes_are_said_and_saved(tmp_path: Path, toy: Toy) -> None:
    rng = np.random.default_rng(0)
    rows = [
        f"p{n},{''.join(rng.choice(list(ALPHABETS['alpha' if n % 8 else 'beta']), 30))},{'alpha' if n % 8 else 'beta'}"
        for n in range(80)
    ]
    (tmp_path / "rare.csv").write_text("\n".join(["id,sequence,label", *rows]) + "\n")
    cfg = toy(data={"train": str(tmp_path / "rare.csv"), "valid": None, "test": None}, task={"class_weights": "auto"})
    splits = load_splits(cfg, Labels)
    assert splits.task.class_weights == pytest.approx({"alpha": 0.76, "beta": 2.0}, abs=0.05)
    assert "class weights (task.class_weights=auto), since some classes are rare: beta" in splits.summary()
