"""What a trn1 process needs around it: real packages instead of placeholders, devices, and one table of settings."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from esm_neuron.backends.neuron_sdk import PACKAGES, RUNTIME, has_async_requests, host_versions
from esm_neuron.config import TrainConfig
from esm_neuron.errors import ConfigError

PLACEHOLDERS = ("0.1", "1.0")
"""Versions under which the general package index holds empty packages of these names."""
INSTALL = (
    "pip install --extra-index-url https://pip.repos.neuron.amazonaws.com -c constraints/neuron.txt -e '.[neuron]'"
)
"""In the repository's folder."""
CURE = f"install the Neuron SDK's wheels: {INSTALL}"
CACHE = "NEURON_COMPILE_CACHE_URL"
CORES_A_DEVICE = 2
"""NeuronCores of a Trainium1 chip (/dev/neuron*)."""


@dataclass(frozen=True)
class Setting:
    """One environment variable that the backend sets unless the user has."""

    name: str
    value: Callable[[TrainConfig, bool], str | None]
    """(configuration, several nodes) -> value; None where it does not apply."""
    meaning: str
    source: str
    """Where the vendor, or torch_xla, says so."""
    flags: bool = False
    """The value is a list of compiler flags: those that the user has not given are added to the user's."""


def _stochastic(cfg: TrainConfig, value: str) -> str | None:
    # with ZeRO-1 the weights have float32 masters, and rounding to nearest is right
    # a LoRA run's trained matrices are float32
    rounds = cfg.loop.precision == "bf16" and not cfg.parallel.zero1 and cfg.adapter.kind == "none"
    return value if rounds else None


def _compiler_flags(cfg: TrainConfig, nodes: bool) -> str:
    cast = "--auto-cast=matmult --auto-cast-type=tf32" if cfg.loop.tf32 else "--auto-cast=none"
    return f"--model-type=transformer {cast} --optlevel={cfg.loop.optlevel} --retry_failed_compilation"


COMPILER = "Neuron Compiler CLI Reference Guide"
TORCH = "PyTorch NeuronX Environment Variables"
RUNTIME_GUIDE = "Neuron Runtime Configuration"
EFA = "EFA on Trn1 for multi-node execution"
TROUBLESHOOTING = "PyTorch NeuronX training troubleshooting"
SETTINGS = (
    Setting(
        "NEURON_CC_FLAGS",
        _compiler_flags,
        "Fuse for transformers; never change a precision silently (`loop.tf32` asks for float32 products in tf32, "
        "`loop.optlevel` for another `-O`); compile again what failed before, since failures are cached.",
        f"{COMPILER}; Neuron Persistent Cache",
        flags=True,
    ),
    Setting(
        "XLA_PARAMETER_WRAPPING_THREADSHOLD",  # spelled so
        lambda cfg, nodes: "100000",
        "A graph with more inputs gets them as a tuple, which Neuron refuses; torch_xla's 3,200 are fewer than the "
        "update of all weights has.",
        "torch_xla 2.8, xla_graph_executor.cpp",
    ),
    Setting("NEURON_FUSE_SOFTMAX", lambda cfg, nodes: "1", "One kernel for the softmax of attention.", TORCH),
    Setting(
        "DISABLE_NUMERIC_CC_TOKEN",
        lambda cfg, nodes: "1",
        "torch_xla orders collectives by a token without adding a number to each: 8 % fewer instructions per update.",
        "torch_xla 2.8, cross_replica_reduces.cpp; the vendor's Llama 3.3 tutorial",
    ),
    Setting(
        "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS",
        lambda cfg, nodes: "3" if has_async_requests(host_versions()[RUNTIME]) else None,
        "The host prepares the next graphs while one runs, about 12 % faster by the vendor's guide. Not set over "
        "runtime 2.33 or later (SDK 2.31), which has no such mode and warns.",
        f"{RUNTIME_GUIDE}; Neuron Runtime release notes (2.31)",
    ),
    Setting(
        "NEURON_RT_EXEC_TIMEOUT",
        lambda cfg, nodes: "600",
        "Seconds that a graph may run: 30, as one page has it, are too few while peers still compile.",
        f"{RUNTIME_GUIDE} (default 30); NRT Developer Guide (default on trn1: 600)",
    ),
    Setting(
        "NEURON_RT_STOCHASTIC_ROUNDING_EN",
        lambda cfg, nodes: _stochastic(cfg, "1"),
        "loop.precision bf16 and all weights trained without parallel.zero1: small updates survive on average.",
        TORCH,
    ),
    Setting(
        "NEURON_RT_STOCHASTIC_ROUNDING_SEED",
        lambda cfg, nodes: _stochastic(cfg, str(cfg.seed)),
        "Its seed, the run's, so that tensor-parallel copies round alike.",
        TORCH,
    ),
    Setting("FI_PROVIDER", lambda cfg, nodes: "efa" if nodes else None, "Several nodes: the EFA network.", EFA),
    Setting(
        "FI_EFA_USE_DEVICE_RDMA", lambda cfg, nodes: "1" if nodes else None, "Several nodes: device to device.", EFA
    ),
    Setting(
        "FI_EFA_FORK_SAFE",
        lambda cfg, nodes: "1" if nodes else None,
        "Several nodes: kernels before 5.15 need it, newer ones pass it over.",
        f"{EFA}; Neuron Runtime Troubleshooting",
    ),
    Setting(
        CACHE,
        lambda cfg, nodes: None,
        "Yours alone: the folder or S3 prefix where compiled graphs are kept. NFS and Lustre (EFS, FSx) are "
        "refused, where the compiler's locks break, and so is --cache_dir in NEURON_CC_FLAGS beside it, which would "
        "overrule it.",
        f"Neuron Persistent Cache; {TROUBLESHOOTING}",
    ),
)
"""Every variable that matters to the backend; it sets those that have a value and that the user has not set."""


