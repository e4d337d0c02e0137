"""Files as people have them: what their text says is what is learned from, or one line says why not.

Sequences that are none, labels as people write them, quotes, separators, split columns, and the cure of each error.
docs/dev/intake-log.md has the kinds.
"""

from __future__ import annotations

import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from helpers.intake import LETTERS, load, named, protein, sets, table, write
from helpers.rows import read_rows
from hypothesis import given
from hypothesis import strategies as st

from esm_neuron import cli
from esm_neuron.config import DataConfig, TrainConfig
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.labels import one_hot
from esm_neuron.data.splits import load_splits
from esm_neuron.data.tokenizer import RESIDUES, encode_many
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.tasks import task_class

# Text that is not a sequence

NOTHING = [
    "",
    "unknown",
    "Deleted",
    "PENDING",
    "undefined",
    "OBSOLETE",
    "EMPTY",
    "TRUE",
    "TBD",
    "not available",
    "nan",
    "NaN",
    "None",
    "none",
    "null",
    "NULL",
    "NA",
    "N/A",
    "n/a",
    "#N/A",
    "<NA>",
    "NAN",
    "-",
    ".",
]


@pytest.mark.parametrize("mode", ["strict", "skip", "replace", "strip"])
@pytest.mark.parametrize("text", NOTHING)
def test_a_cell_that_stands_for_nothing_is_no_protein(tmp_path: Path, text: str, mode: str) -> None:
    sequences = [protein(i) for i in range(6)]
    path = table(tmp_path / "a.tsv", ["A", "B"] * 3, [*sequences[:3], text, *sequences[4:]])
    with pytest.raises(DataError, match=r"a.tsv:5: the sequence of 'p3' is .*data.on_missing=skip$"):
        load(path, on_bad_residue=mode)
    splits = load(path, on_bad_residue=mode, on_missing="skip")
    assert list(splits.train.ids) == ["p0", "p1", "p2", "p4", "p5"]
    assert "1 left out without a sequence or a label" in splits.summary()
    assert [row.id for row in splits.rejected] == ["p3"]


@pytest.mark.parametrize("text", ["NAN", "NA", "NIL"])
def test_among_short_peptides_such_a_word_is_a_peptide(tmp_path: Path, text: str) -> None:
    peptides = ["".join(random.Random(i).choices(LETTERS, k=3)) for i in range(30)]
    splits = load(table(tmp_path / "a.tsv", ["A", "B"] * 15 + ["A"], [*peptides, text]))
    assert splits.train.sequence(30).tolist() == encode_many([text])[0].tolist()
    with pytest.raises(DataError, match=r"'nan', which stands for none"):  # among capitals it is none
        load(table(tmp_path / "b.tsv", ["A", "B"] * 15 + ["A"], [*peptides, "nan"]))


def dna(seed: int, length: int, letters: str = "ACGT") -> str:
    return "".join(random.Random(seed).choices(letters, k=length))


@pytest.mark.parametrize(
    "sequences",
    [
        [dna(i, 90) for i in range(6)],
        [dna(i, 90).lower() for i in range(6)],
        [dna(i, 60, "ACGU") for i in range(6)],
        [dna(i, 60, "ACGTN") for i in range(6)],
        [dna(i, 100) + "R" for i in range(6)],
        [dna(i, 20) for i in range(6)],
        [dna(0, 60), *(dna(i, 300) for i in range(5))],
        ["ATG" * 6 + dna(i, 30) for i in range(6)],
        [dna(i, 90) for i in range(5)] + ["MKV"],
        [dna(i, 1000) for i in range(4)] + [protein(1, 20)] * 1 + ["MKVL"],
    ],
)
def test_nucleotides_are_refused_everywhere(tmp_path: Path, sequences: list[str]) -> None:
    path = table(tmp_path / "a.tsv", ["A", "B"] * 3, sequences)
    with pytest.raises(DataError, match=r"a.tsv: .*these are nucleotides"):
        load(path)
    with pytest.raises(DataError, match=r"these are nucleotides"):  # predict, embed, score and evaluate
        InputChunks(path, DataConfig()).read()
    assert cli.main(["data", "check", str(path)]) == 1


