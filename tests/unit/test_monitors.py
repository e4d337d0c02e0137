"""A loss or gradient that is no number moves nothing, is seen by all ranks, and is answered as the settings say."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esm_neuron.backends.base import adamw, normalise_clip_update
from esm_neuron.backends.cpu import CpuBackend
from esm_neuron.config import OptimConfig, TrainConfig
from esm_neuron.data.loader import StepData, TrainLoader
from esm_neuron.errors import CheckpointError, TrainingError
from esm_neuron.training import run
from esm_neuron.training.monitors import GIVE_UP, LEAST, LossWatch, spike_limit
from esm_neuron.training.trainer import Trainer
from esm_neuron.training.watchdog import Watchdog

Toy = Callable[..., TrainConfig]
NAN, INF = float("nan"), float("inf")


def trained(steps: list[tuple[float, float]], lazy: bool) -> list[Tensor]:
    """Weights and moments after updates with (loss, gradient) each."""
    linear = nn.Linear(3, 2)
    nn.init.constant_(linear.weight, 0.5)
    nn.init.zeros_(linear.bias)
    groups = [{"params": list(linear.parameters()), "weight_decay": 0.1}]
    optimizer = adamw(groups, OptimConfig(lr=0.1), torch.tensor(0.1), fused=True)
    for loss, gradient in steps:
        for p in linear.parameters():
            assert p.grad is not None and not p.grad.any(), "the buffers are zeroed, also after a bad step"
            p.grad.fill_(gradient)
        norm = normalise_clip_update(linear.parameters(), optimizer, torch.tensor([loss, 2.0]), 1.0, lazy=lazy)
        assert math.isfinite(norm) == (math.isfinite(loss) and abs(gradient) < 1e19), "the square must fit too"
    state = (value for p in linear.parameters() for value in optimizer.state[p].values())
    return [t.detach().clone() for t in (*linear.parameters(), *state)]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("bad", [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (1.0, NAN), (1.0, INF), (1.0, -INF), (1.0, 1e30)])
def test_an_update_that_is_no_number_leaves_weights_and_moments(bad: tuple[float, float], lazy: bool) -> None:
    good = [(1.0, 0.3), (0.8, -0.2)]
    expected = trained(good, lazy=False)
    assert not torch.equal(expected[0], trained(good[:1], lazy=False)[0]), "a good step moves"
    for got, value in zip(trained([good[0], bad, good[1]], lazy), expected, strict=True):
        assert torch.equal(got, value)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = NAN) -> None:
    """The weights of the proteins in these steps (counted from 1) are no numbers."""
    load = TrainLoader.load

    def spoiled(self: TrainLoader, step: int) -> StepData:
        data = load(self, step)
        if step + 1 not in steps:
            return data
        first, *others = data.batches
        return replace(data, batches=[replace(first, weights=first.weights * value), *others])

    monkeypatch.setattr(TrainLoader, "load", spoiled)


def named(cfg: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(cfg.output) / "nonfinite.jsonl").read_text().splitlines()]


def tensors(cfg: TrainConfig, step: int) -> dict[str, bytes]:
    folder = Path(cfg.output) / "checkpoints" / f"step-{step:08d}"
    return {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}


def all_checkpoints(toy: Toy, output: str, action: str, **loop: Any) -> TrainConfig:
    return toy(
        output, loop={"on_nonfinite": action, "packs_per_device": 2, **loop}, checkpoint={"every": 1, "keep": 100}
    )


def test_stop_ends_the_run_before_anything_is_saved_and_skip_takes_it_on(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = all_checkpoints(toy, "out", "stop")
    poison(monkeypatch, {5})
    with pytest.raises(TrainingError, match=r"^step 5: the loss is nan and .*nonfinite\.jsonl.*on_nonfinite skip$"):
        run.train(cfg, str)
    assert not tensors(cfg, 5) and tensors(cfg, 4)
    (record,) = named(cfg)
    loader = taken_loader(cfg)
    members = [m for batch in loader.load(4).batches for m in batch.members[batch.members >= 0].tolist()]
    assert set(record["ids"]) == {loader.table.ids[loader.table.record[m]] for m in members}
    assert (record["step"], record["loss"], record["action"], len(record["ids"]) > 3) == (5, "nan", "stop", True)
    resumed = replace(
        cfg,
        loop=replace(cfg.loop, on_nonfinite="skip"),
        checkpoint=replace(cfg.checkpoint, resume="auto"),
    )
    assert run.train(resumed, str).result["train"]["steps"] == 8
    assert tensors(cfg, 5) == tensors(cfg, 4) != tensors(cfg, 6)
    assert [(r["step"], r["action"]) for r in named(cfg)] == [(5, "skip")], "a step that is done again is named once"
    lines = [json.loads(line) for line in (Path(cfg.output) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("loss", 0) is None] == [5]


def taken_loader(cfg: TrainConfig) -> TrainLoader:
    """The training loader of a run."""
    backend = CpuBackend(cfg)
    return run._Job.of(cfg, backend, str, Watchdog(0, Path(cfg.output))).loaders.train


def test_no_setting_goes_on_for_ever(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = toy("out", loop={"on_nonfinite": "skip", "max_steps": 30})
    poison(monkeypatch, set(range(6, 31)))
    with pytest.raises(TrainingError, match=rf"\({GIVE_UP} such steps in a row\)"):
        run.train(cfg, str)
    assert [r["action"] for r in named(cfg)] == ["skip"] * (GIVE_UP - 1) + ["stop"]


def test_a_run_that_left_steps_out_and_was_stopped_ends_as_one_that_was_not(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two looks at the losses, with a bad step that nothing has been done about."""
    settings = {"loop": {"on_nonfinite": "skip", "eval_every": 8}, "log": {"every": 8}}
    whole, stopped = toy("whole", **settings), toy("stopped", **settings)
    poison(monkeypatch, {3, 6})
    run.train(whole, str)
    with monkeypatch.context() as patch:
        signal_in_step(patch, 4)
        assert run.train(stopped, str).stopped_by == "SIGTERM"
    assert not (Path(stopped.output) / "nonfinite.jsonl").exists()
    run.train(replace(stopped, checkpoint=replace(stopped.checkpoint, resume="auto")), str)
    assert tensors(stopped, 8) == tensors(whole, 8)
    assert named(stopped) == named(whole) and [r["step"] for r in named(whole)] == [3, 6]


