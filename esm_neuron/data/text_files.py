"""Read CSV, TSV, FASTA and JSONL, plain or .gz: each record with the line it starts in.

Quotes: CSV is RFC 4180, where a quoted value may hold separators and newlines. In TSV a line is a record whatever its
quotes are, as UniProt writes it; a value that is quoted from its first to its last character loses the quotes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from esm_neuron.data.looks import LabelLines
from esm_neuron.data.records import (
    LINE_LIMIT,
    NUMBERED,
    Column,
    Record,
    Seen,
    check_expansion,
    check_regular,
    pick_columns,
    place,
    suffix_of,
    text,
)
from esm_neuron.data.remote import is_remote, name_of, open_remote
from esm_neuron.data.tokenizer import bad_residues
from esm_neuron.errors import DataError
from esm_neuron.files import parse_json

BLOCK = 1 << 20
"""Bytes of a text file that are read and decoded at once; less than `LINE_LIMIT`."""

JSON_MOST = 1 << 28
"""Most bytes of a JSON list."""
SEPARATORS = ",;\t| "
"""What a table may have between its columns."""
LABEL_LINE = "line3"
"""Name of the column that the third line of a record is, where every record of a FASTA file has one."""
MOST_PHRASES, LEAST_PHRASES = 1000, 20
"""Most values of several words that are kept, and how many, for each first word, look like labels with free text."""
_SAMPLE = 50
"""Records that show whether a FASTA file has such lines."""

_FIELD = re.compile(r'(?:^|\s)([^\s="]+)=(?:"([^"]*)"(?=\s|$)|((?:(?!\s[^\s="]+=).)*))')
_PIR = re.compile(r"[A-Z][A-Z0-9];")
_NAME_PART = re.compile(r"part([0-9]{1,3})")
_HINT = re.compile(r'"?sep=(.)"?')


def read_delimited(path: str, columns: Sequence[Column], *, delimiter: str) -> Iterator[Record]:
    """Give the records of a CSV or TSV file with a header line.

    Where the header has the columns with another separator than `delimiter`, the file is read by that one.
    """
    lines = zip(count(1), read_lines(path))
    filled = ((number, line) for number, line in lines if line.strip())
    number, first = next(filled, (1, ""))
    if hint := _HINT.fullmatch(first.rstrip("\n")):  # Excel writes it, and reads by it
        delimiter, (number, first) = hint[1], next(filled, (1, ""))
    if not first:
        raise DataError(f"{path}: the file is empty; give one with a header line and records")
    if first.startswith(">"):
        if suffix_of(path) == ".txt":
            yield from read_fasta(path, columns)
            return
        raise DataError(f"{path}:{number}: '>' begins a FASTA record; name the file .fasta")
    delimiter, header = _header(path, number, first, delimiter, columns)
    picks = pick_columns(path, header, columns)
    residues = next((p for c, p in zip(columns, picks, strict=True) if c.name == "sequence"), -1)
    numbered = next((i for i, pick in enumerate(picks) if pick < 0), None)
    rows = (
        _tab_rows(lines, len(header))
        if delimiter == "\t"
        else _quoted_rows(path, lines, delimiter, len(header), residues)
    )
    names = {name.lower() for name in header}
    for start, record in rows:
        if len(record) != len(header):
            quote = f"quote values that hold {delimiter!r}" if delimiter != "\t" else "take tabs out of values"
            torn = delimiter == "\t" and any('"' in value for value in record)
            few = "a line is a record, also within quotes: write it as CSV" if torn else "fill the row up"
            cure = quote if len(record) > len(header) else few
            what = f"{len(record)} values in {_row_name(record, columns, picks)}, {len(header)} columns in the header"
            raise DataError(f"{path}:{start}: {what}; {cure}")
        values = [record[pick] for pick in picks]
        # Rare: only a row that begins or ends so is looked at as a whole.
        maybe = values[0].strip().lower() in names or values[-1].strip().lower() in names
        if maybe and all(record[pick].strip("\ufeff ").lower() in names for pick in picks if pick >= 0):
            what = "the header stands here again, as in files that were put together; remove this line"
            raise DataError(f"{path}:{start}: {what}")
        if numbered is not None:
            values[numbered] = NUMBERED
        yield start, values


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
    if any(separator in whole for separator in SEPARATORS):
        raise DataError(f"{path}:{number}: the line is quoted as a whole; take the quotes around the lines out")
    best = max(headers, key=lambda separator: len(headers[separator]))
    if len(headers[best]) > 1 and len(headers[delimiter]) == 1:
        shown = {"\t": "tabs"}.get(best, repr(best))
        try:
            pick_columns(path, headers[best], columns)
        except DataError as error:
            raise DataError(f"{error} (its columns are separated by {shown})") from None
    return delimiter, headers[delimiter]


def _tab_rows(lines: Iterator[tuple[int, str]], width: int) -> Iterator[Record]:
    """Give the values of each line of a TSV file."""
    for number, line in lines:
        line = line[:-1]
        if not line:
            continue
        values = line.split("\t")
        if '"' in line:
            quoted = next(csv.reader([line], delimiter="\t")) if len(values) > width else []
            values = quoted if len(quoted) == width else list(map(_unquoted, values))
        yield number, values


def _unquoted(value: str) -> str:
    inner = value[1:-1]
    whole = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else value


def _quoted_rows(
    path: str, lines: Iterator[tuple[int, str]], delimiter: str, width: int, residues: int
) -> Iterator[Record]:
    """Give the values of each record of a CSV file, after the line it starts in."""
    held: list[tuple[int, str]] = []  # the lines of the record that is read

    def feed() -> Iterator[str]:
        size = 0
        for number, line in lines:
            size = len(line) + (size if held else 0)
            held.append((number, line))
            if size > LINE_LIMIT:
                what = f"a record of more than {LINE_LIMIT} characters starts here"
                raise DataError(f"{path}:{held[0][0]}: {what}; close its quotes")
            yield line

    # The csv module, not pandas: it alone tells the line of a record, also after quoted newlines and blank lines.
    csv.field_size_limit(LINE_LIMIT)  # a value may be as long as its record
    records = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        held.clear()
        try:
            record = next(records, None)
        except csv.Error as error:
            start = held[0][0]
            cure = "close the quotes of the value that starts in this line, or double a quote that is meant"
            raise DataError(f"{path}:{start}: {error}; {cure}") from None
        if record is None:
            return
        if len(held) > 1:
            _check_swallowed(path, held, delimiter, width, residues)
        if record:  # not a blank line
            yield held[0][0], record


def _check_swallowed(path: str, held: Sequence[tuple[int, str]], delimiter: str, width: int, residues: int) -> None:
    """Raise DataError where a quote was never closed: a record's first and last line are records themselves."""
    for _, line in (held[0], held[-1]):
        values = next(csv.reader([line.replace('"', "")], delimiter=delimiter), [])
        sequence = values[residues].strip() if len(values) == width else ""
        if not sequence or bad_residues(sequence) is not None:
            return
    raise DataError(
        f"{path}:{held[0][0]}: the quotes that open in this line are closed in line {held[-1][0]}, and both lines are "
        "records by themselves; close the quotes, or double a quote that is meant"
    )


