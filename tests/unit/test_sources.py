"""Rows and their line numbers from CSV, TSV and FASTA; a broken file is one line: file, line, cure."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value, load_dataset
from helpers.rows import read_rows

from esm_neuron.config import DataConfig
from esm_neuron.data import text_files as text_formats
from esm_neuron.data.sources import read_chunks
from esm_neuron.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" and isinstance(content, str) else data)
    return path


def records(**fields: list) -> dict[str, list]:
    """Two rows with labels of any type."""
    return {"sequence": ["MKV", "AAA"], "id": ["P1", "P2"], "other": [None, "x"], **fields}


def write_table(path: Path, values: dict[str, list], features: Features | None = None) -> Path:
    """The same rows as JSONL, Parquet or a saved dataset, by the path's suffix (none: a dataset)."""
    if path.suffix in (".jsonl", ".gz"):
        rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        return write(path, "".join(json.dumps(row) + "\n" for row in rows))
    if path.suffix == ".parquet":
        pq.write_table(pa.table(values), path, row_group_size=1)
    else:
        Dataset.from_dict(values, features=features).save_to_disk(path)
    return path


def columns(path: Path, need_label: bool = True, **fields) -> dict[str, list]:
    return read_rows(path, DataConfig(**fields), need_label).to_pydict()


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


def test_a_value_may_be_as_long_as_its_record(tmp_path: Path) -> None:
    """The csv module by itself takes 131,072 characters: labels of titin's residues may be more."""
    (tmp_path / "a.csv").write_text("id,sequence,label\nP1,MKV," + "01 " * 60_000 + "\n")
    assert len(read_rows(tmp_path / "a.csv", DataConfig(), True)["label"][0].as_py()) >= 179_999


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


def test_a_description_may_be_written_in_any_way(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fa", ">P1 note=\"5' end note=x label=in\nMK\n>P2 label=out GN=a GN=b\nMK\n")
    assert columns(path)["label"] == ["in", "out"]
    (tmp_path / "b.fa").write_text(">P1 label=in label=out\nMK\n")
    assert columns(tmp_path / "b.fa", need_label=False)["id"] == ["P1"]


def test_fasta_without_labels_needs_no_header_fields(tmp_path: Path) -> None:
    got = columns(write(tmp_path / "a.fa", ">P1\n>P2\nAAA"), need_label=False)
    assert got == {"line": [1, 2], "id": ["P1", "P2"], "sequence": ["", "AAA"]}


def test_a_field_that_one_fasta_header_lacks_is_empty(tmp_path: Path) -> None:
    assert columns(write(tmp_path / "a.fa", ">P1 label=in\nA\n>P2\nA"))["label"] == ["in", ""]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "folder"])
@pytest.mark.parametrize(
    ("labels", "joiner", "expected"),
    [
        (["in", "out"], ";", ["in", "out"]),
        ([1, 20], ";", ["1", "20"]),
        ([0.1, float("nan")], ";", ["0.1", ""]),
        ([True, None], ";", ["true", ""]),
        ([["in", "out"], ["in"]], ";", ["in;out", "in"]),
        ([[0, 1, 10], []], ",", ["0,1,10", "[]"]),
    ],
)
def test_typed_values_become_one_text(
    tmp_path: Path, name: str, labels: list, joiner: str, expected: list[str]
) -> None:
    path = write_table(tmp_path / name, records(label=labels))
    rows = read_rows(path, DataConfig(), need_label=True, joiner=joiner)
    assert rows.to_pydict() == EXPECTED | {"line": [1, 2], "label": expected}


def test_class_labels_of_a_dataset_are_their_names(tmp_path: Path) -> None:
    names, text = ClassLabel(names=["in", "out"]), Value("string")
    features = Features(sequence=text, id=text, other=text, label=names, many=Sequence(names))
    path = write_table(tmp_path / "d", records(label=[1, 0], many=[[0, 1], []]), features)
    assert columns(path)["label"] == ["out", "in"]
    assert columns(path, label_column="many")["label"] == ["in;out", "[]"]


def test_a_folder_of_several_splits_names_them(tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_dict(records(label=["in", "out"]))).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=f"several splits; name one of them: {tmp_path}/d/train$"):
        columns(tmp_path / "d")
    assert columns(tmp_path / "d" / "train")["id"] == ["P1", "P2"]


COMMIT, OTHER = "0a1b2c3d4e" * 4, "f" * 40


