"""The model that answers: a training run, or a Hugging Face folder or hub id of ESM-2 as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esm_neuron import __version__, settings
from esm_neuron.backends.base import Backend
from esm_neuron.build import Built, ModelMaker, build_model
from esm_neuron.config import AdapterConfig, BackendName, ModelConfig, TrainConfig
from esm_neuron.export import ADAPTER_WEIGHTS, MAY_CHANGE, build_trained, read_run
from esm_neuron.files import sha256
from esm_neuron.folders import ADAPTER, CONFIG
from esm_neuron.tasks import Task

NOT_IN_IDENTITY = {
    "train", "valid", "test", "keep", "keep_heldout", "split_column", "split_names", "valid_fraction", "cache",
}  # fmt: skip
"""Fields of `data` that no answer depends on."""


@dataclass(frozen=True)
class Opened:
    """A model before its weights are read."""

    cfg: TrainConfig
    trained: Task | None
    """The task of a training run; None for a plain ESM-2."""

    def build(self, plain: ModelMaker, backend: Backend) -> Built:
        """The model with its weights on the backend's device: the run's own, or what `plain` makes of an ESM-2.

        Raises:
            ConfigError, CheckpointError: the weights cannot be found or used.
        """
        if self.trained is not None:
            return build_trained(self.cfg, self.trained, backend)
        return build_model(self.cfg, plain, backend)

    def identity(self, built: Built, **more: Any) -> dict[str, Any]:
        """What decides an answer besides the input: weights, settings, and `more`; of JSON's types."""
        cfg, adapter = self.cfg, Path(self.cfg.output) / ADAPTER / ADAPTER_WEIGHTS
        trained = self.trained is not None and cfg.adapter.kind in ("lora", "qlora")
        data = {name: value for name, value in settings.plain(cfg.data).items() if name not in NOT_IN_IDENTITY}
        return {
            "version": __version__,
            "base weights": built.source.reference.sha256,
            "adapter": sha256(adapter) if trained else None,
            "seed": cfg.seed,
            "model.pooling": cfg.model.pooling,
            "loop.precision": cfg.loop.precision,
            **{f"adapter.{name}": value for name, value in settings.plain(cfg.adapter).items()},
            **{f"task.{name}": value for name, value in settings.plain(cfg.task).items()},
            **{f"data.{name}": value for name, value in data.items()},
            **more,
        }


def open_model(name: str, backend: BackendName | None, words: Sequence[str], command: str) -> Opened:
    """Find what `--model` names.

    Args:
        name: output folder of a training run, a Hugging Face folder, or a hub id.
        backend: where to run; None: where a run was trained, `cpu` for a plain model.
        words: settings to overrule, `--data.id_column name`, see `MAY_CHANGE`.
        command: for messages.

    Raises:
        ConfigError: a setting is unknown or not to be changed; the run is not finished.
    """
    folder = Path(name)
    if (folder / CONFIG).is_file():
        cfg, task = read_run(folder, backend)
        return Opened(settings.override(cfg, words, MAY_CHANGE, command), task)
    plain = TrainConfig(model=ModelConfig(name=name), adapter=AdapterConfig(kind="none"), backend=backend or "cpu")
    cfg = settings.override(plain, words, (*MAY_CHANGE, "model.revision"), command)
    return Opened(cfg, None)
