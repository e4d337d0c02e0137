"""Releases of the Neuron SDK that train on trn1 with PyTorch/XLA, and which of them the software of a host fits.

Versions are those of the vendor's page "Release content" for trn1, rules those of its release notes of the runtime.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

DRIVER, RUNTIME, COLLECTIVES = "aws-neuronx-dkms", "aws-neuronx-runtime-lib", "aws-neuronx-collectives"
HOST = (DRIVER, RUNTIME, COLLECTIVES, "aws-neuronx-tools")
"""Packages of a host, from the SDK's apt repository. A container brings its own, but uses the host's driver."""
PACKAGES = ("torch-neuronx", "neuronx-cc", "libneuronxla", "neuronx-distributed")
"""Python packages of the SDK's own index."""


@dataclass(frozen=True)
class Sdk:
    """One release of the SDK."""

    version: str
    released: str
    host: Mapping[str, str]
    """Package of HOST -> version."""
    python: Mapping[str, str]
    """torch, torch-xla, packages of PACKAGES -> version, those of the newest torch that the release has."""


def _sdk(version: str, released: str, host: str, python: str) -> Sdk:
    packages = zip(("torch", "torch-xla", *PACKAGES), python.split(), strict=True)
    return Sdk(version, released, dict(zip(HOST, host.split(), strict=True)), dict(packages))


SDKS = (
    _sdk("2.26.1", "2025-10-29", "2.24.7.0 2.28.23.0 2.28.27.0 2.26.14.0",
         "2.8.0 2.8.1 2.8.0.2.10.16998 2.21.33363.0 2.2.12677.0 0.15.22404"),
    _sdk("2.27.1", "2026-01-14", "2.25.4.0 2.29.40.0 2.29.41.0 2.27.33.0",
         "2.9.0 2.9.0 2.9.0.2.11.19912 2.22.12471.0 2.2.14584.0 0.16.25997"),
    _sdk("2.28.1", "2026-03-13", "2.26.10.0 2.30.51.0 2.30.59.0 2.28.23.0",
         "2.9.0 2.9.0 2.9.0.2.12.22436 2.23.6484.0 2.2.15515.0 0.17.26814"),
    _sdk("2.29.1", "2026-04-09", "2.27.4.0 2.31.24.0 2.31.24.0 2.29.22.0",
         "2.9.0 2.9.0 2.9.0.2.13.26312 2.24.8799.0 2.2.16408.0 0.18.27753"),
    _sdk("2.30.0", "2026-05-21", "2.28.0.0 2.32.31.0 2.32.28.0 2.30.10.0",
         "2.9.0 2.9.0 2.9.0.2.14.27725 2.25.3371.0 2.2.16974.0 0.19.28093"),
    _sdk("2.31.1", "2026-08-12", "2.29.0.0 2.33.10.0 2.33.10.0 2.31.15.0",
         "2.9.0 2.9.0 2.9.0.2.15.32035 2.26.6360.0 2.2.17544.0 0.19.28492"),
)  # fmt: skip
"""Oldest first. Training by PyTorch/XLA is unsupported since 2.30; 2.31 is the last release that ships the packages."""
PINNED, LAST = SDKS[0], SDKS[-1]
"""The release of constraints/neuron.txt, and that of constraints/neuron-2.31.txt."""
IMAGE = "public.ecr.aws/neuron/pytorch-training-neuronx:2.8.0-neuronx-py311-sdk2.26.1-ubuntu22.04"
"""The vendor's public training container of PINNED, which brings runtime, collectives and Python packages."""


@dataclass(frozen=True)
class Rule:
    """Drivers from `drivers[0]` to before `drivers[1]` do not start runtimes from `runtimes[0]` to before the other."""

    drivers: tuple[str, str]
    runtimes: tuple[str, str]
    words: str


RULES = (
    Rule(("2.29", "99"), ("0", "2.33"), "driver 2.29 needs runtime 2.33 or later"),  # notes of SDK 2.31
    Rule(("0", "2.27"), ("2.32", "99"), "runtime 2.32 needs driver 2.27 or later"),  # notes of SDK 2.30
)


def broken_rule(driver: str, runtime: str) -> Rule | None:
    """Return the vendor's rule by which the runtime cannot start over the driver, None where there is none."""
    for rule in RULES:
        if _within(driver, rule.drivers) and _within(runtime, rule.runtimes):
            return rule
    return None


def fitting(driver: str) -> list[Sdk]:
    """Return the releases whose containers or packages can run over a driver: not newer than it, by no rule refused."""
    older = (sdk for sdk in SDKS if Version(_minor(sdk.host[DRIVER])) <= Version(driver))
    return [sdk for sdk in older if broken_rule(driver, sdk.host[RUNTIME]) is None]


def host_versions(root: Path = Path("/")) -> dict[str, str | None]:
    """Return package of HOST but the tools -> version: of the driver that is loaded, of the libraries on the disk.

    In a container the driver is the host's, which its kernel shows there too.
    """
    loaded = root / "sys/module/neuron/version"  # where the runtime itself looks
    packages = _dpkg(root / "var/lib/dpkg/status")
    libraries = root / "opt/aws/neuron/lib"
    return {
        DRIVER: _number(loaded.read_text(encoding="utf-8")) if loaded.is_file() else packages.get(DRIVER),
        RUNTIME: packages.get(RUNTIME) or _library(libraries / "libnrt.so.1"),
        COLLECTIVES: packages.get(COLLECTIVES) or _library(libraries / "libnccom.so.2"),
    }


def has_async_requests(runtime: str | None) -> bool:
    """Return whether the runtime takes NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS, and does not warn of it."""
    return runtime is None or Version(runtime) < Version("2.33")  # notes of SDK 2.31


def _within(version: str, bounds: tuple[str, str]) -> bool:
    return Version(bounds[0]) <= Version(version) < Version(bounds[1])


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _dpkg(status: Path) -> dict[str, str | None]:
    """Return package of HOST -> version, of those that dpkg has installed."""
    found = {}
    for block in status.read_text(encoding="utf-8").split("\n\n") if status.is_file() else ():
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Package") in HOST and fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = _number(fields["Version"])
    return found


def _number(text: str) -> str | None:
    """Return the version that a text begins with: 2.28.23.0 of `2.28.23.0-dd5879008`."""
    found = re.match(r"\s*(\d+(?:\.\d+)+)", text)
    return found[1] if found else None


def _library(link: Path) -> str | None:
    """Return the version in the name of the file behind a library's link: libnrt.so.1 -> libnrt.so.2.28.23.0."""
    return _number(link.resolve().name.partition(".so.")[2])
