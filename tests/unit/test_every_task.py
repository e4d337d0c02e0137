"""Every task from a file to metrics and predictions: trained, evaluated on one process and on two, predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.processes import on_two_ranks, saved_config
from helpers.runs import losses

from esm_neuron.backends import cpu
from esm_neuron.config import LoopConfig, TrainConfig
from esm_neuron.data.homology import homolog_rows
from esm_neuron.data.splits import load_splits
from esm_neuron.inference.evaluate import evaluate
from esm_neuron.inference.load import read_run
from esm_neuron.inference.serving import load
from esm_neuron.reports import write_report
from esm_neuron.tasks import TASKS, task_class
from esm_neuron.training import run

METRICS = {
    "sequence_classification": {"accuracy", "balanced_accuracy", "mcc", "macro_f1", "auroc", "auprc"},
    "multi_label": {"subset_accuracy", "macro_f1", "micro_f1", "auroc", "auprc"},
    "regression": {"spearman", "pearson", "rmse", "mae", "r2"},
    "residue_classification": {"accuracy", "balanced_accuracy", "mcc", "macro_f1", "auroc", "auprc"},
    "masked_lm": {"perplexity", "accuracy"},
}
BASELINES = {
    "sequence_classification": {"majority", "composition", "k-mers", "nearest homolog"},
    "multi_label": {"majority", "composition", "k-mers", "nearest homolog"},
    "regression": {"mean", "composition", "k-mers", "nearest homolog"},
    "residue_classification": {"majority", "window", "nearest homolog"},
    "masked_lm": {"unigram"},
}


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """Task -> what its run said."""
    return {}


@pytest.fixture(scope="module")
def results(task_toys: dict[str, TrainConfig], printed: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Task -> the result of its run."""
    return {task: run.train(cfg, printed.setdefault(task, []).append).result for task, cfg in task_toys.items()}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_ends_with_metrics_their_intervals_and_baselines_on_the_same_proteins(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], printed: dict[str, list[str]]
) -> None:
    result = json.loads((Path(task_toys[task].output) / "result.json").read_text())
    assert result == results[task]
    for split, proteins in (("valid", 8), ("test", 21)):
        found = result[split]
        assert found.get("n_records", found["n"]) == proteins
        for name in {"loss", *METRICS[task]}:
            if found[name] is not None:
                low, high = found[f"{name}_ci"]
                assert low <= high, name
        assert set(result["baselines"][split]) == BASELINES[task]
        for name, metrics in result["baselines"][split].items():
            assert metrics.get("n_records", metrics["n"]) == proteins
            assert METRICS[task] <= set(metrics)
            (line,) = (line for line in printed[task] if line.startswith(f"{split}, {name} baseline: n="))
            assert float(line.rpartition(" seconds=")[2]) >= 0
        verdict = result["verdicts"][split]
        assert verdict["metric"] == task_class(task).metric and verdict["best"] in BASELINES[task]
        assert set(verdict["against"]) == {
            n for n in BASELINES[task] if result["baselines"][split][n][verdict["metric"]] is not None
        }
        assert f"{split}: {verdict['text']}" in printed[task]
        assert all(f"{split}: {alarm}" in printed[task] for alarm in result["alarms"].get(split, []))


@pytest.mark.parametrize("task", TASKS)
def test_clean_proteins_have_metrics_of_their_own(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig]
) -> None:
    cfg, result = task_toys[task], results[task]
    splits = load_splits(cfg, task_class(task).label_kind)
    has_homolog = homolog_rows(splits.train, {"valid": splits.valid, "test": splits.test}, "kmer")["test"]
    assert has_homolog.any() and not has_homolog.all()
    assert result["leaks"]["test"] == {"method": "kmer", "proteins": 21, "homologs": int(has_homolog.sum())}
    found, clean = result["clean"]["test"], (~has_homolog).sum()
    assert found.get("n_records", found["n"]) == clean
    assert set(result["clean_verdicts"]) == {"valid", "test"} & set(result["clean"])
    for metrics in result["clean_baselines"]["test"].values():
        assert metrics.get("n_records", metrics["n"]) == clean and METRICS[task] <= set(metrics)
    predictions = pd.read_parquet(Path(cfg.output) / "predictions-test.parquet")
    assert list(predictions["has_homolog"]) == list(has_homolog)
    predictions = predictions[~has_homolog]
    if task == "masked_lm":
        said = np.exp(np.average(predictions["loss"].fillna(0), weights=predictions["hidden"]))
        assert found["perplexity"] == pytest.approx(said, rel=1e-6)
    elif task == "regression":
        assert found["rmse"] == pytest.approx(np.sqrt(np.mean((predictions["value"] - predictions["target"]) ** 2)))
    elif task == "residue_classification":
        targets, said = (np.array([c for row in predictions[name] for c in row]) for name in ("target", "labels"))
        known = targets != None  # noqa: E711 - an array
        assert found["accuracy"] == pytest.approx((targets == said)[known].mean())
    else:
        metric = "accuracy" if task == "sequence_classification" else "subset_accuracy"
        assert found[metric] == pytest.approx((predictions["target"] == predictions["label"]).mean())


