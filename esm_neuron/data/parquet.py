"""Read Parquet files, Excel workbooks and datasets of the `datasets` package, saved in a folder or on the hub.

Records count from 1.
"""

from __future__ import annotations

import importlib.util
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esm_neuron.config.deferred import module
from esm_neuron.data.records import (
    LINE_LIMIT,
    NUMBERED,
    Block,
    Column,
    Record,
    check_expansion,
    check_regular,
    in_blocks,
    numbered,
    pick_columns,
    text,
)
from esm_neuron.data.remote import nearby
from esm_neuron.errors import DataError, EsmNeuronError, first_line
from esm_neuron.files import new_file, read_json

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
else:
    pd = module("pandas")

BATCH = 1024
"""Records held at once."""
GROUP_ROWS, GROUP_BYTES = 100_000, 1 << 26
NESTED_LIMIT = 1 << 30
"""Bytes that the lists of records decoded together can have, were every entry as long as all that is stored."""

_WORD = r"\w[\w.-]*"  # no "..", which would lead out of a folder
_HUB = re.compile(
    rf"hf:/{{1,2}}(?P<name>{_WORD}/{_WORD})@(?P<revision>{_WORD})(?:/(?P<config>{_WORD}))?/(?P<split>{_WORD})"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def read_parquet(path: str, columns: Sequence[Column]) -> Iterator[Block]:
    """Give the records of a Parquet file."""
    check_regular(path)
    with nearby(path) as here:
        yield from _read_parquet(path, here, columns)


def _read_parquet(path: str, here: str, columns: Sequence[Column]) -> Iterator[Block]:
    """Give the records of the file `here`, which messages call `path`."""
    try:
        with pq.ParquetFile(here) as file:
            header = file.schema_arrow.names
            picks = pick_columns(path, header, columns)
            names = [header[pick] for pick in picks if pick >= 0]
            texts = _texts(file, names)
        # as dictionaries: text that a file holds once for a million rows is held once
        with pq.ParquetFile(here, read_dictionary=texts) as file:
            rows = _rows_at_once(path, here, file, names)
            batches = file.iter_batches(rows, columns=list(dict.fromkeys(names)))
            yield from _blocks(path, columns, picks, _parts(path, batches, names))
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, MemoryError) as error:
        raise _unsound(path, "Parquet file", error) from None


