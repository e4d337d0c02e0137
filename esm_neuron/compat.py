"""What differs between the library versions of the two lanes, in one place; each entry says when it can go."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

from transformers import PreTrainedModel


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Make an import of `package` fail as if it were not installed, unless it was imported before."""
    modules: dict[str, Any] = sys.modules
    hides = package not in modules
    if hides:
        modules[package] = None
    try:
        yield
    finally:
        if hides:
            del modules[package]


# peft >= 0.20 imports bitsandbytes at once, for a helper that nobody here uses. bitsandbytes warns on stderr and, where
# the package `kernels` is installed, runs code from the hub. Can go when peft imports it where it is used.
with hidden("bitsandbytes"):
    import peft
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import model as peft_lora
    from peft.tuners.lora.layer import Linear as LoraLinear

__all__ = ["LoraConfig", "LoraLinear", "PeftModel", "get_peft_model", "hidden"]


def get_peft_model(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Add the adapters of `config` to `model`, as PEFT does, and nothing more."""
    # PEFT looks for linears of bitsandbytes, and imports it for that; ours are quantized another way (`quantize`).
    without = mock.patch.multiple(peft_lora, is_bnb_available=lambda: False, is_bnb_4bit_available=lambda: False)
    with without, warnings.catch_warnings():
        # transformers 5.24 deprecates a name that peft 0.21 reads. Can go with a peft that reads the new one.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return cast(PeftModel, peft.get_peft_model(model, config))  # its other class is of mixed adapters
