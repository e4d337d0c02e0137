"""Which rows are read: of several files, of saved datasets, by columns of splits, filters and counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from helpers.intake import ROWS, load, named, protein, table, write

from esm_neuron.config import DataConfig, TrainConfig
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.splits import load_splits
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.tasks import task_class


def splits_by(path: Path, **fields: Any) -> dict[str, list[str]]:
    splits = load(path, **fields)
    return {name: list(part.ids) for name in ("train", "valid", "test") if (part := getattr(splits, name)) is not None}


@pytest.mark.parametrize(
    ("values", "fields", "expected"),
    [
        ("train train val val test test", {}, "ttvvee"),
        ("TRAIN Train VALIDATION Valid TEST testing", {}, "ttvvee"),
        ("training train dev val test test", {}, "ttvvee"),
        ("0 1 2 3 4 4", {"split_names": (("0", "1", "2"), "3", "4")}, "tttvee"),
        ("0.0 1.0 2.0 3.0 4.0 4.0", {"split_names": (("0", "1", "2"), "3", "4")}, "tttvee"),
        ("0 1 2 3 4 4", {"fold": "4"}, "ttttee"),
        ("0.0 1.0 2.0 3.0 4.0 4.0", {"fold": 3}, "tttett"),
        ("a b c a b c", {"fold": "B"}, "tettet"),
        ("A A B B C C", {"split_names": ("a", "b", "c")}, "ttvvee"),
        ("train train train train test test", {"valid_column": "extra"}, "ttvvee"),
    ],
)
def test_split_columns(tmp_path: Path, values: str, fields: dict[str, Any], expected: str) -> None:
    extra = ["", "False", "True", "true", "", "False"]
    rows = [",".join((*row, split, more)) for row, split, more in zip(ROWS, values.split(), extra, strict=True)]
    path = write(tmp_path / "a.csv", "\n".join(["id,sequence,label,split,extra", *rows]) + "\n")
    names = {"t": "train", "v": "valid", "e": "test"}
    wanted: dict[str, list[str]] = {}
    for (name, _, _), letter in zip(ROWS, expected, strict=True):
        wanted.setdefault(names[letter], []).append(name)
    found = splits_by(path, split_column="split", valid_fraction=0.0, **fields)
    assert found == wanted


@pytest.mark.parametrize(
    "keep", ["{fold: [0, 1]}", '{fold: ["0", "1"]}', "{fold: [0.0, 1.0]}", "{leaky: [true], fold: [0, 1, 2]}"]
)
def test_filters_take_numbers_and_truth_as_text(tmp_path: Path, keep: str) -> None:
    from esm_neuron.config.settings import parse

    rows = [",".join((*row, str(i % 3), str(i % 3 < 2))) for i, row in enumerate(ROWS)]
    path = write(tmp_path / "a.csv", "\n".join(["id,sequence,label,fold,leaky", *rows]) + "\n")
    cfg = parse(["--data.train", str(path), "--data.keep", keep, "--data.valid_fraction", "0"])
    splits = load_splits(cfg, task_class("sequence_classification").label_kind)
    assert list(splits.train.ids) == ["p0", "p1", "p3", "p4"]


@pytest.mark.parametrize(
    ("fields", "kept", "said"),
    [
        ({"min_residues": 30}, [1, 2, 3, 5], "2 left out as shorter than data.min_residues"),
        ({"max_residues": 45, "long_sequences": "skip"}, [0, 1, 4, 5], "2 left out as longer than data.max_residues"),
        ({"max_rows": 3}, [0, 1, 2], "3 left out after the first data.max_rows"),
        ({"unique_column": "sequence"}, [0, 1, 2, 3, 4], "1 left out as repeating a value of data.unique_column"),
        ({"unique_column": "cluster"}, [0, 1, 2], "3 left out as repeating"),
        ({"unique_column": "cluster", "max_rows": 2}, [0, 1], "1 left out after the first"),
    ],
)
def test_rows_are_left_out_by_count(tmp_path: Path, fields: dict[str, Any], kept: list[int], said: str) -> None:
    sequences = [protein(0, 20), protein(1, 40), protein(2, 60), protein(3, 50), protein(4, 20), protein(1, 40)]
    rows = [f"p{i},{sequence},{'AB'[i % 2]},{i % 3}" for i, sequence in enumerate(sequences)]
    path = write(tmp_path / "a.csv", "\n".join(["id,sequence,label,cluster", *rows]) + "\n")
    splits = load(path, **fields)
    assert list(splits.train.ids) == [f"p{i}" for i in kept]
    assert said in splits.summary()


def test_several_files_are_the_concatenated_one(tmp_path: Path) -> None:
    proteins = [(f"p{i}", protein(i), "AB"[i % 2]) for i in range(40)]
    lines = [",".join(row) + "\n" for row in proteins]
    whole = load(write(tmp_path / "whole.csv", "id,sequence,label\n" + "".join(lines)), valid_fraction=0.2)
    for i in range(4):
        write(tmp_path / "shards" / f"part-{i}.csv", "id,sequence,label\n" + "".join(lines[10 * i : 10 * i + 10]))
    shards = tmp_path / "shards"
    for source in (f"{shards}", f"{shards}/*.csv", f"[{', '.join(f'{shards}/part-{i}.csv' for i in range(4))}]"):
        found = load(source, valid_fraction=0.2)
        assert (found.fingerprint, found.sampled) == (whole.fingerprint, whole.sampled)
        cached = load(source, valid_fraction=0.2, cache=str(tmp_path / "cache"))
        assert cached.fingerprint == whole.fingerprint
        assert list(InputChunks(source, DataConfig()).read().ids) == [name for name, _, _ in proteins]


def test_faults_name_the_file_that_they_are_in(tmp_path: Path) -> None:
    write(tmp_path / "s" / "a.csv", f"id,sequence,label\np0,{protein(0)},A\np1,{protein(1)},B\n")
    write(tmp_path / "s" / "b.csv", f"id,sequence,label\np0,{protein(2)},A\np3,MK?,B\n")
    with pytest.raises(DataError) as caught:
        load(tmp_path / "s")
    first, second = str(caught.value).splitlines()[1:]
    assert first == f"  {tmp_path}/s/b.csv:2: id 'p0' was used in line 2 of {tmp_path}/s/a.csv already; make ids unique"
    assert second.startswith(f"  {tmp_path}/s/b.csv:3: the sequence of 'p3' has '?'")
    write(tmp_path / "s" / "c.fasta", ">x\nMKV\n")
    with pytest.raises(DataError, match="has files of .csv and .fasta; name one kind"):
        load(tmp_path / "s")
    with pytest.raises(DataError, match="no file has such a name"):
        load(f"{tmp_path}/none-*.csv")


def test_a_file_per_class(tmp_path: Path) -> None:
    for name, numbers in (("a", range(4)), ("b", range(4, 6))):
        write(tmp_path / f"{name}.fasta", "".join(f">p{i}\n{protein(i)}\n" for i in numbers))
    by_class = load(f"{{membrane: {tmp_path}/a.fasta, other: {tmp_path}/b.fasta}}")
    assert (by_class.labels, named(by_class)) == (("membrane", "other"), ["membrane"] * 4 + ["other"] * 2)
    data = DataConfig(positives=f"{tmp_path}/a.fasta", negatives=f"{tmp_path}/b.fasta", valid_fraction=0.0)
    found = load_splits(TrainConfig(data=data), task_class("sequence_classification").label_kind)
    assert named(found) == ["positive"] * 4 + ["negative"] * 2
    with pytest.raises(ConfigError, match="give both, and no data.train"):
        load("x.csv", positives="a.fasta")


def test_saved_datasets_of_splits_and_of_tokens(tmp_path: Path) -> None:
    sequences = [s for _, s, _ in ROWS]
    columns = {"id": [name for name, _, _ in ROWS], "sequence": sequences, "label": list("ABABAB")}
    text = Dataset.from_dict(columns)
    DatasetDict(train=text, validation=text.select([0, 1]), test=text.select([2])).save_to_disk(tmp_path / "d")
    found = load(tmp_path / "d")
    assert found.valid is not None and found.test is not None
    assert (len(found.train), len(found.valid), len(found.test)) == (6, 2, 1)
    padded = [[0, *encode_many([s])[0][1:-1].tolist(), 2, 1, 1] for s in sequences]
    Dataset.from_dict({**columns, "sequence": padded}).rename_column("sequence", "input_ids").save_to_disk(
        tmp_path / "t"
    )
    text.save_to_disk(tmp_path / "x")
    assert load(tmp_path / "t").fingerprint == load(tmp_path / "x").fingerprint
    Dataset.from_dict({**columns, "sequence": [[0, 5, 32, 2]] * 6}).save_to_disk(tmp_path / "m")
    with pytest.raises(DataError, match="'32' is no token of a residue"):
        load(tmp_path / "m")


def test_proteins_with_labels_of_their_own_can_be_held_out(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", [f"GO:{i};GO:{i + 1};common" for i in range(0, 80, 2)])
    splits = load(path, "multi_label", valid_fraction=0.2)
    assert splits.valid is not None and len(splits.valid) == 8


def test_files_with_ids_and_without_them_are_not_one_split(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    rows = [f"{protein(number, 40)},{'ab'[number % 2]}" for number in range(8)]
    (tmp_path / "f/a.csv").write_text("\n".join(["sequence,label", *rows[:4]]) + "\n")
    (tmp_path / "f/b.csv").write_text(
        "\n".join(["id,sequence,label", *(f"x{i},{r}" for i, r in enumerate(rows[4:]))]) + "\n"
    )
    with pytest.raises(DataError, match="some of the files have ids and others none"):
        load(tmp_path / "f")


def test_an_id_that_only_the_first_object_lacks_is_not_thrown_away(tmp_path: Path) -> None:
    objects = [{"sequence": protein(number, 40), "label": "ab"[number % 2]} for number in range(6)]
    for number, each in enumerate(objects[1:]):
        each["id"] = f"x{number}"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, objects)) + "\n")
    with pytest.raises(DataError, match="a.jsonl:2: has 'id', and the first object has none"):
        load(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train.csv", "test.csv"], "the folder has test.csv and train.csv, of different splits; name each, or all"),
        (["x_train.csv", "x_val.csv"], "of different splits"),
        (["train-00000-of-00002.csv", "train-00001-of-00002.csv", "dev.csv"], "of different splits"),
        (["a.csv", "b/c.csv"], "b/c.csv: stands in a folder below .*; name all as .*/\\*\\*/\\*.csv"),
        (["training.csv", "b.csv", "validated.csv"], ""),
        (["train-0.csv", "train-1.csv", "metadata.json", "b/readme.md"], ""),
        (["val.csv", "dev.csv"], ""),
        (["contest.csv", "trainable.csv", "latest.csv"], ""),
    ],
)
def test_a_folder_is_one_split(tmp_path: Path, names: list[str], said: str) -> None:
    """Test proteins beside the training ones are not trained on without a word, and none below is left out."""
    tables = [name for name in names if name.endswith(".csv")]
    for i, name in enumerate(names):
        path = tmp_path / "d" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(
            f"id,sequence,label\np{i},{protein(i)},a\nq{i},{protein(i + 50)},b\n" if name in tables else "{}"
        )
    if said:
        with pytest.raises(DataError, match=said):
            load(tmp_path / "d")
        assert len(load(tmp_path / "d" / "**" / "*.csv").train.ids) == 2 * len(tables)  # as it says
    else:
        assert len(load(tmp_path / "d").train.ids) == 2 * len(tables)


@pytest.mark.parametrize("ids", [[0, 5, 6, 2, 0, 7, 8, 2], [5, 2, 6], [0, 5, 1, 6, 2], [0, 5, 6, 2, 2, 7]])
def test_tokens_of_two_proteins_are_not_one(tmp_path: Path, ids: list[int]) -> None:
    columns = {"id": ["a", "b"], "input_ids": [[0, 5, 6, 7, 2, 1], ids], "label": ["x", "y"]}
    Dataset.from_dict(columns).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="record 2: column 'sequence': a special token stands behind residue [12]"):
        load(tmp_path / "d")


def test_tokens_padded_at_either_side_are_a_protein(tmp_path: Path) -> None:
    columns = {"id": ["a", "b"], "input_ids": [[1, 1, 0, 5, 6, 2], [0, 7, 8, 2, 1, 1]], "label": ["x", "y"]}
    Dataset.from_dict(columns).save_to_disk(tmp_path / "d")
    assert (load(tmp_path / "d").train.lengths - 2).tolist() == [2, 2]
