"""What is learnt. A task is a file here and a row in `TASKS`: its model, its targets, its loss and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esm_neuron.config import TaskConfig
from esm_neuron.tasks.base import Column, Predictions, Task
from esm_neuron.tasks.masked_lm import MaskedLM
from esm_neuron.tasks.multi_label import MultiLabel
from esm_neuron.tasks.regression import Regression
from esm_neuron.tasks.residues import ResidueClassification
from esm_neuron.tasks.sequence import SequenceClassification

__all__ = ["TASKS", "Column", "Predictions", "Task", "create_task", "task_class"]

TASKS: dict[str, type[Any]] = {
    "sequence_classification": SequenceClassification,
    "multi_label": MultiLabel,
    "regression": Regression,
    "residue_classification": ResidueClassification,
    "masked_lm": MaskedLM,
}
"""Name in the config -> task."""


def task_class(name: str) -> type[Any]:
    """Return the class of the task `name`."""
    return TASKS[name]


def create_task(cfg: TaskConfig, labels: Sequence[str]) -> Task:
    """The task that `cfg.name` names, for the classes `labels` (empty where it has none).

    Args:
        cfg: with what training rows decide, see `data.labels.resolve`.
        labels: class names.
    """
    task: Task = TASKS[cfg.name](cfg, labels)
    return task
