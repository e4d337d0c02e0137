"""Labels as people write them: read for certain, or refused with the way to write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.intake import load, protein, sets, table, write
from helpers.rows import read_rows
from hypothesis import given
from hypothesis import strategies as st

from esm_neuron.config import DataConfig, TaskConfig
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.label_forms import in_order, listed
from esm_neuron.errors import DataError
from esm_neuron.tasks import task_class

CLASSES: list[tuple[list[str], list[str]]] = [
    (["10", "9", "2", "1", "10", "9"], ["1", "2", "9", "10"]),
    (["-1", "1", "0", "-1", "1", "0"], ["-1", "0", "1"]),
    (["2.0", "10.0", "1.0", "2.0"], ["1.0", "2.0", "10.0"]),
    (["1.10", "1.9", "1.2", "1.9"], ["1.10", "1.2", "1.9"]),  # EC numbers are text
    (["EC:10", "EC:9", "EC:10"], ["EC:10", "EC:9"]),
    (["True", "False", "True"], ["False", "True"]),
    (["['a']", "['b']", "['a']"], ["a", "b"]),
    (["[1]", "[0]", "[1]"], ["0", "1"]),
    (["[2Fe-2S]", "[4Fe-4S]", "[2Fe-2S]"], ["[2Fe-2S]", "[4Fe-4S]"]),
    (["a b", "a", "a b"], ["a", "a b"]),
]


@pytest.mark.parametrize(("labels", "classes"), CLASSES)
def test_classes_and_their_order(tmp_path: Path, labels: list[str], classes: list[str]) -> None:
    assert load(table(tmp_path / "a.tsv", labels)).labels == tuple(classes)


@given(st.lists(st.integers(-(10**6), 10**6), min_size=2, max_size=30, unique=True))
def test_whole_numbers_are_in_their_order(numbers: list[int]) -> None:
    assert in_order(map(str, numbers)) == [str(number) for number in sorted(numbers)]


@given(st.lists(st.text("abc xyz", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=6))
def test_lists_are_read_as_python_and_json_write_them(entries: list[str]) -> None:
    import json

    assert listed(repr(entries)) == entries
    assert listed(json.dumps(entries)) == entries
    assert listed(repr(list(range(len(entries) + 1)))) == [str(i) for i in range(len(entries) + 1)]


ALIKE = [["Caf\u00e9", "Cafe\u0301"], ["cell wall", "cell\u00a0wall"], ["wall", "wall\u200b"], ["a  b", "a b"]]


@pytest.mark.parametrize("ones", [["True", "true"], ["1", "1.0"], ["FALSE", "False"], ["0", "0.0"], *ALIKE])
def test_one_class_written_in_two_ways_is_refused(tmp_path: Path, ones: list[str]) -> None:
    with pytest.raises(DataError, match="which are the same; write them alike, or name both in task.labels"):
        load(table(tmp_path / "a.tsv", ["x", *ones, "x"]))


def test_a_class_is_known_in_the_other_writing(tmp_path: Path) -> None:
    train = table(tmp_path / "a.tsv", ["True", "False"] * 2)
    test = table(tmp_path / "b.tsv", ["true", "FALSE"])
    splits = load(train, test=str(test))
    assert splits.test is not None and splits.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "labels",
    [
        [f"{i * 0.37:.3f}" for i in range(60)],
        [str(i) for i in range(60)],
        [f"{i}.5" for i in range(20)] * 2,
        [f"1e-{i}" for i in range(1, 30)],
        [f"-{i}.25" for i in range(40)],
    ],
)
def test_values_are_no_classes(tmp_path: Path, labels: list[str]) -> None:
    path = table(tmp_path / "a.tsv", labels)
    with pytest.raises(
        DataError, match=rf"has {len(set(labels))} classes in {len(labels)} training proteins, .*task.name=regression"
    ):
        load(path)
    assert len(load(path, "regression").train) == len(labels)


SETS: list[tuple[list[str], dict[str, Any], list[list[str]]]] = [
    (["A;B", "A", "B"], {}, [["A", "B"], ["A"], ["B"]]),
    (["['A', 'B']", "['A']", "['B']"], {}, [["A", "B"], ["A"], ["B"]]),
    (['["A", "B"]', "[]", '["B"]'], {}, [["A", "B"], [], ["B"]]),
    (["[A, B]", "[A, C]", "[]"], {}, [["A", "B"], ["A", "C"], []]),
    (["A,B", "A", "B"], {"label_separator": ","}, [["A", "B"], ["A"], ["B"]]),
    (["A|B", "A", "B"], {"label_separator": "|"}, [["A", "B"], ["A"], ["B"]]),
    (["[0, 1]", "[1, 1]", "[0, 0]"], {"labels": ("A", "B")}, [["B"], ["A", "B"], []]),
    (["011", "100", "000"], {"labels": ("A", "B", "C")}, [["B", "C"], ["A"], []]),
    (["0;1", "1;1", "1;0"], {"labels": ("A", "B")}, [["B"], ["A", "B"], ["A"]]),
    (["[0. 1. 1.]", "[1. 0. 0.]", "[0. 0. 0.]"], {"labels": ("A", "B", "C")}, [["B", "C"], ["A"], []]),
    (["0.0;1.0", "1.0;1.0", "1;0"], {"labels": ("A", "B")}, [["B"], ["A", "B"], ["A"]]),
    (["[0 1 1]", "[1 0 0]", "[0 0 0]"], {"labels": ("A", "B", "C")}, [["B", "C"], ["A"], []]),
    (
        ["Cell membrane; Nucleus", "Nucleus", "Cell wall"],
        {},
        [["Cell membrane", "Nucleus"], ["Nucleus"], ["Cell wall"]],
    ),
    (["[0, 2]", "[1]", "[0, 1]"], {}, [["0", "2"], ["1"], ["0", "1"]]),
]


@pytest.mark.parametrize(("labels", "how", "expected"), SETS)
def test_several_labels(tmp_path: Path, labels: list[str], how: dict[str, Any], expected: list[list[str]]) -> None:
    assert sets(load(table(tmp_path / "a.tsv", labels), "multi_label", **how)) == expected


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["0,1", "0", "1"], r"'0,1' is one label, .*data.label_separator=','"),
        (["A|B", "B|C", "C|A"], r"data.label_separator='\|'"),
        (["A/B", "A", "B"], "data.label_separator='/'"),
        (["A,B;C", "A", "B"], "data.label_separator=','"),
        (["[0, 0, 1]", "[1, 0, 0]", "[0, 1, 0]"], r"0 or 1 for each of 3 classes; name these in their order"),
        (["001", "100", "010"], r"0 or 1 for each of 3 classes; name these in their order"),
        (["0;0;1", "1;0;0", "0;1;0"], r"0 or 1 for each of 3 classes"),
        (["", "A", "B"], r"is empty; give a label or remove the record, or leave such out: data.on_missing=skip"),
    ],
)
def test_labels_that_could_be_read_wrongly_are_refused(tmp_path: Path, labels: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(table(tmp_path / "a.tsv", labels), "multi_label")


def test_a_comma_in_names_separates_nothing(tmp_path: Path) -> None:
    names = ["Membrane, peripheral", "Nucleus, matrix", "Cytoplasm"]
    assert load(table(tmp_path / "a.tsv", names), "multi_label").labels == tuple(sorted(names))


@pytest.mark.parametrize(
    ("label", "how", "entries"),
    [
        ("[0, 1, 1, 0]", {}, "0110"),
        ("[0 1 1 0]", {}, "0110"),
        ("0,1,1,0", {}, "0110"),
        ("0 1 1 0", {}, "0110"),
        ("0110", {}, "0110"),
        ("['0', '1', '1', '0']", {}, "0110"),
        ("(0, 1, 1, 0)", {}, "0110"),
        ("0;1;1;0", {"label_separator": ";"}, "0110"),
        ("[0,1,1,0]", {}, "0110"),
        ("((..", {"ignore": ()}, "((.."),
    ],
)
def test_labels_of_residues(tmp_path: Path, label: str, how: dict[str, Any], entries: str) -> None:
    splits = load(table(tmp_path / "a.tsv", [label], ["MKVL"]), "residue_classification", **how)
    assert [splits.labels[code] for code in splits.train.labels[1:-1]] == list(entries)
    assert len(splits.labels) == len(set(entries))


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (["0,5", "1,25", "3"], [0.5, 1.25, 3]),
        (["-0,5", "1,2e3", "3,0"], [-0.5, 1200, 3]),
        (["0.5", "1e-3", "-2"], [0.5, 0.001, -2]),
        (["1,234", "0,5", "2"], [1.234, 0.5, 2]),
        ([",5", "1,5", "2"], [0.5, 1.5, 2]),
    ],
)
def test_decimal_commas(tmp_path: Path, labels: list[str], values: list[float]) -> None:
    assert load(table(tmp_path / "a.tsv", labels), "regression").train.labels.tolist() == values


@pytest.mark.parametrize(
    "labels", [["1,234", "5,678", "9"], ["1,5", "2.5", "3"], ["1,234.5", "2", "3"], ["1.234,5", "2", "3"]]
)
def test_commas_that_may_be_thousands_are_refused(tmp_path: Path, labels: list[str]) -> None:
    with pytest.raises(DataError, match=r"has a comma, .*write 1234.5 everywhere|is no finite number"):
        load(table(tmp_path / "a.tsv", labels), "regression")


def test_an_evaluation_refuses_such_commas_too(tmp_path: Path) -> None:
    labels = task_class("regression").label_kind
    assert labels is not None
    path = table(tmp_path / "a.tsv", ["1,234", "5,678"])
    with pytest.raises(DataError, match="has a comma, it may be one of thousands"):
        InputChunks(path, DataConfig(), labels.of(TaskConfig(name="regression"), DataConfig())).read()


def test_classes_and_counts_are_told(tmp_path: Path) -> None:
    said = load(table(tmp_path / "a.tsv", ["B", "A", "B"])).summary().splitlines()[-1]
    assert said == "classes: 2 (training proteins): A 1, B 2"
    said = load(table(tmp_path / "a.tsv", ["A;B", "A", "B", "A"])).summary()
    assert "NOTE: 'A;B' is one class; for several labels per protein use task.name=multi_label" in said
    tagged = ["TISSUE SPECIFICITY: Liver {ECO:0000269}.", "TISSUE SPECIFICITY: Heart."]
    assert "is UniProt's free text" in load(table(tmp_path / "a.tsv", tagged)).summary()
    assert (
        "differ in capital letters, blanks or marks alone" in load(table(tmp_path / "a.tsv", ["a", "A", "a"])).summary()
    )
    said = load(table(tmp_path / "a.tsv", ["1", "2.5", "3"]), "regression").summary()
    assert said.endswith("values: 3 in training, 1 to 3, mean 2.16667")


@pytest.mark.parametrize(
    ("header", "column", "value"),
    [
        (">P label=Cell membrane split=train", "label", "Cell membrane"),
        (">sp|P1|X Protein OS=Mus musculus OX=10090 GN=Abc PE=1 SV=2", "OS", "Mus musculus"),
        (">sp|P1|X Protein OS=Mus musculus OX=10090 GN=Abc PE=1 SV=2", "OX", "10090"),
        (">sp|P1|X Protein OS=Mus musculus OX=10090 GN=Abc PE=1 SV=2", "SV", "2"),
        ('>P label="Cell membrane" split=train', "label", "Cell membrane"),
        ('>P note="label=a" label=b', "label", "b"),
        (">P label=a=b x=1", "label", "a=b"),
        (">P label= x=1", "label", ""),
        (">101m_A mol:protein length:154  MYOGLOBIN", "mol", "protein"),
        (">P1|EUKARYA|NO_SP|0", "part2", "EUKARYA"),
        (">AF:AF-Q5-F1 Name UA=Q5 OS=Homo sapiens", "OS", "Homo sapiens"),
    ],
)
def test_values_in_headers(tmp_path: Path, header: str, column: str, value: str) -> None:
    path = write(tmp_path / "a.fa", f"{header}\nMKV\n>{'Q|x|y|z'} {column}=other\nMKV\n")
    assert read_rows(path, DataConfig(label_column=column), True)["label"].to_pylist()[0] == value


def test_text_behind_labels_in_headers_is_named(tmp_path: Path) -> None:
    rows = [f">P{i} label={'AB'[i % 2]} kinase number {i}\n{protein(i)}\n" for i in range(60)]
    with pytest.raises(DataError, match=r"label= has 60 values .* begin with 2 words, .*with quotes"):
        load(write(tmp_path / "a.fasta", "".join(rows)))
    quoted = [row.replace("label=A", 'label="A"').replace("label=B", 'label="B"') for row in rows]
    assert load(write(tmp_path / "b.fasta", "".join(quoted))).labels == ("A", "B")
    species = [f">P{i} OS=Genus{i % 30} species{i}\n{protein(i)}\n" for i in range(60)]
    assert len(load(write(tmp_path / "c.fasta", "".join(species)), label_column="OS").labels) == 60


def test_classes_with_the_marks_of_separators_can_be_named(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", ["Lysosome/Vacuole", "Lysosome", "Vacuole"])
    with pytest.raises(DataError, match="or the classes in task.labels"):
        load(path, "multi_label")
    names = ("Lysosome", "Lysosome/Vacuole", "Vacuole")
    assert sets(load(path, "multi_label", labels=names)) == [[names[1]], [names[0]], [names[2]]]


def cells(path: Path, labels: list[str]) -> Path:
    """A TSV with these labels, each four times."""
    return table(path, labels * 4)


@pytest.mark.parametrize(
    "labels",
    [
        ["{'a': 1, 'b': 0}", "{'a': 0, 'b': 1}", "{'a': 0, 'b': 0}"],
        ['{"a":1,"b":0}', '{"a":0,"b":1}', '{"a":0,"b":0}'],
        ["{a: true, b: false}", "{a: false, b: true}", "{a: false, b: false}"],
        ["{'a': True, 'b': False}", "{'a': 0.0, 'b': 1.0}", "{}"],
    ],
)
def test_a_mapping_has_the_labels_whose_value_is_1(tmp_path: Path, labels: list[str]) -> None:
    assert sets(load(cells(tmp_path / "a.tsv", labels), "multi_label")) == [["a"], ["b"], []] * 4
    assert load(cells(tmp_path / "b.tsv", labels[:2])).labels == ("a", "b")  # one class per protein


@pytest.mark.parametrize("label", ["{'a': 0.7, 'b': 0.3}", "{'labels': ['a', 'b']}", "{a: x}", "{'a': None}"])
@pytest.mark.parametrize("task", ["multi_label", "sequence_classification"])
def test_a_mapping_to_other_values_is_refused(tmp_path: Path, label: str, task: str) -> None:
    with pytest.raises(DataError, match="is a mapping in braces; write 1 or 0 behind each label, or the list"):
        load(cells(tmp_path / "a.tsv", [label, "a", "b"]), task)
    assert load(cells(tmp_path / "b.tsv", ["{ECO:0000269}", "a"])).labels == ("a", "{ECO:0000269}")


VECTORS = [
    ("[0 1]", "[1 0]"), ("(0, 1)", "(1, 0)"), ("[0. 1.]", "[1. 0.]"), ("array([0, 1])", "array([1, 0])"),
    ("0 1", "1 0"), ("0,1", "1,0"), ("0;1", "1;0"),
    ("[False, True]", "[True, False]"), ("tensor([0., 1.])", "tensor([1., 0.])"),
    ("np.array([0, 1], dtype=int8)", "np.array([1, 0], dtype=int8)"), ("0.0 1.0", "1.0  0.0"),
]  # fmt: skip


@pytest.mark.parametrize("labels", VECTORS)
def test_marks_of_two_classes_need_their_names(tmp_path: Path, labels: tuple[str, str]) -> None:
    path = cells(tmp_path / "a.tsv", list(labels))
    with pytest.raises(DataError, match=r"is 0 or 1 for each of 2 classes; name these in their order: task.labels="):
        load(path, "multi_label")
    assert sets(load(path, "multi_label", labels=("a", "b"))) == [["b"], ["a"]] * 4


@pytest.mark.parametrize("label", ["0 1 0", "0,1,0", "0, 1, 0", "array([0, 1, 0])", "False True False", "0.0 1.0 0.0"])
def test_marks_of_three_classes_need_their_names(tmp_path: Path, label: str) -> None:
    path = cells(tmp_path / "a.tsv", [label, label.replace("0", "1", 1).replace("False", "True", 1)])
    with pytest.raises(DataError, match=r"0 or 1 for each of 3 classes; name these"):
        load(path, "multi_label")
    assert sets(load(path, "multi_label", labels=("a", "b", "c"))) == [["b"], ["a", "b"]] * 4
    with pytest.raises(DataError, match="is a list of 3 labels"):
        load(path)


@pytest.mark.parametrize(
    ("between", "named"),
    [("||", "||"), (" & ", "&"), (" and ", " and "), ("+", "+"), (" or ", " or "), (" // ", "//"), ("\\", "\\")],
)
def test_other_separators_are_named_and_cure(tmp_path: Path, between: str, named: str) -> None:
    path = cells(tmp_path / "a.tsv", [f"cell{between}wall", "cell", "wall"])
    with pytest.raises(DataError) as caught:
        load(path, "multi_label")
    assert f"data.label_separator={named!r}" in str(caught.value)
    assert sets(load(path, "multi_label", label_separator=named)) == [["cell", "wall"], ["cell"], ["wall"]] * 4


LISTS = [[0, 1], [1, 0], ["a", "b"], [True, False]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_list_in_a_column_of_one_class_is_refused_as_its_text_is(tmp_path: Path, kind: str) -> None:
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    def file(labels: list[Any]) -> Path:
        rows = [{"id": f"p{i}", "sequence": protein(i), "label": label} for i, label in enumerate(labels)]
        path = tmp_path / f"a.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
            return path
        return write(path, "".join(json.dumps(row) + "\n" for row in rows))

    for label in LISTS:
        with pytest.raises(DataError, match=r"is a list of 2 labels; use task.name=multi_label, or keep one"):
            load(file([label, label[::-1]] * 4))
    assert load(file([["a;1"], ["b"]])).labels == ("a;1", "b")
    assert sets(load(file([["a", "b"], ["b"]]), "multi_label")) == [["a", "b"], ["b"]]
    assert load(file([[0.5], [1.5]]), "regression").train.labels.tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    "labels", [[f"{i * 0.37:.3f}" for i in range(39)], ["True", "true"] * 3, ["01", "1", "x"], ["A", "A"], ["1", "1.0"]]
)
def test_data_check_finds_what_train_refuses(tmp_path: Path, labels: list[str], capsys: Any) -> None:
    from esm_neuron import cli

    path = table(tmp_path / "a.tsv", labels)
    with pytest.raises(DataError) as caught:
        load(path)
    assert cli.main(["data", "check", str(path), "--homologs", "off"]) == 1
    assert f"faults: 1\n  {caught.value}" in capsys.readouterr().out
    # a held-out class does not count: training has one
    split = path.read_text().replace("label", "label\tsplit").splitlines()
    rows = [split[0], *(f"{row}\ttrain" for row in split[1:]), f"q\t{protein(99)}\tOther\ttest"]
    write(path, "\n".join(rows) + "\n")
    assert cli.main(["data", "check", str(path), "--split-column", "split", "--homologs", "off"]) == 1


WORDS = ["NA", "None", "NULL", "N/A", "-", "nan", "#N/A", "<NA>", "NaN", "none", "n/a", "?"]


@pytest.mark.parametrize("task", ["sequence_classification", "multi_label", "regression"])
@pytest.mark.parametrize("word", WORDS)
def test_a_word_for_nothing_is_no_label(tmp_path: Path, word: str, task: str) -> None:
    path = table(tmp_path / "a.tsv", ["1", "2", word, "1"])
    with pytest.raises(DataError, match=r"a.tsv:4: .*'p2' is '.*', which stands for none; .*data.on_missing=skip$"):
        load(path, task)
    splits = load(path, task, on_missing="skip")
    assert list(splits.train.ids) == ["p0", "p1", "p3"]
    assert "1 left out without a sequence or a label" in splits.summary()
    if task == "sequence_classification":  # the other cure
        assert load(path, labels=("1", "2", word)).train.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("word", ["NA", "--", "N-", "??"])
def test_words_for_nothing_are_labels_of_residues(tmp_path: Path, word: str) -> None:
    path = table(tmp_path / "a.tsv", [word, "AN"], ["MK", "LV"])
    assert set(load(path, "residue_classification", ignore=()).labels) == {*word, *"AN"}


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("(R)-lipoate;heme b;NAD(+)", None),
        ("[2Fe-2S];NAD binding;[4Fe-4S]", None),
        ("(cell wall)", None),
        ("(5'-3')", None),
        (r"['5\'-end', 'b']", ["5'-end", "b"]),
        (r'["\u03b2-barrel", "b"]', ["β-barrel", "b"]),
        ("['a' 'b']", ["a", "b"]),
        ("[β-barrel, b]", ["β-barrel", "b"]),
        ("(0, 1)", ["0", "1"]),
    ],
)
def test_names_with_brackets_are_no_lists_and_quotes_are_read_whole(text: str, entries: list[str] | None) -> None:
    assert listed(text) == entries


@pytest.mark.parametrize("text", ["['nucleus', cytosol]", "['a', nan]", "['a', None]"])
def test_a_list_half_in_quotes_loses_no_entry(text: str) -> None:
    with pytest.raises(ValueError, match="is a list with and without quotes"):
        listed(text)


LOCATIONS = {
    "SUBCELLULAR LOCATION: Nucleus.": ["Nucleus"],
    "SUBCELLULAR LOCATION: Nucleus": ["Nucleus"],
    "SUBCELLULAR LOCATION: Cell membrane {ECO:0000269|PubMed:1}; Multi-pass membrane protein {ECO:0000255}.": [
        "Cell membrane"
    ],
    "SUBCELLULAR LOCATION: Cytoplasm, cytoskeleton {ECO:0000250}. Nucleus {ECO:0000305, ECO:1}. Note=In G1. Also P1.": [
        "Cytoplasm, cytoskeleton",
        "Nucleus",
    ],
    "SUBCELLULAR LOCATION: [Isoform 1]: Nucleus {ECO:1}. SUBCELLULAR LOCATION: [Isoform 2]: Nucleus. Secreted.": [
        "Nucleus",
        "Secreted",
    ],
}


@pytest.mark.parametrize("text", LOCATIONS)
def test_uniprots_locations_are_labels(tmp_path: Path, text: str) -> None:
    for name in ("multi_label", "sequence_classification"):
        rows = [text, "SUBCELLULAR LOCATION: Golgi apparatus {ECO:0000250}.", "SUBCELLULAR LOCATION: Nucleus."] * 2
        path = table(tmp_path / "a.tsv", rows)
        if name == "multi_label":
            assert [sorted(labels) for labels in sets(load(path, name))[:2]] == [LOCATIONS[text], ["Golgi apparatus"]]
        elif len(LOCATIONS[text]) > 1:
            with pytest.raises(DataError, match="is a list of 2 labels; use task.name=multi_label, or keep one"):
                load(path, name)
        else:
            assert set(load(path, name).labels) == {LOCATIONS[text][0], "Golgi apparatus", "Nucleus"}


def test_a_note_alone_is_no_location(tmp_path: Path) -> None:
    """It is a missing label, not one of a protein that is nowhere."""
    for name in ("multi_label", "sequence_classification"):
        path = table(tmp_path / "a.tsv", ["SUBCELLULAR LOCATION: Note=Not known.", "a", "b"])
        with pytest.raises(DataError, match="'SUBCELLULAR LOCATION: Note=Not known.', which stands for none; give"):
            load(path, name)
        assert list(load(path, name, on_missing="skip").train.ids) == ["p1", "p2"]
        path = table(tmp_path / "b.tsv", ["SUBCELLULAR LOCATION: [Isoform 1]: Note=Not known.", "a", "b"])
        with pytest.raises(DataError, match="names no location; remove the record"):
            load(path, name)


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize("of", [lambda i: True, lambda i: i % 3 == 0])
def test_quotes_around_a_name_are_no_part_of_it(tmp_path: Path, quote: str, of: Any) -> None:
    rows = [f"p{i},{protein(i)}, {quote * of(i)}{'ab'[i % 2]}{quote * of(i)}\n" for i in range(8)]
    path = write(tmp_path / "a.csv", "".join(["id,sequence,label\n", *rows]))
    assert load(path).labels == ("a", "b")
    assert sets(load(path, "multi_label")) == [["a"], ["b"]] * 4
    named = ("b", f"{quote}a{quote}")  # as it is where it is asked for
    rows = [row.replace(f"{quote}b{quote}", "b").replace(",  a", f", {quote}a{quote}") for row in rows]
    both = write(tmp_path / "b.csv", f"id,sequence,label\np,{protein(1)}, {quote}a{quote}\nq,{protein(2)}, b\n")
    assert load(both, labels=named).labels == named


@pytest.mark.parametrize("name", ["5'-3'", "'", "''", "a'", "'a'b'", '"', "d'Or"])
def test_other_quotes_are_part_of_a_name(tmp_path: Path, name: str) -> None:
    assert name in load(table(tmp_path / "a.tsv", [name, "x", "y"])).labels


def test_a_separator_behind_the_last_label_is_no_label(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", ["PF1;PF2;", "PF1;", "PF2", "PF3;"])
    assert sets(load(path, "multi_label")) == [["PF1", "PF2"], ["PF1"], ["PF2"], ["PF3"]]
    with pytest.raises(DataError, match="has an empty part"):
        load(table(tmp_path / "b.tsv", ["PF1;;", "PF2"]), "multi_label")


def test_a_list_of_one_number_is_that_number(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", ["[1.5]", "[2]", "3", "[-4.0]"])
    assert load(path, "regression").train.labels.tolist() == [1.5, 2, 3, -4]
    with pytest.raises(DataError, match=r"'\[1.5, 2\]' is no finite number"):
        load(table(tmp_path / "b.tsv", ["[1.5, 2]", "[2]"]), "regression")


@pytest.mark.parametrize("dash", ["-", "\u2013", "\u2014", "\u2212", "\u2026"])
def test_a_dash_is_no_class(tmp_path: Path, dash: str) -> None:
    path = table(tmp_path / "a.tsv", [dash, "x", "y"])
    with pytest.raises(DataError, match="which stands for none"):
        load(path)
    assert load(path, on_missing="skip").labels == ("x", "y")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["Membrane.", "Membrane", "x"], "'Membrane', 'Membrane.' differ in capital letters, blanks or marks alone"),
        (["cell_wall", "Cell wall", "x"], "'Cell wall', 'cell_wall' differ in capital letters, blanks or marks alone"),
        (["2-Sep", "SEPT3", "x"], "'2-Sep' is a date, which spreadsheets make of names such as SEPT2"),
        (["1.1.1.1", "11.1.1", "111.1"], ""),
        (["5'-3'", "3'-5'", "53"], ""),
    ],
)
def test_names_that_a_hand_or_a_spreadsheet_has_changed_are_told(tmp_path: Path, names: list[str], said: str) -> None:
    notes = [line for line in load(table(tmp_path / "a.tsv", names * 3)).described.split("\n") if "NOTE" in line]
    assert notes == ([f"NOTE: {said}"] if said else [])


def test_letters_of_full_width_are_the_same_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which are the same; write them alike"):
        load(table(tmp_path / "a.tsv", ["\uff21", "A", "B"]))
