"""Estimate time and money of a run on rented instances by a roofline.

On each device a step takes the longer of two times: its matrix products at an assumed share of the peak, or reading the
weights. Communication with tensor- and data-parallel peers is added, and on trn1 the softmaxes (`trn1.py`); no overlap
is assumed. A trn1 waits for its host where that takes longer. Validation, reading data and saving are left out. Prices
and data of devices come from instances.yaml, or a file like it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from esm_neuron.backends.topology import NEURON_TP, legal_tp
from esm_neuron.config import TrainConfig, require
from esm_neuron.config.rules import accumulated_passes, check_backend
from esm_neuron.errors import ConfigError
from esm_neuron.models.shapes import EsmShape, shape_of
from esm_neuron.models.tensor_parallel import in_block
from esm_neuron.planning.instances import Instance, PriceList, price_of, read_prices
from esm_neuron.planning.memory import HEADS, predict_memory
from esm_neuron.planning.plan import RunPlan, halve
from esm_neuron.planning.trn1 import host_seconds, instructions, softmax_seconds
from esm_neuron.redact import Lines

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an estimate has to know of a run."""

    steps: int
    packs_per_step: int
    """Over all devices."""
    pack_tokens: int
    residues_per_step: float

    @classmethod
    def of(cls, plan: RunPlan) -> Work:
        """Return the work of a plan, which has read the run's data."""
        epoch = plan.epoch
        packs, tokens, residues = epoch.packs_per_step, epoch.pack_tokens, epoch.residues / epoch.steps
        return cls(steps=plan.steps, packs_per_step=packs, pack_tokens=tokens, residues_per_step=residues)

    @classmethod
    def of_steps(cls, cfg: TrainConfig, steps: int) -> Work:
        """Return the work of some steps of full packs, for which no data has to be read."""
        packs, tokens = cfg.loop.packs_per_step, cfg.data.pack_tokens
        return cls(steps=steps, packs_per_step=packs, pack_tokens=tokens, residues_per_step=packs * tokens)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One way to run a job on one kind of instance."""

    instance: str
    nodes: int
    tp: int
    dp: int
    state_gib: float
    """Weights, gradients and moments per device, GiB."""
    peak_gib: float
    """The same with the activations of a step, GiB, by `memory.predict_memory`."""
    refused: str | None = None
    """Why this does not work; the numbers below are then 0."""
    tokens_per_second: float = 0.0
    """Over all devices, padding included."""
    residues_per_second: float = 0.0
    hours: float = 0.0
    step_seconds: float = 0.0
    host_seconds: float = 0.0
    """What the host of a trn1 needs for a step, at the same time."""
    compile_hours: float = 0.0
    """Compilation before training, one graph after the other: the longest assumed. Dollars include it."""
    dollars: float | None = None
    """On demand; None if the price is not known."""
    spot_dollars: float | None = None


def estimates(
    cfg: TrainConfig, work: Work, shape: EsmShape, prices: PriceList, nodes: int = 1, market: str = "ec2"
) -> list[Estimate]:
    """Estimate every legal tensor-parallel degree on `nodes` of every instance; refused ones have a reason."""
    made = []
    for name, instance in prices.instances.items():
        if nodes > 1 and instance.network is None:
            continue
        legal = legal_tp(shape.heads, shape.intermediate, cfg.parallel.pad_heads)
        of_kind = NEURON_TP[instance.devices] if instance.kind == "neuron" else (1,)
        made += [_estimate(cfg, work, shape, prices, name, nodes, tp, market) for tp in of_kind if tp in legal]
    return made


def priced(
    cfg: TrainConfig, plan: RunPlan, instance: str, prices: Path | None, nodes: int
) -> tuple[list[Estimate], list[str]]:
    """Return the estimates of a plan, and what to say of an instance by the price list in a file (None: ours).

    Raise ConfigError where the shape of the model is not known.
    """
    price_list = read_prices(prices)
    asked, market = price_of(instance, price_list)
    shape = shape_of(cfg.model)
    if shape is None:
        raise ConfigError(f"--instance: the shape of {cfg.model.name} is not known; name a local folder or an ESM-2")
    made = estimates(cfg, Work.of(plan), shape, price_list, nodes, market)
    lines = [render(made, price_list, asked, market)]
    if price_list.instances[asked].kind == "neuron":
        lines += explain_trn1(cfg, plan, shape, price_list, made, asked, market)
    return made, lines


def _estimate(
    cfg: TrainConfig, work: Work, shape: EsmShape, prices: PriceList, name: str, nodes: int, tp: int, market: str
) -> Estimate:
    instance, assumed = prices.instances[name], prices.assumptions
    dp = instance.devices * nodes // tp
    backend = "neuron" if instance.kind == "neuron" else "cuda"
    there = replace(cfg, backend=backend, parallel=replace(cfg.parallel, tp=tp))
    memory = predict_memory(there, shape, dp)
    held, peak = memory.state / GIB, memory.total / GIB
    place = Estimate(instance=name, nodes=nodes, tp=tp, dp=dp, state_gib=held, peak_gib=peak)
    try:
        check_backend(there)
        instance.check_precision(cfg)
        passes = accumulated_passes(cfg, dp)
        require(
            peak < instance.gib,
            f"a device needs {peak:.1f} of {instance.gib:g} GiB, {held:.1f} of them for weights, gradients and moments",
        )
    except ConfigError as error:
        return replace(place, refused=str(error))
    slots = work.packs_per_step * work.pack_tokens
    share = instance.utilisation.get(computed_in(cfg, instance), assumed.utilisation)
    device = step_seconds(cfg, shape, instance, nodes, tp, slots, passes, share)
    host, compiling = 0.0, 0.0
    if instance.kind == "neuron":
        host = host_seconds(cfg, shape, passes)
        compiling = sum(instructions(cfg, shape).values()) / 1e3 * assumed.compile_minutes[1] / 60
    seconds = max(device, host)
    hours = work.steps * seconds / 3600
    price = instance.prices.get(market)
    dollars = None if price is None else price * nodes * (hours + compiling)
    return replace(
        place,
        tokens_per_second=slots / seconds,
        residues_per_second=work.residues_per_step / seconds,
        hours=hours,
        step_seconds=device,
        host_seconds=host,
        compile_hours=compiling,
        dollars=dollars,
        spot_dollars=None if dollars is None else dollars * assumed.spot_share,
    )


def trained_parameters(cfg: TrainConfig, shape: EsmShape) -> int:
    """Return the number of parameters with gradients, without the task's head."""
    if cfg.adapter.kind == "none":
        return shape.parameter_count()
    if cfg.adapter.kind in HEADS:
        return 0
    linears = {name.removesuffix(".weight"): size for name, size in shape.parameters().items() if len(size) == 2}
    return sum(cfg.adapter.r * sum(size) for name, size in linears.items() if in_block(name) in cfg.adapter.targets)