class FakeBuilder:
    """What `datasets.load_dataset_builder` gives for a hub dataset."""

    def __init__(self, commit: str) -> None:
        self.hash, self.prepared = commit, False

    def download_and_prepare(self) -> None:
        self.prepared = True

    def as_dataset(self, split: str) -> Dataset:
        assert self.prepared
        return Dataset.from_dict(records(label=["in", "out"], id=[split, "P2"]))


def test_a_hub_dataset_is_asked_for_by_its_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: str | None, **options: object) -> FakeBuilder:
        asked.append((names, options))
        return FakeBuilder(COMMIT)

    monkeypatch.setattr("datasets.load_dataset_builder", load)
    assert columns(f"hf://owner/name@{COMMIT}/train") == EXPECTED | {"line": [1, 2], "id": ["train", "P2"]}
    assert columns(Path(f"hf://owner/name@{COMMIT}/small/test"))["id"] == ["test", "P2"]
    assert columns("hf://owner/name@v1.0/train")["id"] == ["train", "P2"]
    assert asked == [
        (("hf://datasets/owner/name", None), {"revision": COMMIT, "token": False}),
        (("hf://datasets/owner/name", "small"), {"revision": COMMIT, "token": False}),
        (("hf://datasets/owner/name", None), {"revision": "v1.0", "token": False}),
    ]
    with pytest.raises(DataError, match=rf"@{OTHER}/train: .*\(revision {COMMIT} came\); check owner, name, revision"):
        columns(f"hf://owner/name@{OTHER}/train")
    names = ("owner/name/train", "owner/name@0a1b2c", "name@0a1b2c/train", "../name@main/train", "owner/..@main/train")
    for wrong in (*names, "owner/name@../train", "owner/name@main/../train", "./name@main/train"):
        with pytest.raises(DataError, match="not the name of a hub dataset; write hf://owner/name@revision/split, or"):
            columns(f"hf://{wrong}")
    assert len(asked) == 4


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working one, beside an empty cache of `datasets`, where no hub is asked."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "work"


def test_a_folder_is_not_taken_for_a_hub_dataset_of_its_name(offline: Path) -> None:
    folder = offline / "owner" / "name"
    folder.mkdir(parents=True)
    write(folder / "train.csv", "id,sequence,label\nWRONG,MKV,in\n")
    taken = load_dataset("owner/name", split="train", revision=COMMIT)  # the package's own way
    assert taken["id"] == ["WRONG"]
    with pytest.raises(
        DataError, match=rf"{COMMIT}/train: cannot be read from the hub .*; check owner, .* and network"
    ):
        columns(f"hf://owner/name@{COMMIT}/train")


@pytest.mark.parametrize("asked", [COMMIT, "main", "v1.0", f"{COMMIT}/default"])
def test_what_another_revision_left_in_the_cache_is_not_taken(offline: Path, asked: str) -> None:
    from datasets.packaged_modules.csv.csv import Csv

    file = write(offline / "a.csv", "id,sequence,label\nWRONG,MKV,in\n")
    made = Csv(cache_dir=str(offline / "made"), dataset_name="name", data_files={"train": [str(file)]})
    made.download_and_prepare(str(offline.parent / "cache" / "owner___name" / "default" / "0.0.0" / OTHER))
    taken = load_dataset("owner/name", split="train", revision=COMMIT)  # the package's own way
    assert taken["id"] == ["WRONG"]
    with pytest.raises(DataError, match=rf"the cache holds \(revision {OTHER}, configuration default\) may be another"):
        columns(f"hf://owner/name@{asked}/train")


def test_a_parquet_value_outside_of_its_dictionary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a flipped bit can do, found by fuzzing: an index of 239 into a dictionary of one text."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(records(label=["in", "out"])), path)
    broken = pa.DictionaryArray.from_arrays(pa.array([0, 239], pa.int32()), pa.array(["MKV"]), safe=False)
    batch = pa.RecordBatch.from_arrays([broken] * 3, names=["id", "sequence", "label"])
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: iter([batch]))
    with pytest.raises(DataError, match=r"a.parquet: no sound Parquet file \(.*239"):
        columns(path)


