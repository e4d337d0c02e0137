"""Bad rows: named by file and line in one error, or counted as the configuration says."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.rows import check_rows

from esm_neuron.config import DataConfig
from esm_neuron.data import validation
from esm_neuron.data.records import files_of, row_number
from esm_neuron.data.sources import make_rows
from esm_neuron.data.validation import Checker, Problems, Rejected, RejectedRows, Report, save_rejected
from esm_neuron.errors import DataError


def check(sequences: Sequence[str], ids: Sequence[str] = (), labels: Sequence[str] = (), **fields):
    names = ids or [f"P{i}" for i in range(len(sequences))]
    columns = {"line": list(range(2, 2 + len(sequences))), "id": names, "sequence": sequences}
    rows = make_rows(columns | ({"label": labels} if labels else {}))
    return check_rows(rows, DataConfig(**fields), "x.csv")


def test_good_rows_pass_in_upper_case() -> None:
    rows, report = check(["MKV", "mkvx", "AUZBO"], labels=["N", "No", "0"])
    assert rows["sequence"].to_pylist() == ["MKV", "MKVX", "AUZBO"]
    assert rows["line"].to_pylist() == [2, 3, 4]
    assert rows["label"].to_pylist() == ["N", "No", "0"]
    assert report == Report(name="x.csv", rows=3)
    assert report.summary() == "x.csv: 3 proteins"


@pytest.mark.parametrize(
    ("sequence", "what"),
    [
        ("MKJ", r"'J' \(leucine or isoleucine\) at residue 3,"),
        ("MK*V", r"'\*' \(a stop codon\) at residue 3,"),
        ("M-K-V", r"'-' \(a gap\) at residue 2 and 1 more,"),
        ("M\nV", r"'\\n' at residue 2,"),
        ("МKV", "'М' at residue 1,"),  # Cyrillic
    ],
)
def test_strict_names_the_first_bad_character(sequence: str, what: str) -> None:
    with pytest.raises(
        DataError, match=rf"^x.csv:3: the sequence of 'P1' has {what} .*; correct it, or use "
    ) as caught:
        check(["MKV", sequence])
    assert "\n" not in str(caught.value)


def test_skip_leaves_rows_out_and_counts_them() -> None:
    rows, report = check(["M*K", "MKV", "J"], labels=["a", "b", "c"], on_bad_residue="skip")
    assert rows.to_pydict() == {"line": [3], "id": ["P1"], "sequence": ["MKV"], "label": ["b"]}
    assert report == Report(name="x.csv", rows=3, skipped=2)
    assert report.summary() == "x.csv: 3 proteins; 2 skipped for characters that are no residues"
    with pytest.raises(
        DataError, match="x.csv: 1 proteins; 1 skipped for characters that are no residues: none is left"
    ):
        check(["*K"], on_bad_residue="skip")


def test_replace_writes_x_and_counts() -> None:
    rows, report = check(["m*K-", "MKV", "J"], on_bad_residue="replace")
    assert rows["sequence"].to_pylist() == ["MXKX", "MKV", "X"]
    assert report == Report(name="x.csv", rows=3, replaced=2, replaced_residues=3, unknown=1)
    assert report.summary() == "x.csv: 3 proteins; 2 with 3 characters replaced by X; 1 WARNING: of X alone"


@pytest.mark.parametrize("mode", ["strict", "skip", "replace"])
def test_other_faults_are_errors_in_every_mode(mode: str) -> None:
    with pytest.raises(DataError, match="^x.csv:4: id 'P1' was used in line 2 already; make ids unique$"):
        check(["A", "A", "A"], ids=["P1", "P2", "P1"], on_bad_residue=mode)
    with pytest.raises(DataError, match="^x.csv:2: the id is empty; "):
        check(["A"], ids=[""], on_bad_residue=mode)
    with pytest.raises(DataError, match="^x.csv:3: the sequence of 'P1' is empty; "):
        check(["A", ""], on_bad_residue=mode)
    for label in ("", "nan", "NaN"):
        with pytest.raises(DataError, match="^x.csv:2: column 'loc' of 'P0' is (empty|'.a.', which stands for none); "):
            check(["A"], labels=[label], on_bad_residue=mode, label_column="loc")


def test_many_problems_are_counted_and_the_first_of_each_kind_listed() -> None:
    with pytest.raises(DataError) as caught:
        check(["M*K", "M-K", ""] + ["M*K"] * 30)
    lines = str(caught.value).splitlines()
    assert lines[0] == "x.csv: 33 problems (the first of each kind):"
    places = [line.split(":")[1] for line in lines[1:]]
    assert places == ["2", "3", "4", "5", "6"]
    assert lines[5].endswith(" (and 28 more like it)") and "more like" not in "".join(lines[:5])
    problems = Problems("x.csv")
    for number in range(100):
        problems.add(number, "ab"[number % 2] * (1 + number // 2))  # each a kind of its own
    assert (problems.total, len(problems.first)) == (100, 20) and "more like" not in "".join(problems.first)
    with pytest.raises(DataError, match=r"^x.csv: 2 problems \(all listed\):"):
        check(["M*K", ""])


def test_long_values_are_shortened() -> None:
    with pytest.raises(DataError) as caught:
        check(["*K"], ids=["P" * 10_000 + "\n"])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_chunks_are_checked_as_a_whole_file_is(size: int) -> None:
    ids = [f"P{i % 97}" if i >= 97 and i % 50 == 0 else f"P{i}" for i in range(1000)]
    whole = make_rows({"line": list(range(1, 1001)), "id": ids, "sequence": ["MKV"] * 1000})
    chunks = [whole.slice(i, size) for i in range(0, 1000, size)]
    checker = Checker(DataConfig(), "x.csv")
    assert sum(len(checker(chunk)) for chunk in chunks) == 1000
    with pytest.raises(DataError) as caught:
        checker.finish()
    with pytest.raises(DataError) as expected:
        check_rows(whole, DataConfig(), "x.csv")
    assert str(caught.value) == str(expected.value)
    assert "x.csv:101: id 'P3' was used in line 4 already; make ids unique" in str(caught.value)
    assert str(caught.value).startswith("x.csv: 18 problems")


def test_chunks_are_given_and_problems_raised_after_the_last() -> None:
    rows = make_rows({"line": [1, 2, 3, 4], "id": list("abcd"), "sequence": ["MKV", "M*K", "MK-V", "MKV"]})
    checker = Checker(DataConfig(on_bad_residue="skip"), "x.parquet")
    given = [checker(rows.slice(i, 1)) for i in range(4)]
    assert [chunk["id"].to_pylist() for chunk in given] == [["a"], [], [], ["d"]]
    assert Report(name="x.parquet", **checker.counts) == Report(name="x.parquet", rows=4, skipped=2)
    reason = "the sequence has '-' (a gap) at residue 3, outside the ESM alphabet"
    assert list(checker.rejected)[1] == Rejected("x.parquet", 3, "c", reason, "left out")
    strict = Checker(DataConfig(), "x.parquet")
    assert [strict(rows.slice(i, 1))["id"].to_pylist() for i in (0, 1, 3)] == [["a"], ["b"], ["d"]]
    with pytest.raises(DataError, match="^x.parquet: record 2: the sequence of 'b' has"):
        strict.finish()


def test_rejected_records_are_kept_packed_and_written_as_they_were(tmp_path: Path) -> None:
    """850 bytes each, the million of a corpus would fill the memory."""
    odd = ["tab\there", 'quo"te', "line\nbreak", "\u00e9\U0001f9ec", ""]
    why = "the sequence has '-' at residue 3"
    made = [Rejected("x.csv", i, odd[i % 5] + str(i), why, "left out") for i in range(5000)]
    tracemalloc.start()
    rows = RejectedRows()
    for row in made:
        rows.append(row)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(rows) == made == list(RejectedRows(iter(rows))) and len(rows) == 5000
    assert size < 40 * len(rows)
    save_rejected(tmp_path / "r.tsv", rows)
    written = (tmp_path / "r.tsv").read_text()
    assert written.startswith(f'file\tline\tid\treason\taction\nx.csv\t0\t"tab\there0"\t{why}\tleft out\n')
    save_rejected(tmp_path / "r.tsv", RejectedRows())
    assert not (tmp_path / "r.tsv").exists()


def test_the_files_of_a_source_are_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern is looked up in its folder, which takes long where there are many: not for each rejected record."""
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("id,sequence\n")
    asked: list[str] = []
    monkeypatch.setattr(validation, "files_of", lambda source: asked.append(source) or files_of(source))
    lines = [row_number(i % 2, i) for i in range(200)]
    rows = make_rows({"line": lines, "id": [str(i) for i in range(200)], "sequence": ["M-K"] * 200})
    checker = Checker(DataConfig(on_bad_residue="skip"), str(tmp_path / "*.csv"))
    checker(rows)
    assert [(Path(row.file).name, row.line) for row in checker.rejected] == [
        ("ab"[i % 2] + ".csv", i) for i in range(200)
    ]
    assert len(asked) == 1
