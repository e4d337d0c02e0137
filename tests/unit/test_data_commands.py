"""`esm-neuron data check` and `examples/datasets/get.py`, without a network."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import download

from esm_neuron import cli


def write(path: Path) -> Path:
    rng = np.random.default_rng(0)
    one, other, third = ("".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 120)) for _ in range(3))
    rows = [
        ("a", one, "in", "train"),
        ("b", other, "out", "train"),
        ("c", one, "out", "test"),
        ("d", one[:100] + third[100:], "in", "test"),
        ("e", third, "in", "test"),
    ]
    path.write_text("id,sequence,label,split\n" + "".join(",".join(row) + "\n" for row in rows))
    return path


def test_check_says_what_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.csv")
    words = ["data", "check", str(path), "--label_column", "label", "--split_column", "split"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["residues"], found["repeated"], found["conflicting"]) == (5, 600, 1, 2)
    assert found["lengths"] == dict.fromkeys(("min", "q1", "median", "q3", "max"), 120)
    assert sum(found["alphabet"].values()) == 600
    assert (found["labels"], found["splits"]) == ({"in": 3, "out": 2}, {"test": 3, "train": 2})
    assert found["leaks"] == {"test": {"rows": 3, "in_train": 1, "homologs": 2, "too_short": 0}}
    assert (found["faults"], found["first_faults"]) == (0, [])
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "leaks: test: of 3 proteins 1 are in training, 2 with a homolog there" in text
    assert "conflicts: 2 proteins have a sequence with another label elsewhere\n" in text
    assert cli.main([*words, "--homologs", "off"]) == 0
    assert "1 are in training, homologs not looked for" in capsys.readouterr().out


def test_check_says_which_labels_are_nearly_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.csv")
    path.write_text(path.read_text().replace(",in,", ",In,", 1))
    assert cli.main(["data", "check", str(path)]) == 0
    assert "NOTE: 'In', 'in' differ in capital letters, blanks or marks alone" in capsys.readouterr().out


def test_check_says_that_it_found_no_labels_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.csv")
    path.write_text(path.read_text().replace("label", "place"))
    said = "NOTE: nothing of labels was checked: no column 'label'; name theirs with --label_column\n"
    for words, expected in (([], said), (["--label", "place"], ""), (["--task", "masked_lm"], "")):
        assert cli.main(["data", "check", str(path), *words]) == 0
        assert capsys.readouterr().err == expected


def test_check_looks_for_no_homologs_in_a_file_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("esm_neuron.data.check.MOST", 4)
    assert cli.main(["data", "check", str(write(tmp_path / "x.csv")), "--split_column", "split"]) == 0
    said = "1 are in training, homologs not looked for (5 proteins are more than 4)\n"
    assert said in capsys.readouterr().out


def test_check_lists_faults_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.csv")
    path.write_text(path.read_text() + "a,MK*V,in,test\nz,,in,test\n")
    assert cli.main(["data", "check", str(path)]) == 1
    text = capsys.readouterr().out
    assert "faults: 3\n" in text
    assert f"  {path}:7: id 'a' was used in line 2 already; make ids unique\n" in text
    assert f"  {path}:7: the sequence of 'a' has '*' (a stop codon) at residue 3" in text
    assert f"  {path}:8: the sequence of 'z' is empty" in text
    assert "labels: 2: in 5, out 2\n" in text  # the default column is there
    assert cli.main(["data", "check", str(tmp_path / "none.csv")]) == 2


@pytest.mark.parametrize(
    ("task", "labels", "counted", "said"),
    [
        (
            "residue_classification",
            ["HHE", "E-E", "HH"],
            {"labels": {"H": 2, "E": 3, "-": 1}},
            ":4: column 'y' of '2': 2",
        ),
        (
            "multi_label",
            ["in;out", "in", "in;in"],
            {"labels": {"in": 2, "out": 1}},
            "4: column 'y' of '2': label 'in;in'",
        ),
        (
            "regression",
            ["1", "-3.5", "x"],
            {"values": [-3.5, -2.375, -1.25, -0.125, 1]},
            "4: column 'y' of '2': 'x' is no",
        ),
    ],
)
def test_check_counts_labels_as_their_task_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, labels: list[str], counted: dict, said: str
) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,sequence,y\n" + "".join(f"{i},MKV,{label}\n" for i, label in enumerate(labels)))
    words = ["data", "check", str(path), "--label_column", "y", "--task", task]
    assert cli.main([*words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["labels"], found["values"] and list(found["values"].values())) == (
        counted.get("labels"), counted.get("values")
    )  # fmt: skip
    assert found["faults"] == 1 and said in found["first_faults"][0]
    assert cli.main(words) == 1
    assert "conflicts: 3 proteins" in capsys.readouterr().out


def sdist(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package-1/{name}")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(f"package/{name}", content)
    return path


AMYLOID = "set,dist,y,dy,x\ntraining,1,-0.25,1,MKV\ntest,1,0.5,1,MK*\nvalidation,2,1.50,1,MKA\n"


@pytest.fixture
def amyloid(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The recipe, pinned to a small original; gives that original's members."""
    (end,) = download.ORIGINALS["amyloid"].members
    content = gzip.compress(AMYLOID.encode(), mtime=0)
    text = b"sequence\tscore\tsplit\nMKV\t-0.25\ttrain\nMKA\t1.50\tvalid\n"
    small = replace(
        download.ORIGINALS["amyloid"],
        members={end: hashlib.sha256(content).hexdigest()},
        sha256=hashlib.sha256(text).hexdigest(),
    )
    monkeypatch.setattr(download, "ORIGINALS", {**download.ORIGINALS, "amyloid": small})
    return {end: content}


@pytest.mark.parametrize("pack", [sdist, wheel])
def test_get_rebuilds_a_file_from_its_original(tmp_path: Path, amyloid: dict[str, bytes], pack) -> None:
    archive = pack(tmp_path / "x", amyloid)
    assert download.main(["amyloid", "--output", str(tmp_path), "--archive", str(archive)]) == 0
    text = gzip.decompress((tmp_path / "amyloid_dms.tsv.gz").read_bytes())
    assert text == b"sequence\tscore\tsplit\nMKV\t-0.25\ttrain\nMKA\t1.50\tvalid\n"


def test_get_refuses_another_original(
    tmp_path: Path, amyloid: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(archive: Path) -> str:
        words = ["amyloid", "--output", str(tmp_path / "out"), "--archive", str(archive)]
        assert download.main(words) == 2
        return capsys.readouterr().err

    (end,) = amyloid
    assert "has not the pinned sha256" in said(wheel(tmp_path / "other", {end: b"x"}))
    assert "there is no file" in said(sdist(tmp_path / "empty", {"x": b""}))
    (tmp_path / "text").write_text("x")
    assert "cannot be read as a wheel or .tar.gz" in said(tmp_path / "text")
    assert not (tmp_path / "out").exists()


def test_get_names_the_command_where_pip_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert download.main(["scl2205", "--output", str(tmp_path / "out")]) == 2
    wanted = "`pip download --no-deps --no-binary=p-scldata p-scldata==2026.2.0` and give --archive FILE"
    assert wanted in capsys.readouterr().err


def test_what_is_carried_fits_the_originals() -> None:
    clusters = gzip.decompress(download._carried("scl2205_clusters.tsv.gz")).decode().splitlines()
    assert len(clusters) == 19_074 + 1
    assert sum(line.endswith("\t1") for line in clusters) == 376
    assert len(download._carried("disorder_split.txt").split()) == 342