@pytest.mark.parametrize(
    "sequences",
    [
        ["GATTACA"] * 2,
        ["ACGT" * 3, "MKV"],
        ["A" * 60] * 4,
        ["GAGA" * 20] * 4,
        [protein(i) for i in range(4)],
        ["GGGGS" * 20] * 4,
    ],
)
def test_what_may_be_protein_passes(tmp_path: Path, sequences: list[str]) -> None:
    path = table(tmp_path / "a.tsv", [str(i % 2) for i in range(len(sequences))], sequences)
    assert len(load(path).train) == len(sequences)


@given(st.lists(st.text(RESIDUES.replace("X", ""), min_size=60, max_size=120), min_size=3, max_size=5))
def test_random_residues_are_protein(tmp_path_factory: pytest.TempPathFactory, sequences: list[str]) -> None:
    shares = [
        sum("".join(sequences).count(letter) for letter in some) / len("".join(sequences))
        for some in ("ACGTUN", "HECLBGITSP")
    ]
    if max(shares) < 0.9:
        path = table(tmp_path_factory.mktemp("x") / "a.tsv", [str(i % 2) for i in range(len(sequences))], sequences)
        assert len(load(path).train) == len(sequences)


def test_single_nucleotide_sequences_are_told(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", ["A", "B"] * 5, [*(protein(i, 200) for i in range(9)), dna(1, 90)])
    assert "1 WARNING: written in A, C, G, T, U and N alone" in load(path).summary()
    assert "nucleotides" not in load(table(tmp_path / "b.tsv", ["A", "B"], ["GATTACA", protein(1, 90)])).summary()


def test_a_record_of_a_tsv_that_spans_lines_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'id\tlabel\tsequence\np1\t"a\nb"\tMKV\np2\tx\tMKL\n')
    with pytest.raises(DataError, match="a.tsv:2: .*a line is a record, also within quotes: write it as CSV"):
        load(path)


THREE = [
    ("SSSSSOOOOO", "varied"),
    ("HHHHEEECCC", "varied"),
    ("IIMMMMOOOO", "varied"),
    ("0011100110", "varied"),
    ("SSSSSOOOOO", "equal"),
    ("iiiiMMMMoo", "varied"),
    ("..HHHH..EE", "varied"),
    ("GHIBESTCCC", "varied"),
    ("TTTTTLLLLL", "equal"),
    ("----HHHEEE", "equal"),
]


@pytest.mark.parametrize(("labels", "lengths"), THREE)
def test_a_third_line_is_labels_and_never_residues(tmp_path: Path, labels: str, lengths: str) -> None:
    sizes = [40 + (7 * i if lengths == "varied" else 0) for i in range(6)]
    rows = [
        (f"P{i}|EUKARYA|{'SP' if i % 2 else 'NO_SP'}|{i % 3}", protein(i, n), (labels * 9)[:n])
        for i, n in enumerate(sizes)
    ]
    path = write(tmp_path / "a.fasta", "".join(f">{name}\n{residues}\n{line}\n" for name, residues, line in rows))
    got = read_rows(path, DataConfig(label_column="line3"), True)
    assert got["sequence"].to_pylist() == [residues for _, residues, _ in rows]
    assert got["label"].to_pylist() == [line for _, _, line in rows]
    by_protein = load(path, label_column="part3", split_column="part4", fold="0")
    assert named(by_protein) == ["SP", "NO_SP", "NO_SP", "SP"]
    by_residue = load(path, "residue_classification", label_column="line3", ignore=())
    assert set(by_residue.labels) == set(labels)


def test_wrapped_sequences_are_no_third_lines(tmp_path: Path) -> None:
    for length, width in ((120, 60), (80, 40), (30, 15)):
        text = "".join(f">P{i}\n{protein(i, length)[:width]}\n{protein(i, length)[width:]}\n" for i in range(5))
        assert read_rows(write(tmp_path / "a.fa", text), DataConfig(), False)["sequence"].to_pylist() == [
            protein(i, length) for i in range(5)
        ]


def test_a_record_unlike_the_others_is_named(tmp_path: Path) -> None:
    good = "".join(f">P{i}\n{protein(i, 30 + i)}\n{'HE' * 15}{'H' * i}\n" for i in range(60))
    path = write(tmp_path / "a.fa", good + f">Q\n{protein(1)}\nHHH\n")
    with pytest.raises(DataError, match=r"a.fa:181: .* lines of 40, 3 characters; write it as the others are"):
        read_rows(path, DataConfig(), False)


