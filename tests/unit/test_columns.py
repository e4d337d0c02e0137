"""Blocks that are read by columns give what the readers of single records give, row for row, message for message."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers import fuzzing
from helpers.fuzzing import SEEDS, fuzz
from helpers.refusals import outcome
from hypothesis import given

from esm_neuron.config import DataConfig, TaskConfig, TrainConfig
from esm_neuron.data import parquet, sources, text_files
from esm_neuron.data.check import check_file
from esm_neuron.data.delimited import _Delimited
from esm_neuron.data.fasta import _Fasta
from esm_neuron.data.labels import Labels, LabelSets, Numbers, ResidueLabels
from esm_neuron.data.sources import read_chunks
from esm_neuron.data.splits import load_splits

folder = fuzzing.module_folder
KINDS = (Labels, LabelSets, ResidueLabels, Numbers)
ODD = (
    *(
        "",
        "nan",
        "-",
        " ",
        "x y",
        "é",
        "a,b",
        'a"b',
        '"',
        '"q"',
        "\ufeff",
        "id",
        "Sequence",
        "label",
        "1",
        "1.0",
        "true",
    ),
    *(
        "1,5",
        "1e3",
        "+1",
        "inf",
        "1_0",
        "[]",
        "['a']",
        "a;b",
        "0;1",
        "1;0",
        "110",
        "\x1c",
        "\u2003z",
        ".5",
        "1e400",
        "١",
    ),
)
VALUES: dict[str, Callable[[Random], str]] = {
    "label": lambda r: r.choice(("in", "out", "cell wall")),
    "number": lambda r: r.choice((f"{r.gauss(0, 3):.{r.randint(0, 6)}f}", str(r.randint(-5, 5)), f"{r.random():e}")),
    "set": lambda r: r.choice(("a;b", "a", "[]", "c;a")),
    "pair": lambda r: r.choice(("0;1", "1;0", "1;1")),
}


def protein(r: Random, odd: float) -> str:
    text = "".join(r.choices("ACDEFGHIKLMNPQRSTVWY", k=r.choice((0, 1, 3, 9, 30, 61, 90))))
    return text + r.choice(("*", "-", " ", "é", "1", "J", ">", '"')) if r.random() < odd else text


def label(r: Random, kind: str, residues: str, odd: float) -> str:
    if r.random() < odd:
        return r.choice(ODD)
    return "".join(r.choices("HEC-", k=len(residues))) if kind == "residues" else VALUES[kind](r)


def table(r: Random, separator: str) -> str:
    """A table that may have quotes, blank lines, a second header, rows of another width."""
    odd, quoted, kind = r.choice((0, 0, 0.02, 0.2)), r.choice((0, 0, 0.02, 1)), r.choice((*VALUES, "residues"))
    names = ["id", "sequence", "label", "split"][r.random() < 0.1 :]
    r.shuffle(names)
    lines = [separator.join(names)]
    for number in range(r.choice((0, 1, 30, 200))):
        residues = protein(r, odd)
        row = {"id": f"P{number}", "sequence": residues, "label": label(r, kind, residues, odd)}
        row["split"] = r.choice(("train", "train", "valid", "test"))
        row |= {r.choice(names): r.choice(ODD)} if r.random() < odd else {}
        values = [f'"{v}"' if r.random() < quoted else v for v in map(row.__getitem__, names)]
        lines.append(separator.join(values + ["more"] * (r.random() < odd / 50)))
        lines += [r.choice(("", " ", lines[0]))] * (r.random() < odd / 10)
    return r.choice(("\n", "\r\n")).join(lines) + "\n"


def fasta(r: Random) -> str:
    """Records that may have fields, descriptions, wrapped lines, lines of labels and what is no FASTA."""
    odd, kind, wrap = r.choice((0, 0, 0.02, 0.2)), r.choice(("", *VALUES)), r.choice((10, 60, 1000))
    third, lines = r.random() < 0.1, list[str]()
    for number in range(r.choice((0, 1, 60, 200))):
        residues = protein(r, odd)
        header = f">P{number}" + r.choice(("", "", " a note", " OS=Mus musculus OX=1", "\tx", "  mol:protein"))
        if kind and r.random() >= odd:
            header += r.choice((" ", " ", " ", "  ")) + f"label={label(r, kind, residues, odd)}"
            header += r.choice(("", " split=train", " split=test", " split=train x"))
        if r.random() < odd:
            header += r.choice((" label=x", " INTERACTOR=b", ' q="', ' label="a b"', " mylabel=a", " é", " \x1c"))
            header = r.choice((header, header, ">", "> ", ">P1;x"))
        body = [residues[at : at + wrap] for at in range(0, len(residues), wrap)]
        body += ["".join(r.choices("SHE", k=len(residues)))] * third
        lines += [header, *body, *([r.choice(("", " ", "MK V", "M>K", "\x1c", "M\tK"))] * (r.random() < odd))]
    return r.choice(("", "", "\n", "junk\n" * (odd > 0.1))) + r.choice(("\n", "\r\n")).join(lines) + "\n"


def written(r: Random, place: Path) -> Path:
    kind = r.choice((".csv", ".csv", ".tsv", ".txt", ".fasta", ".fasta"))
    text = fasta(r) if kind in (".fasta", ".txt") else table(r, "," if kind == ".csv" else "\t")
    content = text.encode()
    if content and r.random() < 0.05:
        at = r.randrange(len(content))
        content = content[:at] + r.choice((b"\0", b"\r", b"\xff", b'"', b">", b"\n")) + content[at + 1 :]
    packed = r.random() < 0.1
    path = place / f"a{kind}{'.gz' * packed}"
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return path


def seen(path: Path, kind: type[Labels], cfg: DataConfig) -> list[Any]:
    """All that is made of a file, or why not."""

    def splits() -> list[Any]:
        made = load_splits(TrainConfig(data=cfg), kind)
        return [
            made.fingerprint,
            made.labels,
            made.reports,
            made.sampled,
            list(made.rejected),
            made.described,
            made.task,
        ]

    return [
        outcome(lambda: [chunk.to_pydict() for chunk in read_chunks(path, cfg, kind.joiner)]),
        outcome(lambda: asdict(check_file(str(path), cfg, kind.of(TaskConfig(), cfg), "train", None))),
        outcome(splits),
    ]


@fuzz
@given(seed=SEEDS)
def test_columns_are_read_as_records_are(folder: Path, seed: int) -> None:
    r = Random(seed)
    path, kind = written(r, folder), r.choice(KINDS)
    split = r.choice(("split", None))
    fractions = {"valid_fraction": 0.0 if split else 0.2, "test_fraction": 0.0}
    cfg = DataConfig(
        train=str(path),
        split_column=split,
        on_bad_residue=r.choice(("strict", "skip", "replace", "strip")),
        on_missing=r.choice(("strict", "skip")),
        **fractions,  # type: ignore[arg-type]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK", r.choice((97, 1000, 1 << 20)))
        patch.setattr(sources, "CHUNK_ROWS", r.choice((7, 50, 16_384)))
        by_columns = seen(path, kind, cfg)
        patch.setattr(_Delimited, "plain", lambda *_: None)
        patch.setattr(_Fasta, "_columns", lambda *_: None)
        for each in KINDS:
            patch.setattr(each, "_encode_alike", lambda *_: None)
        assert by_columns == seen(path, kind, cfg)
    path.unlink()


@pytest.mark.parametrize(
    "text",
    [
        "id,sequence,label\n" + "P{},MKV,in\n" * 3,
        ">P{} label=in\nMKV\n" * 3,
        "sequence\tlabel\tid\n" + "MKV\tin\tP{}\n" * 3,
    ],
)
def test_plain_files_are_read_by_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """So that the test above compares two ways, and a corpus is read by the quick one."""
    path = tmp_path / ("a.fasta" if text[0] == ">" else "a.tsv" if "\t" in text else "a.csv")
    path.write_text(text.format(*"abc"))
    for one_by_one in (_Delimited, _Fasta):
        monkeypatch.setattr(one_by_one, "records", None)
    monkeypatch.setattr(Labels, "_encode_each", None)
    cfg = DataConfig()
    (chunk,) = read_chunks(path, cfg, "")
    assert chunk["id"].to_pylist() == ["Pa", "Pb", "Pc"] and chunk["label"].to_pylist() == ["in"] * 3
    check_file(str(path), cfg, Labels.of(TaskConfig(), cfg), "train", None)


@pytest.mark.parametrize(
    "values",
    [
        ["a", None, "é"],
        [1, None, -(2**60)],
        [0.1, float("nan"), None],
        [True, None, False],
        ["a\0", "b", "c"],
        [["a"], [], None],
    ],
)
def test_columns_of_parquet_are_read_as_values_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any]
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": ["a", "b", "c"], "sequence": ["MKV"] * 3, "label": values}), path)

    def rows() -> Any:
        return outcome(lambda: pa.concat_tables(read_chunks(path, DataConfig(), ";")).to_pydict())

    by_columns = rows()
    monkeypatch.setattr(parquet, "_as_text", lambda *_: None)
    assert by_columns == rows()


def test_blanks_are_those_of_str_strip() -> None:
    """Values are stripped by Arrow, and were stripped by Python."""
    every = [chr(code) for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]
    left = pc.utf8_trim_whitespace(pa.array(every, pa.large_string())).to_pylist()
    assert left == [character.strip() for character in every]
