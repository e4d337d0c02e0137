"""Cases that train nothing: what the real packages and the stand-ins are, and what is refused."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc import locate
from typing import Any

import neuronx_distributed._version
import torch.distributed as dist
import vendor_calls
from helpers.device_run import Run, configuration
from helpers.refusals import outcome
from standins import collectives, vendor

from esm_neuron.backends.neuron_env import check_packages


def find_placeholders(output: str) -> None:
    """The message where pip has installed the general index's empty packages: these have metadata and no more."""
    for name in ("torch_neuronx", "neuronx_distributed"):
        info = Path(output, f"{name}-1.0.dist-info")
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    sys.path.insert(0, output)
    refused(output, check_packages)


def describe_stand_ins(output: str) -> None:
    """What is not the real code in a world on gloo, as a list."""
    lines = [
        "- `cpu`, `xla`, SPMD: nothing of torch, torch_xla, transformers or peft is replaced.",
        "- NxD, closed packages (`tests/nxd/standins/vendor.py`): any name of "
        f"{', '.join(vendor.ROOTS)} can be imported; a call raises but for {', '.join(vendor.VALUES)} and the "
        f"decorators {', '.join(vendor.DECORATORS)}, which return the function, and "
        f"{', '.join(vendor.AT_IMPORT)}, called for default values while NxD is imported. "
        f"{', '.join(vendor.ABSENT)} stays missing; torch.classes.neuron, where the real package registers "
        "C++ classes, is such a name too.",
        "- NxD, torch_xla on gloo and eager tensors (`tests/nxd/standins/collectives.py`): "
        f"{', '.join(collectives.SERVED)}; every other public function of xla_model and runtime raises.",
        "- NxD, process group: gloo, made by the test before the backend would make one of torch_xla's kind.",
        *(f"- NxD, patch: {patch}." for patch in collectives.PATCHES),
        "- NxD runs with its own switch NXD_CPU_MODE=1: it proves arithmetic and sharding, not lazy tracing. "
        "Tracing at tp1 on XLA:CPU is `test_xla_runs_one_graph_per_pass_and_one_per_update`, in the same run; "
        "there nothing of torch_xla is replaced, and `neuron_cores` answers 2 in place of counting /dev/neuron*.",
    ]
    Path(output, "message.txt").write_text("\n".join(lines), encoding="utf-8")
    dist.destroy_process_group()


def refuse(output: str, **options: Any) -> None:
    """The message with which building ends."""
    refused(output, lambda: Run.start(configuration(output, **options)))


def refused(output: str, act: Callable[[], object]) -> None:
    """Keep the message of the error that `act` raises."""
    Path(output, "message.txt").write_text(str(outcome(act)), encoding="utf-8")
    dist.destroy_process_group()


def signatures(output: str) -> None:
    """The parameters of every vendor function that the engine calls, and what else it uses of theirs."""
    zero = locate(vendor_calls.ZERO1)
    sources = "".join(inspect.getsource(c) for c in zero.__mro__ if c is not object)
    contract = {
        "neuronx_distributed": neuronx_distributed._version.__version__,
        "calls": {name: parameters_of(locate(name)) for name in sorted(vendor_calls.vendor_calls())},
        "attributes": sorted(a for a in vendor_calls.attributes() if hasattr(zero, a) or f"self.{a} = " in sources),
        "names": {
            name: sorted(f"{a.__module__}.{a.__qualname__} -> {b.__qualname__}" for a, b in locate(name).items())
            for name in sorted(vendor_calls.imported())
        },
    }
    Path(output, "contract.json").write_text(json.dumps(contract, indent=2) + "\n", encoding="utf-8")
    Path(output, "version.txt").write_text(neuronx_distributed._version.__version__, encoding="utf-8")
    dist.destroy_process_group()


def parameters_of(function: Any) -> list[str]:
    """Its parameters but `self`, those with a default marked by `=`."""
    # a class that hands (*args, **kwargs) on says nothing: its parent has the parameters
    candidates = function.__mro__ if inspect.isclass(function) else (function,)
    named = ([p for p in inspect.signature(c).parameters.values() if p.name != "self"] for c in candidates)
    parameters = next(found for found in named if [str(p) for p in found] != ["*args", "**kwargs"])
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [f"{stars.get(p.kind, '')}{p.name}{'' if p.default is p.empty else '='}" for p in parameters]


def call_unlisted(output: str) -> None:
    """The messages of stand-ins that serve nothing."""
    import torch_neuronx.xla_impl
    import torch_xla.core.xla_model as xm
    import torch_xla.runtime as xr

    messages = []
    for function in (torch_neuronx.xla_impl.compile_graph, xm.all_to_all, xr.process_index):
        try:
            function()
        except AssertionError as error:
            messages.append(str(error))
    Path(output, "message.txt").write_text("\n".join(messages), encoding="utf-8")
    dist.destroy_process_group()
