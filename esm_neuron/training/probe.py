"""A probe: a linear head fitted to what a frozen encoder gives, its penalty chosen by proteins of other families.

The encoder runs once over each training protein (`features`). The head minimizes the task's own loss, class weights
included, with a penalty on its weights (`linear_fit`). The penalty, and the layer where `model.layers: auto` has to
choose one, are those with the least loss of the predictions for five folds of the training proteins, where no family
(`data.families`) is in two: some hundred validation proteins cannot tell heads apart, and are left to calibrate the
one that was chosen. What follows is a run like any other: the head is part of an ordinary model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from esm_neuron.backends.base import Backend
from esm_neuron.compat import EsmConfig
from esm_neuron.config import TrainConfig
from esm_neuron.config.deferred import module
from esm_neuron.data.alignment import Proteins
from esm_neuron.data.dataset import Batch, ExampleTable, select_records
from esm_neuron.data.families import independent_units
from esm_neuron.data.tokenizer import AMINO_ACIDS
from esm_neuron.distributed import from_main_rank, main_rank_only, raise_on_any_rank
from esm_neuron.errors import DataError
from esm_neuron.metrics import Scores
from esm_neuron.models.esm2 import Embedder
from esm_neuron.models.shapes import read_width
from esm_neuron.models.weights import open_weights
from esm_neuron.tasks.base import Task
from esm_neuron.tasks.embedding import Embedding
from esm_neuron.tasks.features import composition
from esm_neuron.training.build import build_model, model_config
from esm_neuron.training.callbacks import EarlyStopping
from esm_neuron.training.evaluation import Evaluator
from esm_neuron.training.features import FrozenEncoder, folder_of
from esm_neuron.training.linear_fit import PENALTIES, ROUGH, TOLERANCE, Axes, LinearHead, fit_path
from esm_neuron.training.monitors import Clock
from esm_neuron.training.trainer import Trainer

model_selection = module("sklearn.model_selection")

Log = Callable[[str], None]
FOLDS = 5
MOST_BYTES, MOST_RESIDUES = 1 << 32, 200_000
"""Most memory of the states of a split, and most residues with a label each: of more, a sample of proteins is used."""
PATIENCE = 1
"""Penalties, each weaker than the one before, that may gain nothing before the rest is left out: it has one dip."""
MOST_JOINED = 1 << 30
"""Bytes of all layers' states side by side up to which `auto` takes them; of more it tries one layer at a time."""


@dataclass(frozen=True)
class Probe:
    """A head that was chosen."""

    head: dict[str, Tensor]
    """The head's parameters by name."""
    layers: Any
    """`model.layers` of the model that it is for: as configured, or what `auto` has found."""
    penalty: float
    chosen_on: str
    """How many folds of the training proteins."""
    metrics: Scores
    """Of the predictions for them, each by a head that was fitted to the other folds."""
    tried: dict[str, float]
    """Layers -> the loss of these predictions, as in training, with the best penalty for them."""
    residues: int = 0
    """Of the training proteins."""
    proteins: dict[str, int] = field(default_factory=dict)
    """`passed`: examples that the encoder was run over; `found`: those whose states were kept on disk."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`states` and `fit`."""

    def report(self) -> dict[str, Any]:
        """Return what result.json tells of it."""
        told = ("layers", "penalty", "chosen_on", "metrics", "tried", "proteins", "seconds")
        return {name: getattr(self, name) for name in told}


def fit_probe(
    cfg: TrainConfig,
    task: Task,
    backend: Backend,
    table: ExampleTable,
    log: Log,
    expect: Callable[[str, int], None],
) -> Probe:
    """Return the probe of a run, on every rank, fitted to a table of training proteins."""
    whole, _ = raise_on_any_rank(backend, lambda: open_weights(cfg.model, cfg.seed))
    depth = whole.num_hidden_layers
    read = tuple(range(depth + 1)) if cfg.model.layers in ("auto", "concat") else (depth,)
    row_bytes = 4 * len(read) * read_width(cfg.model.pooling, whole.hidden_size, 1, shares=False)
    table = _sampled(table, task, row_bytes, log)
    begun = monotonic()
    encoder = _encoder(cfg, task, backend, read, log, expect)
    states = encoder.states(table)
    fits = monotonic()
    kept = f"; the states of {encoder.found:,} are from an earlier run" if encoder.found else ""
    log(f"the encoder has read {encoder.passed:,} proteins{kept}")
    expect("the fit of the probe", 1)
    candidates: dict[int | str, Sequence[int]] = {cfg.model.layers: range(len(read))}
    if cfg.model.layers == "auto":
        joins = task.pools and len(table) * row_bytes <= MOST_JOINED
        candidates = {"concat": read} if joins else {layer: (layer,) for layer in read[1:]}
        if task.pools and not joins:
            log("NOTE: model.layers=auto tries one layer at a time: side by side they are more than a gigabyte")

    def fit() -> Probe:
        return _chosen(cfg, task, whole, _Rows.of(cfg, task, table, states), candidates)

    chosen = from_main_rank(backend, fit)
    return replace(
        chosen,
        proteins={"passed": encoder.passed, "found": encoder.found},
        seconds={"states": fits - begun, "fit": monotonic() - fits},
        residues=int(table.whole_residues().sum(dtype=np.int64)),
    )


