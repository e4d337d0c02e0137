"""Machines to rent: what they hold, and their prices, from instances.yaml or a file like it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from esm_neuron.config import TrainConfig, require
from esm_neuron.config.settings import read_yaml, typed
from esm_neuron.errors import ConfigError

EXAMPLE = "esm_neuron/planning/instances.yaml"


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A machine to rent."""

    kind: Literal["neuron", "gpu"]
    device: str
    devices: int
    """Accelerators (NeuronCores, GPUs) per machine."""
    gib: float
    """Memory per device, GiB."""
    peak: dict[str, float]
    """Precision -> dense matrix products per device, TFLOP/s."""
    utilisation: dict[str, float] = field(default_factory=dict)
    """Precision -> share of the peak that published training reached; else `Assumptions.utilisation`."""
    memory: float
    """Bandwidth of a device's memory, GB/s."""
    link: float
    """Bandwidth of a device to its peers in the machine, GB/s."""
    network: float | None
    """Bandwidth of the machine to others, Gbit/s; None: it cannot train with others."""
    disk: float | None = None
    """Local NVMe, GB; None: there is none."""
    prices: dict[str, float | None]
    """Market (`ec2`, `sagemaker`) -> dollars per hour on demand; None: not known."""

    def check_precision(self, cfg: TrainConfig) -> None:
        """Raise ConfigError where the device does not compute in the precision of a run."""
        require(cfg.loop.precision in self.peak, f"{self.device} has no {cfg.loop.precision}; use loop.precision=fp32")


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions behind an estimate; instances.yaml says what they mean."""

    utilisation: float
    spot_share: float
    compile_minutes: tuple[float, float]
    """From, to."""
    start_minutes: float = 10.0


@dataclass(frozen=True, kw_only=True)
class PriceList:
    """The content of a price list."""

    date: str
    region: str
    assumptions: Assumptions
    instances: dict[str, Instance]
    """Name without `ml.` -> instance."""


@lru_cache
def read_prices(path: Path | None = None) -> PriceList:
    """Read a price list, by default the one of this package. Raise ConfigError where it cannot be used."""
    values = read_yaml(Path(__file__).with_name("instances.yaml") if path is None else path, "--prices", EXAMPLE)
    try:
        return PriceList(
            date=str(values["date"]),
            region=str(values["region"]),
            assumptions=typed(Assumptions, values["assumptions"]),
            instances={name: typed(Instance, instance) for name, instance in values["instances"].items()},
        )
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"--prices {path}: {' '.join(str(error).split())}; see {EXAMPLE}") from error


def price_of(name: str, prices: PriceList) -> tuple[str, str]:
    """Return (instance, market) of a name as a user writes it: with `ml.` it is SageMaker's."""
    plain, known = name.removeprefix("ml."), ", ".join(prices.instances)
    require(plain in prices.instances, f"--instance {name}: not in the price list; use {known}, or give --prices FILE")
    return plain, "sagemaker" if name.startswith("ml.") else "ec2"
