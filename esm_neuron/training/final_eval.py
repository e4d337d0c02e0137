"""The evaluation at the end of a run: metrics of held-out proteins, of the clean ones, and of baselines on the same.

Clean proteins have no homolog in training, as far as `data.homologs` finds them. The model may have memorized what it
predicts for the others. Intervals and verdicts draw families of homologs, or positions of variants (`data.families`).
Nothing here asks how the model was trained: predictions come in, metrics and a verdict go out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from esm_neuron.backends.base import Backend
from esm_neuron.config import TrainConfig
from esm_neuron.data.cache import cached, content_key
from esm_neuron.data.dataset import ExampleTable, select_records
from esm_neuron.data.families import independent_units
from esm_neuron.data.homology import MOST, Method, homolog_rows, too_short
from esm_neuron.data.progress import bar
from esm_neuron.distributed import from_main_rank, main_rank_only
from esm_neuron.files import read_bytes, write_bytes
from esm_neuron.metrics import Scores
from esm_neuron.metrics.calibration import Calibration
from esm_neuron.metrics.verdict import alarms, verdict
from esm_neuron.run_dir import predictions_name, save_predictions, save_resamples
from esm_neuron.tasks.base import Predictions, Task
from esm_neuron.tasks.baselines import MOST_CLASSES, Baseline, capped
from esm_neuron.training.callbacks import format_record, format_seconds

HOMOLOGS_VERSION = 1
"""Of how homologs are found: another number has them looked for anew."""
LONG, PER_SECOND = 50_000, 1_000
"""Proteins from which the time of looking for homologs is told beforehand, and how many are compared in a second."""
Log = Callable[[str], None]
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
    if proteins >= LONG:
        took = format_seconds(proteins / PER_SECOND)
        log(f"looking for homologs of held-out proteins, {proteins} proteins in all: about {took} on one core")
    found = _homologs(cfg, method, tables["train"], held_out)
    for split, has in found.items():
        short = int((too_short(held_out[split], tables["train"]) & ~has).sum()) if method == "kmer" else 0
        unknown = f"; {short} are too short to tell homologs from chance" if short else ""
        log(f"{split} split: {has.sum()} of {len(has)} proteins have a homolog in training (by {method}){unknown}")
    return found


def _homologs(
    cfg: TrainConfig, method: Method, train: ExampleTable, held_out: Mapping[str, ExampleTable]
) -> dict[str, np.ndarray]:
    """Return `homolog_rows`; with `data.cache` they are kept there, by what is in the tables."""
    if cfg.data.cache is None:
        return homolog_rows(train, held_out, method)

    def make(folder: Path) -> None:
        for split, has in homolog_rows(train, held_out, method).items():
            write_bytes(folder / split, np.packbits(has).tobytes())

    known = [(split, len(table.ids), table.digest()) for split, table in {"train": train, **held_out}.items()]
    folder = cached(Path(cfg.data.cache), content_key(["homologs", HOMOLOGS_VERSION, method, known]), make)
    bits = {split: np.frombuffer(read_bytes(folder / split), np.uint8) for split in held_out}
    return {split: np.unpackbits(bits[split], count=len(table.ids)).astype(bool) for split, table in held_out.items()}


@dataclass(frozen=True)
class Part:
    """Proteins of a split that are scored together."""

    table: ExampleTable
    index: slice | np.ndarray
    """Which of the split's predictions are theirs."""
    units: np.ndarray | None
    """int64 [records], see `independent_units`."""

    def score(self, task: Task, predictions: Predictions) -> Scores:
        """Return the metrics, with intervals, of predictions for the whole split."""
        return task.metrics(self.table, [values[self.index] for values in predictions], True, self.units)

    def coverage(self, task: Task, predictions: Predictions) -> dict[str, Any] | None:
        """Return how often its sets or ranges hold the truth, see `Task.coverage`."""
        return task.coverage(self.table, [values[self.index] for values in predictions], self.units)


