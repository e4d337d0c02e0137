"""transformers, PEFT and torch's DTensor as we use them, imported here for all, in half a second instead of seven.

Other modules take these names from here. What is left out of their imports, and why that is safe, is in
`config.deferred`. What differs between the library versions of the two lanes is here too, each entry with when it can
go.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, cast
from unittest import mock

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _use_grad_for_differentiable
from torch.overrides import TorchFunctionMode

from esm_neuron.config import deferred


def _undocumented(obj: Any = None, **_: Any) -> Any:
    """Leave the docstring of a class as it is written: transformers fills it in from lists of all its models."""
    return _undocumented if obj is None else obj


def _version(name: str) -> str:
    """Return the version of an installed package, as `importlib.metadata.version` does."""
    text = metadata.distribution(name).read_text("METADATA") or ""
    found = re.search(r"^Version: *(\S+)", text, re.MULTILINE)
    return found[1] if found else metadata.distribution(name).version


_FOR_COMPILER = {
    name: deferred.decorator("torch._dynamo", name) for name in ("allow_in_graph", "assume_constant_result", "disable")
}


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


with deferred.window(
    {
        # torch.compile, and the symbolic shapes of its graphs with sympy: used when something is compiled
        "torch._dynamo": _FOR_COMPILER,
        "torch.fx.experimental.symbolic_shapes": {},
        # sharded training: `backends.eager` imports what it uses
        "torch.distributed.fsdp": {},
        "torch.distributed._composable": {},
        "torch.distributed.checkpoint": {},
        # offloading to disk; PEFT asks whether there is an accelerator of a kind that needs a package of its own
        "accelerate": {},
        "accelerate.utils": {"is_mlu_available": lambda: find_spec("torch_mlu") is not None},
        # losses of object detection, assisted generation, chat templates
        **{name: {} for name in ("scipy", "sklearn", "pandas", "PIL", "jinja2")},
        # the classes that find a model's class by its name, and text generation
        "transformers.models.auto.modeling_auto": {},
        "transformers.models.auto.auto_factory": {},
        "transformers.generation.candidate_generator": {},
        "transformers.models.bloom": {},
    },
    postponed={
        "transformers": {
            "PreTrainedModel": "transformers.modeling_utils",
            "GenerationMixin": "transformers.generation.utils",
            "TrainerCallback": "transformers.trainer_callback",
            **dict.fromkeys(("PretrainedConfig", "PreTrainedConfig"), "transformers.configuration_utils"),
            **dict.fromkeys(
                ("Cache", "DynamicCache", "EncoderDecoderCache", "HybridCache"), "transformers.cache_utils"
            ),
        },
        "transformers.models": {},
    },
    replaced={
        "transformers.utils": {
            "auto_docstring": _undocumented,
            # reads all files of transformers once more, for the processors of images and sound
            "direct_transformers_import": lambda path: sys.modules["transformers"],
        },
        # transformers asks for the versions of eighty packages, and Python parses all of their metadata for each
        "importlib.metadata": {"version": _version},
    },
    optional=True,
    absent=["_convert_to_standard_cache"],  # PEFT asks Bloom, which has not had it since transformers 4.43
):
    import_module("transformers.models.esm.modeling_esm")
    import_module("torch.distributed.tensor")
    # peft >= 0.20 imports bitsandbytes at once, for a helper that nobody here uses. bitsandbytes warns on stderr and,
    # where the package `kernels` is installed, runs code from the hub. Can go when peft imports it where it is used.
    with hidden("bitsandbytes"):
        import_module("peft.tuners.lora.model")

# torch's functions that are kept from its compiler, and the steps of its optimizers, would import it to say so
deferred.spare(_disable_dynamo(lambda: None).__code__, "torch._dynamo", _FOR_COMPILER)
deferred.spare(
    _use_grad_for_differentiable(lambda self: None).__code__, "torch._dynamo", {"graph_break": deferred.calls(2)}
)

import peft  # noqa: E402 - after the window
from peft import LoraConfig, PeftModel  # noqa: E402
from peft.tuners.lora import model as peft_lora  # noqa: E402
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402
from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: E402
from transformers.loss.loss_utils import ForSequenceClassificationLoss  # noqa: E402
from transformers.modeling_outputs import (  # noqa: E402
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel  # noqa: E402
from transformers.models.esm.configuration_esm import EsmConfig  # noqa: E402
from transformers.models.esm.modeling_esm import (  # noqa: E402
    EsmClassificationHead,
    EsmEmbeddings,
    EsmForMaskedLM,
    EsmForTokenClassification,
    EsmIntermediate,
    EsmLMHead,
    EsmModel,
    EsmPreTrainedModel,
    EsmSelfAttention,
)


def get_peft_model(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Add the adapters of `config` to `model`, as PEFT does, and nothing more."""
    # PEFT looks for linears of bitsandbytes, and imports it for that; ours are quantized another way (`quantize`).
    without = mock.patch.multiple(peft_lora, is_bnb_available=lambda: False, is_bnb_4bit_available=lambda: False)
    with without, warnings.catch_warnings():
        # transformers 5.24 deprecates a name that peft 0.21 reads. Can go with a peft that reads the new one.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return cast(PeftModel, peft.get_peft_model(model, config))  # its other class is of mixed adapters


class on_meta(TorchFunctionMode):  # noqa: N801 - a context manager
    """Make modules without values: their parameters are on meta, and nothing is drawn.

    As `torch.device("meta")`, but what is counted stays on the CPU (`arange`: positions): torch computes on meta in
    Python, for which it imports its compiler and sympy.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        if getattr(func, "__name__", None) in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_FILLS = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "fill_", "zero_", "ones_", "zeros_"}
"""Of torch.Tensor, torch.nn.init, and transformers 5, which puts functions of its own in the place of the latter."""


__all__ = [
    "DTensor",
    "EsmClassificationHead",
    "EsmConfig",
    "EsmEmbeddings",
    "EsmForMaskedLM",
    "EsmForTokenClassification",
    "EsmIntermediate",
    "EsmLMHead",
    "EsmModel",
    "EsmPreTrainedModel",
    "EsmSelfAttention",
    "ForSequenceClassificationLoss",
    "LoraConfig",
    "LoraLinear",
    "MaskedLMOutput",
    "PeftModel",
    "PreTrainedModel",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
    "distribute_tensor",
    "get_peft_model",
    "hidden",
    "on_meta",
]
