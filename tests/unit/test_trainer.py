"""The training loop: it learns, its sums are exact, and an interrupted run ends as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.runs import losses
from safetensors.torch import load_file

from esm_neuron.backends.cpu import CpuBackend
from esm_neuron.cli import main
from esm_neuron.config import TrainConfig, settings
from esm_neuron.config.backends import BACKENDS
from esm_neuron.config.rules import check_values
from esm_neuron.data.labels import Labels
from esm_neuron.data.loader import StepData
from esm_neuron.data.splits import load_splits
from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.files import claimed
from esm_neuron.inference.load import read_run
from esm_neuron.models.lora import saved_key
from esm_neuron.tasks import create_task
from esm_neuron.training import checkpoint, run, signals
from esm_neuron.training.callbacks import Callback
from esm_neuron.training.trainer import Trainer

Toy = Callable[..., TrainConfig]

TIMING = ("sequences_per_second", "residues_per_second", "graphs")
"""Values of a metrics line that depend on the clock or on what was compiled before."""


def quiet(_: str) -> None:
    """Nothing is printed."""


def train(cfg: TrainConfig) -> dict[str, Any]:
    outcome = run.train(cfg, quiet)
    assert outcome.stopped_by is None
    return outcome.result


def metrics(cfg: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(cfg.output) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def resumed(cfg: TrainConfig) -> TrainConfig:
    return replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto"))


def checkpoints(cfg: TrainConfig) -> list[str]:
    return sorted(f.name for f in (Path(cfg.output) / "checkpoints").iterdir() if f.name != ".lock")


def assert_same_end(one: TrainConfig, other: TrainConfig) -> None:
    """Two finished runs are equal bit for bit: every checkpoint that both keep, every logged line, every figure."""
    assert checkpoints(one) == checkpoints(other)
    for folder in checkpoints(one):
        for name in ("model.safetensors", "optimizer.safetensors"):
            files = [Path(cfg.output, "checkpoints", folder, name).read_bytes() for cfg in (one, other)]
            assert files[0] == files[1], f"{folder}/{name}"
    assert metrics(one) == metrics(other)
    results = [json.loads((Path(cfg.output) / "result.json").read_text()) for cfg in (one, other)]
    for result in results:
        del result["train"]["seconds"], result["train"]["residues_per_second"]
    assert results[0] == results[1]


class SignalAt(Callback):
    """A callback that sends this process a signal after a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_log(self, step: int, total: int, record: Any) -> None:
        if step == self.step:
            signal.raise_signal(self.number)


