"""Parquet files and datasets of the `datasets` package, saved in a folder or on the hub; records counted from 1."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from esm_neuron.data.records import Column, Record, pick_columns, text
from esm_neuron.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1024
"""Records held at once."""

_HUB = re.compile(
    r"hf:/{1,2}(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[\w.-]+)(?:/(?P<config>[\w.-]+))?/(?P<split>[\w.-]+)"
)


def read_parquet(path: str, columns: Sequence[Column]) -> Iterator[Record]:
    """Records of a Parquet file."""
    try:
        with pq.ParquetFile(path) as file:
            header = file.schema_arrow.names
            picks = pick_columns(path, header, columns)
            names = [header[pick] for pick in picks]
            batches = file.iter_batches(BATCH, columns=list(dict.fromkeys(names)))
            yield from _records(path, columns, ([batch[name].to_pylist() for name in names] for batch in batches))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path (it is taken from the current folder)") from None
    except (pa.ArrowException, OSError) as error:
        what = str(error).splitlines()[0][:200]
        raise DataError(f"{path}: no sound Parquet file ({what}); write it anew, or copy it again") from None


def read_dataset(folder: str, columns: Sequence[Column]) -> Iterator[Record]:
    """Records of a folder that `Dataset.save_to_disk` wrote; class labels by their names."""
    from datasets import load_from_disk

    path = Path(folder)
    if (path / "dataset_dict.json").exists():
        splits = sorted(str(item) for item in path.iterdir() if item.is_dir())
        raise DataError(f"{folder}: the folder holds several splits; name one of them: {', '.join(splits)}")
    if not (path / "dataset_info.json").exists() or not (path / "state.json").exists():
        raise DataError(f"{folder}: this is a folder; name a file in it, or a folder that Dataset.save_to_disk wrote")
    try:
        dataset = load_from_disk(folder)
    except Exception as error:  # the package's reader raises whatever its JSON and Arrow parsers raise
        what = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"{folder}: no sound saved dataset ({what}); save it anew, or copy it again") from None
    yield from _dataset_records(folder, dataset, columns)


def read_hub(source: str, columns: Sequence[Column]) -> Iterator[Record]:
    """Records of a hub dataset `hf://owner/name@revision/split` or `hf://owner/name@revision/config/split`.

    The revision is asked for, so that a table made today can be made again.
    """
    found = _HUB.fullmatch(source)
    if found is None:
        raise DataError(
            f"{source}: not the name of a hub dataset; write hf://owner/name@revision/split, or "
            "hf://owner/name@revision/config/split, the revision best a commit hash"
        )
    from datasets import load_dataset

    try:
        dataset = load_dataset(
            found["name"], found["config"], split=found["split"], revision=found["revision"], token=False
        )
    except Exception as error:  # connections, names, formats: the package has no common kind of error
        what = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        cure = "check owner, name, revision, split and network, or save it to a folder and name that"
        raise DataError(f"{source}: cannot be read from the hub ({what}); {cure}") from None
    yield from _dataset_records(source, dataset, columns)


def _dataset_records(source: str, dataset: Dataset, columns: Sequence[Column]) -> Iterator[Record]:
    picks = pick_columns(source, dataset.column_names, columns)
    names = [dataset.column_names[pick] for pick in picks]
    batches = dataset.select_columns(list(dict.fromkeys(names))).with_format(None).iter(BATCH)
    decoders = [_class_names(dataset.features[name]) for name in names]
    values = (
        [[decode(value) for value in batch[name]] for name, decode in zip(names, decoders, strict=True)]
        for batch in batches
    )
    yield from _records(source, columns, values)


def _class_names(feature: Any) -> Any:
    """What turns a value of a feature into what a person calls it: a class label (or a list of them) into its name."""
    from datasets import ClassLabel

    inner = getattr(feature, "feature", None)
    if isinstance(feature, ClassLabel):
        return lambda value: None if value is None or value < 0 else feature.names[value]
    if isinstance(inner, ClassLabel):
        return lambda value: None if value is None else [inner.names[entry] for entry in value]
    return lambda value: value


def _records(source: str, columns: Sequence[Column], batches: Iterator[list[list[Any]]]) -> Iterator[Record]:
    rows = chain.from_iterable(zip(*batch, strict=True) for batch in batches)
    for number, row in enumerate(rows, start=1):
        yield number, [text(value, source, number, column) for value, column in zip(row, columns, strict=True)]
