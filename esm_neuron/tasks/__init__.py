"""What is learned. A task is one class in a file of its own and one row of `TASKS`; no other file names a task."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from esm_neuron.config import EVERY_LAYER, AdapterConfig, TaskConfig, TrainConfig, settings
from esm_neuron.errors import ConfigError

if TYPE_CHECKING:
    from esm_neuron.tasks.base import Task

__all__ = ["TASKS", "check_model", "check_task", "create_task", "task_class", "task_of_head", "training_config"]

TASKS: dict[str, str] = {
    "sequence_classification": "esm_neuron.tasks.sequence:SequenceClassification",
    "multi_label": "esm_neuron.tasks.multi_label:MultiLabel",
    "regression": "esm_neuron.tasks.regression:Regression",
    "residue_classification": "esm_neuron.tasks.residues:ResidueClassification",
    "masked_lm": "esm_neuron.tasks.masked_lm:MaskedLM",
}
"""Name in the config -> `module:class`, imported when it is asked for, so that `--help` waits for no torch."""


def task_class(name: str) -> type[Task]:
    """Return the class of a task; raise ConfigError where none has this name."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        cure = f"did you mean {near[0]}?" if near else f"use one of {', '.join(TASKS)}"
        raise ConfigError(f"task.name={name!r} is no task; {cure}")
    module, _, found = TASKS[name].partition(":")
    task: type[Task] = getattr(importlib.import_module(module), found)
    return task


def task_of_head(auto_class: str, problem_type: str | None) -> str | None:
    """Return the task whose models have such a head in transformers; None where there is no such task."""
    classes = ((name, task_class(name)) for name in TASKS)
    return next((n for n, task in classes if (task.auto_class, task.problem_type) == (auto_class, problem_type)), None)


def check_task(cfg: TaskConfig) -> None:
    """Raise ConfigError where there is no such task, or it does not use a setting that was changed."""
    used, default = task_class(cfg.name).settings, TaskConfig()
    for setting, value in vars(cfg).items():
        # `auto` is decided by the data: where there are no classes, there is nothing to decide
        if setting != "name" and setting not in used and value not in (getattr(default, setting), "auto"):
            users = ", ".join(name for name in TASKS if setting in task_class(name).settings)
            raise ConfigError(
                f"task.{setting}={value} has no effect on {cfg.name}; leave it out (it is for {users or 'no task'})"
            )


def check_model(cfg: TrainConfig) -> None:
    """Raise ConfigError where the task's head cannot read what `cfg.model` says, or a probe cannot fit it."""
    task, model, probes = task_class(cfg.task.name), cfg.model, cfg.adapter.kind == "probe"
    if task.keeps_lm_head and probes:
        raise ConfigError(
            f"adapter.kind=probe with task.name={cfg.task.name}: its head is the language model's own, which has "
            "learned from more than your proteins; use adapter.kind=lora or none"
        )
    given = {"layers": model.layers in EVERY_LAYER, "composition": model.composition,
             "pooling": model.pooling == "mean+termini"}  # fmt: skip
    wrong = "" if task.pools else next((name for name, is_pooled in given.items() if is_pooled), "")
    if wrong:
        raise ConfigError(
            f"model.{wrong}={getattr(model, wrong)} is for tasks with one vector per protein, not for "
            f"{cfg.task.name}; leave it out"
        )


def training_config(words: Sequence[str], log: Callable[[str], None]) -> TrainConfig:
    """Return what `train` is to do: a probe where `words` name only data, task, weights and output."""
    cfg, words = settings.parse(words), settings.whole_words(words)
    task = task_class(cfg.task.name)
    how = settings.says_how(words)
    if task.keeps_lm_head or how or not words:
        if how and cfg.adapter == AdapterConfig() and "--config" not in how:
            log(f"LoRA, since {how[0]} is given; told of data, task, model and output alone, train fits a probe")
        return cfg
    log("first a probe, in minutes; to fine-tune give adapter.kind=lora, or a configuration")
    return settings.parse(settings.first_step(words, task.pools))


def create_task(cfg: TaskConfig, labels: Sequence[str]) -> Task:
    """Return the task that `cfg.name` names; `cfg` has what the training rows decide, see `Labels.resolve`."""
    return task_class(cfg.name)(cfg, labels)
