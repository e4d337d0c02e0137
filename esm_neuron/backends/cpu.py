"""The plain CPU: eager torch, one process or several data-parallel ones on gloo under torchrun."""

from __future__ import annotations

import ctypes
import os

import torch

from esm_neuron.backends.eager import EagerBackend
from esm_neuron.config import TrainConfig

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step.

    By default each large activation is mapped anew, zeroed page by page and unmapped, which took 5 to 20 % of a step.
    Nothing is changed with another C library, or where the user set MALLOC_* variables.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST), (_M_TOP_PAD, 64 << 20)):
            mallopt(option, value)


class CpuBackend(EagerBackend):
    """See `base.Backend`."""

    name = "cpu"
    attention = "segments"

    def __init__(self, cfg: TrainConfig) -> None:
        keep_freed_memory()
        super().__init__(cfg, torch.device("cpu"), "gloo")
