"""Callbacks: lines a log scraper can read, a metrics file without doubles, early stopping that survives a resume."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import re
import resource
from pathlib import Path

import pytest

from esm_neuron.errors import CheckpointError
from esm_neuron.training.callbacks import EarlyStopping, JsonlLogger, ProgressConsole
from esm_neuron.training.trackers import TensorBoardLogger

RECORD = {"loss": 0.61234, "lr": 3e-4, "grad_norm": 1.234, "residues_per_second": 1234.4, "graphs": 0}


class Stream(io.StringIO):
    """A text stream that keeps every write apart and may call itself a terminal."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.tty = tty
        self.writes: list[str] = []

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def test_plain_lines_are_one_write_each_and_match_metric_regexes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esm_neuron.training.callbacks.monotonic", iter([0.0, 60.0]).__next__)
    stream = Stream(tty=False)
    console = ProgressConsole(stream=stream)
    console.on_log(120, 500, RECORD)
    console.on_eval(120, {"split": "valid", "n": 300, "accuracy": 0.71, "accuracy_ci": [0.6, 0.8], "auroc": None})
    console.on_end({})
    assert stream.writes == [
        "step=120/500 loss=0.6123 lr=3.0e-04 grad_norm=1.23 residues_per_second=1234 eta=00:03:10\n",
        "eval step=120 split=valid n=300 accuracy=0.7100\n",
    ]
    assert re.search(r"lr=([0-9.e+-]+)", stream.writes[0]).group(1) == "3.0e-04"  # type: ignore[union-attr]


def test_the_time_left_leaves_compilation_out_once_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esm_neuron.training.callbacks.monotonic", iter([0.0, 100.0, 110.0, 130.0]).__next__)
    stream = Stream(tty=False)
    console = ProgressConsole(start=100, stream=stream)
    for step in (110, 120, 140):  # the first ten steps take 100 s, every later one 1 s
        console.on_log(step, 200, {})
    lines = [line for line in stream.writes if "eta=" in line]
    assert [line.rsplit("eta=")[1].strip() for line in lines] == ["00:15:00", "00:01:20", "00:01:00"]


def test_the_minutes_to_come_are_told_after_the_first_steps_and_when_they_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the first ten steps compile, the last ones wait for validations
    times = [0.0, 300.0, 310.0, 320.0, 330.0, 1530.0, 99999.0]
    monkeypatch.setattr("esm_neuron.training.callbacks.monotonic", iter(times).__next__)
    stream = Stream(tty=False)
    console = ProgressConsole(stream=stream)
    for step in (10, 20, 30, 40, 50, 500):  # of the last step nothing is to come
        console.on_log(step, 500, {})
    told = [(number, line) for number, line in enumerate(stream.writes) if line.startswith("expected")]
    assert told == [
        (1, "expected: 8 min for the 480 steps to come\n"),
        (5, "expected: 231 min for the 450 steps to come\n"),
    ]


def test_a_terminal_gets_a_bar_with_the_time_left_that_starts_where_the_run_does() -> None:
    stream = Stream(tty=True)
    console = ProgressConsole(start=40, stream=stream)
    console.on_log(50, 100, RECORD)
    console.on_eval(50, {"split": "valid", "mcc": 0.35})
    console.on_log(100, 100, RECORD)
    console.on_end({})
    text = stream.getvalue()
    assert "100/100" in text
    assert "40/100" in text
    assert "loss=0.6123" in text
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", text), "elapsed<left"
    assert "eval step=50 split=valid mcc=0.3500\n" in text


