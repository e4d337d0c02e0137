"""What is learnt. A task is a file here and a row in `TASKS`: its model, its targets, its loss and its figures."""

from __future__ import annotations

from collections.abc import Sequence

from esm_neuron.config import TaskConfig
from esm_neuron.tasks.base import Answers, Column, Task
from esm_neuron.tasks.masked_lm import MaskedLM
from esm_neuron.tasks.sequence import SequenceClassification

__all__ = ["TASKS", "Answers", "Column", "Task", "create_task"]

TASKS: dict[str, type[SequenceClassification] | type[MaskedLM]] = {
    "sequence_classification": SequenceClassification,
    "masked_lm": MaskedLM,
}
"""Name in the config -> task."""


def create_task(cfg: TaskConfig, labels: Sequence[str]) -> Task:
    """The task that `cfg.name` names, for the classes `labels` (empty where it has none)."""
    return TASKS[cfg.name](cfg, labels)
