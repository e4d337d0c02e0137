"""Check settings: their ranges, and what one field cannot know alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from operator import attrgetter

from esm_neuron.config import EVERY_LAYER, LoopConfig, TaskConfig, TrainConfig, require
from esm_neuron.config.backends import BACKENDS, named
from esm_neuron.errors import ConfigError
from esm_neuron.redact import redact

MOST = 1 << 40
"""Largest number where nothing else is a bound, as for steps, tokens, devices; refuses infinity."""
PASS_TOKENS = 1 << 26
"""Most tokens in one forward pass of a device, filler included: far more than any device has memory for."""
RANGES: dict[tuple[float, float], str] = {
    (0, MOST): "data.window_overlap optim.weight_decay optim.warmup_steps optim.max_grad_norm loop.eval_every "
    "loop.patience loop.min_steps loop.watchdog loop.watchdog_slow checkpoint.every",
    (1, MOST): "data.min_residues data.max_rows adapter.alpha loop.max_steps checkpoint.keep log.every",
    # of these there is memory, or a place in a list
    (1, 1 << 20): "data.max_residues loop.packs_per_step",
    (1, 1 << 16): "data.max_segments adapter.r parallel.tp loop.packs_per_device loop.eval_packs_per_device",
    (3, 1 << 22): "data.pack_tokens",
    (1, 3): "loop.optlevel",
    (1, 1000): "loop.min_evals",
    (1, 100): "seeds",
    (2, 100): "data.folds",
    (0, 0.9): "data.valid_fraction data.test_fraction",
    (0, 0.99): "model.dropout adapter.dropout task.label_smoothing",
    (0, 1): "optim.eps optim.min_lr_ratio optim.warmup_ratio",
    (0, 10): "task.focal_gamma",
    (0.001, 0.99): "task.mask_probability",
    (0, 2**63 - 1): "seed data.sample_seed",
}
"""(Least value, largest value) -> the settings that have this range."""

PLACES = (
    "output", "model.name", "model.revision", "data.train", "data.valid", "data.test", "data.cache",
    "adapter.init_from",
)  # fmt: skip
"""Settings that name a place, where a URL can bring a password. The others hold names of columns and classes, which are
data: they may look like anything, and are saved as they are."""


def check_backend(cfg: TrainConfig) -> None:
    """Raise ConfigError where the backend cannot do what the configuration asks for."""
    can, parallel, loop = BACKENDS[cfg.backend], cfg.parallel, cfg.loop
    here = f"with backend={cfg.backend}"
    require(
        cfg.adapter.kind != "qlora" or cfg.can_quantize,
        f"adapter.kind=qlora {here}, parallel.tp={parallel.tp}: it is for {named(lambda b: b.quantizes)}, with whole "
        "linears; use adapter.kind=lora with loop.precision=bf16",
    )
    require(
        can.fsdp or not parallel.fsdp,
        f"parallel.fsdp=true {here}: it is for {named(lambda b: b.fsdp)}; use parallel.tp, or on "
        f"{named(lambda b: b.zero1)} parallel.zero1",
    )
    require(
        not (parallel.fsdp and cfg.adapter.kind == "qlora"),
        "parallel.fsdp=true with adapter.kind=qlora: quantized weights are not cut; use parallel.fsdp=false (each "
        "GPU holds them), or adapter.kind=lora with loop.precision=bf16",
    )
    copies = cfg.adapter.kind == "none" and loop.precision == "bf16" and not cfg.model.gradient_checkpointing
    require(
        not (parallel.fsdp and copies),
        "parallel.fsdp=true, adapter.kind=none, loop.precision=bf16: each GPU would keep bfloat16 copies of all "
        "weights to the backward pass; use model.gradient_checkpointing=true",
    )
    require(
        cfg.optim.kind == "adamw" or (can.adamw8bit and not parallel.fsdp),
        f"optim.kind={cfg.optim.kind} {here}, parallel.fsdp={str(parallel.fsdp).lower()}: it is for "
        f"{named(lambda b: b.adamw8bit)} without fsdp; use optim.kind=adamw",
    )
    require(
        can.tf32 or not loop.tf32, f"loop.tf32=true {here}: it is for {named(lambda b: b.tf32)}; use loop.tf32=false"
    )
    require(
        can.optlevel or loop.optlevel == LoopConfig.optlevel,
        f"loop.optlevel={loop.optlevel} {here}: it is for {named(lambda b: b.optlevel)}; use "
        f"loop.optlevel={LoopConfig.optlevel}",
    )
    require(
        can.torch_compile or not loop.torch_compile,
        f"loop.torch_compile=true {here}: it is for {named(lambda b: b.torch_compile)}; attention by segments "
        "would be compiled anew for each pack, and backends that compile do so without being asked; use "
        "loop.torch_compile=false",
    )


def check_probe(cfg: TrainConfig) -> None:
    """Raise ConfigError where what the head reads, or how it is fitted, contradicts itself."""
    model, probes = cfg.model, cfg.adapter.kind == "probe"
    layers = model.layers
    require(not isinstance(layers, int) or 1 <= layers <= 1_000, f"model.layers={layers} is outside 1 to 1000")
    require(
        layers != "auto" or probes,
        "model.layers=auto is chosen by a probe (adapter.kind=probe); give the number that one has chosen, or name its "
        "run: adapter.init_from",
    )
    require(
        not probes or layers != "mix",
        "model.layers=mix with adapter.kind=probe: its weights are learned by steps; use concat, which can weigh each "
        "layer, or auto",
    )
    require(
        model.pooling != "attention" or (not probes and layers not in EVERY_LAYER),
        f"model.pooling=attention with adapter.kind={cfg.adapter.kind}, model.layers={layers}: its weights are learned "
        "by steps, for one layer; use mean, mean+termini or cls",
    )
    require(
        not probes or model.head == "linear",
        f"model.head={model.head} with adapter.kind=probe: only a linear head is fitted at once; use linear",
    )
    require(
        not (probes and cfg.parallel.fsdp),
        "parallel.fsdp=true with adapter.kind=probe: each GPU holds the frozen encoder; use parallel.fsdp=false, with "
        "loop.precision=bf16 where memory is short",
    )
    require(
        cfg.adapter.init_from is None or not probes,
        "adapter.init_from with adapter.kind=probe: a probe starts from nothing; leave it out",
    )
    require(
        cfg.seeds == 1 or not probes,
        f"seeds={cfg.seeds} with adapter.kind=probe: a probe draws nothing, so all would be equal; leave seeds out, or "
        "use adapter.kind=lora",
    )


def validate(cfg: TrainConfig) -> None:
    """Raise ConfigError where a configuration to train with has a value out of range, or two that contradict."""
    require(cfg.data.train is not None, "data.train is not given; name the training file: --data.train FILE")
    check_values(cfg)


def _check_mask_rates(task: TaskConfig) -> None:
    rates = task.mask_rates
    require(
        rates is None or (all(0 <= rate <= 0.99 for rate in rates.values()) and any(rates.values())),
        f"task.mask_rates={rates} must be 0 to 0.99 each, and one of them above 0",
    )
    require(
        rates is None or task.mask_probability == TaskConfig.mask_probability,
        f"task.mask_probability={task.mask_probability} has no effect beside task.mask_rates; leave one out",
    )


def check_values(cfg: TrainConfig) -> None:
    """Check what `validate` checks, for a configuration without training data."""
    check_backend(cfg)
    check_probe(cfg)
    check_budget(cfg)
    for name, text in _texts("", asdict(cfg)):
        sound = "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
        require(sound, f"{name}={text[:60]!r} has a zero byte or half a surrogate pair; remove it")
    for name in PLACES:
        text = attrgetter(name)(cfg) or ""
        require(
            redact(text) == text,
            f"{name}={redact(text)[:100]!r} holds a secret, and settings are saved and shown; name a file, or a hub id "
            "with the token in the environment variable HF_TOKEN",
        )
    require(
        cfg.data.max_residues + 2 <= cfg.data.pack_tokens,
        f"data.max_residues={cfg.data.max_residues} and 2 special tokens do not fit a pack of "
        f"data.pack_tokens={cfg.data.pack_tokens}; use data.max_residues <= {cfg.data.pack_tokens - 2}",
    )
    for name in ("packs_per_device", "eval_packs_per_device"):
        tokens = getattr(cfg.loop, name) * cfg.data.pack_tokens
        require(
            tokens <= PASS_TOKENS,
            f"loop.{name} x data.pack_tokens is {tokens} tokens in one pass, must be at most {PASS_TOKENS}; lower one",
        )
    require(
        cfg.data.long_sequences != "window" or cfg.data.window_overlap < cfg.data.max_residues,
        f"data.window_overlap={cfg.data.window_overlap} must be 0 to {cfg.data.max_residues - 1} "
        "(less than data.max_residues)",
    )
    ranges = [
        (name, attrgetter(name)(cfg), low, high) for (low, high), names in RANGES.items() for name in names.split()
    ]
    ranges += [(f"optim.betas[{i}]", cfg.optim.betas[i], 0, high) for i, high in enumerate((0.9999, 0.999999))]
    for name, value, low, high in ranges:
        require(value is None or low <= value <= high, f"{name}={value} is outside {low} to {high}")
    for name, value in (("loop.epochs", cfg.loop.epochs), ("optim.lr", cfg.optim.lr)):
        require(0 < value <= MOST, f"{name}={value} must be above 0, and at most {MOST}")
    # which settings a task uses is its own to say, see `tasks.check_task`
    weights = cfg.task.class_weights.values() if isinstance(cfg.task.class_weights, dict) else ()
    require(all(0 < weight < math.inf for weight in weights), "task.class_weights must all be above 0")
    _check_mask_rates(cfg.task)
    scale = cfg.task.target_sd
    require(scale is None or 0 < scale < math.inf, f"task.target_sd={scale} must be above 0")


def seconds(text: str, name: str = "--budget") -> float:
    """Return the seconds of `90s`, `30m`, `1h30m` or a plain number; raise ConfigError on other text."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    total = sum(int(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    require(total > 0, f"{name} {text}: no time; write 90s, 30m or 1h30m")
    return float(total)


