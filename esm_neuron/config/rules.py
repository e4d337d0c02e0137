"""Check settings: their ranges, and what one field cannot know alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from esm_neuron.config import TaskConfig, TrainConfig, require
from esm_neuron.config.backends import BACKENDS, named
from esm_neuron.redact import redact

MOST = 1 << 40
"""Largest number where nothing else is a bound, as for steps, tokens, devices; refuses infinity."""


def check_backend(cfg: TrainConfig) -> None:
    """Check that the backend can do what the configuration asks for.

    Raises:
        ConfigError: it cannot; the message names what to use instead.
    """
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
        can.tf32 or not loop.tf32,
        f"loop.tf32=true {here}: it is for {named(lambda b: b.tf32)}; use loop.tf32=false",
    )
    require(
        can.torch_compile or not loop.torch_compile,
        f"loop.torch_compile=true {here}: it is for {named(lambda b: b.torch_compile)}; attention by segments "
        "would be compiled anew for each pack, and backends that compile do so without being asked; use "
        "loop.torch_compile=false",
    )


def validate(cfg: TrainConfig) -> None:
    """Check a configuration to train with.

    Raises:
        ConfigError: a value is out of range or two values contradict each other; the message has the cure.
    """
    require(cfg.data.train is not None, "data.train is not given; name the training file: --data.train FILE")
    check_values(cfg)


def check_values(cfg: TrainConfig) -> None:
    """Check what `validate` checks, for a configuration without training data."""
    check_backend(cfg)
    for name, text in _texts("", asdict(cfg)):
        _check_text(name, text)
    fits = cfg.data.max_residues + 2 <= cfg.data.pack_tokens
    require(
        fits,
        f"data.max_residues={cfg.data.max_residues} and 2 special tokens do not fit a pack of "
        f"data.pack_tokens={cfg.data.pack_tokens}; use data.max_residues <= {cfg.data.pack_tokens - 2}",
    )
    if cfg.data.long_sequences == "window":
        require(
            cfg.data.window_overlap < cfg.data.max_residues,
            f"data.window_overlap={cfg.data.window_overlap} must be 0 to {cfg.data.max_residues - 1} "
            "(less than data.max_residues)",
        )
    for name, value, low, high in _ranges(cfg):
        require(low <= value <= high, f"{name}={value} is outside {low} to {high}")
    for name, value in (("loop.epochs", cfg.loop.epochs), ("optim.lr", cfg.optim.lr)):
        require(0 < value <= MOST, f"{name}={value} must be above 0, and at most {MOST}")
    _check_task(cfg.task)


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


def _check_text(name: str, text: str) -> None:
    """Refuse text that no file can hold, and secrets: settings are written to config.yaml, model cards and reports."""
    sound = "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
    require(sound, f"{name}={redact(text)[:60]!r} has a zero byte or half a surrogate pair; remove it")
    require(
        redact(text) == text,
        f"{name}={redact(text)[:100]!r} holds a secret, and settings are saved and shown; name a file, or a hub id "
        "with the token in the environment variable HF_TOKEN",
    )


def _check_task(task: TaskConfig) -> None:
    """Check weights and scales; which settings a task uses is its own to say, see `tasks.check_task`."""
    weights = task.class_weights.values() if isinstance(task.class_weights, dict) else ()
    require(all(0 < weight < float("inf") for weight in weights), "task.class_weights must all be above 0")
    require(
        task.target_sd is None or 0 < task.target_sd < float("inf"),
        f"task.target_sd={task.target_sd} must be above 0",
    )


def _ranges(cfg: TrainConfig) -> list[tuple[str, float, float, float]]:
    return [
        ("seed", cfg.seed, 0, 2**63 - 1),
        ("optim.betas[0]", cfg.optim.betas[0], 0, 0.9999),
        ("optim.betas[1]", cfg.optim.betas[1], 0, 0.999999),
        ("optim.eps", cfg.optim.eps, 0, 1),
        ("adapter.alpha", cfg.adapter.alpha, 1, MOST),
        ("model.dropout", cfg.model.dropout, 0, 0.99),
        ("task.label_smoothing", cfg.task.label_smoothing, 0, 0.99),
        ("task.focal_gamma", cfg.task.focal_gamma, 0, 10),
        ("task.mask_probability", cfg.task.mask_probability, 0.001, 0.99),
        ("data.valid_fraction", cfg.data.valid_fraction, 0, 0.9),
        ("data.test_fraction", cfg.data.test_fraction, 0, 0.9),
        ("data.max_residues", cfg.data.max_residues, 1, MOST),
        ("data.window_overlap", cfg.data.window_overlap, 0, MOST),
        ("data.pack_tokens", cfg.data.pack_tokens, 3, MOST),
        ("data.max_segments", cfg.data.max_segments, 1, MOST),
        ("adapter.r", cfg.adapter.r, 1, MOST),
        ("adapter.dropout", cfg.adapter.dropout, 0, 0.99),
        ("parallel.tp", cfg.parallel.tp, 1, MOST),
        ("optim.weight_decay", cfg.optim.weight_decay, 0, MOST),
        ("optim.warmup_steps", cfg.optim.warmup_steps, 0, MOST),
        ("optim.min_lr_ratio", cfg.optim.min_lr_ratio, 0, 1),
        ("optim.max_grad_norm", cfg.optim.max_grad_norm, 0, MOST),
        ("loop.max_steps", cfg.loop.max_steps if cfg.loop.max_steps is not None else 1, 1, MOST),
        ("loop.packs_per_step", cfg.loop.packs_per_step, 1, MOST),
        ("loop.packs_per_device", cfg.loop.packs_per_device, 1, MOST),
        ("loop.eval_packs_per_device", cfg.loop.eval_packs_per_device, 1, MOST),
        ("loop.eval_every", cfg.loop.eval_every, 0, MOST),
        ("loop.patience", cfg.loop.patience, 0, MOST),
        ("loop.watchdog", cfg.loop.watchdog, 0, MOST),
        ("loop.watchdog_slow", cfg.loop.watchdog_slow, 0, MOST),
        ("checkpoint.every", cfg.checkpoint.every, 0, MOST),
        ("checkpoint.keep", cfg.checkpoint.keep, 1, MOST),
        ("log.every", cfg.log.every, 1, MOST),
    ]
