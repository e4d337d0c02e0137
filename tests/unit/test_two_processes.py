"""Two processes on gloo under torchrun compute what one process computes, and stop and go on like one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import TORCHRUN, on_two_ranks, saved_config
from helpers.runs import log_lines as lines
from helpers.runs import losses, result
from helpers.signals import stopping_after
from safetensors.torch import load_file

from esm_neuron.config import TrainConfig
from esm_neuron.training import checkpoint, run
from esm_neuron.training.signals import EXIT_STOPPED
from esm_neuron.training.watchdog import EXIT_HUNG

Toy = Callable[..., TrainConfig]

PATIENCE = 300
"""Seconds that two processes may take to import, on a busy machine, and to train."""


@contextmanager
def torchrun(cfg: TrainConfig) -> Iterator[subprocess.Popen[str]]:
    """Training in two processes, as a user starts it; ended when the block is left."""
    words = [*TORCHRUN, "-m", "esm_neuron.cli", "train", "--config", str(saved_config(cfg))]
    with Path(f"{cfg.output}.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(PATIENCE)


def printed(cfg: TrainConfig) -> str:
    return Path(f"{cfg.output}.log").read_text()


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The process ids that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def assert_close_end(
    one: TrainConfig, other: TrainConfig, same_metrics: Callable[..., None], rel: float = 1e-5, apart: float = 2e-5
) -> None:
    """Equal to rounding: the losses, the validations, the last weights and moments, the test metrics; equal: what was
    counted. `rel`: of losses, ten times as much of metrics; `apart`: of weights and moments."""
    assert losses(one) == pytest.approx(losses(other), rel=rel)
    results = [result(cfg) for cfg in (one, other)]
    for split in ("valid", "test"):
        same_metrics(results[0][split], results[1][split], rel=10 * rel)
    assert results[0]["train"]["residues"] == results[1]["train"]["residues"]
    assert results[0]["chosen_step"] == results[1]["chosen_step"]
    step = results[0]["train"]["steps"]
    for file in ("model.safetensors", "optimizer.safetensors"):
        states = [load_file(Path(cfg.output) / "checkpoints" / f"step-{step:08d}" / file) for cfg in (one, other)]
        assert states[0].keys() == states[1].keys(), file
        for name, value in states[0].items():
            assert value.numpy() == pytest.approx(states[1][name].numpy(), abs=apart), name


@dataclass(frozen=True)
class Pair:
    """The same training in one process and in two."""

    one: TrainConfig
    two: TrainConfig


def cut_over_two(toy: Toy, name: str, kind: str, precision: str) -> Pair:
    """FSDP2 on gloo, from a checkpoint that one process left after 3 steps.

    LoRA in bf16 has frozen linears in bfloat16 and trained matrices in float32 in one block. The last checkpoint is
    written after a validation, whose forward pass must not leave any weight put together.
    """
    values: dict[str, Any] = {"adapter": {"kind": kind}, "optim": {"lr": 1e-3}, "checkpoint": {"keep": 100}}
    loop = {"packs_per_device": 2, "precision": precision}
    whole, moved = (toy(f"{name}-{role}", loop=loop, **values) for role in ("whole", "moved"))
    with stopping_after(3):
        assert run.train(moved, str).stopped_by == "SIGTERM"
    moved = replace(
        moved,
        checkpoint=replace(moved.checkpoint, resume="auto"),
        parallel=replace(moved.parallel, fsdp=True),
        model=replace(moved.model, gradient_checkpointing=True),
    )
    return Pair(whole, moved)


@pytest.fixture(scope="module")
def pairs(module_toy: Toy) -> dict[str, Pair]:
    """Trainings that end by themselves; two processes do all of them, one after the other."""
    # 60, 20 and 20 proteins in packs of 128 tokens: the last batch of a split leaves one rank with filler packs only
    copies = Pair(module_toy("one"), module_toy("two", loop={"packs_per_device": 2, "eval_packs_per_device": 3}))
    made = {
        "copies": copies,
        "full, fp32": cut_over_two(module_toy, "full", "none", "fp32"),
        "LoRA, bf16": cut_over_two(module_toy, "lora", "lora", "bf16"),
    }
    for pair in made.values():
        run.train(pair.one, str)
    said = on_two_ranks([["train", str(saved_config(pair.two))] for pair in made.values()])
    assert said.count("train split: 60 ") == 3, "one rank speaks"
    assert said.count("resumed after step 3 of 8") == 2
    return made


def test_two_processes_train_as_one_does_and_evaluate_every_row_once(
    pairs: dict[str, Pair], same_metrics: Callable[..., None]
) -> None:
    one, two = pairs["copies"].one, pairs["copies"].two
    assert_close_end(two, one, same_metrics)
    assert [line["step"] for line in lines(two)] == [line["step"] for line in lines(one)], "one rank writes"


@pytest.mark.parametrize(("name", "rel", "apart"), [("full, fp32", 1e-5, 2e-5), ("LoRA, bf16", 1e-2, 5e-3)])
def test_weights_gradients_and_moments_may_be_cut_over_the_processes(
    pairs: dict[str, Pair], same_metrics: Callable[..., None], name: str, rel: float, apart: float
) -> None:
    assert_close_end(pairs[name].two, pairs[name].one, same_metrics, rel, apart)


def test_one_process_hands_over_to_two_and_two_to_one(toy: Toy, same_metrics: Callable[..., None]) -> None:
    long = {"max_steps": 120, "packs_per_device": 2, "eval_every": 40}
    whole, moved = (toy(name, loop=long, optim={"lr": 1e-4}, checkpoint={"keep": 100}) for name in ("whole", "moved"))
    run.train(whole, str)

    with stopping_after(3):
        assert run.train(moved, str).stopped_by == "SIGTERM"
    moved = replace(moved, checkpoint=replace(moved.checkpoint, resume="auto"))
    with torchrun(moved) as process:
        wait_for_steps(moved, 6, process)
        # One rank alone is told; the other must learn it from its peer, or both would wait forever.
        last = max(workers(process), key=rank_of)
        assert rank_of(last) == 1
        os.kill(last, signal.SIGTERM)
        assert process.wait(PATIENCE) != 0
    assert "resumed after step 3 of 120" in printed(moved)
    assert printed(moved).count("train split: 60 ") == 1, "one rank speaks"
    assert "stopped by SIGTERM; the state is saved" in printed(moved)
    assert f"exitcode  : {EXIT_STOPPED}" in printed(moved)
    stopped = max(saved_steps(moved))
    assert 6 <= stopped < 120 and stopped == lines(moved)[-1]["step"]
    run.train(moved, str)
    assert_close_end(moved, whole, same_metrics)


@contextmanager
def two_ranks(cfg: TrainConfig) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Training in two processes, six steps on, without an agent such as torchrun's, which would end a survivor."""
    path = saved_config(cfg)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in "01":
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [sys.executable, "-m", "esm_neuron.cli", "train", "--config", str(path)]
        with Path(f"{cfg.output}.{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen(words, env={**os.environ, **world}, stdout=log, stderr=log))
    try:
        wait_for_steps(cfg, 6, ranks[0])
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def wait_for_steps(cfg: TrainConfig, count: int, process: subprocess.Popen[Any]) -> None:
    """Return when metrics.jsonl has the losses of `count` steps, or when `process` has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and len(losses(cfg)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def saved_steps(cfg: TrainConfig) -> list[int]:
    return checkpoint.steps(Path(cfg.output) / "checkpoints")


def assert_nothing_saved_since(cfg: TrainConfig, failed_at: int) -> None:
    """The peer failed when `failed_at` was the last step of the log: what it had done by then is saved, and no more."""
    done = lines(cfg)[-1]["step"]
    assert done <= failed_at + 1, "a step that the failed peer had already done its share of"
    assert saved_steps(cfg) and max(saved_steps(cfg)) <= done
    assert not (Path(cfg.output) / "result.json").exists()


ENDLESS: dict[str, Any] = {"max_steps": 100_000, "packs_per_device": 2}


def test_a_rank_whose_peer_is_killed_ends_with_the_reason_and_saves_nothing(toy: Toy) -> None:
    cfg = toy("bereft", loop=ENDLESS, checkpoint={"every": 3})
    with two_ranks(cfg) as ranks:
        ranks[1].kill()
        failed_at = lines(cfg)[-1]["step"]
        assert ranks[0].wait(60) == 1
    last = Path(f"{cfg.output}.0.log").read_text().splitlines()[-1]
    assert last.startswith("esm-neuron: error: rank 0: a peer has failed or does not answer (")
    assert last.endswith("then go on with --checkpoint.resume auto")
    assert_nothing_saved_since(cfg, failed_at)


def test_a_disk_that_is_full_for_the_main_rank_ends_all_ranks_with_its_error(toy: Toy) -> None:
    cfg = toy("full", loop=ENDLESS, checkpoint={"every": 3})
    log = Path(cfg.output) / "metrics.jsonl"
    with two_ranks(cfg) as ranks:
        aside = log.with_name("new")
        aside.symlink_to("/dev/full")
        aside.replace(log)
        assert [rank.wait(60) for rank in ranks] == [2, 2]
    for rank in "01":
        last = Path(f"{cfg.output}.{rank}.log").read_text().splitlines()[-1]
        assert last.startswith(f"esm-neuron: error: [Errno 28] No space left on device: '{log}'; free space"), last


def test_a_rank_whose_peer_hangs_is_ended_by_its_watchdog_and_saves_nothing(toy: Toy) -> None:
    cfg = toy("waiting", loop={**ENDLESS, "watchdog": 20}, checkpoint={"every": 3})
    with two_ranks(cfg) as ranks:
        ranks[1].send_signal(signal.SIGSTOP)
        failed_at = lines(cfg)[-1]["step"]
        assert ranks[0].wait(60) == EXIT_HUNG
    said = (Path(cfg.output) / "hung-rank0.txt").read_text()
    assert " has taken more than 20 s (loop.watchdog)" in said and "in fit" in said, "the stack of the waiting thread"
    assert said.splitlines()[0] in Path(f"{cfg.output}.0.log").read_text()
    assert_nothing_saved_since(cfg, failed_at)


def test_torchrun_ends_the_peer_of_a_killed_worker_and_a_resume_goes_on(toy: Toy) -> None:
    cfg = toy("orphaned", loop={"max_steps": 120, "packs_per_device": 2, "eval_every": 40}, checkpoint={"every": 3})
    with torchrun(cfg) as process:
        wait_for_steps(cfg, 6, process)
        found = workers(process)
        os.kill(max(found, key=rank_of), signal.SIGKILL)
        failed_at = lines(cfg)[-1]["step"]
        assert process.wait(60) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)
    assert "exitcode  : -9" in printed(cfg) or "closing signal SIGTERM" in printed(cfg), printed(cfg)
    assert_nothing_saved_since(cfg, failed_at)
    newest = max(saved_steps(cfg))
    said: list[str] = []
    outcome = run.train(replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto")), said.append)
    assert f"resumed after step {newest} of 120" in said and outcome.result["train"]["steps"] == 120


def rank_of(pid: int) -> int:
    """RANK in the environment of a process."""
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(entry.removeprefix(b"RANK=")) for entry in environment if entry.startswith(b"RANK="))
