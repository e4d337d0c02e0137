"""Files of proteins: generated ones come back whole, damaged ones are refused or read as others read them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import fuzzing
from helpers.fuzzing import (
    DIRTY,
    NAMES,
    PRINTABLE,
    SEEDS,
    SEQUENCES,
    VALUES,
    WORDS,
    fuzz,
    mutate,
    refused,
    stored,
)
from helpers.refusals import Refusal
from helpers.rows import read_rows
from hypothesis import given
from hypothesis import strategies as st

from esm_neuron.config import DataConfig, TaskConfig
from esm_neuron.data.looks import MISSING
from esm_neuron.data.sources import make_rows, read_chunks
from esm_neuron.data.tokenizer import RESIDUES, bad_residues
from esm_neuron.data.validation import Checker, Problems
from esm_neuron.tasks import task_class

folder = fuzzing.module_folder

Row = tuple[str, str, str]
"""Id, sequence, label."""


def some_rows(rng: Random) -> list[Row]:
    """Rows with ids of their own."""
    words = ["".join(rng.choices(WORDS, k=rng.randint(0, 9))).strip() for _ in range(rng.randint(1, 6))]
    names = ["".join(word.split()) for word in words]
    return [
        (f"{name}{number}", "".join(rng.choices(RESIDUES, k=rng.randint(1, 40))), word + "x")
        for number, (name, word) in enumerate(zip(names, words, strict=True))
    ]


@st.composite
def tables(draw: st.DrawFn, sequences: st.SearchStrategy[str] = SEQUENCES) -> list[Row]:
    """Rows with ids of their own."""
    ids = draw(
        st.lists(NAMES.filter(lambda name: "=" not in name and '"' not in name), min_size=1, max_size=8, unique=True)
    )
    return [(name, draw(sequences), draw(VALUES)) for name in ids]


def as_csv(rows: list[Row], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([("id", "sequence", "label"), *rows])
    return text.getvalue().encode()


def as_fasta(rows: list[Row]) -> bytes:
    """Sequences in lines of 7 residues; labels without quotes, which headers cannot hold."""
    parts = []
    for name, sequence, label in rows:
        lines = "\n".join(sequence[i : i + 7] for i in range(0, len(sequence), 7))
        parts.append(f'>{name} label="{_quotable(label)}"\n{lines}\n')
    return "".join(parts).encode()


def _quotable(label: str) -> str:
    return label.replace('"', "'")


def as_jsonl(rows: list[Row]) -> bytes:
    keys = ("id", "sequence", "label")
    return "".join(json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: list[Row]) -> bytes:
    ids, sequences, labels = zip(*rows, strict=True)
    table = pa.table({"id": ids, "sequence": pa.array(sequences, pa.large_string()), "label": labels})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=3, use_dictionary=len(rows) % 2 == 0)
    return bytes(sink.getvalue())


WRITERS: dict[str, Callable[[list[Row]], bytes]] = {
    "x.csv": as_csv,
    "x.tsv": lambda rows: as_csv(rows, "\t"),
    "x.fasta": as_fasta,
    "x.jsonl": as_jsonl,
    "x.parquet": as_parquet,
    "x.csv.gz": lambda rows: gzip.compress(as_csv(rows), 1, mtime=0),
}
FORMATS = pytest.mark.parametrize("name", WRITERS)


def read(path: Path) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = read_rows(path, DataConfig(), need_label=True).to_pydict()
    return table


@FORMATS
@fuzz
@given(rows=tables(), tail=st.sampled_from(["", "\n\n", "crlf", "bom"]))
def test_what_is_written_comes_back(folder: Path, name: str, rows: list[Row], tail: str) -> None:
    content = WRITERS[name](rows)
    if name in ("x.csv", "x.tsv", "x.fasta", "x.jsonl"):
        changes = {"crlf": content.replace(b"\n", b"\r\n"), "bom": b"\xef\xbb\xbf" + content}
        content = changes.get(tail, content + tail.encode())
    found = read(stored(folder, name, content))
    labels = [_quotable(label) if name == "x.fasta" else label for _, _, label in rows]
    assert found["id"] == [row[0] for row in rows]
    assert found["sequence"] == [row[1] for row in rows]
    assert found["label"] == [label.strip() for label in labels]


@FORMATS
@fuzz
@given(rows=tables(DIRTY), mode=st.sampled_from(["strict", "skip", "replace"]))
def test_every_row_is_used_rejected_or_refused(folder: Path, name: str, rows: list[Row], mode: Any) -> None:
    cfg = DataConfig(on_bad_residue=mode)
    path = stored(folder, name, WRITERS[name](rows))
    checker = Checker(cfg, str(path))
    sequences = ["".join(row[1].split()) if name == "x.fasta" else row[1].strip() for row in rows]
    sequences = [sequence.rstrip("*") for sequence in sequences]
    bad = [number for number, sequence in enumerate(sequences) if bad_residues(sequence)]

    def check() -> list[str]:
        kept = [text for part in map(checker, read_chunks(path, cfg)) for text in part["sequence"].to_pylist()]
        checker.finish()
        return kept

    found = refused(check)
    if isinstance(found, Refusal):
        empty = any(sequence.lower() in ("", *MISSING) for sequence in sequences)
        whole = mode == "replace" and "would be replaced by X" in found  # too many of them
        assert empty or whole or (bad and mode == "strict") or (len(bad) == len(rows) and mode == "skip"), found
        return
    rejected = [row for row in checker.rejected if row.action == "left out"]
    assert len(found) + len(rejected) == len(rows)
    assert len(checker.rejected) == len(bad)
    assert not any(bad_residues(sequence) for sequence in found)


@FORMATS
@fuzz
@given(seed=SEEDS)
def test_damage_is_refused_or_read_as_others_read_it(folder: Path, name: str, seed: int) -> None:
    rng = Random(seed)
    content = mutate(WRITERS[name](some_rows(rng)), rng)
    path = stored(folder, name, content)
    found = refused(lambda: read(path))
    if not isinstance(found, Refusal):
        assert len(found["id"]) == _records(name, content)


def _records(name: str, content: bytes) -> int:
    """Records of a file, counted by other means than ours."""
    if name == "x.parquet":
        return int(pq.read_metadata(io.BytesIO(content)).num_rows)
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode("utf-8-sig").replace("\r\n", "\n")
    if name == "x.fasta":
        return sum(line.startswith(">") for line in text.split("\n"))
    if name == "x.jsonl":
        return sum(bool(line.strip()) for line in text.split("\n"))
    delimiter = "\t" if name == "x.tsv" else ","
    return sum(bool(row) for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)) - 1


COLUMNS = (b"id", b"sequence", b"label")
NEEDED = {
    ".csv": COLUMNS, ".tsv": COLUMNS, ".jsonl": COLUMNS, ".fasta": (b">", b"label"), ".parquet": (b"PAR1",),
    ".gz": (b"\x1f\x8b",),
}  # fmt: skip
"""Suffix -> what a file must contain to hold a record."""


@pytest.mark.parametrize("name", [*WRITERS, "x.fa.gz"])
@fuzz
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_garbage_is_refused(folder: Path, name: str, content: bytes) -> None:
    found = refused(lambda: read(stored(folder, name, content)))
    assert isinstance(found, Refusal) or all(part in content for part in NEEDED[Path(name).suffix]), found


@pytest.mark.parametrize("task", ["sequence_classification", "multi_label", "regression", "residue_classification"])
@fuzz
@given(
    texts=st.lists(
        st.text(PRINTABLE | st.sampled_from(",;-? _"), max_size=12) | st.from_type(float).map(str), min_size=1
    ),
    lengths=st.data(),
)
def test_labels_become_targets_or_problems(task: Any, texts: list[str], lengths: st.DataObject) -> None:
    cfg = TaskConfig(name=task)
    sizes = [lengths.draw(st.just(len(text)) | st.integers(1, 12)) for text in texts]
    columns = {"id": texts, "sequence": ["M" * n for n in sizes], "label": texts, "line": [*range(1, len(texts) + 1)]}
    labels, problems = task_class(task).label_kind(cfg, "label"), Problems("x.csv")
    rows = refused(lambda: labels.encode(make_rows(columns), problems))
    if not isinstance(rows, pa.Table) or problems.total or rows["label"].null_count:
        return
    if isinstance(refused(lambda: labels.learn_classes([rows], "x.csv")), Refusal):
        return
    found = labels.targets(rows, problems)
    assert len(found) == (sum(sizes) if task == "residue_classification" else len(texts)) and problems.total == 0
