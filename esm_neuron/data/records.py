"""What every format speaks: the columns that rows need, and records as text."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from esm_neuron.errors import DataError

LIST_JOINER = ";"
"""Between the entries of a list of labels, where it is one label out of several."""
RESIDUE_JOINER = ","
"""Between the entries of a list that has one label a residue."""
TABLES = (".parquet", ".pq")
"""Suffixes of files whose rows are records, not lines."""


@dataclass(frozen=True)
class Column:
    """A column that rows need."""

    name: str
    """Its name in the rows: id, sequence, label, split or `filter.<source>`."""
    source: str
    """Its name in the file."""
    setting: str
    """The field of the configuration that asks for it."""
    joiner: str | None = None
    """What is written between the entries of a list; None: a list is refused."""


Record = tuple[int, list[str]]
"""The line or the number of a record, from 1, and its values in the order of the columns asked for."""
Reader = Callable[[str, Sequence[Column]], Iterator[Record]]
"""Gives the records of a source in its order, holding no more than a few of them.

Raises DataError: it cannot be read, is malformed or empty, or lacks a column."""


def is_hub(source: str) -> bool:
    """Whether a source is a dataset of the Hugging Face hub (pathlib makes `hf:/` of `hf://`)."""
    return source.startswith("hf:/")


def row_unit(source: str) -> str:
    """What the number of a row counts: `line` in text, `record` in Parquet files and datasets."""
    table = is_hub(source) or Path(source).suffix.lower() in TABLES or Path(source).is_dir()
    return "record" if table else "line"


def place(source: str, number: int) -> str:
    """Where a row is, as errors begin: `x.csv:3`, or `x.parquet: record 2`."""
    return f"{source}:{number}" if row_unit(source) == "line" else f"{source}: record {number}"


def no_column(source: str, column: Column, there: Sequence[str]) -> NoReturn:
    """Raise the error of a column that is asked for and not there, with the nearest name that is."""
    shown = ", ".join(repr(name[:60]) for name in there[:20]) + (", ..." if len(there) > 20 else "")
    by_lower = {name.lower(): name for name in there}
    near = difflib.get_close_matches(column.source.lower(), by_lower, n=1)
    cure = f"did you mean {by_lower[near[0]]!r}?" if near else "name one of these or add it"
    raise DataError(f"{source}: no column {column.source!r} ({column.setting}); the file has {shown or 'none'}; {cure}")


def pick_columns(source: str, header: Sequence[str], columns: Sequence[Column]) -> list[int]:
    """The place in `header` of each column.

    Raises:
        DataError: a column is not there, or twice.
    """
    for column in columns:
        if column.source not in header:
            no_column(source, column, header)
        if list(header).count(column.source) > 1:
            raise DataError(f"{source}: the header has column {column.source!r} twice; rename one")
    return [list(header).index(column.source) for column in columns]


def text(value: object, source: str, number: int, column: Column) -> str:
    """A value of a format that knows types, as text: nothing and NaN as '', `true` and `false`, numbers as Python
    writes them, lists joined by `column.joiner`.

    Raises:
        DataError: the value is something else, or an entry of a list cannot be told from two.
    """
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            where = f"{place(source, number)}: column {column.source!r}"
            raise DataError(f"{where} holds half a surrogate pair, which is no character; save the file as UTF-8")
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (list, tuple)) and column.joiner is not None:
        return _joined(value, source, number, column)
    expected = "text, a number, true or false" + (", or a list of these" if column.joiner is not None else "")
    raise DataError(
        f"{place(source, number)}: column {column.source!r} holds a {type(value).__name__}; "
        f"it must be {expected}, convert it"
    )


def _joined(values: Sequence[object], source: str, number: int, column: Column) -> str:
    entries = [text(value, source, number, Column(column.name, column.source, column.setting)) for value in values]
    joiner = column.joiner or ""
    for entry in entries:
        if not entry or joiner in entry:
            what = f"holds {joiner!r}, which joins the entries of a list" if entry else "is empty"
            raise DataError(
                f"{place(source, number)}: column {column.source!r}: entry {entry[:60]!r} {what}; rename it"
            )
    return joiner.join(entries)
