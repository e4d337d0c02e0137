"""What is here and what is missing: versions, devices, the environment, and what each backend lacks, with its cure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from esm_neuron.backends import import_object
from esm_neuron.backends.neuron_env import CURE, PLACEHOLDERS, SETTINGS, apply_settings, installed_version
from esm_neuron.backends.neuron_sdk import LAST, PACKAGES, host_versions
from esm_neuron.backends.survey import Lack, Survey
from esm_neuron.config import TrainConfig
from esm_neuron.config.backends import BACKENDS
from esm_neuron.redact import Lines

SHOWN = ("esm-neuron", "torch", "torch_xla", "transformers", "peft", "bitsandbytes", "optimum-neuron", *PACKAGES)


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


def examine(cfg: TrainConfig, backends: Iterable[str] = BACKENDS) -> Diagnosis:
    """Look at this machine and what these backends need; `cfg` decides which variables of `neuron` apply.

    For `xla` starts the runtime of torch_xla where there is one and no Neuron device that it would claim.
    """
    backends = tuple(backends)
    packages = {name: installed_version(name) for name in SHOWN}
    versions = {"python": platform.python_version(), **packages, **host_versions()}
    return Diagnosis(
        versions=versions,
        devices={name: survey_of(name).devices() for name in backends},
        environment=environment(cfg, dict(os.environ)) if "neuron" in backends else (),
        lacks={name: tuple(lacks(name)) for name in backends},
    )


def this_machine(backend: str) -> dict[str, Any]:
    """Return what is kept with a run: its date (UTC), what it runs on, and versions."""
    versions = {"python": platform.python_version(), **{name: installed_version(name) for name in SHOWN}}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": f"{backend}: {survey_of(backend).devices()}",
        "versions": {name: version for name, version in versions.items() if version is not None},
    }


def survey_of(backend: str) -> Survey:
    survey: Survey = import_object(BACKENDS[backend].survey)()
    return survey


def lacks(backend: str) -> list[Lack]:
    """Return what `backend` needs and does not find, with the cures."""
    survey = survey_of(backend)
    found = missing_packages("", Survey.install)
    if survey.extra:
        found += missing_packages(survey.extra, survey.install)
    return found + survey.lacks(os.environ)


def missing_packages(extra: str, install: str) -> list[Lack]:
    """Return the requirements of esm-neuron ("") or of one of its extras that are missing or of another version."""
    try:
        texts = importlib.metadata.requires("esm-neuron") or []
    except importlib.metadata.PackageNotFoundError:
        return [Lack("esm-neuron itself is not installed", install)]
    # an environment of constraints/neuron-2.31.txt has that release's torch in place of the one that is required
    last = LAST.python if installed_version("torch-neuronx") == LAST.python["torch-neuronx"] else {}
    found = []
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        if not (marker is None if not extra else marker is not None and marker.evaluate({"extra": extra})):
            continue
        version = installed_version(requirement.name)
        if version is None:
            found.append(Lack(f"{requirement.name} is not installed", install))
        elif requirement.name in PACKAGES and version in PLACEHOLDERS:
            found.append(Lack(f"{requirement.name} {version} is an empty placeholder of the general index", CURE))
        elif version != last.get(canonicalize_name(requirement.name)) and not requirement.specifier.contains(
            version, prereleases=True
        ):
            found.append(Lack(f"{requirement.name} {version} is not {requirement.specifier}", install))
    return found


def environment(cfg: TrainConfig, env: dict[str, str]) -> tuple[Variable, ...]:
    """Return the variables of the neuron backend as a process of it would see them, on one node."""
    after = dict(env)
    written = apply_settings(cfg, nodes=False, env=after)
    # (written by us, set by the user) -> who it is said to be set by
    who = {(True, True): "both", (True, False): "esm-neuron", (False, True): "user", (False, False): "nobody"}
    return tuple(
        Variable(
            setting.name, after.get(setting.name), who[setting.name in written, setting.name in env], setting.meaning
        )
        for setting in SETTINGS
    )


def render(diagnosis: Diagnosis) -> str:
    """Return what was found as text, this machine first; of several backends those that cannot run have a line each."""
    several, able = len(diagnosis.lacks) > 1, [name for name, missing in diagnosis.lacks.items() if not missing]
    lines = ["this machine"]
    lines += [f"  {kind:<12} {what}" for kind, what in diagnosis.devices.items() if not several or kind in able]
    lines.append("backends")
    for name, missing in diagnosis.lacks.items():
        if not missing:
            lines.append(f"  {name:<12} can run here: --backend {name}")
        elif several:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            lines.append(f"  {name:<12} lacks: {missing[-1].what}{more}; see esm-neuron doctor --backend {name}")
        else:
            lines += [f"  {name:<12} lacks", *(f"      {lack.what}; {lack.cure}" for lack in missing)]
    lines += _versions(diagnosis.versions, several)
    rows = diagnosis.environment if not several or "neuron" in able else ()
    lines += ["environment of the neuron backend"] if rows else []
    for row in rows:
        lines += [f"  {row.name}={row.value or ''} (set by {row.set_by})", f"      {row.meaning}"]
    return Lines.of(lines)


def _versions(versions: Mapping[str, str | None], short: bool) -> Iterator[str]:
    """Yield the packages; what is not installed has one line where it is to be `short`."""
    yield "versions"
    for name, version in versions.items():
        empty = " (EMPTY PLACEHOLDER)" if name in PACKAGES and version in PLACEHOLDERS else ""
        if version is not None or not short:
            yield f"  {name:<23} {version or 'not installed'}{empty}"
    if absent := [name for name, version in versions.items() if version is None and short]:
        yield f"  not installed: {', '.join(absent)}"
