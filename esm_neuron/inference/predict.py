"""Predict for every record of a file, in its order: what `predict` and `embed` share, and `predict` itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from esm_neuron.backends import opened_backend
from esm_neuron.config import BackendName, TrainConfig, require
from esm_neuron.config.deferred import module
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.loader import EvalLoader
from esm_neuron.data.validation import RejectedRows, rejected_path, save_rejected
from esm_neuron.distributed import is_alone, log_nothing, main_rank_only, raise_on_any_rank
from esm_neuron.inference.load import ModelSpec, find_members
from esm_neuron.inference.spool import Piece, stamp_of
from esm_neuron.inference.stream import JOIN, Advance, Predictions, check_target, spooled, stream
from esm_neuron.tasks.base import Column, Task
from esm_neuron.tasks.base import Predictions as TaskPredictions

if TYPE_CHECKING:
    from torch import nn

    from esm_neuron.backends.base import Backend
    from esm_neuron.training import evaluation
    from esm_neuron.training.build import Built
    from esm_neuron.training.evaluation import Evaluator
else:
    evaluation = module("esm_neuron.training.evaluation")

logger = logging.getLogger(__name__)

BATCHES = 32
"""About how many batches a piece fills; its last one is half empty on average, which costs 1/64 of the work."""
MOST_RESIDUES = 100_000
"""Most residues of a protein of which each has a prediction or a vector, so that memory holds them; the longest known
protein (titin) has 35,000."""


def predict(
    model: str,
    source: Path,
    target: Path,
    *,
    backend: BackendName | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    coverage: float | None = None,
    log: Callable[[str], None] = logger.info,
) -> int:
    """Write the predictions of a trained model for every record of `source`, in its order; return their number.

    Windows of a long sequence are averaged, and so are the models of an ensemble, see `answers`. Raise EsmNeuronError
    where the run, its weights or a record cannot be used; `target` is then unchanged.

    Args:
        model: output folder of a training run, which may be an ensemble's, or a folder with a trained model by
            transformers or PEFT.
        source: FASTA, CSV, TSV, JSONL or Parquet; columns as the run's configuration names them, labels not needed.
        target: CSV, TSV, JSONL or Parquet: `id`, and what `Task.outputs` gives.
        backend: where to run; None: where it was trained.
        settings: words that overrule the model's, such as `--data.sequence_column seq`.
        resume: use the shards that a killed command left beside `target`.
        coverage: also write what holds the truth with this probability, see `Task.covering`.
        log: called with lines about what was read, left out or cut.
    """
    check_target(target, JOIN, model, {"--input": source}, settings)
    return predict_file(prediction(model, backend, settings, coverage), source, target, resume, log)


@dataclass(frozen=True)
class Work:
    """What a command makes of each record: models that were found and not yet read, and the rows of their answers."""

    specs: Sequence[ModelSpec]
    task: Task
    rows: Callable[[ExampleTable, Sequence[TaskPredictions]], Predictions]
    """Makes rows of records and the predictions of each model."""
    options: Mapping[str, Any]
    """What decides the rows besides models and settings, in JSON's types."""
    network: Callable[[Built], nn.Module] = lambda built: built.model
    batches: int = BATCHES
    """About how many batches a piece fills."""

    @property
    def cfg(self) -> TrainConfig:
        return self.specs[0].cfg

    def inputs(self, source: Path) -> InputChunks:
        """Return the records of a file."""
        most = MOST_RESIDUES if self.task.predictions_per_token else None
        return InputChunks(source, self.cfg.data, most=most)

    def source(self, path: Path) -> TableSource:
        """Return the records of a file in pieces, for a process with one device."""
        return TableSource(self.inputs(path), piece_tokens(self.cfg, 1, self.batches))

    def load(self, backend: Backend) -> Loaded:
        """Read the models; an error of any rank is raised on all."""
        return Loaded(self, backend)


