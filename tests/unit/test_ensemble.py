"""Ensembles of seeds: members share their proteins, their predictions are averaged, and the spread is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.toys import Toy

from esm_neuron.config import TaskConfig, TrainConfig, settings
from esm_neuron.errors import ConfigError
from esm_neuron.inference.embed import embed
from esm_neuron.inference.evaluate import evaluate
from esm_neuron.inference.export import export
from esm_neuron.inference.predict import predict
from esm_neuron.inference.serving import load
from esm_neuron.reports.html import write_report
from esm_neuron.run_dir import read_calibration, read_result
from esm_neuron.tasks import create_task
from esm_neuron.training import run

SAMPLED = {"valid": None, "test": None, "valid_fraction": 0.3, "test_fraction": 0.3}


@pytest.fixture(scope="module")
def trained(module_toy: Toy) -> TrainConfig:
    """Three seeds, which sample validation and test proteins."""
    cfg = replace(module_toy("three", data=SAMPLED, optim={"lr": 1e-2}), seeds=3)
    run.train(cfg, str)
    return cfg


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_mean_is_that_of_probabilities(scale: float) -> None:
    rng = np.random.default_rng(0)
    each = [[rng.normal(0, scale, (50, 3)).astype(np.float32)] for _ in range(4)]

    def softmax(logits: np.ndarray) -> np.ndarray:
        return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    logits = [predictions[0].astype(np.float64) for predictions in each]
    for name in ("sequence_classification", "residue_classification"):
        (found,) = create_task(TaskConfig(name=name), "ABC").averaged(each)
        wanted = np.mean([softmax(one) for one in logits], axis=0)
        np.testing.assert_allclose(softmax(found.astype(np.float64)), wanted, rtol=1e-4)
    (found,) = create_task(TaskConfig(name="multi_label"), "ABC").averaged(each)
    for sign in (1, -1):
        wanted = np.mean([1 / (1 + np.exp(-sign * one)) for one in logits], axis=0)
        np.testing.assert_allclose(1 / (1 + np.exp(-sign * found.astype(np.float64))), wanted, rtol=1e-4)
    regression = create_task(TaskConfig(name="regression", target_mean=0.0, target_sd=1.0), ())
    (found,) = regression.averaged([[predictions[0][:, 0]] for predictions in each])
    np.testing.assert_allclose(found, np.mean([one[:, 0] for one in logits], axis=0), rtol=1e-5, atol=1e-5)


def test_members_are_runs_on_the_same_proteins_that_differ_in_their_seed(trained: TrainConfig, toy: Toy) -> None:
    out = Path(trained.output)
    members = [out / f"seed-{seed}" for seed in (42, 43, 44)]
    for name in ("valid_ids.txt", "test_ids.txt"):
        assert len({(member / name).read_text() for member in members}) == 1
    weights = [(member / "adapter" / "adapter_model.safetensors").read_bytes() for member in members]
    assert len(set(weights)) == 3
    # a run of its own with the same seeds is the second one
    alone = replace(toy("alone", data=SAMPLED | {"train": trained.data.train}, optim={"lr": 1e-2}), seed=43)
    run.train(replace(alone, data=replace(alone.data, sample_seed=42)), str)
    assert (Path(alone.output) / "adapter" / "adapter_model.safetensors").read_bytes() == weights[1]
    assert (Path(alone.output) / "test_ids.txt").read_text() == (out / "seed-42" / "test_ids.txt").read_text()


def test_the_result_has_the_metrics_of_the_mean_and_their_spread(trained: TrainConfig) -> None:
    out = Path(trained.output)
    result = read_result(out)
    own = [read_result(out / f"seed-{seed}") for seed in (42, 43, 44)]
    for split in ("valid", "test"):
        values = [one[split]["mcc"] for one in own]
        spread = result["seeds"][split]["mcc"]
        assert (spread["values"], spread["mean"]) == (values, pytest.approx(np.mean(values)))
        assert spread["sd"] == pytest.approx(np.std(values, ddof=1))
    assert result["seeds"]["seeds"] == [42, 43, 44]
    assert result["train"]["steps"] == sum(one["train"]["steps"] for one in own)
    assert result["baselines"]["test"] and not own[0]["baselines"], "scored once, beside the mean"
    assert "test" in result["verdicts"]
    assert settings.read_config(out / "config.yaml").seeds == 3
    assert read_calibration(out, 2).proteins == result["data"]["valid"]["records"]
    assert "of 24" in write_report(out).read_text()


def test_predict_evaluate_and_load_average_the_members(trained: TrainConfig, tmp_path: Path) -> None:
    out, source = Path(trained.output), Path(str(trained.data.train))
    rows = pd.read_csv(source)
    ids = (out / "seed-42" / "test_ids.txt").read_text().split()
    rows[rows["id"].isin(ids)].to_csv(tmp_path / "test.csv", index=False)
    assert predict(str(out), tmp_path / "test.csv", tmp_path / "p.parquet", coverage=0.8) == len(ids)
    found = pd.read_parquet(tmp_path / "p.parquet")
    kept = pd.read_parquet(out / "predictions-test.parquet").set_index("id").loc[found["id"]]
    np.testing.assert_allclose(found["p_alpha"], kept["p_alpha"], atol=1e-5)
    assert (found["label"].to_numpy() == kept["label"].to_numpy()).all()
    assert list(found) == ["id", "label", "p_alpha", "p_beta", "sd_p_alpha", "sd_p_beta", *list(found)[6:]]
    assert (found["sd_p_alpha"] > 0).any()

    # the probabilities of the members, read as those of the mean are
    temperature = read_calibration(out, 2).temperature
    each = []
    for seed in (42, 43, 44):
        one = load(out / f"seed-{seed}")
        own = read_calibration(out / f"seed-{seed}" / "adapter", 2).temperature
        records = list(zip(rows["id"], rows["sequence"], strict=True))
        answered = pd.DataFrame(one.predict(records)).set_index("id").loc[found["id"]]
        logit = np.log(answered["p_beta"] / answered["p_alpha"]) * own  # one window per protein
        each.append(logit.to_numpy())
    spread = np.std([1 / (1 + np.exp(-logit / temperature)) for logit in each], axis=0, ddof=1)
    np.testing.assert_allclose(found["sd_p_beta"], spread, atol=1e-5)
    mean = np.mean([1 / (1 + np.exp(-logit)) for logit in each], axis=0)
    sharpened = 1 / (1 + np.exp(-(np.log(mean) - np.log1p(-mean)) / temperature))
    np.testing.assert_allclose(found["p_beta"], sharpened, atol=1e-5)

    together = load(out).predict(list(zip(rows["id"], rows["sequence"], strict=True)))
    served = pd.DataFrame(together).set_index("id").loc[found["id"]]
    np.testing.assert_allclose(found["p_beta"], served["p_beta"], atol=1e-5)
    np.testing.assert_allclose(found["sd_p_beta"], served["sd_p_beta"], atol=1e-5)

    metrics = evaluate(out, tmp_path / "test.csv", None, log=str)
    assert metrics["mcc"] == pytest.approx(read_result(out)["test"]["mcc"])
    assert metrics["loss"] == pytest.approx(read_result(out)["test"]["loss"], rel=1e-4)


def test_every_task_that_averages_says_its_spread(
    task_toys: dict[str, TrainConfig], tmp_path: Path, same_metrics: Callable[..., None]
) -> None:
    for name in ("multi_label", "regression", "residue_classification"):
        cfg = task_toys[name]
        cfg = replace(cfg, output=str(tmp_path / name), seeds=2, loop=replace(cfg.loop, max_steps=2))
        result = run.train(cfg, str).result
        predict(cfg.output, Path(str(cfg.data.test)), tmp_path / f"{name}.parquet")
        found = pd.read_parquet(tmp_path / f"{name}.parquet")
        numbers = [column for column in found if column == "value" or str(column).startswith("p_")]
        assert numbers
        for column in numbers:
            values, spread = (np.concatenate([np.atleast_1d(v) for v in found[of]]) for of in (column, f"sd_{column}"))
            known = np.isfinite(values)
            assert (np.isfinite(spread) == known).all() and (spread[known] > 0).any()
        scored = evaluate(cfg.output, Path(str(cfg.data.test)), None, log=str)
        assert scored["loss"] == pytest.approx(result["test"]["loss"], rel=1e-4)


def test_an_ensemble_that_was_stopped_goes_on_and_is_the_same(
    trained: TrainConfig, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(toy("again", data=SAMPLED | {"train": trained.data.train}, optim={"lr": 1e-2}), seeds=3)
    real = run._finish

    def breaks(job: run._Job, *rest: object) -> dict[str, object]:
        if job.trainer.cfg.seed == 43:
            raise ConfigError("stopped here")
        return real(job, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(run, "_finish", breaks)
        with pytest.raises(ConfigError, match="stopped here"):
            run.train(cfg, str)
    assert not (Path(cfg.output) / "result.json").exists()
    said: list[str] = []
    again = run.train(replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto")), said.append).result
    assert "resumed after step 8 of 8" in said
    whole = read_result(Path(trained.output))
    assert again["seeds"] == whole["seeds"] and again["test"] == whole["test"]
    assert json.loads((Path(cfg.output) / "result.json").read_text())["seeds"] == json.loads(json.dumps(whole["seeds"]))


def test_what_cannot_be_is_refused(trained: TrainConfig, toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seeds=2: masked_lm has no mean of several models; leave it out"):
        run.train(replace(toy(task={"name": "masked_lm"}), seeds=2), str)
    with pytest.raises(ConfigError, match="already holds a run; go on with --checkpoint.resume auto"):
        run.train(trained, str)
    source = Path(str(trained.data.train))
    for command in (
        lambda: export(trained.output, tmp_path / "model"),
        lambda: embed(trained.output, source, tmp_path / "e.parquet"),
    ):
        with pytest.raises(
            ConfigError, match="is an ensemble of 3 runs, for predict and evaluate; name one of them here"
        ):
            command()