def check_budget(cfg: TrainConfig) -> None:
    """Raise ConfigError where `loop.budget` is no time, or other settings leave it nothing to decide."""
    budget, data = cfg.loop.budget, cfg.data
    if budget is None:
        return
    seconds(budget, "loop.budget")
    beside = {"loop.max_steps": cfg.loop.max_steps is not None, "adapter.kind=probe": cfg.adapter.kind == "probe",
              "seeds": cfg.seeds > 1, "data.folds": data.folds is not None and data.fold is None}  # fmt: skip
    other = next((name for name, there in beside.items() if there), None)
    why = {"loop.max_steps": "both say how long training is", "adapter.kind=probe": "a probe takes no steps"}
    reason = why.get(other or "", "runs that belong together need one loop.max_steps")
    require(other is None, f"loop.budget={budget} beside {other}: {reason}; leave one of them out")


def _texts(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield the name of each setting with each text in it, keys included."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(name, key)
            yield from _texts(f"{name}.{key}".lstrip("."), item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(name, item)


def accumulated_passes(cfg: TrainConfig, dp: int) -> int:
    """Return the forward passes in an optimizer step of each of `dp` devices; raise ConfigError where they differ."""
    packs, per_device = cfg.loop.packs_per_step, cfg.loop.packs_per_device
    unit = per_device * dp
    if packs % unit:
        below, above = packs // unit * unit, (packs // unit + 1) * unit
        cure = f"{below} or {above}" if below else f"{above}, or fewer packs per device"
        raise ConfigError(
            f"loop.packs_per_step={packs} is not a multiple of {unit} (loop.packs_per_device={per_device} on {dp} "
            f"data-parallel ranks); use loop.packs_per_step={cure}"
        )
    return packs // unit
