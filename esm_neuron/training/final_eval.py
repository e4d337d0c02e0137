"""What a run ends with: figures of all held-out rows, of the clean ones among them, of baselines on the same rows.

Clean rows have no homolog among the training rows, as far as `data.homologs` finds them; an answer to others may be
remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from esm_neuron.config import TrainConfig
from esm_neuron.data.dataset import ExampleTable, select_records
from esm_neuron.data.homology import MOST, homolog_rows
from esm_neuron.data.loader import EvalLoader
from esm_neuron.distributed import from_main_rank, main_rank_only
from esm_neuron.metrics import Value
from esm_neuron.run_dir import predictions_name, save_predictions
from esm_neuron.tasks.baselines import capped, fit_baselines
from esm_neuron.training.callbacks import format_record
from esm_neuron.training.evaluation import collect
from esm_neuron.training.trainer import Trainer

Say = Callable[[str], None]
Metrics = dict[str, Value]


@dataclass(frozen=True)
class Leaks:
    """Which held-out rows have a homolog among the training rows."""

    method: str
    has_homolog: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Split -> bool [records]; empty where none were looked for."""

    def counts(self) -> dict[str, dict[str, Any]]:
        """Split -> method, rows, and how many of them are related."""
        return {
            split: {"method": self.method, "rows": len(has_homolog), "homologs": int(has_homolog.sum())}
            for split, has_homolog in self.has_homolog.items()
        }

    def clean(self, split: str) -> np.ndarray | None:
        """bool [records]: the clean rows of a split where they are some, not all, of it; else None."""
        has_homolog = self.has_homolog.get(split)
        return None if has_homolog is None or not has_homolog.any() or has_homolog.all() else ~has_homolog


def find_leaks(cfg: TrainConfig, tables: Mapping[str, ExampleTable], log: Say) -> Leaks:
    """Look for homologs of the held-out rows as `data.homologs` says, and tell what was found.

    Args:
        tables: by split, `train` among them.

    Raises:
        DataError: MMseqs2 was asked for and is not there, or fails.
    """
    method, rows = cfg.data.homologs, sum(len(table.ids) for table in tables.values())
    held_out = {split: table for split, table in tables.items() if split != "train"}
    if method == "off" or not held_out:
        return Leaks(method)
    if rows > MOST:
        log(f"homologs of held-out rows are not looked for: {rows} rows are more than {MOST}; leaks are not known")
        return Leaks(method)
    found = homolog_rows(tables["train"], held_out, method)
    for name, has_homolog in found.items():
        found_in = f"{has_homolog.sum()} of {len(has_homolog)} rows have a homolog in the training rows"
        log(f"{name} split: {found_in} (by {method})")
    return Leaks(method, found)


def score(
    trainer: Trainer, train: ExampleTable, held_out: Mapping[str, EvalLoader], leaks: Leaks, log: Say
) -> dict[str, Any]:
    """Figures of a trained model with intervals, on every rank; the answers to held-out rows are kept in the output.

    Returns:
        valid, test: figures of all rows, None where no rows are held out.
        clean: split -> figures of its clean rows, where they are some of it.
        leaks: `Leaks.counts`.
        baselines, clean_baselines: split -> baseline -> figures on the same rows.
    """
    cfg, task, backend = trainer.cfg, trainer.task, trainer.backend
    metrics: dict[str, Metrics | None] = {"valid": None, "test": None}
    clean: dict[str, Metrics] = {}
    clean_tables: dict[str, ExampleTable] = {}
    for split, loader in held_out.items():
        path = Path(cfg.output) / predictions_name(split)
        table, predictions = loader.table, collect(trainer.model, task, backend, loader)
        if cfg.log.predictions:
            has_homolog = leaks.has_homolog.get(split)
            main_rank_only(backend, partial(save_predictions, path, task, table, predictions, has_homolog))
        metrics[split] = task.metrics(table, predictions, intervals=True)
        rows = leaks.clean(split)
        if rows is not None:
            clean_tables[split], examples, tokens = select_records(table, rows)
            chosen = [answer[tokens if task.predictions_per_token else examples] for answer in predictions]
            clean[split] = task.metrics(clean_tables[split], chosen, intervals=True)
    tables = {split: loader.table for split, loader in held_out.items()}
    every, pure = from_main_rank(backend, lambda: _baselines(trainer, train, (tables, clean_tables), log))
    return {**metrics, "clean": clean, "leaks": leaks.counts(), "baselines": every, "clean_baselines": pure}


def _baselines(
    trainer: Trainer, train: ExampleTable, on: tuple[Mapping[str, ExampleTable], ...], log: Say
) -> list[dict[str, dict[str, Metrics]]]:
    """For each of `on`: split -> baseline -> its figures on the very rows that the model was scored on."""
    if not trainer.cfg.log.baselines or not any(on):
        return [{} for _ in on]
    fitted = fit_baselines(trainer.cfg.task, train)
    if capped(fitted):
        log(capped(fitted))
    found = [
        {split: {b.name: b.metrics(trainer.task, table) for b in fitted} for split, table in tables.items()}
        for tables in on
    ]
    for split, metrics in found[0].items():
        for name, values in metrics.items():
            log(f"{split}, {name} baseline: {format_record(values)}")
    return found
