"""Rows from files: CSV, TSV and FASTA, plain or .gz, every row with the line it starts in.

Every value is a string, taken as it stands but for surrounding blanks; nothing is guessed to be a number or missing. A
new format is a function with the signature of `Reader` and a row in `FORMATS`.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from datasets import Dataset, Features, Value

from esm_neuron.config import DataConfig
from esm_neuron.errors import DataError

LINE_LIMIT = 1 << 24
"""Longest line in bytes, with its newline. No known protein has a hundredth of it."""

_HEADER_FIELD = re.compile(r'(?:^|\s)([^\s="]+)=(?:"([^"]*)"|(\S*))')


@dataclass(frozen=True)
class Column:
    """A column that rows need."""

    name: str
    """Its name in the rows: id, sequence, label, split or `filter.<source>`."""
    source: str
    """Its name in the file."""
    setting: str
    """The field of the configuration that asks for it."""


Record = tuple[int, list[str]]
"""The line a record starts in, from 1, and its values in the order of the columns asked for."""
Reader = Callable[[Path, Sequence[Column]], Iterator[Record]]


def read_rows(path: str | Path, cfg: DataConfig, need_label: bool) -> Dataset:
    """The rows of one file, in memory, in its order.

    Columns: `id`, `sequence`, `line` (int64, from 1; in FASTA the header's), `label` where `need_label`, `split` where
    `cfg.split_column` is set, and `filter.<column>` for each column of `cfg.keep` and `cfg.keep_heldout`.

    FASTA headers read `>id key=value key2="two words"`: the first word is the id, whole (`sp|P12345|NAME`).

    Raises:
        DataError: the file cannot be read, is malformed or empty, or lacks a column.
    """
    path = Path(path)
    columns = _columns(cfg, need_label)
    lines: list[int] = []
    values: list[list[str]] = [[] for _ in columns]
    for line, record in _reader(path)(path, columns):
        lines.append(line)
        for column, value in zip(values, record, strict=True):
            column.append(value.strip())
    if not lines:
        raise DataError(f"{path}: the file has no rows; check that it was written to its end")
    return make_rows({"line": lines} | {column.name: data for column, data in zip(columns, values, strict=True)})


def make_rows(columns: Mapping[str, Sequence[object]]) -> Dataset:
    """A Dataset in memory: `line` as int64, all else as strings (64-bit offsets: a corpus can pass 2 GiB)."""
    features = Features({name: Value("int64" if name == "line" else "large_string") for name in columns})
    return Dataset.from_dict(dict(columns), features=features)


def filter_column(source: str) -> str:
    """The name, in the rows, of a column that a row filter looks at (it may be the label's as well)."""
    return f"filter.{source}"


def _columns(cfg: DataConfig, need_label: bool) -> list[Column]:
    columns = [Column("id", cfg.id_column, "data.id_column")]
    columns.append(Column("sequence", cfg.sequence_column, "data.sequence_column"))
    if need_label:
        columns.append(Column("label", cfg.label_column, "data.label_column"))
    if cfg.split_column is not None:
        columns.append(Column("split", cfg.split_column, "data.split_column"))
    filters = dict.fromkeys(cfg.keep_heldout, "data.keep_heldout") | dict.fromkeys(cfg.keep, "data.keep")
    return columns + [Column(filter_column(source), source, setting) for source, setting in filters.items()]


def _reader(path: Path) -> Reader:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in FORMATS:
        raise DataError(
            f"{path}: unknown format {suffix!r}; name the file with one of {' '.join(FORMATS)}, plain or .gz"
        )
    return FORMATS[suffix]


def _read_delimited(path: Path, columns: Sequence[Column], *, delimiter: str) -> Iterator[Record]:
    """Records of a CSV or TSV file with a header line; a quoted value may hold delimiters and newlines."""
    # The csv module, not pandas: it alone tells the line of a record, also after quoted newlines and blank lines.
    records = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] = []
    picks: list[int] = []
    while True:
        start = records.line_num + 1
        try:
            record = next(records, None)
        except csv.Error as error:
            raise DataError(
                f"{path}:{start}: {error}; close the quotes of the value that starts in this line"
            ) from None
        if record is None:
            break
        if not record:  # a blank line
            continue
        if not header:
            header = [name.strip() for name in record]
            picks = _pick(path, header, columns)
        elif len(record) != len(header):
            cure = f"quote values that hold {delimiter!r}" if len(record) > len(header) else "fill the row up"
            raise DataError(
                f"{path}:{start}: {len(record)} values in a row, {len(header)} columns in the header; {cure}"
            )
        else:
            yield start, [record[pick] for pick in picks]
    if not header:
        raise DataError(f"{path}: the file is empty; give one with a header line and rows")


def _pick(path: Path, header: list[str], columns: Sequence[Column]) -> list[int]:
    for column in columns:
        if column.source not in header:
            _no_column(path, column, header)
        if header.count(column.source) > 1:
            raise DataError(f"{path}:1: the header has column {column.source!r} twice; rename one")
    return [header.index(column.source) for column in columns]


def _no_column(path: Path, column: Column, there: Sequence[str]) -> NoReturn:
    shown = ", ".join(repr(name[:60]) for name in there[:20]) + (", ..." if len(there) > 20 else "")
    by_lower = {name.lower(): name for name in there}
    near = difflib.get_close_matches(column.source.lower(), by_lower, n=1)
    cure = f"did you mean {by_lower[near[0]]!r}?" if near else "name one of these or add it"
    raise DataError(f"{path}: no column {column.source!r} ({column.setting}); the file has {shown or 'none'}; {cure}")


def _read_fasta(path: Path, columns: Sequence[Column]) -> Iterator[Record]:
    """Records of a FASTA file: the id and the sequence, and header fields for all other columns ('' where absent)."""
    wanted = [column for column in columns if column.name not in ("id", "sequence")]
    seen: dict[str, None] = {}
    start, header, parts = 0, "", list[str]()

    def record() -> Record:
        fields = _header_fields(path, start, header)
        seen.update(dict.fromkeys(fields))
        special = {"id": header.split()[0], "sequence": "".join(parts)}
        return start, [special.get(column.name, fields.get(column.source, "")) for column in columns]

    for number, line in zip(count(1), _lines(path)):
        if line.startswith(">"):
            if start:
                yield record()
            start, header, parts = number, line[1:].strip(), []
            if not header:
                raise DataError(f"{path}:{number}: the header is empty; write the protein's name after '>'")
        elif start:
            parts.extend(line.split())
        elif line.strip():
            raise DataError(
                f"{path}:{number}: text before the first '>'; is this FASTA? If it is a table, name it .csv or .tsv"
            )
    if not start:
        raise DataError(f"{path}: the file is empty; give one with '>' headers and sequences")
    yield record()
    for column in wanted:
        if column.source not in seen:
            _no_column(path, column, list(seen))


def _header_fields(path: Path, line: int, header: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for key, quoted, bare in _HEADER_FIELD.findall(header):
        if bare.startswith('"'):
            raise DataError(f"{path}:{line}: the quote after {key}= is not closed; close it with '\"'")
        if key in fields:
            raise DataError(f"{path}:{line}: the header has {key}= twice; keep one")
        fields[key] = quoted or bare
    return fields


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 text file, plain or .gz, each ending in one newline; a byte-order mark and CRs are dropped."""
    with _open(path) as file:
        for number in count(1):
            raw = _read_line(path, number, file)
            if not raw:
                return
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            raw = raw.rstrip(b"\r\n")
            yield _decode(path, number, raw) + "\n"


def _open(path: Path) -> BinaryIO:
    if path.is_dir():
        raise DataError(f"{path}: this is a folder; name a file in it")
    try:
        return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path (it is taken from the current folder)") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}; check the file and its permissions") from None


def _read_line(path: Path, number: int, file: BinaryIO) -> bytes:
    try:
        raw = file.readline(LINE_LIMIT + 1)
    except gzip.BadGzipFile as error:
        cure = "drop .gz from its name if it is plain text, or copy it again"
        raise DataError(f"{path}:{number}: not sound gzip data ({error}); {cure}") from None
    except EOFError:
        raise DataError(f"{path}:{number}: the gzip data end too early; the file is truncated, copy it again") from None
    except zlib.error as error:
        raise DataError(f"{path}:{number}: damaged gzip data ({error}); copy the file again") from None
    except OSError as error:
        raise DataError(f"{path}:{number}: cannot be read: {error.strerror}; check the disk") from None
    if len(raw) > LINE_LIMIT:
        raise DataError(f"{path}:{number}: the line has more than {LINE_LIMIT} bytes; is this the right file?")
    return raw


def _decode(path: Path, number: int, raw: bytes) -> str:
    if raw.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}:{number}: this is gzip data; name the file .gz")
    if b"\0" in raw:
        raise DataError(f"{path}:{number}: a zero byte; this is no UTF-8 text, save the file as UTF-8")
    if b"\r" in raw:
        raise DataError(f"{path}:{number}: a carriage return within a line; save the file with newlines (LF or CRLF)")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        raise DataError(f"{path}:{number}: {place} is not UTF-8; save the file as UTF-8") from None


_TSV: Reader = partial(_read_delimited, delimiter="\t")
FORMATS: dict[str, Reader] = {
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": _TSV,
    ".tab": _TSV,
    ".txt": _TSV,
    ".fasta": _read_fasta,
    ".fa": _read_fasta,
    ".faa": _read_fasta,
    ".fas": _read_fasta,
}
"""Suffix (before .gz) -> reader."""
