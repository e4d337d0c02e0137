"""A trained model that stays in memory and predicts for sequences as they come, as in an endpoint."""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from esm_neuron.backends import create_backend
from esm_neuron.backends.base import Backend
from esm_neuron.config import BackendName, TrainConfig
from esm_neuron.data.loader import EvalLoader
from esm_neuron.data.splits import load_inputs
from esm_neuron.inference.load import build_trained, read_run
from esm_neuron.tasks.base import Task
from esm_neuron.training.evaluation import collect


@dataclass(frozen=True)
class Predictor:
    """A finished run, ready to predict; `load` makes one."""

    cfg: TrainConfig
    task: Task
    backend: Backend
    model: nn.Module

    def predict(self, records: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Return the columns of `esm-neuron predict` for each (id, sequence), in order, with None for NaN.

        Bad residues and long sequences are treated as the run's data section says.

        Raises:
            DataError: a sequence cannot be used.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "request.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("id", "sequence"), *records])
            table, _ = load_inputs(path, self.cfg.data)
        backend = self.backend
        loader = EvalLoader(table, self.task, self.cfg, local_dp=backend.local_dp, static_shapes=backend.static_shapes)
        columns = self.task.outputs(table, collect(self.model, self.task, backend, loader))
        rows = zip(table.ids, *map(_plain, columns.values()), strict=True)
        return [dict(zip(("id", *columns), row, strict=True)) for row in rows]


def load(run: Path, backend: BackendName | None = None) -> Predictor:
    """Load a finished run.

    Args:
        run: output folder of a training run.
        backend: where to run; None: where it was trained.

    Raises:
        EsmNeuronError: the run or its weights cannot be used.
    """
    cfg, task = read_run(run, backend)
    cfg = replace(cfg, data=replace(cfg.data, id_column="id", sequence_column="sequence"))  # as `predict` names them
    created = create_backend(cfg)
    return Predictor(cfg, task, created, build_trained(cfg, task, created).model)


def _plain(column: Sequence[Any] | np.ndarray) -> list[Any]:
    """Return a column as Python's own numbers, lists and strings, with None for what is not finite: JSON has no NaN."""
    return [_finite(value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value) for value in column]


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
