"""Estimate hours and dollars of predictions or embeddings by a finished model, per million proteins.

By the roofline of `cost.py`: the forward pass alone, at the share of the peak that training reaches. Reading, writing
and what a trn1's host does are left out. The proteins are taken to be as long as those of the plan's training data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from esm_neuron.backends.topology import NEURON_TP, legal_tp
from esm_neuron.config import TrainConfig
from esm_neuron.data.loader import SPECIALS
from esm_neuron.errors import ConfigError
from esm_neuron.models.shapes import EsmShape, shape_of
from esm_neuron.planning.cost import GIB, computed_in, step_seconds
from esm_neuron.planning.instances import Instance, PriceList, price_of, read_prices
from esm_neuron.planning.memory import predict_memory
from esm_neuron.planning.plan import Epoch, RunPlan
from esm_neuron.planning.trn1 import instructions
from esm_neuron.redact import Lines

MILLION = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A million answers on one kind of instance: an estimate."""

    instance: str
    tp: int
    hours: float
    """Of one instance, per million proteins."""
    dollars: float | None
    """On demand, per million proteins; None if the price is not known."""
    compile_hours: float
    """Before the first answer, once, without a cache."""
    source: str
    """Where the share of the peak comes from."""


def answered(
    cfg: TrainConfig, made: RunPlan, number: int, prices: Path | None, instance: str | None
) -> tuple[list[Answers], list[str]]:
    """Return what a `number` of answers costs, as estimates and as lines, in the market of an `instance`."""
    price_list, shape = read_prices(prices), shape_of(cfg.model)
    market = "ec2" if instance is None else price_of(instance, price_list)[1]
    if shape is None:
        raise ConfigError(f"--answers: the shape of {cfg.model.name} is not known; name a local folder or an ESM-2")
    found = answers(cfg, made.epoch, shape, price_list, market)
    return found, [render(found, made.epoch, number, price_list, market)]


def answers(cfg: TrainConfig, epoch: Epoch, shape: EsmShape, prices: PriceList, market: str) -> list[Answers]:
    """Estimate every instance that holds the model, the cheapest first, those without a price last."""
    found = [_answers(cfg, epoch, shape, prices, name, market) for name in prices.instances]
    return sorted(filter(None, found), key=lambda each: math.inf if each.dollars is None else each.dollars)


def _answers(
    cfg: TrainConfig, epoch: Epoch, shape: EsmShape, prices: PriceList, name: str, market: str
) -> Answers | None:
    instance, assumed = prices.instances[name], prices.assumptions
    forward = replace(
        cfg,
        backend="neuron" if instance.kind == "neuron" else "cuda",
        adapter=replace(cfg.adapter, kind="head"),  # nothing of the encoder goes backward
        model=replace(cfg.model, gradient_checkpointing=False),
        loop=replace(cfg.loop, packs_per_device=cfg.loop.eval_packs_per_device),
    )
    tp = _least_tp(forward, shape, instance)
    precision = computed_in(cfg, instance)
    if tp is None or precision not in instance.peak:
        return None
    replicas, share = instance.devices // tp, instance.utilisation.get(precision)
    slots = replicas * cfg.loop.eval_packs_per_device * cfg.data.pack_tokens
    seconds = step_seconds(forward, shape, instance, 1, tp, slots, 1, share or assumed.utilisation)
    proteins = slots * epoch.efficiency / (epoch.residues / epoch.sequences + SPECIALS)
    kind = "assumed" if share is None else "published training"
    hours, price = MILLION / proteins * seconds / 3600, instance.prices.get(market)
    compiled = instructions(cfg, shape)["evaluation pass"] / 1e3 * assumed.compile_minutes[1] / 60
    return Answers(
        instance=name,
        tp=tp,
        hours=hours,
        dollars=None if price is None else price * hours,
        compile_hours=compiled if instance.kind == "neuron" else 0.0,
        source=f"{share or assumed.utilisation:.0%} of the peak, {kind}",
    )


def _least_tp(cfg: TrainConfig, shape: EsmShape, instance: Instance) -> int | None:
    """Return the least tensor-parallel degree at which a device holds the model; None if there is none."""
    legal = legal_tp(shape.heads, shape.intermediate, cfg.parallel.pad_heads)
    of_kind = NEURON_TP[instance.devices] if instance.kind == "neuron" else (1,)
    for tp in sorted(set(of_kind) & set(legal)):
        there = replace(cfg, parallel=replace(cfg.parallel, tp=tp))
        if predict_memory(there, shape, instance.devices // tp).total / GIB < instance.gib:
            return tp
    return None


def render(made: list[Answers], epoch: Epoch, number: int, prices: PriceList, market: str) -> str:
    """Return the estimates as text, also for `number` proteins."""
    mean = epoch.residues / epoch.sequences
    lines = [
        f"ESTIMATES, not measurements, of predict or embed for {number:,} proteins of {mean:.0f} residues, as those of "
        f"the plan; 1 x each, cheapest first; {market} dollars of {prices.date}, {prices.region}",
        f"{'instance':<16} {'tp':>3} {'h / million':>12} {'$ / million':>12} {'h in all':>9} {'$ in all':>10}  by",
    ]
    for each in made:
        total = number / MILLION
        dollars, whole = ("unknown", "unknown")
        if each.dollars is not None:
            dollars, whole = f"{each.dollars:,.3f}", f"{each.dollars * total:,.2f}"
        compiling = f"; besides, {each.compile_hours:.2f} h of compiling, once" if each.compile_hours else ""
        lines.append(
            f"{each.instance:<16} {each.tp:>3} {each.hours:>12.4f} {dollars:>12} {each.hours * total:>9.2f} "
            f"{whole:>10}  {each.source}{compiling}"
        )
    return Lines.of(lines)
