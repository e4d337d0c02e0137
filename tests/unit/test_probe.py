"""A probe: the minimum that scikit-learn finds on the same states, each protein run once, its head that of any run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.processes import on_two_ranks, saved_config
from helpers.runs import assert_same_metrics, log_lines, losses
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from transformers import EsmForMaskedLM, EsmForTokenClassification

from esm_neuron import cli
from esm_neuron.config import AdapterConfig, TrainConfig
from esm_neuron.data.splits import load_splits
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.inference.embed import embed
from esm_neuron.inference.evaluate import evaluate
from esm_neuron.inference.export import export
from esm_neuron.inference.predict import predict
from esm_neuron.run_dir import read_finished
from esm_neuron.tasks import TASKS, task_class, training_config
from esm_neuron.training import features, linear_fit, probe, run
from esm_neuron.training.evaluation import Evaluator

PROBED = [task for task in TASKS if task != "masked_lm"]


def probed(cfg: TrainConfig, name: str, **model: Any) -> TrainConfig:
    """The run `cfg` as a probe."""
    read = replace(cfg.model, **{"pooling": "mean", "head": None, **model})
    return replace(TrainConfig(), **{**vars(cfg), "output": f"{cfg.output}_{name}", "model": read,
                                     "adapter": AdapterConfig(kind="probe")})  # fmt: skip


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the batches that pass a network."""
    counted: list[int] = []
    forward = Evaluator._pass

    def count(self: Evaluator, batch: Any) -> Any:
        counted.append(int((batch.members >= 0).sum()))
        return forward(self, batch)

    monkeypatch.setattr(Evaluator, "_pass", count)
    return counted


@pytest.fixture(scope="module")
def results(task_toys: dict[str, TrainConfig]) -> dict[str, dict[str, Any]]:
    """Task -> the result of its probe."""
    reads = {"layers": "auto"}
    return {task: run.train(probed(task_toys[task], "probe", **reads), str).result for task in PROBED}


@pytest.mark.parametrize("task", PROBED)
def test_every_task_has_a_probe_which_is_a_run_like_any_other(
    task: str, results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], tmp_path: Path
) -> None:
    cfg = probed(task_toys[task], "probe")
    found, kept = results[task], read_finished(Path(cfg.output))
    assert kept.result == json.loads(json.dumps(found)) and found["adapter"] == "probe"
    own = found["probe"]
    assert own["chosen_on"] == "5 folds of train" and own["layers"] == kept.cfg.model.layers != "auto"
    assert set(own["tried"]) == ({"1", "2"} if task == "residue_classification" else {"concat"})
    assert own["tried"][str(own["layers"])] == min(own["tried"].values())
    assert (log_lines(cfg)[0]["split"], losses(cfg)) == ("5 folds of train", [])
    again = evaluate(Path(cfg.output), Path(str(cfg.data.test)), None, None, str)
    assert_same_metrics(again, found["test"], rel=1e-5, abs=1e-6)
    export(cfg.output, tmp_path / "exported")
    names = ("max_residues", "long_sequences", "window_overlap", "label_column")
    words = [f"--data.{name}={getattr(cfg.data, name)}" for name in names]
    again = evaluate(tmp_path / "exported", Path(str(cfg.data.test)), None, None, str, words)
    assert_same_metrics(again, found["test"], rel=1e-5, abs=1e-6)
    assert found["calibration"]["proteins"] == found["valid"].get("n_records", found["valid"]["n"]) > 0
    card = (Path(cfg.output) / "model" / "README.md").read_text()
    assert "A linear head on frozen ESM-2" in card and "| fitted | at once, with a penalty of" in card


def test_a_probe_of_residues_is_a_classifier_of_plain_transformers(
    results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig], tmp_path: Path
) -> None:
    cfg = probed(task_toys["residue_classification"], "probe")
    export(cfg.output, tmp_path / "exported")
    model = EsmForTokenClassification.from_pretrained(tmp_path / "exported").eval()
    sequence = "ACDEFGHIKLMNPQRSTVWY"
    pd.DataFrame({"id": ["x"], "sequence": [sequence]}).to_csv(tmp_path / "x.csv")
    predict(cfg.output, tmp_path / "x.csv", tmp_path / "x.parquet", log=str)
    logits = model(torch.from_numpy(encode_many([sequence])[0].astype(np.int64))[None]).logits[0, 1:-1]
    found = pd.read_parquet(tmp_path / "x.parquet")
    assert results["residue_classification"]["calibration"]["temperature"] != 1
    np.testing.assert_allclose(found["p_H"][0], logits.softmax(-1)[:, 1].detach(), atol=1e-6)


