"""Embeddings: the encoder's last hidden states after its final layer norm, one vector per protein or per residue."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from esm_neuron.config import BackendName, require
from esm_neuron.config.deferred import module
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.errors import DataError
from esm_neuron.inference.load import find_model
from esm_neuron.inference.predict import BATCHES, Work, predict_file
from esm_neuron.inference.stream import H5, JOIN_EMBEDDINGS, SAFETENSORS, Predictions, check_target
from esm_neuron.tasks.base import record_mean
from esm_neuron.tasks.embedding import Embedding
from esm_neuron.tasks.residues import residue_mean

if TYPE_CHECKING:
    from esm_neuron.models import esm2
    from esm_neuron.training.build import Built
else:
    esm2 = module("esm_neuron.models.esm2")

Pooling = Literal["mean", "cls", "residue"]
RESERVED = "__metadata__"  # by the safetensors format

logger = logging.getLogger(__name__)


def per_record(table: ExampleTable, predictions: Sequence[np.ndarray], per_residue: bool) -> list[np.ndarray]:
    """Return float32 [H] per record; or [residues, H], NaN for those that were cut off. Windows are averaged."""
    if not per_residue:
        return list(record_mean(table, predictions[0]).astype(np.float32))
    slot, bounds = table.residue_slots()
    if len(table) > len(table.ids):
        vectors = residue_mean(slot, bounds, predictions[0]).astype(np.float32)
    else:
        shown = slot >= 0
        vectors = np.full((bounds[-1], predictions[0].shape[1]), np.nan, np.float32)
        vectors[slot[shown]] = predictions[0][shown]
    return np.split(vectors, bounds[1:-1])


def as_table(ids: Sequence[str], vectors: Sequence[np.ndarray]) -> pa.Table:
    """Return columns `id` and `embedding`: a list of H numbers, or a list of such lists."""
    width = vectors[0].shape[-1]
    flat = np.concatenate([vector.reshape(-1, width) for vector in vectors])
    column: pa.Array = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), width)
    if vectors[0].ndim > 1:
        ends = np.cumsum([0, *map(len, vectors)])
        column = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), column)
    return pa.table({"id": pa.array(list(ids), pa.string()), "embedding": column})


def as_arrays(ids: Sequence[str], vectors: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return id -> its array, for safetensors."""
    if RESERVED in ids:
        raise DataError(f"the id {RESERVED!r} is reserved in safetensors; rename the record, or write .parquet")
    return {name: np.ascontiguousarray(vector) for name, vector in zip(ids, vectors, strict=True)}


def embed(
    model: str,
    source: Path,
    target: Path,
    pooling: Pooling = "mean",
    *,
    backend: BackendName | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    log: Callable[[str], None] = logger.info,
) -> int:
    """Write the embedding of every record of `source`, in its order; return their number. Otherwise as `predict`.

    Args:
        model: output folder of a training run, a Hugging Face folder of ESM-2, or a hub id.
        target: Parquet (columns `id`, `embedding`), safetensors or HDF5 (id -> array; needs h5py).
        pooling: the mean over residues, the state of <cls>, or one vector per residue, in the protein's own
            numbering (NaN for residues that were cut off). Windows are averaged.
    """
    require(
        target.suffix.lower() != H5 or find_spec("h5py") is not None,
        f"--output {target}: {H5} needs h5py; run: pip install 'esm-neuron[h5]'",
    )
    check_target(target, JOIN_EMBEDDINGS, model, {"--input": source}, settings)
    return predict_file(
        embedding(model, pooling, backend, settings, target.suffix.lower()), source, target, resume, log
    )


def embedding(
    model: str,
    pooling: Pooling = "mean",
    backend: BackendName | None = None,
    settings: Sequence[str] = (),
    suffix: str = ".parquet",
) -> Work:
    """Return what `embed` makes of each record, for a file of a kind."""
    spec = find_model(model, backend, settings, "embed")
    task = Embedding(per_residue=pooling == "residue")
    shape = as_arrays if suffix == SAFETENSORS else as_table

    def rows(table: ExampleTable, each: Sequence[Sequence[np.ndarray]]) -> Predictions:
        return shape(table.ids, per_record(table, each[0], task.predictions_per_token))

    def network(built: Built) -> esm2.Embedder:
        return esm2.Embedder(built.model, pooling)

    options = {"command": "embed", "pooling": pooling, "format": suffix}
    return Work([spec], task, rows, options, network, 8 if pooling == "residue" else BATCHES)