class Loaded:
    """The models of a `Work` in memory."""

    def __init__(self, work: Work, backend: Backend) -> None:
        built = [raise_on_any_rank(backend, partial(spec.load, work.task, backend)) for spec in work.specs]
        self._work = work
        self._evaluators = [evaluation.Evaluator(work.network(one), work.task, backend) for one in built]
        first, *others = [spec.identity(one) for spec, one in zip(work.specs, built, strict=True)]
        tokens = piece_tokens(work.cfg, backend.local_dp, work.batches)
        more = {"piece_tokens": tokens, **work.options, **({"others": others} if others else {})}
        self.identity: dict[str, Any] = {**first, **more}
        """What decides the rows besides the input."""

    def __call__(self, table: ExampleTable, advance: Advance = lambda tokens: None) -> Predictions:
        """Return the rows of a piece."""

        def share(tokens: float) -> None:
            advance(tokens / len(self._evaluators))

        each = [predict_table(evaluator, self._work.cfg, table, share) for evaluator in self._evaluators]
        return self._work.rows(table, each)


def prediction(
    model: str, backend: BackendName | None = None, settings: Sequence[str] = (), coverage: float | None = None
) -> Work:
    """Return what `predict` makes of each record."""
    specs, task = find_members(model, backend, settings, "predict")
    check_coverage(task, coverage)
    options = {"command": "predict", "coverage": coverage, "calibration": task.calibration.digest()}
    return Work(specs, task, partial(prediction_table, task, coverage=coverage), options)


def answers(
    task: Task, table: ExampleTable, each: Sequence[TaskPredictions], coverage: float | None = None
) -> dict[str, Column]:
    """Return what `Task.outputs` gives of one model or of the mean of several, with a `coverage` also `Task.covering`.

    Of several also `sd_<column>` for each column of numbers: their standard deviation (n - 1) over the models.
    """
    predictions = each[0] if len(each) == 1 else task.averaged(each)
    columns = task.outputs(table, predictions)
    if len(each) > 1:
        own = [task.outputs(table, one) for one in each]
        columns |= {f"sd_{name}": _spread([one[name] for one in own]) for name in columns if is_number(columns[name])}
    if coverage is not None:
        columns |= task.covering(table, predictions, coverage)
    return columns


def _spread(each: Sequence[Any]) -> Column:
    """Return the standard deviation over several columns of numbers, or of arrays of them for each record."""
    if isinstance(each[0], np.ndarray):
        return np.asarray(np.std(each, axis=0, ddof=1))
    return [np.std(arrays, axis=0, ddof=1) for arrays in zip(*each, strict=True)]


def is_number(column: Column) -> bool:
    """Return whether a column has numbers, or arrays of them, and no texts."""
    return isinstance(column, np.ndarray) or (len(column) > 0 and not isinstance(column[0], str))


def check_coverage(task: Task, coverage: float | None) -> None:
    """Raise EsmNeuronError, before the work, where sets or ranges of this coverage cannot be told."""
    if coverage is not None:
        require(task.covers, f"--coverage {coverage}: is for one class or one number per protein, not {task.summary}")
        task.calibration.radius(coverage)


def prediction_table(
    task: Task, table: ExampleTable, each: Sequence[TaskPredictions], coverage: float | None = None
) -> pa.Table:
    """Return `id` and the `answers` of one or several models for each record, null for NaN."""
    columns = answers(task, table, each, coverage)
    made = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
    return pa.table({"id": pa.array(list(table.ids), pa.string()), **made})


def predict_file(work: Work, source: Path, target: Path, resume: bool, log: Callable[[str], None]) -> int:
    """Write `target` with the predictions for every record of `source`; return the number of records."""
    inputs = work.inputs(source)
    if is_alone():
        inputs.check()
    with opened_backend(work.cfg) as backend:
        log = log if backend.topology.is_main else log_nothing
        tokens = piece_tokens(work.cfg, backend.local_dp, work.batches)
        stamp = stamp_of(str(source), [asdict(work.cfg.data), work.task.predictions_per_token, tokens])
        with spooled(backend, target, TableSource(inputs, tokens), stamp, resume) as spool:
            log(spool.scanned.summary)
            loaded = work.load(backend)
            written = stream(backend, target, spool, loaded.identity, loaded, log)
            write_rejected(backend, target, spool.scanned.rejected, log)
            return written