@pytest.mark.parametrize("name", ["101M:A:secstr", "ss_pred", "ss_conf", "ss_dssp", "1abc_A_secstr"])
def test_structures_beside_proteins_are_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.fa", f">101M:A:sequence\n{protein(1)}\n>{name}\n{'HHHHEEEE' * 5}\n")
    with pytest.raises(DataError, match=rf"a.fa:3: '{name}' is a structure, not a protein; remove"):
        InputChunks(path, DataConfig()).read()


def test_a_column_of_structures_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", ["A", "B"] * 2, ["HHHHEEEECCCC" * 4] * 4)
    with pytest.raises(DataError, match="letters are those of secondary structures"):
        load(path)


@pytest.mark.parametrize(
    ("written", "residues", "said"),
    [
        ("MKV-LA--A", "MKVLAA", "3 gaps"),
        ("MKV LAA", "MKVLAA", "1 gaps"),
        ("1 MKV 4 LAA", "MKVLAA", "5 gaps"),
        ("M K V L A A", "MKVLAA", "5 gaps"),
        ("MKV..LAA", "MKVLAA", "2 gaps"),
        ("MK*VLAA", "MKVLAA", "1 gaps"),
        ("MKVLAA*", "MKVLAA", "with a * taken off"),
        ("MKVLAA**", "MKVLAA", "with a * taken off"),
        ("mkv-laa", "MKVLAA", "1 gaps"),
        ("10MKV20LAA", "MKVLAA", "4 gaps"),
    ],
)
def test_strip_takes_out_what_is_not_written_in_proteins(
    tmp_path: Path, written: str, residues: str, said: str
) -> None:
    path = table(tmp_path / "a.tsv", ["A", "B", "A"], [written, protein(1), protein(2)])
    if not written.endswith("*"):
        with pytest.raises(DataError, match=r"skip \(leave the record out\), strip \(take gaps"):
            load(path)
    splits = load(path, on_bad_residue="strip")
    assert splits.train.sequence(0).tolist() == encode_many([residues])[0].tolist()
    assert said in splits.summary()