def score_splits(
    cfg: TrainConfig,
    task: Task,
    backend: Backend,
    train: ExampleTable,
    held_out: Mapping[str, ExampleTable],
    predict: Callable[[str], Predictions],
    leaks: Leaks,
    log: Log,
) -> dict[str, Any]:
    """Return the metrics of a model with intervals, the same on every rank; its predictions are kept in the output.

    Args:
        cfg: where to write, and what to look for.
        task: says what predictions mean.
        backend: the ranks; all of them call this.
        train: what the baselines are fitted on.
        held_out: `valid` and `test`, as far as they have proteins.
        predict: from a split's name to the model's predictions for its table, on every rank. A loop's network, a
            probe or anything else may have made them.
        leaks: what `find_leaks` gave.
        log: takes the lines for the console.

    Returns:
        `valid` and `test` (None for a split without proteins), `clean` by split where its clean proteins are some of
        it, `leaks`, `baselines` and `clean_baselines` on the same proteins, by split and by baseline, `verdicts` and
        `clean_verdicts` by split, `alarms`: split -> what is wrong, `calibration` (None without validation proteins;
        the metrics are of predictions read by it) and `coverage` of the `test` proteins and of the `clean` ones.
    """
    whole, clean = _Scored(), _Scored()
    found = {split: predict(split) for split in held_out}
    if "valid" in found:
        task = task.read_by(from_main_rank(backend, lambda: task.calibrate(held_out["valid"], found["valid"])))
    for split, table in held_out.items():
        path = Path(cfg.output) / predictions_name(split)
        predictions, has_homolog = found[split], leaks.get(split)
        if cfg.log.predictions:
            main_rank_only(backend, partial(save_predictions, path, task, table, predictions, has_homolog))
        units = from_main_rank(backend, partial(independent_units, table, cfg.data.homologs))
        whole.add(split, Part(table, slice(None), units), task, predictions)
        if has_homolog is not None and has_homolog.any() and not has_homolog.all():
            kept, examples, tokens = select_records(table, ~has_homolog)
            index = tokens if task.predictions_per_token else examples
            clean.add(split, Part(kept, index, None if units is None else units[~has_homolog]), task, predictions)
    main_rank_only(backend, lambda: save_resamples(Path(cfg.output), whole.own))
    beside = from_main_rank(backend, lambda: _beside(cfg, task, train, whole, clean, log))
    method = cfg.data.homologs
    counts = {s: {"method": method, "proteins": len(has), "homologs": int(has.sum())} for s, has in leaks.items()}
    none: dict[str, Scores | None] = {"valid": None, "test": None}
    covered = {"test": whole.coverage.get("test"), "clean": clean.coverage.get("test")}
    calibration = asdict(task.calibration) if task.calibration.proteins else None
    own = {"calibration": calibration, "coverage": {name: one for name, one in covered.items() if one}}
    return {**none, **whole.own, "clean": clean.own, "leaks": counts, **own, **beside}


class _Scored:
    """A model and its baselines on the same proteins, by split."""

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        self.own: dict[str, Scores] = {}
        self.coverage: dict[str, dict[str, Any] | None] = {}
        self.baselines: dict[str, dict[str, Scores]] = {}

    def add(self, split: str, part: Part, task: Task, predictions: Predictions) -> None:
        self.parts[split] = part
        self.own[split] = part.score(task, predictions)
        self.coverage[split] = part.coverage(task, predictions)

    def verdicts(self, task: Task) -> dict[str, dict[str, Any]]:
        found = {
            split: verdict(self.own[split], beside, task.metric, task.greater_is_better)
            for split, beside in self.baselines.items()
        }
        return {split: one for split, one in found.items() if one}


def _beside(
    cfg: TrainConfig, task: Task, train: ExampleTable, whole: _Scored, clean: _Scored, log: Log
) -> dict[str, Any]:
    """Score the baselines, and say what they and the metrics make of the model."""
    for baseline in _fitted(cfg, task, train, log):
        read = task.read_by(Calibration())  # each contestant has thresholds of its own, from the same proteins
        for split, part in whole.parts.items():
            begin = perf_counter()
            try:
                predictions = baseline.predict(part.table)
            except (ArithmeticError, MemoryError, ValueError) as error:  # of scikit-learn, on data not thought of
                log(f"WARNING: the {baseline.name} baseline failed ({error}); the model's metrics do not depend on it")
                break
            seconds = perf_counter() - begin  # with the fit, in the first split; not kept, as it is never the same
            if split == "valid":
                read = task.read_by(task.calibrate(part.table, predictions))
            for scored in (whole, clean):
                if split in scored.parts:
                    scores = scored.parts[split].score(read, predictions)
                    scores.update(baseline.size)
                    scored.baselines.setdefault(split, {})[baseline.name] = scores
            record = format_record(whole.baselines[split][baseline.name])
            log(f"{split}, {baseline.name} baseline: {record} seconds={seconds:.2f}")
    verdicts, pure = whole.verdicts(task), clean.verdicts(task)
    probe = cfg.adapter.kind == "probe"
    wrong = {split: alarms(scores, verdicts.get(split), probe) for split, scores in whole.own.items()}
    for split in whole.own:
        for name, found in ((split, verdicts), (f"{split} without homologs in training", pure)):
            if split in found:
                log(f"{name}: {found[split]['text']}")
        for line in wrong[split]:
            log(f"{split}: {line}")
    return {
        "baselines": {split: _plain(of) for split, of in whole.baselines.items()},
        "clean_baselines": {split: _plain(of) for split, of in clean.baselines.items()},
        "verdicts": verdicts,
        "clean_verdicts": pure,
        "alarms": {split: lines for split, lines in wrong.items() if lines},
    }


def _plain(scores: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """Return the metrics without their resamples, which other ranks need not be sent."""
    return {name: dict(values) for name, values in scores.items()}


def _fitted(cfg: TrainConfig, task: Task, train: ExampleTable, log: Log) -> Iterator[Baseline]:
    if not cfg.log.baselines:
        return
    if len(task.labels) > MOST_CLASSES:
        log(f"baselines: only those without a fit, since {len(task.labels)} classes are more than {MOST_CLASSES}")
    try:
        fitted = task.baselines(train)
    except (ArithmeticError, MemoryError, ValueError) as error:
        log(f"WARNING: the baselines could not be fitted ({error}); the model's own metrics do not depend on them")
        return
    if capped(fitted):
        log(capped(fitted))
    yield from bar("baselines", fitted)
