"""The commands of docs/data.md, each run on a small file of its form."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.lmdb_file import STORED

from esm_neuron import cli
from esm_neuron.config import settings
from esm_neuron.data.splits import Splits, load_splits
from esm_neuron.tasks import check_task, task_class
from esm_neuron.training import run

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines()
    if "| `esm-neuron " in line
]
COMMANDS = {form: command.strip("`").replace("\\|", "|") for form, command in ROWS}
TRAINED = [form for form, command in COMMANDS.items() if command.startswith("esm-neuron train ")]
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
PLACES = ["Cytoplasm", "Nucleus", "Extracellular", "Cell membrane", "Mitochondrion", "Plastid", "Endoplasmic reticulum",
          "Lysosome/Vacuole", "Golgi apparatus", "Peroxisome"]  # fmt: skip


def protein(number: int, length: int = 45) -> str:
    return "".join(random.Random(number).choices(LETTERS, k=length))


def lines(*rows: object) -> str:
    return "".join(f"{row}\n" for row in rows)


def flip() -> str:
    marks = [("train", ""), ("train", ""), ("train", "True"), ("test", ""), ("train", ""), ("test", "")]
    return lines("sequence,target,set,validation", *(f"{protein(i)},{i / 4},{s},{v}" for i, (s, v) in enumerate(marks)))


def deeploc() -> str:
    head = f",ACC,Kingdom,Partition,Membrane,{','.join(PLACES)},Sequence"
    rows = []
    for i in range(20):
        places = ",".join(f"{float(place in (i % 10, (i + i // 10) % 10))}" for place in range(10))
        rows.append(f"{i},P{i},Metazoa,{float(i % 5)},{float(i % 2)},{places},{protein(i)}")
    return lines(head, *rows)


def fasta(header: Callable[[int], str], records: int = 6, below: Callable[[int], str] | None = None) -> str:
    return lines(*(f">{header(i)}\n{protein(i, 45 + i)}" + (f"\n{below(i)}" if below else "") for i in range(records)))


SETS = ["train", "train", "train", "val", "test", "test"]
WILD = protein(99, 30)


def changed(place: int) -> str:
    return WILD[:place] + ("A" if WILD[place] != "A" else "C") + WILD[place + 1 :]


def proteingym() -> str:
    rows = [(f"{WILD[i]}{i + 1}{changed(i)[i]}", changed(i), i / 7) for i in range(30)]
    return lines("mutant,mutated_sequence,DMS_score,DMS_score_bin", *(f"{m},{s},{v},1" for m, s, v in rows))


FOLDS = [f"{'AB'[i // 5]},{i % 5}" for i in range(10)]
UNIPROT_LOCATIONS = (
    "SUBCELLULAR LOCATION: Cell membrane {ECO:0000269|PubMed:1}; Single-pass type I membrane protein {ECO:0000255}.",
    "",
    "SUBCELLULAR LOCATION: Nucleus {ECO:0000250|UniProtKB:P1, ECO:0000305}. Cytoplasm, cytoskeleton {ECO:0000250}. "
    "Note=Moves to the nucleus. Stays there {ECO:0000250}.",
    "SUBCELLULAR LOCATION: [Isoform 1]: Nucleus. SUBCELLULAR LOCATION: [Isoform 2]: Cell membrane.",
)
KEYWORDS, SPECIES = ("Membrane;Transport", "", "Membrane", "Transport"), ("Homo sapiens", "Mus musculus")


def table(head: str, row: str, rows: range, *values: str) -> str:
    """A table of proteins: `row` is filled with a number, a protein, and one of `values` after the other."""
    return lines(head, *(row.format(i, protein(i), values[i % len(values)] if values else i) for i in rows))


FILES: dict[str, Callable[[], str]] = {
    "flip.csv": flip,
    "deeploc2.csv": deeploc,
    "biotrainer.fasta": lambda: fasta(lambda i: f"P{i} TARGET={'AB'[i % 2]} SET={SETS[i]}"),
    "validation.fasta": lambda: fasta(
        lambda i: f"P{i} TARGET={'AB'[i % 2]} SET={'test' if i > 3 else 'train'} VALIDATION={i == 3}"
    ),
    "residues.fasta": lambda: fasta(
        lambda i: f"P{i} TARGET={('HHEEC' * 20)[: 45 + i]} SET={SETS[i]} MASK={('11101' * 20)[: 45 + i]}"
    ),
    "signalp6.fasta": lambda: fasta(
        lambda i: f"P{i}|EUKARYA|{('SP', 'NO_SP')[i % 2]}|{i % 3}", 6, lambda i: ("SSSSSOOOOO" * 9)[: 45 + i]
    ),
    "netsurfp.fasta": lambda: fasta(lambda i: f"P{i}", 6, lambda i: ("HHHHEEECCC" * 9)[: 45 + i]),
    "wt.fasta": lambda: f">WT\n{WILD}\n",
    "proteingym.csv": proteingym,
    "indels.csv": lambda: lines("mutated_sequence,DMS_score", *(f"{WILD[:i]}{WILD[i + 2 :]},{i}" for i in range(3, 7))),
    "uniprot.tsv": lambda: lines(
        "Entry\tProtein names\tKeywords\tSequence",
        *(
            f'P{i}\t"Cap {i}\t{("Membrane;Transport", "", "Membrane", "Transport")[i % 4]}\t{protein(i)}'
            for i in range(12)
        ),
    ),
    "venus.csv": lambda: lines(
        "name,aa_seq,label", *(f'p{i},{protein(i, 6)},"[1, 0, {i % 2}, 0, 0, 1]"' for i in range(6))
    ),
    "tape.csv": lambda: lines("primary,log_fluorescence", *(f"{protein(i)},{i / 3}" for i in range(20))),
    "tape.json": lambda: json.dumps(
        [{"primary": protein(i), "log_fluorescence": [i / 3], "num_mutations": 2, "id": str(i)} for i in range(20)]
    ),
    "ss.json": lambda: json.dumps(
        [{"primary": protein(i), "ss3": [0, 1, 2] * 15, "valid_mask": [True] * 44 + [False]} for i in range(6)],
        indent=1,
    ),
    "locations.tsv": lambda: table(
        "Entry\tSubcellular location [CC]\tSequence", "P{0}\t{2}\t{1}", range(12), *UNIPROT_LOCATIONS
    ),
    "pdb_seqres.txt": lambda: lines(
        ">101m_A mol:protein length:45  MYOGLOBIN",
        protein(0),
        ">102d_A mol:na length:12  DNA",
        "CGCAAATTTGCG",
        ">102l_A mol:protein length:45  LYSOZYME",
        protein(1),
    ),
    "afdb.fasta": lambda: fasta(lambda i: f"AF:AF-Q{i}-F1 A protein UA=Q{i} OS={SPECIES[i % 2]} OX=1"),
    "sheet.csv": lambda: "\ufeff" + lines("id;sequence;label", *(f"p{i};{protein(i)};{i},25" for i in range(20))),
    "folds.csv": lambda: lines(
        "id,sequence,label,fold", *(f"p{i},{protein(i)},{'AB'[i // 5 % 2]},{i % 5}" for i in range(20))
    ),
    "sets.csv": lambda: lines(
        "id,sequence,label", *(f"p{i},{protein(i)},{('A|B', 'A', 'B')[i % 3]}" for i in range(9))
    ),
    "oas.csv": lambda: lines(
        "sequence_id_heavy,sequence_alignment_aa_heavy,cdr3_aa_heavy,sequence_alignment_aa_light",
        *(f"p{i},{protein(i)},{protein(i % 18)[9:20]},{protein(99 + i)}" for i in range(20)),
    ),
    "regions.csv": lambda: lines(
        "id,heavy,light,heavy_regions,light_regions",
        *(f"p{i},{protein(i)},{protein(99 + i)},{'FFFCC' * 9},{'FFCCC' * 9}" for i in range(20)),
    ),
    "shards/0.csv": lambda: lines("id,sequence,label", *(f"p{i},{protein(i)},{'AB'[i % 2]}" for i in range(6))),
    "shards/1.csv": lambda: lines("id,sequence,label", *(f"p{i},{protein(i)},{'AB'[i % 2]}" for i in range(6, 12))),
    "positives.fasta": lambda: fasta(lambda i: f"p{i}", 5),
    "negatives.fasta": lambda: fasta(lambda i: f"n{i} label=x", 9),
}
"""File -> its text, as its makers write such files."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all the files and the configurations, as the working one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "shards").mkdir()
    for name, make in FILES.items():
        (tmp_path / name).write_text(make(), encoding="utf-8")
    values = pa.array([Decimal(i) / 4 for i in range(20)], pa.decimal128(12, 3))
    columns = {"id": [f"p{i}" for i in range(20)], "sequence": [protein(i) for i in range(20)], "label": values}
    pq.write_table(pa.table(columns), tmp_path / "decimal.parquet")
    (tmp_path / "localization.lmdb").write_bytes(STORED)
    return tmp_path


