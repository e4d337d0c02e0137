"""The cure of each error works, and settings without an effect are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.intake import ROWS, load, protein, table, write

from esm_neuron.config import DataConfig
from esm_neuron.data.inputs import InputChunks
from esm_neuron.errors import ConfigError, DataError


def cured(path: Path, **fields: Any) -> int:
    return len(load(path, **fields).train)


S, BY = "id,sequence,label,split\n", {"split_column": "split"}
T, C = "id\tsequence\tlabel\n", "id,sequence,label\n"
CURES: list[tuple[str, str, dict[str, Any], str, Any]] = [
    # file, text, settings, what the error says, the cure: other settings, another name, or another text
    ("a.csv", ">p0 label=A\nMKV\n>p1 label=B\nMKL\n", {}, "name the file .fasta", "a.fasta"),
    ("a.fasta", C + "p0,MKV,A\np1,MKL,B\n", {}, "name it .csv", "a.csv"),
    ("a.tsv", T + "p0\tMKV\t\np1\tMKL\tA\np2\tMKL\tB\n", {}, "data.on_missing=skip", {"on_missing": "skip"}),
    ("a.tsv", T + "p0\tMK-V\tA\np1\tMKL\tB\n", {}, "strip (take", {"on_bad_residue": "strip"}),
    ("a.tsv", T + "p0\tMKJV\tA\np1\tMKL\tB\n", {}, "or replace (write X)", {"on_bad_residue": "replace"}),
    ("a.tsv", T + "p0\tMKJV\tA\np1\tMK\tA\np2\tMKL\tB\n", {}, "skip (leave", {"on_bad_residue": "skip"}),
    ("a.csv", "id,seq,label\np0,MKV,A\np1,MKL,B\n", {}, "no column 'sequence'", {"sequence_column": "seq"}),
    ("a.csv", "id,sequence,lab\np0,MKV,A\np1,MKL,B\n", {}, "did you mean 'lab'?", {"label_column": "lab"}),
    ("a.csv", "id;seq;label\np0;MKV;A\np1;MKL;B\n", {}, "separated by ';'", {"sequence_column": "seq"}),
    ("a.csv", "# x\n" + C + "p0,MKV,A\np1,MKL,B\n", {}, ":1: the line begins with '#'", C + "p0,MKV,A\np1,MKL,B\n"),
    ("a.csv", "#sequence,label\nMKV,A\nMKL,B\n", {}, "or the '#' where it is", "sequence,label\nMKV,A\nMKL,B\n"),
    ("a.csv", '"id,sequence,label"\n"p0,MKV,A"\n', {}, "quotes around the lines out", C + "p0,MKV,A\np1,MKL,B\n"),
    ("a.a3m", ">p0 label=A\nMK-V\n>p1 label=B\nMKlL\n", {}, "name it .fasta, and take gaps out with", "b.fasta"),
    ("a.json", '{"sequence": "MK", "label": "A"}\n{"sequence": "MV", "label": "B"}\n', {}, "name it .jsonl", "a.jsonl"),
    ("a.csv", C + "p0,MKV,A\np0,MKL,B\n", {}, "make ids unique", C + "p0,MKV,A\np1,MKL,B\n"),
    ("a.csv", C + 'p0,MKV,"A\np1,MKL,B\n', {}, "close the quotes", C + 'p0,MKV,"A"\np1,MKL,B\n'),
    ("a.csv", C + "p0,MKV,A,x\np1,MKL,B\n", {}, "quote values that hold ','", C + 'p0,MKV,"A,x"\np1,MKL,B\n'),
    ("a.csv", C + "p0,MKV,0.1\np1,MKL\n", {}, "fill the row up", C + "p0,MKV,0\np1,MKL,1\n"),
    ("a.csv", S + "p0,MKV,A,one\np1,MKL,B,one\n", BY, "name the splits there",
     {**BY, "split_names": ("one", "b", "c")}),
    ("a.csv", S + "p0,MKV,A,0\np1,MKL,B,0\np2,MKL,B,1\n", BY, "one in data.fold", {**BY, "fold": "1"}),
    ("a.csv", C + "p0,MKV,A\np1,MKL,B\n", {"keep": {"label": ["C"]}}, "use values that are there",
     {"keep": {"label": ["A", "B"]}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "fields", "said", "cure"), CURES)
def test_a_cure_that_is_offered_cures(
    tmp_path: Path, name: str, text: str, fields: dict[str, Any], said: str, cure: Any
) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as caught:
        load(path, **fields)
    assert said in str(caught.value)
    if isinstance(cure, dict):
        assert cured(path, **cure) >= 2
    elif "\n" in cure:
        assert cured(write(path, cure), **fields) >= 2
    elif cure == "b.fasta":
        assert cured(path.rename(tmp_path / cure), on_bad_residue="strip") >= 2
    else:
        assert cured(path.rename(tmp_path / cure), **fields) >= 2


def test_fasta_in_a_txt_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "pdb_seqres.txt", f">1a_A mol:protein\n{protein(0)}\n>1b_A mol:na\nACGT\n")
    table_ = InputChunks(path, DataConfig(keep={"mol": ["protein"]})).read()
    assert list(table_.ids) == ["1a_A"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04" + b"x" * 60, "zip archive, such as an Excel workbook; save the sheet as CSV"),
        ("id,sequence\n".encode("utf-16"), "UTF-16 text; save the file as UTF-8"),
        ("id,sequence\n".encode("utf-16-be").join([b"\xfe\xff", b""]), "UTF-16 text; save the file as UTF-8"),
        (b"PAR1" + b"x" * 60, "a Parquet file; name it .parquet"),
        (b"<!doctype html><html>", "a web page; download the file"),
        (b"<html><body>", "a web page; download the file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        (b"\xd0\xcf\x11\xe0" + b"x" * 60, "old Excel workbook; save the sheet as CSV"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.fasta", "a.jsonl"])
def test_a_file_that_is_another_kind_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}:1: this is .*{said}"):
        load(path)


def test_settings_of_data_that_have_no_effect_are_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", ["A", "B"] * 5)
    for fields, said in (
        ({"split_names": ("a", "b", "c")}, "data.split_names without data.split_column has no effect"),
        ({"mask_column": "x"}, "data.mask_column=x is for labels of residues; leave it out, or use task.name=residue"),
        ({"fold": "1"}, "data.fold without data.split_column has no effect"),
        ({"valid": str(path), "valid_fraction": 0.3}, "has no effect beside data.valid"),
        ({"split_column": "label", "fold": "A", "test": "x"}, "says what is tested on; leave out"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(path, **fields)


def test_a_filter_of_an_input_chooses_its_rows(tmp_path: Path) -> None:
    rows = [",".join((*row, "train" if i < 4 else "test")) for i, row in enumerate(ROWS)]
    path = write(tmp_path / "a.csv", "\n".join(["id,sequence,label,set", *rows]) + "\n")
    cfg = DataConfig(keep={"set": ["test"]})
    inputs = InputChunks(path, cfg)
    assert list(inputs.read().ids) == ["p4", "p5"]
    assert inputs.report.filtered == 4
    with pytest.raises(DataError, match=r"no column 'seet' \(data.keep\)"):
        InputChunks(path, replace(cfg, keep={"seet": ["test"]})).read()
    with pytest.raises(DataError, match=r"data.keep leaves no records; .*'train'"):
        InputChunks(path, replace(cfg, keep={"set": ["none"]})).read()
