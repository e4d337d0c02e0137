"""What a run ends with: figures of all held-out rows, of the clean ones among them, of baselines on the same rows.

Clean rows have no relative among the training rows, as far as `data.relatives` finds them; an answer to others may be
remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from esm_neuron.agreement import agree_on_main, from_main
from esm_neuron.baselines import capped, fit_baselines
from esm_neuron.callbacks import format_record
from esm_neuron.config import TrainConfig
from esm_neuron.data.batch import ExampleTable, select_records
from esm_neuron.data.loader import EvalLoader
from esm_neuron.data.relatives import MOST, related_rows
from esm_neuron.evaluate import collect
from esm_neuron.folders import answers_name
from esm_neuron.held_out import save_answers
from esm_neuron.metrics import Value
from esm_neuron.trainer import Trainer

Say = Callable[[str], None]
Figures = dict[str, Value]


@dataclass(frozen=True)
class Leaks:
    """Which held-out rows have a relative among the training rows."""

    method: str
    related: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Split -> bool [records]; empty where none were looked for."""

    def counts(self) -> dict[str, dict[str, Any]]:
        """Split -> method, rows, and how many of them are related."""
        return {
            split: {"method": self.method, "rows": len(related), "related": int(related.sum())}
            for split, related in self.related.items()
        }

    def clean(self, split: str) -> np.ndarray | None:
        """bool [records]: the clean rows of a split where they are some, not all, of it; else None."""
        related = self.related.get(split)
        return None if related is None or not related.any() or related.all() else ~related


def find_leaks(cfg: TrainConfig, tables: Mapping[str, ExampleTable], say: Say) -> Leaks:
    """Look for relatives of the held-out rows as `data.relatives` says, and tell what was found.

    Args:
        tables: by split, `train` among them.

    Raises:
        DataError: MMseqs2 was asked for and is not there, or fails.
    """
    method, rows = cfg.data.relatives, sum(len(table.ids) for table in tables.values())
    held_out = {split: table for split, table in tables.items() if split != "train"}
    if method == "off" or not held_out:
        return Leaks(method)
    if rows > MOST:
        say(f"relatives of held-out rows are not looked for: {rows} rows are more than {MOST}; leaks are not known")
        return Leaks(method)
    found = related_rows(tables["train"], held_out, method)
    for name, related in found.items():
        say(f"{name} split: {related.sum()} of {len(related)} rows have a relative in the training rows (by {method})")
    return Leaks(method, found)


def score(
    trainer: Trainer, train: ExampleTable, held_out: Mapping[str, EvalLoader], leaks: Leaks, say: Say
) -> dict[str, Any]:
    """Figures of a trained model with intervals, on every rank; the answers to held-out rows are kept in the output.

    Returns:
        valid, test: figures of all rows, None where no rows are held out.
        clean: split -> figures of its clean rows, where they are some of it.
        leaks: `Leaks.counts`.
        baselines, clean_baselines: split -> baseline -> figures on the same rows.
    """
    cfg, task, backend = trainer.cfg, trainer.task, trainer.backend
    figures: dict[str, Figures | None] = {"valid": None, "test": None}
    clean: dict[str, Figures] = {}
    clean_tables: dict[str, ExampleTable] = {}
    for split, loader in held_out.items():
        path = Path(cfg.output) / answers_name(split)
        table, answers = loader.table, collect(trainer.model, task, backend, loader)
        if cfg.log.answers:
            related = leaks.related.get(split)
            agree_on_main(backend, partial(save_answers, path, task, table, answers, related))
        figures[split] = task.figures(table, answers, intervals=True)
        rows = leaks.clean(split)
        if rows is not None:
            clean_tables[split], examples, tokens = select_records(table, rows)
            chosen = [answer[tokens if task.answers_per_token else examples] for answer in answers]
            clean[split] = task.figures(clean_tables[split], chosen, intervals=True)
    tables = {split: loader.table for split, loader in held_out.items()}
    every, pure = from_main(backend, lambda: _baselines(trainer, train, (tables, clean_tables), say))
    return {**figures, "clean": clean, "leaks": leaks.counts(), "baselines": every, "clean_baselines": pure}


def _baselines(
    trainer: Trainer, train: ExampleTable, on: tuple[Mapping[str, ExampleTable], ...], say: Say
) -> list[dict[str, dict[str, Figures]]]:
    """For each of `on`: split -> baseline -> its figures on the very rows that the model was scored on."""
    if not trainer.cfg.log.baselines or not any(on):
        return [{} for _ in on]
    fitted = fit_baselines(trainer.cfg.task, train)
    if capped(fitted):
        say(capped(fitted))
    found = [
        {split: {b.name: b.figures(trainer.task, table) for b in fitted} for split, table in tables.items()}
        for tables in on
    ]
    for split, figures in found[0].items():
        for name, values in figures.items():
            say(f"{split}, {name} baseline: {format_record(values)}")
    return found
