"""The command line: a mistake is one line and exit code 2, and every command's files hold what they promise."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EsmForMaskedLM

from esm_neuron import cli
from esm_neuron.backends.eager import EagerBackend
from esm_neuron.config import TrainConfig, settings
from esm_neuron.config.flags import FIRST, command_parser
from esm_neuron.files import claimed
from esm_neuron.models.hf_folder import SafetensorsFolder
from esm_neuron.models.shapes import SHAPES, esm_config
from esm_neuron.training import run

Toy = Callable[..., TrainConfig]
Proteins = Callable[..., Path]


@dataclass
class Said:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command in this process."""

    def run_command(*words: object) -> Said:
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        return Said(code, printed.out, printed.err)

    return run_command


@pytest.fixture
def refused(call: Callable[..., Said]) -> Callable[..., str]:
    """Runs a command that must end with exit code 2 and one line; returns the line."""

    def refuse(*words: object) -> str:
        said = call(*words)
        assert said.code == 2, said
        assert said.out == ""
        last = said.err.splitlines()[-1]
        assert last.startswith("esm-neuron: error: ") and said.err.count("esm-neuron: error") == 1
        assert "Traceback" not in said.err
        return last

    return refuse


def words_of(cfg: TrainConfig) -> list[str]:
    path = Path(cfg.output).with_suffix(".yaml")
    path.write_text(settings.dump(cfg))
    return ["train", "--config", str(path)]


def test_ctrl_c_is_one_line(call: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "doctor", interrupted)
    assert call("doctor") == Said(130, "", "esm-neuron: stopped by SIGINT\n")


