"""Estimates of time and dollars: their arithmetic, what they refuse, and the price list a user brings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from esm_neuron import cli
from esm_neuron.config import BackendName, TrainConfig, settings
from esm_neuron.data.labels import Labels
from esm_neuron.data.splits import load_splits
from esm_neuron.errors import ConfigError
from esm_neuron.models.shapes import SHAPES, EsmShape
from esm_neuron.planning import answers, cost, instances, trn1
from esm_neuron.planning.memory import predict_memory
from esm_neuron.planning.plan import halve, make_plan

Toy = Callable[..., TrainConfig]
PRICES = instances.read_prices()
LARGE = SHAPES["esm2_t36_3B"]


def big(toy: Toy, **changes: dict[str, object]) -> TrainConfig:
    """A run that 128 NeuronCores can share."""
    loop = {"packs_per_step": 128, "packs_per_device": 1, "precision": "bf16", "max_steps": 1000}
    return toy(**{"loop": loop, "model": {"name": "esm2_t36_3B"}, **changes})


def made(cfg: TrainConfig, shape: str = "esm2_t36_3B", nodes: int = 1, market: str = "ec2") -> list[cost.Estimate]:
    return cost.estimates(
        cfg, cost.Work.of(make_plan(cfg, load_splits(cfg, Labels))), SHAPES[shape], PRICES, nodes, market
    )


def one(found: list[cost.Estimate], instance: str, tp: int) -> cost.Estimate:
    return next(e for e in found if (e.instance, e.tp) == (instance, tp))


def test_every_legal_degree_of_every_instance_is_there_and_priced_by_its_hours(toy: Toy) -> None:
    found = made(big(toy))
    assert [e.tp for e in found if e.instance == "trn1.32xlarge"] == [1, 2, 4, 8]
    assert {e.instance for e in found} == set(PRICES.instances)
    for e in found:
        if e.refused is None:
            assert e.dp * e.tp == PRICES.instances[e.instance].devices
            price = PRICES.instances[e.instance].prices["ec2"]
            if price is None:
                assert e.dollars is None and e.spot_dollars is None
                continue
            assert e.dollars == pytest.approx(price * (e.hours + e.compile_hours))
            assert e.spot_dollars == pytest.approx(e.dollars * PRICES.assumptions.spot_share)
    assert one(made(big(toy), market="sagemaker"), "trn1n.32xlarge", 1).dollars is None, "no price, no dollars"


def test_two_nodes_halve_the_time_and_leave_out_what_works_alone(toy: Toy) -> None:
    alone, two = (one(made(big(toy), nodes=n), "trn1.32xlarge", 8) for n in (1, 2))
    assert two.dp == 2 * alone.dp
    assert 0.5 < two.hours / alone.hours < 0.6, "the sum over the network is not free"
    assert "trn1.2xlarge" not in {e.instance for e in made(big(toy), nodes=2)}


def test_a_device_without_bf16_is_refused_with_the_cure(toy: Toy) -> None:
    assert "V100 has no bf16; use loop.precision=fp32" in str(
        one(made(big(toy), "esm2_t6_8M"), "p3.2xlarge", 1).refused
    )


def test_the_roofline_by_hand() -> None:
    """The 3B on one core, whole model trained: 6 flops a parameter and token, and the attention of the row."""
    core = replace(PRICES.instances["trn1.2xlarge"], devices=1)
    cfg = TrainConfig()
    cfg = replace(cfg, adapter=replace(cfg.adapter, kind="none"), loop=replace(cfg.loop, precision="bf16"))
    blocks = LARGE.layers * 12 * LARGE.hidden**2
    flops = 4096 * (6 * blocks + 2 * 4 * LARGE.layers * LARGE.hidden * cfg.data.pack_tokens)
    # 40 heads, a score per slot of the pack, read nine times at 128 numbers a clock
    softmax = LARGE.layers * 40 * 4096 * cfg.data.pack_tokens * 9 / (128 * 1.12e9)
    assert cost.step_seconds(cfg, LARGE, core, 1, 1, 4096, 4, 0.3) == pytest.approx(flops / 0.3 / 95e12 + softmax)
    few = cost.step_seconds(cfg, LARGE, core, 1, 1, 1, 1, 0.3)
    assert few == pytest.approx(2 * blocks * 2 / 410e9 + softmax / 4096), "a single token waits for the weights"


BERT_LARGE = replace(SHAPES["esm2_t33_650M"], layers=24, hidden=1024, intermediate=4096, heads=16)
OF_150M = SHAPES["esm2_t30_150M"]


@pytest.mark.parametrize(
    ("instance", "shape", "tokens", "precision", "sequences_per_second"),
    [
        ("trn1.32xlarge", BERT_LARGE, 128, "bf16", (3836 * 0.8, 3836 * 1.25)),  # the Neuron SDK's table at 337e604
        ("g5.48xlarge", OF_150M, 512, "bf16", (160, 253)),  # AWS's ESM-2 case: plain and compiled DDP, batch 14
    ],
)
def test_published_training_lies_within_the_estimate(
    instance: str, shape: EsmShape, tokens: int, precision: str, sequences_per_second: tuple[float, float]
) -> None:
    """All weights, rows of one length, large batches: what others measured on hardware that we had not."""
    cfg = TrainConfig()
    loop = replace(cfg.loop, precision=precision, packs_per_step=1024, packs_per_device=8)
    data, adapter = replace(cfg.data, pack_tokens=tokens), replace(cfg.adapter, kind="none")
    cfg = replace(cfg, adapter=adapter, data=data, loop=loop)
    found = cost.estimates(cfg, cost.Work.of_steps(cfg, 100), shape, PRICES)
    slots = one(found, instance, 1).tokens_per_second
    low, high = sequences_per_second
    assert low <= slots / tokens <= high, f"{slots / tokens:,.0f} sequences per second"


def test_compiling_a_small_bert_takes_what_awss_sample_took() -> None:
    """BERT-base on trn1.2xlarge: a job of 23 to 25 minutes without a cache, 10 to 12 with it."""
    cfg = replace(TrainConfig(), model=replace(TrainConfig().model, gradient_checkpointing=False))
    base = replace(BERT_LARGE, layers=12, hidden=768, intermediate=3072, heads=12)
    low, high = (sum(trn1.instructions(cfg, base).values()) / 1e3 * m for m in PRICES.assumptions.compile_minutes)
    assert low < 15 and high > 11, f"{low:.0f} to {high:.0f} minutes"


def test_tf32_has_the_rate_of_bf16_on_trn1() -> None:
    core = replace(PRICES.instances["trn1.2xlarge"], devices=1)
    times = {}
    for precision, tf32 in (("bf16", False), ("fp32", True), ("fp32", False)):
        cfg = replace(TrainConfig(), loop=replace(TrainConfig().loop, precision=precision, tf32=tf32))
        softmax = trn1.softmax_seconds(cfg, LARGE, 1, 1e6)
        times[precision, tf32] = cost.step_seconds(cfg, LARGE, core, 1, 1, 1e6, 4, 0.3) - softmax
    assert times["fp32", True] == pytest.approx(times["bf16", False])
    assert times["fp32", False] == pytest.approx(4 * times["bf16", False])


def test_a_trn1_waits_for_its_host_and_says_what_it_compiles(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = big(toy, model={"name": "esm2_t33_650M"})
    config = tmp_path / "run.yaml"
    config.write_text(settings.dump(cfg))
    assert cli.main(["plan", "--config", str(config), "--instance", "trn1.32xlarge", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)["estimates"][2]
    assert (estimate["instance"], estimate["tp"]) == ("trn1.32xlarge", 1)
    once = estimate["host_seconds"]
    cfg = replace(cfg, loop=replace(cfg.loop, tracing="always"))
    config.write_text(settings.dump(cfg))
    assert cli.main(["plan", "--config", str(config), "--instance", "trn1.32xlarge", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)["estimates"][2]
    assert estimate["host_seconds"] > 20 * once > 0 and estimate["host_seconds"] > estimate["step_seconds"]
    assert estimate["hours"] == pytest.approx(1000 * estimate["host_seconds"] / 3600)
    counted = {"training pass": 15_097, "evaluation pass": 5_032, "update": 182}
    assert trn1.instructions(cfg, SHAPES["esm2_t33_650M"]) == counted
    assert estimate["compile_hours"] == pytest.approx(sum(counted.values()) / 1e3 * 1.6 / 60)
    again = replace(cfg, model=replace(cfg.model, gradient_checkpointing=True))
    assert trn1.instructions(again, SHAPES["esm2_t33_650M"])["training pass"] == 21_796
    assert cli.main(["plan", "--config", str(config), "--instance", "trn1.32xlarge"]) == 0
    said = capsys.readouterr().out
    assert "training pass 15,097 instructions, 12 to 24 min; " in said
    assert f"a step at tp 1 (estimate): {estimate['step_seconds']:.2f} s on the device" in said


def test_the_page_has_the_counts_that_are_used() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    one, again = trn1.PASS[False], trn1.PASS[True]
    assert f"| {one.per_block:,}; {again.per_block:,} with recomputation; {one.rest:,} more per pass |" in page
    assert f"| {trn1.UPDATE.rest:,} at any depth |" in page
    low, high = PRICES.assumptions.compile_minutes
    assert f"| {low} to {high} |" in page


def test_shorter_packs_read_fewer_scores_and_crop(
    toy: Toy, lengthened: Callable[[TrainConfig], TrainConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cfg = lengthened(big(toy, data={"max_residues": 1022, "pack_tokens": 1024}))
    plan = make_plan(cfg, load_splits(cfg, Labels))
    assert plan.halved is not None and plan.halved.pack_tokens == 512 and plan.halved.packs_per_step == 256
    half = halve(cfg)
    assert half is not None
    one, two = (trn1.softmax_seconds(c, LARGE, 1, 1e6) for c in (cfg, half))
    assert two == pytest.approx(one / 2)
    lengths = load_splits(cfg, Labels).train.lengths
    assert plan.cropped == sum(int(length) > 512 for length in lengths)
    assert halve(toy(data={"max_residues": 62, "pack_tokens": 64})) is None


def test_memory_is_that_of_the_device_and_its_degree(toy: Toy) -> None:
    """The figures of `predict_memory` for the backend that an instance has, not for the one the file names."""
    found = made(big(toy, adapter={"kind": "none"}))
    devices: dict[str, BackendName] = {"trn1.32xlarge": "neuron", "g5.48xlarge": "cuda"}
    for name, backend in devices.items():
        for e in (e for e in found if e.instance == name):
            cfg = big(toy, adapter={"kind": "none"}, parallel={"tp": e.tp})
            memory = predict_memory(replace(cfg, backend=backend), LARGE, e.dp)
            assert (e.state_gib, e.peak_gib) == (memory.state / cost.GIB, memory.total / cost.GIB)
    eight, four = (one(found, "trn1.32xlarge", tp) for tp in (8, 4))
    assert eight.state_gib < four.state_gib and eight.peak_gib > eight.state_gib


def test_what_cannot_be_done_says_why(toy: Toy) -> None:
    full = big(toy, adapter={"kind": "none"})
    refused = one(made(full), "g5.2xlarge", 1).refused
    assert refused is not None and "of 22 GiB, 42." in refused and refused.startswith("a device needs ")
    quantized = replace(big(toy, adapter={"kind": "qlora"}), backend="cuda")
    refused = one(made(quantized), "trn1.32xlarge", 1).refused
    assert refused is not None and "use adapter.kind=lora with loop.precision=bf16" in refused
    assert one(made(quantized), "g5.2xlarge", 1).refused is None
    odd = big(toy, loop={"packs_per_step": 4, "packs_per_device": 1})
    refused = one(made(odd), "trn1.32xlarge", 1).refused
    assert refused is not None and "loop.packs_per_step=4 is not a multiple of 32" in refused


def test_the_command_with_the_users_own_prices(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, prices = tmp_path / "run.yaml", tmp_path / "prices.yaml"
    config.write_text(settings.dump(big(toy)))
    text = (files("esm_neuron") / "planning" / "instances.yaml").read_text()
    prices.write_text(text.replace("ec2: 21.50", "ec2: 43.00").replace('date: "2026-12-01"', "date: my quote"))
    words = ["plan", "--config", str(config), "--instance", "trn1.32xlarge"]
    assert cli.main([*words, "--json"]) == 0
    theirs = json.loads(capsys.readouterr().out)["estimates"]
    assert cli.main([*words, "--json", "--prices", str(prices)]) == 0
    ours = json.loads(capsys.readouterr().out)["estimates"]
    for a, b in zip(ours, theirs, strict=True):
        if a["refused"] is None and a["dollars"] is not None:
            assert math.isclose(a["dollars"] / b["dollars"], 2 if a["instance"] == "trn1.32xlarge" else 1)
    assert cli.main([*words, "--prices", str(prices)]) == 0
    said = capsys.readouterr().out
    assert "ESTIMATES, not measurements" in said and "ec2 dollars of my quote" in said
    assert said.count("\ntrn1.32xlarge ") == 4 and said.count("\ntrn1.2xlarge ") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--instance", "p6.48xlarge"], "--instance p6.48xlarge: not in the price list; use trn1.2xlarge, trn1.32"),
        (["--instance", "trn1.2xlarge", "--nodes", "0"], "--nodes 0 must be at least 1"),
        (["--instance", "trn1.2xlarge", "--model.name", "someone/else"], "the shape of someone/else is not known"),
        (["--instance", "trn1.2xlarge", "--prices", "nowhere.yaml"], "--prices nowhere.yaml: .*No such file"),
    ],
)
def test_bad_words(
    toy: Toy, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(settings.dump(toy()))
    assert cli.main(["plan", "--config", str(config), *words]) == 2
    error = capsys.readouterr().err
    assert message.split(".*")[0] in error and message.split(".*")[-1] in error and error.count("\n") == 1


def test_a_price_list_with_a_wrong_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text((files("esm_neuron") / "planning" / "instances.yaml").read_text().replace("gib: 16", "gibs: 16"))
    with pytest.raises(ConfigError, match=r"--prices .*prices\.yaml: .*gib"):
        instances.read_prices(path)


def test_of_other_instances_the_cheapest_is_shown_or_the_fastest_where_no_price_is_known() -> None:
    slow = cost.Estimate(
        instance="trn1.32xlarge", nodes=1, tp=1, dp=32, state_gib=1, peak_gib=2, hours=9, dollars=50, spot_dollars=5
    )
    fast = replace(slow, tp=8, dp=4, hours=3, dollars=70)

    def shown(*found: cost.Estimate) -> list[str]:
        rows = cost.render(list(found), PRICES, "g5.2xlarge", "ec2").splitlines()
        return [row.split()[1] for row in rows if row.startswith("trn1.32xlarge")]

    assert shown(fast, slow) == shown(slow, fast) == ["1"]
    assert shown(replace(slow, dollars=None), replace(fast, dollars=None)) == ["8"]


def test_a_million_answers_by_hand_the_cheapest_first(toy: Toy) -> None:
    """A forward pass alone: 2 flops a parameter and token, and attention; both devices' times by their share."""
    cfg = toy(loop={"precision": "bf16", "eval_packs_per_device": 8}, data={"pack_tokens": 1024})
    epoch = replace(make_plan(cfg, load_splits(cfg, Labels)).epoch, sequences=10, residues=2980, efficiency=0.9)
    shape = SHAPES["esm2_t33_650M"]
    found = answers.answers(cfg, epoch, shape, PRICES, "ec2")
    known = [each.dollars for each in found if each.dollars is not None]
    assert known == sorted(known) and None not in [each.dollars for each in found[: len(known)]]
    (g5,) = (each for each in found if each.instance == "g5.2xlarge")
    flops = 2 * shape.layers * 12 * shape.hidden**2 + 4 * shape.layers * shape.hidden * 1024
    seconds = 1e6 * 300 / 0.9 * flops / (0.2 * 70e12)
    assert g5.hours == pytest.approx(seconds / 3600) and g5.dollars == pytest.approx(1.21 * seconds / 3600)
    assert g5.source == "20% of the peak, published training" and g5.compile_hours == 0
    (l4,) = (each for each in found if each.instance == "g6.2xlarge")
    assert l4.source == "30% of the peak, assumed"
    assert "p3.2xlarge" not in {each.instance for each in found}, "it has no bf16"
    (small,) = (
        each for each in answers.answers(cfg, epoch, SHAPES["esm2_t48_15B"], PRICES, "ec2") if "trn1.2" in each.instance
    )
    assert small.tp == 2, "a core alone does not hold it"


def test_plan_says_what_answers_cost(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(settings.dump(toy(model={"name": "esm2_t6_8M"})))
    words = ["plan", "--config", str(config), "--answers", "2000000"]
    assert cli.main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["answers"][0]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = (
        number for number, line in enumerate(lines) if line.startswith("ESTIMATES, not measurements, of predict")
    )
    assert "for 2,000,000 proteins" in lines[head] and lines[head + 2].startswith(first["instance"])
    assert lines[head + 2].split()[5] == f"{2 * first['dollars']:,.2f}"
    assert cli.main(["plan", "--config", str(config), "--answers", "0"]) == 2
