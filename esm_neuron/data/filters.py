"""What values of columns say: which rows a filter keeps, which split a row is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import DataConfig
from esm_neuron.data.label_forms import same
from esm_neuron.data.looks import NO_LABEL
from esm_neuron.data.records import MARKS
from esm_neuron.data.sources import filter_column

SPLITS = ("train", "valid", "test")


def passes(rows: pa.Table, filters: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """Return which rows have an allowed value in every column of the filter, bool [rows]."""
    mask = np.ones(len(rows), dtype=bool)
    for source, allowed in filters.items():
        keys = {filter_key(value) for value in allowed}
        column = rows[filter_column(source)]
        # Compare the distinct values in Python and leave the rows to Arrow: a column has few values and many rows.
        wanted = [value for value in column.unique().to_pylist() if filter_key(value) in keys]
        mask &= pc.is_in(column, value_set=pa.array(wanted, pa.large_string())).to_numpy()
    return mask


def filter_key(value: str) -> str:
    """Return what a value is compared by: itself, but True, TRUE and true are one, and so are 1 and 1.0."""
    return str(same(value))


def split_of(value: str, cfg: DataConfig) -> int:
    """Return the place in SPLITS of a value of the split column, -1 where it names none."""
    if cfg.fold is not None:
        return 2 if _split_key(value) == _split_key(str(cfg.fold)) else 0
    names = cfg.split_values
    if cfg.split_names == DataConfig.split_names:
        names = [(*of, *more) for of, more in zip(names, _SPLITS_TOO, strict=True)]
    for exact in (True, False):  # a value as it stands comes first
        for place, of in enumerate(names):
            if value in of if exact else _split_key(value) in map(_split_key, of):
                return place
    return -1


def _split_key(value: str) -> str:
    return filter_key(value).lower()


_SPLITS_TOO = (("training",), ("val", "validation", "dev"), ("testing",))
"""What files call training, validation and test proteins besides the names of SPLITS."""


def truth(value: str) -> bool | None:
    """Return whether a value says yes; None where it says neither."""
    return MARKS.get(value.lower(), False if value.lower() in NO_LABEL else None)