def read_table(path: Path) -> pa.Table:
    """Return a whole Parquet file, such as `write_table` makes. Raise DataError where it is damaged or too large."""
    check_regular(str(path))
    try:
        with pq.ParquetFile(path) as file:
            names, schema = file.schema_arrow.names, file.schema_arrow.remove_metadata()
            texts = _texts(file, names)
        parts, held = [], 0
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(_rows_at_once(str(path), str(path), file, names)):
                batch.validate(full=True)
                held += batch.nbytes + sum(int(_characters(column).sum()) for column in batch.columns)
                check_expansion(str(path), str(path), held, "of values are packed into")
                parts.append(pa.RecordBatch.from_arrays(list(map(_plain, batch.columns)), schema=schema))
        return pa.Table.from_batches(parts, schema)
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, MemoryError) as error:
        raise _unsound(path, "Parquet file", error) from None


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file in one move."""
    with new_file(path) as aside:
        pq.write_table(table, aside, compression="zstd")


@contextmanager
def open_table(path: Path) -> Iterator[Callable[[pa.Table], int]]:
    """Open a Parquet file to write; yield what appends a table of one schema to it and returns its rows.

    A row group has GROUP_ROWS rows or GROUP_BYTES: each costs some 100 bytes a column in the footer that readers hold.
    """
    with ExitStack() as opened:
        writer: pq.ParquetWriter | None = None
        held: list[pa.Table] = []

        def flush() -> None:
            nonlocal writer
            if held:
                writer = writer or opened.enter_context(pq.ParquetWriter(path, held[0].schema))
                writer.write_table(pa.concat_tables(held))
                held.clear()

        def write(table: pa.Table) -> int:
            held.append(table)
            if sum(map(len, held)) >= GROUP_ROWS or sum(part.nbytes for part in held) >= GROUP_BYTES:
                flush()
            return int(table.num_rows)

        yield write
        flush()


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _texts(file: pq.ParquetFile, names: Sequence[str]) -> list[str]:
    """Return the columns that hold text; pyarrow cannot read lists of it as dictionaries."""
    leaves = (file.schema.column(i) for i in range(len(file.schema)))
    return [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.path in names]


def _rows_at_once(path: str, here: str, file: pq.ParquetFile, names: Sequence[str]) -> int:
    """Return how many records to decode at once: fewer where lists might repeat one long text, which is stored once."""
    # No look at single columns: where their entries are damaged, pyarrow ends the process instead of raising.
    sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
    size = max(sizes, default=0)
    check_expansion(here, path, size, "of a row group are packed into")
    lists = any(file.schema.column(i).path.startswith(tuple(f"{n}." for n in names)) for i in range(len(file.schema)))
    return min(BATCH, max(1, NESTED_LIMIT // max(size, 1))) if lists else BATCH


def _parts(path: str, batches: Iterator[pa.RecordBatch], names: Sequence[str]) -> Iterator[list[pa.Array]]:
    """Give the columns, of as many records at once as hold LINE_LIMIT characters, or of one."""
    done = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged file's values can lie outside of the dictionary that has been read
        # One record of lists can hold as much text as many others: a batch is cut where its text would fill the memory.
        sizes = np.sum([_characters(batch[name]) for name in dict.fromkeys(names)], axis=0)
        starts, held = [0], 0
        for row, size in enumerate(sizes.tolist()):
            if size > LINE_LIMIT:
                where = f"{path}: record {done + row + 1}"
                raise DataError(f"{where}: holds {size} characters, more than {LINE_LIMIT}; is this the right file?")
            held += size
            if held > LINE_LIMIT:
                starts.append(row)
                held = size
        for start, end in pairwise([*starts, len(batch)]):
            part = batch.slice(start, end - start)
            yield [_plain(part[name]) for name in names]
        done += len(batch)


def _blocks(
    source: str, columns: Sequence[Column], picks: Sequence[int], parts: Iterator[list[pa.Array]]
) -> Iterator[Block]:
    """Give the records of some parts, each with an array per column that is there, as text."""
    done = 0
    for arrays in parts:
        texts = [made for column in arrays if (made := _as_text(column, columns[0])) is not None]
        if len(texts) < len(arrays):
            lists = iter([[column.to_pylist() for column in arrays]])
            yield from in_blocks(_records(source, columns, picks, lists, done), len(columns))
        elif len(texts[0]):
            found = iter(texts)
            values = [next(found) if pick >= 0 else numbered(len(texts[0])) for pick in picks]
            yield done + np.arange(1, len(texts[0]) + 1), values
        done += len(arrays[0])


def _as_text(column: pa.Array, name: Column) -> pa.Array | None:
    """Return values as `records.text` writes them; None where one may be refused."""
    kind = column.type
    if pa.types.is_float32(kind) or pa.types.is_float64(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind):
        return pa.array([text(value, "", 0, name) for value in column.to_pylist()], pa.large_string())
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        return None
    texts = pc.fill_null(column.cast(pa.large_string()), "")
    return None if pc.any(pc.match_substring(texts, "\0")).as_py() else texts


def _characters(column: pa.Array) -> np.ndarray:
    """Return the bytes of text in each value, int64 [rows], its lists' entries included."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner, rows = _characters(column.flatten()), pc.list_parent_indices(column).to_numpy()
        return np.bincount(rows, weights=inner, minlength=len(column)).astype(np.int64)
    if pa.types.is_dictionary(kind):
        own = np.append(_characters(column.dictionary), 0)  # index -1, for nothing, finds the 0
        return np.asarray(own[pc.fill_null(column.indices, -1).to_numpy(zero_copy_only=False)])
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
        return np.zeros(len(column), dtype=np.int64)
    return np.asarray(pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False), dtype=np.int64)


def _unsound(path: str | Path, what: str, error: Exception, cure: str = "save it anew, or copy it again") -> DataError:
    return DataError(f"{path}: no sound {what} ({first_line(error)}); {cure}")


def read_dataset(folder: str, columns: Sequence[Column]) -> Iterator[Block]:
    """Give the records of a folder that `Dataset.save_to_disk` wrote; class labels by their names."""
    from datasets import load_from_disk

    path = Path(folder)
    if (path / "dataset_dict.json").exists():
        splits = sorted(str(item) for item in path.iterdir() if item.is_dir())
        raise DataError(f"{folder}: the folder holds several splits; name one of them: {', '.join(splits)}")
    if not (path / "dataset_info.json").exists() or not (path / "state.json").exists():
        raise DataError(f"{folder}: this is a folder; name a file in it, or a folder that Dataset.save_to_disk wrote")
    try:
        state = read_json(path / "state.json")
        files = [entry["filename"] for key in ("_data_files", "_indices_data_files") for entry in state.get(key) or ()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unsound(folder, "saved dataset", error) from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            state_file = path / "state.json"
            raise DataError(f"{state_file}: names {file!r}; its data are files beside it, copy the folder again")
    try:
        yield from _dataset_records(folder, load_from_disk(folder), columns)
    except EsmNeuronError:
        raise
    except Exception as error:  # the package's reader raises whatever its JSON and Arrow parsers raise
        raise _unsound(folder, "saved dataset", error) from None


def read_hub(source: str, columns: Sequence[Column]) -> Iterator[Block]:
    """Give the records of a hub dataset `hf://owner/name@revision/split` or `hf://owner/name@revision/config/split`.

    The revision must be named, so that a table made today can be made again, and must come from the hub: `datasets`
    would rather read a folder ./owner/name, and without a network what it stored last, whatever revision that is.
    """
    found = _HUB.fullmatch(source)
    if found is None:
        raise DataError(
            f"{source}: not the name of a hub dataset; write hf://owner/name@revision/split, or "
            "hf://owner/name@revision/config/split, the revision best a commit hash"
        )
    from datasets import load_dataset_builder
    from datasets.packaged_modules.cache.cache import Cache

    revision = found["revision"]
    try:
        name = f"hf://datasets/{found['name']}"
        builder = load_dataset_builder(name, found["config"], revision=revision, token=False)
        if isinstance(builder, Cache):
            there = f"revision {builder.hash}, configuration {builder.config.name}"
            raise LookupError(f"the hub did not give it, and what the cache holds ({there}) may be another")
        if _COMMIT.fullmatch(revision) and builder.hash != revision:
            raise LookupError(f"revision {builder.hash} came")
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=found["split"])
    except Exception as error:  # connections, names, formats: the package has no common kind of error
        cure = "check owner, name, revision, split and network, or save it to a folder and name that"
        raise DataError(f"{source}: cannot be read from the hub ({first_line(error)}); {cure}") from None
    yield from _dataset_records(source, dataset, columns)


