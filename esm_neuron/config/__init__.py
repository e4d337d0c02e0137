"""Settings: their schema, the rules between them, and YAML and flags to settings and back. Imports no torch."""

from esm_neuron.config.schema import (
    AdapterConfig,
    BackendName,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoopConfig,
    ModelConfig,
    OnNonfinite,
    OnRecompile,
    OptimConfig,
    ParallelConfig,
    Quantization,
    TaskConfig,
    TrainConfig,
    require,
)

__all__ = [
    "AdapterConfig",
    "BackendName",
    "CheckpointConfig",
    "DataConfig",
    "LogConfig",
    "LoopConfig",
    "ModelConfig",
    "OnNonfinite",
    "OnRecompile",
    "OptimConfig",
    "ParallelConfig",
    "Quantization",
    "TaskConfig",
    "TrainConfig",
    "require",
]
