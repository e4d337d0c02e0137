"""Predict for every record of a file, in its order: what `predict` and `embed` share, and `predict` itself."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from esm_neuron import __version__
from esm_neuron.backends import opened_backend
from esm_neuron.config import BackendName, TrainConfig
from esm_neuron.config.deferred import module
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.loader import EvalLoader
from esm_neuron.data.validation import RejectedRows, rejected_path, save_rejected
from esm_neuron.distributed import is_alone, log_nothing, main_rank_only, raise_on_any_rank
from esm_neuron.inference.load import ModelSpec, find_trained
from esm_neuron.inference.spool import Piece, Spool, stamp_of
from esm_neuron.inference.stream import JOIN, Advance, Predictions, check_target, spooled, stream
from esm_neuron.tasks.base import Task

if TYPE_CHECKING:
    from torch import nn

    from esm_neuron.backends.base import Backend
    from esm_neuron.build import Built
    from esm_neuron.training import evaluation
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
    log: Callable[[str], None] = logger.info,
) -> int:
    """Write the predictions of a trained model for every record of `source`, in its order; return their number.

    Windows of a long sequence are averaged. Raise EsmNeuronError where the run, its weights or a record cannot be used;
    `target` is then unchanged.

    Args:
        model: output folder of a training run, or a folder with a trained model by transformers or PEFT.
        source: FASTA, CSV, TSV, JSONL or Parquet; columns as the run's configuration names them, labels not needed.
        target: CSV, TSV, JSONL or Parquet: `id`, and what `Task.outputs` gives.
        backend: where to run; None: where it was trained.
        settings: words that overrule the model's, such as `--data.sequence_column seq`.
        resume: use the shards that a killed command left beside `target`.
        log: called with lines about what was read, left out or cut.
    """
    check_target(target, JOIN, model, {"--input": source}, settings)
    cfg, task = find_trained(model, backend, settings, "predict")

    def write(table: ExampleTable, predictions: Sequence[np.ndarray]) -> Predictions:
        columns = task.outputs(table, predictions)
        made = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
        return pa.table({"id": pa.array(list(table.ids), pa.string()), **made})

    return predict_file(ModelSpec(cfg, task), task, source, target, write, resume, log, {"command": "predict"})


def predict_file(
    spec: ModelSpec,
    task: Task,
    source: Path,
    target: Path,
    write: Callable[[ExampleTable, Sequence[np.ndarray]], Predictions],
    resume: bool,
    log: Callable[[str], None],
    options: Mapping[str, Any],
    network: Callable[[Built], nn.Module] = lambda built: built.model,
    batches: int = BATCHES,
    check: Callable[[Spool[ExampleTable], Built], None] = lambda spool, built: None,
) -> int:
    """Write `target` with the predictions for every record of `source`; return the number of records.

    `write` makes rows of records and their predictions; `options`, in JSON's types, decide the predictions besides
    model and settings; a piece fills about `batches` batches. `check` raises, before anything is predicted, where the
    input does not suit the output.
    """
    cfg = spec.cfg
    inputs = InputChunks(source, cfg.data, most=MOST_RESIDUES if task.predictions_per_token else None)
    if is_alone():
        inputs.check()
    with opened_backend(cfg) as backend:
        log = log if backend.topology.is_main else log_nothing
        tokens = piece_tokens(cfg, backend, batches)

        with spooled(backend, target, TableSource(inputs, tokens), resume) as spool:
            log(spool.scanned.summary)
            built = raise_on_any_rank(backend, lambda: spec.load(task, backend))
            main_rank_only(backend, lambda: check(spool, built))
            evaluator = evaluation.Evaluator(network(built), task, backend)

            def predict_piece(table: ExampleTable, advance: Advance) -> Predictions:
                return write(table, predict_table(evaluator, cfg, table, advance))

            identity = spec.identity(built, piece_tokens=tokens, **options)
            written = stream(backend, target, spool, identity, predict_piece, log)
            write_rejected(backend, target, spool.scanned.rejected, log)
            return written


class TableSource:
    """A file of proteins as an input of `spooled`: pieces with at most `tokens` tokens."""

    def __init__(self, inputs: InputChunks, tokens: int) -> None:
        self._inputs, self._tokens = inputs, tokens

    @property
    def rejected(self) -> RejectedRows:
        return self._inputs.rejected

    def __call__(self) -> Iterator[Piece[ExampleTable]]:
        return table_pieces(self._inputs, self._tokens)

    def summary(self) -> str:
        return self._inputs.report.summary()

    def stamp(self) -> str | None:
        return stamp_of(self._inputs.path, [__version__, asdict(self._inputs.cfg), self._inputs.most, self._tokens])

    def pack(self, content: ExampleTable) -> pa.RecordBatch:
        """Return one row, with a list for each array of the table."""
        arrays = {name: pa.array(getattr(content, name).reshape(-1)) for name in _SPOOLED}
        arrays["ids"] = pa.array(list(content.ids), pa.large_string())
        return pa.RecordBatch.from_pydict(
            {
                name: pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)
                for name, values in arrays.items()
            }
        )

    def unpack(self, batch: pa.RecordBatch) -> ExampleTable:
        arrays = {name: batch[name][0].values.to_numpy() for name in _SPOOLED}
        ids = batch["ids"][0].values.to_pylist()
        return ExampleTable(**{**arrays, "starts": arrays["starts"].reshape(-1, 2)}, labels=np.empty(0), ids=ids)

    def digest(self, content: ExampleTable) -> bytes:
        return _digest(content)


_SPOOLED = ("tokens", "offsets", "record", "weight", "starts", "residues")


def write_rejected(backend: Backend, target: Path, rows: RejectedRows, log: Callable[[str], None]) -> None:
    """Write the records that were left out or changed beside `target`; if there are none, remove an older file."""
    path = rejected_path(target)
    main_rank_only(backend, lambda: save_rejected(path, rows))
    if rows:
        log(f"{len(rows)} records left out or changed are listed in {path}")


def piece_tokens(cfg: TrainConfig, backend: Backend, batches: int = BATCHES) -> int:
    return batches * cfg.loop.eval_packs_per_device * backend.local_dp * cfg.data.pack_tokens


def predict_table(
    evaluator: Evaluator, cfg: TrainConfig, table: ExampleTable, advance: Advance = lambda tokens: None
) -> list[np.ndarray]:
    """Return the predictions for a table, made by this rank alone, see `Evaluator.collect`."""
    task, backend = evaluator.task, evaluator.backend
    loader = EvalLoader(table, task, cfg, local_dp=backend.local_dp, static_shapes=backend.static_shapes)
    return evaluator.collect(loader, alone=True, advance=advance)


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
            part = table.records(first, last)
            yield Piece(part, len(part.tokens), _digest(part), len(part.ids))
            first = last


def _digest(table: ExampleTable) -> bytes:
    digest = hashlib.sha256(repr(list(table.ids)).encode())
    for array in (table.tokens, table.offsets, table.record, table.starts, table.residues):
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
