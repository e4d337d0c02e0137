"""Predictions and embeddings: every format, the order, small pieces, a kill and what is resumed, errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import EsmForMaskedLM, EsmModel

from esm_neuron import cli
from esm_neuron.backends import create_backend
from esm_neuron.config import DataConfig, TrainConfig
from esm_neuron.data import text_files
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.tokenizer import hf_tokenizer
from esm_neuron.errors import CheckpointError, ConfigError, DataError, TrainingError
from esm_neuron.inference import predict as records
from esm_neuron.inference import spool, stream
from esm_neuron.inference.embed import embed
from esm_neuron.inference.export import export
from esm_neuron.inference.load import build_trained, read_run
from esm_neuron.inference.predict import predict
from esm_neuron.inference.spool import InputScan
from esm_neuron.inference.stream import Shards
from esm_neuron.models.shapes import SHAPES, esm_config
from esm_neuron.training import run

Toy = Callable[..., TrainConfig]
Proteins = Callable[..., Path]

SMALL = ("--data.max_residues=62", "--data.window_overlap=8", "--data.pack_tokens=64", "--loop.eval_packs_per_device=1")
"""Pieces of 2,048 tokens: some 50 toy proteins."""
PATIENCE = 300
"""Seconds that a process may take to import, on a busy machine, and to answer."""


@pytest.fixture(scope="module")
def trained(module_toy: Toy) -> TrainConfig:
    """A finished LoRA run."""
    cfg = module_toy(optim={"lr": 1e-2}, loop={"max_steps": 4})
    run.train(cfg, str)
    return cfg


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder as the hub's: EsmForMaskedLM, random weights."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    torch.manual_seed(5)
    EsmForMaskedLM(esm_config(SHAPES["tiny"])).save_pretrained(folder)
    return folder


def write_as(rows: pd.DataFrame, path: Path) -> Path:
    """Proteins in the format of a suffix."""
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".jsonl":
        rows.to_json(path, orient="records", lines=True)
    elif path.suffix == ".fasta":
        pairs = zip(rows["id"], rows["sequence"], strict=True)
        path.write_text("".join(f">{name} a note\n{sequence}\n" for name, sequence in pairs))
    else:
        rows.to_csv(path, index=False, sep="\t" if ".tsv" in path.name else ",")
    return path


def read_as(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if path.suffix == ".jsonl":
        return pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
    return pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")


def words(command: str, model: object, source: Path, target: Path, *more: str) -> list[str]:
    return [command, "--model", str(model), "--input", str(source), "--output", str(target), *more]


def test_every_format_in_and_out(trained: TrainConfig, tmp_path: Path) -> None:
    rows = pd.read_csv(str(trained.data.test))[["id", "sequence"]]
    frames = []
    for source, target in (
        ("a.csv", "a.parquet"),
        ("b.tsv.gz", "b.jsonl"),
        ("c.parquet", "c.csv"),
        ("d.jsonl", "d.tsv"),
        ("e.fasta", "e.parquet"),
    ):
        assert predict(trained.output, write_as(rows, tmp_path / source), tmp_path / target) == len(rows)
        frames.append(read_as(tmp_path / target))
    for frame in frames:
        assert list(frame.columns) == ["id", "label", "p_alpha", "p_beta"]
        assert list(frame["id"]) == list(rows["id"]) and list(frame["label"]) == list(frames[0]["label"])
        assert frame["p_alpha"].to_numpy() == pytest.approx(frames[0]["p_alpha"].to_numpy(), rel=1e-6)
    assert len(set(frames[0]["label"])) == 2


def test_pieces_give_what_the_whole_gives_in_its_order(
    trained: TrainConfig, proteins: Proteins, tmp_path: Path
) -> None:
    source = proteins("many.csv", 200, seed=9)
    predict(trained.output, source, tmp_path / "whole.parquet")
    predict(trained.output, source, tmp_path / "pieces.parquet", settings=SMALL)
    whole, pieces = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("whole", "pieces"))
    assert list(pieces["id"]) == list(whole["id"]) == list(pd.read_csv(source)["id"])
    assert pieces["p_alpha"].to_numpy() == pytest.approx(whole["p_alpha"].to_numpy(), abs=1e-6)
    assert not list(tmp_path.glob("*.shards"))


def test_classes_called_id_and_label_keep_their_columns(toy: Toy, tmp_path: Path) -> None:
    cfg = toy(loop={"max_steps": 1})
    for split in ("train", "valid", "test"):
        path = Path(str(getattr(cfg.data, split)))
        path.write_text(path.read_text().replace(",alpha", ",id").replace(",beta", ",label"))
    run.train(cfg, str)
    predict(cfg.output, Path(str(cfg.data.test)), tmp_path / "out.csv")
    frame = pd.read_csv(tmp_path / "out.csv")
    assert list(frame.columns) == ["id", "label", "p_id", "p_label"]
    assert list(frame["id"]) == list(pd.read_csv(str(cfg.data.test))["id"]) and set(frame["label"]) <= {"id", "label"}


def test_other_columns_by_overruling(trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pd.read_csv(str(trained.data.test)).rename(columns={"id": "name", "sequence": "aa", "label": "class"})
    rows.to_csv(tmp_path / "other.csv", index=False)
    named = ("--data.id_column=name", "--data.sequence_column", "aa")
    assert cli.main(words("predict", trained.output, tmp_path / "other.csv", tmp_path / "o.csv", *named)) == 0
    assert list(pd.read_csv(tmp_path / "o.csv")["id"]) == list(rows["name"])
    capsys.readouterr()
    evaluated = ["evaluate", "--model", trained.output, "--input", str(tmp_path / "other.csv"), *named]
    assert cli.main([*evaluated, "--data.label_column=class"]) == 0
    result = json.loads((Path(trained.output) / "result.json").read_text())
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(result["test"]["accuracy"])
    for word, expected in (
        ("--adapter.r=4", "`predict` has no use for this setting, only for data.id_column, data.seq"),
        ("--data.id_colum=name", "unknown setting data.id_colum; did you mean data.id_column?"),
        ("--data.max_residues=2000", "do not fit a pack of data.pack_tokens=128"),
    ):
        assert cli.main(words("predict", trained.output, tmp_path / "other.csv", tmp_path / "x.csv", word)) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


def alone(folder: Path, sequences: list[str]) -> list[np.ndarray]:
    """Hidden states [residues + 2, H] of each protein by transformers' own model, one at a time."""
    model, tokenizer = EsmModel.from_pretrained(folder, add_pooling_layer=False).eval(), hf_tokenizer()
    with torch.no_grad():
        return [model(**tokenizer(each, return_tensors="pt")).last_hidden_state[0].numpy() for each in sequences]


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors", ".h5"])
def test_embeddings_are_those_of_transformers_alone(
    plain: Path, proteins: Proteins, tmp_path: Path, suffix: str
) -> None:
    source = proteins("p.csv", 90, seed=3)
    rows = pd.read_csv(source)
    states = alone(plain, list(rows["sequence"]))
    for pooling, expected in (
        ("mean", [each[1:-1].mean(0) for each in states]),
        ("cls", [each[0] for each in states]),
        ("residue", [each[1:-1] for each in states]),
    ):
        target = tmp_path / f"{pooling}{suffix}"
        assert embed(str(plain), source, target, pooling, settings=SMALL) == 90
        if suffix == ".parquet":
            frame = pd.read_parquet(target)
            assert list(frame["id"]) == list(rows["id"])
            found = [np.stack(each) if pooling == "residue" else each for each in frame["embedding"]]
        else:
            arrays = load_file(target) if suffix == ".safetensors" else by_original_id(target)
            assert set(arrays) == set(rows["id"])
            found = [arrays[name] for name in rows["id"]]
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape and one.dtype == np.float32
            assert np.abs(one - other).max() < 2e-6