def write_rejected(backend: Backend, target: Path, rows: RejectedRows, log: Callable[[str], None]) -> None:
    """Write the records that were left out or changed beside `target`; if there are none, remove an older file."""
    path = rejected_path(target)
    main_rank_only(backend, lambda: save_rejected(path, rows))
    if rows:
        log(f"{len(rows)} records left out or changed are listed in {path}")


def piece_tokens(cfg: TrainConfig, local_dp: int, batches: int = BATCHES) -> int:
    return batches * cfg.loop.eval_packs_per_device * local_dp * cfg.data.pack_tokens


def predict_table(
    evaluator: Evaluator, cfg: TrainConfig, table: ExampleTable, advance: Advance = lambda tokens: None
) -> list[np.ndarray]:
    """Return the predictions for a table, made by this rank alone, see `Evaluator.collect`."""
    task, backend = evaluator.task, evaluator.backend
    loader = EvalLoader(table, task, cfg, local_dp=backend.local_dp, static_shapes=backend.static_shapes)
    return evaluator.collect(loader, alone=True, advance=advance)


class TableSource:
    """A file of proteins as an input of `spooled`, in pieces with at most `tokens` tokens."""

    def __init__(self, inputs: InputChunks, tokens: int) -> None:
        self._inputs, self._tokens = inputs, tokens

    @property
    def rejected(self) -> RejectedRows:
        return self._inputs.rejected

    def __call__(self) -> Iterator[Piece[ExampleTable]]:
        return table_pieces(self._inputs, self._tokens)

    def summary(self) -> str:
        return self._inputs.report.summary()

    def pack(self, content: ExampleTable) -> pa.RecordBatch:
        """Return one row, with a list for each array of the table."""
        arrays = {name: pa.array(getattr(content, name).reshape(-1)) for name in _PACKED}
        arrays["ids"] = pa.array(list(content.ids), pa.large_string())
        lists = {
            name: pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)
            for name, values in arrays.items()
        }
        return pa.RecordBatch.from_pydict(lists)

    def unpack(self, batch: pa.RecordBatch) -> ExampleTable:
        arrays = {name: batch[name].values.to_numpy() for name in _PACKED}
        arrays["starts"] = arrays["starts"].reshape(-1, 2)
        return ExampleTable(**arrays, labels=np.empty(0), ids=batch["ids"].values.to_pylist())


_PACKED = ("tokens", "offsets", "record", "weight", "starts", "residues")


def table_pieces(tables: Iterable[ExampleTable], tokens: int) -> Iterator[Piece[ExampleTable]]:
    """Cut tables into pieces of whole records with at most `tokens` tokens each, or one record; leave out labels.

    Residues that were cut off count too, because predictions may have a row for them.
    """
    for table in tables:
        shown = np.bincount(table.record, table.lengths, len(table.ids))
        ends = np.cumsum(np.maximum(shown, table.residues))
        first = 0
        while first < len(table.ids):
            begin = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, begin + tokens, side="right")))
            part = _records(table, first, last)
            yield Piece(part, len(part.tokens), len(part.ids))
            first = last


def _records(table: ExampleTable, first: int, last: int) -> ExampleTable:
    """Return the examples of records `first` to `last` - 1 as a table of their own."""
    low, high = np.searchsorted(table.record, (first, last))
    offsets = table.offsets[low : high + 1]
    return ExampleTable(
        tokens=table.tokens[offsets[0] : offsets[-1]],
        offsets=offsets - offsets[0],
        record=table.record[low:high] - first,
        weight=table.weight[low:high],
        labels=table.labels[:0],
        ids=table.ids[first:last],
        starts=table.starts[low:high],
        residues=table.residues[first:last],
    )
