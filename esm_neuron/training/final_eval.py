"""The evaluation at the end of a run: metrics of held-out proteins, of the clean ones, and of baselines on the same.

Clean proteins have no homolog in training, as far as `data.homologs` finds them. The model may have memorized what it
predicts for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from esm_neuron.config import TrainConfig
from esm_neuron.data.dataset import ExampleTable, select_records
from esm_neuron.data.homology import MOST, homolog_rows, too_short
from esm_neuron.data.loader import EvalLoader
from esm_neuron.distributed import from_main_rank, main_rank_only
from esm_neuron.metrics import Value
from esm_neuron.run_dir import predictions_name, save_predictions
from esm_neuron.tasks.baselines import MOST_CLASSES, capped
from esm_neuron.training.callbacks import format_record
from esm_neuron.training.trainer import Trainer

Log = Callable[[str], None]
Metrics = dict[str, Value]
Leaks = dict[str, np.ndarray]
"""Split -> bool [records], which held-out proteins have a homolog in training; empty where none was looked for."""


def find_leaks(cfg: TrainConfig, tables: Mapping[str, ExampleTable], log: Log) -> Leaks:
    """Look for homologs of the held-out proteins as `data.homologs` says, and log how many have one."""
    method, proteins = cfg.data.homologs, sum(len(table.ids) for table in tables.values())
    held_out = {split: table for split, table in tables.items() if split != "train"}
    if method == "off" or not held_out:
        return {}
    if proteins > MOST:
        log(f"homologs are not looked for: {proteins} proteins are more than {MOST}; whether data leaks is not known")
        return {}
    found = homolog_rows(tables["train"], held_out, method)
    for split, has in found.items():
        short = int((too_short(held_out[split], tables["train"]) & ~has).sum()) if method == "kmer" else 0
        unknown = f"; {short} are too short to tell homologs from chance" if short else ""
        log(f"{split} split: {has.sum()} of {len(has)} proteins have a homolog in training (by {method}){unknown}")
    return found


def score_splits(
    trainer: Trainer, train: ExampleTable, held_out: Mapping[str, EvalLoader], leaks: Leaks, log: Log
) -> dict[str, Any]:
    """Return the metrics of a trained model with intervals, on every rank; its predictions are kept in the output.

    These are `valid` and `test` (None for a split without proteins), `clean` by split where its clean proteins are some
    of it, `leaks`, and `baselines` and `clean_baselines` on the same proteins, by split and by baseline.
    """
    cfg, task, backend = trainer.cfg, trainer.task, trainer.backend
    metrics: dict[str, Metrics | None] = {"valid": None, "test": None}
    clean: dict[str, Metrics] = {}
    clean_tables: dict[str, ExampleTable] = {}
    for split, loader in held_out.items():
        path = Path(cfg.output) / predictions_name(split)
        table, predictions = loader.table, trainer.evaluator.collect(loader)
        has_homolog = leaks.get(split)
        if cfg.log.predictions:
            main_rank_only(backend, partial(save_predictions, path, task, table, predictions, has_homolog))
        metrics[split] = task.metrics(table, predictions, intervals=True)
        if has_homolog is not None and has_homolog.any() and not has_homolog.all():
            clean_tables[split], examples, tokens = select_records(table, ~has_homolog)
            index = tokens if task.predictions_per_token else examples
            clean[split] = task.metrics(clean_tables[split], [values[index] for values in predictions], intervals=True)
    tables = {split: loader.table for split, loader in held_out.items()}
    whole, pure = from_main_rank(backend, lambda: _baselines(trainer, train, (tables, clean_tables), log))
    method = cfg.data.homologs
    counts = {s: {"method": method, "proteins": len(has), "homologs": int(has.sum())} for s, has in leaks.items()}
    return {**metrics, "clean": clean, "leaks": counts, "baselines": whole, "clean_baselines": pure}


def _baselines(
    trainer: Trainer, train: ExampleTable, on: tuple[Mapping[str, ExampleTable], ...], log: Log
) -> list[dict[str, dict[str, Metrics]]]:
    """Return for each of `on`: split -> baseline -> its metrics on the proteins that the model was scored on."""
    if not trainer.cfg.log.baselines or not any(on):
        return [{} for _ in on]
    if len(trainer.task.labels) > MOST_CLASSES:
        log(f"baselines: frequencies alone, since {len(trainer.task.labels)} classes are more than {MOST_CLASSES}")
    try:
        fitted = trainer.task.baselines(train)
        if capped(fitted):
            log(capped(fitted))
        found = [
            {split: {b.name: b.metrics(trainer.task, table) for b in fitted} for split, table in tables.items()}
            for tables in on
        ]
    except (ArithmeticError, MemoryError, ValueError) as error:  # of scikit-learn, on data that we did not think of
        log(f"WARNING: the baselines could not be fitted ({error}); the model's own metrics do not depend on them")
        return [{} for _ in on]
    for split, metrics in found[0].items():
        for name, values in metrics.items():
            log(f"{split}, {name} baseline: {format_record(values)}")
    return found
