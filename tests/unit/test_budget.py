"""`loop.budget`: as many steps as fit, saved with the run, which then is one with `loop.max_steps`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.toys import Toy

from esm_neuron.config import LoopConfig, rules, settings
from esm_neuron.errors import ConfigError
from esm_neuron.training import budget, run
from esm_neuron.training.budget import Pace


@pytest.mark.parametrize(("time", "every", "steps"), [(100, 10, 80), (100, 50, 92), (14.9, 10, 8), (3.9, 10, 0)])
def test_steps_and_their_validations_and_the_end_fit(time: float, every: int, steps: int) -> None:
    pace, loop = Pace(step=1.0, validation=2.0, end=4.0), LoopConfig(eval_every=every)
    assert pace.steps_within(time, loop, 1000) == steps
    assert not steps or pace.of(steps, loop, 1000) <= time < pace.of(steps + 1, loop, 1000)


def test_a_run_with_a_budget_is_the_run_of_its_steps(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and one that goes on with it looks at no clock."""
    timed = toy("timed", loop={"max_steps": None, "budget": "1m", "eval_every": 3})
    said: list[str] = []
    measured = budget.measure

    def measure(*words: object) -> Pace:
        assert measured(*words).step > 0  # type: ignore[arg-type] - the model that it has moved is thrown away
        return Pace(8.0, 2.0, 5.0)

    monkeypatch.setattr(budget, "measure", measure)
    assert run.train(timed, said.append).stopped_by is None
    assert any("loop.budget=1m is time for 6 steps" in line for line in said)
    saved = settings.read_config(Path(timed.output) / "config.yaml")
    assert (saved.loop.budget, saved.loop.max_steps) == (None, 6)
    plain = toy("plain", loop={"max_steps": 6, "eval_every": 3})
    run.train(plain, str)
    weights = [(Path(cfg.output) / "adapter" / "adapter_model.safetensors").read_bytes() for cfg in (timed, plain)]
    assert weights[0] == weights[1]
    monkeypatch.setattr(budget, "measure", lambda *words: Pace(1.0, 0.0, 0.0))
    again = run.train(replace(timed, checkpoint=replace(timed.checkpoint, resume="auto")), said.append)
    assert again.result["train"]["steps"] == 6
    assert any(line.endswith("timed goes on with the 6 steps that it began with") for line in said)


def test_a_budget_changes_no_run_of_passes(toy: Toy) -> None:
    passes = toy("passes", loop={"max_steps": None, "epochs": 1})
    run.train(passes, str)
    resumed = toy("passes", loop={"max_steps": None, "epochs": 1, "budget": "1m"}, checkpoint={"resume": "auto"})
    with pytest.raises(ConfigError, match="loop.budget=1m: the run in .*passes has passes .* choose another --output"):
        run.train(resumed, str)


def test_a_long_budget_of_short_steps_is_soon_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty years of milliseconds."""
    counted, of = [], Pace.of
    monkeypatch.setattr(Pace, "of", lambda self, *words: counted.append(words) or of(self, *words))
    pace, loop, time = Pace(step=1e-3, validation=0.1, end=1.0), LoopConfig(eval_every=100), 6.3e8
    steps = pace.steps_within(time, loop, 1000)
    assert of(pace, steps, loop, 1000) <= time < of(pace, steps + 1, loop, 1000)
    assert len(counted) < 1000


def test_no_time_for_a_step_is_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "measure", lambda *words: Pace(50.0, 20.0, 5.0))
    with pytest.raises(ConfigError, match=r"loop.budget=1m: a step takes 50 s.* give at least 75s"):
        run.train(toy("short", loop={"max_steps": None, "budget": "1m"}), str)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "soon"], "loop.budget soon: no time; write 90s, 30m or 1h30m"),
        (["--budget", "1m", "--max_steps", "5"], "beside loop.max_steps: both say how long training is; leave"),
        (["--budget", "1m", "--adapter", "probe"], "beside adapter.kind=probe: a probe takes no steps; leave"),
        (["--budget", "1m", "--seeds", "3"], "beside seeds: runs that belong together need one loop.max_steps; leave"),
        (["--budget", "1m", "--folds", "3"], "beside data.folds"),
    ],
)
def test_what_leaves_a_budget_nothing_to_decide_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rules.validate(settings.parse(["x.csv", *words]))
