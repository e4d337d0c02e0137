"""`esm-neuron new`: what it proposes for files of many kinds, and that proposals load and train as they are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from helpers.intake import protein

from esm_neuron import cli
from esm_neuron.config import settings
from esm_neuron.data.splits import load_splits
from esm_neuron.planning.propose import propose
from esm_neuron.tasks import task_class
from esm_neuron.training import run

COUNT = 40
RNG = random.Random(0)
SEQUENCES = [protein(number, RNG.randint(24, 50)) for number in range(COUNT)]
CLASSES = [("inside", "outside")[number % 2] for number in range(COUNT)]
MEASURED = [round(RNG.gauss(50, 10), 2) for _ in range(COUNT)]
SETS = [("Train", "Train", "Train", "Val", "Test")[number % 5] for number in range(COUNT)]
PLACES = [("Nucleus", "Cytoplasm", "Nucleus;Cytoplasm", "Membrane;Nucleus")[number % 4] for number in range(COUNT)]
STRUCTURES = ["".join(RNG.choice("HEC") for _ in sequence) for sequence in SEQUENCES]
WILD = protein(99, 60)


def frame(**columns: list[object]) -> pd.DataFrame:
    return pd.DataFrame(columns)


def plain(folder: Path) -> str:
    frame(id=list(range(COUNT)), sequence=SEQUENCES, label=CLASSES).to_csv(folder / "a.csv", index=False)
    return "a.csv"


def renamed(folder: Path) -> str:
    table = frame(
        Nr=list(range(1, COUNT + 1)),
        Entry=[f"P{n}" for n in range(COUNT)],
        Seq=SEQUENCES,
        Place=CLASSES,
        set=SETS,
        note=["x"] * COUNT,
    )
    table.to_csv(folder / "a.tsv", index=False, sep="\t")
    return "a.tsv"


def headers(folder: Path) -> str:
    rows = zip(SEQUENCES, CLASSES, strict=True)
    (folder / "a.fasta").write_text("".join(f">p{n} kind={k}\n{s}\n" for n, (s, k) in enumerate(rows)))
    return "a.fasta"


def bars(folder: Path) -> str:
    rows = zip(SEQUENCES, CLASSES, strict=True)
    (folder / "a.fasta").write_text("".join(f">p{n}|{k}\n{s}\n" for n, (s, k) in enumerate(rows)))
    return "a.fasta"


def no_labels(folder: Path) -> str:
    (folder / "a.fa").write_text("".join(f">p{n} a protein\n{s}\n" for n, s in enumerate(SEQUENCES)))
    return "a.fa"


def three_lines(folder: Path) -> str:
    rows = enumerate(zip(SEQUENCES, STRUCTURES, strict=True))
    (folder / "a.fasta").write_text("".join(f">p{n}\n{s}\n{t}\n" for n, (s, t) in rows))
    return "a.fasta"


def lists(folder: Path) -> str:
    rows = [
        {"id": f"p{n}", "sequence": s, "places": p.split(";")}
        for n, (s, p) in enumerate(zip(SEQUENCES, PLACES, strict=True))
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "a.jsonl"


def measured(folder: Path) -> str:
    frame(name=[f"p{n}" for n in range(COUNT)], sequence=SEQUENCES, tm=MEASURED).to_parquet(folder / "a.parquet")
    return "a.parquet"


def residues(folder: Path) -> str:
    frame(id=list(range(COUNT)), sequence=SEQUENCES, ss3=STRUCTURES, split=SETS).to_csv(folder / "a.csv", index=False)
    return "a.csv"


def by_file(folder: Path) -> str:
    for name in ("inside", "outside"):
        rows = [(n, s) for n, (s, k) in enumerate(zip(SEQUENCES, CLASSES, strict=True)) if k == name]
        (folder / f"{name}.fasta").write_text("".join(f">p{n}\n{s}\n" for n, s in rows))
    return "{inside: inside.fasta, outside: outside.fasta}"


def marks(folder: Path) -> str:
    columns = {name: [int(name in p) for p in PLACES] for name in ("Nucleus", "Cytoplasm", "Membrane")}
    frame(id=list(range(COUNT)), sequence=SEQUENCES, **columns).to_csv(folder / "a.csv", index=False)
    return "a.csv"


def joined(folder: Path) -> str:
    """Labels with another separator, of which one is missing, and a sequence with a stop in its middle."""
    places = [place.replace(";", "|") for place in PLACES]
    places[7], sequences = "", [*SEQUENCES[:-1], "MK*V"]
    frame(id=list(range(COUNT)), sequence=sequences, label=places).to_csv(folder / "a.csv", index=False)
    return "a.csv"


def variants(folder: Path) -> str:
    mutants = [WILD[:n] + ("A" if WILD[n] != "A" else "C") + WILD[n + 1 :] for n in range(COUNT)]
    frame(mutant=[f"m{n}" for n in range(COUNT)], sequence=mutants, fitness=MEASURED).to_csv(
        folder / "a.csv", index=False
    )
    return "a.csv"


KINDS: list[tuple[Callable[[Path], str], str, str, list[str]]] = [
    (plain, "sequence_classification", "label", ["40 proteins are few"]),
    (renamed, "sequence_classification", "Place", []),
    (headers, "sequence_classification", "kind", ["40 proteins are few"]),
    (bars, "sequence_classification", "part2", ["40 proteins are few"]),
    (no_labels, "masked_lm", "label", ["no column with something to learn"]),
    (three_lines, "residue_classification", "line3", ["40 proteins are few"]),
    (lists, "multi_label", "places", ["40 proteins are few"]),
    (measured, "regression", "tm", ["40 proteins are few"]),
    (residues, "residue_classification", "ss3", []),
    (by_file, "sequence_classification", "label", ["40 proteins are few"]),
    (marks, "multi_label", "[Nucleus, Cytoplasm, Membrane]", ["3 columns hold 0 or 1"]),
    (joined, "multi_label", "label", ["38 proteins are few"]),
    (variants, "regression", "fitness", ["are these variants of one protein?"]),
]


@pytest.mark.parametrize(("kind", "task", "label", "undecided"), KINDS, ids=[kind.__name__ for kind, *_ in KINDS])
def test_a_proposal_fits_its_file_and_its_data_load(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: Callable[[Path], str],
    task: str,
    label: str,
    undecided: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", kind(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.err == "written to config.yaml; next: esm-neuron train --config config.yaml\n"
    assert said.out == Path("config.yaml").read_text()
    cfg = settings.read_config(Path("config.yaml"))
    assert (cfg.task.name, cfg.data.label_column) == (task, label)
    for line in undecided:
        assert line in said.out
    run.check(cfg)
    splits = load_splits(cfg, task_class(task).label_kind)
    assert len(splits.train.ids) > 20 and splits.valid is not None
    assert splits.test is not None


@pytest.mark.parametrize("kind", [headers, no_labels, three_lines, measured], ids=lambda kind: kind.__name__)
def test_a_proposal_trains_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[Path], str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", kind(tmp_path)]) == 0
    assert cli.main(["train", "--config", "config.yaml"]) == 0
    assert Path("runs/mine/result.json").is_file()


def test_columns_and_splits_are_found_and_what_is_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = propose(renamed(tmp_path)).config.data
    assert (data.sequence_column, data.split_column, data.test_fraction) == ("Seq", "set", 0)
    made = propose(measured(tmp_path))
    assert made.config.data.id_column == "name" and made.config.data.sample == "proteins"  # 24 to 50 residues
    made = propose(joined(tmp_path))
    data = made.config.data
    assert (data.label_separator, data.on_missing, data.on_bad_residue, made.faults) == ("|", "skip", "skip", [])
    assert any("38 proteins of 40 rows" in line for line in made.seen)
    assert propose(variants(tmp_path)).config.data.sample == "proteins"


def test_what_cannot_be_decided_or_used_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    levels = [number % 4 for number in range(COUNT)]
    frame(sequence=SEQUENCES, grade=levels, tm=MEASURED, fold=levels).to_csv("a.csv", index=False)
    made = propose("a.csv")
    assert any("'grade' has 4 numbers, taken for classes" in line for line in made.undecided)
    assert any("'tm' could be too" in line for line in made.undecided)
    assert any("does column 'fold' name folds" in line for line in made.undecided)
    commas = [str(value).replace(".", ",") for value in MEASURED]
    frame(sequence=SEQUENCES, tm=commas).to_csv("d.csv", index=False, sep=";")
    assert propose("d.csv").config.task.name == "regression" and len(propose("d.csv").undecided) == 1  # few proteins
    frame(id=[1, 1, *range(2, COUNT)], sequence=SEQUENCES, label=CLASSES).to_csv("b.csv", index=False)
    assert cli.main(["new", "b.csv", "--output", "b.yaml"]) == 1
    said = capsys.readouterr()
    assert "id '1' was used in line 2 already" in said.out
    assert said.err == "written to b.yaml; mend the file as told above, then esm-neuron train --config b.yaml\n"
    assert cli.main(["new", "a.csv", "--output", "b.yaml"]) == 2
    assert "b.yaml: exists already; name another file" in capsys.readouterr().err
    frame(a=[1, 2], b=["x", "y"]).to_csv("c.csv", index=False)
    assert cli.main(["new", "c.csv"]) == 2
    assert "no column holds residues; the file has 'a', 'b'" in capsys.readouterr().err


def test_columns_whose_names_a_list_cannot_have_are_no_classes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`[A, B]` names two columns; the folder of the file to write is made."""
    monkeypatch.chdir(tmp_path)
    ones = [str(number % 2) for number in range(COUNT)]
    odd: dict[str, list[object]] = {"GO, one": [*ones], "[two]": [*CLASSES], "three": [*ones], "four": [*ones[::-1]]}
    frame(id=list(range(COUNT)), sequence=SEQUENCES, **odd).to_csv("a.csv", index=False)
    assert cli.main(["new", "a.csv", "--output", "runs/mine.yaml"]) == 0
    cfg = settings.read_config(Path("runs/mine.yaml"))
    assert (cfg.task.name, cfg.data.label_column) == ("multi_label", "[three, four]")