@pytest.mark.parametrize("name", ["a.fasta", "a.csv", "a.parquet"])
def test_chunks_hold_all_rows_in_order_whatever_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ids = [f"P{i}" for i in range(2500)]  # more than the readers' own batches
    if name == "a.parquet":
        path = write_table(tmp_path / name, {"id": ids, "sequence": ["MKV"] * 2500})
    else:
        row, head = (">{}\nMKV\n", "") if name == "a.fasta" else ("{},MKV\n", "id,sequence\n")
        path = write(tmp_path / name, head + "".join(row.format(name) for name in ids))
    whole = read_rows(path, DataConfig(), need_label=False)
    assert whole["id"].to_pylist() == ids
    assert sorted(set(whole["line"].to_pylist())) == whole["line"].to_pylist()
    monkeypatch.setattr("esm_neuron.data.sources.CHUNK_ROWS", 999)
    chunks = list(read_chunks(path, DataConfig()))
    assert [len(chunk) for chunk in chunks] == [999, 999, 502]
    assert pa.concat_tables(chunks) == whole


def test_a_chunk_ends_early_where_sequences_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esm_neuron.data.sources.CHUNK_CHARACTERS", 100)
    path = write(tmp_path / "a.fa", "".join(f">P{i}\n{'A' * 60}\n" for i in range(5)))
    assert [len(chunk) for chunk in read_chunks(path, DataConfig())] == [2, 2, 1]


PARQUET = pa.table(records(label=["in", "out"]))


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


