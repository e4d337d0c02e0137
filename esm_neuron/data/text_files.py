"""Read CSV, TSV, FASTA and JSONL, plain or .gz: each record with the line it starts in."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Container, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from esm_neuron.data.records import LINE_LIMIT, Column, Record, Seen, check_expansion, check_regular, pick_columns, text
from esm_neuron.errors import DataError
from esm_neuron.files import parse_json

BLOCK = 1 << 20
"""Bytes of a text file that are read and decoded at once; less than `LINE_LIMIT`."""

_HEADER_FIELD = re.compile(r'(?:^|\s)([^\s="]+)=(?:"([^"]*)"|(\S*))')


def read_delimited(path: str, columns: Sequence[Column], *, delimiter: str) -> Iterator[Record]:
    """Give the records of a CSV or TSV file with a header line; a quoted value may hold delimiters and newlines."""
    start = held = 0

    def lines() -> Iterator[str]:
        nonlocal held
        for line in read_lines(path):
            held += len(line)
            if held > LINE_LIMIT:
                what = f"a record of more than {LINE_LIMIT} characters starts here"
                raise DataError(f"{path}:{start}: {what}; close its quotes")
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
            cure = "close the quotes of the value that starts in this line"
            raise DataError(f"{path}:{start}: {error}; {cure}") from None
        if record is None:
            break
        if not record:  # a blank line
            continue
        if not header:
            header = [name.strip() for name in record]
            picks = pick_columns(path, header, columns)
        elif len(record) != len(header):
            cure = f"quote values that hold {delimiter!r}" if len(record) > len(header) else "fill the row up"
            what = f"{len(record)} values in {_row_name(record, columns, picks)}, {len(header)} columns in the header"
            raise DataError(f"{path}:{start}: {what}; {cure}")
        else:
            yield start, [record[pick] for pick in picks]
    if not header:
        raise DataError(f"{path}: the file is empty; give one with a header line and records")


def _row_name(record: Sequence[str], columns: Sequence[Column], picks: Sequence[int]) -> str:
    """Return what to call a row of the wrong width: its id where that can be told."""
    places = (pick for column, pick in zip(columns, picks, strict=True) if column.name == "id" and pick < len(record))
    name = next((record[pick].strip() for pick in places), "")
    return f"the row of {name[:60]!r}" if name else "a row"


def read_fasta(path: str, columns: Sequence[Column]) -> Iterator[Record]:
    """Give the records of a FASTA file; columns but id and sequence are header fields ('' where absent)."""
    wanted = [column for column in columns if column.name not in ("id", "sequence")]
    keys = {column.source for column in wanted}
    seen = Seen(wanted)
    for start, header, body in _fasta_records(path):
        fields = _header_fields(path, start, header, keys) if keys else {}
        seen.add(fields)
        special = {"id": header.split(maxsplit=1)[0], "sequence": "".join(body.split())}
        yield start, [special.get(column.name, fields.get(column.source, "")) for column in columns]
    seen.check(path)


def _fasta_records(path: str) -> Iterator[tuple[int, str, str]]:
    """Give the line, the header and the lines of residues of each record; a record may span blocks of the file."""
    start, header, body = 0, "", ""
    for number, block in read_blocks(path):
        # Only a '>' at the start of a line begins a record; the newline in front gives the block's first line such a
        # start. `rest` belongs to the record that the block before has begun.
        rest, *records = ("\n" + block).split("\n>")
        if start:
            body += rest
        elif text := rest.lstrip():
            at = number + rest.removesuffix(text).count("\n") - 1
            cure = "is this FASTA? If it is a table, name it .csv or .tsv"
            raise DataError(f"{path}:{at}: text before the first '>'; {cure}")
        _check_record(path, start, body)
        number += rest.count("\n")
        for record in records:
            if start:
                yield start, header, body
            start = number
            header, _, body = record.partition("\n")
            header = header.strip()
            if not header:
                raise DataError(f"{path}:{start}: the header is empty; write the protein's name after '>'")
            _check_record(path, start, body)
            number += record.count("\n") + 1
    if not start:
        raise DataError(f"{path}: the file is empty; give one with '>' headers and sequences")
    yield start, header, body


def _check_record(path: str, start: int, body: str) -> None:
    if len(body) > LINE_LIMIT:
        raise DataError(f"{path}:{start}: the sequence has more than {LINE_LIMIT} characters; is this the right file?")


def _header_fields(path: str, line: int, header: str, wanted: Container[str]) -> dict[str, str]:
    """Return the header's fields; those that nobody wants are a description, which may be written in any way."""
    fields: dict[str, str] = {}
    for key, quoted, bare in _HEADER_FIELD.findall(header):
        if key == "INTERACTOR":  # biotrainer's: what follows is about two proteins
            raise DataError(
                f"{path}:{line}: INTERACTOR= makes it a pair of proteins, which no task here predicts; "
                "remove the field to take the protein alone"
            )
        if key in wanted and bare.startswith('"'):
            raise DataError(f"{path}:{line}: the quote after {key}= is not closed; close it with '\"'")
        if key in wanted and key in fields:
            raise DataError(f"{path}:{line}: the header has {key}= twice; keep one")
        fields[key] = quoted or bare
    return fields


