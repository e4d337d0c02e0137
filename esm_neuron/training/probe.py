"""A probe: a linear head fitted to what a frozen encoder gives, its penalty and layers chosen on validation proteins.

The encoder runs once over each protein (`features`). The head minimizes the task's own loss, class weights included,
with a penalty on its weights (`linear_fit`). Penalty, and with `model.layers: auto` the layers, are those with the best
validation metric; without validation proteins, of the predictions for five folds of the training proteins, where no
cluster of homologs is in two. What follows is a run like any other: the head is part of an ordinary model.
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
from esm_neuron.data.homology import find_clusters
from esm_neuron.data.tokenizer import AMINO_ACIDS
from esm_neuron.distributed import from_main_rank, main_rank_only, raise_on_any_rank
from esm_neuron.errors import DataError
from esm_neuron.metrics import Scores, Value
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
from esm_neuron.training.linear_fit import LinearHead, fit_path
from esm_neuron.training.monitors import Clock
from esm_neuron.training.trainer import Trainer

model_selection = module("sklearn.model_selection")

Log = Callable[[str], None]
FOLDS = 5
MOST_BYTES, MOST_RESIDUES = 1 << 32, 200_000
"""Most memory of the states of a split, and most residues with a label each: of more, a sample of proteins is used."""
PATIENCE = 4
"""Penalties, each weaker than the one before, that may gain nothing in metric or loss before the rest is left out."""
MOST_JOINED = 1 << 30
"""Bytes of all layers' states side by side above which `auto` does not try them."""