def sizes(found: Splits) -> tuple[int, ...]:
    return tuple(len(part.ids) if part else 0 for part in (found.train, found.valid, found.test))


EXPECTED: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "FLIP: `sequence, target, set, validation`": ((3, 1, 2), ()),
    "DeepLoc 2, ten locations: a column a label, 0 or 1": ((14, 2, 4), tuple(sorted(PLACES))),
    "DeepLoc 2, membrane proteins": ((14, 2, 4), ("0.0", "1.0")),
    "biotrainer: `>P1 TARGET=A SET=train`": ((3, 1, 2), ("A", "B")),
    "biotrainer with `VALIDATION=True`": ((3, 1, 2), ("A", "B")),
    "biotrainer per residue, with `MASK=`": ((3, 1, 2), ("C", "E", "H")),
    "SignalP 6, per residue: three lines a protein": ((3, 1, 2), ("O", "S")),
    "SignalP 6, per protein": ((5, 1, 0), ("NO_SP", "SP")),
    "NetSurfP: three lines a protein": ((5, 1, 0), ("C", "E", "H")),
    "ProteinGym as training data": ((27, 3, 0), ()),
    "UniProt's TSV, rows without the label left out": ((8, 1, 0), ("Membrane", "Transport")),
    "VenusFactory: `aa_seq`, labels such as `[1, 0, 1]`": ((5, 1, 0), ("0", "1")),
    "TAPE and PEER as CSV: `primary, log_fluorescence`": ((18, 2, 0), ()),
    "TAPE's and PEER's LMDB, a folder or the file in it": ((11, 1, 0), ("0", "1")),
    "TAPE's JSON, a number per protein": ((18, 2, 0), ()),
    "TAPE's JSON, a class per residue, some of them masked": ((5, 1, 0), ("0", "1", "2")),
    "UniProt's TSV, its locations in free text": ((8, 1, 0), ("Cell membrane", "Cytoplasm, cytoskeleton", "Nucleus")),
    "AlphaFold DB's FASTA, labels in its headers": ((5, 1, 0), ("Homo sapiens", "Mus musculus")),
    "a spreadsheet's CSV: `;`, decimal commas": ((18, 2, 0), ()),
    "folds 0 to 4, tested on 4": ((14, 2, 4), ("A", "B")),
    "`SET=val` and folds as splits": ((12, 4, 4), ("A", "B")),
    "several labels, separated otherwise": ((8, 1, 0), ("A", "B")),
    "shards of one table": ((11, 1, 0), ("A", "B")),
    "OAS, pairs of antibody chains, as one sequence": ((16, 2, 0), ()),
    "two chains, and a mask rate per region": ((18, 2, 0), ()),
    "a FASTA file per class": ((13, 1, 0), ("negative", "positive")),
    "DuckDB's and Spark's Parquet, DECIMAL values": ((18, 2, 0), ()),
}


