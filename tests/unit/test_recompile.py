"""The guard of static shapes, on made-up batches and a counter that the test moves."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from esm_neuron.backends.cpu import CpuBackend
from esm_neuron.config import OnRecompile, TrainConfig
from esm_neuron.data.dataset import Batch
from esm_neuron.data.loader import EvalLoader
from esm_neuron.errors import ConfigError
from esm_neuron.metrics import Value
from esm_neuron.training import run
from esm_neuron.training.monitors import RecompileGuard
from esm_neuron.training.trainer import Trainer


def batch(rows: int = 4, tokens: int = 128, segments: int = 6, weights: torch.dtype = torch.float32) -> Batch:
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    labels = torch.zeros(rows, segments, dtype=torch.int64)
    members = np.full((rows, segments), -1)
    return Batch(ids, ids, ids, labels, labels.to(weights), members, segments)


def test_a_training_under_neuron_parallel_compile_is_refused(
    toy: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURON_EXTRACT_GRAPHS_ONLY", "1")
    with pytest.raises(ConfigError, match="use `compile` instead of `train`"):
        run.train(toy())
    assert not Path(toy().output).exists()


def test_a_backend_that_compiles_nothing_says_so(toy: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="backend=cpu compiles nothing"):
        run.compile_graphs(toy())


class Run:
    """Steps that compile as many graphs as the test says."""

    def __init__(self, on_recompile: OnRecompile = "error") -> None:
        self.graphs, self.step = 3, 0
        self.guard = RecompileGuard(on_recompile, lambda: self.graphs, 128)

    def __call__(self, compiled: int, *batches: Batch) -> None:
        self.guard.begin()
        self.graphs += compiled
        self.guard.end(self.step, batches or (batch(),))
        self.step += 1

    def validate(self, compiled: int) -> None:
        self.guard.begin()
        self.graphs += compiled
        self.guard.end_validation(self.step)


def test_the_first_two_validations_may_compile() -> None:
    steps = Run()
    for compiled in (1, 2, 0):
        steps.validate(compiled)
    with pytest.raises(ConfigError, match="after step 0 compiled 1 unplanned graph: its packs have 128 tokens, as "):
        steps.validate(1)


def test_a_late_graph_of_a_validation_stops_the_run_after_its_metrics_are_written(
    toy: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = toy(loop={"max_steps": 8, "eval_every": 2})
    compiled = [0]
    evaluate = Trainer.evaluate

    def late(self: Trainer, loader: EvalLoader) -> dict[str, Value]:
        compiled[0] += self.state.step == 6
        return evaluate(self, loader)

    monkeypatch.setattr(CpuBackend, "graphs", lambda self: compiled[0])
    monkeypatch.setattr(Trainer, "evaluate", late)
    with pytest.raises(ConfigError, match="the validation after step 6 compiled 1 unplanned graph"):
        run.train(cfg)
    last = json.loads((Path(cfg.output) / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["split"]) == (6, "valid")


def test_the_first_two_steps_may_compile() -> None:
    steps = Run()
    for compiled in (3, 1, 0):
        steps(compiled)


def test_packs_of_another_length_warm_up_too_as_where_shapes_are_free() -> None:
    steps = Run()
    for tokens in (128, 96):
        assert [(steps.guard.warms_up([batch(1, tokens)]), steps(0, batch(1, tokens)))[0] for _ in range(3)] == [
            True, True, False,
        ]  # fmt: skip


def test_what_is_compiled_between_steps_does_not_count() -> None:
    steps = Run()
    steps(2), steps(1)
    steps.graphs += 5  # a first validation
    steps(0)


def test_a_third_graph_is_an_error() -> None:
    steps = Run()
    steps(2), steps(1)
    with pytest.raises(ConfigError, match=r"^step 2 compiled 1 unplanned graph: .* a Python value in the step changed"):
        steps(1)


def test_a_length_that_was_not_planned_is_named_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"step 0 compiled 2 unplanned graphs: its packs have 96 tokens, planned are 128"
    ):
        Run()(2, batch(tokens=96))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (batch(rows=3), "input_ids is 3 x 128 int64, was 4 x 128 int64"),
        (batch(segments=7), "labels is 4 x 7 int64, was 4 x 6 int64"),
        (batch(segments=7), "max_segments is 7, was 6"),
        (batch(weights=torch.float64), "weights is 4 x 6 float64, was 4 x 6 float32"),
    ],
)
def test_what_changed_is_named_even_in_a_second_step_or_pass(changed: Batch, named: str) -> None:
    steps = Run()
    steps(2)
    with pytest.raises(ConfigError) as error:
        steps(1, batch(), changed)
    assert named in str(error.value)


def test_a_new_shape_that_compiles_nothing_is_let_pass() -> None:
    steps = Run()
    steps(2), steps(0, batch(tokens=96))


def test_a_warning_or_silence_by_choice(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Run("ignore")(1, batch(tokens=96))
        assert not caplog.records
        Run("warn")(1, batch(tokens=96))
    assert "its packs have 96 tokens" in caplog.text
