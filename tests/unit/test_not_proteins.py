"""Text that is not a sequence: refused everywhere, by what the whole column shows, or told."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from helpers.intake import LETTERS, load, named, protein, table, write
from helpers.rows import read_rows
from hypothesis import given
from hypothesis import strategies as st

from esm_neuron import cli
from esm_neuron.config import DataConfig
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.tokenizer import RESIDUES, encode_many
from esm_neuron.errors import DataError

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


@pytest.mark.parametrize("text", ["123", "---", "1 2 3", "..", "- 1 -"])
def test_nothing_is_left_of_what_is_stripped(tmp_path: Path, text: str) -> None:
    path = table(tmp_path / "a.tsv", ["A", "B", "A"], [text, protein(1), protein(2)])
    with pytest.raises(DataError, match="nothing is left of it|stands for none"):
        load(path, on_bad_residue="strip")


def test_a_fasta_without_labels_is_checked_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "a.fasta"):
        assert cli.main(["data", "check", str(write(tmp_path / name, f">a\n{protein(1)}\n"))]) == 0
        assert "labels:" not in capsys.readouterr().out