@pytest.mark.parametrize("task", TASKS)
def test_the_finished_run_reads_back_with_what_training_decided(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], same_metrics: Callable[..., None]
) -> None:
    cfg, _ = read_run(Path(task_toys[task].output))
    assert (cfg.task.target_sd is not None) == (task == "regression")
    again = evaluate(Path(cfg.output), Path(str(cfg.data.test)), None, None, str)
    same_metrics(again, results[task]["test"], rel=1e-5)


def for_two_ranks(cfg: TrainConfig) -> TrainConfig:
    """The same training, for two processes."""
    return replace(cfg, output=f"{cfg.output}_two", log=replace(cfg.log, baselines=False))


@pytest.fixture(scope="module")
def on_two(results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig]) -> None:
    """Evaluate every run again and train every task anew, in two processes on gloo."""
    jobs = [["evaluate", cfg.output, str(cfg.data.test), f"{cfg.output}/two.json"] for cfg in task_toys.values()]
    on_two_ranks([*jobs, *(["train", str(saved_config(for_two_ranks(cfg)))] for cfg in task_toys.values())])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("on_two")
def test_two_processes_give_the_metrics_of_one_to_the_sixth_digit(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], same_metrics: Callable[..., None]
) -> None:
    found = json.loads((Path(task_toys[task].output) / "two.json").read_text())
    same_metrics(found, results[task]["test"], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("on_two")
def test_two_processes_train_as_one(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], same_metrics: Callable[..., None]
) -> None:
    cfg = for_two_ranks(task_toys[task])
    assert losses(cfg) == pytest.approx(losses(task_toys[task]), rel=1e-5)
    found = json.loads((Path(cfg.output) / "result.json").read_text())
    same_metrics(found["test"], results[task]["test"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_neither_packing_nor_the_size_of_a_batch_changes_a_metric_before_the_sixth_digit(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], same_metrics: Callable[..., None]
) -> None:
    cfg = task_toys[task]
    for words in (["--data.packing=false"], ["--loop.eval_packs_per_device=1", "--data.pack_tokens=128"]):
        found = evaluate(Path(cfg.output), Path(str(cfg.data.test)), None, None, str, words)
        same_metrics(found, results[task]["test"], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_passes_and_filler_change_neither_losses_nor_metrics(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], same_metrics: Callable[..., None]
) -> None:
    cfg = task_toys[task]
    # the weights that the run drew, so that a difference is one of arithmetic
    single = replace(
        cfg, output=f"{cfg.output}_1", loop=replace(cfg.loop, packs_per_device=1, eval_packs_per_device=1),
        log=replace(cfg.log, baselines=False),
    )  # fmt: skip
    result = run.train(single, str).result
    assert losses(single) == pytest.approx(losses(cfg), rel=1e-5)
    same_metrics(result["test"], results[task]["test"], rel=1e-4, abs=1e-5)
    assert result["baselines"] == {}


@pytest.mark.parametrize("task", TASKS)
def test_outputs_have_a_row_for_every_protein(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], tmp_path: Path
) -> None:
    from esm_neuron.inference.predict import predict

    cfg = task_toys[task]
    rows = pd.read_csv(str(cfg.data.test))
    assert predict(cfg.output, Path(str(cfg.data.test)), tmp_path / "predictions.csv", log=str) == len(rows)
    frame = pd.read_csv(tmp_path / "predictions.csv")
    assert list(frame["id"]) == list(rows["id"])
    if task == "residue_classification":
        assert list(frame["labels"].str.len()) == list(rows["sequence"].str.len())
        targets = np.array(list("".join(rows["residues"])))
        said = np.array(list("".join(frame["labels"])))
        accuracy = (said == targets)[targets != "?"].mean()
        assert accuracy == pytest.approx(results[task]["test"]["accuracy"], abs=1e-12)
    elif task == "regression":
        rmse = float(np.sqrt(np.mean((frame["value"] - rows["value"]) ** 2)))
        assert rmse == pytest.approx(results[task]["test"]["rmse"], rel=1e-5)
    elif task == "masked_lm":
        assert frame["hidden"].sum() == results[task]["test"]["n"]
    else:
        said, targets = frame["label"], rows[str(cfg.data.label_column)]
        metric = "accuracy" if task == "sequence_classification" else "subset_accuracy"
        assert (said == targets).mean() == pytest.approx(results[task]["test"][metric])


