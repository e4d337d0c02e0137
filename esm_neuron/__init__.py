"""Fine-tune ESM-2 protein language models on Trainium, CUDA, XLA devices and the CPU.

`train`, `evaluate`, `predict`, `embed`, `score`, `export`, `load` and `TrainConfig` are imported when they are first
used, so that importing this package needs no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "TrainConfig": "config",
    "train": "training.run",
    "evaluate": "inference.evaluate",
    "predict": "inference.predict",
    "embed": "inference.embed",
    "score": "inference.score",
    "export": "inference.export",
    "load": "inference.serving",
}
"""Public name -> module that defines it."""
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
