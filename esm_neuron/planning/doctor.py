"""What is here and what is missing: versions, devices, the environment, and what each backend lacks, with its cure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from packaging.requirements import Requirement

from esm_neuron.backends.neuron_env import (
    CURE,
    PACKAGES,
    PLACEHOLDERS,
    SETTINGS,
    apply_settings,
    cache_trouble,
    installed_version,
    neuron_cores,
)
from esm_neuron.backends.neuron_env import INSTALL as NEURON_INSTALL
from esm_neuron.backends.topology import NEURON_CORES
from esm_neuron.config import BackendName, TrainConfig

SHOWN = ("esm-neuron", "torch", "torch_xla", "transformers", "peft", "bitsandbytes", "optimum-neuron", *PACKAGES)
"""Packages whose versions are printed."""
INSTALL = {
    "": "pip install -e .",
    "cuda": "pip install -e '.[cuda]'",
    "xla": "pip install -e '.[xla]'",
    "neuron": NEURON_INSTALL,
}
"""Extra of the package -> how it is installed, in the repository's folder."""
NO_GPU = "none"
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of x86's AVX-512 and AMX, and of Arm, in /proc/cpuinfo."""


@dataclass(frozen=True)
class Lack:
    """Something a backend needs and this machine has not."""

    what: str
    cure: str


@dataclass(frozen=True)
class Variable:
    """An environment variable of the neuron backend."""

    name: str
    value: str | None
    """What a process of the backend sees; None where it is not set."""
    set_by: str
    """`user`, `esm-neuron`, `both` (flags of each), or `nobody`."""
    meaning: str


@dataclass(frozen=True)
class Diagnosis:
    """What `esm-neuron doctor` prints."""

    versions: Mapping[str, str | None]
    """Package -> version, None where it is not installed."""
    devices: Mapping[str, str]
    """Kind -> what there is."""
    environment: tuple[Variable, ...]
    lacks: Mapping[str, tuple[Lack, ...]]
    """Backend -> what it lacks; empty where it can run."""


def examine(cfg: TrainConfig, env: Mapping[str, str] | None = None) -> Diagnosis:
    """Look at this machine; starts the runtime of torch_xla where there is one and no Neuron device it would claim.

    Args:
        cfg: decides which variables apply.
        env: the environment; None: this process's.
    """
    versions = {"python": platform.python_version(), **{name: installed_version(name) for name in SHOWN}}
    return Diagnosis(
        versions=versions,
        devices={"cpu": _cpu(), "cuda": _cuda(), "neuron": _neuron(), "xla": _xla()},
        environment=environment(cfg, dict(os.environ if env is None else env)),
        lacks={name: tuple(lacks(name, env)) for name in get_args(BackendName)},
    )


def lacks(backend: str, env: Mapping[str, str] | None = None) -> list[Lack]:
    """What `backend` needs and does not find; `env`: the environment, None: this process's."""
    found = missing_packages("")
    if backend != "cpu":
        found += missing_packages(backend)
    if backend == "cuda" and _cuda() == NO_GPU:
        found.append(Lack("torch finds no CUDA GPU", "use a machine with an NVIDIA GPU and its driver"))
    if backend == "neuron":
        found += _no_trainium(os.environ if env is None else env)
    return found


def missing_packages(extra: str) -> list[Lack]:
    """Requirements of esm-neuron ("") or of one of its extras that are not installed, or in another version."""
    try:
        texts = importlib.metadata.requires("esm-neuron") or []
    except importlib.metadata.PackageNotFoundError:
        return [Lack("esm-neuron itself is not installed", INSTALL[""])]
    found = []
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        if not (marker is None if not extra else marker is not None and marker.evaluate({"extra": extra})):
            continue
        version = installed_version(requirement.name)
        if version is None:
            found.append(Lack(f"{requirement.name} is not installed", INSTALL[extra]))
        elif requirement.name in PACKAGES and version in PLACEHOLDERS:
            found.append(Lack(f"{requirement.name} {version} is an empty placeholder of the general index", CURE))
        elif not requirement.specifier.contains(version, prereleases=True):
            what = f"{requirement.name} {version} is not {requirement.specifier}"
            found.append(Lack(what, INSTALL[extra]))
    return found


def environment(cfg: TrainConfig, env: dict[str, str]) -> tuple[Variable, ...]:
    """The variables of the neuron backend as a process of it would see them, several nodes not assumed."""
    after = dict(env)
    written = apply_settings(cfg, nodes=False, env=after)
    rows = []
    for setting in SETTINGS:
        ours, theirs = setting.name in written, setting.name in env
        who = {(True, True): "both", (True, False): "esm-neuron", (False, True): "user", (False, False): "nobody"}
        rows.append(Variable(setting.name, after.get(setting.name), who[ours, theirs], setting.meaning))
    return tuple(rows)


def render(diagnosis: Diagnosis) -> str:
    """The diagnosis for a person."""
    lines = ["versions"]
    for name, version in diagnosis.versions.items():
        empty = name in PACKAGES and version in PLACEHOLDERS
        lines.append(f"  {name:<20} {version or 'not installed'}{' (EMPTY PLACEHOLDER)' if empty else ''}")
    lines += ["devices", *(f"  {kind:<20} {what}" for kind, what in diagnosis.devices.items())]
    lines.append("environment of the neuron backend")
    for row in diagnosis.environment:
        lines.append(f"  {row.name}={row.value or ''} (set by {row.set_by})")
        lines.append(f"      {row.meaning}")
    lines.append("backends")
    for name, missing in diagnosis.lacks.items():
        lines.append(f"  {name:<20} {'lacks' if missing else 'can run here'}")
        lines += [f"      {lack.what}; {lack.cure}" for lack in missing]
    return "\n".join(lines)


def has_bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether the processor multiplies bfloat16 itself; None where the system does not say."""
    if not cpuinfo.exists():
        return None
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return bool(flags & BF16_FLAGS)


def _cpu() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{cores} cores, {pages * size / 2**30:.1f} GiB"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return NO_GPU
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{len(names)}: {', '.join(names)}"


def _neuron() -> str:
    cores = neuron_cores()
    instance = next((name for name, have in NEURON_CORES.items() if have == cores), None)
    return f"{cores} cores{f' ({instance})' if instance else ''}" if cores else "none (no /dev/neuron*)"


def _xla() -> str:
    if installed_version("torch_xla") is None:
        return "none (torch_xla is not installed)"
    if neuron_cores():
        return "not asked: its runtime would claim the NeuronCores"
    from esm_neuron.backends.xla_env import xla_devices

    try:
        return ", ".join(xla_devices()) or "none"
    except (ImportError, RuntimeError) as error:
        return f"none: {' '.join(str(error).split())}"


def _no_trainium(env: Mapping[str, str]) -> list[Lack]:
    found = []
    if (trouble := cache_trouble(env)) is not None:
        what, _, cure = trouble.rpartition("; ")
        found.append(Lack(what, cure))
    major, minor, _ = platform.python_version_tuple()
    if (int(major), int(minor)) > (3, 11):
        found.append(Lack(f"Python {major}.{minor}: the Neuron wheels are for 3.10 and 3.11", "use Python 3.11"))
    cores = neuron_cores()
    if not Path("/dev/neuron0").exists():
        found.append(Lack("there is no /dev/neuron0", "use a trn1 instance with the Neuron driver (aws-neuronx-dkms)"))
    elif cores not in NEURON_CORES.values():
        have = " or ".join(f"{n} ({name})" for name, n in NEURON_CORES.items())
        found.append(Lack(f"{cores} NeuronCores, a trn1 has {have}", "free the devices that other jobs hold"))
    return found