def step_seconds(
    cfg: TrainConfig, shape: EsmShape, instance: Instance, nodes: int, tp: int, slots: float, passes: int, share: float
) -> float:
    """Return the seconds of an optimizer step on a device by the roofline of this module.

    The step has `slots` tokens over all devices, padding included, in `passes` forward passes per device, and reaches
    a `share` of the peak.
    """
    bf16 = cfg.loop.precision == "bf16"
    dp = instance.devices * nodes // tp
    linear = shape.layers * (4 * shape.hidden**2 + 2 * shape.hidden * shape.intermediate)
    forward = 2 * linear + 4 * shape.layers * shape.hidden * cfg.data.pack_tokens  # per token: linears, attention
    # forward, gradients of the inputs, and forward again
    runs = 1 if cfg.adapter.kind in HEADS else 2 + cfg.model.gradient_checkpointing
    flops = runs * forward + (2 * linear if cfg.adapter.kind == "none" else 0)
    products = flops * slots / (dp * tp) / (instance.peak[computed_in(cfg, instance)] * 1e12 * share)
    reading = passes * runs * linear * (2 if bf16 else 4) / tp / (instance.memory * 1e9)
    # ring all-reduce: 2 (n - 1) / n of the bytes cross each link; two all-reduces per block and direction
    across_tp = 2 * runs * shape.layers * slots / dp * shape.hidden * (2 if bf16 else 4) * 2 * (tp - 1) / tp
    across_dp = 4 * trained_parameters(cfg, shape) / tp * 2 * (dp - 1) / dp
    summing = (across_tp + across_dp) / (instance.link * 1e9)
    if nodes > 1 and instance.network is not None:
        summing += across_dp * tp / (instance.network / 8 * 1e9)
    softmax = softmax_seconds(cfg, shape, tp, slots / dp) if instance.kind == "neuron" else 0.0
    return max(products, reading) + softmax + summing


