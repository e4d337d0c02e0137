"""XLA:CPU: the arithmetic of the plain CPU, and a number of compiled graphs that is known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import json_of, saved_config
from helpers.xla_tasks import TASKS, task_runs

from esm_neuron.config import TrainConfig

pytestmark = pytest.mark.xla

Toy = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def said(module_toy: Toy, task_toys: dict[str, TrainConfig]) -> dict[str, Any]:
    """What `worker.py` found: torch_xla is set up once per process, and not in this one."""
    cfg = module_toy(loop={"max_steps": 20, "eval_every": 5}, optim={"warmup_steps": 3, "min_lr_ratio": 0.0})
    tasks = task_runs(task_toys)
    return json_of([Path(__file__).with_name("worker.py"), saved_config(cfg), cfg.output, *tasks])


def test_losses_and_norms_are_those_of_the_cpu(said: dict[str, Any]) -> None:
    assert len(said["xla"]["losses"]) == 20
    assert said["xla"]["losses"] == pytest.approx(said["cpu"]["losses"], rel=1e-5)
    assert said["xla"]["norms"] == pytest.approx(said["cpu"]["norms"], rel=1e-3)
    assert said["xla"]["rates"] == said["cpu"]["rates"]
    for name in ("losses", "norms"):  # all weights are trained, so these tell whether the tied ones still are one
        assert said["mlm"][name] == pytest.approx(said["mlm_cpu"][name], rel=1e-4), name
    assert said["xla"]["losses"][-1] < 0.9 * said["xla"]["losses"][0]


def test_a_protein_in_a_pack_gets_what_it_gets_alone(said: dict[str, Any]) -> None:
    assert set(said["packs"]) == {"mean", "masked_lm"}
    for kind, found in said["packs"].items():
        assert len(found["logits"]) == 5 and len(found["gradients"]) > 30, kind
        assert all(each <= 1e-5 for each in found["logits"]), kind  # each: a NaN is no maximum
        assert all(each <= 1e-4 for each in found["gradients"]), kind


def test_validation_and_test_metrics_are_those_of_the_cpu(
    said: dict[str, Any], same_metrics: Callable[..., None]
) -> None:
    assert said["xla"]["steps"] == said["cpu"]["steps"]
    for split in ("valid", "test"):
        one, other = (said[name]["result"][split] for name in ("xla", "cpu"))
        same_metrics(one, other, abs=1e-4)  # a temperature, which is searched for, is between
    same_metrics(said["evaluated"]["xla"], said["evaluated"]["cpu"], abs=1e-5)


def test_predictions_are_those_of_the_cpu_by_one_graph(said: dict[str, Any]) -> None:
    cpu, xla = (said["answered"][name] for name in ("cpu", "xla"))
    assert len(cpu["ids"]) == 60 and xla["ids"] == cpu["ids"]
    assert xla["p"] == pytest.approx(cpu["p"], abs=1e-6)
    assert xla["embeddings"] == pytest.approx(cpu["embeddings"], abs=2e-6)
    assert xla["graphs"] == [1, 1], "a piece must not make a shape of its own"


def test_variants_are_scored_as_on_the_cpu_by_one_graph(said: dict[str, Any]) -> None:
    scored = said["scored"]
    assert len(scored["cpu"]) == 10 and len(set(scored["cpu"])) == 10
    assert scored["xla"] == pytest.approx(scored["cpu"], abs=1e-5)
    assert scored["graphs"] == 1


ONCE = {"first pass", "first update", "first evaluation"}
SET_UP = 1
"""Most programs before the first step: the gradient buffers and the optimizer's state."""
NEW = {
    "lora": ONCE,
    # The rows of a pass are fewer, so it is another program; update and evaluation are those that `lora` compiled.
    "accumulated": {"first pass"},
    "full, dropout": ONCE,
    "masked_lm": ONCE,
    "bf16": {"first pass", "first evaluation"},
    "checkpointing": {"first pass"},
}
"""Run -> parts of the loop that compile a program that no run before it has, exactly one each."""


