"""What happens to a value that is read of a tensor on an XLA device: another is given, or it is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

READS = ("__bool__", "__float__", "__int__", "__index__", "item", "tolist")


@contextmanager
def reads(answer: Callable[[str], Any]) -> Iterator[None]:
    """Have every value that is read of a tensor on the device be what `answer` gives for the method's name."""
    before = {name: getattr(torch.Tensor, name) for name in READS}

    def patched(name: str) -> Callable[..., Any]:
        def read(tensor: torch.Tensor, *args: Any) -> Any:
            return answer(name) if tensor.device.type == "xla" else before[name](tensor, *args)

        return read

    for name in READS:
        setattr(torch.Tensor, name, patched(name))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(torch.Tensor, name, method)


def zero(name: str) -> Any:
    """What extraction of graphs gives for every value."""
    return {"__bool__": False, "__float__": 0.0, "item": 0.0, "tolist": []}.get(name, 0)


def strict(name: str) -> Any:
    raise AssertionError(f"Tensor.{name} of the device was called")
