"""CSV, TSV, FASTA and JSONL, plain or .gz: records as they stand in the file, each with the line it starts in."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Container, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, cast

from esm_neuron.data.records import (
    EXPANSION_FROM,
    EXPANSION_LIMIT,
    LINE_LIMIT,
    Column,
    Record,
    Seen,
    check_regular,
    pick_columns,
    text,
)
from esm_neuron.errors import DataError

_HEADER_FIELD = re.compile(r'(?:^|\s)([^\s="]+)=(?:"([^"]*)"|(\S*))')


def read_delimited(path: str, columns: Sequence[Column], *, delimiter: str) -> Iterator[Record]:
    """Records of a CSV or TSV file with a header line; a quoted value may hold delimiters and newlines."""
    start = held = 0

    def lines() -> Iterator[str]:
        nonlocal held
        for line in read_lines(path):
            held += len(line)
            if held > LINE_LIMIT:
                raise DataError(
                    f"{path}:{start}: a record of more than {LINE_LIMIT} characters starts here; close its quotes"
                )
            yield line

    # The csv module, not pandas: it alone tells the line of a record, also after quoted newlines and blank lines.
    csv.field_size_limit(LINE_LIMIT)  # a value may be as long as its record
    records = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] = []
    picks: list[int] = []
    while True:
        start, held = records.line_num + 1, 0
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
            picks = pick_columns(path, header, columns)
        elif len(record) != len(header):
            cure = f"quote values that hold {delimiter!r}" if len(record) > len(header) else "fill the row up"
            row = _row_name(record, columns, picks)
            raise DataError(
                f"{path}:{start}: {len(record)} values in {row}, {len(header)} columns in the header; {cure}"
            )
        else:
            yield start, [record[pick] for pick in picks]
    if not header:
        raise DataError(f"{path}: the file is empty; give one with a header line and rows")


def _row_name(record: Sequence[str], columns: Sequence[Column], picks: Sequence[int]) -> str:
    """A row of the wrong width, by its id where that can be told."""
    places = (pick for column, pick in zip(columns, picks, strict=True) if column.name == "id" and pick < len(record))
    name = next((record[pick].strip() for pick in places), "")
    return f"the row of {name[:60]!r}" if name else "a row"


def read_fasta(path: str, columns: Sequence[Column]) -> Iterator[Record]:
    """Records of a FASTA file: the id and the sequence, and header fields for all other columns ('' where absent)."""
    wanted = [column for column in columns if column.name not in ("id", "sequence")]
    seen = Seen(wanted)
    start, residues, header, parts = 0, 0, "", list[str]()

    def record() -> Record:
        fields = _header_fields(path, start, header, {column.source for column in wanted})
        seen.add(fields)
        special = {"id": header.split()[0], "sequence": "".join(parts)}
        return start, [special.get(column.name, fields.get(column.source, "")) for column in columns]

    for number, line in zip(count(1), read_lines(path)):
        if line.startswith(">"):
            if start:
                yield record()
            start, residues, header, parts = number, 0, line[1:].strip(), []
            if not header:
                raise DataError(f"{path}:{number}: the header is empty; write the protein's name after '>'")
        elif start:
            parts.extend(line.split())
            residues += len(line)
            if residues > LINE_LIMIT:
                raise DataError(
                    f"{path}:{start}: the sequence has more than {LINE_LIMIT} characters; is this the right file?"
                )
        elif line.strip():
            raise DataError(
                f"{path}:{number}: text before the first '>'; is this FASTA? If it is a table, name it .csv or .tsv"
            )
    if not start:
        raise DataError(f"{path}: the file is empty; give one with '>' headers and sequences")
    yield record()
    seen.check(path)


def _header_fields(path: str, line: int, header: str, wanted: Container[str]) -> dict[str, str]:
    """All fields; those that nobody wants are a description, which may be written in any way."""
    fields: dict[str, str] = {}
    for key, quoted, bare in _HEADER_FIELD.findall(header):
        if key in wanted and bare.startswith('"'):
            raise DataError(f"{path}:{line}: the quote after {key}= is not closed; close it with '\"'")
        if key in wanted and key in fields:
            raise DataError(f"{path}:{line}: the header has {key}= twice; keep one")
        fields[key] = quoted or bare
    return fields


def read_jsonl(path: str, columns: Sequence[Column]) -> Iterator[Record]:
    """Records of a file with a JSON object a line; a key that an object lacks is ''."""
    seen = Seen(columns)
    for number, line in zip(count(1), read_lines(path)):
        if not line.strip():
            continue
        fields = _json_object(path, number, line)
        seen.add(fields)
        yield number, [text(fields.get(column.source), path, number, column) for column in columns]
    if not seen.names:
        raise DataError(f"{path}: the file is empty; give one with a JSON object a line")
    seen.check(path)


def _json_object(path: str, number: int, line: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{path}:{number}: the object has key {name[:60]!r} twice; keep one")
        return dict(pairs)

    try:
        value = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        at = f" at position {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}:{number}: no sound JSON ({what}{at}); write one object a line") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: a {type(value).__name__}, not an object; write {{...}} in every line")
    return value


def read_lines(path: str) -> Iterator[str]:
    """Lines of a UTF-8 text file, plain or .gz, each ending in one newline; a byte-order mark and CRs are dropped."""
    with _open(path) as file:
        limit, size = EXPANSION_FROM, 0
        for number in count(1):
            raw = _read_line(path, number, file)
            if not raw:
                return
            size += len(raw)
            if size >= limit:
                limit += EXPANSION_FROM
                _check_expansion(path, number, size)
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            raw = raw.rstrip(b"\r\n")
            yield _decode(path, number, raw) + "\n"


def _open(name: str) -> BinaryIO:
    path = Path(name)
    check_regular(name)
    try:
        return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}; check the file and its permissions") from None


def _check_expansion(path: str, number: int, size: int) -> None:
    packed = Path(path).stat().st_size
    if packed * EXPANSION_LIMIT < size:
        raise DataError(
            f"{path}:{number}: {size} bytes came out of {packed}, more than {EXPANSION_LIMIT} for one; no proteins are "
            "so much alike, check the file"
        )


def _read_line(path: str, number: int, file: BinaryIO) -> bytes:
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


def _decode(path: str, number: int, raw: bytes) -> str:
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
