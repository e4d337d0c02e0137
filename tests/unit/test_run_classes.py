"""A run whose config.yaml was changed by hand gives no prediction under another class's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.finished import LABELS, finish

from esm_neuron import cli
from esm_neuron.errors import CheckpointError
from esm_neuron.inference.load import read_run


@pytest.mark.parametrize(
    ("kind", "adapter"), [("mean", "lora"), ("mean", "none"), ("multi_label_cls", "lora"), ("residues", "head")]
)
def test_swapped_classes_are_refused(
    tmp_path: Path, kind: str, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(tmp_path / "run", kind, adapter)
    config = tmp_path / "run" / "config.yaml"
    whole = config.read_text()
    assert read_run(tmp_path / "run")[0].task.labels == LABELS
    first, second, third = LABELS
    for other in ((second, first, third), (first, second), (*LABELS, "more"), (first, second, "third")):
        lines = "".join(f"  - {label}\n" for label in LABELS)
        assert lines in whole
        config.write_text(whole.replace(lines, "".join(f"  - {label}\n" for label in other)))
        with pytest.raises(CheckpointError, match=r"config.yaml: task.labels are not the classes of the weights"):
            read_run(tmp_path / "run")
    (tmp_path / "in.csv").write_text("id,sequence\np,MKV\n")
    words = ["predict", "--model", str(tmp_path / "run"), "--input", str(tmp_path / "in.csv")]
    assert cli.main([*words, "--output", str(tmp_path / "out.csv")]) == 2
    assert "put them back" in capsys.readouterr().err
    config.write_text(whole)
    assert cli.main([*words, "--output", str(tmp_path / "out.csv")]) == 0


@pytest.mark.parametrize("kind", ["regression_mean", "masked_lm"])
def test_tasks_without_classes_have_none_to_compare(tmp_path: Path, kind: str) -> None:
    for adapter in ("lora", "none"):
        finish(tmp_path / adapter, kind, adapter)
        assert read_run(tmp_path / adapter)[0].task.labels is None


def test_a_run_of_an_earlier_version_has_no_list_of_classes(tmp_path: Path) -> None:
    finish(tmp_path / "run", "mean", "lora")
    reference = tmp_path / "run" / "adapter" / "base_reference.json"
    reference.write_text(reference.read_text().replace('"labels"', '"others"'))
    assert read_run(tmp_path / "run")[0].task.labels == LABELS