HEAD = "id,sequence,label\n"
BROKEN: list[tuple[str, str | bytes, str]] = [
    ("a.csv", "", ": the file is empty; "),
    ("a.csv", "\n\n", ": the file is empty; "),
    ("a.csv.gz", b"", ": the file is empty; "),
    ("a.fa", "\n", ": the file is empty; "),
    ("a.csv", HEAD, ": the file has no records; "),
    (
        "a.csv",
        HEAD + "P1,MKV,in\nP2,MKV,in,4\n",
        ":3: 4 values in the row of 'P2', 3 columns in the header; quote",
    ),
    ("a.csv", HEAD + "P1,MKV\n", ":2: 2 values in the row of 'P1', 3 columns in the header; fill"),
    ("a.csv", HEAD + 'P1,MKV,in\n\nP2,"MKV,in\nP3,MKV,in\n', ":4: unexpected end of data; close the quotes"),
    ("a.csv", HEAD + 'P1,"MK"V,in\n', ":2: ',' expected after '\"'; close the quotes"),
    ("a.csv", HEAD.encode() + b"P1,MK\xe9,in\n", ":2: byte 0xe9 at position 6 is not UTF-8; save"),
    ("a.csv", HEAD.encode("utf-16"), ":1: this is UTF-16 text; save the file as UTF-8"),
    ("a.csv", HEAD + "P1,MKV,in\rP2,MKV,in\n", ":2: a carriage return within a line; save"),
    ("a.csv", gzip.compress(HEAD.encode(), mtime=0), ":1: this is gzip data; name the file .gz"),
    ("a.csv.gz", HEAD.encode(), r":1: not sound gzip data \(Not a gzipped file .*\); drop .gz"),
    (
        "a.csv.gz",
        gzip.compress(os.urandom(20_000).hex().encode())[:9000],
        ":1: the gzip data end too early; .* copy it",
    ),
    ("a.csv.gz", gzip.compress(b"id", mtime=0)[:10] + b"\xff" * 30, r":1: damaged gzip data \(.*\); copy the"),
    ("a.docx", "x", ": unknown format '.docx'; name the file with one of .csv .tsv"),
    ("noformat", "x", ": unknown format ''; "),
    (
        "a.csv",
        "id,seqence,label\n",
        r": no column 'sequence' \(data.sequence_column\); the file has 'id', .*; did you mean 'seqence'\?",
    ),
    ("a.csv", "protein,seq,label\n", r": no column 'sequence' .*; did you mean 'seq'\?"),
    (
        "a.csv",
        "id,x,label\n",
        r": no column 'sequence' \(data.sequence_column\); the file has .*; name one of these as data.s",
    ),
    ("a.csv", "id,AA Seq,label\n", r": no column 'sequence' \(data.sequence_column\); .*; did you mean 'AA Seq'\?"),
    ("a.csv", "id,id,sequence,label\n", ": the header has column 'id' twice; rename one"),
    ("a.fa", ">P1 lable=in\nMKV\n", r": no column 'label' \(data.label_column\); the file has 'lable'; did you mean"),
    ("a.fa", ">P1\nMKV\n", r": no column 'label' \(data.label_column\); the file has none; add it"),
    ("a.fa", "\nid,sequence\n>P1\n", ":2: text before the first '>'; is this FASTA"),
    ("a.fa", ">P1 label=in\nMKV\n> \nMKV\n", ":3: the header is empty; write"),
    ("a.fa", '>P1 label="in\nMKV\n', ":1: the quote after label= is not closed; close"),
    ("a.fa", ">P1 label=in label=out\nMKV\n", ":1: the header has label= twice; keep one"),
    ("a.fa", ">P1 INTERACTOR=P2 label=1\nMKV\n", ":1: INTERACTOR= makes it a pair of proteins, which no task"),
    ("a.jsonl", "", ": the file is empty; give one with a JSON object for each record"),
    ("a.jsonl", "{}\n", ": the file is empty; "),
    ("a.jsonl", '{"id": "P1"\n', r":1: no sound JSON \(Expecting ',' delimiter at position 13\); write one object"),
    ("a.jsonl", '\n["P1"]\n', r":2: a list, not an object; write \{...\} for each"),
    (
        "a.json",
        '{"a": [], "b": 1}',
        r": a dict with 'a', 'b', not a list of objects; write \[\{...\}, ...\], or one object",
    ),
    ("a.json", "[1]", r": record 1: a int, not an object; write \{...\} for each"),
    ("a.json", "[]", ": the file is empty; give one with a JSON object for each record"),
    ("a.json", '[{"id": "P1", "sequence": "M"},', r": no sound JSON \(Expecting value at position \d+\); correct it"),
    ("a.json", '[{"id": "P1", "id": "P2"}]', ": the object has key 'id' twice; keep one"),
    ("a.json", "[" * 100_000, r": no sound JSON \("),
    ("a.jsonl", '{"id": "P1", "id": "P2"}\n', ":1: the object has key 'id' twice; keep one"),
    ("a.jsonl", r'{"id": "P\ud800", "sequence": "M"}', ":1: column 'id' holds half a surrogate pair, which is no"),
    ("a.jsonl", "[" * 100_000, r":1: no sound JSON \("),
    (
        "a.jsonl",
        '{"id": "P1", "sequence": ["M"]}',
        ":1: column 'sequence': 'M' is no token of a residue of ESM-2; give its",
    ),
    ("a.jsonl", '{"id": "P1", "sequence": {"a": 1}}', ":1: column 'sequence' holds a dict; it must be text"),
    ("a.jsonl", '{"id": "P", "sequence": "M", "label": ["a;b"]}', ":1: column 'label': entry 'a;b' holds ';', which"),
    ("a.jsonl", '{"id": "P", "sequence": "M", "label": ["a", null]}', ":1: column 'label': entry '' is empty; rename"),
    ("a.jsonl", '{"id": "P1", "sequence": "M", "Lable": 1}', r": no column 'label' \(data.label_column\); .*'Lable'\?"),
    ("a.parquet", b"", r": no sound Parquet file \("),
    ("a.parquet", b"id,sequence\n", r": no sound Parquet file \("),
    ("a.parquet", parquet(PARQUET)[:-20], r": no sound Parquet file \("),
    ("a.parquet", parquet(PARQUET.slice(0, 0)), ": the file has no records; "),
    ("a.parquet", parquet(PARQUET.drop_columns("label")), r": no column 'label' \(data.label_column\); the file has"),
    (
        "a.parquet",
        parquet(PARQUET.rename_columns(["sequence", "id", "id", "label"])),
        ": the header has column 'id' twice; rename one",
    ),
    (
        "a.parquet",
        parquet(PARQUET.set_column(1, "id", pa.array(["P1", "P2"]).cast(pa.binary()))),
        ": record 1: column 'id' holds a bytes; it must be text, a number, true or false, convert it",
    ),
    ("a.parquet.gz", parquet(PARQUET), ": such files are compressed within; "),
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
    with pytest.raises(DataError, match="this is a folder; name a file in it, or"):
        read_rows(tmp_path / "folder.csv", DataConfig(), need_label=True)


def test_a_damaged_saved_dataset(tmp_path: Path) -> None:
    path = write_table(tmp_path / "d", records(label=["in", "out"]))
    next(path.glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(DataError, match=r"/d: no sound saved dataset \(.*\); save it anew, or copy it again$"):
        columns(path)


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_formats, "LINE_LIMIT", 1000)
    path = write(tmp_path / "a.fa.gz", ">P1\n" + "A" * 999 + "\n" + "A" * 1_001)
    with pytest.raises(DataError, match=":3: the line has more than 1000 bytes"):
        read_rows(path, DataConfig(), need_label=False)


def test_nothing_is_written_to_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    rows = read_rows(write(tmp_path / "a.csv", HEAD + "P1,MKV,in\n"), DataConfig(), need_label=True)
    assert len(rows) == 1
    assert not (tmp_path / "home").exists()