@pytest.mark.parametrize("name", NEW)
def test_one_graph_for_a_pass_one_for_the_update_one_for_evaluation(said: dict[str, Any], name: str) -> None:
    """None in later steps: not for another learning rate, nor another seed, nor at the schedule's last step."""
    counts = dict(said["counts"][name])
    assert counts.pop("set-up") <= SET_UP
    assert {part: count for part, count in counts.items() if count} == dict.fromkeys(NEW[name], 1)
    assert {"later pass", "later update", "later evaluation", "between steps", "save", "end"} <= set(counts)


def test_the_schedule_of_the_counted_run_rises_and_ends_near_zero(said: dict[str, Any]) -> None:
    rates = said["xla"]["rates"]
    assert rates[0] < rates[1] < rates[2] == max(rates) and len(set(rates)) > 15
    assert 0 < rates[-1] == min(rates) < max(rates) / 50, "the last step trains, a little"


def test_passes_do_not_change_the_arithmetic(said: dict[str, Any]) -> None:
    assert said["accumulated"]["losses"] == pytest.approx(said["xla"]["losses"], rel=1e-5)


def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_stopped(said: dict[str, Any]) -> None:
    resumed, whole = said["resumed"], said["whole"]
    assert resumed["stopped_by"] == "SIGTERM"
    assert resumed["trained"] == [6, 7, 8], "a run that starts anew ends the same"
    for name in ("losses", "norms", "rates", "steps", "weights"):
        assert resumed[name] == whole[name], name
    assert len(whole["losses"]) == 8
    assert resumed["result"]["test"] == whole["result"]["test"]
    again = {part: count for part, count in resumed["counts"].items() if count and part != "set-up"}
    assert again == {}, "a resumed run needs the very programs of the run that was stopped"


def test_a_step_that_is_no_number_moves_nothing_and_compiles_nothing(said: dict[str, Any]) -> None:
    """The very programs of the run `lora`: the update is undone within its own, and no value is read for it."""
    saved = said["skipped"]["saved"]
    assert len(saved) == 5 and saved[2] == saved[1]
    assert saved[3][0] != saved[2][0] and saved[3][1] != saved[2][1], "the step after it moves weights and moments"
    assert {part: count for part, count in said["skipped"]["counts"].items() if count and part != "set-up"} == {}


def test_bf16_runs_close_to_fp32(said: dict[str, Any]) -> None:
    # six steps of a schedule of its own length: only the first three, of the warm-up, are the same
    assert said["bf16"]["losses"][:3] == pytest.approx(said["xla"]["losses"][:3], rel=1e-2)
    assert said["bf16"]["losses"] != said["again"]["losses"]
    assert said["bf16"]["losses"] == pytest.approx(said["again"]["losses"], rel=1e-2)


def test_recomputing_blocks_changes_nothing(said: dict[str, Any]) -> None:
    assert said["again"]["losses"][:3] == pytest.approx(said["xla"]["losses"][:3], rel=1e-6)
    assert len(said["again"]["losses"]) == 6


def test_a_step_reads_nothing_from_the_device_before_the_log_is_due(said: dict[str, Any]) -> None:
    *quiet, logged = said["reads"]
    assert quiet == [0] * 5 and logged > 0


def test_several_processes_are_refused(said: dict[str, Any]) -> None:
    assert said["two processes"]["code"] == 2 and not said["two processes"]["left"]
    line = said["two processes"]["line"]
    assert line.startswith("esm-neuron: error: ") and "2 processes" in line


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_and_scores_as_on_the_cpu(
    said: dict[str, Any], task: str, same_metrics: Callable[..., None]
) -> None:
    cpu, xla = said["tasks"][task]
    assert len(cpu["losses"]) == (0 if task == "probe" else 6)
    assert xla["losses"] == pytest.approx(cpu["losses"], rel=1e-4)
    same_metrics(xla["test"], cpu["test"], abs=1e-3)