@pytest.fixture
def watched_by(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds callbacks to the next runs; none takes them away."""
    make = run._callbacks

    def add(*extra: Callback) -> None:
        monkeypatch.setattr(run, "_callbacks", lambda *of: [*make(*of), *extra])

    return add


@pytest.mark.parametrize("kind", ["lora", "qlora", "none", "head"])
def test_training_learns_a_label_that_can_be_learnt(toy: Toy, kind: str) -> None:
    cfg = toy(adapter={"kind": kind}, optim={"lr": 1e-2}, loop={"max_steps": 40, "eval_every": 20})
    result = train(cfg)
    seen = losses(cfg)
    assert len(seen) == 40
    assert sum(seen[:2]) / 2 > 0.6 > 0.35 > sum(seen[-4:]) / 4
    assert result["test"]["accuracy"] > 0.8 and result["test"]["n"] == 20
    assert result["train"]["steps"] == 40
    trainable, total = result["parameters"]["trainable"], result["parameters"]["total"]
    assert (trainable / total > 0.9) == (kind == "none")


def test_masked_lm_loss_falls_below_that_of_guessing_evenly(toy: Toy) -> None:
    cfg = toy(task={"name": "masked_lm"}, adapter={"kind": "none"}, optim={"lr": 1e-2}, loop={"max_steps": 30})
    result = train(cfg)
    seen = losses(cfg)
    assert sum(seen[-4:]) / 4 < 3.1 < 3.4 < seen[0]  # ln 33 = 3.50, ln 20 = 3.00
    assert result["test"]["loss"] < 3.1


def test_passes_do_not_change_the_arithmetic(toy: Toy) -> None:
    whole, split, single = (toy(f"packs{n}", loop={"packs_per_device": n, "max_steps": 7}) for n in (4, 2, 1))
    expected = train(whole)
    for cfg in (split, single):
        result = train(cfg)
        assert losses(cfg) == pytest.approx(losses(whole), rel=1e-6)
        norms = [[line["grad_norm"] for line in metrics(c) if "split" not in line] for c in (cfg, whole)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
        assert result["train"]["residues"] == expected["train"]["residues"]


def test_filler_rows_and_padding_change_nothing(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    lean, static = toy("lean"), toy("static")
    train(lean)
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], compiles=True))
    monkeypatch.setattr(CpuBackend, "attention", "masked")
    train(static)
    assert losses(static) == pytest.approx(losses(lean), rel=1e-5)


def test_the_loss_of_an_epoch_is_the_mean_over_its_proteins(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], compiles=True))
    cfg = toy(optim={"lr": 1e-20}, loop={"max_steps": None, "epochs": 1.0, "eval_every": 0, "packs_per_device": 2})
    cfg = replace(cfg, data=replace(cfg.data, valid=cfg.data.train))
    train(cfg)
    splits = load_splits(cfg, Labels)
    task = create_task(cfg.task, splits.labels)
    loader = run.Loaders.of(cfg, splits, task, CpuBackend(cfg)).train
    counts = [sum(float(b.weights.sum()) for b in loader.load(n).batches) for n in range(loader.steps_per_epoch)]
    rows = [
        sum(int((b.members[:, 0] >= 0).sum()) for b in loader.load(n).batches) for n in range(loader.steps_per_epoch)
    ]
    assert sum(counts) == 60 and rows[-1] < 4, "the last step has filler packs"
    mean = sum(n * loss for n, loss in zip(counts, losses(cfg), strict=True)) / 60
    (whole,) = [line["loss"] for line in metrics(cfg) if "split" in line]
    assert mean == pytest.approx(whole, rel=1e-6)


def test_gradient_checkpointing_changes_nothing(toy: Toy) -> None:
    plain = toy("plain", model={"dropout": 0.1})
    again = toy("again", model={"dropout": 0.1, "gradient_checkpointing": True})
    train(plain)
    train(again)
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)


def test_bf16_trains_close_to_fp32(toy: Toy) -> None:
    full, half = toy("full"), toy("half", loop={"precision": "bf16"})
    train(full)
    train(half)
    assert losses(half) == pytest.approx(losses(full), rel=2e-2)
    assert losses(half) != losses(full)
    saved = load_file(Path(half.output) / "checkpoints" / "step-00000008" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_patience_ends_training_and_the_best_weights_are_kept(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = toy(loop={"max_steps": 40, "eval_every": 2, "patience": 3}, checkpoint={"keep": 1}, optim={"lr": 1e-2})
    measured = Trainer.evaluate
    scripted = iter([0.1, 0.5, 0.4, 0.5, 0.3])

    def evaluate(self: Trainer, loader: Any) -> dict[str, Any]:
        return {**measured(self, loader), "mcc": next(scripted), "loss": 1.0}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    result = train(cfg)
    assert (result["train"]["steps"], result["chosen_step"]) == (10, 4)
    assert checkpoints(cfg) == ["step-00000004", "step-00000010"]
    best, last = (
        load_file(Path(cfg.output) / "checkpoints" / folder / "model.safetensors") for folder in checkpoints(cfg)
    )
    exported = Path(cfg.output) / "adapter" / "adapter_model.safetensors"
    written = load_file(exported)
    assert {saved_key(name) for name in best} == set(written)
    assert all(torch.equal(written[saved_key(name)], value) for name, value in best.items())
    assert any(not torch.equal(last[name], value) for name, value in best.items())
    again = train(resumed(cfg))  # a run that stopped early stays stopped
    assert (again["train"]["steps"], again["chosen_step"]) == (10, 4)
    damaged = Path(cfg.output) / "checkpoints" / "step-00000004" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match="training is over and its best step, 4, cannot be read: .*: content differs"
    ):
        train(resumed(cfg))  # the weights of another step do not take the place of those that were written
    assert checkpoints(cfg) == ["step-00000004", "step-00000010"]
    assert all(torch.equal(value, written[name]) for name, value in load_file(exported).items())


def test_a_best_checkpoint_that_cannot_be_read_is_set_aside_while_there_are_steps_to_come(
    toy: Toy, watched_by: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = toy(loop={"max_steps": 8, "eval_every": 2}, checkpoint={"keep": 1})
    measured, scripted = Trainer.evaluate, iter([0.5, 0.4, 0.3, 0.6, *[0.0] * 9])
    monkeypatch.setattr(Trainer, "evaluate", lambda *of: {**measured(*of), "mcc": next(scripted)})
    watched_by(SignalAt(5, signal.SIGTERM))
    assert run.train(cfg, quiet).stopped_by == "SIGTERM"
    assert checkpoints(cfg) == ["step-00000002", "step-00000005"]
    damaged = Path(cfg.output) / "checkpoints" / "step-00000002" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    watched_by()
    assert train(resumed(cfg))["chosen_step"] == 8
    assert f"the best step is looked for anew among those after 5: {damaged}: content differs" in caplog.text
    assert checkpoints(cfg) == ["passed-over-step-00000002-1", "step-00000008"]


def test_without_validation_rows_the_last_weights_are_taken(toy: Toy) -> None:
    cfg = toy(data={"valid": None, "valid_fraction": 0.0})
    result = train(cfg)
    assert (result["chosen_step"], result["valid"]) == (8, None)
    assert result["test"]["n"] == 20


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"kind": "lora", "dropout": 0.1}},
    "qlora": {"adapter": {"kind": "qlora", "dropout": 0.1}},
    "full": {"adapter": {"kind": "none"}},
    "masked_lm": {"task": {"name": "masked_lm"}, "adapter": {"kind": "lora", "dropout": 0.1}},
}


def interruptible(toy: Toy, output: str, kind: str, **loop: Any) -> TrainConfig:
    """A run with all that a resumed one could get wrong: dropout, accumulation, masks, epochs that end within it."""
    schedule = {"lr": 5e-3, "warmup_steps": 3}
    return toy(
        output, model={"dropout": 0.1}, optim=schedule, loop={"max_steps": 12, "packs_per_device": 2, **loop},
        checkpoint={"keep": 100}, **KINDS[kind],
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_by_sigterm_goes_on_bit_for_bit(
    toy: Toy, watched_by: Callable[..., None], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    whole, stopped = (interruptible(toy, name, kind) for name in ("whole", "stopped"))
    train(whole)
    watched_by(SignalAt(6, signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    outcome = run.train(stopped, quiet)
    assert (outcome.stopped_by, outcome.result) == ("SIGTERM", {})
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoints(stopped)[-1] == "step-00000006" and not (Path(stopped.output) / "result.json").exists()
    watched_by()
    trained, step = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda of, data: (trained.append(data.step + 1), step(of, data)))
    train(resumed(stopped))
    assert trained == [7, 8, 9, 10, 11, 12], "a run that starts anew ends the same"
    extra = Path(stopped.output) / "checkpoints" / "step-00000006"
    assert {file.name for file in extra.iterdir()} >= {"model.safetensors", "optimizer.safetensors"}
    for file in extra.iterdir():
        file.unlink()
    extra.rmdir()  # the stop's own checkpoint, which the uninterrupted run has no reason to write
    assert_same_end(stopped, whole)


@pytest.mark.parametrize("within", ["step", "save"])
def test_a_signal_in_the_last_step_or_save_leaves_the_end_of_the_run_to_a_resume(
    toy: Toy, watched_by: Callable[..., None], monkeypatch: pytest.MonkeyPatch, within: str
) -> None:
    """The last evaluation and the baselines may take longer than a cluster waits."""
    whole, stopped = (interruptible(toy, name, "lora") for name in ("whole", "stopped"))
    train(whole)
    last, save = int(checkpoints(whole)[-1].removeprefix("step-")), checkpoint.save

    def saved(root: Path, snapshot: checkpoint.Snapshot) -> Path:
        if within == "save" and snapshot.state.step == last:
            signal.raise_signal(signal.SIGTERM)
        return save(root, snapshot)

    monkeypatch.setattr(checkpoint, "save", saved)
    watched_by(*[SignalAt(last, signal.SIGTERM)] * (within == "step"))
    assert run.train(stopped, quiet).stopped_by == "SIGTERM"
    assert checkpoints(stopped)[-1] == checkpoints(whole)[-1] and not (Path(stopped.output) / "result.json").exists()
    watched_by()
    train(resumed(stopped))
    assert_same_end(stopped, whole)


@pytest.mark.parametrize(("sent", "stopped"), [(None, 64), (1, 1), (20, 31), (64, 64)])
def test_ranks_are_not_asked_for_signals_in_every_step(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, sent: int | None, stopped: int
) -> None:
    """With all the time of the world only after steps 1, 3, 7 ..., where the host waits anyway, and at the end."""
    monkeypatch.setattr(signals, "ROUND", 1e9)
    loop, rounds, ask, step = {"max_steps": 64, "eval_every": 32}, [], Trainer.stop_requested, Trainer.train_step

    def asked(of: Trainer) -> str | None:
        rounds.append(of.state.step)
        return ask(of)

    def trained(of: Trainer, data: StepData) -> None:
        step(of, data)
        if of.state.step == sent:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "stop_requested", asked)
    monkeypatch.setattr(Trainer, "train_step", trained)
    outcome = run.train(toy(loop=loop, log={"every": 32}, checkpoint={"every": 32}), quiet)
    assert outcome.stopped_by == (None if sent is None else "SIGTERM")
    due = [1, 3, 7, 15, 31, 32, 64]
    assert rounds == [*(s for s in due if s <= stopped), stopped]


@pytest.mark.parametrize(
    ("owner", "name", "call", "last"), [(Trainer, "evaluate", 2, 8), (checkpoint, "save_tensors", 4, 9)]
)
def test_a_signal_in_an_evaluation_or_a_save_lets_it_finish(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, last: int
) -> None:
    """The evaluation after step 8, or the second file of its checkpoint, after which one more step is done."""
    whole, stopped = (interruptible(toy, output, "lora") for output in ("whole", "stopped"))
    train(whole)
    real, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*args: Any) -> Any:
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        assert run.train(stopped, quiet).stopped_by == "SIGTERM"
    assert checkpoints(stopped)[-1] == f"step-{last:08d}"
    train(resumed(stopped))
    if last != 8:  # a checkpoint that the uninterrupted run has no reason to write
        shutil.rmtree(Path(stopped.output) / "checkpoints" / f"step-{last:08d}")
    assert_same_end(stopped, whole)


def test_checkpoints_on_another_disk_behind_a_link_are_saved_pruned_and_taken_up(
    toy: Toy, watched_by: Callable[..., None], tmp_path: Path
) -> None:
    settings = {"loop": {"max_steps": 8, "eval_every": 2}, "checkpoint": {"keep": 1}}
    whole, linked = toy("whole", **settings), toy("linked", **settings)
    train(whole)
    (tmp_path / "scratch").mkdir()
    Path(linked.output).mkdir()
    (Path(linked.output) / "checkpoints").symlink_to(tmp_path / "scratch")
    watched_by(SignalAt(5, signal.SIGTERM))
    assert run.train(linked, quiet).stopped_by == "SIGTERM"
    watched_by()
    train(resumed(linked))
    assert_same_end(linked, whole)
    assert {".lock", *checkpoints(whole)} == {folder.name for folder in (tmp_path / "scratch").iterdir()}
    assert (Path(linked.output) / "checkpoints").is_symlink()


def test_devices_and_rows_may_change_on_the_way(toy: Toy, watched_by: Callable[..., None]) -> None:
    whole, moved = toy("whole"), toy("moved")
    train(whole)
    watched_by(SignalAt(3, signal.SIGTERM))
    assert run.train(moved, quiet).stopped_by == "SIGTERM"
    watched_by()
    moved = resumed(replace(moved, loop=replace(moved.loop, packs_per_device=2, eval_packs_per_device=1)))
    train(moved)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)


def test_a_resumed_run_must_be_the_same_run(toy: Toy, watched_by: Callable[..., None]) -> None:
    cfg = toy()
    watched_by(SignalAt(3, signal.SIGTERM))
    run.train(cfg, quiet)
    watched_by()
    log = (Path(cfg.output) / "metrics.jsonl").read_bytes()
    others = {
        "seed": replace(cfg, seed=1),
        "optim.lr": replace(cfg, optim=replace(cfg.optim, lr=2e-3)),
        "loop.packs_per_step": replace(cfg, loop=replace(cfg.loop, packs_per_step=8)),
        "loop.max_steps": replace(cfg, loop=replace(cfg.loop, max_steps=9)),
        "adapter.r": replace(cfg, adapter=replace(cfg.adapter, r=4)),
        "model.pooling": replace(cfg, model=replace(cfg.model, pooling="cls")),
    }
    for name, other in others.items():
        with pytest.raises(CheckpointError, match=rf"another run: .*\b{name} was \S+, is \S+") as caught:
            run.train(resumed(other), quiet)
        assert "\n" not in str(caught.value)
    path = Path(str(cfg.data.train))
    path.write_text(path.read_text().replace("alpha", "gamma", 1))
    with pytest.raises(CheckpointError, match="another run: data was "):
        run.train(resumed(replace(cfg, data=replace(cfg.data, valid=None, test=None))), quiet)
    assert (Path(cfg.output) / "metrics.jsonl").read_bytes() == log


def test_a_folder_has_one_run_at_a_time(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = toy(loop={"max_steps": 2})
    (tmp_path / "toy.yaml").write_text(settings.dump(cfg))
    words = ["train", "--config", str(tmp_path / "toy.yaml")]
    with claimed(Path(cfg.output)):
        assert main(words) == 2
    assert "is in use by a running process" in capsys.readouterr().err
    assert main(words) == 0
    assert main(words) == 2
    assert "already holds a run; go on with --checkpoint.resume auto" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot be written"):
        run.train(replace(cfg, output=str(tmp_path / "toy.yaml" / "below")), quiet)


def test_two_runs_at_a_time_cannot_share_a_folder_of_checkpoints(toy: Toy, tmp_path: Path) -> None:
    """They would prune each other's."""
    cfg, scratch = toy(), tmp_path / "scratch"
    Path(cfg.output).mkdir()
    scratch.mkdir()
    (Path(cfg.output) / "checkpoints").symlink_to(scratch)
    with claimed(scratch), pytest.raises(ConfigError, match="scratch is in use by a running process"):
        run.train(cfg, quiet)
    assert list(scratch.glob("step-*")) == []


def test_resuming_a_finished_run_leaves_it_as_it_is(toy: Toy) -> None:
    cfg = toy()
    train(cfg)
    out = Path(cfg.output)

    def content() -> dict[str, bytes]:
        return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}

    before = content()
    train(resumed(cfg))
    after = content()
    changed = {name for name in set(before) | set(after) if before.get(name) != after.get(name)}
    assert changed == {"config.yaml"}  # checkpoint.resume