def read_jsonl(path: str, columns: Sequence[Column]) -> Iterator[Record]:
    """Give the records of a file with a JSON object per line; a key that an object lacks is ''."""
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
    # Python's json would keep the last of two equal keys without a word.
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{path}:{number}: the object has key {name[:60]!r} twice; keep one")
        return dict(pairs)

    try:
        value = parse_json(line, object_pairs_hook=unique)
    except ValueError as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        at = f" at position {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}:{number}: no sound JSON ({what}{at}); write one object a line") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: a {type(value).__name__}, not an object; write {{...}} in every line")
    return value


def read_lines(path: str) -> Iterator[str]:
    """Give the lines of a text file, each ending in one newline."""
    # No str.splitlines: it ends lines at other characters too.
    return chain.from_iterable(io.StringIO(block, newline="\n") for _, block in read_blocks(path))


def read_blocks(path: str) -> Iterator[tuple[int, str]]:
    """Give whole lines of a UTF-8 text file, plain or .gz, about `BLOCK` bytes at once, after the first one's number.

    Every line ends in one newline; a byte-order mark and carriage returns at ends of lines are dropped.
    """
    number, size = 1, 0
    begun: list[bytes] = []  # the pieces of a line whose end has not been read
    with _open(path) as file:
        while piece := _read(path, number, file):
            size += len(piece)
            check_expansion(path, f"{path}:{number}", size, "came out of")
            # Blocks are cut at newline bytes: UTF-8 has them in no other character, so none is torn apart.
            end = piece.rfind(b"\n") + 1
            if end:
                block = b"".join([*begun, piece[:end]])
                _check_line(path, number, block.index(b"\n") + 1)
                yield from _decoded(path, number, block)
                number += block.count(b"\n")
                begun = []
            # The pieces of a long line are joined once, at its end: joining at every piece would copy it again and
            # again.
            begun.append(piece[end:])
            _check_line(path, number, sum(map(len, begun)))
    if last := b"".join(begun):
        yield from _decoded(path, number, last + b"\n")


def _open(name: str) -> io.BufferedReader | gzip.GzipFile:
    path = Path(name)
    check_regular(name)
    try:
        return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}; check the file and its permissions") from None


def _read(path: str, number: int, file: io.BufferedReader | gzip.GzipFile) -> bytes:
    """Read the next bytes; what comes before a fault in gzip data is given first, so that `number` is its line."""
    try:
        return file.read1(BLOCK)
    except gzip.BadGzipFile as error:
        cure = "drop .gz from its name if it is plain text, or copy it again"
        raise DataError(f"{path}:{number}: not sound gzip data ({error}); {cure}") from None
    except EOFError:
        raise DataError(f"{path}:{number}: the gzip data end too early; the file is truncated, copy it again") from None
    except zlib.error as error:
        raise DataError(f"{path}:{number}: damaged gzip data ({error}); copy the file again") from None
    except OSError as error:
        raise DataError(f"{path}:{number}: cannot be read: {error.strerror}; check the disk") from None


def _check_line(path: str, number: int, length: int) -> None:
    if length > LINE_LIMIT:
        raise DataError(f"{path}:{number}: the line has more than {LINE_LIMIT} bytes; is this the right file?")


def _decoded(path: str, number: int, block: bytes) -> Iterator[tuple[int, str]]:
    """Give lines as text, all at once; if that fails one by one, so that those before the one at fault are given."""
    if number == 1:
        block = block.removeprefix(b"\xef\xbb\xbf")
    block = block.replace(b"\r\n", b"\n")
    try:
        if b"\r" not in block and b"\0" not in block:
            yield number, block.decode("utf-8")
            return
    except UnicodeDecodeError:
        pass
    for at, line in enumerate(block.removesuffix(b"\n").split(b"\n"), start=number):
        yield at, _decode_line(path, at, line.rstrip(b"\r")) + "\n"


def _decode_line(path: str, number: int, raw: bytes) -> str:
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
