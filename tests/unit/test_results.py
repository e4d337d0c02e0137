"""benchmarks/results.py: what a run has kept gives its metrics again, and every experiment can be run."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from esm_neuron.config import TaskConfig
from esm_neuron.config.rules import validate
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.run_dir import as_table
from esm_neuron.tasks import TASKS, check_model, create_task

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


def table_of(task: str, n: int = 60) -> ExampleTable:
    """Proteins with labels; the second has a residue that was not kept."""
    rng = np.random.default_rng(0)
    tokens, offsets = encode_many(["".join(rng.choice(list("LAGVSERTIDPK"), size)) for size in rng.integers(5, 30, n)])
    table = ExampleTable.of(tokens, offsets)
    slot, bounds = table.residue_slots()
    labels = {
        "sequence_classification": rng.integers(0, 3, n),
        "multi_label": (rng.random((n, 3)) < 0.5).astype(np.uint8),
        "regression": rng.normal(0, 1, n),
        "residue_classification": np.where(slot < 0, -1, rng.integers(-1, 3, bounds[-1])[slot]).astype(np.int16),
        "masked_lm": np.empty(0),
    }
    return replace(table, labels=labels[task])


@pytest.mark.parametrize("name", TASKS)
def test_kept_predictions_give_the_metrics_and_resamples_of_the_run(results: ModuleType, name: str) -> None:
    task, table = create_task(TaskConfig(name=name, target_mean=0.0, target_sd=1.0), ("a", "b", "c")), table_of(name)
    rng = np.random.default_rng(1)
    classes = (3,) if name.endswith("classification") or name == "multi_label" else ()
    predictions = [rng.normal(size=(len(table.tokens) if task.predictions_per_token else len(table), *classes))]
    if name == "masked_lm":
        hidden = rng.integers(0, 5, len(table)).astype(float)
        predictions = [hidden * rng.gamma(9, 0.3, len(table)), hidden, hidden // 2]
    units = np.arange(len(table)) // 2
    expected = task.metrics(table, predictions, True, units)
    again = results.as_predictions(task, table, as_table(task, table, predictions))
    found = task.metrics(table, again, True, units)
    for metric, value in expected.items():
        if metric == "per_class" or (name == "masked_lm" and metric.startswith("accuracy")):
            continue  # of hits in masked LM nothing is kept
        assert found[metric] == pytest.approx(value, rel=1e-5, abs=1e-7), metric
    same = "perplexity" if name == "masked_lm" else task.metric
    np.testing.assert_allclose(found.drawn[same], expected.drawn[same], rtol=1e-5, atol=1e-7)


def test_every_experiment_has_a_legal_configuration(results: ModuleType, tmp_path: Path) -> None:
    for experiment in results.EXPERIMENTS:
        for way in results.WAYS:
            cfg = results.configured(experiment, way, tmp_path / "data", tmp_path)
            assert (cfg is None) == (way == "probe" and experiment.name == "masked_lm")
            if cfg is None:
                continue
            validate(cfg)
            check_model(cfg)
            assert (cfg.model.init == "random") == (way == "random")
            assert way == "random" or cfg.adapter.kind == {"full": "none"}.get(way, way)
            assert (
                Path(str(cfg.data.train)).parts[: len(ROOT.parts)] == ROOT.parts
                or tmp_path in Path(str(cfg.data.train)).parents
            )
