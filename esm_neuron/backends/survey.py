"""What `esm-neuron doctor` finds of each backend: its devices, and what is missing, with the cure.

A survey must work where packages are missing, so each imports what it needs only when it is asked.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from esm_neuron.backends.neuron_env import INSTALL, cache_trouble, installed_version, neuron_cores
from esm_neuron.backends.neuron_sdk import COLLECTIVES, DRIVER, PINNED, RUNTIME, broken_rule, fitting, host_versions
from esm_neuron.backends.topology import NEURON_CORES

NO_GPU = "none"


@dataclass(frozen=True)
class Lack:
    """Something that a backend needs and this machine does not have."""

    what: str
    cure: str


class Survey:
    """A backend that needs a CPU and the packages that are always installed."""

    extra = ""
    """Extra of this package whose requirements the backend needs besides."""
    install = "pip install -e ."
    """Command that installs them, in the repository's folder."""

    def devices(self) -> str:
        """Return what there is for the backend to run on."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return f"{cores} cores, {pages * size / 2**30:.1f} GiB"

    def lacks(self, env: Mapping[str, str]) -> list[Lack]:
        """Return what is missing beside packages, in the environment `env`."""
        return []


class CudaSurvey(Survey):
    """NVIDIA GPUs."""

    extra = "cuda"
    install = "pip install -e '.[cuda]'"

    def devices(self) -> str:
        import torch

        if not torch.cuda.is_available():
            return NO_GPU
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return f"{len(names)}: {', '.join(names)}"

    def lacks(self, env: Mapping[str, str]) -> list[Lack]:
        cure = "use a machine with an NVIDIA GPU and its driver"
        return [Lack("torch finds no CUDA GPU", cure)] if self.devices() == NO_GPU else []


class XlaSurvey(Survey):
    """Devices of torch_xla."""

    extra = "xla"
    install = "pip install -e '.[xla]'"

    def devices(self) -> str:
        if installed_version("torch_xla") is None:
            return "none (torch_xla is not installed)"
        if neuron_cores():
            return "not asked: its runtime would claim the NeuronCores"
        try:  # this starts torch_xla's runtime
            import torch_xla.core.xla_model as xm
            import torch_xla.runtime as xr

            kind = xr.device_type() or "XLA"
            found = [f"{kind}:{number}" for number in range(len(xm.get_xla_supported_devices() or []))]
        except (ImportError, RuntimeError) as error:
            return f"none: {' '.join(str(error).split())}"
        return ", ".join(found) or "none"


class NeuronSurvey(Survey):
    """NeuronCores of a trn1 instance."""

    extra = "neuron"
    install = INSTALL
    root = Path("/")
    """Where to look for devices and for the host's software."""

    def devices(self) -> str:
        cores = neuron_cores(self.root / "dev")
        instance = next((name for name, have in NEURON_CORES.items() if have == cores), None)
        found = f"{cores} cores{f' ({instance})' if instance else ''}" if cores else "none (no /dev/neuron*)"
        driver = host_versions(self.root)[DRIVER]
        if driver is None:
            return found
        sdks = ", ".join(sdk.version for sdk in fitting(driver))
        return f"{found}; driver {driver} fits {f'SDK {sdks}' if sdks else 'no SDK that trains on trn1'}"

    def lacks(self, env: Mapping[str, str]) -> list[Lack]:
        found = []
        if (trouble := cache_trouble(env)) is not None:
            what, _, cure = trouble.rpartition("; ")
            found.append(Lack(what, cure))
        major, minor, _ = platform.python_version_tuple()
        if (int(major), int(minor)) > (3, 11):
            found.append(Lack(f"Python {major}.{minor}: the Neuron wheels are for 3.10 and 3.11", "use Python 3.11"))
        cores = neuron_cores(self.root / "dev")
        if not (self.root / "dev/neuron0").exists():
            cure = f"use a trn1 instance with the Neuron driver ({DRIVER}); give a container the devices: --device"
            return [*found, Lack("there is no /dev/neuron0", cure)]
        if cores not in NEURON_CORES.values():
            have = " or ".join(f"{n} ({name})" for name, n in NEURON_CORES.items())
            found.append(Lack(f"{cores} NeuronCores, a trn1 has {have}", "free the devices that other jobs hold"))
        return found + self._host_lacks()

    def _host_lacks(self) -> list[Lack]:
        """Return the libraries that are missing, and the rule by which the driver does not start the runtime."""
        have = host_versions(self.root)
        driver, runtime = have[DRIVER], have[RUNTIME]
        fits = fitting(driver) if driver else []
        sdk = PINNED if PINNED in fits or not fits else fits[-1]
        found = [
            Lack(f"{name} is not installed", f"sudo apt-get install {name}={sdk.host[name]}; see docs/ec2-trn1.md")
            for name in (RUNTIME, COLLECTIVES)
            if have[name] is None
        ]
        if driver and runtime and (rule := broken_rule(driver, runtime)) is not None:
            others = "".join(f", or runtime {sdk.host[RUNTIME]} (SDK {sdk.version})" for sdk in fits[-1:])
            cure = f"install {DRIVER}={PINNED.host[DRIVER]} on the host{others}"
            found.append(Lack(f"runtime {runtime} does not start over driver {driver}: {rule.words}", cure))
        return found
