"""What a resumed run may change: what chooses proteins, as long as it chooses the same; nothing that computes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.intake import protein
from helpers.toys import Toy

from esm_neuron.config import COMPARED_BY_CONTENT, DataConfig, TrainConfig
from esm_neuron.data.splits import load_splits
from esm_neuron.errors import CheckpointError
from esm_neuron.inference.load import MAY_CHANGE
from esm_neuron.tasks import task_class
from esm_neuron.training import run
from esm_neuron.training.checkpoint import check_identity


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 proteins of 40 to 59 residues with columns for every way to choose among them."""
    path = tmp_path_factory.mktemp("identity") / "all.csv"
    lines = ["id,sequence,label,part,held,kind,group,other,name"]
    for i in range(60):
        part = ("train", "train", "train", "valid", "test")[i % 5]
        sequence, label, other = protein(i, 40 + i % 20), "ab"[i // 5 % 2], "xy"[i // 10 % 2]
        lines.append(f"p{i},{sequence},{label},{part},{str(part == 'valid').lower()},a,{i // 2},{other},q{i}")
    path.write_text("\n".join(lines) + "\n")
    return path


def identity(table: Path, **data: Any) -> dict[str, Any]:
    """The identity of a run on the proteins that `data` chooses."""
    cfg = TrainConfig(data=DataConfig(train=str(table), **{"split_column": "part", **data}))
    splits = load_splits(cfg, task_class(cfg.task.name).label_kind)
    return run.identity(replace(cfg, task=splits.task), splits.fingerprint, "base")


SAME: list[dict[str, Any]] = [
    {"max_rows": 36},
    {"max_rows": 10_000},
    {"unique_column": "id"},
    {"test_fraction": 0.2},  # the column has test proteins
    {"valid_fraction": 0.3},
    {"sample": "clusters"},
    {"homologs": "off"},
    {"keep": {"kind": ["a"]}},
    {"keep_heldout": {"kind": ["a"]}},
    {"split_names": (("train", "more"), "valid", "test")},
    {"min_residues": 40},
    {"on_missing": "skip"},
    {"on_bad_residue": "skip"},
]
OTHER: list[dict[str, Any]] = [
    {"max_rows": 35},
    {"unique_column": "group"},
    {"split_column": None},
    {"split_column": None, "test_fraction": 0.2},
    {"split_column": None, "valid_column": "held"},  # its test proteins are for training
    {"split_column": "group", "fold": 3},
    {"keep": {"other": ["x"]}},
    {"keep_heldout": {"other": ["x"]}},
    {"split_names": ("valid", "train", "test")},
    {"min_residues": 41},
    {"label_column": "other"},
    {"id_column": "name"},
]


@pytest.mark.parametrize("data", SAME, ids=str)
def test_the_same_proteins_chosen_otherwise_are_the_same_run(table: Path, data: dict[str, Any]) -> None:
    check_identity(identity(table), identity(table, **data), Path("out"))


@pytest.mark.parametrize("data", OTHER, ids=str)
def test_other_proteins_are_another_run(table: Path, data: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="another run: data was "):
        check_identity(identity(table), identity(table, **data), Path("out"))


@pytest.mark.parametrize("data", [{"sample": "clusters"}, {"valid_fraction": 0.2}, {"test_fraction": 0.1}], ids=str)
def test_sampling_otherwise_is_another_run_where_proteins_are_sampled(table: Path, data: dict[str, Any]) -> None:
    plain = {"split_column": None, "valid_fraction": 0.3}
    with pytest.raises(CheckpointError, match="data was "):
        check_identity(identity(table, **plain), identity(table, **{**plain, **data}), Path("out"))


@pytest.mark.parametrize(
    "data", [{"packing": False}, {"pack_tokens": 2048}, {"max_segments": 8}, {"long_sequences": "window"}], ids=str
)
def test_what_computes_must_be_the_same_with_the_same_proteins(table: Path, data: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=rf"another run: data.{next(iter(data))} was "):
        check_identity(identity(table), identity(table, **data), Path("out"))


def test_what_is_compared_by_content_are_settings_and_none_that_cuts_or_packs() -> None:
    names = {field.name for field in fields(DataConfig)}
    assert names >= COMPARED_BY_CONTENT
    rest = {"cache", "homologs", "packing", "pack_tokens", "max_segments"}
    assert names - COMPARED_BY_CONTENT - rest == {"max_residues", "long_sequences", "window_overlap"}
    computes = {name.removeprefix("data.") for name in MAY_CHANGE["predict"]} & names - COMPARED_BY_CONTENT
    assert computes == {"packing", "pack_tokens", "max_segments", "max_residues", "long_sequences", "window_overlap"}


def test_a_table_with_other_names_of_columns_goes_on(toy: Toy, tmp_path: Path) -> None:
    cfg = toy(loop={"max_steps": 2})
    run.train(cfg, str)
    files = {}
    for split in ("train", "valid", "test"):
        header, *rows = Path(str(getattr(cfg.data, split))).read_text().splitlines()
        files[split] = str(tmp_path / f"renamed-{split}.tsv")
        lines = [header.replace("id", "name").replace("label", "class"), *rows]
        Path(files[split]).write_text("\n".join(lines).replace(",", "\t") + "\n")
    data = replace(cfg.data, **files, id_column="name", label_column="class")
    said: list[str] = []
    run.train(replace(cfg, data=data, checkpoint=replace(cfg.checkpoint, resume="auto")), said.append)
    assert any("resumed after step 2 of 2" in line for line in said)