def _dataset_records(source: str, dataset: Dataset, columns: Sequence[Column]) -> Iterator[Block]:
    picks = pick_columns(source, dataset.column_names, columns)
    names = [dataset.column_names[pick] for pick in picks if pick >= 0]
    batches = dataset.select_columns(list(dict.fromkeys(names))).with_format(None).iter(BATCH)
    decoders = [(name, _class_names(dataset.features[name])) for name in names]
    values = ([[decode(value) for value in batch[name]] for name, decode in decoders] for batch in batches)
    yield from in_blocks(_records(source, columns, picks, values), len(columns))


def _class_names(feature: Any) -> Any:
    """Return the function that turns a value of a feature into text: a class label, or a list of them, into names."""
    from datasets import ClassLabel

    inner = getattr(feature, "feature", None)
    if isinstance(feature, ClassLabel):
        return lambda value: None if value is None or value < 0 else feature.names[value]
    if isinstance(inner, ClassLabel):
        return lambda value: None if value is None else [inner.names[entry] for entry in value]
    return lambda value: value


def _records(
    source: str, columns: Sequence[Column], picks: Sequence[int], batches: Iterator[list[list[Any]]], done: int = 0
) -> Iterator[Record]:
    rows = chain.from_iterable(zip(*batch, strict=True) for batch in batches)
    there = [column for column, pick in zip(columns, picks, strict=True) if pick >= 0]
    unnamed = next((i for i, pick in enumerate(picks) if pick < 0), None)
    for number, row in enumerate(rows, start=done + 1):
        values = [text(value, source, number, column) for value, column in zip(row, there, strict=True)]
        if unnamed is not None:
            values.insert(unnamed, NUMBERED)
        yield number, values


def read_workbook(path: str, columns: Sequence[Column], *, sheet: str | None = None) -> Iterator[Block]:
    """Give the records of a sheet of an Excel workbook, the only one where `sheet` is None; row 1 is the header.

    A whole number is text without a point, as Excel shows it.
    """
    check_regular(path)
    if importlib.util.find_spec("openpyxl") is None:
        raise DataError(f"{path}: save the sheet as CSV (UTF-8), or install openpyxl: pip install 'esm-neuron[excel]'")
    with nearby(path) as here:
        rows = _sheet(path, here, sheet)
    if rows.empty:
        raise DataError(f"{path}: the sheet is empty; name another one (data.sheet)")
    picks = pick_columns(path, [str(name).strip() for name in rows.iloc[0]], columns)
    values = [[_cell(value) for value in rows.iloc[1:, pick]] for pick in picks if pick >= 0]
    yield from in_blocks(_records(path, columns, picks, iter([values])), len(columns))


def _sheet(path: str, here: str, sheet: str | None) -> pd.DataFrame:
    """Return all cells of a sheet of the workbook `here`, which messages call `path`."""
    try:
        with zipfile.ZipFile(here) as parts:
            check_expansion(here, path, sum(part.file_size for part in parts.infolist()), "of sheets are packed into")
        with pd.ExcelFile(here, engine="openpyxl") as book:
            sheets = [str(name) for name in book.sheet_names]
            if sheet not in (sheets if len(sheets) > 1 else [None, *sheets]):
                raise DataError(f"{path}: name its sheet: data.sheet is one of {', '.join(map(repr, sheets))}")
            # pandas would rename the second of two equal headers
            return pd.read_excel(book, sheet_name=sheet or sheets[0], dtype=object, keep_default_na=False, header=None)
    except EsmNeuronError:
        raise
    except Exception as error:  # zip, XML and the package's own errors
        raise _unsound(path, "workbook", error, "save the sheet as CSV (UTF-8)") from None


def _cell(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