def _row_name(record: Sequence[str], columns: Sequence[Column], picks: Sequence[int]) -> str:
    """Return what to call a row of the wrong width: its id where that can be told."""
    places = (pick for column, pick in zip(columns, picks, strict=True) if column.name == "id" and pick < len(record))
    name = next((record[pick].strip() for pick in places), "")
    return f"the row of {name[:60]!r}" if name else "a row"


def read_fasta(path: str, columns: Sequence[Column]) -> Iterator[Record]:
    """Give the records of a FASTA file; columns but id and sequence are header fields ('' where absent).

    A column `part2` is the second part of the name between bars. Where each record has a third line with labels
    (SignalP, NetSurfP), that is the column LABEL_LINE and no part of the sequence.
    """
    wanted = [column for column in columns if column.name not in ("id", "sequence")]
    keys = {column.source for column in wanted}
    seen = Seen(wanted)
    phrases: dict[str, set[str]] = {key: set() for key in keys}  # values of several words, the first MOST_PHRASES
    records = _fasta_records(path)
    sample = list(islice(records, _SAMPLE))
    labelled = _has_label_lines([body for _, _, body in sample])
    below = LabelLines()
    for start, header, body in chain(sample, records):
        if _PIR.match(header) and body.rstrip().endswith("*"):
            cure = "write '>' and the name alone, and remove the line of description below it"
            raise DataError(f"{path}:{start}: {header[:60]!r} begins a record of the format PIR; {cure}")
        name = header.split(maxsplit=1)[0]
        fields = _header_fields(path, start, header, keys) if keys else {}
        if labelled:
            body, fields[LABEL_LINE] = _two_lines(path, start, body)
        else:
            below.add(start, body)
        seen.add(fields)
        for key, several in phrases.items():
            if " " in (value := fields.get(key, "")) and len(several) < MOST_PHRASES:
                several.add(value)
        special = {"id": name, "sequence": "".join(body.split())}
        yield start, [special.get(column.name, fields.get(column.source, "")) for column in columns]
    if (what := below.found(path)) is not None:
        raise DataError(what)
    seen.check(path)
    for key, several in phrases.items():
        first = {value.split(" ")[0] for value in several}
        if len(several) >= LEAST_PHRASES and len(first) <= len(several) / LEAST_PHRASES:
            raise DataError(
                f"{path}: {key}= has {len(several)} values of several words that begin with {len(first)} words, as "
                f'{min(several)[:60]!r}; write {key}="two words" with quotes, so that text behind it is told apart'
            )


