"""Rows and their line numbers from CSV, TSV and FASTA; a broken file is one line: file, line, cure."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from esm_neuron.config import DataConfig
from esm_neuron.data import sources
from esm_neuron.data.sources import read_rows
from esm_neuron.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" and isinstance(content, str) else data)
    return path


def columns(path: Path, need_label: bool = True, **fields) -> dict[str, list]:
    return read_rows(path, DataConfig(**fields), need_label).to_dict()


EXPECTED = {"line": [2, 3], "id": ["P1", "P2"], "sequence": ["MKV", "AAA"], "label": ["in", "out"]}


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.csv.gz", "a.tsv", "a.txt", "a.tab.gz"])
def test_tables(tmp_path: Path, name: str) -> None:
    text = "sequence,id,other,label\nMKV,P1,,in\nAAA,P2,x,out\n"
    text = text if ".csv" in name.lower() else text.replace(",", "\t")
    assert columns(write(tmp_path / name, text)) == EXPECTED


@pytest.mark.parametrize("change", [lambda s: s.replace("\n", "\r\n"), lambda s: "\ufeff" + s, str.rstrip])
def test_line_ends_and_byte_order_mark(tmp_path: Path, change) -> None:
    assert columns(write(tmp_path / "a.csv", change("id,sequence,label\nP1,MKV, in \nP2,AAA,out\n"))) == EXPECTED
    fasta = change(">P1 label=in\nMK\nV\n>P2 label=out\nAAA\n")
    assert columns(write(tmp_path / "a.fasta", fasta)) == EXPECTED | {"line": [1, 4]}


def test_lines_are_exact_after_quoted_newlines_and_blank_lines(tmp_path: Path) -> None:
    text = 'id,note,sequence\nP1,"two\nlines, ""quoted""",MKV\n\nP2,x,AAA\n'
    assert columns(write(tmp_path / "a.csv", text), need_label=False)["line"] == [2, 5]


def test_values_stay_as_they_are_written(tmp_path: Path) -> None:
    text = "id,sequence,label\n007,MKV,1.0\nNA,AAA,NA\nnull,AAA,\n"
    got = columns(write(tmp_path / "a.csv", text))
    assert (got["id"], got["label"]) == (["007", "NA", "null"], ["1.0", "NA", ""])


def test_columns_are_chosen_by_the_configuration(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "entry,seq,loc,fold,leaky\nP1,MKV,in,train,False\n")
    names = {"id_column": "entry", "sequence_column": "seq", "label_column": "loc", "split_column": "fold"}
    got = columns(path, **names, keep={"loc": ["in"]}, keep_heldout={"leaky": ["False"], "loc": ["in"]})
    assert got == {
        "line": [2],
        "id": ["P1"],
        "sequence": ["MKV"],
        "label": ["in"],
        "split": ["train"],
        "filter.leaky": ["False"],
        "filter.loc": ["in"],
    }


@pytest.mark.parametrize("suffix", [".fasta", ".fa.gz", ".faa", ".fas"])
def test_fasta_headers(tmp_path: Path, suffix: str) -> None:
    first = '>sp|P12345|AATM_RABIT Aspartate OS=Oryctolagus label="Cell membrane" x="a label=b"'
    text = first + "\nMKV LL\n\nAA\n>P2  label=Out\nAAA\n"
    got = columns(write(tmp_path / f"a{suffix}", text), keep={"label": ["x"]})
    assert got["id"] == ["sp|P12345|AATM_RABIT", "P2"]
    assert got["sequence"] == ["MKVLLAA", "AAA"]
    assert got["label"] == got["filter.label"] == ["Cell membrane", "Out"]
    assert got["line"] == [1, 5]


def test_fasta_without_labels_needs_no_header_fields(tmp_path: Path) -> None:
    got = columns(write(tmp_path / "a.fa", ">P1\n>P2\nAAA"), need_label=False)
    assert got == {"line": [1, 2], "id": ["P1", "P2"], "sequence": ["", "AAA"]}


def test_a_field_that_one_fasta_header_lacks_is_empty(tmp_path: Path) -> None:
    assert columns(write(tmp_path / "a.fa", ">P1 label=in\nA\n>P2\nA"))["label"] == ["in", ""]


