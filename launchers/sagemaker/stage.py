"""Make the folder that becomes a job's source archive: entry point, config, package, and what pip has to install.

pip gets the versions of a lane's lock, so that a job that starts again weeks later installs the same. What the
image brings and we can use stays as it is.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

from job import STAGED, Job
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import esm_neuron
from esm_neuron.errors import ConfigError
from esm_neuron.files import write_text

HERE = Path(__file__).parent
PACKAGE = Path(esm_neuron.__file__).parent
LOCKS = {"gpu": "current.txt"}
"""Kind of an instance -> its lock in constraints/, where it is not that of the trn1 lane."""
IMAGES = {"neuron": HERE / "image-neuron.txt"}
"""Kind of an instance -> what its image has installed (`pip freeze`), where that is known."""
KEPT = {"torch", "torch-xla", "torch-neuronx", "neuronx-cc", "libneuronxla", "neuronx-distributed", "protobuf"}
"""Packages of every training image that pip must not replace; the containers' toolkit needs their old protobuf."""
EXTRAS = {"neuron": "neuron", "gpu": "cuda"}
"""Kind of an instance -> the extra of this package that it needs."""


def stage(folder: Path, job: Job) -> Path:
    """Fill `folder` for a job; a baked image already has package and requirements."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("entry.py", "channels.py"):
        shutil.copy2(HERE / name, folder)
    write_text(folder / STAGED, job.config_text)
    if not job.baked:
        copy_package(folder)
        write_requirements(folder, job.instance.kind)
    return folder


def pack(source: Path, archive: Path) -> Path:
    """Write the archive that the container's toolkit unpacks into its code folder."""
    with tarfile.open(archive, "w:gz") as packed:
        for path in sorted(source.iterdir()):
            packed.add(path, path.name)
    return archive


def copy_package(folder: Path) -> None:
    """Copy the source of this package, without what Python left beside it."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))


def write_requirements(folder: Path, kind: str, *first: str) -> None:
    """Write requirements.txt, with the lines `first` before ours, and the constraints that it names."""
    needed, held = requirements(kind)
    write_text(folder / "requirements.txt", "\n".join(["-c constraints.txt", *first, *needed]) + "\n")
    write_text(folder / "constraints.txt", "\n".join(held) + "\n")


def requirements(kind: str) -> tuple[list[str], list[str]]:
    """Return what an instance of this kind has to install, and the versions of the lock for all that pip may add.

    Raises:
        ConfigError: the package is not installed here, so its requirements are unknown.
    """
    needed: dict[str, Requirement] = {}
    for requirement in map(Requirement, requires("esm-neuron") or []):
        name, marker = canonicalize_name(requirement.name), requirement.marker
        if name not in KEPT and (marker is None or marker.evaluate({"extra": EXTRAS.get(kind, "")})):
            requirement.marker = None
            needed.setdefault(name, requirement).specifier &= requirement.specifier
    if not needed:
        raise ConfigError("esm-neuron has no metadata here; install it before launching: pip install --no-deps -e .")
    there = dict(line.split("==") for line in IMAGES[kind].read_text().split()) if kind in IMAGES else {}
    there = {canonicalize_name(name): version for name, version in there.items()}
    left = {n for n, version in there.items() if n not in needed or needed[n].specifier.contains(version)} | KEPT
    return list(map(str, needed.values())), [line for name, line in locked(kind) if name not in left]


def locked(kind: str) -> Iterator[tuple[str, str]]:
    """Yield name and line, `name==version ; marker`, of each entry of the lock."""
    lock = HERE.parents[1] / "constraints" / LOCKS.get(kind, "trn1.txt")
    for line in lock.read_text(encoding="utf-8").splitlines():
        if "==" in line and not line.startswith((" ", "#")):
            entry = line.rstrip(" \\")
            yield canonicalize_name(Requirement(entry).name), entry
