"""What only a trn1 can show, small models first; `make test-trn1` writes docs/dev/trn1-report.md there."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import step_lines
from helpers.trn1_report import REHEARSAL, Report
from parity import BF16_GRADIENT, gradient_distances

from esm_neuron.backends.neuron_env import neuron_cores
from esm_neuron.config import TrainConfig
from esm_neuron.training.checkpoint import step_folder
from esm_neuron.training.monitors import WARM_UP

pytestmark = pytest.mark.trn1

Toy = Callable[..., TrainConfig]
Watch = Callable[..., Any]
LOSS_1, LOSSES, GRADIENT = 1e-4, 1e-2, 1e-3
"""Largest relative difference between the CPU and Trainium, both in float32: of the loss of step 1, of the losses of 8
steps, and of a parameter's gradient as a share of its norm."""
MODEL_8M = {"model__name": "esm2_t6_8M"}
BF16 = {"loop__precision": "bf16"}
MINUTES_LARGE, MINUTES_OPTION = 45.0, 15.0
"""How long one more setting of a large model, or of the 150M, is expected to take, most of it in the compiler."""


def furthest(got: Any, expected: Any) -> float:
    """Return the largest relative difference of two rows of losses."""
    return float(((got - expected) / expected).abs().max())


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_graphs_by_hash_give_the_bits_of_tracing(watched: Watch, report: Report, kind: str) -> None:
    """If this fails, train with --loop.tracing always: slower, and right."""
    settings = {"parallel__tp": 2, "adapter__kind": kind}
    always, once = (watched(2, **settings, loop__tracing=way).results for way in ("always", "once"))
    different = [name for name in always if not torch.equal(once[name], always[name])]
    report.add("right", f"tiny, {kind}, tp 2: tensors that differ by hash and traced", str(len(different)), "0")
    assert always and not different


@pytest.mark.parametrize(
    ("model", "cores", "tp"), [({}, 1, 1), ({}, 2, 1), ({}, 2, 2), (MODEL_8M, 2, 2)], ids=["1", "dp2", "tp2", "8M tp2"]
)
def test_float32_is_that_of_the_cpu(watched: Watch, report: Report, model: Any, cores: int, tp: int) -> None:
    found, expected = watched(cores, parallel__tp=tp, **model).results, watched(0, **model).results
    where = f"{model.get('model__name', 'tiny')}, LoRA, float32, {cores} cores, tp {tp}, against the CPU"
    first, later = (furthest(found["losses"][part], expected["losses"][part]) for part in (slice(1), slice(None)))
    distances = gradient_distances(found, expected)
    report.add("right", f"{where}: loss of step 1", f"{first:.1e}", f"<= {LOSS_1:.0e}")
    report.add("right", f"{where}: losses of 8 steps", f"{later:.1e}", f"<= {LOSSES:.0e}")
    worst = max(distances, key=distances.__getitem__)
    report.add("right", f"{where}: worst gradient, `{worst}`", f"{distances[worst]:.1e}", f"<= {GRADIENT:.0e}")
    assert first <= LOSS_1 and later <= LOSSES and distances[worst] <= GRADIENT


@pytest.mark.parametrize(("kind", "model"), [("none", {}), ("lora", MODEL_8M)], ids=["tiny, all weights", "8M, LoRA"])
def test_gradients_in_bf16_at_tp2_are_those_at_tp1(watched: Watch, report: Report, kind: str, model: Any) -> None:
    """Losses alone would hide a gradient that was not summed over the ranks: they then differ by 0.4 %."""
    expected, got = (watched(tp, parallel__tp=tp, adapter__kind=kind, **model, **BF16).results for tp in (1, 2))
    distances, losses = gradient_distances(got, expected), furthest(got["losses"], expected["losses"])
    what = f"{model.get('model__name', 'tiny')}, {kind}, bf16, tp 2 against tp 1"
    worst = max(distances, key=distances.__getitem__)
    report.add("right", f"{what}: worst gradient, `{worst}`", f"{distances[worst]:.3f}", f"<= {BF16_GRADIENT}")
    report.add("right", f"{what}: losses of 8 steps", f"{losses:.1e}", "<= 2e-02")
    assert distances[worst] <= BF16_GRADIENT and losses <= 0.02