HEAD = "id,sequence,label\n"
BROKEN: list[tuple[str, str | bytes, str]] = [
    ("a.csv", "", ": the file is empty; "),
    ("a.csv", "\n\n", ": the file is empty; "),
    ("a.csv.gz", b"", ": the file is empty; "),
    ("a.fa", "\n", ": the file is empty; "),
    ("a.csv", HEAD, ": the file has no rows; "),
    ("a.csv", HEAD + "P1,MKV,in\nP2,MKV,in,4\n", ":3: 4 values in a row, 3 columns in the header; quote values"),
    ("a.csv", HEAD + "P1,MKV\n", ":2: 2 values in a row, 3 columns in the header; fill"),
    ("a.csv", HEAD + 'P1,MKV,in\n\nP2,"MKV,in\nP3,MKV,in\n', ":4: unexpected end of data; close the quotes"),
    ("a.csv", HEAD + 'P1,"MK"V,in\n', ":2: ',' expected after '\"'; close the quotes"),
    ("a.csv", HEAD + f'P1,"{"A" * 140_000},in\n', r":2: field larger than field limit \(131072\); close"),
    ("a.csv", HEAD.encode() + b"P1,MK\xe9,in\n", ":2: byte 0xe9 at position 6 is not UTF-8; save"),
    ("a.csv", HEAD.encode("utf-16"), ":1: a zero byte; .* save the file as UTF-8"),
    ("a.csv", HEAD + "P1,MKV,in\rP2,MKV,in\n", ":2: a carriage return within a line; save"),
    ("a.csv", gzip.compress(HEAD.encode()), ":1: this is gzip data; name the file .gz"),
    ("a.csv.gz", HEAD.encode(), r":1: not sound gzip data \(Not a gzipped file .*\); drop .gz"),
    (
        "a.csv.gz",
        gzip.compress(os.urandom(20_000).hex().encode())[:9000],
        ":1: the gzip data end too early; .* copy it",
    ),
    ("a.csv.gz", gzip.compress(b"id")[:10] + b"\xff" * 30, r":1: damaged gzip data \(.*\); copy the file again"),
    ("a.xlsx", "x", ": unknown format '.xlsx'; name the file with one of .csv .tsv"),
    ("noformat", "x", ": unknown format ''; "),
    (
        "a.csv",
        "ID,Sequence,label\n",
        r": no column 'id' \(data.id_column\); the file has 'ID', .*; did you mean 'ID'\?",
    ),
    ("a.csv", "id,x,label\n", r": no column 'sequence' \(data.sequence_column\); the file has .*; name one of these"),
    ("a.csv", "id,id,sequence,label\n", ":1: the header has column 'id' twice; rename one"),
    ("a.fa", ">P1 lable=in\nMKV\n", r": no column 'label' \(data.label_column\); the file has 'lable'; did you mean"),
    ("a.fa", ">P1\nMKV\n", r": no column 'label' \(data.label_column\); the file has none; "),
    ("a.fa", "\nid,sequence\n>P1\n", ":2: text before the first '>'; is this FASTA"),
    ("a.fa", ">P1 label=in\nMKV\n> \nMKV\n", ":3: the header is empty; write"),
    ("a.fa", '>P1 label="in\nMKV\n', ":1: the quote after label= is not closed; close"),
    ("a.fa", ">P1 label=in label=out\nMKV\n", ":1: the header has label= twice; keep one"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_file_is_one_line_with_file_line_and_cure(tmp_path: Path, name: str, content, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=f"^{path}{message}") as caught:
        read_rows(path, DataConfig(), need_label=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.exit_code == 2


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="x.csv: no such file; check the path"):
        read_rows(tmp_path / "x.csv", DataConfig(), need_label=True)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="this is a folder; name a file in it"):
        read_rows(tmp_path / "folder.csv", DataConfig(), need_label=True)


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LINE_LIMIT", 1000)
    path = write(tmp_path / "a.fa.gz", ">P1\n" + "A" * 999 + "\n" + "A" * 1_001)
    with pytest.raises(DataError, match=":3: the line has more than 1000 bytes"):
        read_rows(path, DataConfig(), need_label=False)


def test_nothing_is_written_to_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    rows = read_rows(write(tmp_path / "a.csv", HEAD + "P1,MKV,in\n"), DataConfig(), need_label=True)
    assert rows.cache_files == []
    assert not (tmp_path / "home").exists()