def apply_settings(cfg: TrainConfig, nodes: bool, env: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """Write the settings that the user has not made into `env` (None: this process's); returns what was written."""
    env = os.environ if env is None else env
    written = {}
    for setting in SETTINGS:
        value = setting.value(cfg, nodes)
        if value is not None and setting.flags:
            given = env.get(setting.name, "").split()
            names = {"--optlevel" if flag.startswith("-O") else flag.partition("=")[0] for flag in given}
            missing = [flag for flag in value.split() if flag.partition("=")[0] not in names]
            value = " ".join([*given, *missing]) if missing else None
        elif setting.name in env:
            value = None
        if value is not None:
            written[setting.name] = value
    env.update(written)
    return written


def cache_trouble(env: Mapping[str, str], mounts: Path = Path("/proc/mounts")) -> str | None:
    """Return why graphs cannot be kept where NEURON_COMPILE_CACHE_URL says, with the cure; None where they can."""
    url = env.get(CACHE)
    if url is None:
        return None
    flags = env.get("NEURON_CC_FLAGS", "").replace("=", " ").split()
    if "--cache_dir" in flags:
        folder = dict(zip(flags, [*flags[1:], ""], strict=True))["--cache_dir"]
        return (
            f"NEURON_CC_FLAGS has --cache_dir {folder}, which the compiler would use in place of {CACHE}={url}; remove "
            "one of the two"
        )
    kind = "" if "://" in url else file_system(Path(url), mounts)
    if kind.startswith("nfs") or kind == "lustre":  # the vendor's training-troubleshooting page names EFS and FSx
        return f"{CACHE}={url} is on {kind}, where the compiler's locks break; use a local folder or an S3 prefix"
    return None


def file_system(folder: Path, mounts: Path) -> str:
    """Return the kind of the file system that `folder` is, or would be, on; "" where the system does not say."""
    if not mounts.is_file():
        return ""
    rows = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    above = {folder.resolve(), *folder.resolve().parents}
    kinds = {point: kind for _, point, kind, *_ in rows if Path(point) in above}
    return kinds[max(kinds, key=len)] if kinds else ""


def check_packages() -> None:
    """Raise ConfigError where a Neuron package is the general index's empty placeholder."""
    found = {name: installed_version(name) for name in PACKAGES}
    empty = [f"{name} {version}" for name, version in found.items() if version in PLACEHOLDERS]
    if empty:
        raise ConfigError(f"{', '.join(empty)}: empty placeholder of the general package index; {CURE}")


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def neuron_cores(devices: Path = Path("/dev")) -> int:
    """Count the NeuronCores of this node."""
    return CORES_A_DEVICE * sum(1 for device in devices.glob("neuron*") if device.name[6:].isdigit())
