"""Read text files, plain or .gz, in blocks of whole lines with their numbers; and the records of JSONL and JSON."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from esm_neuron.data.records import (
    LINE_LIMIT,
    NUMBERED,
    Block,
    Column,
    Record,
    Seen,
    check_expansion,
    check_regular,
    in_blocks,
    pick_columns,
    place,
    text,
)
from esm_neuron.data.remote import is_remote, name_of, open_remote
from esm_neuron.errors import DataError
from esm_neuron.files import parse_json

BLOCK = 1 << 20
"""Bytes of a text file that are read and decoded at once; less than `LINE_LIMIT`."""
JSON_MOST = 1 << 28
"""Most bytes of a JSON list."""


def read_jsonl(path: str, columns: Sequence[Column]) -> Iterator[Block]:
    """Give the records of a file with a JSON object per line; a key that an object lacks is ''."""
    lines = chain.from_iterable(lines_of(path, *block) for block in read_blocks(path))
    filled = ((number, line) for number, line in lines if line.strip())
    cure = "write one object a line"
    return read_objects(path, columns, ((number, _parsed(f"{path}:{number}", line, cure)) for number, line in filled))


def read_json_list(path: str, columns: Sequence[Column]) -> Iterator[Block]:
    """Give the records of a file that is a JSON list of objects, as TAPE's; it is held as a whole."""
    blocks: list[str] = []
    for block in read_blocks(path):
        blocks += [lines for _, lines in decoded(path, *block)]
        if len(blocks) * BLOCK > JSON_MOST:
            raise DataError(f"{path}: more than {JSON_MOST} bytes of JSON; write one object a line, and name it .jsonl")
    found = _parsed(path, "".join(blocks), "correct it, or name it .jsonl if each line is an object")
    if not isinstance(found, list):
        keys = f" with {', '.join(map(repr, list(found)[:5]))}" if isinstance(found, dict) else ""
        what = f"a {type(found).__name__}{keys}, not a list of objects"
        raise DataError(f"{path}: {what}; write [{{...}}, ...], or one object a line in a .jsonl")
    yield from read_objects(path, columns, enumerate(found, start=1))


def read_objects(path: str, columns: Sequence[Column], objects: Iterable[tuple[int, Any]]) -> Iterator[Block]:
    """Give the records that are objects with a value by each name; `objects` has each with its number."""
    return in_blocks(_object_records(path, columns, objects), len(columns))


def _object_records(path: str, columns: Sequence[Column], objects: Iterable[tuple[int, Any]]) -> Iterator[Record]:
    seen, picked = Seen(columns), list(columns)
    for number, fields in objects:
        if not isinstance(fields, dict):
            raise DataError(f"{place(path, number)}: a {type(fields).__name__}, not an object; write {{...}} for each")
        if not seen.names and fields:  # the first object shows how the keys are written
            picked = [_as_written(column, list(fields)) for column in columns]
            seen = Seen([column for column in picked if column.source != NUMBERED])
        _check_numbered(path, number, columns, picked, fields)
        seen.add(fields)
        values = [
            NUMBERED if column.source == NUMBERED else text(fields.get(column.source), path, number, column)
            for column in picked
        ]
        yield number, values
    if not seen.names:
        raise DataError(f"{path}: the file is empty; give one with a JSON object for each record")
    seen.check(path)


def _check_numbered(
    path: str, number: int, columns: Sequence[Column], picked: Sequence[Column], fields: Mapping[str, Any]
) -> None:
    for asked, column in zip(columns, picked, strict=True):
        if column.source == NUMBERED and asked.source in fields:
            raise DataError(
                f"{place(path, number)}: has {asked.source!r}, and the first object has none; give it to all"
            )


def _as_written(column: Column, keys: Sequence[str]) -> Column:
    """Return a column by the name that the first object has for it; its source is NUMBERED where none is needed."""
    try:
        (pick,) = pick_columns("", keys, [column])
    except DataError:  # a later object may have it
        return column
    return replace(column, source=NUMBERED if pick < 0 else keys[pick])


def _parsed(where: str, text: str, cure: str) -> Any:
    # Python's json would keep the last of two equal keys without a word.
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{where}: the object has key {name[:60]!r} twice; keep one")
        return dict(pairs)

    try:
        return parse_json(text, object_pairs_hook=unique)
    except ValueError as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        at = f" at position {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{where}: no sound JSON ({what}{at}); {cure}") from None


def lines_of(path: str, number: int, block: bytes) -> Iterator[tuple[int, str]]:
    """Give the lines of a block with their numbers, each ending in one newline."""
    for at, lines in decoded(path, number, block):
        # No str.splitlines: it ends lines at other characters too.
        yield from zip(count(at), io.StringIO(lines, newline="\n"))


