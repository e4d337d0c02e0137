"""Read CSV and TSV: each record with the line it starts in.

Quotes: CSV is RFC 4180, where a quoted value may hold separators and newlines. In TSV a line is a record whatever its
quotes are, as UniProt writes it; a value that is quoted from its first to its last character loses the quotes.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain, count
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config.deferred import module
from esm_neuron.data.fasta import read_fasta
from esm_neuron.data.records import (
    LINE_LIMIT,
    NUMBERED,
    Block,
    Column,
    MissingColumnError,
    Record,
    in_blocks,
    numbered,
    pick_columns,
    suffix_of,
)
from esm_neuron.data.text_files import decode_line, is_text, lines_of, read_blocks
from esm_neuron.data.tokenizer import bad_residues
from esm_neuron.errors import DataError

if TYPE_CHECKING:
    from pyarrow import csv as csv_columns
else:
    csv_columns = module("pyarrow.csv")

SEPARATORS = ",;\t| "
"""What a table may have between its columns."""
_HINT = re.compile(r'"?sep=(.)"?')
_NOT_PLAIN = (b'"', b"\r", b"\0", b"\xef\xbb\xbf")
"""What lines of a table do not have that can be cut at each separator."""


def read_delimited(path: str, columns: Sequence[Column], *, delimiter: str) -> Iterator[Block]:
    """Give the records of a CSV or TSV file with a header line.

    Where the header has the columns with another separator than `delimiter`, the file is read by that one.
    """
    blocks = read_blocks(path)
    number, first, blocks = _first_line(path, blocks)
    if hint := _HINT.fullmatch(first):  # Excel writes it, and reads by it
        delimiter, (number, first, blocks) = hint[1], _first_line(path, blocks)
    if not first:
        raise DataError(f"{path}: the file is empty; give one with a header line and records")
    if first.startswith(">"):
        if suffix_of(path) == ".txt":
            yield from read_fasta(path, columns)
            return
        raise DataError(f"{path}:{number}: '>' begins a FASTA record; name the file .fasta")
    delimiter, header = _header(path, number, first, delimiter, columns)
    table = _Delimited(path, columns, delimiter, header)
    for number, block in blocks:
        values = table.plain(block)
        if values is None:
            yield from in_blocks(table.records(chain([(number, block)], blocks)), len(columns))
        elif len(values[0]):
            yield np.arange(number, number + len(values[0])), values


def _first_line(path: str, blocks: Iterator[tuple[int, bytes]]) -> tuple[int, str, Iterator[tuple[int, bytes]]]:
    """Return the first line that is not blank, after its number, and the blocks behind it."""
    for number, block in blocks:
        begin = 0
        for at in count(number):
            if begin == len(block):
                break
            end = block.index(b"\n", begin)
            line = decode_line(path, at, block[begin:end].rstrip(b"\r"))
            begin = end + 1
            if line.strip():
                return at, line, chain([(at + 1, block[begin:])], blocks)
    return 1, "", blocks


class _Delimited:
    """The records below the header of a table in text."""

    def __init__(self, path: str, columns: Sequence[Column], delimiter: str, header: Sequence[str]) -> None:
        self._path, self._columns, self._delimiter, self._width = path, columns, delimiter, len(header)
        self._picks = pick_columns(path, header, columns)
        self._names = {name.lower() for name in header}

    def plain(self, block: bytes) -> list[pa.Array] | None:
        """Return the columns of some lines without quotes, blank lines and anything wrong; None for all others."""
        if any(mark in block for mark in _NOT_PLAIN) or len(self._delimiter.encode()) != 1 or not is_text(block):
            return None
        picked = [str(pick) for pick in self._picks if pick >= 0]
        try:
            rows = csv_columns.read_csv(
                pa.py_buffer(block),
                csv_columns.ReadOptions(
                    use_threads=False, block_size=len(block) + 1, column_names=list(map(str, range(self._width)))
                ),
                csv_columns.ParseOptions(delimiter=self._delimiter, quote_char=False),
                csv_columns.ConvertOptions(
                    check_utf8=False,
                    column_types=dict.fromkeys(picked, pa.large_string()),
                    include_columns=list(dict.fromkeys(picked)),
                ),
            )
        except pa.ArrowInvalid:
            return None
        columns = {name: rows[name].combine_chunks() for name in rows.column_names}
        if len(rows) != block.count(b"\n") or self._has_header(columns[picked[0]]):
            return None
        return [columns[str(pick)] if pick >= 0 else numbered(len(rows)) for pick in self._picks]

    def _has_header(self, column: pa.Array) -> bool:
        """Return whether a value is the name of a column, as where the header stands in the file again."""
        short = column.filter(pc.less_equal(pc.binary_length(column), 4 * max(map(len, self._names))))
        words = pc.utf8_lower(pc.utf8_trim_whitespace(short))
        return bool(pc.any(pc.is_in(words, pa.array(sorted(self._names), pa.large_string()))).as_py())

    def records(self, blocks: Iterator[tuple[int, bytes]]) -> Iterator[Record]:
        """Give the records of the next block, and of those after it as far as a record of it reaches into them."""
        picks, names = self._picks, self._names
        unnamed = next((i for i, pick in enumerate(picks) if pick < 0), None)
        for start, record in self._tab_rows(blocks) if self._delimiter == "\t" else self._quoted_rows(blocks):
            if len(record) != self._width:
                raise DataError(f"{self._path}:{start}: {self._wrong_width(record)}")
            values = [record[pick] for pick in picks]
            # Rare: only a row that begins or ends so is looked at as a whole.
            maybe = values[0].strip().lower() in names or values[-1].strip().lower() in names
            if maybe and all(record[pick].strip("\ufeff ").lower() in names for pick in picks if pick >= 0):
                what = "the header stands here again, as in files that were put together; remove this line"
                raise DataError(f"{self._path}:{start}: {what}")
            if unnamed is not None:
                values[unnamed] = NUMBERED
            yield start, values

    def _wrong_width(self, record: Sequence[str]) -> str:
        delimiter = self._delimiter
        quote = f"quote values that hold {delimiter!r}" if delimiter != "\t" else "take tabs out of values"
        torn = delimiter == "\t" and any('"' in value for value in record)
        few = "a line is a record, also within quotes: write it as CSV" if torn else "fill the row up"
        cure = quote if len(record) > self._width else few
        row = _row_name(record, self._columns, self._picks)
        return f"{len(record)} values in {row}, {self._width} columns in the header; {cure}"

    def _tab_rows(self, blocks: Iterator[tuple[int, bytes]]) -> Iterator[Record]:
        """Give the values of each line of the next block of a TSV file."""
        for number, line in lines_of(self._path, *next(blocks)):
            line = line[:-1]
            if not line:
                continue
            values = line.split("\t")
            if '"' in line:
                quoted = next(csv.reader([line], delimiter="\t")) if len(values) > self._width else []
                values = quoted if len(quoted) == self._width else list(map(_unquoted, values))
            yield number, values

    def _quoted_rows(self, blocks: Iterator[tuple[int, bytes]]) -> Iterator[Record]:
        """Give the values of each record of the next block of a CSV file, after the line it starts in."""
        path, held = self._path, list[tuple[int, str]]()  # the lines of the record that is read

        def feed() -> Iterator[str]:
            size, block = 0, next(blocks, None)
            while block is not None:
                for number, line in lines_of(path, *block):
                    size = len(line) + (size if held else 0)
                    held.append((number, line))
                    if size > LINE_LIMIT:
                        what = f"a record of more than {LINE_LIMIT} characters starts here"
                        raise DataError(f"{path}:{held[0][0]}: {what}; close its quotes")
                    yield line
                block = next(blocks, None) if held else None

        # The csv module, not pandas: it alone tells the line of a record, also after quoted newlines and blank lines.
        csv.field_size_limit(LINE_LIMIT)  # a value may be as long as its record
        records = csv.reader(feed(), delimiter=self._delimiter, strict=True)
        while True:
            held.clear()
            try:
                record = next(records, None)
            except csv.Error as error:
                cure = "close the quotes of the value that starts in this line, or double a quote that is meant"
                raise DataError(f"{path}:{held[0][0]}: {error}; {cure}") from None
            if record is None:
                return
            if len(held) > 1:
                self._check_swallowed(held)
            if record:  # not a blank line
                yield held[0][0], record

    def _check_swallowed(self, held: Sequence[tuple[int, str]]) -> None:
        """Raise DataError where a quote was never closed: a record's first and last line are records themselves."""
        residues = next(
            (p for c, p in zip(self._columns, self._picks, strict=True) if c.name.startswith("sequence")), -1
        )
        for _, line in (held[0], held[-1]):
            values = next(csv.reader([line.replace('"', "")], delimiter=self._delimiter), [])
            sequence = values[residues].strip() if len(values) == self._width else ""
            if not sequence or bad_residues(sequence) is not None:
                return
        raise DataError(
            f"{self._path}:{held[0][0]}: the quotes that open in this line are closed in line {held[-1][0]}, and both "
            "lines are records by themselves; close the quotes, or double a quote that is meant"
        )


