"""Stand-ins for the closed packages that neuronx_distributed imports: names that may be imported, little that may run.

A module below one of ROOTS can be imported and any name taken from it, because NxD imports hundreds that a training
step never touches. Calling one that is not listed here raises: a stand-in that answers anything would hide a call that
the real package has to serve.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

ROOTS = ("torch_neuronx", "libneuronxla", "neuronxcc", "nki", "nkilib")

ABSENT = ("libneuronxla.libneuronpjrt_path",)
"""torch_xla probes it to decide whether it runs on a Neuron machine; it must stay missing."""


class CollectivesConfig:
    """The ring of a context-parallel group; we have none, and each process is its own neighbour."""

    def __init__(self, replica_groups: Sequence[Sequence[int]]) -> None:
        self.rank_src_tgt_pairs = {rank: [(rank, rank)] for group in replica_groups for rank in group}


VALUES: dict[str, Any] = {
    "torch_neuronx.__version__": "2.8.0.2.10.16998",
    "neuronxcc.__version__": "2.21.33363.0",
    "libneuronxla.__version__": "2.2.12677.0",
    "torch_neuronx.utils.get_platform_target": lambda: "trn1",
    "torch_neuronx.utils.utils.get_platform_target": lambda: "trn1",
    "neuronxcc.nki._pre_prod_kernels.collectives.CollectivesConfig": CollectivesConfig,
}
"""Names with the behaviour of the real ones."""

DECORATORS = ("jit", "nki_jit", "baremetal", "benchmark", "trace")
"""Last parts of names that decorate kernels at import: they return the function, which then never runs."""


AT_IMPORT = ("SkipMode",)
"""Last parts of names that NxD calls while it is imported, for default values; the result is one more bare name."""


class UnlistedCallError(AssertionError):
    """A stand-in was called that has no behaviour."""


class Name:
    """Anything taken from a stand-in module: may be imported, subclassed, written in an annotation; not called."""

    def __init__(self, path: str) -> None:
        self.__dict__["_path"] = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self._path.rpartition(".")[2]
        if name in DECORATORS:
            return _decorate(args)
        if name in AT_IMPORT:
            return Name(f"{self._path}()")
        raise UnlistedCallError(f"{self._path} was called, and tests/nxd/standins/vendor.py lists no behaviour for it")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return VALUES.get(f"{self._path}.{name}", Name(f"{self._path}.{name}"))

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__

    def __repr__(self) -> str:
        return f"<stand-in {self._path}>"


def _decorate(args: tuple[Any, ...]) -> Any:
    """`@jit` and `@jit(...)`: the decorated function as it is."""
    if len(args) == 1 and isinstance(args[0], types.FunctionType):
        return args[0]
    return lambda function: function


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        path = f"{self.__name__}.{name}"
        if path in VALUES:
            return VALUES[path]
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(path, Name(path))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] in ROOTS and fullname not in ABSENT:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []
        if module.__name__ == "torch_neuronx":
            import torch

            torch.classes.neuron = Name("torch.classes.neuron")  # the real one registers C++ classes there


def install() -> None:
    """Put the stand-ins before everything installed, placeholders of the general package index included."""
    sys.meta_path.insert(0, _Finder())