def test_settings_that_cannot_be_are_refused(toy: Toy, tmp_path: Path, refused: Callable[..., str]) -> None:
    words = words_of(toy())
    assert (
        "unrecognized arguments: --relatives off; its name is --homologs now; see esm-neuron data check --help"
        in refused("data", "check", "x.csv", "--relatives", "off")
    )
    assert "unknown command 'data get'; its name is python examples/datasets/get.py now; the commands" in refused(
        "data", "get", "scl2205"
    )
    assert "unknown command 'trian'; did you mean train? the commands are train, new, tune" in refused("trian")
    assert "unknown setting loop.max_step; did you mean loop.max_steps?" in refused(*words, "--loop.max_step=1")
    assert "optim.lr" in refused(*words, "--optim.lr=fast")
    assert "loop.packs_per_step=3 is not a multiple of 4" in refused(*words, "--loop.packs_per_step=3")
    assert "cannot be read (No such file or directory)" in refused("train", "--config", tmp_path / "none.yaml")
    for name, text, expected in (
        ("unknown", "optim: {lrr: 1}", "unknown setting optim.lrr; did you mean optim.lr?"),
        ("twice", "seed: 1\nseed: 2", "twice.yaml:2: key 'seed' comes twice"),
        ("list", "- 1", "holds list"),
        ("broken", "optim: {", "not valid YAML"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
        assert expected in refused("train", "--config", tmp_path / f"{name}.yaml")
    assert "data.train is not given" in refused("train", "--output", tmp_path / "none")
    assert "no config.yaml there" in refused("evaluate", "--model", tmp_path, "--input", "x.csv")
    assert not (tmp_path / "none").exists()


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_data_that_cannot_be_used_is_refused(toy: Toy, refused: Callable[..., str]) -> None:
    """By the reader, by the checks and for its labels; the tests of these have the other messages."""
    cfg = toy()
    words, good = words_of(cfg), Path(str(cfg.data.train)).read_text()
    assert "train.csv: no column 'colour' (data.label_column)" in refused(*words, "--data.label_column=colour")
    change(Path(str(cfg.data.train)), good, good + good.splitlines()[1] + "\n")
    first = good.splitlines()[1].split(",")[0]
    assert f"train.csv:62: id '{first}' was used in line 2 already" in refused(*words)
    Path(str(cfg.data.train)).write_text(good)
    change(Path(str(cfg.data.test)), "alpha", "gamma")
    message = refused(*words)
    assert "test.csv:2" in message and "label 'gamma' is not one of the classes 'alpha', 'beta'" in message
    assert {file.name for file in Path(cfg.output).iterdir()} == {".lock"}


def test_residues_outside_the_alphabet_are_counted(toy: Toy, call: Callable[..., Said]) -> None:
    cfg = toy(loop={"max_steps": 1})
    path = Path(str(cfg.data.train))
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace(lines[1].split(",")[1], "ACD*E-FGHIKLMACDEFGHI")
    path.write_text("\n".join(lines) + "\n")
    skip = call(*words_of(replace(cfg, output=cfg.output + "1")), "--data.on_bad_residue=skip")
    assert skip.code == 0
    assert "train.csv: 60 proteins; 1 skipped for characters that are no residues" in skip.err
    assert "train split: 59 proteins" in skip.err
    replaced = call(*words_of(replace(cfg, output=cfg.output + "2")), "--data.on_bad_residue=replace")
    assert replaced.code == 0
    assert "train.csv: 60 proteins; 1 with 2 characters replaced by X" in replaced.err
    assert "valid split: 0 of 20 proteins have a homolog in training (by kmer)" in replaced.err
    leaks = json.loads((Path(cfg.output + "2") / "result.json").read_text())["leaks"]
    assert leaks["test"] == {"method": "kmer", "proteins": 20, "homologs": 0}
    name, reason = lines[1].split(",")[0], "the sequence has '*' (a stop codon) at residue 4 and 1 more"
    for number, action in ((1, "left out"), (2, "replaced by X")):
        rejected = (Path(f"{cfg.output}{number}") / "rejected.tsv").read_text()
        row = f"{path}\t2\t{name}\t{reason}, outside the ESM alphabet\t{action}\n"
        assert rejected == "file\tline\tid\treason\taction\n" + row


def test_a_used_output_is_refused(toy: Toy, call: Callable[..., Said], refused: Callable[..., str]) -> None:
    cfg = toy(loop={"max_steps": 1})
    with claimed(Path(cfg.output)):
        assert f"output={cfg.output} is in use by a running process" in refused(*words_of(cfg))
    assert call(*words_of(cfg)).code == 0
    assert f"output={cfg.output} already holds a run" in refused(*words_of(cfg))


def test_usage_and_version(call: Callable[..., Said]) -> None:
    assert call().code == 2
    shown = call("--help")
    assert shown.code == 0 and all(name in shown.out for name in cli.COMMANDS)
    assert call("help") == shown
    assert call("--version").out.strip()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_a_screen_with_two_examples(call: Callable[..., Said], command: str) -> None:
    said = call(*command.split(), "--help")
    lines = said.out.splitlines()
    assert said.code == 0 and len(lines) <= 42 and max(map(len, lines)) <= 120
    assert lines[0].startswith(f"usage: esm-neuron {command}") and f"esm-neuron {command}" in said.out
    examples = lines[lines.index("examples:") + 1 :]
    assert sum(line.startswith("  ") for line in examples) == 2
    taken = inspect.signature(cli.COMMANDS[command]).parameters
    whole = call(*command.split(), "--help", "all").out
    if {"settings", "overrides"} & set(taken):
        assert f"esm-neuron {command} --help all" in said.out and whole.startswith(said.out.rstrip())
        assert len(whole.splitlines()) > len(lines) + 20
    else:
        assert whole == said.out


def test_a_flag_without_a_default_has_its_help_on_python_3_10() -> None:
    """Which makes its annotation an optional one, as this is on any version."""

    def command(*, input: Optional[Annotated[Path | None, "what is read"]] = None) -> int:  # noqa: UP045
        return 0

    assert "--input FILE  what is read" in command_parser("one", command).format_help()


def test_the_settings_in_the_help_are_flags_of_training() -> None:
    for key in (key for group in FIRST.values() for key in group):
        assert key in set(settings.known_keys())
    shown = command_parser("train", cli.train, documented=True).format_help()
    for flag in re.findall(r"^  --([\w.]+)", shown, re.MULTILINE):
        assert settings.full_name(flag) in set(settings.known_keys())


def test_the_module_is_a_command_that_ends_with_the_code() -> None:
    words = [sys.executable, "-m", "esm_neuron.cli", "nonsense"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("esm-neuron: error: unknown command 'nonsense'") and done.stderr.count("\n") == 1


def test_a_reader_that_ends_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "esm_neuron.cli", "--help"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.fixture
def trained(toy: Toy) -> TrainConfig:
    """A finished run that has learnt its label; windows for what is longer than 62 residues."""
    cfg = toy(optim={"lr": 1e-2}, loop={"max_steps": 12}, data={"long_sequences": "window"})
    assert run.train(cfg, str).stopped_by is None
    return cfg


def test_evaluate_gives_the_metrics_of_the_run(
    trained: TrainConfig, tmp_path: Path, call: Callable[..., Said], same_metrics: Callable[..., None]
) -> None:
    said = call(
        "evaluate", "--model", trained.output, "--input", trained.data.test, "--output", tmp_path / "metrics.json"
    )
    assert said.code == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert json.loads(said.out) == metrics
    expected = json.loads((Path(trained.output) / "result.json").read_text())["test"]
    same_metrics(metrics, expected, rel=1e-6)
    half = tmp_path / "half.csv"
    lines = Path(str(trained.data.test)).read_text().splitlines()
    half.write_text("\n".join([*lines[:11], lines[11].replace(",", ",M*", 1)]) + "\n")
    out = ("--output", tmp_path / "half.json")
    said = call("evaluate", "--model", trained.output, "--input", half, *out, "--data.on_bad_residue=skip")
    assert json.loads(said.out)["n"] == 10
    rejected = (tmp_path / "half.json.rejected.tsv").read_text().splitlines()
    assert len(rejected) == 2 and rejected[1].startswith(f"{half}\t12\t{lines[11].split(',')[0]}\t")


def test_all_ranks_learn_that_one_cannot_read_what_is_evaluated(
    trained: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    told: list[object] = []
    gather = EagerBackend.gather_host

    def noted(self: EagerBackend, value: object) -> list[object]:
        told.append(value)
        return gather(self, value)

    monkeypatch.setattr(EagerBackend, "gather_host", noted)
    # a process alone says so before it opens the backend
    monkeypatch.setattr("esm_neuron.inference.evaluate.is_alone", lambda: False)
    assert "none.csv: no such file" in refused("evaluate", "--model", trained.output, "--input", tmp_path / "none.csv")
    assert any("none.csv: no such file" in str(value) for value in told)


def test_predict_gives_every_record_in_its_order(
    trained: TrainConfig, tmp_path: Path, call: Callable[..., Said]
) -> None:
    rows = [line.split(",") for line in Path(str(trained.data.test)).read_text().splitlines()[1:]]
    rows.reverse()
    # one protein of three windows: residues 1-62, 55-116 and 59-120
    window = "".join(row[1] for row in rows)[:120]
    rows.insert(7, ["long", window, ""])
    fasta = tmp_path / "new.fasta"
    fasta.write_text("".join(f">{name} a note\n{sequence}\n" for name, sequence, _ in rows))
    target = tmp_path / "deep" / "predictions.csv"
    said = call("predict", "--model", trained.output, "--input", fasta, "--output", target)
    assert said.code == 0 and "21 predictions written" in said.err
    assert "1 cut into 3 windows" in said.err
    frame = pd.read_csv(target)
    assert list(frame.columns) == ["id", "label", "p_alpha", "p_beta"]
    assert list(frame["id"]) == [row[0] for row in rows]
    predictions = frame[["p_alpha", "p_beta"]].to_numpy()
    assert predictions.sum(1) == pytest.approx(1, abs=2e-6)
    assert list(frame["label"]) == [["alpha", "beta"][i] for i in predictions.argmax(1)]
    known = [i for i, row in enumerate(rows) if row[2]]
    result = json.loads((Path(trained.output) / "result.json").read_text())
    right = np.mean([frame["label"][i] == rows[i][2] for i in known])
    assert right == pytest.approx(result["test"]["accuracy"])
    parts = tmp_path / "parts.csv"
    pieces = (window[:62], window[54:116], window[58:120])
    parts.write_text("id,sequence\n" + "".join(f"w{i},{piece}\n" for i, piece in enumerate(pieces)))
    assert (
        call("predict", "--model", trained.output, "--input", parts, "--output", tmp_path / "parts_out.csv").code == 0
    )
    alone = pd.read_csv(tmp_path / "parts_out.csv")[["p_alpha", "p_beta"]].to_numpy()
    assert predictions[7] == pytest.approx(alone.mean(0), abs=3e-6)


def test_predict_writes_all_or_nothing(
    trained: TrainConfig, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "predictions.csv"
    target.write_text("earlier predictions")
    bad = tmp_path / "bad.fasta"
    bad.write_text(">a\nACDE\n>b\nAC!E\n")
    words = ["predict", "--model", trained.output, "--input", bad, "--output", target]
    assert "bad.fasta:3: the sequence of 'b' has '!' at residue 3" in refused(*words)
    bad.write_text(">a\nACDE\n>b\nACE\n")

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert "No space left" in refused(*words)
    assert target.read_text() == "earlier predictions"


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_export_loads_in_transformers(toy: Toy, tmp_path: Path, call: Callable[..., Said], pooling: str) -> None:
    cfg = toy(optim={"lr": 1e-2}, loop={"max_steps": 4}, model={"pooling": pooling})
    run.train(cfg, str)
    folder = tmp_path / "exported"
    assert call("export", "--model", cfg.output, "--output", folder).code == 0
    said = call("export", "--model", cfg.output, "--output", folder)
    assert said.code == 2 and "exists already; name a new folder" in said.err
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert (model.config.model_type == "esm") == (pooling == "cls")
    assert model.config.id2label == {0: "alpha", 1: "beta"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert call("predict", "--model", cfg.output, "--input", cfg.data.test, "--output", tmp_path / "p.csv").code == 0
    expected = pd.read_csv(tmp_path / "p.csv")[["p_alpha", "p_beta"]].to_numpy()
    sequences = list(pd.read_csv(cfg.data.test)["sequence"])
    temperature = json.loads((folder / "calibration.json").read_text())["temperature"]
    with torch.no_grad():
        for sequence, values in zip(sequences, expected, strict=True):
            logits = model(**tokenizer(sequence, return_tensors="pt")).logits / temperature
            assert logits.softmax(-1)[0].numpy() == pytest.approx(values, abs=3e-6)


def test_convert_turns_a_pickle_folder_into_one_that_can_be_trained(
    toy: Toy, tmp_path: Path, call: Callable[..., Said], refused: Callable[..., str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    config = esm_config(SHAPES["tiny"])
    config.to_json_file(old / "config.json")
    state = EsmForMaskedLM(config).state_dict()
    torch.save(state, old / "pytorch_model.bin")
    assert call("convert", old, new).code == 0
    source = SafetensorsFolder(new)
    assert all(torch.equal(source.read(key), tensor) for key, tensor in state.items())
    assert "exists" in refused("convert", old, new)
    said = call(*words_of(toy(loop={"max_steps": 1}, model={"name": str(new), "init": "pretrained"})))
    assert said.code == 0 and "RANDOM" not in said.err