def _has_label_lines(bodies: Sequence[str]) -> bool:
    """Return whether each record has two lines of equal length, the second of them written in the letters of labels.

    A sequence that is wrapped into two lines has residues in both, and its first line is as long as those of others.
    """
    pairs = [[line.strip() for line in body.split("\n") if line.strip()] for body in bodies]
    if not pairs or not all(len(pair) == 2 and len(pair[0]) == len(pair[1]) for pair in pairs):
        return False
    residues, labels = (set("".join(side)) for side in zip(*pairs, strict=True))
    varied = len({len(pair[0]) for pair in pairs}) > 1
    return len(labels) < len(residues) and (len(labels) <= 12 if varied else len(labels) <= min(8, len(residues) // 2))


def _two_lines(path: str, start: int, body: str) -> tuple[str, str]:
    lines = [line.strip() for line in body.split("\n") if line.strip()]
    if len(lines) != 2 or len(lines[0]) != len(lines[1]):
        raise DataError(
            f"{path}:{start}: the records before have residues and, in a line of equal length, labels; this one has "
            f"lines of {', '.join(str(len(line)) for line in lines)} characters; write it as the others are"
        )
    return lines[0], lines[1]


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


def _header_fields(path: str, line: int, header: str, wanted: Collection[str]) -> dict[str, str]:
    """Return the header's fields; those that nobody wants are a description, which may be written in any way.

    An unquoted value ends where the next key begins, as in UniProt's `OS=Mus musculus OX=10090`.
    """
    fields: dict[str, str] = {}
    for key, quoted, bare in _FIELD.findall(header):
        if key == "INTERACTOR":  # biotrainer's: what follows is about two proteins
            raise DataError(
                f"{path}:{line}: INTERACTOR= makes it a pair of proteins, which no task here predicts; "
                "remove the field to take the protein alone"
            )
        if key in wanted and bare.startswith('"'):
            raise DataError(f"{path}:{line}: the quote after {key}= is not closed; close it with '\"'")
        if key in wanted and key in fields:
            raise DataError(f"{path}:{line}: the header has {key}= twice; keep one")
        fields[key] = quoted or bare.strip()
    parts = header.split(maxsplit=1)[0].split("|")
    for key in wanted:
        if (part := _NAME_PART.fullmatch(key)) and 0 < int(part[1]) <= len(parts):
            fields.setdefault(key, parts[int(part[1]) - 1])
        elif key not in fields and (found := re.search(rf"\s{re.escape(key)}:(\S+)", header)):  # PDB's `mol:protein`
            fields[key] = found[1]
    return fields


def read_jsonl(path: str, columns: Sequence[Column]) -> Iterator[Record]:
    """Give the records of a file with a JSON object per line; a key that an object lacks is ''."""
    lines = ((number, line) for number, line in zip(count(1), read_lines(path)) if line.strip())
    cure = "write one object a line"
    return _read_objects(path, columns, ((number, _parsed(f"{path}:{number}", line, cure)) for number, line in lines))


def read_json_list(path: str, columns: Sequence[Column]) -> Iterator[Record]:
    """Give the records of a file that is a JSON list of objects, as TAPE's; it is held as a whole."""
    blocks: list[str] = []
    for _, block in read_blocks(path):
        blocks.append(block)
        if len(blocks) * BLOCK > JSON_MOST:
            raise DataError(f"{path}: more than {JSON_MOST} bytes of JSON; write one object a line, and name it .jsonl")
    found = _parsed(path, "".join(blocks), "correct it, or name it .jsonl if each line is an object")
    if not isinstance(found, list):
        keys = f" with {', '.join(map(repr, list(found)[:5]))}" if isinstance(found, dict) else ""
        what = f"a {type(found).__name__}{keys}, not a list of objects"
        raise DataError(f"{path}: {what}; write [{{...}}, ...], or one object a line in a .jsonl")
    yield from _read_objects(path, columns, enumerate(found, start=1))


def _read_objects(path: str, columns: Sequence[Column], objects: Iterable[tuple[int, Any]]) -> Iterator[Record]:
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
            if not size:
                _check_beginning(path, piece)
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
    if b"\0" in raw:
        raise DataError(f"{path}:{number}: a zero byte; this is no UTF-8 text, save the file as UTF-8")
    if b"\r" in raw:
        raise DataError(f"{path}:{number}: a carriage return within a line; save the file with newlines (LF or CRLF)")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        raise DataError(f"{path}:{number}: {place} is not UTF-8; save the file as UTF-8") from None
