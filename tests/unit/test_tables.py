"""Tables as people have them: quotes, separators, headers, types, workbooks, a column per label."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.intake import HEAD, ROWS, load, named, protein, sets, write
from helpers.rows import read_rows
from hypothesis import given
from hypothesis import strategies as st

from esm_neuron.config import DataConfig
from esm_neuron.data.label_forms import one_hot
from esm_neuron.errors import DataError


def test_a_record_of_a_tsv_that_spans_lines_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'id\tlabel\tsequence\np1\t"a\nb"\tMKV\np2\tx\tMKL\n')
    with pytest.raises(DataError, match="a.tsv:2: .*a line is a record, also within quotes: write it as CSV"):
        load(path)


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


def test_one_hot_needs_known_labels() -> None:
    assert one_hot(["0", "1"], None) is None
    assert one_hot(["0", "1"], ("A", "B", "C")) is None
    assert one_hot(["0", "1"], ("0", "1")) is None
    assert one_hot(["0", "1"], ("A", "B")) == ["B"]


def test_classes_of_columns_keep_their_letters(tmp_path: Path) -> None:
    rows = [f"p{n},{protein(n, 40)},{n % 2},{1 - n % 2}" for n in range(8)]
    (tmp_path / "a.csv").write_text("\n".join(["id,sequence,β-barrel,αhelix", *rows]) + "\n")
    assert set(load(tmp_path / "a.csv", "multi_label", label_column="[β-barrel, αhelix]").labels) == {
        "β-barrel",
        "αhelix",
    }