def read_blocks(path: str) -> Iterator[tuple[int, bytes]]:
    """Give whole lines of a text file, plain or .gz, about `BLOCK` bytes at once, after the first one's number.

    Every line ends in one newline; a byte-order mark and carriage returns at ends of lines are dropped. `decoded` makes
    text of a block.
    """
    number, size = 1, 0
    begun: list[bytes] = []  # the pieces of a line whose end has not been read
    with _open(path) as file:
        while piece := _read(path, number, file):
            if not size:
                _check_beginning(path, piece)
            size += len(piece)
            check_expansion(path, f"{path}:{number}", size, "came out of")
            # Blocks are cut at newline bytes: UTF-8 has them in no other character, so none is torn apart.
            end = piece.rfind(b"\n") + 1
            if end:
                block = b"".join([*begun, piece[:end]])
                _check_line(path, number, block.index(b"\n") + 1)
                lines = block.count(b"\n")
                yield number, _with_newlines(number, block)
                number += lines
                begun = []
            # The pieces of a long line are joined once, at its end: joining at every piece would copy it again and
            # again.
            begun.append(piece[end:])
            _check_line(path, number, sum(map(len, begun)))
    if last := b"".join(begun):
        yield number, _with_newlines(number, last + b"\n")


def _with_newlines(number: int, block: bytes) -> bytes:
    block = block.removeprefix(b"\xef\xbb\xbf") if number == 1 else block
    return block.replace(b"\r\n", b"\n")


_BEGINNINGS = {
    b"PK\x03\x04": "this is a zip archive, such as an Excel workbook; save the sheet as CSV (UTF-8), or name it .xlsx",
    b"\xd0\xcf\x11\xe0": "this is an old Excel workbook; save the sheet as CSV (UTF-8)",
    b"PAR1": "this is a Parquet file; name it .parquet",
    b"\xff\xfe": "this is UTF-16 text; save the file as UTF-8",
    b"\xfe\xff": "this is UTF-16 text; save the file as UTF-8",
    b"\x1f\x8b": "this is gzip data; name the file .gz",
    b"BZh": "this is bzip2 data; unpack it",
    b"\xfd7zXZ": "this is xz data; unpack it",
    b"\x28\xb5\x2f\xfd": "this is zstd data; unpack it",
    b"SQLite format 3": "this is an SQLite database; export the table as CSV",
    b"%PDF": "this is a PDF; save its table as CSV",
    b"<!DOCTYPE": "this is a web page; download the file that it shows",
    b"<html": "this is a web page; download the file that it shows",
    b"version https://git-lfs": "this is a pointer of Git LFS; get the file itself by git lfs pull",
}
"""First bytes of files that are not what their names say -> what to do."""


def _check_beginning(path: str, piece: bytes) -> None:
    for beginning, what in _BEGINNINGS.items():
        if piece[: len(beginning)].lower() == beginning.lower():
            raise DataError(f"{path}:1: {what}")


def _open(name: str) -> io.BufferedReader | gzip.GzipFile:
    path, packed = Path(name), name_of(name).lower().endswith(".gz")
    check_regular(name)
    try:
        if is_remote(name):
            return gzip.GzipFile(fileobj=open_remote(name)) if packed else open_remote(name)
        return gzip.open(path, "rb") if packed else path.open("rb")
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
        cure = "check the network, or download the file and name that" if is_remote(path) else "check the disk"
        raise DataError(f"{path}:{number}: cannot be read: {error.strerror or error}; {cure}") from None


def _check_line(path: str, number: int, length: int) -> None:
    if length > LINE_LIMIT:
        raise DataError(f"{path}:{number}: the line has more than {LINE_LIMIT} bytes; is this the right file?")


def decoded(path: str, number: int, block: bytes) -> Iterator[tuple[int, str]]:
    """Give lines as text, all at once; if that fails one by one, so that those before the one at fault are given."""
    try:
        if b"\r" not in block and b"\0" not in block:
            yield number, block.decode("utf-8")
            return
    except UnicodeDecodeError:
        pass
    for at, line in enumerate(block.removesuffix(b"\n").split(b"\n"), start=number):
        yield at, decode_line(path, at, line.rstrip(b"\r")) + "\n"


def is_text(block: bytes) -> bool:
    try:
        return block.isascii() or bool(block.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def decode_line(path: str, number: int, raw: bytes) -> str:
    if b"\0" in raw:
        raise DataError(f"{path}:{number}: a zero byte; this is no UTF-8 text, save the file as UTF-8")
    if b"\r" in raw:
        raise DataError(f"{path}:{number}: a carriage return within a line; save the file with newlines (LF or CRLF)")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        raise DataError(f"{path}:{number}: {place} is not UTF-8; save the file as UTF-8") from None
