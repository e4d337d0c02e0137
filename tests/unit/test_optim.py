"""Learning rate and parameter groups."""

from __future__ import annotations

import math

import pytest
from torch import nn

from esm_neuron.config import OptimConfig
from esm_neuron.training.optim import learning_rate, parameter_groups

TOTAL, WARMUP, PEAK, FLOOR = 25, 4, 2e-3, 0.1


def rate(step: int, schedule: str, warmup: int = WARMUP, floor: float = FLOOR) -> float:
    cfg = OptimConfig(lr=PEAK, schedule=schedule, warmup_steps=warmup, min_lr_ratio=floor)
    return learning_rate(step, TOTAL, cfg)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_warm_up_rises_by_equal_steps_and_never_stands_at_zero(schedule: str) -> None:
    assert [rate(step, schedule) for step in range(4)] == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3])
    assert rate(4, schedule) == pytest.approx(PEAK)
    assert rate(0, schedule, warmup=0) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("schedule", "quarter", "middle", "last"),
    [
        # between steps 4 and 24 lie 20: a quarter is step 9, the middle step 14; the floor is 2e-4, the fall 1.8e-3
        ("cosine", 2e-4 + 1.8e-3 * (1 + math.sqrt(0.5)) / 2, 1.1e-3, 2e-4),
        ("linear", 2e-4 + 1.8e-3 * 0.75, 1.1e-3, 2e-4),
        ("constant", 2e-3, 2e-3, 2e-3),
    ],
)
def test_each_schedule_falls_as_it_says(schedule: str, quarter: float, middle: float, last: float) -> None:
    assert rate(9, schedule) == pytest.approx(quarter)
    assert rate(14, schedule) == pytest.approx(middle)
    assert rate(TOTAL - 1, schedule) == pytest.approx(last)
    assert rate(TOTAL + 10, schedule) == pytest.approx(last)  # steps past the plan stay at the floor


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_without_a_floor_the_last_step_ends_at_zero(schedule: str) -> None:
    rates = [rate(step, schedule, floor=0) for step in range(TOTAL)]
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert all(r > 0 for r in rates[:-1])
    assert rates[WARMUP:] == sorted(rates[WARMUP:], reverse=True)


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    rates = [rate(step, "cosine", warmup=100) for step in range(TOTAL)]
    assert rates == pytest.approx([PEAK * (step + 1) / 100 for step in range(TOTAL)])


def test_a_run_of_one_step_trains_at_the_peak() -> None:
    assert learning_rate(0, 1, OptimConfig(lr=PEAK)) == PEAK


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "linear": nn.Linear(4, 3), "frozen": nn.Linear(4, 4)})
    model["frozen"].requires_grad_(False)
    decayed, plain = parameter_groups(model, OptimConfig(weight_decay=0.3))
    assert decayed["weight_decay"] == 0.3
    assert decayed["names"] == ["linear.weight"]
    assert plain["weight_decay"] == 0.0
    assert plain["names"] == ["norm.weight", "norm.bias", "linear.bias"]
    parameters = dict(model.named_parameters())
    for group in (decayed, plain):
        assert all(p is parameters[n] for n, p in zip(group["names"], group["params"], strict=True))


def test_a_group_without_parameters_is_left_out() -> None:
    groups = parameter_groups(nn.Linear(4, 3, bias=False), OptimConfig())
    assert [group["names"] for group in groups] == [["weight"]]
