"""Every setting, in every command that predicts, is refused or changes what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.intake import load, protein, table, write

from esm_neuron import cli
from esm_neuron.config import DataConfig, TaskConfig, TrainConfig
from esm_neuron.config.settings import known_keys, override, parse
from esm_neuron.data.check import check_file
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.labels import LabelSets
from esm_neuron.data.splits import check_files, load_splits
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.inference.load import MAY_CHANGE, overruled
from esm_neuron.tasks import task_class
from esm_neuron.training.run import idle

COMMANDS = ("predict", "embed", "evaluate", "score")


def other(name: str) -> str:
    """A value of a setting that is not its default."""
    value: Any = TrainConfig()
    for part in name.split("."):
        value = getattr(value, part)
    if isinstance(value, bool):
        return str(not value).lower()
    known = {
        "backend": "xla", "model.init": "random", "model.pooling": "cls", "model.layers": "2",
        "model.head": "linear", "task.class_weights": "balanced",
        "data.split_names": "[a, b, c]", "data.sample": "clusters", "data.keep": "{set: [a]}",
        "data.keep_heldout": "{set: [a]}", "data.homologs": "off", "data.on_bad_residue": "skip",
        "data.on_missing": "skip", "data.long_sequences": "skip", "adapter.kind": "head",
        "adapter.quantization": "int8", "optim.kind": "adamw8bit", "optim.schedule": "linear",
        "loop.precision": "bf16", "loop.tracing": "always", "loop.on_recompile": "warn", "loop.on_nonfinite": "skip",
        "checkpoint.resume": "auto", "optim.betas": "[0.5, 0.6]", "task.labels": "[a, b]", "task.ignore": "[x]",
        "adapter.targets": "[attention.self.query]", "data.pack_tokens": "2048", "data.max_residues": "99",
        "data.max_rows": "3", "loop.max_steps": "3", "task.target_mean": "1", "task.target_sd": "2",
    }  # fmt: skip
    if name in known:
        return known[name]
    return str(value + 1) if isinstance(value, int) else "0.5" if isinstance(value, float) else "other"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", sorted(known_keys()))
def test_a_setting_is_taken_where_it_acts_and_refused_elsewhere(command: str, name: str) -> None:
    allowed = MAY_CHANGE[command]
    section = f"{name.partition('.')[0]}."
    words = [f"--{name}={other(name)}"]
    if name in allowed or section in allowed:
        if section != "parallel.":
            assert override(TrainConfig(), words, allowed, command) != TrainConfig()
    else:
        with pytest.raises(ConfigError, match=rf"--{name}=.*: `{command}` has no use for this setting, only for "):
            override(TrainConfig(), words, allowed, command)


def test_a_file_of_settings_changes_no_other_ones(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {keep: {set: [test]}}\nadapter: {r: 99}\n")
    with pytest.raises(ConfigError, match="--config: adapter.r: `predict` has no use for this setting"):
        override(TrainConfig(), ["--config", str(tmp_path / "a.yaml")], MAY_CHANGE["predict"], "predict")


LONG = "MKVLAAGIVGMKVLAAGIVGWW"
TEXT = f"""name,aa,label,set
p1,{LONG},A|B,a
p2,MK-V,A,b
p3,,B,b
p4,MKV,A,b
"""
ACTS: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    # setting: what makes the file readable without it, the setting, and what then differs
    "data.id_column": ({}, {"id_column": "name"}, lambda one, two: one[0] != two[0]),
    "data.sequence_column": ({"sequence_column": None}, {"sequence_column": "aa"}, None),
    "data.keep": ({}, {"keep": {"set": ["a"]}}, lambda one, two: two[0] == ["1"]),
    "data.on_bad_residue": ({"on_bad_residue": "strict"}, {"on_bad_residue": "replace"}, None),
    "data.on_missing": ({"on_missing": "strict"}, {"on_missing": "skip"}, None),
    "data.min_residues": ({}, {"min_residues": 10}, lambda one, two: len(one[0]) > len(two[0])),
    "data.max_residues": ({}, {"max_residues": 5}, lambda one, two: one[1] != two[1]),
    "data.long_sequences": (
        {"max_residues": 5},
        {"long_sequences": "skip"},
        lambda one, two: len(one[0]) > len(two[0]),
    ),
    "data.window_overlap": (
        {"max_residues": 6, "long_sequences": "window", "window_overlap": 1},
        {"window_overlap": 5},
        lambda one, two: len(one[1]) < len(two[1]),
    ),
    "data.label_column": ({"label_column": "set"}, {"label_column": "label"}, lambda one, two: one[2] != two[2]),
    "data.label_separator": ({"label_separator": ";"}, {"label_separator": "|"}, None),
}


@pytest.mark.parametrize("name", ACTS)
def test_a_setting_of_an_input_acts(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.csv").write_text(TEXT)
    base = {"sequence_column": "aa", "on_bad_residue": "strip", "on_missing": "skip", "label_separator": "|"}
    without, with_, differs = ACTS[name]
    labels = name.startswith("data.label")

    def read(**changes: Any) -> tuple[list[str], list[int], list[str]]:
        fields = {key: value for key, value in {**base, **without, **changes}.items() if value is not None}
        cfg = DataConfig(**fields)
        known = LabelSets.of(TaskConfig(labels=("A", "B", "a", "b")), cfg) if labels else None
        table = InputChunks(tmp_path / "a.csv", cfg, known).read()
        return list(table.ids), table.tokens.tolist(), table.labels.tolist()

    if differs is None:
        with pytest.raises(DataError):
            read()
        read(**with_)
    else:
        assert differs(read(), read(**with_))


def test_each_setting_of_an_input_is_shown_to_act() -> None:
    packing = {"data.packing", "data.pack_tokens", "data.max_segments"}  # they decide batches, not predictions
    taken = {name for command in COMMANDS for name in MAY_CHANGE[command] if name.startswith("data.")}
    elsewhere = {"data.sheet", "data.mask_column", "data.homologs"}  # a workbook's, residues', and what intervals draw
    assert taken == ACTS.keys() | packing | elsewhere


@pytest.mark.parametrize("flag", ["--data.unique_column=x", "--data.max_rows=3", "--data.fold=1", "--adapter.r=3"])
def test_data_check_refuses_what_it_does_not_look_at(tmp_path: Path, flag: str) -> None:
    (tmp_path / "a.csv").write_text("id,sequence\na,MKV\n")
    assert cli.main(["data", "check", str(tmp_path / "a.csv"), flag]) == 2


def test_a_sheet_of_what_is_no_workbook_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", ["A", "B"] * 5)
    for check in (
        lambda: check_files(DataConfig(train=str(path), sheet="X"), None),
        lambda: InputChunks(path, DataConfig(sheet="X")).check(),
        lambda: check_file(str(path), DataConfig(sheet="X"), None, "train", None),
    ):
        with pytest.raises(ConfigError, match=r"data.sheet=X names a sheet .*no file is one \(.xlsx\); leave it out"):
            check()
    run = TrainConfig(data=DataConfig(train="a.xlsx", sheet="X"))  # the sheet is that of the training file
    assert overruled(run, [], "predict").data.sheet is None


@pytest.mark.parametrize("fold", ["7", "0.5", "test", ""])
def test_a_fold_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, fold: str) -> None:
    rows = "".join(f"p{i},{protein(i)},{'AB'[i % 2]},{i % 3}\n" for i in range(9))
    path = write(tmp_path / "a.csv", "id,sequence,label,fold\n" + rows)
    with pytest.raises(DataError, match=rf"no fold '{fold}' \(data.fold\), but '0', '1', '2'; name one of these$"):
        load(path, split_column="fold", fold=fold)
    assert len(load(path, split_column="fold", fold=2.0).train) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.on_bad_residue", "skip"], "3 skipped for characters that are no residues: none is left; is it"),
        (["--data.min_residues", "5000"], "3 left out as shorter than data.min_residues: none is left; change"),
        (["--data.keep", "{label: [C]}"], "data.keep leaves no records; use values that are there"),
    ],
)
def test_data_check_says_where_nothing_is_left(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(
        tmp_path / "a.tsv", ["A", "B", "A"], ["MKJ", "MJK", "JJM"] if "skip" in words else ["MKV", "MVK", "VVM"]
    )
    assert cli.main(["data", "check", str(path), *words]) != 0
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


IDLE = {
    "--data.window_overlap 7": ("data.window_overlap=7 has no effect: data.long_sequences is crop", True),
    "--data.window_overlap 7 --data.long_sequences window": ("", False),
    "--data.max_segments 4 --data.packing false": ("data.max_segments=4 has no effect: data.packing is false", True),
    "--data.max_segments 4": ("", False),
    "--data.sample clusters --data.split_column part": ("data.sample=clusters has no effect: no proteins", True),
    "--data.sample clusters": ("", False),
    "--data.valid_fraction 0.3 --data.split_column part": ("data.valid_fraction=0.3 has no effect: files or", True),
    "--data.valid_fraction 0.3": ("", False),
    "--data.test_fraction 0.3 --data.split_column part": ("data.test_fraction=0.3 has no effect: files or", True),
    "--adapter.r 4 --adapter.kind none": ("adapter.r=4 has no effect: adapter.kind is none", True),
    "--adapter.r 4": ("", False),
    "--adapter.quantization int8": ("adapter.quantization=int8 has no effect: adapter.kind is lora", True),
    "--optim.min_lr_ratio 0.1 --optim.schedule constant": ("optim.min_lr_ratio=0.1 has no effect: optim.", True),
    "--loop.epochs 3 --loop.max_steps 2": ("loop.epochs=3.0 has no effect: loop.max_steps is given", True),
    "--loop.watchdog_slow 5": ("loop.watchdog_slow=5 has no effect: loop.watchdog is 0", True),
    "": ("", False),
}


@pytest.mark.parametrize("words", IDLE)
def test_a_setting_of_a_run_that_does_nothing_beside_the_others_is_told(tmp_path: Path, words: str) -> None:
    parts = [("train", "train", "train", "valid", "test")[i % 5] for i in range(40)]
    rows = [f"p{i},{protein(i)},{'ab'[i // 5 % 2]},{part}" for i, part in enumerate(parts)]
    path = write(tmp_path / "a.csv", "\n".join(["id,sequence,label,part", *rows]) + "\n")
    cfg = parse(["--data.train", str(path), *words.split()])
    found = [*idle(cfg, load_splits(cfg, task_class(cfg.task.name).label_kind))]
    said, told = IDLE[words]
    assert [line.startswith(f"NOTE: {said}") for line in found] == [True] * told, found
