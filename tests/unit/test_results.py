"""benchmarks/results.py: paired differences are those of the metrics, the page is that of the saved results."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from esm_neuron.config.rules import validate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results() -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def made(task: str, seed: int, n: int = 60) -> pd.DataFrame:
    """Predictions of a run, right more often than not; the targets are the same for all seeds."""
    fixed, noise = np.random.default_rng(0), np.random.default_rng(seed)
    if task == "regression":
        value = fixed.normal(0, 1, n)
        return pd.DataFrame({"target": value, "value": value + noise.normal(0, seed, n)})
    if task == "masked_lm":
        hidden = fixed.integers(0, 5, n)
        return pd.DataFrame({"hidden": hidden, "loss": np.where(hidden > 0, noise.gamma(9, 0.3, n), np.nan)})
    if task == "residue_classification":
        each = [fixed.choice(["a", "b", None], size) for size in fixed.integers(5, 30, n)]
        said = [
            "".join(noise.choice(["a", "b"]) if noise.random() < 0.3 else name or "a" for name in row) for row in each
        ]
        return pd.DataFrame({"target": each, "labels": said})
    words = ["a", "b", "c"] if task == "sequence_classification" else ["a", "a;b", "b;c", "c"]
    right = fixed.choice(words, n)
    said = np.where(noise.random(n) < 0.2 * seed, noise.choice(words, n), right)
    p = {f"p_{c}": np.round([(c in text) + noise.normal(0, seed) for text in right], 1) for c in "abc"}
    return pd.DataFrame({"target": right, "label": said, **p})


def expected(task: str, metric: str, predictions: pd.DataFrame) -> float:
    """The same metric by scikit-learn and pandas."""
    if metric == "auroc":
        return float(sk.roc_auc_score(predictions["target"].str.get_dummies(";"), predictions[["p_a", "p_b", "p_c"]]))
    if task == "regression":
        return float(predictions["value"].corr(predictions["target"], method="spearman"))
    if task == "masked_lm":
        asked = predictions[predictions["hidden"] > 0]
        return float(np.exp(np.average(asked["loss"], weights=asked["hidden"])))
    if task == "multi_label":
        targets, predicted = (predictions[name].str.get_dummies(";") for name in ("target", "label"))
        return float(sk.f1_score(targets, predicted, average="macro"))
    if task == "residue_classification":
        pairs = [(t, s) for row in predictions.itertuples() for t, s in zip(row.target, row.labels, strict=True) if t]
        return float(sk.matthews_corrcoef(*zip(*pairs, strict=True)))
    return float(sk.matthews_corrcoef(predictions["target"], predictions["label"]))


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("sequence_classification", "mcc"),
        ("multi_label", "macro_f1"),
        ("multi_label", "auroc"),
        ("residue_classification", "mcc"),
        ("regression", "spearman"),
        ("masked_lm", "perplexity"),
    ],
)
def test_a_difference_is_that_of_the_metrics_and_sampled_in_pairs(results: ModuleType, task: str, metric: str) -> None:
    one, other = made(task, 1), made(task, 2)
    labels = ("a", "b") if task == "residue_classification" else ("a", "b", "c")
    found = results.paired(task, metric, labels, one, other)
    assert found["difference"] == pytest.approx(expected(task, metric, one) - expected(task, metric, other), abs=1e-9)
    low, high = found["difference_ci"]
    assert low < found["difference"] < high
    drawn = np.random.default_rng(0).integers(0, len(one), len(one))
    multiplicities = np.bincount(drawn, minlength=len(one))[None].astype(float)
    again = results.scorer(task, metric, labels, one)(multiplicities)[0]
    assert again == pytest.approx(expected(task, metric, one.iloc[drawn].reset_index(drop=True)), abs=1e-9)
    assert results.paired(task, metric, labels, one, one)["difference_ci"] == [0, 0]
    same = results.verdict(metric, {"difference": 0.1, "difference_ci": [-0.1, 0.3]})
    assert (same, results.verdict(metric, {"difference": 0.1, "difference_ci": [0.05, 0.3]})) == (
        "undecided",
        "worse" if metric == "perplexity" else "better",
    )


def test_every_experiment_has_a_legal_configuration(results: ModuleType, tmp_path: Path) -> None:
    for experiment in results.EXPERIMENTS:
        for init in results.INITS:
            cfg = results.configured(experiment, init, tmp_path / "data", tmp_path)
            validate(cfg)
            assert cfg.model.init == init
            assert (
                Path(str(cfg.data.train)).parts[: len(ROOT.parts)] == ROOT.parts
                or tmp_path in Path(str(cfg.data.train)).parents
            )
