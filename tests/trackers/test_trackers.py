"""The real wandb, in its offline mode, and an MLflow server on loopback: `make test-trackers`."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from helpers.runs import result, step_lines
from helpers.signals import stopping_after
from helpers.toys import Toy

from esm_neuron.config import TrainConfig
from esm_neuron.errors import ConfigError
from esm_neuron.reports import write_report
from esm_neuron.run_dir import TRACKERS, read_trackers
from esm_neuron.training import run
from esm_neuron.training.callbacks import Callback
from esm_neuron.training.trackers import MlflowTracker

if TYPE_CHECKING:
    from conftest import Server

pytestmark = pytest.mark.trackers


class After(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_log(self, step: int, total: int, record: Any) -> None:
        if step == self.step:
            self.action()


def resumed(cfg: TrainConfig) -> TrainConfig:
    return replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("esm_neuron")]


# --- Weights & Biases


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, asked: list[str], tmp_path: Path) -> Iterator[list[str]]:
    """wandb without an account; what it asked of the network."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of the user
    yield asked
    wandb.teardown()


def kept(folder: Path) -> list[Any]:
    """Records of an offline run, from its file: LevelDB's log of pieces, each with a sum, a size and a kind."""
    from wandb.proto import wandb_internal_pb2

    [file] = folder.glob("*.wandb")
    data, found, at, whole = file.read_bytes(), [], 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of a record, or its last piece
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def history(records: list[Any], name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric."""
    rows = [
        {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    return [(int(row["step"]), float(row[name])) for row in rows if name in row]


def test_wandb_offline_has_settings_metrics_result_and_report_and_a_resumed_run_goes_on(
    toy: Toy, offline: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, said = toy("out", log={"wandb": "team/proteins", "every": 1}), list[str]()
    with stopping_after(5):
        assert run.train(cfg, said.append).stopped_by == "SIGTERM"
    named = read_trackers(Path(cfg.output))["wandb"]
    assert named["to"] == "team/proteins" and named["url"] is None
    assert f"log.wandb: offline; send it with: wandb sync {cfg.output}/wandb/offline-run-" in "\n".join(said)
    again = run.train(resumed(cfg), said.append)
    assert again.stopped_by is None and read_trackers(Path(cfg.output))["wandb"] == named
    first, second = (kept(folder) for folder in sorted(Path(cfg.output, "wandb").glob("offline-run-*")))
    for records in (first, second):
        [begun] = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert (begun.run_id, begun.entity, begun.project, begun.display_name) == (
            named["id"],
            "team",
            "proteins",
            "out",
        )
        assert '"name":"tiny"' in {item.key: item.value_json for item in begun.config.update}["model"]
    logged = {line["step"]: line["loss"] for line in step_lines(cfg)}
    assert history(first, "train/loss") == [(step, logged[step]) for step in range(1, 6)]
    assert history(second, "train/loss") == [(step, logged[step]) for step in range(6, 9)]
    assert [step for step, _ in history(second, "valid/mcc")] == [8]
    [failed], [done] = (
        [r.exit.exit_code for r in of if r.WhichOneof("record_type") == "exit"] for of in (first, second)
    )
    assert failed and not done
    summary = {item.key: item.value_json for record in second for item in record.summary.update if item.key}
    assert float(summary["final/test/mcc"]) == result(cfg)["test"]["mcc"]
    assert list(Path(cfg.output, "wandb").glob("offline-run-*/files/media/html/report*.html"))
    assert offline == [] and "wandb:" not in "".join(capsys.readouterr())


def test_wandb_s_process_may_die_in_the_middle(toy: Toy, offline: list[str], caplog: pytest.LogCaptureFixture) -> None:
    cfg = toy("out", log={"wandb": "proteins"})

    def kill() -> None:
        for status in Path("/proc").glob("[0-9]*/status"):
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            if fields["Name"].strip() == "wandb-core" and int(fields["PPid"]) == os.getpid():
                os.kill(int(status.parent.name), signal.SIGKILL)
                return
        raise AssertionError("no wandb-core")

    assert run.train(cfg, watchers=[After(3, kill)]).stopped_by is None
    assert len(step_lines(cfg)) == 8 and result(cfg)["test"]
    [warned] = warnings(caplog)
    assert warned.startswith("log.wandb=proteins failed (") and "\n" not in warned


def test_wandb_without_a_key_is_refused_with_the_cure(
    toy: Toy, offline: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    cfg = toy("out", log={"wandb": "proteins"})
    with pytest.raises(ConfigError, match=r"log\.wandb=proteins: .*; run: wandb login, or WANDB_MODE=offline"):
        run.train(cfg)
    assert not Path(cfg.output, "config.yaml").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")  # the cure, in the same process as in a notebook
    run.train(cfg)
    assert read_trackers(Path(cfg.output))["wandb"]["url"] is None


def test_a_wandb_server_that_is_away_at_the_start_costs_no_run(
    toy: Toy, offline: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    cfg = toy("out", log={"wandb": "proteins"})
    assert run.train(cfg).stopped_by is None
    assert result(cfg)["test"] and len(warnings(caplog)) == 1 and "a" * 40 not in caplog.text


# --- MLflow


def of(server: Server, cfg: TrainConfig) -> tuple[Any, Any]:
    """A client, and what the server has of the run."""
    import mlflow

    client = mlflow.MlflowClient(server.address)
    return client, client.get_run(read_trackers(Path(cfg.output))["mlflow"]["id"])


def steps(client: Any, found: Any, name: str) -> list[tuple[int, float]]:
    return sorted((each.step, each.value) for each in client.get_metric_history(found.info.run_id, name))


def test_mlflow_has_settings_metrics_result_and_report_and_a_resumed_run_goes_on(
    toy: Toy, server: Server, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, said = toy("out", log={"mlflow": "proteins"}), list[str]()
    with stopping_after(5):
        assert run.train(cfg, said.append).stopped_by == "SIGTERM"
    named = read_trackers(Path(cfg.output))["mlflow"]
    assert f"log.mlflow: {named['url']}" in said and named["url"].startswith(f"{server.address}/#/experiments/")
    client, found = of(server, cfg)
    assert (found.info.status, found.info.run_name) == ("KILLED", "out")
    assert found.data.params["model.name"] == "tiny" and found.data.params["data.train"] == cfg.data.train
    run.train(resumed(cfg), said.append)
    client, found = of(server, cfg)
    assert found.info.status == "FINISHED" and found.info.run_id == named["id"]
    assert len(client.search_runs([found.info.experiment_id])) == 1
    assert steps(client, found, "train/loss") == [(line["step"], line["loss"]) for line in step_lines(cfg)]
    assert [step for step, _ in steps(client, found, "valid/mcc")] == [4, 8]
    assert found.data.metrics["final/test/mcc"] == result(cfg)["test"]["mcc"]
    assert {each.path for each in client.list_artifacts(found.info.run_id)} == {"config.yaml", "report", "result.json"}
    assert "report/index.html" in {each.path for each in client.list_artifacts(found.info.run_id, "report")}
    assert named["url"] in write_report(Path(cfg.output)).read_text()
    assert asked == [] and server.address not in capsys.readouterr().out


@pytest.mark.parametrize("gone", ["deleted", "of another server"])
def test_a_run_that_is_not_there_any_more_is_told_with_the_cure_which_begins_a_new_one(
    toy: Toy, server: Server, caplog: pytest.LogCaptureFixture, gone: str
) -> None:
    cfg, path = toy("out", log={"mlflow": "again"}), Path(toy("out").output, TRACKERS)
    with stopping_after(3):
        run.train(cfg)
    first = json.loads(path.read_text())
    if gone == "deleted":
        of(server, cfg)[0].delete_run(first["mlflow"]["id"])
    else:
        path.write_text(json.dumps({"mlflow": {**first["mlflow"], "id": "0" * 32}}))
    with stopping_after(5):
        run.train(resumed(cfg))
    [warned] = warnings(caplog)
    assert warned.startswith("log.mlflow=again failed (") and f"take 'mlflow' out of {path}" in warned
    path.write_text("{}")  # the cure
    assert run.train(resumed(cfg)).stopped_by is None and warnings(caplog) == [warned]
    client, found = of(server, cfg)
    assert found.info.run_id != first["mlflow"]["id"] and found.info.status == "FINISHED"
    assert [step for step, _ in steps(client, found, "train/loss")] == [6, 7, 8]
    assert found.data.metrics["final/test/mcc"] == result(cfg)["test"]["mcc"]


def test_a_run_that_is_half_begun_is_ended_there(
    toy: Toy, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no parameters")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", refuse)
    cfg = toy("out", log={"mlflow": "half"})
    assert run.train(cfg).stopped_by is None
    assert warnings(caplog) == ["log.mlflow=half failed (no parameters); the run goes on, metrics.jsonl has it all"]
    client = mlflow.MlflowClient(server.address)
    [found] = client.search_runs([client.get_experiment_by_name("half").experiment_id])
    assert found.info.status == "FAILED" and not Path(cfg.output, TRACKERS).exists()


def test_wandb_s_run_is_ended_where_mlflow_is_refused_after_it(
    toy: Toy, offline: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(MlflowTracker, "begin", mock.Mock(side_effect=ImportError("no protobuf")))
    cfg = toy("out", log={"wandb": "proteins", "mlflow": "proteins"})
    with pytest.raises(ConfigError, match=r"log\.mlflow=proteins: cannot be imported"):
        run.train(cfg)
    import wandb

    assert wandb.run is None
    [folder] = Path(cfg.output, "wandb").glob("offline-run-*")
    assert [r.exit.exit_code for r in kept(folder) if r.WhichOneof("record_type") == "exit"] == [1]


def test_what_a_server_that_came_back_has_missed_is_sent(
    toy: Toy, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = toy("out", log={"mlflow": "back"})
    assert run.train(cfg, watchers=[After(2, server.stop), After(6, server.start)]).stopped_by is None
    client, found = of(server, cfg)
    assert steps(client, found, "train/loss") == [(line["step"], line["loss"]) for line in step_lines(cfg)]
    assert [step for step, _ in steps(client, found, "valid/mcc")] == [4, 8] and found.info.status == "FINISHED"
    assert len(warnings(caplog)) == 1


def test_a_server_that_goes_for_good_costs_no_run(toy: Toy, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    cfg = toy("out", log={"mlflow": "gone"})
    assert run.train(cfg, watchers=[After(2, server.stop)]).stopped_by is None
    assert len(step_lines(cfg)) == 8 and result(cfg)["test"]
    [warned] = warnings(caplog)
    assert warned.startswith("log.mlflow=gone failed (") and warned.endswith(
        "; the run goes on, metrics.jsonl has it all"
    )


def test_a_run_that_fails_is_ended_there_as_failed(toy: Toy, server: Server) -> None:
    cfg = toy("out", log={"mlflow": "failed"})
    with (
        mock.patch.object(run, "_finish", side_effect=RuntimeError("no end")),
        pytest.raises(RuntimeError, match="no end"),
    ):
        run.train(cfg)
    assert of(server, cfg)[1].info.status == "FAILED"
