"""Splits by column, file and sampling; filters, classes, long sequences, counts; and the demo's real data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.inputs import load_inputs
from helpers.rows import cut_sequence

from esm_neuron.config import DataConfig, TaskConfig, TrainConfig
from esm_neuron.data import splits as splits_module
from esm_neuron.data.dataset import ExampleTable, cut_starts, join_tables
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.labels import Labels
from esm_neuron.data.splits import Splits, load_splits
from esm_neuron.data.tokenizer import decode
from esm_neuron.errors import ConfigError, DataError

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "localization.tsv.gz"

Row = tuple[str, str, str, str, str]
"""id, sequence, label, split, leaky"""

ROWS: list[Row] = [
    ("a", "MKV", "in", "train", "False"),
    ("b", "AAA", "out", "train", "False"),
    ("c", "CCCC", "out", "train", "False"),
    ("d", "DDDD", "in", "valid", "False"),
    ("e", "mkv", "out", "valid", "TRUE"),
    ("f", "FFF", "in", "test", "false"),
    ("g", "AAA", "out", "test", "False"),
]


def write(folder: Path, rows: list[Row], name: str = "x.csv") -> str:
    path = folder / name
    path.write_text("id,sequence,label,split,leaky\n" + "".join(",".join(row) + "\n" for row in rows))
    return str(path)


def load(path: str, labels: tuple[str, ...] | None = None, seed: int = 42, **data) -> Splits:
    cfg = TrainConfig(seed=seed, task=TaskConfig(labels=labels), data=DataConfig(train=path, **data))
    return load_splits(cfg, Labels)


def many(number: int) -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(number):
        label = "rare" if i % 10 == 0 else "common"
        rows.append((f"p{i}", "".join(rng.choice(list("ACDEFGHIK"), 12)), label, "train", str(i % 2 == 0)))
    return rows


def texts(table: ExampleTable | None) -> list[str]:
    assert table is not None
    return [decode(table.sequence(i))[5:-5] for i in range(len(table))]


def test_split_by_column(tmp_path: Path) -> None:
    splits = load(write(tmp_path, ROWS), split_column="split")
    assert splits.labels == ("in", "out")
    assert splits.train.ids == ["a", "b", "c"]
    assert splits.train.labels.tolist() == [0, 1, 1]
    assert splits.train.labels.dtype == np.int64
    assert texts(splits.train) == ["MKV", "AAA", "CCCC"]
    assert texts(splits.valid) == ["DDDD", "MKV"]
    assert texts(splits.test) == ["FFF", "AAA"]
    assert splits.train.record.tolist() == [0, 1, 2]
    assert splits.train.weight.tolist() == [1, 1, 1]
    assert splits.sampled == {}


def test_split_names_are_chosen(tmp_path: Path) -> None:
    path = write(tmp_path, [(*row[:3], row[3].upper(), row[4]) for row in ROWS])
    assert len(load(path, split_column="split", split_names=("TRAIN", "VALID", "TEST")).train) == 3
    assert len(load(path, split_column="split").train) == 3
    other = write(tmp_path, [(*row[:3], row[3].upper() + "2", row[4]) for row in ROWS])
    with pytest.raises(
        DataError, match=r"x.csv: column 'split' has 3 values .*: 'TRAIN2' \(3 records, first in line 2\), "
    ):
        load(other, split_column="split")
    path = write(tmp_path, [(*row[:3], row[3].upper(), row[4]) for row in ROWS])
    with pytest.raises(DataError, match="no record has 'x' in column 'split'"):
        load(path, split_column="split", split_names=("x", "VALID", "TEST"), keep={"split": ["VALID"]})
    with pytest.raises(ConfigError, match="three different names"):
        load(path, split_column="split", split_names=("x", "x", "y"))


def test_split_by_file_equals_split_by_column(tmp_path: Path) -> None:
    parts = {s: [row for row in ROWS if row[3] == s] for s in ("train", "valid", "test")}
    train, valid, test = (write(tmp_path, rows, f"{s}.csv") for s, rows in parts.items())
    by_file = load(train, valid=valid, test=test)
    assert by_file.fingerprint == load(write(tmp_path, ROWS), split_column="split").fingerprint
    assert len(by_file.reports) == 6
    assert load(train, valid=valid).test is None
    assert load(train, valid_fraction=0).valid is None


def test_a_split_with_two_origins_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    other = write(tmp_path, [("z", "DDDD", "in", "", "")], "other.csv")
    with pytest.raises(
        ConfigError, match="valid proteins come both from data.valid and from data.split_column='split'"
    ):
        load(path, split_column="split", valid=other)
    splits = load(path, split_column="split", valid=other, keep={"id": list("abcfgz")})
    assert splits.valid is not None
    assert splits.valid.ids == ["z"]


def test_row_filters(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    splits = load(path, split_column="split", keep_heldout={"leaky": ["False"]}, keep={"id": list("abdefg")})
    assert (splits.train.ids, splits.valid.ids, splits.test.ids) == (["a", "b"], ["d"], ["f", "g"])
    assert (splits.reports[0].rows, splits.reports[0].filtered, splits.reports[0].filtered_heldout) == (7, 1, 1)
    assert "1 left out by data.keep; 1 left out by data.keep_heldout" in splits.summary()
    # What a filter leaves out need not be sound.
    odd = write(tmp_path, [*ROWS, ("a", "*", "", "none", "x")], "odd.csv")
    assert (
        load(odd, split_column="split", keep={"leaky": ["true", "false"]}).fingerprint
        == load(path, split_column="split").fingerprint
    )


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"keep": {"leeky": ["False"]}}, r"no column 'leeky' \(data.keep\); .*; did you mean 'leaky'\?"),
        (
            {"keep": {"label": ["in", "inn"]}},
            "data.keep, column 'label': value 'inn' matches no record; .* 'in', 'out'",
        ),
        ({"keep_heldout": {"leaky": []}}, "data.keep_heldout, column 'leaky': the list of values is empty"),
        ({"keep": {"label": ["in"], "id": ["b"]}}, "data.keep leaves no records"),
        ({"keep_heldout": {"id": ["d", "a"]}}, "data.keep_heldout leaves no test proteins"),
    ],
)
def test_filters_that_cannot_work(tmp_path: Path, filters: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"x.csv: {message}"):
        load(write(tmp_path, ROWS), split_column="split", **filters)


def test_of_a_filtered_column_only_what_messages_need_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,sequence\n" + "".join(f"p{number},MKV\n" for number in range(300)))
    file = splits_module._File(DataConfig(keep={"id": ["p299", "q"]}), "train", str(path), None)
    file.read(None)
    assert file.values["id"] == {"p299", *sorted(f"p{number}" for number in range(300))[:10]}


def test_a_training_file_alone_needs_no_column_of_the_heldout_filter(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    filters = {"clean": ["yes"]}
    assert len(load(path, valid_fraction=0, keep_heldout=filters).train) == 7
    with pytest.raises(DataError, match=r"x.csv: no column 'clean' \(data.keep_heldout\)"):
        load(path, valid_fraction=0.1, keep_heldout=filters)


def test_a_split_is_never_skipped_away(tmp_path: Path) -> None:
    rows = [(i, "*K" if s == "test" else q, lab, s, k) for i, q, lab, s, k in ROWS]
    with pytest.raises(DataError, match=r"what is left out \(data.on_bad_residue, .* leaves no test proteins"):
        load(write(tmp_path, rows), split_column="split", on_bad_residue="skip")


def test_sampling_is_seeded_recorded_and_stratified(tmp_path: Path) -> None:
    path = write(tmp_path, many(200))
    splits = load(path, valid_fraction=0.2)
    assert splits.valid is not None
    assert list(splits.sampled["valid"]) == list(splits.valid.ids)
    assert len(splits.valid) == 40
    assert np.bincount(splits.valid.labels).tolist() == [36, 4]
    assert set(splits.valid.ids).isdisjoint(splits.train.ids)
    assert len(splits.train) == 160
    assert load(path, valid_fraction=0.2).fingerprint == splits.fingerprint
    assert load(path, valid_fraction=0.2, seed=1).sampled["valid"] != splits.sampled["valid"]


def test_sampling_respects_the_heldout_filter_and_loses_no_row(tmp_path: Path) -> None:
    splits = load(write(tmp_path, many(200)), valid_fraction=0.1, keep_heldout={"leaky": ["False"]})
    assert len(splits.sampled["valid"]) == 20
    assert all(int(name[1:]) % 2 == 1 for name in splits.sampled["valid"])
    assert len(splits.train) == 180


def test_sampling_leaves_every_class_in_training(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS[:2] + ROWS[3:4])
    for seed in range(5):
        splits = load(path, valid_fraction=0.9, seed=seed)
        assert len(splits.sampled["valid"]) == 1
        assert splits.train.labels.tolist() == [0, 1] or splits.train.labels.tolist() == [1, 0]
    with pytest.raises(
        DataError, match="2 training proteins are too few to sample validation proteins from; give data.valid"
    ):
        load(write(tmp_path, ROWS[:2]))


def test_without_labels(tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence, *_ in many(50)))
    splits = load_splits(TrainConfig(data=DataConfig(train=str(path))), None)
    assert splits.labels == ()
    assert splits.train.labels.size == 0
    assert (len(splits.train), len(splits.sampled["valid"])) == (45, 5)


def test_class_names(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    splits = load(path, labels=("out", "in", "other"), split_column="split")
    assert splits.labels == ("out", "in", "other")
    assert splits.train.labels.tolist() == [1, 0, 0]
    with pytest.raises(ConfigError, match="has a name twice"):
        load(path, labels=("out", "in", "in"), split_column="split")
    with pytest.raises(
        DataError, match="x.csv:2: column 'label' of 'a': label 'in' is not one of the classes 'out', 'x'; "
    ):
        load(path, labels=("out", "x"), split_column="split", keep={"id": list("abcg")})
    with pytest.raises(DataError, match="x.csv: column 'label' has one class only, 'in', in the training proteins; "):
        load(path, split_column="split", keep={"label": ["in"]})


def test_a_label_that_training_does_not_have(tmp_path: Path) -> None:
    rows = [*ROWS, ("h", "HHH", "sideways", "test", "False")]
    message = (
        "^.*x.csv:9: column 'label' of '[^']+': label 'sideways' is not one of the classes 'in', 'out'; correct it, "
    )
    with pytest.raises(DataError, match=message) as caught:
        load(write(tmp_path, rows), split_column="split")
    assert "\n" not in str(caught.value)


SEQUENCE = "ACDEFGHIKLMNPQRSTVWY"


@pytest.mark.parametrize(
    ("choice", "limit", "overlap", "pieces"),
    [
        ("crop", 5, 0, ["ACDEF"]),
        ("crop_ends", 5, 0, ["ACDWY"]),
        ("crop_ends", 1, 0, ["A"]),
        ("crop_ends", 4, 0, ["ACWY"]),
        ("window", 8, 2, ["ACDEFGHI", "HIKLMNPQ", "PQRSTVWY"]),
        ("window", 9, 0, ["ACDEFGHIK", "LMNPQRSTV", "NPQRSTVWY"]),
        ("window", 10, 0, ["ACDEFGHIKL", "MNPQRSTVWY"]),
        ("window", 19, 18, ["ACDEFGHIKLMNPQRSTVW", "CDEFGHIKLMNPQRSTVWY"]),
        ("window", 20, 3, [SEQUENCE]),
        ("refuse", 20, 0, [SEQUENCE]),
    ],
)
def test_cuts(choice: str, limit: int, overlap: int, pieces: list[str]) -> None:
    cfg = DataConfig(max_residues=limit, long_sequences=choice, window_overlap=overlap)  # type: ignore[arg-type]
    assert cut_sequence(SEQUENCE, cfg) == pieces


@pytest.mark.parametrize("length", [11, 12, 17, 18, 19, 200, 1001])
def test_windows_cover_every_residue_and_overlap_enough(length: int) -> None:
    cfg = DataConfig(max_residues=10, long_sequences="window", window_overlap=3)
    numbers = list(range(length))
    windows = [numbers[a : a + n - n // 2] + numbers[b : b + n // 2] for a, b, n in cut_starts(length, cfg)]
    assert {len(window) for window in windows} == {10}
    assert windows[0][0] == 0
    assert windows[-1][-1] == length - 1
    assert len(windows) == -(-(length - 10) // 7) + 1
    for left, right in zip(windows, windows[1:], strict=False):
        assert left[-1] - right[0] + 1 >= 3


def test_windows_in_the_table_share_one_weight(tmp_path: Path) -> None:
    rows = [*ROWS[:2], ("w", SEQUENCE, "in", "train", "x")]
    splits = load(write(tmp_path, rows), valid_fraction=0, long_sequences="window", max_residues=8, window_overlap=2)
    table = splits.train
    assert table.record.tolist() == [0, 1, 2, 2, 2]
    assert table.weight.dtype == np.float32
    np.testing.assert_allclose(table.weight, [1, 1, 1 / 3, 1 / 3, 1 / 3])
    assert len(table.labels) == len(table.ids) == 3
    assert table.lengths.tolist() == [5, 5, 10, 10, 10]
    assert "train split: 3 proteins; 1 cut into 3 windows" in splits.summary()


def test_cropping_is_counted_and_refusing_names_the_row(tmp_path: Path) -> None:
    path = write(tmp_path, [*ROWS, ("w", SEQUENCE, "in", "train", "x")])
    splits = load(path, split_column="split", max_residues=4)
    assert "train split: 4 proteins; 1 cropped, 16 residues cut off" in splits.summary()
    with pytest.raises(
        DataError, match="x.csv:9: the sequence of 'w' has 20 residues, more than data.max_residues=19; "
    ):
        load(path, split_column="split", max_residues=19, long_sequences="refuse")


def test_shared_sequences_are_counted_not_judged(tmp_path: Path) -> None:
    rows = [*ROWS, ("h", "CCCC", "in", "train", "False"), ("i", "FFF", "in", "test", "False")]
    splits = load(write(tmp_path, rows), split_column="split")
    counts = {r.name: (r.repeated, r.in_train, r.conflicting) for r in splits.reports[1:]}
    assert counts == {"train split": (1, 0, 2), "valid split": (0, 1, 1), "test split": (1, 1, 0)}


def test_the_fingerprint_changes_with_anything_that_matters(tmp_path: Path) -> None:
    def changed(row: int, column: int, value: str) -> list[Row]:
        rows = [list(r) for r in ROWS]
        rows[row][column] = value
        return [tuple(r) for r in rows]  # type: ignore[misc]

    variants = [
        ROWS,
        changed(0, 0, "z"),
        changed(0, 1, "MKA"),
        changed(2, 2, "in"),
        changed(6, 3, "valid"),
        ROWS[1:2] + ROWS[:1] + ROWS[2:],
    ]
    prints = [load(write(tmp_path, rows), split_column="split").fingerprint for rows in variants]
    assert len(set(prints)) == len(variants)
    assert load(write(tmp_path, ROWS), labels=("out", "in"), split_column="split").fingerprint not in prints
    assert load(write(tmp_path, changed(0, 4, "other")), split_column="split").fingerprint == prints[0]


def test_inputs_keep_their_order_and_need_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "in.fasta"
    path.write_text(f">z\nMK*A\n>b\n{SEQUENCE}\n>a\nMKV\n")
    cfg = DataConfig(split_column="split", max_residues=10)
    with pytest.raises(DataError, match="in.fasta:1: .* stop codon"):
        load_inputs(path, cfg)
    table, report = load_inputs(path, replace(cfg, on_bad_residue="replace"))
    assert table.ids == ["z", "b", "a"]
    assert texts(table) == ["MKXA", SEQUENCE[:10], "MKV"]
    assert table.labels.size == 0
    assert report.summary() == f"{path}: 3 proteins; 1 with 1 characters replaced by X; 1 cropped, 10 residues cut off"
    table, report = load_inputs(path, replace(cfg, on_bad_residue="skip", long_sequences="window", window_overlap=0))
    assert table.ids == ["b", "a"]
    assert table.record.tolist() == [0, 0, 1]
    assert (report.skipped, report.windowed, report.windows) == (1, 1, 2)


def test_inputs_in_chunks_are_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*ROWS, ("w", SEQUENCE, "in", "train", "x"), ("x", "M-V", "in", "train", "x")]
    path = write(tmp_path, rows)
    cfg = DataConfig(on_bad_residue="skip", long_sequences="window", window_overlap=2, max_residues=8)
    whole, report = load_inputs(path, cfg, Labels(TaskConfig(labels=("in", "out")), "label"))
    monkeypatch.setattr("esm_neuron.data.sources.CHUNK_ROWS", 2)
    chunks = InputChunks(path, cfg, Labels(TaskConfig(labels=("in", "out")), "label"))
    for _ in range(2):
        tables = list(chunks)
        assert [table.ids for table in tables] == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "w"]]
        assert tables[3].record.tolist() == [0, 1, 1, 1]
        assert chunks.report == report
        assert [row.id for row in chunks.rejected] == ["x"]
    joined = join_tables(tables)
    for name in ("tokens", "offsets", "record", "weight", "labels"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    assert (report.rows, report.skipped, report.windows, len(joined)) == (9, 1, 3, 10)


def test_inputs_with_labels_for_evaluation(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    table, _ = load_inputs(path, DataConfig(), Labels(TaskConfig(labels=("out", "in")), "label"))
    assert table.labels.tolist() == [1, 0, 0, 1, 0, 1, 0]
    with pytest.raises(DataError, match=r"x.csv: 3 problems \(all listed\):"):
        load_inputs(path, DataConfig(), Labels(TaskConfig(labels=("out", "other")), "label"))


def test_the_demo_data() -> None:
    data = DataConfig(
        train=str(DEMO), id_column="entry", split_column="split", keep_heldout={"leaky": ["False"]}, max_residues=510
    )
    splits = load_splits(TrainConfig(data=data), Labels)
    assert splits.labels == ("Cytoplasm", "Membrane")
    assert splits.valid is not None
    assert splits.test is not None
    assert splits.reports[0].rows == 7183
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (5759, 396, 862)
    assert round(float(splits.test.labels.mean()), 3) == 0.617
    assert [report.in_train for report in splits.reports[1:]] == [0, 0, 0]
    assert int(splits.train.lengths.max()) == 512


def families(folder: Path) -> tuple[str, dict[str, str]]:
    """A file of 20 families of five proteins, a random one and its mutants, and 20 of one; row -> family."""
    rng = np.random.default_rng(0)
    rows, family = [], {}
    for number in range(40):
        founder = rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 150)
        for member in range(5 if number < 20 else 1):
            mutant = np.where(rng.random(150) < 0.1, rng.choice(list("ACDEFGHIKL"), 150), founder)
            name = f"f{number}-{member}"
            rows.append((name, "".join(mutant), "in" if number % 2 else "out", "train", str(number < 4)))
            family[name] = f"f{number}"
    return write(folder, rows), family


def test_clusters_are_sampled_whole(tmp_path: Path) -> None:
    path, family = families(tmp_path)
    wanted = {"valid_fraction": 0.2, "test_fraction": 0.1, "keep_heldout": {"leaky": ["False"]}}
    splits = load(path, sample="clusters", **wanted)
    assert (len(splits.sampled["valid"]), len(splits.sampled["test"])) == (24, 10)
    parts = [{family[name] for name in table.ids} for table in (splits.train, splits.valid, splits.test)]
    assert sum(map(len, parts)) == 40, "no family is in two splits"
    assert {"f0", "f1", "f2", "f3"} <= parts[0], "what keep_heldout leaves out is not held out"
    assert load(path, sample="clusters", **wanted).fingerprint == splits.fingerprint
    cached = load(path, sample="clusters", cache=str(tmp_path / "cache"), **wanted)
    assert cached.fingerprint == splits.fingerprint
    by_rows = load(path, valid_fraction=0.2)
    assert {family[name] for name in by_rows.train.ids} & {family[name] for name in by_rows.valid.ids}


def test_clusters_that_cannot_be_sampled_are_refused(tmp_path: Path) -> None:
    path, _ = families(tmp_path)
    with pytest.raises(ConfigError, match=r"data.sample=clusters with data.homologs=off"):
        load(path, sample="clusters", homologs="off")
    only = {"id": [f"f{n}-{m}" for n in range(20) for m in range(5)]}
    with pytest.raises(DataError, match=r"no cluster .* for validation \(100 training proteins, 20 clusters, the larg"):
        load(path, sample="clusters", keep=only, valid_fraction=0.04)