def computed_in(cfg: TrainConfig, instance: Instance) -> str:
    """Return the precision in which an instance computes a run's matrix products, a key of its peaks."""
    if cfg.loop.precision == "bf16":
        return "bf16"
    return "tf32" if cfg.loop.tf32 and "tf32" in instance.peak else "fp32"


def render(made: list[Estimate], prices: PriceList, asked: str, market: str) -> str:
    """Return the estimates as text: every degree on the instance `asked`; for each other instance the cheapest one, or
    the fastest if its price is not known."""
    assumed = prices.assumptions
    mine = [e for e in made if e.instance == asked]
    nodes = made[0].nodes if made else 1
    lines = [
        f"ESTIMATES, not measurements, for {nodes} x each; {market} dollars of {prices.date}, {prices.region}",
        f"assumed: {assumed.utilisation:.0%} of the peak, or as published (instances.yaml); spot at "
        f"{assumed.spot_share:.0%} of on demand, validation left out; "
        "state = weights, gradients and moments, peak = with a step's activations",
        f"{'instance':<16} {'tp':>3} {'dp':>4} {'state GiB':>9} {'peak':>7} {'tokens/s':>10} {'residues/s':>10} "
        f"{'hours':>8} {'compile':>8} {'on demand':>10} {'spot':>8}",
    ]
    lines += [_row(e) for e in mine] or [f"{asked}: no legal tensor-parallel degree, or it cannot train with others"]
    for name in prices.instances:
        fit = [e for e in made if e.instance == name != asked and e.refused is None]
        if fit:
            lines.append(_row(min(fit, key=lambda e: e.hours if e.dollars is None else e.dollars)))
    return Lines.of(lines)


def explain_trn1(
    cfg: TrainConfig, plan: RunPlan, shape: EsmShape, prices: PriceList, made: list[Estimate], asked: str, market: str
) -> list[str]:
    """Return what is behind the estimates of a trn1: graphs, host beside device, and packs of half the length."""
    low, high = prices.assumptions.compile_minutes
    graphs = [
        f"{phase} {number:,} instructions, {number * low / 1e3:.0f} to {number * high / 1e3:.0f} min"
        for phase, number in instructions(cfg, shape).items()
    ]
    lines = [f"compiling (estimate; counted for LoRA on XLA:CPU, minutes by BERT-Large's): {'; '.join(graphs)}"]
    half, epoch = halve(cfg), plan.halved
    for e in (e for e in made if e.instance == asked and e.refused is None):
        lines.append(
            f"a step at tp {e.tp} (estimate): {e.step_seconds:.2f} s on the device, by the roofline; "
            f"{e.host_seconds:.2f} s on its host with loop.tracing {cfg.loop.tracing}, by counts and a slow host"
        )
        if half is not None and epoch is not None:
            work = Work.of(replace(plan, epoch=epoch))
            short = _estimate(half, work, shape, prices, asked, e.nodes, e.tp, market)
            lines.append(
                f"  with data.pack_tokens {epoch.pack_tokens}, twice the packs: {short.step_seconds:.2f} s on the "
                f"device; {plan.cropped:,} of {epoch.sequences:,} sequences are longer and would be cropped"
            )
    return lines


def _row(e: Estimate) -> str:
    head = f"{e.instance:<16} {e.tp:>3} {e.dp:>4} {e.state_gib:>9.2f} {e.peak_gib:>7.2f}"
    if e.refused is not None:
        return f"{head} cannot: {e.refused}"
    return (
        f"{head} {e.tokens_per_second:>10,.0f} {e.residues_per_second:>10,.0f} {e.hours:>8.2f} {e.compile_hours:>8.2f} "
        f"{_money(e.dollars):>10} {_money(e.spot_dollars):>8}"
    )


def _money(dollars: float | None) -> str:
    return "unknown" if dollars is None else f"{dollars:,.2f}"