def by_original_id(path: Path) -> dict[str, np.ndarray]:
    """Read a file of embeddings as biotrainer does."""
    with h5py.File(path, "r") as file:
        return {entry.attrs["original_id"]: np.array(entry) for entry in file.values()}


def test_ids_with_a_slash_are_no_groups_of_h5(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "pfam.fasta", tmp_path / "pfam.h5"
    source.write_text(">P1/1-9\nMKVACDEFG\n>.\nMKV\n>b\nACD\n>a\nMKVA\n")
    embed(str(plain), source, target)
    with h5py.File(target, "r") as file:
        assert list(file) == ["P1_1-9", "_", "b", "a"], "in the order of the input"
        assert file["P1_1-9"].shape == file["a"].shape and file["a"].dtype == np.float32
    assert list(by_original_id(target)) == ["P1/1-9", ".", "b", "a"]
    source.write_text(">P1/1\nMKV\n>P1_1\nMKV\n")
    with pytest.raises(DataError, match="'P1_1' and another id are both 'P1_1' there; write .parquet"):
        embed(str(plain), source, tmp_path / "two.h5")
    assert not (tmp_path / "two.h5").exists()
    monkeypatch.setattr("esm_neuron.inference.embed.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs h5py; run: pip install 'esm-neuron\[h5\]'"):
        embed(str(plain), source, target)


def test_a_residue_in_two_windows_gets_the_mean_of_both(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "long.fasta"
    sequences = ["ACDEFGHIKL", "MNPQRSTVWYACDEFGHIKLMN", "MKV"]
    source.write_text("".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    windows = ("--data.long_sequences=window", "--data.max_residues=12", "--data.window_overlap=4")
    assert embed(str(plain), source, tmp_path / "x.safetensors", "residue", settings=windows) == 3
    first, second = (each[1:-1] for each in alone(plain, [sequences[1][:12], sequences[1][8:20]]))
    last = alone(plain, [sequences[1][10:]])[0][1:-1]
    sums, times = np.zeros((22, first.shape[1])), np.zeros((22, 1))
    for start, window in ((0, first), (8, second), (10, last)):
        sums[start : start + 12] += window
        times[start : start + 12] += 1
    found = load_file(tmp_path / "x.safetensors")
    whole = alone(plain, [sequences[0], sequences[2]])
    for name, expected in (("1", sums / times), ("0", whole[0][1:-1]), ("2", whole[1][1:-1])):
        assert found[name].dtype == np.float32
        assert np.abs(found[name] - expected).max() < 2e-6


@pytest.mark.parametrize(("how", "shown"), [("crop", [*range(12)]), ("crop_ends", [*range(6), *range(16, 22)])])
def test_residues_that_are_cut_off_keep_their_place_and_have_no_embedding(
    plain: Path, tmp_path: Path, how: str, shown: list[int]
) -> None:
    source, long = tmp_path / "long.fasta", "MNPQRSTVWYACDEFGHIKLMN"
    source.write_text(f">short\nMKV\n>long\n{long}\n")
    words = (f"--data.long_sequences={how}", "--data.max_residues=12")
    embed(str(plain), source, tmp_path / "x.safetensors", "residue", settings=words)
    found = load_file(tmp_path / "x.safetensors")
    short, cut = (each[1:-1] for each in alone(plain, ["MKV", "".join(long[place] for place in shown)]))
    assert found["long"].shape == (22, short.shape[1]) and np.abs(found["short"] - short).max() < 2e-6
    assert np.abs(found["long"][shown] - cut).max() < 2e-6
    assert np.isnan(np.delete(found["long"], shown, axis=0)).all()


def test_a_protein_of_which_no_memory_holds_each_residue_is_refused_before_work(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "MKVLAAGIVG" * 10_001
    (tmp_path / "giant.fasta").write_text(f">short\nMKVL\n>giant\n{long}\n")
    call = words("embed", plain, tmp_path / "giant.fasta", tmp_path / "e.parquet", "--pooling", "residue")
    assert cli.main(call) == 2
    said = capsys.readouterr().err
    assert "giant.fasta:3: the sequence of 'giant' has 100010 residues" in said and "is for up to 100000" in said
    assert cli.main([*call, "--data.long_sequences", "skip"]) == 0  # as it says
    assert pd.read_parquet(tmp_path / "e.parquet")["id"].tolist() == ["short"]
    assert cli.main(call[:-2]) == 0  # one vector for all residues takes no memory
    capsys.readouterr()


def test_more_arrays_than_a_header_of_safetensors_holds_are_refused_before_work(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stream, "HEADER_LIMIT", 100)
    (tmp_path / "two.fasta").write_text(">a\nMKVL\n>b\nMKVI\n")
    assert cli.main(words("embed", plain, tmp_path / "two.fasta", tmp_path / "e.safetensors")) == 2
    assert "2 arrays need a header of at least 132 bytes, safetensors allows 100; name a .parquet file" in (
        capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.fasta"]
    assert cli.main(words("embed", plain, tmp_path / "two.fasta", tmp_path / "e.parquet")) == 0
    capsys.readouterr()


def test_a_run_embeds_with_its_adapter(trained: TrainConfig, tmp_path: Path) -> None:
    source = Path(str(trained.data.test))
    embed(trained.output, source, tmp_path / "run.parquet")
    export(Path(trained.output), tmp_path / "merged")
    embed(str(tmp_path / "merged"), source, tmp_path / "merged.parquet", settings=("--data.pack_tokens=2048",))
    embed(str(Path(trained.output) / "base"), source, tmp_path / "base.parquet")
    run_, merged, base = (
        np.stack(pd.read_parquet(tmp_path / f"{name}.parquet")["embedding"]) for name in ("run", "merged", "base")
    )
    assert np.abs(run_ - merged).max() < 5e-6
    assert np.abs(run_ - base).max() > 1e-3


def test_a_predicting_model_has_no_gradient_buffers(toy: Toy) -> None:
    cfg = toy(adapter={"kind": "none"}, loop={"max_steps": 1})
    run.train(cfg, str)
    cfg, task = read_run(Path(cfg.output))
    model = build_trained(cfg, task, create_backend(cfg)).model
    assert any(p.requires_grad for p in model.parameters()) and all(p.grad is None for p in model.parameters())


def parts(target: Path) -> list[Path]:
    files = target.with_name(f"{target.name}.shards").glob("[0-9]*.*")
    return sorted(path for path in files if path.suffix != ".json")


def test_a_killed_command_goes_on_and_loses_no_row(
    trained: TrainConfig, plain: Path, proteins: Proteins, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = proteins("many.csv", 2500, seed=4), tmp_path / "out.csv"
    command = words("predict", trained.output, source, target, *SMALL)
    process = subprocess.Popen([sys.executable, "-m", "esm_neuron.cli", *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while len(parts(target)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    # Python 3.14's tracker of semaphores remarks on a kill, in two lines
    said = re.sub(r".*resource_tracker.*\n(  .*\n)?", "", process.communicate()[1])
    assert said.count("\n") == 1 and "\r" not in said, "no bar where there is no terminal"
    assert not target.exists()
    kept = {path: path.stat().st_mtime_ns for path in parts(target)}
    assert 3 <= len(kept) < 45

    def refused(*other: str) -> str:
        assert cli.main([*command, *other]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "shards of unfinished predictions; go on with --resume" in refused()
    assert "begun with another data.long_sequences" in refused("--resume", "--data.long_sequences=window")
    text = source.read_text()
    source.write_text(text.replace("A", "G", 1))
    assert "begun with another input; give --resume the same" in refused("--resume")
    source.write_text(text)
    config = Path(trained.output) / "config.yaml"
    kept_config = config.read_text()
    config.write_text(kept_config.replace("- alpha\n  - beta", "- beta\n  - alpha"))
    assert "config.yaml: task.labels are not the classes of the weights" in refused("--resume")
    config.write_text(kept_config)
    assert cli.main([*command, "--resume"]) == 0
    said = capsys.readouterr().err
    assert f"resumed: {len(kept)} of " in said and "2500 predictions written" in said
    assert not target.with_name("out.csv.shards").exists()
    predict(trained.output, source, tmp_path / "whole.csv", settings=SMALL)
    assert target.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert list(pd.read_csv(target)["id"]) == list(pd.read_csv(source)["id"])


def unfinished(plain: Path, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Embed all pieces of `source` and stop before they are joined; return the shards."""

    def stop(_: Shards) -> None:
        raise DataError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(Shards, "join", stop)
        with pytest.raises(DataError, match="stopped"):
            embed(str(plain), source, target, settings=SMALL)
    return parts(target)


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
@pytest.mark.parametrize("harm", ["swapped", "doubled", "foreign", "cut", "flipped", "beyond", "another length"])
def test_shards_that_do_not_belong_are_predicted_again(
    plain: Path, proteins: Proteins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, harm: str
) -> None:
    source, target = proteins("many.csv", 130, seed=4), tmp_path / f"out{suffix}"
    embed(str(plain), source, tmp_path / f"whole{suffix}", settings=SMALL)
    shards = unfinished(plain, source, target, monkeypatch)
    assert len(shards) >= 3
    if harm in ("foreign", "another length"):
        other = proteins("other.csv", 130 if harm == "foreign" else 200, seed=5)
        foreign = unfinished(plain, other, tmp_path / f"other{suffix}", monkeypatch)
        shutil.copy(foreign[1], shards[1])
        shutil.copy(foreign[1].with_suffix(".json"), shards[1].with_suffix(".json"))
    elif harm == "swapped":
        content = shards[0].read_bytes()
        shutil.copy(shards[1], shards[0])
        shards[1].write_bytes(content)
    elif harm == "doubled":
        shutil.copy(shards[0], shards[2])
    elif harm == "flipped":
        content = bytearray(shards[1].read_bytes())
        content[-100] ^= 1
        shards[1].write_bytes(content)
    elif harm == "cut":
        shards[1].write_bytes(shards[1].read_bytes()[:-9])
    else:
        shutil.copy(shards[0], shards[0].with_name(f"{len(shards) + 3:08d}{suffix}"))
    lines: list[str] = []
    assert embed(str(plain), source, target, settings=SMALL, resume=True, log=lines.append) == 130
    again = [line for line in lines if line.endswith("so it is predicted again")]
    assert len(again) == {"swapped": 2, "beyond": 0}.get(harm, 1), harm
    assert target.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not target.with_name(f"{target.name}.shards").exists()


@pytest.mark.parametrize("name", ["notes.txt", "folder", "00000000.csv"])
def test_what_others_keep_in_the_folder_of_the_shards_stays(plain: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "x.fasta"
    source.write_text(">a\nMKV\n")
    folder = tmp_path / "out.parquet.shards"
    (folder / "folder").mkdir(parents=True) if name == "folder" else folder.mkdir()
    if name != "folder":
        (folder / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"out.parquet.shards holds {name}, which is no shard"):
        embed(str(plain), source, tmp_path / "out.parquet")
    assert [path.name for path in folder.iterdir()] == [name]
    (tmp_path / "new.parquet.shards").symlink_to(folder)
    with pytest.raises(ConfigError, match=r"new.parquet.shards is in the way"):
        embed(str(plain), source, tmp_path / "new.parquet")


def test_an_output_replaces_no_input_and_nothing_of_a_run(
    trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run_folder = tmp_path / "d.csv", Path(trained.output)
    shutil.copy(str(trained.data.test), source)
    for name in ("link.csv", "link.json"):
        (tmp_path / name).symlink_to(source)
    (tmp_path / "e.csv.rejected.tsv").write_text("mine\n")
    shutil.copy(source, tmp_path / "f.csv.rejected.tsv")
    before = {path: path.read_bytes() for path in (*tmp_path.iterdir(), *run_folder.rglob("*")) if path.is_file()}
    for output in (
        source,
        tmp_path / "link.csv",
        run_folder / "predictions-test.parquet",
        run_folder / "adapter" / "x.csv",
    ):
        assert cli.main(words("predict", run_folder, source, output)) == 2
        assert "would replace what --" in capsys.readouterr().err
    for output in (run_folder / "result.json", tmp_path / "link.json"):
        assert cli.main(words("evaluate", run_folder, source, output)) == 2
        assert "would replace what --" in capsys.readouterr().err
    (tmp_path / "c.csv").write_text("data: {id_column: id}\n")
    config = ["--config", str(tmp_path / "c.csv")]
    assert cli.main([*words("predict", run_folder, source, tmp_path / "c.csv"), *config]) == 2
    assert "would replace what --config" in capsys.readouterr().err
    assert cli.main(words("predict", run_folder, tmp_path / "d*.csv", source)) == 2
    assert "would replace what --input" in capsys.readouterr().err
    assert cli.main(words("predict", run_folder, source, tmp_path / "e.csv")) == 2
    assert "e.csv.rejected.tsv is in the way" in capsys.readouterr().err
    assert cli.main(words("predict", run_folder, tmp_path / "f.csv.rejected.tsv", tmp_path / "f.csv")) == 2
    assert "would replace what --input" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}


def test_what_was_cut_off_is_part_of_the_input(proteins: Proteins) -> None:
    """A longer tail is not shown to the model, and yet there are more answers."""
    cfg = DataConfig(max_residues=12)

    def digests(path: Path) -> list[bytes]:
        source = records.TableSource(InputChunks(path, cfg), 40)
        return [source.pack(piece.content).serialize().to_pybytes() for piece in source()]

    source = proteins("p.csv", 5)
    before = digests(source)
    assert len(before) > 1, "cut residues count in a piece"
    rows = pd.read_csv(source)
    rows["sequence"] += "A"
    rows.to_csv(source, index=False)
    assert not set(before) & set(digests(source))


def test_two_processes_write_what_one_writes(trained: TrainConfig, proteins: Proteins, tmp_path: Path) -> None:
    source = proteins("many.csv", 300, seed=6)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = words("predict", trained.output, source, tmp_path / "two.csv", *SMALL)
    done = subprocess.run(
        [*start, "-m", "esm_neuron.cli", *command], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("300 predictions written") == 1 and done.stderr.count("300 proteins") == 1
    predict(trained.output, source, tmp_path / "one.csv", settings=SMALL)
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_bad_rows_are_counted_or_named(trained: TrainConfig, tmp_path: Path) -> None:
    source, said = tmp_path / "bad.fasta", list[str]()
    source.write_text(">a\nACDE\n>b\nAC!E\n>c\nACEEE\n>d\n" + "ACDEF" * 20 + "\n")
    with pytest.raises(DataError, match=r"bad.fasta:3: the sequence of 'b' has '!' at residue 3"):
        predict(trained.output, source, tmp_path / "out.csv")
    skip = ("--data.on_bad_residue=skip",)
    assert predict(trained.output, source, tmp_path / "out.csv", settings=skip, log=said.append) == 3
    rejected = (tmp_path / "out.csv.rejected.tsv").read_text().splitlines()
    assert len(rejected) == 2 and "\tb\t" in rejected[1] and "left out" in rejected[1]
    assert "1 skipped" in said[0] and "1 cropped, 38 residues cut off" in said[0]
    assert list(pd.read_csv(tmp_path / "out.csv")["id"]) == ["a", "c", "d"]
    replaced = ("--data.on_bad_residue=replace",)
    assert predict(trained.output, source, tmp_path / "out.csv", settings=replaced, log=said.append) == 4
    assert "replaced by X" in (tmp_path / "out.csv.rejected.tsv").read_text()
    source.write_text(">a\nACDE\n")
    assert predict(trained.output, source, tmp_path / "out.csv") == 1
    assert not (tmp_path / "out.csv.rejected.tsv").exists(), "it told of another file"


def test_what_cannot_be_predicted_is_one_line(trained: TrainConfig, plain: Path, tmp_path: Path) -> None:
    source = Path(str(trained.data.test))
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: predict(trained.output, source, tmp_path / "x.xls"), ConfigError, "unknown format '.xls'; name the"),
        (lambda: embed(str(plain), source, tmp_path / "x.csv"), ConfigError, "one of .parquet .safetensors .h5"),
        (lambda: predict(trained.output, source, tmp_path), ConfigError, "unknown format ''"),
        (lambda: predict("mini", source, tmp_path / "x.csv"), ConfigError, "predict needs the output folder"),
        (lambda: embed("tiny", source, tmp_path / "x.parquet"), ConfigError, "tiny is a bare shape, without weights"),
        (lambda: embed("none", source, tmp_path / "x.parquet"), ConfigError, "model.name=none is no folder, no hub id"),
    ]
    for act, kind, expected in cases:
        with pytest.raises(kind) as caught:
            act()
        assert expected in str(caught.value) and "\n" not in str(caught.value)
    reserved = tmp_path / "reserved.csv"
    reserved.write_text("id,sequence\n__metadata__,ACDE\n")
    with pytest.raises(DataError, match="reserved in safetensors"):
        embed(str(plain), reserved, tmp_path / "x.safetensors")
    broken = tmp_path / "broken"
    EsmForMaskedLM.from_pretrained(plain).save_pretrained(broken)
    weights = load_file(broken / "model.safetensors")
    for value in (np.nan, -np.inf):
        weights["esm.encoder.emb_layer_norm_after.bias"][0] = value
        save_file(weights, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"emb_layer_norm_after.bias holds NaN or infinity"):
            embed(str(broken), source, tmp_path / "y.parquet")
    weights["esm.encoder.emb_layer_norm_after.bias"][0] = 3e38
    weights["esm.encoder.emb_layer_norm_after.weight"][0] = 3e38
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match=r"the prediction for '2-\d+', .* is NaN or infinite: the weights"):
        embed(str(broken), source, tmp_path / "y.parquet")
    assert not list(tmp_path.glob("[xy].*[!s]"))


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text files that were read to their end, in order."""
    ends, read = list[str](), text_files._read

    def counted(path: str, number: int, file: Any) -> bytes:
        piece = read(path, number, file)
        if not piece:
            ends.append(path)
        return piece

    monkeypatch.setattr(text_files, "_read", counted)
    return ends


@pytest.fixture
def variants(tmp_path: Path) -> Path:
    path = tmp_path / "variants.csv"
    path.write_text("variant,value\n" + "".join(f"A1{to},{i}\n" for i, to in enumerate("CDEFGHIKLMNPQRSTVWY")))
    (tmp_path / "wild.fasta").write_text(">wild\nACDEF\n")
    return path


def commands(trained: TrainConfig, plain: Path, proteins: Proteins, variants: Path) -> dict[str, list[str]]:
    source, folder = proteins("many.csv", 130, seed=4), variants.parent
    wild = ("--wild-type", str(folder / "wild.fasta"), "--score-column", "value")
    return {
        "predict": words("predict", trained.output, source, folder / "predict.csv", *SMALL),
        "embed": words("embed", plain, source, folder / "embed.parquet", *SMALL),
        "score": words("score", plain, variants, folder / "score.csv", *wild),
    }


@pytest.mark.parametrize("command", ["predict", "embed", "score"])
def test_an_input_is_read_once_and_by_resume_not_at_all(
    trained: TrainConfig,
    plain: Path,
    proteins: Proteins,
    variants: Path,
    readings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    given = commands(trained, plain, proteins, variants)[command]
    source, target = given[given.index("--input") + 1], Path(given[given.index("--output") + 1])
    with monkeypatch.context() as patched:
        patched.setattr(Shards, "join", _stop)
        assert cli.main(given) == 2
    said = capsys.readouterr().err.splitlines()
    assert readings.count(source) == 1
    assert cli.main([*given, "--resume"]) == 0
    assert readings.count(source) == 1, "sizes and times are as they were"
    resumed = capsys.readouterr().err.splitlines()
    assert resumed[0] == said[0] and "resumed: " in resumed[1], "what was read is told again"
    content = target.read_bytes()
    assert cli.main(given) == 0 and readings.count(source) == 2
    assert target.read_bytes() == content and not stream.shards_folder(target).exists()


def _stop(_: Shards) -> int:
    raise DataError("stopped")


@pytest.mark.parametrize("harm", ["touched", "settings", "facts", "types", "version"])
def test_what_is_not_surely_the_same_is_read_again(
    plain: Path,
    proteins: Proteins,
    tmp_path: Path,
    readings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    harm: str,
) -> None:
    source, target = proteins("many.csv", 130, seed=4), tmp_path / "out.parquet"
    unfinished(plain, source, target, monkeypatch)
    facts = stream.shards_folder(target) / "input.json"
    if harm == "touched":
        os.utime(source, ns=(1, 1))
    elif harm == "version":
        monkeypatch.setattr(spool, "__version__", "0")
    elif harm == "facts":
        facts.write_text(facts.read_text()[:-9])
    elif harm == "types":
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "pieces": [["1", 1, "a"]]}))
    more = ("--data.on_bad_residue=skip",) if harm == "settings" else ()
    assert embed(str(plain), source, target, settings=[*SMALL, *more], resume=True) == 130
    assert readings == [str(source)] * 2


@pytest.mark.parametrize("harm", ["flipped", "cut", "fewer"])
def test_pieces_that_were_changed_are_refused_and_the_cure_cures(
    plain: Path, proteins: Proteins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    source, target = proteins("many.csv", 130, seed=4), tmp_path / "out.parquet"
    shards = unfinished(plain, source, target, monkeypatch)
    before = shards[-1].read_bytes()
    shards[-1].unlink()
    pieces = stream.shards_folder(target) / "input.arrow"
    whole, last = pieces.read_bytes(), pd.read_csv(source)["id"].iloc[-1].encode()
    assert whole.count(last) == 1
    if harm == "fewer":
        with pa.ipc.open_file(whole) as made, pa.ipc.new_file(str(pieces), made.schema) as writer:
            writer.write_batch(made.get_batch(0))
    else:
        pieces.write_bytes(whole.replace(last, last[::-1]) if harm == "flipped" else whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"input.arrow: was changed since it was written; go on with --resume"):
        embed(str(plain), source, target, settings=SMALL, resume=True)
    with monkeypatch.context() as patched:
        patched.setattr(Shards, "join", _stop)
        with pytest.raises(DataError, match="stopped"):
            embed(str(plain), source, target, settings=SMALL, resume=True)
    assert shards[-1].read_bytes() == before and pieces.read_bytes() == whole


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_stands_where_pieces_belong_is_replaced(
    plain: Path, proteins: Proteins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A pipe would be waited for, for ever."""
    source, target = proteins("many.csv", 130, seed=4), tmp_path / "out.parquet"
    unfinished(plain, source, target, monkeypatch)
    pieces = stream.shards_folder(target) / "input.arrow"
    pieces.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: os.symlink("nowhere", path)}[kind](pieces)
    assert embed(str(plain), source, target, settings=SMALL, resume=True) == 130


def test_an_input_that_changes_after_it_was_read_changes_nothing(
    plain: Path, proteins: Proteins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, scan = proteins("p.csv", 5), spool.scan
    embed(str(plain), source, tmp_path / "whole.parquet")

    def scanned(*given: Any) -> Any:
        found = scan(*given)
        source.write_text(source.read_text().replace("A", "G"))
        return found

    monkeypatch.setattr(stream, "scan", scanned)
    embed(str(plain), source, tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_task_without_chains_predicts_none(
    trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training refuses them, and the model has never seen two proteins in one."""
    (tmp_path / "pairs.csv").write_text("id,heavy,light\na,MKTAYIAK,MKTAW\n")
    words = ["--input", str(tmp_path / "pairs.csv"), "--data.sequence_column", "[heavy, light]"]
    assert cli.main(["predict", "--model", trained.output, *words, "--output", str(tmp_path / "p.csv")]) == 2
    assert "[heavy, light] joins chains, which is for masked_lm and `embed`" in capsys.readouterr().err
    assert cli.main(["embed", "--model", trained.output, *words, "--output", str(tmp_path / "e.parquet")]) == 0


def test_a_folder_that_nfs_keeps_while_its_lock_is_open_harms_nothing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS gives an open file that is deleted another name, and its folder cannot be deleted until it is closed."""

    def remove(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / ".nfs0000000000000001").touch()
        folder.rmdir()

    monkeypatch.setattr(stream, "remove", remove)
    source, target = tmp_path / "p.fasta", tmp_path / "x.parquet"
    source.write_text(">a\nACDE\n>b\nAC!E\n")
    with pytest.raises(DataError, match="p.fasta:3"):
        embed(str(plain), source, target)
    (stream.shards_folder(target) / ".nfs0000000000000001").unlink()  # closed
    assert embed(str(plain), source, target, settings=["--data.on_bad_residue", "skip"]) == 1
    assert target.is_file() and (tmp_path / "x.parquet.rejected.tsv").is_file()


def test_a_bad_input_leaves_no_folder(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "bad.fasta"
    source.write_text(">a\nACDE\n>b\nAC!E\n")
    with pytest.raises(DataError, match="bad.fasta:3"):
        embed(str(plain), source, tmp_path / "x.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.fasta"]


def test_rejected_records_are_listed_by_resume_as_by_the_whole(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, skip = tmp_path / "bad.fasta", tmp_path / "x.parquet", ("--data.on_bad_residue=skip",)
    source.write_text(">a\nACDE\n>b\nAC!E\n")
    with monkeypatch.context() as patched:
        patched.setattr(Shards, "join", _stop)
        with pytest.raises(DataError, match="stopped"):
            embed(str(plain), source, target, settings=skip)
    assert embed(str(plain), source, target, settings=skip, resume=True) == 1
    listed = (tmp_path / "x.parquet.rejected.tsv").read_text()
    assert embed(str(plain), source, tmp_path / "y.parquet", settings=skip) == 1
    assert listed == (tmp_path / "y.parquet.rejected.tsv").read_text() and "\tb\t" in listed


def test_lists_of_a_residue_each_become_text_in_a_csv_file(tmp_path: Path) -> None:
    made = Shards(tmp_path / "out.csv", {}, InputScan((1, 1), (1, 1), ("a", "b")))
    made.folder.mkdir()
    assert made.begin() == []
    made.write(0, pa.table({"id": ["a"], "values": pa.array([np.linspace(0, 1, 2001)]), "n": [1]}))
    made.write(1, pa.table({"id": ["b"], "values": pa.array([np.array([0.5])]), "n": [2]}))
    assert made.join() == 2
    frame = pd.read_csv(tmp_path / "out.csv", dtype={"values": str})
    assert list(map(float, frame["values"][0].split(","))) == pytest.approx(np.linspace(0, 1, 2001), abs=1e-6)
    assert list(frame["values"])[1] == "0.5" and list(frame["n"]) == [1, 2]
