"""The plain CPU: eager torch, one process or several data-parallel ones on gloo under torchrun."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import torch

from esm_neuron.backends.eager import EagerBackend
from esm_neuron.config import TrainConfig
from esm_neuron.models.cpu_attention import by_products, has_bf16_units

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step.

    By default, each large activation is mapped anew, zeroed page by page and unmapped, which took 5 to 20 % of a step.
    Nothing is changed with another C library, or where the user set MALLOC_* variables.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST), (_M_TOP_PAD, 64 << 20)):
            mallopt(option, value)


class CpuBackend(EagerBackend):
    """The CPU of this process."""

    def __init__(self, cfg: TrainConfig) -> None:
        keep_freed_memory()
        super().__init__(cfg, torch.device("cpu"), "gloo")

    def notes(self) -> Iterator[str]:
        units = has_bf16_units()
        if self._bf16 and units is False:
            yield (
                "NOTE: loop.precision=bf16 on a CPU without bf16 units: it is emulated, and may take many times as "
                "long as --loop.precision fp32"
            )
        if self._bf16 and by_products(torch.bfloat16):
            yield "attention by plain products, which this processor does faster than torch's fused kernel"
        if not self._bf16 and units:
            yield (
                "NOTE: this CPU has bf16 units: --loop.precision bf16 may be faster; it is not chosen by itself, since "
                "another machine would then give other numbers"
            )
