"""Read rows of CSV, TSV, FASTA, JSONL (plain or .gz), Parquet, saved and hub datasets, each row with its number.

Every value is text, taken as it stands but for surrounding blanks; nothing is guessed to be a number or missing. A
new format is a function with the signature of `records.Reader` and a row in `FORMATS`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from esm_neuron.config import DataConfig
from esm_neuron.data.parquet import read_dataset, read_hub, read_parquet
from esm_neuron.data.records import LIST_JOINER, TABLES, Column, Reader, Record, is_hub
from esm_neuron.data.text_files import read_delimited, read_fasta, read_jsonl
from esm_neuron.errors import DataError

CHUNK_ROWS, CHUNK_CHARACTERS = 16_384, 1 << 24
"""Most rows, and about the most characters, of a chunk."""


def read_chunks(path: str | Path, cfg: DataConfig, joiner: str | None = None) -> Iterator[pa.Table]:
    """Give the rows of one file in its order, a chunk at a time; no more than one chunk is held.

    Columns, all text but `line`: `id`, `sequence`, `line` (int64, from 1: the line a row starts in, in FASTA the
    header's, in Parquet files and datasets the number of the record), `label` where `joiner` is given, `split` where
    `cfg.split_column` is set, and `filter.<column>` for each column of `cfg.keep` and `cfg.keep_heldout`.

    FASTA headers read `>id key=value key2="two words"`: the first word is the id, whole (`sp|P12345|NAME`).

    Args:
        path: a file, a folder that `Dataset.save_to_disk` wrote, or `hf://owner/name@revision/split`.
        cfg: columns and filters.
        joiner: written between the entries where a label is a list; None: labels are not read.

    Raise DataError, after the chunks before the fault, where the file is malformed or empty, or lacks a column.
    """
    source, columns = str(path), _columns(cfg, joiner)
    names = ["line", *(column.name for column in columns)]
    lines: list[int] = []
    values: list[list[str]] = [[] for _ in columns]
    characters, empty = 0, True
    for line, record in _reader(source)(source, columns):
        empty = False
        lines.append(line)
        for value, column in zip(record, values, strict=True):
            column.append(value.strip())
            characters += len(value)
        if len(lines) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield make_rows(dict(zip(names, [lines, *values], strict=True)))
            lines, values, characters = [], [[] for _ in columns], 0
    if empty:
        raise DataError(f"{source}: the file has no records; check that it was written to its end")
    if lines:
        yield make_rows(dict(zip(names, [lines, *values], strict=True)))


def read_records(source: str | Path, columns: Sequence[Column]) -> Iterator[Record]:
    """Give the records of a file in any format, with the columns asked for; see `records.Reader`."""
    return _reader(str(source))(str(source), columns)


def check_columns(source: str | Path, cfg: DataConfig, joiner: str | None = None) -> None:
    """Raise DataError where a file is missing or lacks a column, as far as its first record shows; see `read_chunks`.

    Datasets, of the hub or saved, are not looked at: their package takes seconds to import.
    """
    if not is_hub(str(source)) and not os.path.isdir(source):
        next(read_records(source, _columns(cfg, joiner)), None)


def make_rows(columns: Mapping[str, Sequence[object]]) -> pa.Table:
    """Return a table in memory: `line` as int64, all else as text (64-bit offsets: a corpus can pass 2 GiB)."""
    schema = pa.schema([(name, pa.int64() if name == "line" else pa.large_string()) for name in columns])
    return pa.table(dict(columns), schema=schema)


def sequence_bytes(rows: pa.Table) -> tuple[memoryview, np.ndarray]:
    """Return the sequences of some rows end to end, in UTF-8 and not copied, and int64 [rows + 1] where each begins."""
    column = rows["sequence"].combine_chunks()
    if not len(column):
        return memoryview(b""), np.zeros(1, dtype=np.int64)
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64)[column.offset : column.offset + len(column) + 1]
    return memoryview(data)[bounds[0] : bounds[-1]], bounds - bounds[0]


def filter_column(source: str) -> str:
    """Return the name, in the rows, of a column that a row filter looks at (it may be the label's as well)."""
    return f"filter.{source}"


def _columns(cfg: DataConfig, joiner: str | None) -> list[Column]:
    columns = [
        Column("id", cfg.id_column, "data.id_column"),
        Column("sequence", cfg.sequence_column, "data.sequence_column"),
    ]
    if joiner is not None:
        columns.append(Column("label", cfg.label_column, "data.label_column", joiner))
    if cfg.split_column is not None:
        columns.append(Column("split", cfg.split_column, "data.split_column"))
    filters = dict.fromkeys(cfg.keep_heldout, "data.keep_heldout") | dict.fromkeys(cfg.keep, "data.keep")
    return columns + [
        Column(filter_column(source), source, setting, (joiner or LIST_JOINER) if source == cfg.label_column else None)
        for source, setting in filters.items()
    ]


def _reader(source: str) -> Reader:
    if is_hub(source):
        return read_hub
    if "\0" in source:
        raise DataError(f"{source!r}: a zero byte, which no file's name has; correct the name")
    path = Path(source)
    if os.path.isdir(path):
        return read_dataset
    zipped = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if zipped else path).suffix.lower()
    if zipped and suffix in TABLES:
        raise DataError(f"{source}: Parquet files are compressed within; unpack it, or name it {suffix} if it is plain")
    if suffix not in FORMATS:
        cure = f"name the file with one of {' '.join(FORMATS)}, text plain or .gz"
        raise DataError(f"{source}: unknown format {suffix!r}; {cure}")
    return FORMATS[suffix]


FORMATS: dict[str, Reader] = {
    ".csv": partial(read_delimited, delimiter=","),
    **dict.fromkeys((".tsv", ".tab", ".txt"), partial(read_delimited, delimiter="\t")),
    **dict.fromkeys((".fasta", ".fa", ".faa", ".fas"), read_fasta),
    **dict.fromkeys((".jsonl", ".ndjson"), read_jsonl),
    **dict.fromkeys(TABLES, read_parquet),
}
"""Suffix (before .gz) -> reader."""