def labelled(cfg: TrainConfig, tmp_path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split -> the embeddings that `embed` writes of its proteins, and their labels."""
    found = {}
    for split in ("train", "valid", "test"):
        path = Path(str(getattr(cfg.data, split)))
        embed("mini", path, tmp_path / f"{split}.parquet", log=str)
        vectors = np.stack(pd.read_parquet(tmp_path / f"{split}.parquet")["embedding"])
        found[split] = vectors.astype(np.float64), pd.read_csv(path)["label"].to_numpy()
    return found


@pytest.mark.parametrize("weights", ["none", {"alpha": 1.0, "beta": 4.0}])
def test_its_head_is_the_logistic_regression_of_scikit_learn_on_what_embed_writes(
    toy: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any
) -> None:
    penalty = 0.03
    only(monkeypatch, penalty)
    mini = {"name": "mini", "init": "pretrained"}
    cfg = toy(model=mini, adapter={"kind": "probe"}, task={"class_weights": weights}, log={"baselines": False})
    temperature = run.train(cfg, str).result["calibration"]["temperature"]
    data = labelled(cfg, tmp_path)
    train, test = along_axes(data["train"][0], data["test"][0])
    by_class = {"alpha": 1.0, "beta": 4.0} if weights != "none" else {"alpha": 1.0, "beta": 1.0}
    total = sum(by_class[label] for label in data["train"][1])
    # scikit-learn's binary model has one vector w, ours has two, -w / 2 and w / 2, of half the squared norm
    peer = LogisticRegression(C=2 / (penalty * total), class_weight=by_class, tol=1e-8, max_iter=10_000)
    peer.fit(train, data["train"][1])
    expected = 1 / (1 + np.exp(-peer.decision_function(test) / temperature))
    found = pd.read_parquet(Path(cfg.output) / "predictions-test.parquet")["p_beta"]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert expected.std() > 0.1


def along_axes(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, ...]:
    """Standardized features along the principal axes of the training ones, over the square roots of the sds there."""
    scaler = StandardScaler().fit(train)
    _, singular, axes = np.linalg.svd(scaler.transform(train), full_matrices=False)
    variance = singular**2 / len(train)
    kept = variance > linear_fit.LEAST_VARIANCE * variance[0]
    return tuple(scaler.transform(each) @ (axes[kept].T * variance[kept] ** -0.25) for each in (train, test))


def test_a_head_along_the_axes_is_one_of_the_features_as_they_are() -> None:
    rng = np.random.default_rng(0)
    for n in (9, 200):  # fewer rows than columns, and more
        features = (rng.normal(size=(n, 30)) * rng.uniform(0.1, 9, 30) + 5).astype(np.float32)
        features[:, 4] = 7.0  # says nothing
        found = linear_fit.Axes.of(features, np.arange(30) % 3)
        np.testing.assert_allclose(found.along.var(0), found.variance, rtol=1e-3)
        shape = (2, len(found.variance))
        along = linear_fit.LinearHead(1.0, rng.normal(size=shape).astype(np.float32), np.ones(2, np.float32))
        np.testing.assert_allclose(found.of_features(along)(features), along(found.along), atol=1e-3)
        assert np.abs(found.of_features(along).weight[:, 4]).max() < 1e-12


def test_heads_fitted_side_by_side_are_those_fitted_alone() -> None:
    rng = np.random.default_rng(0)
    along, labels = rng.normal(size=(200, 9)).astype(np.float32), torch.from_numpy(rng.integers(0, 3, 200))
    weights = [torch.from_numpy((rng.random(200) < share).astype(np.float32)) for share in (0.3, 0.9)]

    def fitted(own: list[torch.Tensor]) -> list[linear_fit.LinearHead]:
        def loss(logits: torch.Tensor) -> torch.Tensor:
            each = [torch.nn.functional.cross_entropy(part, labels, reduction="none") for part in logits.split(3, 1)]
            return sum((part * weight).sum() / weight.sum() for part, weight in zip(each, own, strict=True))

        (joint,) = linear_fit.fit_path(along, along.var(0), 3 * len(own), loss, (0.1,), 1e-12)
        return joint.parted(len(own))

    for together, weight in zip(fitted(weights), weights, strict=True):
        (alone,) = fitted([weight])
        # the losses are of float32, so that a minimum is known to the root of its rounding
        np.testing.assert_allclose(together.weight, alone.weight, atol=1e-3)
        np.testing.assert_allclose(together.bias, alone.bias, atol=1e-3)
    assert np.abs(fitted(weights)[0].weight - together.weight).max() > 0.01


def only(monkeypatch: pytest.MonkeyPatch, penalty: float) -> None:
    """Try one penalty."""
    monkeypatch.setattr(probe, "PENALTIES", (penalty,))


def test_its_head_is_the_ridge_regression_of_scikit_learn(
    task_toys: dict[str, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    penalty = 0.1
    only(monkeypatch, penalty)
    base = task_toys["regression"]
    cfg = probed(replace(base, data=replace(base.data, long_sequences="crop", max_residues=62)), "ridge")
    run.train(cfg, str)
    splits = load_splits(cfg, task_class("regression").label_kind)
    rows = pd.read_csv(str(cfg.data.train)).set_index("id")
    rows.loc[list(splits.train.ids)].to_csv(tmp_path / "own.csv")
    for name, path in (("train", tmp_path / "own.csv"), ("test", Path(str(cfg.data.test)))):
        embed(cfg.output, path, tmp_path / f"{name}.parquet", log=str)
    train, test = (np.stack(pd.read_parquet(tmp_path / f"{n}.parquet")["embedding"]) for n in ("train", "test"))
    (train, test), target = along_axes(train, test), rows.loc[list(splits.train.ids)]["value"]
    standardized = (target - target.mean()) / target.std(ddof=0)
    peer = Ridge(alpha=penalty * len(target) / 2).fit(train, standardized)
    expected = peer.predict(test) * target.std(ddof=0) + target.mean()
    found = pd.read_parquet(Path(cfg.output) / "predictions-test.parquet")["value"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("layers", ["all", "auto", 1])
def test_states_are_the_means_of_transformers_hidden_states(
    toy: Callable[..., TrainConfig], tmp_path: Path, layers: Any
) -> None:
    cfg = toy(model={"name": "mini", "init": "pretrained", "layers": layers}, adapter={"kind": "probe"})
    run.train(cfg, str)
    model = EsmForMaskedLM.from_pretrained(Path(features.__file__).parents[1] / "models/pretrained/mini").esm.eval()
    sequences = list(pd.read_csv(str(cfg.data.train))["sequence"])
    (folder,) = (Path(cfg.output) / "features").iterdir()
    shards = [load_file(path) for path in folder.iterdir()]
    stored = {bytes(name): (shard, row) for shard in shards for row, name in enumerate(shard["digests"])}
    for sequence in sequences[:5]:
        tokens, offsets = encode_many([sequence])
        (name,) = features.digests(features.ExampleTable.of(tokens, offsets))
        shard, row = stored[name]
        *inner, last = model(torch.from_numpy(tokens.astype(np.int64))[None], output_hidden_states=True).hidden_states
        states = [*(model.encoder.emb_layer_norm_after(hidden) for hidden in inner), last]
        kept = {"all": [6], "auto": range(7), 1: [1]}[layers]
        assert {name for name in shard if name.startswith("layer.")} == {f"layer.{layer}" for layer in kept}
        for layer in kept:
            expected = states[layer][0, 1:-1].mean(0).detach().numpy()
            np.testing.assert_allclose(shard[f"layer.{layer}"][row], expected, rtol=1e-4, atol=2e-5)


def test_no_protein_is_run_twice_and_runs_share_what_is_kept(
    toy: Callable[..., TrainConfig], tmp_path: Path, passes: list[int]
) -> None:
    cache = {"cache": str(tmp_path / "cache")}
    first = run.train(toy("one", adapter={"kind": "probe"}, model={"layers": "auto"}, data=cache), str).result
    assert first["probe"]["proteins"] == {"passed": 60, "found": 0}
    one, evaluation = sum(passes), 40  # valid and test, by the finished model
    assert one == 60 + evaluation
    passes.clear()
    second = run.train(toy("two", adapter={"kind": "probe"}, model={"layers": "auto"}, data=cache), str).result
    assert second["probe"]["proteins"] == {"passed": 0, "found": 60} and sum(passes) == evaluation
    assert second["test"] == first["test"]
    passes.clear()  # other weights, another pooling, or a layer more: others' states are not taken
    for name, model in (("seed", {}), ("pooling", {"pooling": "cls"})):
        seed = {"seed": 7} if name == "seed" else {}
        cfg = replace(toy(name, adapter={"kind": "probe"}, model=model, data=cache), **seed)
        assert run.train(cfg, str).result["probe"]["proteins"]["found"] == 0
    # of one layer, the last: those of a run that kept all
    assert run.train(toy("last", adapter={"kind": "probe"}, data=cache), str).result["probe"]["proteins"]["found"] == 60


def test_a_killed_probe_goes_on_where_it_was(
    toy: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(features, "BATCHES", 1)
    cfg = toy(adapter={"kind": "probe"}, loop={"eval_packs_per_device": 2})
    expected = run.train(replace(cfg, output=f"{cfg.output}_whole"), str).result
    save, saved = features.save_shard, []

    def killed(*what: Any) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(save(*what))

    monkeypatch.setattr(features, "save_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train(cfg, str)
    monkeypatch.setattr(features, "save_shard", save)
    shards = sorted((Path(cfg.output) / "features").rglob("*.safetensors"))
    assert len(shards) == 3
    there = [len(load_file(path)["digests"]) for path in shards]
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[:-8] + bytes(8))  # what is damaged is run again
    resumed = run.train(replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto")), str).result
    assert resumed["probe"]["proteins"] == {"passed": 60 - sum(there[1:]), "found": sum(there[1:])}
    assert "its content is not what its name says" in caplog.text
    assert_same_metrics(resumed["test"], expected["test"], abs=1e-6)
    again = run.train(replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto")), str).result
    assert again["test"] == resumed["test"]


def test_a_probe_needs_no_validation_proteins(toy: Callable[..., TrainConfig]) -> None:
    none = {"valid": None, "valid_fraction": 0.0}
    found = run.train(toy(adapter={"kind": "probe"}, model={"layers": "auto"}, data=none), str).result
    assert found["probe"]["chosen_on"] == "5 folds of train" and found["probe"]["metrics"]["n"] == 60
    assert found["valid"] is None and found["test"]["mcc"] > 0.3


def test_no_family_is_in_two_folds() -> None:
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 90)) for _ in range(20)]
    tokens, offsets = encode_many([first + last for first in sequences for last in ("", "A", "AC")])
    table = features.ExampleTable.of(tokens, offsets)
    rows: Any = SimpleNamespace(table=table, record=table.record)
    fold = probe._folds(rows, TrainConfig()).reshape(20, 3)
    assert (fold == fold[:, :1]).all() and set(np.bincount(fold[:, 0])) == {4}
    tokens, offsets = encode_many([sequences[0] + "A" * n for n in range(10)])
    rows.table = features.ExampleTable.of(tokens, offsets)
    rows.record = rows.table.record
    assert set(np.bincount(probe._folds(rows, TrainConfig()))) == {2}, "one family: single proteins"
    rows.table = features.ExampleTable.of(*encode_many(sequences[:1]))
    with pytest.raises(DataError, match="one training protein, of which no fold can be made"):
        probe._folds(rows, TrainConfig())


def test_weak_penalties_are_left_out_where_they_gain_nothing(
    toy: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[list[float]] = []

    def counted(*what: Any) -> Iterator[linear_fit.LinearHead]:
        paths.append(own := [])
        for head in linear_fit.fit_path(*what):
            own.append(head.penalty)
            yield head

    monkeypatch.setattr(probe, "fit_path", counted)
    found = run.train(toy("true", adapter={"kind": "probe"}), str).result["probe"]
    chosen = linear_fit.PENALTIES.index(found["penalty"]) + 1
    tried = list(linear_fit.PENALTIES[: chosen + probe.PATIENCE])
    assert paths == [tried, tried[chosen - 1 : chosen]] and chosen > 3, "all folds at once, then all proteins"
    paths.clear()
    rows = pd.read_csv(str(toy().data.train))
    rows["label"] = np.random.default_rng(0).permutation(rows["label"])
    rows.to_csv(tmp_path / "noise.csv")
    run.train(toy("noise", adapter={"kind": "probe"}, data={"train": str(tmp_path / "noise.csv")}), str)
    assert len(paths[0]) <= 3, "nothing to learn: all but constant"


def test_of_many_residues_a_sample_is_used_and_said(
    task_toys: dict[str, TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MOST_RESIDUES", 300)
    said: list[str] = []
    found = run.train(probed(task_toys["residue_classification"], "few"), said.append).result
    notes = [line for line in said if line.startswith("NOTE: the probe is fitted on")]
    assert len(notes) == 1 and " of 32 training proteins, " in notes[0]
    assert found["probe"]["proteins"]["passed"] < 20


def test_fine_tuning_starts_from_a_probe(toy: Callable[..., TrainConfig]) -> None:
    reads = {"layers": "auto", "pooling": "mean+termini", "composition": True}
    base = toy("probe", adapter={"kind": "probe"}, model=reads)
    first = run.train(base, str).result
    for kind in ("lora", "none"):
        start = {"kind": kind, "init_from": base.output}
        cfg = toy(kind, adapter=start, optim={"lr": 1e-12}, loop={"max_steps": 1}, log={"baselines": False})
        found = run.train(cfg, str).result
        assert_same_metrics(found["test"], first["test"], abs=1e-4)
        assert read_finished(Path(cfg.output)).cfg.model == replace(base.model, layers=first["probe"]["layers"])
    wrong = {
        "its model.name is tiny, here it is mini": {"model": {"name": "mini", "init": "pretrained"}},
        "its task is sequence_classification, here it is regression": {"task": {"name": "regression"}},
        "its task.labels is": {"task": {"labels": ("beta", "alpha")}},
    }
    for message, changes in wrong.items():
        with pytest.raises(ConfigError, match=message):
            run.train(toy("wrong", adapter={"kind": "lora", "init_from": base.output}, **changes), str)
    with pytest.raises(ConfigError, match="no config.yaml there; name the output folder of a probe"):
        run.train(toy("wrong", adapter={"init_from": "nowhere"}), str)
    with pytest.raises(ConfigError, match="a run of adapter.kind=lora"):
        run.train(toy("wrong", adapter={"init_from": str(Path(base.output).with_name("lora"))}), str)


def test_two_processes_fit_the_probe_of_one(
    results: dict[str, dict[str, Any]], task_toys: dict[str, TrainConfig]
) -> None:
    tasks = ("multi_label", "residue_classification")
    runs = [replace(probed(task_toys[task], "two", layers="auto"), log=replace(task_toys[task].log, baselines=False))
            for task in tasks]  # fmt: skip
    on_two_ranks([["train", str(saved_config(cfg))] for cfg in runs])
    for task, cfg in zip(tasks, runs, strict=True):
        found = json.loads((Path(cfg.output) / "result.json").read_text())
        assert found["probe"]["proteins"] == results[task]["probe"]["proteins"]
        assert found["probe"]["layers"] == results[task]["probe"]["layers"]
        assert_same_metrics(found["test"], results[task]["test"], rel=1e-4, abs=1e-4)


def test_train_on_a_file_begins_with_a_probe(
    toy: Callable[..., TrainConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data.train", str(toy().data.train), "--output", "mine", "--log.tensorboard", "false"]
    assert training_config(words[1:], str).adapter.kind == "probe"
    assert cli.main([*words, "--model", "mini"]) == 0, "which weights is no way of training"
    found = read_finished(tmp_path / "mine")
    assert found.cfg.adapter.kind == "probe" and found.cfg.model.name == "mini" and found.result["test"]["n"] > 0
    said = capfd.readouterr().err
    assert "first a probe" in said
    again = ["--config", "mine/config.yaml", "--output", "mine-lora", "--adapter.kind", "lora", "--optim.lr", "3e-5"]
    assert f"esm-neuron train {' '.join(again)} --adapter.init_from mine" in said
    assert cli.main(["train", *again, "--adapter.init_from", "mine", "--loop.max_steps", "1"]) == 0
    lora = read_finished(tmp_path / "mine-lora")
    assert lora.cfg.adapter.kind == "lora" and lora.cfg.model == found.cfg.model
    assert lora.result["data"] == found.result["data"]  # sampled alike
    # a setting of how to train leaves the rest as it is
    start = ["train", "--data.train", str(toy().data.train), "--loop.max_steps", "1"]
    capfd.readouterr()
    assert cli.main([*start, "--model.name", "tiny", "--model.init", "random", "--output", "other"]) == 0
    assert "LoRA, since --loop.max_steps is given; told of data" in capfd.readouterr().err
    other = read_finished(tmp_path / "other").cfg
    assert (other.adapter.kind, other.model.layers) == ("lora", "all")
