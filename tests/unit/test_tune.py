"""`esm-neuron tune`: what a search tries, finds, writes and never looks at; how it stops and goes on."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.toys import Toy

from esm_neuron import cli
from esm_neuron.config import TrainConfig, settings
from esm_neuron.config.rules import seconds
from esm_neuron.errors import ConfigError, TrainingError
from esm_neuron.files import read_json
from esm_neuron.training import repeats, run, tune
from esm_neuron.training.space import Space, default_space, read_space

SPACE = "optim.lr: {low: 1.0e-3, high: 1.0e-1, log: true}\nadapter.r: [2, 4]\n"


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return path


def rows(out: Path) -> list[dict[str, str]]:
    with (out / tune.TABLE).open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_a_search_writes_a_table_a_plot_and_settings_that_train_takes(toy: Toy, space: Path) -> None:
    cfg, said = toy("search", loop={"eval_every": 2}), list[str]()
    assert tune.tune(cfg, trials=4, space=space, log=said.append) is None
    out = Path(cfg.output)
    found = rows(out)
    assert [row["state"] for row in found] == ["complete"] * 4
    assert [row["validations"] for row in found] == ["4"] * 4
    assert found[0]["optim.lr"] == "0.001", "the settings' own values come first"
    assert all(1e-3 <= float(row["optim.lr"]) <= 1e-1 and row["adapter.r"] in ("2", "4", "") for row in found)
    best = max(found, key=lambda row: float(row["mcc"]))
    chosen = settings.read_config(out / tune.BEST)
    assert chosen.optim.lr == float(best["optim.lr"])
    assert chosen.adapter.alpha == 2 * chosen.adapter.r, "alpha keeps its proportion to r"
    assert (chosen.data, chosen.log) == (cfg.data, cfg.log), "what trials leave out is there again"
    assert (out / tune.PLOT).read_bytes().startswith(b"\x89PNG")
    assert best["mcc"][:5] in said[-1]
    result = run.train(chosen, str).result
    assert result["valid"]["mcc"] == pytest.approx(float(best["mcc"]), abs=1e-5), "the trial's run, again"
    assert result["test"] is not None


def test_trials_never_open_the_test_proteins(toy: Toy, space: Path, tmp_path: Path) -> None:
    """Test rows that could not be read, in a file of their own; and other test rows in the one file, with other labels
    and residues: the trials are the same to the last digit."""
    cfg = toy("a", data={"test": str(tmp_path / "test.csv")})
    Path(str(cfg.data.test)).write_text("id,sequence,label\nx,MKV,neither\n")
    with pytest.raises(Exception, match="neither"):
        run.train(replace(cfg, output=str(tmp_path / "opened")), str)
    tune.tune(cfg, trials=2, space=space, log=str)
    assert all(row["state"] == "complete" for row in rows(Path(cfg.output)))

    train, valid = (Path(str(path)).read_text().splitlines()[1:] for path in (cfg.data.train, cfg.data.valid))

    def searched(name: str, test: list[str]) -> tuple[list[str], TrainConfig]:
        lines = [
            f"{row},{split}" for split, part in (("train", train), ("valid", valid), ("test", test)) for row in part
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join(["id,sequence,label,split", *lines]) + "\n")
        data = {"train": str(tmp_path / f"{name}.csv"), "valid": None, "test": None, "split_column": "split"}
        own = toy(name, data=data)
        tune.tune(own, trials=3, space=space, log=str)
        return [row["mcc"] for row in rows(Path(own.output))], own

    first, own = searched("b", ["unopened,ACDEFGHIKL,alpha", "t2,LMNPQRSTVW,beta"])
    second, _ = searched("c", ["t1,WWWWWWWW,beta", "t2,AAAA,alpha", "t3,CCCC,beta"])
    assert first == second
    folder = Path(own.output) / tune.TRIALS / "0000"
    result = read_json(folder / "result.json")
    assert result["test"] is None and list(result["data"]) == ["train", "valid"] and result["baselines"] == {}
    assert "unopened" not in "".join(path.read_text(errors="ignore") for path in folder.rglob("*") if path.is_file())
    tables = Path(own.output) / repeats.CACHE
    assert not list(tables.rglob("test*")), "nor are they in the cache of the trials"


def test_test_rows_sampled_from_training_are_held_out_of_trials_as_of_the_run(toy: Toy, space: Path) -> None:
    cfg = toy("sampled", data={"valid": None, "test": None, "valid_fraction": 0.2, "test_fraction": 0.2})
    tune.tune(cfg, trials=1, space=space, log=str)
    folder = Path(cfg.output) / tune.TRIALS / "0000"
    run.train(replace(cfg, output=str(folder.parent / "whole")), str)
    assert (
        read_json(folder / "result.json")["data"]["train"]
        == read_json(folder.parent / "whole" / "result.json")["data"]["train"]
    )
    assert (folder / "valid_ids.txt").read_text() == (folder.parent / "whole" / "valid_ids.txt").read_text()


def test_a_stopped_search_goes_on_in_the_middle_of_a_trial(
    toy: Toy, space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toy("whole")
    tune.tune(whole, trials=3, space=space, log=str)
    cfg, steps = toy("stopped"), list[int]()
    on_eval = tune.Watch.on_eval

    def note(self: tune.Watch, step: int, record: Any) -> None:
        steps.append(step)
        on_eval(self, step, record)

    monkeypatch.setattr(tune.Watch, "on_eval", note)
    monkeypatch.setattr(tune.Search, "over", lambda self: len(steps) == 3)
    tune.tune(cfg, trials=3, space=space, log=str)
    assert [row["state"] for row in rows(Path(cfg.output))] == ["complete", "running"]
    monkeypatch.setattr(tune.Search, "over", lambda self: False)
    with pytest.raises(ConfigError, match="already holds a search; go on with --checkpoint.resume auto"):
        tune.tune(cfg, trials=3, space=space, log=str)
    resumed = replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto"))
    with pytest.raises(ConfigError, match="the search began with other settings"):
        tune.tune(replace(resumed, seed=1), trials=3, space=space, log=str)
    with pytest.raises(ConfigError, match="the search began with other ranges"):
        tune.tune(resumed, trials=3, log=str)
    assert tune.tune(resumed, trials=3, space=space, log=str) is None
    assert steps == [4, 8, 4, 8, 4, 8], "the second trial went on after its first validation"
    found = [row for row in rows(Path(cfg.output)) if row["state"] == "complete"]
    expected = rows(Path(whole.output))
    assert [row["mcc"] for row in found[:2]] == [row["mcc"] for row in expected[:2]]
    assert len(found) == 3


def test_a_trial_behind_the_others_ends_early(toy: Toy, space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda self: self.number == 1)
    cfg = toy("pruned", loop={"eval_every": 2})
    tune.tune(cfg, trials=2, space=space, log=str)
    first, second = rows(Path(cfg.output))
    assert (first["state"], first["validations"]) == ("complete", "4")
    assert (second["state"], second["validations"]) == ("pruned", "1")


def test_the_budget_ends_a_search_after_its_first_trial(toy: Toy, space: Path) -> None:
    cfg, said = toy("short"), list[str]()
    tune.tune(cfg, trials=9, budget=0.001, space=space, log=said.append)
    assert len(rows(Path(cfg.output))) == 1
    assert "tune: the budget is used up" in said


def test_a_trial_that_fails_is_counted_and_named(toy: Toy, space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> run.Outcome:
        raise TrainingError("step 3: the loss is nan")

    monkeypatch.setattr(run, "train", fail)
    cfg = toy("failing")
    with pytest.raises(TrainingError, match=r"no trial has a result: step 3: the loss is nan; see .*trials.tsv"):
        tune.tune(cfg, trials=2, space=space, log=str)
    assert [row["error"] for row in rows(Path(cfg.output))] == ["step 3: the loss is nan"] * 2


def test_processes_share_a_search(toy: Toy, space: Path) -> None:
    cfg = toy("shared", loop={"max_steps": 2, "eval_every": 1})
    assert tune.tune(cfg, trials=3, jobs=2, space=space, log=str) is None
    found = rows(Path(cfg.output))
    assert len(found) in (3, 4) and {row["state"] for row in found} <= {"complete", "pruned"}
    assert len({row["optim.lr"] for row in found}) == len(found), "no two processes try the same"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lrr: [1, 2]", "optim.lrr is no setting; did you mean optim.lr?"),
        ("data.train: [a, b]", "data.train is not searched: trials would be compared on other proteins"),
        ("optim.lr: [0.1]", "optim.lr has 1 values; list two or more"),
        ("optim.lr: {low: 1, high: 0.1}", "optim.lr: low 1 must be a number below high 0.1"),
        ("optim.lr: {low: 0, high: 1, log: true}", "log: true with low 0, must be above 0"),
        ("optim.lr: {low: 0.1}", r"optim.lr: write \[A, B, ...\], or {low: A, high: B}"),
        ("adapter.r: [4, x]", "adapter.r"),
        ("model.dropout: {low: 0.0, high: 2.0}", "model.dropout=2.0 is outside 0 to 0.99"),
    ],
)
def test_a_space_that_cannot_be_is_refused_before_any_trial(toy: Toy, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"--space .*{message}"):
        read_space(tmp_path / "bad.yaml", toy())


def test_steps_of_another_size_see_as_many_proteins(toy: Toy) -> None:
    cfg = toy(loop={"packs_per_step": 4, "packs_per_device": 4, "max_steps": 8, "eval_every": 4})
    changed = Space({"loop.packs_per_step": [1, 4, 8]}).apply(cfg, {"loop.packs_per_step": 1})
    loop = changed.loop
    assert (loop.packs_per_step, loop.packs_per_device, loop.max_steps, loop.eval_every) == (1, 1, 32, 16)
    assert Space({}).apply(cfg, {"loop.packs_per_step": 4}) == cfg


KIND, READ = {"adapter.kind"}, {"model.pooling", "model.layers"}


@pytest.mark.parametrize(
    ("kind", "task", "names"),
    [
        ("lora", "sequence_classification", {"optim.lr", "adapter.r", *KIND, *READ, "task.class_weights"}),
        ("none", "regression", {"optim.lr", *KIND, *READ}),
        ("head", "residue_classification", {"optim.lr", *KIND, "task.class_weights"}),
        ("lora", "masked_lm", {"optim.lr", "adapter.r"}),
        ("probe", "sequence_classification", {"model.pooling", "model.composition", "task.class_weights"}),
    ],
)
def test_the_default_space_suits_adapter_and_task(toy: Toy, kind: str, task: str, names: set[str]) -> None:
    cfg = toy(adapter={"kind": kind}, task={"name": task})
    ranges = default_space(cfg).ranges
    assert set(ranges) - {"optim.warmup_ratio", "loop.packs_per_step"} == names
    for name, of in ranges.items():
        for value in of if isinstance(of, list) else (of["low"], of["high"]):
            Space(ranges).apply(cfg, {name: value})


def test_what_cannot_stand_beside_the_settings_is_not_searched(toy: Toy) -> None:
    parallel = {"fsdp": True}
    assert "adapter.kind" not in default_space(replace(toy(parallel=parallel), backend="cuda")).ranges
    attention = default_space(toy(adapter={"kind": "lora"}, model={"pooling": "attention"})).ranges
    assert not {"adapter.kind", "model.layers"} & set(attention)
    assert not READ & set(default_space(toy(adapter={"kind": "lora", "init_from": "runs/probe"})).ranges)


def test_a_probe_is_a_trial_like_others_and_chooses_its_layers(toy: Toy, tmp_path: Path) -> None:
    cfg = toy("kinds", adapter={"kind": "lora"}, loop={"max_steps": 2, "eval_every": 1})
    (tmp_path / "kinds.yaml").write_text("adapter.kind: [lora, probe]\nmodel.layers: [all, mix]\n")
    applied = read_space(tmp_path / "kinds.yaml", cfg).apply(cfg, {"adapter.kind": "probe", "model.layers": "mix"})
    assert (applied.adapter.kind, applied.model.layers) == ("probe", "auto")
    tune.tune(cfg, trials=6, space=tmp_path / "kinds.yaml", log=str)
    found = rows(Path(cfg.output))
    probes = [row for row in found if row["adapter.kind"] == "probe"]
    assert probes and {row["state"] for row in probes} == {"complete"}
    assert len({row["mcc"] for row in probes}) == 1, "of one seed"
    assert (Path(cfg.output) / "cache" / "features").is_dir(), "states are shared by the trials"


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("45", 45), ("2h", 7200)])
def test_budgets(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "m", "-5m", "1.5h", "0s", "soon"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write 90s, 30m or 1h30m"):
        seconds(text)


def test_the_command(toy: Toy, space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = toy("command", loop={"max_steps": 2, "eval_every": 1})
    (tmp_path / "run.yaml").write_text(settings.dump(cfg))
    words = ["tune", "--config", str(tmp_path / "run.yaml"), "--trials", "1", "--space", str(space)]
    assert cli.main(words) == 0
    assert f"esm-neuron train --config {Path(cfg.output) / 'best.yaml'}" in capsys.readouterr().err
    assert cli.main([*words, "--trials", "0"]) == 2
    assert "--trials 0 must be at least 1" in capsys.readouterr().err


def test_a_search_needs_validation_proteins(toy: Toy) -> None:
    with pytest.raises(ConfigError, match="tune chooses by validation proteins"):
        tune.tune(toy(data={"valid": None, "valid_fraction": 0.0}), log=str)


def test_a_trial_with_a_probe_makes_its_folds_by_homologs_as_the_run_does(toy: Toy) -> None:
    cfg = toy("search", data={"homologs": "kmer", "sample": "proteins"})
    search = tune.Search(cfg, Space({"adapter.kind": ["lora", "probe"]}), 1, None)
    found = {kind: tune.trial_config(search, {"adapter.kind": kind}, 0).data.homologs for kind in ("lora", "probe")}
    assert found == {"lora": "off", "probe": "kmer"}
