"""Fine-tune ESM-2 protein language models on Trainium, CUDA, XLA devices and the CPU.

    import esm_neuron as en

    run = en.train("my.csv", label="location")
    run.metrics
    en.load(run.folder).predict(["MKTAYIAKQRQISFVKSHFSRQ"])

The names of the API (esm_neuron/api.py, docs/api.md) are imported when they are first used, so that importing this
package needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esm_neuron.api import Run, embed, evaluate, export, load, predict, score, train
    from esm_neuron.config import TrainConfig
    from esm_neuron.errors import CheckpointError, ConfigError, DataError, EsmNeuronError, TrainingError

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("Run", "embed", "evaluate", "export", "load", "predict", "score", "train"), "api"),
    "TrainConfig": "config",
    **dict.fromkeys(("CheckpointError", "ConfigError", "DataError", "EsmNeuronError", "TrainingError"), "errors"),
}
"""Public name -> module that defines it."""
__all__ = [
    "CheckpointError", "ConfigError", "DataError", "EsmNeuronError", "Run", "TrainConfig", "TrainingError",
    "__version__", "embed", "evaluate", "export", "load", "predict", "score", "train",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
