"""Learning rate and parameter groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import get_scheduler

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
    ("schedule", "third", "two_thirds", "end"),
    [
        # from step 4 to the one behind the last, 25, are 21: a third is step 11; the floor is 2e-4, the fall 1.8e-3
        ("cosine", 2e-4 + 1.8e-3 * 0.75, 2e-4 + 1.8e-3 * 0.25, 2e-4),
        ("linear", 2e-4 + 1.8e-3 * 2 / 3, 2e-4 + 1.8e-3 / 3, 2e-4),
        ("constant", 2e-3, 2e-3, 2e-3),
    ],
)
def test_each_schedule_falls_as_it_says(schedule: str, third: float, two_thirds: float, end: float) -> None:
    assert rate(11, schedule) == pytest.approx(third)
    assert rate(18, schedule) == pytest.approx(two_thirds)
    assert rate(TOTAL, schedule) == pytest.approx(end)
    assert rate(TOTAL + 10, schedule) == pytest.approx(end)  # steps past the plan stay at the floor


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_without_a_floor_the_last_step_still_trains(schedule: str) -> None:
    rates = [rate(step, schedule, floor=0) for step in range(TOTAL)]
    assert rates[-1] > 1e-3 * PEAK
    assert rates[WARMUP:] == sorted(rates[WARMUP:], reverse=True)
    assert rate(TOTAL, schedule, floor=0) == 1e-20, "not 0, which XLA's AdamW cannot bear"
    both = [learning_rate(step, 2, OptimConfig(lr=PEAK, schedule=schedule)) for step in range(2)]
    assert both == pytest.approx([PEAK, PEAK / 2])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_after_the_warm_up_rates_are_those_of_transformers(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=WARMUP, num_training_steps=TOTAL)
    for step in range(TOTAL):
        if step >= WARMUP:
            assert rate(step, schedule, floor=0) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


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
