"""LMDBs of pickles, as TAPE and PEER give them: read as values, and nothing in them is done."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.lmdb_file import STORED

from esm_neuron import cli
from esm_neuron.data.lmdb import DATA, read_lmdb, unpickled
from esm_neuron.data.records import Column
from esm_neuron.errors import DataError

FIRST = "MKTAYIAKQRQISFVKSHFSRQ"
ORDER = ["0", "1", "10", "11", *map(str, range(2, 10))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "split.lmdb").mkdir()
    (tmp_path / "split.lmdb" / DATA).write_bytes(STORED)
    (tmp_path / "split.lmdb" / "lock.mdb").write_bytes(b"\0" * 8192)
    return tmp_path / "split.lmdb"


def columns(path: Path, *names: str) -> list[list[str]]:
    asked = [Column(name, name, "test", ";") for name in names]
    return [
        list(values)
        for block in read_lmdb(str(path), asked)
        for values in zip(*(column.to_pylist() for column in block[1]), strict=True)
    ]


def test_records_are_what_was_pickled(folder: Path) -> None:
    rows = columns(folder, "primary", "localization", "stability_score", "log_fluorescence", "ss3")
    assert len(rows) == 12
    for key, (sequence, place, stability, brightness, structure) in zip(ORDER, rows, strict=True):
        number = int(key)
        assert sequence == FIRST * (60 if number == 3 else 1) + "ACDEFGHIKLMNPQRSTVWY"[number]
        assert (place, float(stability), float(brightness)) == (str(number % 2), number / 4, number / 2)
        assert structure == ";".join(str(at % 3) for at in range(len(sequence)))
    assert columns(folder / DATA, "primary") == [[row[0]] for row in rows], "the file in the folder, named itself"


def test_a_run_and_predictions_take_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEER's two-class location as it comes."""
    words = ["--sequence_column", "primary", "--label_column", "localization"]
    assert cli.main(["data", "check", str(folder), *words]) == 0
    said = capsys.readouterr().out
    assert "12 proteins of 12 rows, 1574 residues" in said and "labels: 2: 0 6, 1 6" in said
    assert cli.main(["data", "check", str(folder), *words[:2]]) == 0, "labels are looked at where there are any"
    assert "12 proteins of 12 rows" in (said := capsys.readouterr().out) and "labels:" not in said
    run = ["--data.train", str(folder), *words, "--data.valid_fraction=0.25", "--data.homologs=off", "--optim.lr=1e-3"]
    tiny = ["--model.name=tiny", "--model.init=random", "--loop.max_steps=1", "--data.pack_tokens=2048"]
    out = folder.parent / "out"
    assert cli.main(["train", *run, *tiny, "--output", str(out)]) == 0
    predict = ["predict", "--model", str(out), "--input", str(folder), "--output", str(out / "p.csv")]
    assert cli.main(predict) == 0
    assert len((out / "p.csv").read_text().splitlines()) == 13


class Evil:
    def __init__(self, call: Any, *given: Any) -> None:
        self.made = (call, given)

    def __reduce__(self) -> Any:
        return self.made


@pytest.mark.parametrize(
    "pickled",
    [
        pickle.dumps({"primary": Evil(os.system, "touch evil")}),
        pickle.dumps({"primary": Evil(os.system, "touch evil")}, protocol=2),
        pickle.dumps({"primary": Evil(np.ndarray, (1 << 40,))}),
        pickle.dumps({"primary": Evil(eval, "1")}),
        pickle.dumps({"primary": np.array([None, "x"], dtype=object)}),
        pickle.dumps({"primary": 1 << 5000}),
        pickle.dumps(["no record"]),
        b"cos\nsystem\n(S'touch evil'\ntR.",
        b"\x80\x04]" * 100_000 + b".",
        b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"",
    ],
)
def test_what_a_pickle_says_is_not_done(pickled: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        unpickled(pickled)
    assert not os.listdir(tmp_path)


def test_one_text_many_times_does_not_fill_the_memory() -> None:
    """A memo names what was there: a short file can be a list of a million long texts."""
    bomb = {"primary": ["A" * 100_000] * 5_000}
    with pytest.raises(ValueError, match="more than .* characters or numbers in 'primary'"):
        unpickled(pickle.dumps(bomb))


def test_damaged_files_are_read_or_refused_in_a_line(tmp_path: Path) -> None:
    rng, refused = random.Random(5), list[str]()
    for _ in range(300):
        content = bytearray(STORED)
        for _ in range(rng.choice((1, 5, 50))):
            content[rng.choice((rng.randrange(8192), rng.randrange(len(content))))] = rng.randrange(256)
        (tmp_path / "x.mdb").write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.2 else content)
        try:
            columns(tmp_path / "x.mdb", "primary")
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 50 and all("\n" not in line and "x.mdb" in line for line in refused)


def test_what_is_no_lmdb_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.lmdb").write_bytes(b"x")
    with pytest.raises(DataError, match=r"x\.lmdb: is no LMDB as TAPE's and PEER's .*; copy it again"):
        columns(tmp_path / "x.lmdb", "primary")
    with pytest.raises(DataError, match="read from a disk; download it first"):
        columns(Path("s3://bucket/x.lmdb"), "primary")