def signal_in_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM at the end of a step, counted from 1."""
    train_step = Trainer.train_step

    def signalled(self: Trainer, data: StepData) -> None:
        train_step(self, data)
        if data.step == step - 1:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(Trainer, "train_step", signalled)


def one_rank(rank: int, port: int, bad: int, predictions: Any) -> None:
    """A step of two ranks on gloo, of which `bad` has a loss that is no number."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in world.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    backend = CpuBackend(TrainConfig(backend="cpu"))
    linear = nn.Linear(3, 2, bias=False)
    nn.init.constant_(linear.weight, 0.5)
    optimizer = backend.optimizer(linear, [{"params": [linear.weight], "weight_decay": 0.1}], OptimConfig())
    assert linear.weight.grad is not None
    linear.weight.grad.fill_(1.0 + rank)
    norm = backend.step(linear, optimizer, torch.tensor([NAN if rank == bad else 1.0, 2.0]), 1.0)
    moved = bool((linear.weight != 0.5).any())
    predictions.put((rank, float(norm), moved))
    backend.close()


@pytest.mark.parametrize("bad", [1, -1])
def test_one_rank_that_fails_stops_the_update_of_all(bad: int) -> None:
    fork = multiprocessing.get_context("fork")
    predictions: Any = fork.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [fork.Process(target=one_rank, args=(rank, port, bad, predictions)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    norms, moved = zip(*((norm, moved) for _, norm, moved in sorted(predictions.get() for _ in ranks)), strict=True)
    assert moved == ((False, False) if bad == 1 else (True, True))
    assert all(map(math.isnan, norms)) if bad == 1 else norms[0] == norms[1] == pytest.approx(3 / 4 * 6**0.5)


def test_a_spike_is_far_above_what_the_losses_do_and_not_their_noise(caplog: pytest.LogCaptureFixture) -> None:
    watch = LossWatch()
    noisy = [1.0 + 0.1 * math.sin(n) for n in range(LEAST)]
    with caplog.at_level(logging.WARNING):
        for step, loss in enumerate(noisy, 1):
            watch.take_in(step, 50.0 if step == 2 else loss, 1.0)  # too early to know
        assert watch.spikes == 0 and not caplog.records
        watch.take_in(17, 1.4, 1.0)
        assert watch.spikes == 0
        watch.take_in(18, 4.0, 1.0)
        watch.take_in(19, None, 0.0)
    assert watch.spikes == 1
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["step 18: the loss is 4"]
    again = LossWatch()
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert again == watch
    again.load_state_dict({})
    for wrong in (
        {"taken": 1},
        {"recent": "abc"},
        {"recent": [None]},
        {"nonfinite": [{"step": 1}]},
        {"in_a_row": None},
    ):
        with pytest.raises(CheckpointError, match="no valid `watch`"):
            again.load_state_dict(wrong)
    assert again == watch
    assert spike_limit([2.0] * LEAST) == pytest.approx(2.16), "losses that do not move still have a floor"


def test_spikes_are_counted_in_the_log(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = toy("out", loop={"max_steps": 24, "eval_every": 24}, log={"every": 4}, optim={"lr": 1e-4})
    monkeypatch.setattr(
        "esm_neuron.training.monitors.DEVIATIONS", -INF
    )  # then every loss stands out once there are enough
    run.train(cfg, str)
    lines = [json.loads(line) for line in (Path(cfg.output) / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("loss_spikes") for line in lines if "split" not in line] == [None, None, None, None, 4, 4]
