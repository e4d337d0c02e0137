"""Which devices torch_xla would use, for `esm-neuron doctor`."""

from __future__ import annotations


def xla_devices() -> list[str]:
    """Names of the devices that torch_xla offers this process, such as `CPU:0`; starts its runtime.

    Raises:
        ImportError: torch_xla is not installed.
        RuntimeError: its runtime does not start; the message says why.
    """
    import torch_xla.core.xla_model as xm
    import torch_xla.runtime as xr

    kind = xr.device_type() or "XLA"
    return [f"{kind}:{number}" for number in range(len(xm.get_xla_supported_devices() or []))]