@pytest.mark.parametrize("task", TASKS)
def test_the_predictions_that_a_run_keeps_are_those_of_predict_and_make_its_report(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], tmp_path: Path
) -> None:
    from esm_neuron.inference.predict import predict

    cfg = task_toys[task]
    predict(cfg.output, Path(str(cfg.data.test)), tmp_path / "predictions.parquet", log=str)
    kept, said = (pd.read_parquet(folder) for folder in (Path(cfg.output) / "predictions-test.parquet", tmp_path))
    rows = pd.read_csv(str(cfg.data.test))
    assert list(kept["residues"]) == list(rows["sequence"].str.len())
    assert list(said) == [name for name in kept if name not in ("residues", "has_homolog", "target")]
    for name in said:
        if name in ("id", "label", "labels"):
            assert list(kept[name]) == list(said[name])
        else:
            expected, found = (np.hstack(list(frame[name])).astype(float) for frame in (said, kept))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    if task == "residue_classification":
        assert ["".join(name or "?" for name in targets) for targets in kept["target"]] == list(rows["residues"])
    elif task != "masked_lm":
        assert list(kept["target"]) == list(rows[str(cfg.data.label_column)])
    assert len(list((write_report(Path(cfg.output))).parent.glob("*.png"))) >= 3


@pytest.mark.parametrize("task", TASKS)
def test_a_prediction_depends_on_no_other_record_nor_on_its_place_among_them(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from esm_neuron.inference import predict as records
    from esm_neuron.inference.predict import predict

    cfg = task_toys[task]
    expected = pd.read_parquet(Path(cfg.output) / "predictions-test.parquet").set_index("id")
    pd.read_csv(str(cfg.data.test))[::-1].to_csv(tmp_path / "reversed.csv", index=False)
    monkeypatch.setattr(records, "piece_tokens", lambda *_: 200)
    predict(cfg.output, tmp_path / "reversed.csv", tmp_path / "predictions.parquet", log=str)
    found = pd.read_parquet(tmp_path / "predictions.parquet").set_index("id")
    assert list(found.index) == list(expected.index)[::-1]
    for name in found:
        both = [np.hstack(list(frame.loc[expected.index, name])) for frame in (found, expected)]
        if name in ("label", "labels"):
            assert list(both[0]) == list(both[1])
        else:
            np.testing.assert_allclose(*(values.astype(float) for values in both), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["residue_classification", "masked_lm"])
def test_what_has_no_prediction_is_null_in_json(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], tmp_path: Path
) -> None:
    from esm_neuron.inference.predict import predict

    run_, limit = task_toys[task].output, task_toys[task].data.max_residues
    rows = [("long", "ACDEFGHIKL" * 6), *((residue, residue) for residue in "ACDEFGHIKL")]
    pd.DataFrame(rows, columns=["id", "sequence"]).to_csv(tmp_path / "some.csv", index=False)
    predict(run_, tmp_path / "some.csv", tmp_path / "a.jsonl", settings=["--data.long_sequences=crop"], log=str)
    predictor = load(Path(run_))
    data = replace(predictor.cfg.data, long_sequences="crop")
    predictions = replace(predictor, cfg=replace(predictor.cfg, data=data)).predict(rows)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for found in (json.loads(json.dumps(predictions, allow_nan=False)), lines):
        if task == "masked_lm":
            assert {row["perplexity"] is None for row in found} == {True, False}
            assert all((row["hidden"] == 0) == (row["loss"] is None) for row in found)
        else:
            assert found[0]["labels"][limit:] == "-" * (60 - limit) and "-" not in found[0]["labels"][:limit]
            assert [p is None for p in found[0]["p_E"]] == [False] * limit + [True] * (60 - limit)


def test_settings_that_are_rarely_meant_are_noted(
    module_toy: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: False)
    cfg = module_toy(
        "noted", data={"valid": None, "valid_fraction": 0.0}, optim={"warmup_steps": 9},
        loop={"patience": 3, "precision": "bf16"}, log={"baselines": False},
    )  # fmt: skip
    said: list[str] = []
    run.train(cfg, said.append)
    assert any(line.startswith("NOTE: loop.patience=3 never ends training") for line in said)
    assert any(line.startswith("NOTE: warm-up (optim.warmup_steps) takes 9 of 8 steps") for line in said)
    assert any(line.startswith("NOTE: loop.precision=bf16 on a CPU without bf16 units") for line in said)
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: True)
    plain = replace(cfg, loop=LoopConfig())
    trainer: Any = SimpleNamespace(cfg=plain, backend=cpu.CpuBackend(plain), valid_loader=object(), total_steps=99)
    assert [note[:58] for note in run._notes(trainer)] == ["NOTE: this CPU has bf16 units: --loop.precision bf16 may b"]
