"""Make the folder that becomes a job's source archive: entry point, config, package, and what pip has to install."""

from __future__ import annotations

import shutil
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

import esm_neuron
from esm_neuron.errors import ConfigError
from esm_neuron.files import write_text

HERE = Path(__file__).parent
PACKAGE = Path(esm_neuron.__file__).parent
IN_IMAGE = {"torch", "torch-xla", "torch-neuronx", "neuronx-cc", "libneuronxla", "neuronx-distributed"}
"""Packages that every training image brings; pip must not replace them."""
EXTRAS = {"neuron": "neuron", "gpu": "cuda"}
"""Kind of an instance -> the extra of this package that it needs."""


def stage(folder: Path, config: Path, kind: str, baked: bool) -> Path:
    """Fill `folder` for a job on an instance of this kind; a `baked` image already has package and requirements."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(HERE / "entry.py", folder)
    shutil.copy2(config, folder / config.name)
    if not baked:
        copy_package(folder)
        write_text(folder / "requirements.txt", "\n".join(requirements(EXTRAS[kind])) + "\n")
    return folder


def copy_package(folder: Path) -> None:
    """Copy the source of this package, without what Python left beside it."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))


def requirements(extra: str) -> list[str]:
    """Return the requirement lines of this package and one of its extras, without what the images bring.

    Raises:
        ConfigError: the package is not installed here, so its requirements are unknown.
    """
    lines = []
    for requirement in map(Requirement, requires("esm-neuron") or []):
        marker = requirement.marker
        wanted = marker is None or marker.evaluate({"extra": extra})
        if wanted and requirement.name.lower().replace("_", "-") not in IN_IMAGE:
            requirement.marker = None
            lines.append(str(requirement))
    if not lines:
        raise ConfigError("esm-neuron has no metadata here; install it before launching: pip install -e .")
    return lines