def test_strip_is_offered_only_where_it_helps(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", ["A", "B"], ["MKJ", "MKV"])
    for mode in ("strict", "strip"):
        with pytest.raises(DataError) as caught:
            load(path, on_bad_residue=mode)
        assert "strip (" not in str(caught.value)


def test_replace_refuses_what_are_no_residues(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", ["A", "B"] * 2, [" ".join(protein(i)) for i in range(4)])
    with pytest.raises(DataError, match="characters would be replaced by X: .*data.on_bad_residue=strip"):
        load(path, on_bad_residue="replace")
    assert len(load(path, on_bad_residue="strip").train) == 4


# Quotes

QUOTED = [
    '"Cap binding protein',
    'Cap" binding',
    "5'-\"3 exonuclease",
    '"',
    'a "b" c',
    '"a" b',
    "'",
    '""',
    'binding "',
    '"a ""b""',
]


@pytest.mark.parametrize("value", QUOTED)
def test_a_quote_in_a_tsv_is_a_character(tmp_path: Path, value: str) -> None:
    rows = [f"P{i}\t{value if i in (1, 4) else 'x'}\t{'AB'[i % 2]}\t{protein(i)}" for i in range(8)]
    path = write(tmp_path / "a.tsv", "\n".join(["id\tname\tlabel\tsequence", *rows]) + "\n")
    got = read_rows(path, DataConfig(label_column="name"), True)
    assert got["id"].to_pylist() == [f"P{i}" for i in range(8)]
    assert got["sequence"].to_pylist() == [protein(i) for i in range(8)]
    expected = "" if value == '""' else value
    assert got["label"].to_pylist()[1] == expected


@pytest.mark.parametrize(("written", "value"), [('"a"', "a"), ('"a ""b"" c"', 'a "b" c'), ('"a\tb"', "a\tb")])
def test_a_value_quoted_as_a_whole_loses_its_quotes(tmp_path: Path, written: str, value: str) -> None:
    path = write(tmp_path / "a.tsv", f"id\tsequence\tlabel\nP1\tMKV\t{written}\n")
    assert read_rows(path, DataConfig(), True)["label"].to_pylist() == [value]


@given(
    st.lists(st.text(st.characters(exclude_characters="\t\r\n\0", exclude_categories=["Cs"])), min_size=1, max_size=8)
)
def test_each_line_of_a_tsv_is_a_record(tmp_path_factory: pytest.TempPathFactory, values: list[str]) -> None:
    path = tmp_path_factory.mktemp("x") / "a.tsv"
    write(path, "id\tsequence\tlabel\n" + "".join(f"P{i}\tMKV\t{value}\n" for i, value in enumerate(values)))
    assert read_rows(path, DataConfig(), True)["id"].to_pylist() == [f"P{i}" for i in range(len(values))]


@pytest.mark.parametrize("end", ['P3,"Other",B,{}', 'P3,Other",B,{}'])
def test_a_quote_that_swallows_rows_of_a_csv_is_named(tmp_path: Path, end: str) -> None:
    rows = [f'P1,"Cap,A,{protein(1)}', f"P2,x,B,{protein(2)}", end.format(protein(3)), f"P4,x,A,{protein(4)}"]
    path = write(tmp_path / "a.csv", "\n".join(["id,name,label,sequence", *rows]) + "\n")
    with pytest.raises(DataError, match=r"a.csv:2: .*double a quote that is meant"):
        load(path)


# Shapes of tables

HEAD, ROWS = ("id", "sequence", "label"), [(f"p{i}", protein(i), "AB"[i % 2]) for i in range(6)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".tab"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|", " "])
@pytest.mark.parametrize("hint", ["", "sep={}\n"])
def test_a_table_is_read_by_the_separator_that_it_has(tmp_path: Path, suffix: str, separator: str, hint: str) -> None:
    text = (
        hint.format(separator) + "\ufeff" * (not hint) + "".join(separator.join(row) + "\r\n" for row in (HEAD, *ROWS))
    )
    splits = load(write(tmp_path / f"a{suffix}", text))
    assert (list(splits.train.ids), named(splits)) == ([row[0] for row in ROWS], [row[2] for row in ROWS])


def test_columns_in_capitals_and_ids_by_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "Sequence,Label\n" + "".join(f"{s},{lab}\n" for _, s, lab in ROWS))
    assert list(load(path).train.ids) == [str(i) for i in range(1, 7)]
    pq.write_table(pa.table({"SEQUENCE": [s for _, s, _ in ROWS], "label": list("ABABAB")}), tmp_path / "a.parquet")
    assert list(load(tmp_path / "a.parquet").train.ids) == [str(i) for i in range(1, 7)]
    write(tmp_path / "a.jsonl", "".join(f'{{"sequence": "{s}", "label": "{lab}"}}\n' for _, s, lab in ROWS))
    assert list(load(tmp_path / "a.jsonl").train.ids) == [str(i) for i in range(1, 7)]
    with pytest.raises(DataError, match="no column 'name' .data.id_column"):
        load(path, id_column="name")


def test_numbers_of_any_type_are_text(tmp_path: Path) -> None:
    from decimal import Decimal

    values = pa.array(
        [Decimal("1.50"), Decimal("-2.25"), Decimal("10.00"), Decimal("0.00"), Decimal("3.1"), Decimal("7")],
        pa.decimal128(10, 2),
    )
    pq.write_table(pa.table({"sequence": [s for _, s, _ in ROWS], "label": values}), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet", "regression").train.labels.tolist() == [1.5, -2.25, 10, 0, 3.1, 7]


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


# Several files as one


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


MARKS = [("1", "0"), ("1.0", "0.0"), ("True", "False"), ("yes", "no"), ("true", "false")]


@pytest.mark.parametrize(("yes", "no"), MARKS)
def test_a_column_per_label(tmp_path: Path, yes: str, no: str) -> None:
    rows = [(0, 1, 0), (1, 1, 0), (0, 0, 1), (0, 0, 0)]
    text = "".join(f"p{i},{protein(i)},{','.join(yes if x else no for x in row)}\n" for i, row in enumerate(rows))
    path = write(tmp_path / "a.csv", "ACC,Sequence,Cytoplasm,Cell membrane,Nucleus\n" + text)
    names = "[Cytoplasm, Cell membrane, Nucleus]"
    found = load(path, "multi_label", label_column=names)
    assert sets(found) == [["Cell membrane"], ["Cell membrane", "Cytoplasm"], ["Nucleus"], []]
    assert DataConfig(label_column=names).label_columns == ("Cytoplasm", "Cell membrane", "Nucleus")
    with pytest.raises(DataError, match="is a list of 2 labels; use task.name=multi_label"):
        load(path, label_column=names)
    write(tmp_path / "a.csv", "ACC,Sequence,Cytoplasm,Nucleus\n" + f"p0,{protein(0)},1,\n")
    with pytest.raises(DataError, match=r"a.csv:2: column 'Nucleus' \(data.label_column\) has ''; write 1 or 0 there"):
        load(path, "multi_label", label_column="[Cytoplasm, Nucleus]")


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


def test_workbooks(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame(
        {"id": [name for name, _, _ in ROWS], "sequence": [s for _, s, _ in ROWS], "label": [0, 1, 2] * 2}
    )
    with pd.ExcelWriter(tmp_path / "a.xlsx") as book:
        frame.to_excel(book, sheet_name="one", index=False)
        frame.assign(label=frame["label"] + 0.5).to_excel(book, sheet_name="two", index=False)
    assert load(tmp_path / "a.xlsx", sheet="one").labels == ("0", "1", "2")
    assert load(tmp_path / "a.xlsx", "regression", sheet="two").train.labels.tolist() == [0.5, 1.5, 2.5] * 2
    for sheet in (None, "three"):
        with pytest.raises(DataError, match="name its sheet: data.sheet is one of 'one', 'two'"):
            load(tmp_path / "a.xlsx", sheet=sheet)


def test_a_workbook_with_two_columns_of_one_name_or_unpacked_without_end_is_refused(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    for row in (("id", "sequence", "label", "label"), *((name, text, "a", "b") for name, text, _ in ROWS)):
        book.active.append(row)
    book.save(tmp_path / "twice.xlsx")
    with pytest.raises(DataError, match="label"):
        load(tmp_path / "twice.xlsx")
    with zipfile.ZipFile(tmp_path / "bomb.xlsx", "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("xl/worksheets/sheet1.xml", b" " * (1 << 28))
    with pytest.raises(DataError, match="of sheets are packed into"):
        load(tmp_path / "bomb.xlsx")


def test_a_workbook_without_its_reader_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"save the sheet as CSV \(UTF-8\), or install openpyxl"):
        load(tmp_path / "a.xlsx")


def test_proteins_with_labels_of_their_own_can_be_held_out(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", [f"GO:{i};GO:{i + 1};common" for i in range(0, 80, 2)])
    splits = load(path, "multi_label", valid_fraction=0.2)
    assert splits.valid is not None and len(splits.valid) == 8


@pytest.mark.parametrize("text", ["123", "---", "1 2 3", "..", "- 1 -"])
def test_nothing_is_left_of_what_is_stripped(tmp_path: Path, text: str) -> None:
    path = table(tmp_path / "a.tsv", ["A", "B", "A"], [text, protein(1), protein(2)])
    with pytest.raises(DataError, match="nothing is left of it|stands for none"):
        load(path, on_bad_residue="strip")


def test_a_fasta_without_labels_is_checked_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "a.fasta"):
        assert cli.main(["data", "check", str(write(tmp_path / name, f">a\n{protein(1)}\n"))]) == 0
        assert "labels:" not in capsys.readouterr().out


# A cure that is offered is a cure


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


# A setting is obeyed or refused


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


def test_one_hot_needs_known_labels() -> None:
    assert one_hot(["0", "1"], None) is None
    assert one_hot(["0", "1"], ("A", "B", "C")) is None
    assert one_hot(["0", "1"], ("0", "1")) is None
    assert one_hot(["0", "1"], ("A", "B")) == ["B"]


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


def test_classes_of_columns_keep_their_letters(tmp_path: Path) -> None:
    rows = [f"p{n},{protein(n, 40)},{n % 2},{1 - n % 2}" for n in range(8)]
    (tmp_path / "a.csv").write_text("\n".join(["id,sequence,β-barrel,αhelix", *rows]) + "\n")
    assert set(load(tmp_path / "a.csv", "multi_label", label_column="[β-barrel, αhelix]").labels) == {
        "β-barrel",
        "αhelix",
    }
