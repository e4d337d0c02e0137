"""The Python API: what `import esm_neuron` offers, that it costs nothing before it is used, and frames in and out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import esm_neuron as en
from esm_neuron import cli
from esm_neuron.config import TrainConfig, settings

Toy = Callable[..., TrainConfig]
SMALL: dict[str, Any] = {
    "model": "tiny", "init": "random", "max_steps": 12, "lr": 1e-2, "max_residues": 62, "pack_tokens": 128,
    "max_segments": 6, "packs_per_step": 4, "packs_per_device": 4, "eval_packs_per_device": 4, "tensorboard": False,
}  # fmt: skip


def test_every_public_name_is_found() -> None:
    assert dir(en) == sorted(en.__all__) and set(en.__all__) == {"__version__", *en._HOMES}
    for name in en.__all__:
        assert getattr(en, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'tran'"):
        en.tran  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, esm_neuron; esm_neuron.TrainConfig; esm_neuron.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """Training, validation and test proteins with a column `location`."""
    from helpers.toys import write_proteins

    folder = tmp_path_factory.mktemp("frames")
    return {
        split: pd.read_csv(write_proteins(folder / f"{split}.csv", size, seed)).rename(columns={"label": "location"})
        for seed, (split, size) in enumerate({"train": 60, "valid": 20, "test": 20}.items())
    }


@pytest.fixture(scope="module")
def run(frames: dict[str, pd.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> en.Run:
    """A run that was given data frames."""
    said: list[str] = []
    made = en.train(
        frames["train"], valid=frames["valid"], test=frames["test"], label="location", log=said.append,
        output=tmp_path_factory.mktemp("run") / "mine", **SMALL,
    )  # fmt: skip
    assert any("proteins" in line for line in said)
    return made


def test_a_run_shows_its_metrics(run: en.Run) -> None:
    own = run.metrics.loc[("test", "this model")]
    assert own["mcc"] == pytest.approx(run.result["test"]["mcc"])
    assert [own["mcc_low"], own["mcc_high"]] == pytest.approx(run.result["test"]["mcc_ci"])
    assert ("valid", "majority class") in run.metrics.index or len(run.metrics.loc["valid"]) > 1
    assert run.verdict and "test mcc" in repr(run)
    assert list(run.log["step"].dropna().unique())[-1] == 12
    assert len(run.held_out("test")) == 20 and run.config.data.label_column == "location"


def test_predictions_are_those_of_the_command(run: en.Run, frames: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    """Whatever the proteins are given as; in their order and by their names."""
    test = frames["test"]
    test.to_csv(tmp_path / "test.csv", index=False)
    words = ["predict", "--model", run.folder, "--input", tmp_path / "test.csv", "--output", tmp_path / "p.csv"]
    assert cli.main([str(word) for word in words]) == 0
    expected = pd.read_csv(tmp_path / "p.csv")
    sequences = test["sequence"]
    loaded = en.load(run.folder)
    for given, names in (
        (test, expected["id"]),
        (test.set_index("id"), expected["id"]),
        (tmp_path / "test.csv", expected["id"]),
        (str(tmp_path / "test.csv"), expected["id"]),
        (list(sequences), [str(n) for n in range(20)]),
        (sequences.set_axis(test["id"]), expected["id"]),
        (dict(zip(test["id"], sequences, strict=True)), expected["id"]),
        (sequences[0], ["0"]),
        (f"{sequences[0]}*", ["0"]),
    ):
        found = loaded.predict(given)
        assert list(found["id"]) == list(names)
        assert found["p_alpha"].to_numpy() == pytest.approx(expected["p_alpha"].to_numpy()[: len(found)], abs=2e-6)
    assert list(loaded.predict(test, coverage=0.8).columns) == ["id", "label", "p_alpha", "p_beta", "set"]
    again = en.predict(list(sequences), model=run.folder)
    assert list(again["label"]) == list(expected["label"])


def test_evaluate_gives_the_metrics_of_the_run(run: en.Run, frames: dict[str, pd.DataFrame]) -> None:
    assert run.evaluate(frames["test"])["mcc"] == pytest.approx(run.result["test"]["mcc"])
    assert en.evaluate(frames["test"], run.folder)["n"] == 20
    with pytest.raises(en.ConfigError, match="backend=none is unknown"):
        en.evaluate(frames["test"], run.folder, backend="none")


def test_settings_given_to_load_hold_for_all_that_a_model_does(run: en.Run, frames: dict[str, pd.DataFrame]) -> None:
    loaded = en.load(run.folder, sequence_column="seq")
    test = frames["test"].rename(columns={"sequence": "seq", "location": "kind"})
    assert loaded.evaluate(test, label="kind")["mcc"] == pytest.approx(run.result["test"]["mcc"])
    assert loaded.embed(test).equals(run.embed(frames["test"])) and len(loaded.predict(test)) == 20


def test_columns_of_other_names_are_those_of_training_for_all_that_a_model_does(
    run: en.Run, frames: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    """Given as a list, a mapping, a frame with the column of ids, or with ids as its index."""
    other = {
        split: frame.rename(columns={"id": "ACC", "sequence": "Sequence", "location": "kind"})
        for split, frame in frames.items()
    }
    names = {"id_column": "ACC", "sequence_column": "Sequence", "label": "kind"}
    made = en.train(
        other["train"].set_index("ACC"), valid=other["valid"], test=other["test"], output=tmp_path / "other", log=str,
        **names, **SMALL,
    )  # fmt: skip
    assert made.result["test"]["mcc"] == run.result["test"]["mcc"]
    test, plain = other["test"], run.embed(frames["test"])
    assert list(test["ACC"]) == list(plain.index)
    by_name = dict(zip(test["ACC"], test["Sequence"], strict=True))
    for given in (test, test.set_index("ACC"), by_name, list(by_name.values())):
        found = made.embed(given)
        assert list(found.index) == ([str(n) for n in range(20)] if isinstance(given, list) else list(plain.index))
        assert found.to_numpy() == pytest.approx(plain.to_numpy(), abs=1e-5)
        assert en.embed(given, made.folder, pooling="residue").notna().all(axis=None)
        assert list(made.predict(given)["id"]) == list(found.index)
    for given in (test, test.set_index("ACC")):
        assert made.evaluate(given)["mcc"] == made.result["test"]["mcc"]


def test_a_metric_of_zero_is_shown_and_folds_are_told_from_a_run(run: en.Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "zero")
    result = {**run.result, "test": {**run.result["test"], "mcc": 0.0}}
    (tmp_path / "zero" / "result.json").write_text(json.dumps(result))
    assert "test mcc 0.000" in repr(en.Run(tmp_path / "zero"))
    (tmp_path / "zero" / "result.json").rename(tmp_path / "folds.json")
    with pytest.raises(en.EsmNeuronError, match=r"a cross-validation, whose means are in folds.json; load .*fold-1"):
        en.Run(tmp_path).result  # noqa: B018


def test_embeddings_have_a_row_per_protein_or_per_residue() -> None:
    found = en.embed({"a": "MKTAYIAK", "b": "MK"}, model="mini")
    assert list(found.index) == ["a", "b"] and found.index.name == "id" and found.notna().all(axis=None)
    residues = en.embed({"a": "MKTAYIAK", "b": "MK"}, model="mini", pooling="residue")
    assert list(residues.loc["b"].index) == [1, 2] and len(residues) == 10
    assert residues.loc["a"].mean().to_numpy() == pytest.approx(found.loc["a"].to_numpy(), abs=1e-5)


def test_variants_are_scored() -> None:
    found = en.score(["K2A", "K2R:A4G"], model="mini", wild_type="MKTAYIAK")
    assert list(found["variant"]) == ["K2A", "K2R:A4G"] and np.isfinite(found.iloc[:, -1].astype(float)).all()
    named = {"id_column": "ACC", "data_sequence_column": "Sequence"}  # as of a run with such columns
    assert en.score(["M1A", "K2R"], "mini", wild_type="MKTAYIAK", **named).notna().all(axis=None)


def test_a_run_without_an_output_has_a_folder_of_its_own(
    frames: dict[str, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    frames["train"].to_csv("my.csv", index=False)
    quick = {**SMALL, "max_steps": 1, "label": "location", "homologs": "off", "baselines": False, "log": str}
    assert [en.train("my.csv", **quick).folder for _ in range(2)] == [Path("runs/my"), Path("runs/my-2")]


def test_a_run_that_does_not_begin_leaves_nothing(
    frames: dict[str, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for values in ({"label": "loc"}, {"label": "location", "task": "regression"}, {"label": "loc", "output": "mine"}):
        with pytest.raises(en.EsmNeuronError, match=r"^the data frame of train(: no column|: \d+ problems)") as caught:
            en.train(frames["train"], model="mini", log=str, **values)
        assert "parquet" not in str(caught.value)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left - {"mine/.esm-neuron.json", "mine/.lock"} == {"runs", "mine", "mine/notes.txt"}


def test_keywords_are_settings_over_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.5}\nadapter: {r: 3}\n")
    for config in (str(tmp_path / "a.yaml"), {"optim": {"lr": 0.5}, "adapter": {"r": 3}}):
        from esm_neuron import api

        words = api._config_words(config) + settings.to_words({"optim_lr": np.float32(0.25), "labels": ("1e3", "b")})
        cfg = settings.parse(words)
        assert (cfg.optim.lr, cfg.adapter.r, cfg.task.labels) == (0.25, 3, ("1e3", "b"))
    cfg = TrainConfig(seed=7)
    assert settings.parse(api._config_words(cfg)) == cfg


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: en.train("x.csv", lrr=1), "unknown setting lrr; did you mean optim.lr?"),
        (lambda run: en.train("x.csv", optim={"lrr": 1}), "unknown setting optim.lrr; did you mean optim.lr?"),
        (lambda run: en.train("x.csv", kind="lora"), "kind may be adapter.kind or optim.kind; write which one"),
        (lambda run: en.train("none.csv", model="mini"), "none.csv: no such file"),
        (lambda run: en.load("none"), "--model none: no config.yaml there"),
        (lambda run: run.predict(["MK", 3]), "a sequence is 3, a int; give text"),
        (lambda run: run.predict(["MK", "M!K"]), "the input: record 2: the sequence of '1' has '!' at residue 2"),
        (lambda run: run.predict([]), "no proteins were given"),
        (lambda run: run.predict(pd.DataFrame({"seq": ["MK"]})), "the input: no column 'sequence'"),
        (lambda run: en.train(pd.DataFrame({"sequence": ["MK"]}), output=run.folder), "already holds a run"),
    ],
)
def test_what_is_wrong_is_one_line_without_our_frames(run: en.Run, call: Callable[..., Any], said: str) -> None:
    with pytest.raises(en.EsmNeuronError) as caught:
        call(run)
    text = str(caught.value)
    assert said in text and "\n" not in text and "/input.parquet" not in text
    ours = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__) if "esm_neuron/" in frame.filename]
    assert ours == ["call"] and caught.value.__cause__ is None
    assert caught.value._render_traceback_() == [f"{type(caught.value).__name__}: {text}"]