def test_metrics_file_has_one_json_line_a_record_and_null_for_nan(tmp_path: Path) -> None:
    log = JsonlLogger(tmp_path / "new" / "metrics.jsonl")
    log.on_log(10, 20, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    log.on_eval(10, {"split": "valid", "mcc": None, "mcc_ci": [float("-inf"), 1.0]})
    log.on_end({})
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert lines == [
        {"step": 10, "loss": None, "grad_norm": None, "lr": 0.1},
        {"step": 10, "split": "valid", "mcc": None, "mcc_ci": [None, 1.0]},
    ]


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlLogger(path)
    first.truncate_after(0)  # nothing there yet
    assert not path.exists()
    for step in (10, 20, 30):
        first.on_log(step, 50, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed here
    resumed = JsonlLogger(path)
    resumed.truncate_after(20)
    for step in (30, 40, 50):
        resumed.on_log(step, 50, {"loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30, 40, 50]
    resumed.truncate_after(40, pending=[20])  # of which a checkpoint says that it is still to be written
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 30, 40]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_the_disk_does_not_take_whole_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        JsonlLogger(Path("/dev/full")).on_log(1, 2, RECORD)
    path = tmp_path / "metrics.jsonl"

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))  # room for one line and a part of the next
        log = JsonlLogger(path)
        log.on_log(1, 2, RECORD)
        try:
            log.on_log(2, 2, RECORD)
        except OSError as error:
            os._exit(7 if str(path) in str(error) else 8)

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    process.join(60)
    assert process.exitcode == 7
    JsonlLogger(path).truncate_after(2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


@pytest.mark.parametrize(
    "damaged", [b"not json\n", b'["step"]\n', b'{"loss": 1}\n', b'{"step": null}\n', b'{"step": 2, "lo\xf3s": 1}\n']
)
def test_a_damaged_metrics_file_is_named_by_line(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: not a JSON object with a step"):
        JsonlLogger(path).truncate_after(5)


def test_tensorboard_gets_scalars_by_group(tmp_path: Path) -> None:
    log = TensorBoardLogger(tmp_path)
    log.on_log(10, 20, RECORD)
    log.on_eval(10, {"split": "valid", "mcc": 0.35, "mcc_ci": [0.3, 0.4], "auroc": None})
    log.on_end({})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in RECORD} | {"valid/mcc"}
    assert [(e.step, e.value) for e in events.Scalars("valid/mcc")] == [(10, pytest.approx(0.35))]


def test_an_event_file_that_cannot_be_ended_leaves_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = TensorBoardLogger(tmp_path)

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(log.writer, "flush", full)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
            log.on_log(1, 2, RECORD)
        patched.setattr(log.writer, "close", full)
        log.on_end({})
    assert f"{tmp_path}: the last values could not be written (No space left on device)" in caplog.text
    log.on_end({})


def test_early_stopping_keeps_the_best_and_stops_after_its_patience() -> None:
    stopping = EarlyStopping(patience=2, greater_is_better=True)
    seen = [(0.3, 10), (0.5, 20), (0.5, 30), (float("nan"), 40)]
    assert [stopping.update(value, step) for value, step in seen] == [True, True, False, False]
    assert (stopping.best, stopping.best_step, stopping.stop) == (0.5, 20, True)
    falling = EarlyStopping(patience=0, greater_is_better=False)
    assert [falling.update(v, 0) for v in (None, 2.0, 3.0, 1.0, 1.5)] == [False, True, False, True, False]
    assert not falling.stop


def test_among_equal_validations_the_lowest_loss_is_the_best_and_is_progress() -> None:
    """As macro-F1 stays at 0 while the loss falls: before, the least trained weights were kept and the run stopped."""
    stopping = EarlyStopping(patience=2, greater_is_better=True)
    losses = [0.58, 0.55, 0.51, 0.53, 0.50]
    assert [stopping.update(0.0, 10 * i, loss) for i, loss in enumerate(losses)] == [True, True, True, False, True]
    assert (stopping.best_step, stopping.ties, stopping.stop) == (40, 4, False)
    assert stopping.remarks("macro_f1") == [
        "5 validations have the best macro_f1, 0.0000; step 40 has the lowest loss of them"
    ]
    assert stopping.update(0.1, 50, 0.9)
    assert not stopping.update(0.0, 60, 0.1)
    assert (stopping.best_step, stopping.ties) == (50, 0)


def test_patience_waits_while_the_loss_falls() -> None:
    """A metric that jumps about on few proteins stopped runs whose validation loss was still falling."""
    stopping = EarlyStopping(patience=2, greater_is_better=True)
    for step, (mcc, loss) in enumerate([(0.3, 0.9), (0.2, 0.8), (0.1, 0.7), (0.2, 0.6), (0.25, 0.65)]):
        stopping.update(mcc, step, loss)
        assert not stopping.stop
    assert stopping.best_step == 0, "the best by the metric is exported all the same"
    stopping.update(0.2, 5, 0.66)
    assert stopping.stop, "two without a better metric and without a lower loss"


def test_the_last_line_is_of_the_chosen_step() -> None:
    """SageMaker's tuner takes the value that a job printed last, which is not the best validation's."""
    stream = io.StringIO()
    console = ProgressConsole(stream=stream)
    console.on_eval(10, {"split": "valid", "mcc": 0.5})
    console.on_eval(20, {"split": "valid", "mcc": 0.4})
    console.on_end({"chosen_step": 10, "valid": {"mcc": 0.5, "mcc_ci": [0.4, 0.6]}})
    assert stream.getvalue().splitlines()[-1] == "eval step=10 split=valid mcc=0.5000"


def test_early_stopping_goes_on_where_a_checkpoint_left_it() -> None:
    before = EarlyStopping(patience=2, greater_is_better=True)
    before.update(0.5, 10, 1.25)
    before.update(0.4, 20)
    after = EarlyStopping(patience=2, greater_is_better=True)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after == before
    assert [before.stop, after.update(0.1, 30), after.stop, after.best_step] == [False, False, True, 10]


def test_a_checkpoint_that_knew_no_losses_is_gone_on_from() -> None:
    stopping = EarlyStopping(patience=2, greater_is_better=True)
    stopping.load_state_dict({"best": 0.5, "best_step": 10, "bad": 1})
    assert not stopping.update(0.5, 20, 0.1)
    assert (stopping.best_step, stopping.bad) == (10, 2)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"best": 1.0, "best_loss": 1.0, "best_step": None, "ties": 0, "bad": 0},
        {"best": "1", "best_loss": 1.0, "best_step": 2, "ties": 0, "bad": 0},
        {"best": 1.0, "best_loss": 1.0, "best_step": "../x", "ties": 0, "bad": 0},
        {"best": 1.0, "best_loss": [1.0], "best_step": 2, "ties": 0, "bad": 0},
    ],
)
def test_a_state_that_is_none_of_early_stopping_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="no valid `stopper`"):
        EarlyStopping(1, True).load_state_dict(state)