def test_the_resolved_configuration_reads_back_equal(toy: Toy) -> None:
    cfg = toy(data={"keep": {"label": ["alpha", "beta"]}}, loop={"max_steps": 1}, optim={"betas": (0.8, 0.95)})
    train(cfg)
    read = settings.read_config(Path(cfg.output) / "config.yaml")
    assert read == replace(cfg, task=replace(cfg.task, labels=("alpha", "beta")))


@pytest.mark.parametrize(
    "label", ["basic helix-loop-helix", "token=abc", "x\ny", "1e3", "~", "é: -", "https://a:b@c/d"]
)
def test_a_run_with_any_class_name_is_read_back(toy: Toy, label: str) -> None:
    cfg = toy(task={"labels": (label, "beta")}, loop={"max_steps": 1, "eval_every": 0})
    for split in ("train", "valid", "test"):
        path = Path(str(getattr(cfg.data, split)))
        frame = pd.read_csv(path)
        frame.loc[frame["label"] == "alpha", "label"] = label
        frame.to_csv(path, index=False)
    run.train(cfg)
    saved, task = read_run(Path(cfg.output))
    assert task.labels == (label, "beta")
    check_values(saved)


@pytest.mark.parametrize("name", ["adapter/notes.txt", "config.yaml", "metrics.jsonl", "base", "valid_ids.txt"])
def test_train_replaces_nothing_of_others(toy: Toy, name: str) -> None:
    cfg = toy(loop={"max_steps": 1, "eval_every": 0})
    path = Path(cfg.output) / name
    path.parent.mkdir(parents=True)
    path.write_text("mine") if "." in name else path.symlink_to("nowhere")
    before = sorted(Path(cfg.output).rglob("*"))
    with pytest.raises(ConfigError, match=f"{name} is in the way: esm-neuron would replace it, and did not write it"):
        run.train(cfg)
    assert sorted(set(Path(cfg.output).rglob("*")) - {Path(cfg.output) / ".lock"}) == before
    assert "." not in name or path.read_text() == "mine"


def test_train_takes_no_file_that_it_would_replace(toy: Toy) -> None:
    cfg = toy(loop={"max_steps": 1, "eval_every": 0})
    data = Path(cfg.output) / "rejected.tsv"
    data.parent.mkdir()
    data.write_text(Path(str(cfg.data.train)).read_text().replace(",", "\t"))
    with pytest.raises(ConfigError, match=r"rejected.tsv would replace what data.train .* names"):
        run.train(replace(cfg, data=replace(cfg.data, train=str(data))))
    assert data.exists()


def test_an_id_is_one_line_of_the_list_of_sampled_ones(toy: Toy) -> None:
    cfg = toy(data={"valid": None, "test": None, "valid_fraction": 0.5}, loop={"max_steps": 1, "eval_every": 0})
    path = Path(str(cfg.data.train))
    path.write_text(re.sub(r"(?m)^(0-\d+),", r'"\1\n\1",', path.read_text()))
    run.train(cfg)
    lines = (Path(cfg.output) / "valid_ids.txt").read_text().splitlines()
    assert len(lines) == 30 and all(re.fullmatch(r"(0-\d+)\\n\1", line) for line in lines)