def _header(path: str, number: int, line: str, delimiter: str, columns: Sequence[Column]) -> tuple[str, list[str]]:
    """Return the separator of a table and the names of its columns."""
    headers: dict[str, list[str]] = {}
    for separator in dict.fromkeys(delimiter + SEPARATORS):
        try:
            headers[separator] = [name.strip() for name in next(csv.reader([line], delimiter=separator, strict=True))]
        except csv.Error as error:
            if separator == delimiter:
                raise DataError(f"{path}:{number}: {error}; close the quotes of the header, in one line") from None
            continue
        try:
            pick_columns(path, headers[separator], columns)
        except DataError:
            continue
        return separator, headers[separator]
    if line.startswith("#"):
        what = "the line begins with '#', as a comment does"
        raise DataError(f"{path}:{number}: {what}; remove it, or the '#' where it is the header")
    whole = headers[delimiter][0] if len(headers[delimiter]) == 1 and line.startswith('"') else ""
    if whole.startswith("{"):  # the Observed Antibody Space's
        raise DataError(f"{path}:{number}: the line holds what the table is about, in JSON; remove it")
    if any(separator in whole for separator in SEPARATORS):
        raise DataError(f"{path}:{number}: the line is quoted as a whole; take the quotes around the lines out")
    best = max(headers, key=lambda separator: len(headers[separator]))
    if len(headers[best]) > 1 and len(headers[delimiter]) == 1:
        shown = {"\t": "tabs"}.get(best, repr(best))
        try:
            pick_columns(path, headers[best], columns)
        except DataError as error:
            told = f"{error} (its columns are separated by {shown})"
            raise MissingColumnError(told, headers[best]) from None
    return delimiter, headers[delimiter]


def _unquoted(value: str) -> str:
    inner = value[1:-1]
    whole = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else value


def _row_name(record: Sequence[str], columns: Sequence[Column], picks: Sequence[int]) -> str:
    """Return what to call a row of the wrong width: its id where that can be told."""
    places = (pick for column, pick in zip(columns, picks, strict=True) if column.name == "id" and pick < len(record))
    name = next((record[pick].strip() for pick in places), "")
    return f"the row of {name[:60]!r}" if name else "a row"
