"""A task is one class and one row of a table: a task that the package does not know passes through every command."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import dummy_task
from huggingface_hub import ModelCard

from esm_neuron import cli
from esm_neuron.config import TrainConfig, settings
from esm_neuron.tasks import TASKS, task_class

Toy = Callable[..., TrainConfig]
FAMILIES = {"alpha": "barrel.1", "beta": "sheet.2"}


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one row of the one table."""
    for name, found in dummy_task.ROW.items():
        monkeypatch.setitem(TASKS, name, found)


@pytest.fixture
def configured(toy: Toy) -> TrainConfig:
    """A quick run of the dummy task."""
    cfg = toy(task={"name": "fold_family"}, loop={"max_steps": 4, "eval_every": 2}, optim={"lr": 1e-3})
    for path in map(Path, (str(cfg.data.train), str(cfg.data.valid), str(cfg.data.test))):
        text = path.read_text()
        for label, family in FAMILIES.items():
            text = text.replace(f",{label}\n", f",{family}\n")
        path.write_text(text)
    return cfg


def walk_on_cpu(config: Path, proteins: Path) -> str:
    for words in dummy_task.commands(config, proteins):
        assert cli.main(words) == 0, words
    return ""


def walk_on_xla(config: Path, proteins: Path) -> str:
    """In a process of its own: torch_xla is set up once per process."""
    environment = os.environ | {"PJRT_DEVICE": "CPU", "USE_TORCH_XLA": "0"}
    words = [sys.executable, str(dummy_task.__file__), str(config), str(proteins)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * 7, done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("backend", ["cpu", pytest.param("xla", marks=pytest.mark.xla)])
def test_a_new_task_passes_through_every_command(
    backend: str, configured: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(settings.dump(configured).replace("backend: cpu", f"backend: {backend}"))
    proteins = Path(str(configured.data.test))
    printed = (walk_on_cpu if backend == "cpu" else walk_on_xla)(config, proteins) or capsys.readouterr().out
    assert "labels: 2: barrel 10, sheet 10" in printed and "faults: none" in printed
    run = Path(configured.output)
    result = json.loads((run / "result.json").read_text())
    assert (result["task"], result["metric"], result["backend"]) == ("fold_family", "share_wrong", backend)
    assert set(result["baselines"]["test"]) == {"first family"}
    assert result["baselines"]["test"]["first family"]["share_wrong"] == 0.5
    again = json.loads((run / "metrics.json").read_text())
    assert again["share_wrong"] == result["test"]["share_wrong"] and len(again["share_wrong_ci"]) == 2
    with (run / "predicted.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and {row["family"] for row in rows} <= {"barrel", "sheet"}
    page = (run / "report" / "index.html").read_text()
    for expected in ("share wrong", "fold family", "first family", "Share of wrong families by length"):
        assert expected in page
    assert (run / "report" / "comparison.png").is_file()
    card = ModelCard.load(run / "exported" / "README.md")
    assert "fine-tuned for the family of a fold" in card.text and "first family" in card.text
    exported = json.loads((run / "exported" / "config.json").read_text())
    assert exported["id2label"] == {"0": "barrel", "1": "sheet"}


def test_its_labels_and_settings_are_its_own(
    configured: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(settings.dump(configured))
    words = ["train", "--config", str(config)]
    assert cli.main([*words, "--task.focal_gamma=1"]) == 2
    assert "task.focal_gamma=1.0 has no effect on fold_family; leave it out" in capsys.readouterr().err
    assert cli.main([*words, "--task.name=fold_famly"]) == 2
    assert "task.name='fold_famly' is no task; did you mean fold_family?" in capsys.readouterr().err
    path = Path(str(configured.data.train))
    path.write_text(path.read_text().replace("barrel.1", "barrel", 1))
    assert cli.main(words) == 2
    assert "column 'label' of '0-0': 'barrel' has no dot; write FAMILY.NUMBER" in capsys.readouterr().err
    assert not Path(configured.output, "config.yaml").exists()


@pytest.mark.parametrize("name", TASKS)
def test_every_row_names_a_task(name: str) -> None:
    task = task_class(name)
    assert task.summary and task.compared and task.metric