@dataclass(frozen=True)
class Probe:
    """A head that was chosen."""

    head: dict[str, Tensor]
    """The head's parameters by name."""
    layers: Any
    """`model.layers` of the model that it is for: as configured, or what `auto` has found."""
    penalty: float
    chosen_on: str
    """`valid`, or how many folds of the training proteins."""
    metrics: Scores
    """Of the predictions that it was chosen by."""
    tried: dict[str, float | None]
    """Layers -> the task's metric with the best penalty for them."""
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
    tables: Mapping[str, ExampleTable],
    log: Log,
    expect: Callable[[str, int], None],
) -> Probe:
    """Return the probe of a run, on every rank; `tables` are those of `train` and, where there is one, `valid`."""
    whole, _ = raise_on_any_rank(backend, lambda: open_weights(cfg.model, cfg.seed))
    depth = whole.num_hidden_layers
    read = tuple(range(depth + 1)) if cfg.model.layers in ("auto", "concat") else (depth,)
    row_bytes = 4 * len(read) * read_width(cfg.model.pooling, whole.hidden_size, 1, shares=False)
    tables = {split: _sampled(table, split, task, row_bytes, log) for split, table in tables.items()}
    begun = monotonic()
    encoder = _encoder(cfg, task, backend, read, log, expect)
    states = {split: encoder.states(table) for split, table in tables.items()}
    fits = monotonic()
    log(f"{encoder.passed:,} proteins have passed the encoder; the states of {encoder.found:,} were kept from before")
    expect("the fit of the probe", 1)
    candidates: dict[int | str, Sequence[int]] = {cfg.model.layers: range(len(read))}
    if cfg.model.layers == "auto":
        candidates = {layer: (layer,) for layer in read[1:]}
        if task.pools and len(tables["train"]) * row_bytes <= MOST_JOINED:
            candidates["concat"] = read
        elif task.pools:
            log("NOTE: model.layers=auto does not try `concat`: all layers side by side are more than a gigabyte")

    def fit() -> Probe:
        rows = {split: _Rows.of(cfg, task, table, states[split]) for split, table in tables.items()}
        return _chosen(cfg, task, whole, rows, candidates)

    chosen = from_main_rank(backend, fit)
    return replace(
        chosen,
        proteins={"passed": encoder.passed, "found": encoder.found},
        seconds={"states": fits - begun, "fit": monotonic() - fits},
        residues=int(tables["train"].whole_residues().sum(dtype=np.int64)),
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


def _sampled(table: ExampleTable, split: str, task: Task, row_bytes: int, log: Log) -> ExampleTable:
    """Return a table whose states fit the memory: all of its proteins, or a sample of them."""
    rows = np.bincount(table.record, table.lengths if task.per_token else None, len(table.ids))
    most = min(MOST_BYTES // row_bytes, MOST_RESIDUES if task.per_token else MOST_BYTES)
    if rows.sum() <= most:
        return table
    order = np.random.default_rng(0).permutation(len(rows))
    keep = np.zeros(len(rows), dtype=bool)
    keep[order[np.cumsum(rows[order]) <= most]] = True
    what = "to fit on" if split == "train" else "to choose by"
    log(f"NOTE: the probe takes {keep.sum():,} of {len(keep):,} {split} proteins {what}, {rows[keep].sum():,.0f} rows")
    return select_records(table, keep)[0]


@dataclass(frozen=True)
class _Rows:
    """What is fitted, or chosen by: a row per example, or per token of a task with a target for each."""

    table: ExampleTable
    states: np.ndarray
    """float32 [n, layers, F]."""
    shares: np.ndarray
    """float32 [n, composition], see `esm2.composition`; no columns without it."""
    labels: np.ndarray
    weights: np.ndarray
    record: np.ndarray
    """int64 [n]: whose each row is."""

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
        )

    def features(self, places: Sequence[int]) -> np.ndarray:
        """Return what the head of these layers, by their place in `states`, predicts from."""
        return np.concatenate([*(self.states[:, place] for place in places), self.shares], axis=1)


def _trials(
    task: Task, config: EsmConfig, train: _Rows, valid: _Rows | None, fold: np.ndarray, places: Sequence[int]
) -> list[tuple[LinearHead, Scores]]:
    """Return for each penalty the head fitted to all training rows, and the metrics that it is chosen by.

    On validation rows the weakest penalties, which take the most time, are left out after PATIENCE without a gain.
    Without such rows the metrics are of the predictions for each `fold`, int64 [n], by heads fitted to the others.
    """
    features, no_batch, outputs = train.features(places), cast(Batch, None), int(config.num_labels or 0)

    def fit(used: np.ndarray) -> Iterator[LinearHead]:
        used = used & (train.weights > 0)
        labels, weights = (torch.from_numpy(array[used]) for array in (train.labels, train.weights))
        targets = cast(Batch, SimpleNamespace(labels=labels, weights=weights))  # what a loss reads of a batch

        def loss(logits: Tensor) -> Tensor:
            total, weight = task.loss(logits, targets)
            return total / weight

        return fit_path(features[used], outputs, loss)

    def score(table: ExampleTable, logits: np.ndarray) -> Scores:
        predictions = task.predictions(torch.from_numpy(logits), no_batch)
        return task.metrics(table, [each.numpy() for each in predictions])

    if valid is not None:
        seen, found = valid.features(places), list[tuple[LinearHead, Scores]]()
        gains = EarlyStopping(PATIENCE, task.greater_is_better), EarlyStopping(PATIENCE, greater_is_better=False)
        for head in fit(fold >= 0):
            found.append((head, score(valid.table, head(seen))))
            for gain, name in zip(gains, (task.metric, "loss"), strict=True):
                gain.update(_number(found[-1][1].get(name)), len(found))
            if all(gain.stop for gain in gains):
                break
        return found
    heads = list(fit(fold >= 0))
    logits = np.zeros((len(heads), len(features), outputs), np.float32)
    for number in np.unique(fold):
        for own, head in zip(logits, fit(fold != number), strict=True):
            own[fold == number] = head(features[fold == number])
    return [(head, score(train.table, own)) for head, own in zip(heads, logits, strict=True)]


def _chosen(
    cfg: TrainConfig,
    task: Task,
    whole: EsmConfig,
    rows: Mapping[str, _Rows],
    candidates: Mapping[Any, Sequence[int]],
) -> Probe:
    """Return the head with the best metric, as a checkpoint is chosen: of equal ones that with the lowest loss."""
    train, valid = rows["train"], rows.get("valid")
    fold = _folds(train, cfg) if valid is None else train.record
    best, tried = EarlyStopping(0, task.greater_is_better), {}
    chosen: dict[str, Any] = {}
    for layers, places in candidates.items():
        config = model_config(replace(cfg, model=replace(cfg.model, layers=layers)), task, whole)
        found = _trials(task, config, train, valid, fold, places)
        own = EarlyStopping(0, task.greater_is_better)
        for number, (_, metrics) in enumerate(found):
            own.update(_number(metrics[task.metric]), number, _number(metrics.get("loss")))
        tried[str(layers)] = own.best
        head, metrics = found[own.best_step or 0]
        if best.update(own.best, 0, own.best_loss) or not chosen:
            name = task.linear_head(config)
            tensors = {"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)}
            chosen = {"layers": layers, "penalty": head.penalty, "metrics": metrics,
                      "head": {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}}  # fmt: skip
    return Probe(**chosen, chosen_on="valid" if valid else f"{len(np.unique(fold))} folds of train", tried=tried)


def _number(value: Value | None) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _folds(train: _Rows, cfg: TrainConfig) -> np.ndarray:
    """Return the fold of each row, int64 [n]; proteins of one cluster of homologs share one."""
    method = cfg.data.homologs
    clusters = np.arange(len(train.table.ids)) if method == "off" else find_clusters(train.table, method)
    count = min(FOLDS, len(np.unique(clusters)))
    if count < 2:
        raise DataError(
            f"{cfg.data.train}: all training proteins are homologs, and none are for validation: nothing can be chosen "
            "by; give data.valid, or data.valid_fraction above 0"
        )
    of_protein = np.zeros(len(clusters), np.int64)
    splits = model_selection.GroupKFold(count).split(clusters, groups=clusters)
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
