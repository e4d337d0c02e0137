"""W&B and MLflow without the packages: what is refused, and a tracker that fails. tests/trackers has the real ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers.runs import result, step_lines
from helpers.toys import Toy

from esm_neuron.config import LogConfig
from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.run_dir import CONFIG, TRACKERS, read_trackers
from esm_neuron.training import run, trackers
from esm_neuron.training.callbacks import MetricsLine


class Failing(trackers.Tracker):
    """A service that fails from the third step on, and counts what it was asked."""

    name = "wandb"
    asked = 0

    def begin(self, known: str | None) -> None:
        self.id = known or "first"

    def put(self, numbers: Mapping[str, float], step: int) -> None:
        type(self).asked += 1
        if step > 2:
            raise ConnectionError("gone\nfor good")

    def finish(self, result: MetricsLine, status: str) -> None:
        raise ConnectionError(status)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_line_that_installs_it(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(trackers, "_has", lambda name: False)
    cfg = toy("out", log={name: "proteins"})
    with pytest.raises(
        ConfigError, match=rf"log\.{name}=proteins needs {name}; run: pip install 'esm-neuron\[{name}\]'"
    ):
        run.train(cfg)
    assert not Path(cfg.output).exists()


def test_mlflow_s_small_package_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_has", lambda name: name == "mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI names no server"):
        trackers.check(LogConfig(mlflow="proteins"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    trackers.check(LogConfig(mlflow="proteins"))


def test_a_tracker_that_fails_is_one_warning(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "_has", lambda name: True)
    monkeypatch.setattr(trackers, "WandbTracker", Failing)
    cfg = toy("out", log={"wandb": "team/proteins"})
    assert run.train(cfg).stopped_by is None
    assert len(step_lines(cfg)) == 8 and result(cfg)["test"]
    warned = [record.getMessage() for record in caplog.records]
    assert warned == ["log.wandb=team/proteins failed (gone); the run goes on, metrics.jsonl has it all"]
    assert Failing.asked == 10
    assert read_trackers(Path(cfg.output)) == {"wandb": {"id": "first", "to": "team/proteins", "url": None}}


def test_a_folder_of_that_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B keeps its runs in ./wandb, which Python takes for a package without files."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"log\.wandb=proteins needs wandb; run: "):
        trackers.check(LogConfig(wandb="proteins"))


def test_a_package_that_cannot_be_imported_is_refused_and_the_run_has_not_begun(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Failing):
        def begin(self, known: str | None) -> None:
            raise ImportError("no protobuf")

    monkeypatch.setattr(trackers, "_has", lambda name: True)
    monkeypatch.setattr(trackers, "WandbTracker", Broken)
    cfg = toy("out", log={"wandb": "proteins"})
    with pytest.raises(
        ConfigError, match=r"log\.wandb=proteins: cannot be imported \(no protobuf\); install wandb anew"
    ):
        run.train(cfg)
    assert not (Path(cfg.output) / CONFIG).exists()


def test_a_password_in_the_server_s_address_is_not_told(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    def ask() -> None:
        raise ConnectionError("request to http://me:secret@127.0.0.1:5000/api failed")

    Failing(toy("out"), "proteins").attempt(ask)
    assert "http://***@127.0.0.1:5000/api failed" in caplog.text and "secret" not in caplog.text


def test_nothing_is_imported_or_written_that_nobody_asked_for(toy: Toy) -> None:
    cfg = toy("out", loop={"max_steps": 1})
    run.train(cfg)
    assert not {"wandb", "mlflow"} & set(sys.modules)
    assert not (Path(cfg.output) / TRACKERS).exists()


def test_a_damaged_list_of_trackers_is_named(tmp_path: Path) -> None:
    (tmp_path / TRACKERS).write_text('{"wandb": {"id": 3}}')
    with pytest.raises(CheckpointError, match=r"trackers\.json: .*; remove it"):
        read_trackers(tmp_path)
