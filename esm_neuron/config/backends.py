"""The table of backends: what settings, plans and `esm-neuron doctor` know of each before its packages are imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esm_neuron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """One backend: where its code is, and which settings it can follow, such as parallel.fsdp."""

    make: str
    """`module:name` of the `Backend` subclass, or of a function that chooses one by a `TrainConfig`."""
    survey: str
    """`module:name` of the `Survey` subclass: what `esm-neuron doctor` says of this machine."""
    compiles: bool = False
    """It compiles graphs of static shapes; it has no fused attention or LoRA of its own."""
    quantizes: bool = False
    """adapter.kind=qlora, with whole linears."""
    fsdp: bool = False
    adamw8bit: bool = False
    tf32: bool = False
    torch_compile: bool = False
    optlevel: bool = False
    zero1: bool = False
    """The others pass parallel.zero1 over."""
    bf16_weights: bool = False
    """Under loop.precision=bf16 it stores what is trained of ESM-2 in bfloat16, and has no autocast."""
    emulates_bf16: bool = False
    """bf16 can be far slower than fp32: a model that was trained elsewhere predicts in fp32."""


BACKENDS: dict[str, BackendSpec] = {
    "cpu": BackendSpec(
        make="esm_neuron.backends.cpu:CpuBackend",
        survey="esm_neuron.backends.survey:Survey",
        quantizes=True,
        fsdp=True,
        emulates_bf16=True,
    ),
    "cuda": BackendSpec(
        make="esm_neuron.backends.cuda:CudaBackend",
        survey="esm_neuron.backends.survey:CudaSurvey",
        quantizes=True,
        fsdp=True,
        adamw8bit=True,
        tf32=True,
        torch_compile=True,
    ),
    "xla": BackendSpec(
        make="esm_neuron.backends.spmd:create", survey="esm_neuron.backends.survey:XlaSurvey", compiles=True
    ),
    "neuron": BackendSpec(
        make="esm_neuron.backends.neuron:NeuronBackend",
        survey="esm_neuron.backends.survey:NeuronSurvey",
        compiles=True,
        tf32=True,
        optlevel=True,
        zero1=True,
        bf16_weights=True,
    ),
}
"""Name of a backend (`--backend`) -> its row. A backend that is added needs its code and a row here, nothing else."""


def spec_of(name: str) -> BackendSpec:
    """Return the row of a backend. Raise ConfigError where there is none."""
    if name not in BACKENDS:
        raise ConfigError(f"backend={name} is unknown; use one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def named(able: Callable[[BackendSpec], bool]) -> str:
    """Return the names of the backends that are able to do something, for messages: "cpu, cuda"."""
    return ", ".join(name for name, spec in BACKENDS.items() if able(spec)) or "no backend"