def _encoder(
    cfg: TrainConfig,
    task: Task,
    backend: Backend,
    read: tuple[int, ...],
    log: Log,
    expect: Callable[[str, int], None],
) -> FrozenEncoder:
    pooling = "residue" if task.per_token else cfg.model.pooling
    embedding = Embedding(per_residue=task.per_token)
    built = raise_on_any_rank(backend, lambda: build_model(cfg, embedding, backend))
    evaluator = Evaluator(Embedder(built.model, pooling, every_layer=len(read) > 1), embedding, backend)
    folder = folder_of(cfg, from_main_rank(backend, lambda: built.source.reference.sha256), pooling)
    return FrozenEncoder(evaluator, cfg, folder, read, log, expect)


def _sampled(table: ExampleTable, task: Task, row_bytes: int, log: Log) -> ExampleTable:
    """Return a table whose states fit the memory: all of its proteins, or a sample of them."""
    rows = np.bincount(table.record, table.lengths if task.per_token else None, len(table.ids))
    most = min(MOST_BYTES // row_bytes, MOST_RESIDUES if task.per_token else MOST_BYTES)
    if rows.sum() <= most:
        return table
    order = np.random.default_rng(0).permutation(len(rows))
    keep = np.zeros(len(rows), dtype=bool)
    keep[order[np.cumsum(rows[order]) <= most]] = True
    log(f"NOTE: the probe is fitted on {keep.sum():,} of {len(keep):,} training proteins, {rows[keep].sum():,.0f} rows")
    return select_records(table, keep)[0]


@dataclass(frozen=True)
class _Rows:
    """What is fitted to: a row per example, or per token of a task with a target for each."""

    table: ExampleTable
    states: np.ndarray
    """float32 [n, layers, F]."""
    shares: np.ndarray
    """float32 [n, composition], see `esm2.composition`; no columns without it."""
    labels: np.ndarray
    weights: np.ndarray
    record: np.ndarray
    """int64 [n]: whose each row is."""
    means: int
    """How many means, side by side, the states of a layer are."""

    @classmethod
    def of(cls, cfg: TrainConfig, task: Task, table: ExampleTable, states: np.ndarray) -> _Rows:
        rng = np.random.default_rng(0)  # no task with a linear head draws
        targets = [task.example_target(table, place, rng) for place in range(len(table))]
        join = np.concatenate if task.per_token else np.stack
        shares = np.empty((len(states), 0), np.float32)
        if cfg.model.composition:
            shares = composition(Proteins.of(ExampleTable.of(table.tokens, table.offsets))).astype(np.float32)
            if cfg.model.pooling != "mean+termini":  # the termini's columns, between the whole and the length
                shares = np.delete(shares, np.s_[len(AMINO_ACIDS) : -1], axis=1)
        return cls(
            table=table,
            states=states,
            shares=shares,
            labels=join([target.label for target in targets]),
            weights=join([np.asarray(target.weight, np.float32) for target in targets]),
            record=np.repeat(table.record, table.lengths) if task.per_token else table.record,
            means=1 if task.per_token else read_width(cfg.model.pooling, 1, 1, shares=False),
        )

    def axes(self, places: Sequence[int]) -> Axes:
        """Return the axes of what the head of these layers, by their place in `states`, predicts from.

        The states of all these layers are a block for each mean (all residues, the termini), the shares are one.
        """
        features = np.concatenate([*(self.states[:, place] for place in places), self.shares], axis=1)
        of_layer = np.repeat(np.arange(self.means), self.states.shape[2] // self.means)
        blocks = [*[of_layer] * len(places), np.full(self.shares.shape[1], self.means)]
        return Axes.of(features, np.concatenate(blocks))


class _Fit:
    """Fits heads along some axes of a task's rows by its loss."""

    def __init__(self, task: Task, rows: _Rows, axes: Axes, outputs: int) -> None:
        self.task, self.axes, self.outputs = task, axes, outputs
        self.known = rows.weights > 0
        self._along = axes.along if self.known.all() else axes.along[self.known]
        self._labels = torch.from_numpy(rows.labels[self.known])
        self._weights = torch.from_numpy(rows.weights[self.known])

    def head(self, penalty: float) -> LinearHead:
        """Return the head of the features as they are, fitted to all rows."""
        ((head,),) = self._heads([self._weights], (penalty,), TOLERANCE)
        return self.axes.of_features(head)

    def by_folds(self, fold: np.ndarray) -> tuple[EarlyStopping, np.ndarray]:
        """Return the losses by penalty, counted from 0, and with the best one the logits [n, outputs] for each `fold`,
        int64 [n], by heads fitted to the others. Weak penalties, which take the most time, are left out if worse."""
        inside = [fold == number for number in np.unique(fold)]
        others = [self._weights * torch.from_numpy(~own[self.known]) for own in inside]
        gains, best = EarlyStopping(PATIENCE, greater_is_better=False), np.zeros((len(fold), self.outputs), np.float32)
        for step, heads in enumerate(self._heads(others, PENALTIES, ROUGH)):
            logits = np.empty_like(best)
            for own, head in zip(inside, heads, strict=True):
                logits[own] = head(self.axes.along[own])
            if gains.update(self._loss(torch.from_numpy(logits[self.known]), self._weights).item(), step):
                best = logits
            if gains.stop:
                break
        return gains, best

    def _heads(
        self, weights: Sequence[Tensor], penalties: Sequence[float], tolerance: float
    ) -> Iterator[list[LinearHead]]:
        """Yield, penalty by penalty, a head for each weighting of the rows.

        They are fitted as one problem whose parts share nothing: most of the time goes into reading the features, which
        serves all of them.
        """

        def loss(logits: Tensor) -> Tensor:
            own = zip(logits.split(self.outputs, dim=1), weights, strict=True)
            return torch.stack([self._loss(part, weight) for part, weight in own]).sum()

        outputs = self.outputs * len(weights)
        for joint in fit_path(self._along, self.axes.variance, outputs, loss, penalties, tolerance):
            yield joint.parted(len(weights))

    def _loss(self, logits: Tensor, weights: Tensor) -> Tensor:
        """Return the mean loss of logits of the known rows."""
        # what a loss reads of a batch
        targets = SimpleNamespace(labels=self._labels, weights=weights)
        total, weight = self.task.loss(logits, cast(Batch, targets))
        return total / weight


def _chosen(
    cfg: TrainConfig, task: Task, whole: EsmConfig, rows: _Rows, candidates: Mapping[Any, Sequence[int]]
) -> Probe:
    """Return the head with the least loss, fitted to all rows with the penalty that has it."""
    fold = _folds(rows, cfg)
    best, tried, found = EarlyStopping(0, greater_is_better=False), dict[str, float](), list[Any]()
    for layers, places in candidates.items():
        config = model_config(replace(cfg, model=replace(cfg.model, layers=layers)), task, whole)
        fit = _Fit(task, rows, rows.axes(places), int(config.num_labels or 0))
        gains, logits = fit.by_folds(fold)
        tried[str(layers)] = float("nan") if gains.best is None else gains.best
        if best.update(gains.best, 0) or not found:
            found = [layers, config, fit, gains.best_step or 0, logits]
    layers, config, fit, step, logits = found
    head = fit.head(PENALTIES[step])
    predictions = task.predictions(torch.from_numpy(logits), cast(Batch, None))
    name = task.linear_head(config)
    return Probe(
        head={f"{name}.weight": torch.from_numpy(head.weight), f"{name}.bias": torch.from_numpy(head.bias)},
        layers=layers,
        penalty=head.penalty,
        chosen_on=f"{len(np.unique(fold))} folds of train",
        metrics=task.metrics(rows.table, [each.numpy() for each in predictions]),
        tried=tried,
    )


def _folds(train: _Rows, cfg: TrainConfig) -> np.ndarray:
    """Return the fold of each row, int64 [n]; proteins of one family share one, unless nearly all are of one."""
    proteins = len(train.table.ids)
    units = independent_units(train.table, cfg.data.homologs)
    units = np.arange(proteins) if units is None else units
    count = min(FOLDS, len(np.unique(units)))
    if count < 2:
        raise DataError(f"{cfg.data.train}: one training protein, of which no fold can be made; a probe needs two")
    of_protein = np.zeros(proteins, np.int64)
    splits = model_selection.GroupKFold(count).split(units, groups=units)
    for number, (_, held_out) in enumerate(splits):
        of_protein[held_out] = number
    return of_protein[train.record]


def keep(trainer: Trainer, probe: Probe) -> None:
    """Save the head, which the model of `trainer` holds, as the checkpoint of the run's only step."""
    state = trainer.state
    state.step, state.residues, state.seconds = 1, probe.residues, sum(probe.seconds.values())
    trainer.monitors.clock = Clock(state.seconds, state.residues)

    def tell() -> None:
        for callback in trainer.callbacks:
            callback.on_eval(1, {"split": probe.chosen_on, **probe.metrics})

    with trainer.monitors.watching(), closing(trainer.checkpoints):
        main_rank_only(trainer.backend, tell)
        trainer.save_checkpoint()
        trainer.checkpoints.wait()
