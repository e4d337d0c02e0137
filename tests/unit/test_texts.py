"""Texts that are not sequences: labels below residues, structures, other writings, words, headers, quotes, formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.intake import load, protein, table, write
from helpers.rows import read_rows

from esm_neuron.config import DataConfig
from esm_neuron.data.inputs import InputChunks
from esm_neuron.errors import DataError

HEC = ("HHHHEEECCC" * 9)[:40]


@pytest.mark.parametrize(
    "lines",
    [
        lambda i: [protein(i), HEC] if i % 8 else [protein(i)],  # 35 of 40
        lambda i: [protein(i), HEC] if i > 3 else [protein(i)],  # from the fifth on
        lambda i: [protein(i), HEC, "BBEEBEBBEE" * 4],
        lambda i: [protein(i, 60)[:40], protein(i, 60)[40:], HEC, HEC[:20]],
        lambda i: [protein(i), "SSSSSOOOOO" * 4] if i % 3 else [protein(i)],
        lambda i: [protein(i, 100)[:60], protein(i, 100)[60:], "SSSSSOOOOO" * 10],
        lambda i: [protein(i, 100), "SSSSSOOOOO" * 6, "SSSSSOOOOO" * 4],
        lambda i: [protein(i), HEC] if i == 37 else [protein(i)],
        lambda i: [protein(i), "--HHHHEEE-" * 4, "0123456789" * 4],
    ],
)
def test_labels_below_residues_are_never_appended(tmp_path: Path, lines: Any) -> None:
    path = write(tmp_path / "a.fa", "".join("\n".join([f">P{i}", *lines(i), ""]) for i in range(40)))
    for mode in ("strict", "strip"):
        with pytest.raises(DataError, match=r"a.fa:\d+: below the residues of \d+ of 40 records stand lines of labels"):
            read_rows(path, DataConfig(on_bad_residue=mode), False)


def test_repeats_in_wrapped_sequences_are_no_labels(tmp_path: Path) -> None:
    for lines in (["GGGGS" * 4] * 2, ["A" * 20] * 3, [protein(1, 10), protein(2, 10)], [protein(3, 5)] * 2):
        path = write(tmp_path / "a.fa", "".join("\n".join([f">P{i}", *lines, protein(i, 3), ""]) for i in range(9)))
        assert set(read_rows(path, DataConfig(), False)["sequence"].to_pylist()[:1]) == {"".join(lines) + protein(0, 3)}


def test_pir_is_refused_with_its_cure(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fa", f">P1;p0\nA DESCRIPTION\n{protein(1)}*\n>P1;p1\nANY\n{protein(2)}\n*\n")
    with pytest.raises(DataError, match=r"a.fa:1: 'P1;p0' begins a record of the format PIR; write '>' and the name"):
        read_rows(path, DataConfig(), False)
    write(path, f">p0\n{protein(1)}*\n>p1\n{protein(2)}\n*\n")
    assert len(InputChunks(path, DataConfig()).read()) == 2


@pytest.mark.parametrize("mode", ["strict", "skip", "replace", "strip"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEC, "is a secondary structure"),
        (HEC.lower(), "is a secondary structure"),
        ("--HHHHHHTTTEEEEESSS--", "is a secondary structure"),
        ("METLYSALA", "codes of three letters"),
        ("MetLysAlaValGly", "codes of three letters"),
        ("Met-Lys-Ala-Val-Gly", "codes of three letters"),
        ("met lys ala val gly", "codes of three letters"),
        ("MdEvVpKlAa", "small letter behind each capital"),
        ("M#EvVpK#Aa", "small letter behind each capital"),
    ],
)
def test_a_text_of_another_kind_is_named(tmp_path: Path, text: str, said: str, mode: str) -> None:
    path = table(tmp_path / "a.tsv", ["A", "B"] * 2, [protein(1), text, protein(2), protein(3)])
    with pytest.raises(DataError, match=rf"a.tsv:3: the sequence of 'p1' .*{said}"):
        load(path, on_bad_residue=mode)
    with pytest.raises(DataError, match=said):
        InputChunks(path, DataConfig(on_bad_residue=mode)).read()


@pytest.mark.parametrize("text", ["HHHHHH", "METLYS", "HEC", "MKvLaA", "CHCHCHECECHCHCECHC", "ALAGLY", "H" * 30])
def test_a_tail_or_a_short_peptide_passes(tmp_path: Path, text: str) -> None:
    assert len(load(table(tmp_path / "a.tsv", ["A", "B"], [protein(1), text])).train) == 2


def test_words_and_unknown_residues_are_told(tmp_path: Path) -> None:
    rows = [protein(i) for i in range(6)]
    path = table(tmp_path / "a.tsv", ["A", "B"] * 4, [*rows, "private", "XXXXXX"])
    said = load(path).summary()
    assert "1 WARNING: of X alone" in said and "1 WARNING: short and in small letters among capitals" in said
    small = table(tmp_path / "b.tsv", ["A", "B"] * 4, [row.lower() for row in [*rows, "mkv", "mkl"]])
    assert "WARNING" not in load(small).summary()


@pytest.mark.parametrize(
    "again", ["id,sequence,label", "label,id,sequence", "ID, Sequence, Label", "\ufeffid,sequence,label"]
)
def test_a_second_header_within_a_table_is_named(tmp_path: Path, again: str) -> None:
    text = f"id,sequence,label\np0,{protein(0)},A\n{again}\np1,{protein(1)},B\n"
    for suffix, written in ((".csv", text), (".tsv", text.replace(",", "\t"))):
        with pytest.raises(DataError, match=rf"a{suffix}:3: the header stands here again.*remove this line$"):
            load(write(tmp_path / f"a{suffix}", written))
        assert len(load(write(tmp_path / "b.csv", text.replace(f"A\n{again}\n", "A\n"))).train) == 2


@pytest.mark.parametrize("cell", [' "{}"', "'{}'", " '{}'", "“{}”", '"""{}"""', "{}'"])
@pytest.mark.parametrize("mode", ["strict", "replace", "strip"])
def test_quotes_are_no_residues_in_any_mode(tmp_path: Path, cell: str, mode: str) -> None:
    text = "id,sequence,label\n" + "".join(f"p{i},{cell.format(protein(i))},{'AB'[i % 2]}\n" for i in range(4))
    with pytest.raises(DataError, match="take the quotes out: .* without a blank, begins a quoted value") as caught:
        load(write(tmp_path / "a.csv", text), on_bad_residue=mode)
    assert "replace" not in str(caught.value)
    path = write(tmp_path / "a.csv", text.replace(cell.format(protein(0)), f'"{protein(0)}"'))
    with pytest.raises(DataError, match="3 problems"):  # the cure is one
        load(path, on_bad_residue=mode)


def test_ids_are_known_by_their_usual_names_or_told_to_be_numbers(tmp_path: Path) -> None:
    rows = "".join(f"P{i},{protein(i)},{'AB'[i % 2]}\n" for i in range(4))
    for name in ("Accession", "accession", "Entry", "Identifier", "#ID"):
        splits = load(write(tmp_path / "a.csv", f"{name},sequence,label\n{rows}"))
        assert list(splits.train.ids) == ["P0", "P1", "P2", "P3"] and "number" not in splits.summary()
    path = write(tmp_path / "a.csv", f"Protein,sequence,label\n{rows}")
    assert "4 named by their number: there is no id column (data.id_column)" in load(path).summary()
    chunks = InputChunks(path, DataConfig())
    chunks.read()
    assert "4 named by their number" in chunks.report.summary()


@pytest.mark.parametrize(
    ("suffix", "said"),
    [(".fastq", "translate"), (".fna.gz", "translate"), (".pir", "as .fasta"), (".pdb", "of the structure"),
     (".xls", "save the sheet"), (".zip", "unpack it"), (".sto", "take gaps"), (".what", "name the file with")],
)  # fmt: skip
def test_other_formats_are_named_with_what_to_do(tmp_path: Path, suffix: str, said: str) -> None:
    with pytest.raises(DataError, match=f"unknown format .*; .*{said}"):
        InputChunks(write(tmp_path / f"a{suffix}", "x"), DataConfig()).check()


def test_a_column_of_short_codes_of_three_letters_is_refused(tmp_path: Path) -> None:
    codes = ["METLYS", "AlaGly", "VALTHR", "GLYGLY", "PRO", "CYS"]
    path = table(tmp_path / "a.tsv", ["A", "B"] * 10, [codes[i % 6] for i in range(19)] + ["MKV"])
    with pytest.raises(DataError, match="a.tsv: most sequences are short, and each is written in codes of three lett"):
        load(path)


UNEQUAL = {
    "all of them shorter": lambda i: [protein(i, 60), "HEC" * 19],
    "lowercase": lambda i: [protein(i, 60), "i" * 20 + "M" * 20 + "o" * 15],
    "longer": lambda i: [protein(i, 60), "I" * 20 + "M" * 20 + "O" * 25],
    "digits": lambda i: [protein(i, 60), "01" * 25],
    "wrapped otherwise": lambda i: [protein(i, 60)[:30], protein(i, 60)[30:], "H" * 10 + "E" * 20, "C" * 28],
    "most of them": lambda i: [protein(i, 60), "S" * 20 + "O" * 37] if i % 5 else [protein(i, 60)],
}


@pytest.mark.parametrize("kind", UNEQUAL)
def test_label_lines_of_another_length_are_never_residues(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a.fa", "".join("\n".join([f">P{i}", *UNEQUAL[kind](i), ""]) for i in range(10)))
    for mode in ("strict", "strip"):
        with pytest.raises(DataError, match="of 10 records stand lines of labels, of few letters"):
            InputChunks(path, DataConfig(on_bad_residue=mode)).read()


@pytest.mark.parametrize("width", [20, 25, 60, 80])
def test_wrapped_proteins_have_no_label_lines(tmp_path: Path, width: int) -> None:
    """Among them some of few letters, as collagen and silk are."""
    proteins = [protein(i, 300) if i % 3 else "GPP" * 100 if i % 2 else "GAGAGS" * 50 for i in range(40)]
    text = "".join(
        f">P{i}\n" + "".join(s[k : k + width] + "\n" for k in range(0, 300, width)) for i, s in enumerate(proteins)
    )
    path = write(tmp_path / "a.fa", text)
    assert read_rows(path, DataConfig(), False)["sequence"].to_pylist() == proteins


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"BZh91AY", "bzip2 data; unpack it"),
        (b"\xfd7zXZ\0", "xz data; unpack it"),
        (b"\x28\xb5\x2f\xfdxx", "zstd data; unpack it"),
        (b"SQLite format 3\0", "an SQLite database; export the table"),
        (b"%PDF-1.4", "a PDF; save its table as CSV"),
    ],
)
def test_other_files_under_the_name_of_text_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    for name in ("a.csv", "a.fasta", "a.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}:1: this is {said}"):
            InputChunks(tmp_path / name, DataConfig()).read()