def test_no_graph_is_compiled_after_the_first_steps(watched: Watch, report: Report) -> None:
    facts = watched(2, parallel__tp=2).facts
    graphs = [step["graphs"] for step in facts["steps"]]
    report.add("graphs", "tiny: graphs after each of 8 steps", ", ".join(map(str, graphs)), f"level after {WARM_UP}")
    note_times(report, "tiny, tp 2", facts)
    assert len(set(graphs[WARM_UP - 1 :])) == 1


def test_the_environment_is_the_one_that_the_settings_ask_for(watched: Watch, report: Report) -> None:
    found = watched(2, parallel__tp=2).facts["environment"]
    for name, value in found.items():
        report.add("environment", f"`{name}`", f"`{value}`")
    expected = {"PJRT_DEVICE": "CPU"} if REHEARSAL else {"DISABLE_NUMERIC_CC_TOKEN": "1", "NEURON_FUSE_SOFTMAX": "1"}
    assert expected.items() <= found.items()


@pytest.mark.skipif(REHEARSAL, reason="there is no neuron_parallel_compile here")
def test_graphs_compiled_ahead_serve_the_training(
    toy: Toy, train: Any, command: Any, report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", str(tmp_path / "cache"))
    cfg = replace(toy("ahead", loop={"packs_per_device": 2}, parallel={"tp": 2}), backend="neuron")
    command("compile", cfg, 2, before=("neuron_parallel_compile",))
    assert not Path(cfg.output).exists()
    compiled = set((tmp_path / "cache").rglob("*.neff"))
    train(cfg, 2, 2)
    more = set((tmp_path / "cache").rglob("*.neff")) - compiled
    report.add("graphs", "compiled ahead, and by the training after it", f"{len(compiled)}, {len(more)}", "some, 0")
    assert compiled and not more


def test_a_run_goes_on_at_another_tensor_parallel_degree(toy: Toy, train: Any, report: Report) -> None:
    cfg = toy("resumed", loop={"packs_per_device": 1}, checkpoint={"every": 4})
    whole = train(cfg, 2, 2)
    out = Path(cfg.output)
    shutil.rmtree(step_folder(out / "checkpoints", 8))
    (out / "result.json").unlink()
    resumed = train(replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto")), 2, 1)
    apart = max(abs(a / b - 1) for a, b in zip(resumed[4:], whole[4:], strict=True))
    what = "tiny: losses 5 to 8, saved at tp 2 and resumed at tp 1 x dp 2"
    report.add("right", what, f"{apart:.1e}", f"<= {LOSS_1:.0e}")
    assert resumed[:4] == whole[:4] and apart <= LOSS_1
    graphs = [line["graphs"] for line in step_lines(cfg)]
    report.add("graphs", "tiny: graphs after each step, resumed after the fourth", ", ".join(map(str, graphs)))
    assert len(set(graphs[WARM_UP - 1 : 4])) == len(set(graphs[4 + WARM_UP - 1 :])) == 1


# LoRA of r 16 in bf16 on all cores, one pass in a step. The first setting is always run; the others are, in this order,
# as long as there is time. The last one needs a trn1.32xlarge.
LARGE = [("650M", 1, 1, False), ("650M", 1, 4, False), ("650M", 1, 2, False)]
LARGE += [*(("650M", 1, packs, True) for packs in (1, 2, 4)), ("3B", 8, 1, True)]
NAMES = {"650M": "esm2_t33_650M", "3B": "esm2_t36_3B"}


@pytest.mark.parametrize(("model", "tp", "packs", "recomputed"), LARGE)
def test_twenty_steps_of_large_models(
    watched: Watch, report: Report, model: str, tp: int, packs: int, recomputed: bool
) -> None:
    cores = 2 if REHEARSAL else neuron_cores()
    if cores < 4 * tp and tp > 1:
        pytest.skip(f"tp {tp} needs a trn1.32xlarge; this instance has {cores} NeuronCores")
    how = "recomputed" if recomputed else "nothing recomputed"
    what = f"{model}, tp {tp}, {packs} packs of 1,024 tokens per core, {how}"
    if (model, tp, packs, recomputed) != LARGE[0] and not report.has_time(what, MINUTES_LARGE):
        pytest.skip("no time left: raise TRN1_MINUTES")
    values = twenty_steps(NAMES[model], cores, tp, packs, recomputed)
    found = watched(cores, False, **BF16, **values)
    note_times(report, f"{what}, {cores} cores", found.facts, tokens=1024 * values["loop__packs_per_step"])
    assert all(math.isfinite(loss) for loss in found.results["losses"].tolist())


# The first one changes nothing, and the others change one thing each: variables, settings.
OPTIONS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "as shipped": ({}, {}),
    "no asynchronous requests": ({"NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": "0"}, {}),
    "collectives numbered": ({"DISABLE_NUMERIC_CC_TOKEN": "0"}, {}),
    "-O1": ({}, {"loop__optlevel": 1}),
    "float32 products in tf32": ({}, {"loop__tf32": True}),
    "infinity saturated": ({"NEURON_CC_FLAGS": "--enable-saturate-infinity"}, {}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_one_option_at_a_time(watched: Watch, report: Report, option: str) -> None:
    """Show what each setting of the table is worth; the losses stay what they are within bf16's rounding."""
    if not report.has_time(f"150M, {option}", MINUTES_OPTION):
        pytest.skip("no time left: raise TRN1_MINUTES")
    cores = 2 if REHEARSAL else neuron_cores()
    values = twenty_steps("esm2_t30_150M", cores, tp=1, packs=1, recomputed=False)
    shipped, found = (
        watched(cores, False, variables, **BF16, **values, **changed)
        for variables, changed in (OPTIONS["as shipped"], OPTIONS[option])
    )
    note_times(report, f"150M, {option}, {cores} cores", found.facts, tokens=1024 * values["loop__packs_per_step"])
    apart = furthest(found.results["losses"], shipped.results["losses"])
    report.add("right", f"150M, {option}: losses of 20 steps against the shipped settings'", f"{apart:.1e}", "<= 2e-02")
    assert apart <= 0.02


def twenty_steps(model: str, cores: int, tp: int, packs: int, recomputed: bool) -> dict[str, Any]:
    """Return the settings of twenty steps of LoRA, so many packs of 1,024 tokens per core and pass, a pass per step."""
    values = {"data__pack_tokens": 1024, "data__max_residues": 1022, "adapter__r": 16, "loop__max_steps": 20}
    values |= {"loop__packs_per_step": cores // tp * packs, "loop__packs_per_device": packs, "parallel__tp": tp}
    return values | {
        "model__name": model, "model__gradient_checkpointing": recomputed, "parallel__pad_heads": tp > 1,
    }  # fmt: skip


def note_times(report: Report, what: str, facts: Any, tokens: int | None = None) -> None:
    """Put a training's times on the page, `tokens` being those of a step."""
    before, during = (", ".join(f"{seconds:.1f}" for seconds in facts[key]) for key in ("compiled_before", "compiled"))
    report.add("compiling", f"{what}: seconds for each graph before the first step", before)
    report.add("compiling", f"{what}: seconds for each graph of training", during, "two graphs, each once")
    host, whole = (statistics.median(s[key] for s in facts["steps"][WARM_UP:]) for key in ("host", "all"))
    of_all = f"{1e3 * host:.1f} of {1e3 * whole:.1f}"
    report.add("host", f"{what}: milliseconds of Python in a step", of_all, "far fewer than all")
    if tokens is not None:
        report.add("host", f"{what}: tokens per second", f"{tokens / whole:,.0f}")
