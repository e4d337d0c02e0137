"""What only a trn1 can show: `make test-trn1` runs this there and writes docs/dev/trn1-report.md."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esm_neuron.backends.neuron_env import neuron_cores
from esm_neuron.config import TrainConfig, settings
from esm_neuron.training.checkpoint import step_folder

pytestmark = pytest.mark.trn1

Toy = Callable[..., TrainConfig]
Train = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
FIRST, LATER = 1e-4, 1e-2
"""Largest relative difference of a loss between the CPU and Trainium, both in float32: at step 1, and over 8 steps."""


def neuron(cfg: TrainConfig, tp: int, name: str) -> TrainConfig:
    """The same run on Trainium, in another folder."""
    output = str(Path(cfg.output).with_name(name))
    return replace(cfg, backend="neuron", output=output, parallel=replace(cfg.parallel, tp=tp))


def differences(a: list[float], b: list[float]) -> list[float]:
    """Relative difference of each pair."""
    return [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize(("processes", "tp"), [(1, 1), (2, 1), (2, 2)])
def test_losses_equal_those_of_the_cpu(toy: Toy, train: Train, report: Any, processes: int, tp: int) -> None:
    cfg = toy("cpu", loop={"packs_per_device": 2})
    ours = train(neuron(cfg, tp, "neuron"), processes)
    found = differences(ours.losses, train(cfg).losses)
    where = f"{processes} cores, tp {tp}"
    report.add(f"loss against the CPU, {where}: step 1", f"{found[0]:.1e}", f"<= {FIRST:.0e}")
    report.add(f"loss against the CPU, {where}: all 8 steps", f"{max(found):.1e}", f"<= {LATER:.0e}")
    assert found[0] <= FIRST
    assert max(found) <= LATER


def test_no_program_is_compiled_after_the_first_steps(toy: Toy, train: Train, report: Any) -> None:
    run = train(neuron(toy(loop={"packs_per_device": 2, "eval_every": 4}), 2, "graphs"), 2)
    report.add("programs after each of 8 steps, validation after 4", ", ".join(map(str, run.graphs)), "two levels")
    assert run.graphs[1] == run.graphs[3]
    assert run.graphs[4] == run.graphs[7]


def test_programs_compiled_ahead_serve_the_training(
    toy: Toy, train: Train, command: Callable[..., str], report: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", str(tmp_path / "cache"))
    cfg = neuron(toy(loop={"packs_per_device": 2}), 2, "ahead")
    command("compile", cfg, 2, before=("neuron_parallel_compile",))
    assert not Path(cfg.output).exists()
    compiled = set((tmp_path / "cache").rglob("*.neff"))
    train(cfg, 2)
    more = set((tmp_path / "cache").rglob("*.neff")) - compiled
    report.add("programs compiled ahead, and by the training after it", f"{len(compiled)}, {len(more)}", "some, 0")
    assert compiled
    assert not more


def test_a_run_goes_on_at_another_tensor_parallel_degree(toy: Toy, train: Train, report: Any) -> None:
    cfg = neuron(toy(loop={"packs_per_device": 2}, checkpoint={"every": 4}), 2, "resumed")
    whole = train(cfg, 2)
    out = Path(cfg.output)
    shutil.rmtree(step_folder(out / "checkpoints", 8))
    (out / "result.json").unlink()
    again = replace(cfg, parallel=replace(cfg.parallel, tp=1), checkpoint=replace(cfg.checkpoint, resume="auto"))
    resumed = train(again, 2)
    found = max(differences(resumed.losses[4:], whole.losses[4:]))
    report.add("losses 5 to 8, saved at tp 2 and resumed at tp 1 x dp 2", f"{found:.1e}", f"<= {FIRST:.0e}")
    assert resumed.losses[:4] == whole.losses[:4]
    assert found <= FIRST


@pytest.mark.parametrize(("precision", "zero1"), [("fp32", True), ("bf16", True), ("bf16", False)])
@pytest.mark.parametrize(("processes", "tp"), [(2, 2), (2, 1), (32, 1), (32, 4), (32, 8)])
def test_short_training_of_the_650m(
    train: Train,
    report: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    processes: int,
    tp: int,
    precision: str,
    zero1: bool,
) -> None:
    """In bf16 without ZeRO-1 the weights have no float32 masters, and the backend turns stochastic rounding on."""
    if neuron_cores() < processes:
        pytest.skip(
            f"{processes} cores asked for, this instance has {neuron_cores()}; make test-trn1 on a trn1.32xlarge"
        )
    monkeypatch.chdir(ROOT)  # the demo's configuration names its data from there
    demo = settings.read_config(Path("configs/demo.yaml"))
    cfg = replace(
        demo,
        output=str(tmp_path / "demo"),
        model=replace(demo.model, name="esm2_t33_650M", init="random", gradient_checkpointing=True),
        parallel=replace(demo.parallel, pad_heads=tp > 4, zero1=zero1),
        loop=replace(
            demo.loop,
            max_steps=20,
            eval_every=20,
            packs_per_step=32,
            packs_per_device=1,
            eval_packs_per_device=1,
            precision=precision,
        ),
    )
    run = train(neuron(cfg, tp, "neuron"), processes)
    what = f"650M, LoRA, {precision}, {processes} cores, tp {tp}{'' if zero1 else ', no ZeRO-1'}"
    early, late = (statistics.mean(losses) for losses in (run.losses[:5], run.losses[-5:]))
    report.add(f"{what}: mean loss of the first and last 5 steps", f"{early:.4f}, {late:.4f}", "finite")
    report.add(f"{what}: residues a second", f"{run.residues_per_second:,.0f}", "a figure")
    assert math.isfinite(early) and math.isfinite(late)