@pytest.mark.parametrize(
    "form", [form for form, command in COMMANDS.items() if command.startswith("esm-neuron train ")]
)
def test_a_file_is_read_by_the_command_of_the_page(here: Path, form: str) -> None:
    cfg = settings.parse([*shlex.split(COMMANDS[form])[2:], "--model.name", "mini"])
    run.check(cfg)
    check_task(cfg.task)
    found = load_splits(cfg, task_class(cfg.task.name).labels_of(cfg.task))
    assert (sizes(found), found.labels) == EXPECTED[form]


def test_the_page_says_what_is_expected() -> None:
    assert set(TRAINED) == EXPECTED.keys()
    assert len(COMMANDS) == len(ROWS)


@pytest.mark.parametrize("form", sorted(COMMANDS.keys() - TRAINED))
def test_a_command_of_the_page_runs(here: Path, form: str) -> None:
    words = shlex.split(COMMANDS[form])[1:]
    assert cli.main(words) == 0
    target = here / words[words.index("--output") + 1]
    rows = (
        pq.read_metadata(target).num_rows if target.suffix == ".parquet" else len(target.read_text().splitlines()) - 1
    )
    assert rows == {"scores.csv": 30 if "proteingym.csv" in words else 4, "seqres.parquet": 2}[target.name]


@pytest.mark.parametrize("name", ["FLIP: `sequence, target, set, validation`", "a FASTA file per class"])
def test_a_command_of_the_page_trains(here: Path, name: str) -> None:
    small = "--model.name tiny --model.init random --loop.max_steps 1 --log.tensorboard false --data.homologs off"
    assert cli.main([*shlex.split(COMMANDS[name])[1:], *small.split(), "--output", str(here / "out")]) == 0
    assert (here / "out" / "result.json").is_file()


def test_a_mask_hides_residues(here: Path) -> None:
    words = shlex.split(COMMANDS["biotrainer per residue, with `MASK=`"])[2:]
    found = load_splits(settings.parse(words), task_class("residue_classification").label_kind)
    codes = found.train.labels[1:46]
    assert [code < 0 for code in codes] == [place % 5 == 3 for place in range(45)]
    (here / "residues.fasta").write_text(">P TARGET=HHE SET=train MASK=11\nMKV\n")
    with pytest.raises(Exception, match=r"residues.fasta:1: the mask .* is not 0 or 1 for each of 3 labels"):
        load_splits(settings.parse(words), task_class("residue_classification").label_kind)
