"""A run whose config.yaml was changed by hand gives no prediction under another class's name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.finished import LABELS, finish
from safetensors.torch import load_file, save_file

from esm_neuron import cli
from esm_neuron.backends import create_backend
from esm_neuron.config import settings
from esm_neuron.errors import CheckpointError
from esm_neuron.inference.load import build_trained, read_run


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


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_weights_that_were_changed_since_are_refused(
    tmp_path: Path, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(tmp_path / "run", "mean", adapter)
    place, key = ("adapter", "adapter") if adapter == "lora" else ("model", "sha256")
    folder = tmp_path / "run" / place
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, path, {"format": "pt"})
    (tmp_path / "in.csv").write_text("id,sequence\np,MKV\n")
    words = ["predict", "--model", str(tmp_path / "run"), "--input", str(tmp_path / "in.csv")]
    assert cli.main([*words, "--output", str(tmp_path / "out.csv")]) == 2
    told = capsys.readouterr().err
    reference = folder / "base_reference.json"
    said = json.loads(reference.read_text())
    reference.write_text(json.dumps({name: value for name, value in said.items() if name != key}))
    assert cli.main([*words, "--output", str(tmp_path / "out.csv")]) == 2  # damage that takes the sum away is damage
    assert key in capsys.readouterr().err
    said[key] = re.search(rf"make {key} in {reference} (\w+)", told)[1]  # type: ignore[index]  # as it says
    reference.write_text(json.dumps(said))
    assert cli.main([*words, "--output", str(tmp_path / "out.csv")]) == 0


@pytest.mark.parametrize("field", ["layer_norm_eps", "token_dropout"])
def test_a_base_of_another_configuration_is_refused(tmp_path: Path, field: str) -> None:
    """Its weights are the same and fit, and it computes another thing."""
    finish(tmp_path / "run", "mean", "lora")
    path = tmp_path / "run" / "base" / "config.json"
    config = json.loads(path.read_text())
    config[field] = {"layer_norm_eps": 0.1, "token_dropout": False}[field]
    path.write_text(json.dumps(config))
    cfg, task = read_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"was trained on a base whose config.json had {field} "):
        build_trained(cfg, task, create_backend(cfg))


def test_metrics_are_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model", "run", "--input", "in.csv", "--output", str(tmp_path / "m.csv")]
    assert cli.main(words) == 2
    assert "metrics are JSON; name a .json file" in capsys.readouterr().err


def test_the_settings_of_a_run_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them is half of what `predict` of one protein does beside its imports."""
    finish(tmp_path / "run", "mean", "lora")
    asked: list[Sequence[str]] = []
    plain = settings._parsed
    monkeypatch.setattr(settings, "_parsed", lambda words, *more: asked.append(words) or plain(words, *more))
    (tmp_path / "in.fasta").write_text(">a\nMKVLA\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "--model", "run", "--input", "in.fasta", "--output", "p.csv"]) == 0
    assert len(asked) == 1
