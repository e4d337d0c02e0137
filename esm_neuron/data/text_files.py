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
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config.deferred import module
from esm_neuron.data.looks import LabelLines
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
    numbered,
    pick_columns,
    place,
    suffix_of,
    text,
)
from esm_neuron.data.remote import is_remote, name_of, open_remote
from esm_neuron.data.tokenizer import bad_residues
from esm_neuron.errors import DataError
from esm_neuron.files import parse_json

if TYPE_CHECKING:
    from pyarrow import csv as csv_columns
else:
    csv_columns = module("pyarrow.csv")

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
_ODD_HEADER = "^$|^[A-Z][A-Z0-9];"
_NOT_PLAIN = (b'"', b"\r", b"\0", b"\xef\xbb\xbf")
"""What lines of a table do not have that can be cut at each separator."""
_PLAIN = bytes(range(32, 127)) + b"\t\n"
"""What a FASTA file is made of, as a rule."""


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
            line = _decode_line(path, at, block[begin:end].rstrip(b"\r"))
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
        if any(mark in block for mark in _NOT_PLAIN) or len(self._delimiter.encode()) != 1 or not _is_text(block):
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
        residues = next((p for c, p in zip(self._columns, self._picks, strict=True) if c.name == "sequence"), -1)
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


def _unquoted(value: str) -> str:
    inner = value[1:-1]
    whole = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else value


def _row_name(record: Sequence[str], columns: Sequence[Column], picks: Sequence[int]) -> str:
    """Return what to call a row of the wrong width: its id where that can be told."""
    places = (pick for column, pick in zip(columns, picks, strict=True) if column.name == "id" and pick < len(record))
    name = next((record[pick].strip() for pick in places), "")
    return f"the row of {name[:60]!r}" if name else "a row"


def read_fasta(path: str, columns: Sequence[Column]) -> Iterator[Block]:
    """Give the records of a FASTA file; columns but id and sequence are header fields ('' where absent).

    A column `part2` is the second part of the name between bars. Where each record has a third line with labels
    (SignalP, NetSurfP), that is the column LABEL_LINE and no part of the sequence.
    """
    fasta = _Fasta(path, columns)
    for number, block in _whole_records(path):
        made = fasta.plain(number, block)
        if made is None:
            yield from in_blocks(fasta.records(decoded(path, number, block)), len(columns))
        else:
            yield made
    fasta.conclude()


class _Fasta:
    """The records of a FASTA file, in one block after the other."""

    def __init__(self, path: str, columns: Sequence[Column]) -> None:
        self._path, self._asked = path, columns
        wanted = [column for column in columns if column.name not in ("id", "sequence")]
        self._keys = {column.source for column in wanted}
        self._seen, self._below = Seen(wanted), LabelLines()
        # values of several words, the first MOST_PHRASES
        self._phrases: dict[str, set[str]] = {key: set() for key in self._keys}
        self._labelled: bool | None = None  # whether records have a line of labels, as the first block shows

    def plain(self, number: int, block: bytes) -> Block | None:
        """Return the records of a block that holds nothing but names, letters and simple fields; None for others."""
        if self._labelled is None:
            sample = islice(_fasta_records(self._path, decoded(self._path, number, block)), _SAMPLE)
            self._labelled = _has_label_lines([body for _, _, body in sample])
        return None if self._labelled else self._columns(number, block)

    def _columns(self, number: int, block: bytes) -> Block | None:
        if block[:1] != b">" or block.translate(None, _PLAIN):
            return None
        text = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(text == ord("\n"))
        starts = np.concatenate([[0], ends[:-1] + 1])
        (first,) = np.nonzero(text[starts] == ord(">"))  # lines of headers
        begin, end = starts[first], ends[first]
        after = np.append(begin[1:], len(block))
        # The text in pieces without a copy: of each record its header, what is below it, and the next one's '>'.
        bounds = np.stack([begin + 1, end, after], axis=1).ravel()
        pieces = pa.LargeStringArray.from_buffers(3 * len(first) - 1, pa.py_buffer(bounds), pa.py_buffer(block))
        headers, bodies = (pieces.take(pa.array(np.arange(i, len(pieces), 3))) for i in (0, 1))
        headers = pc.ascii_trim_whitespace(headers)
        below = b"".join(bodies.buffers()[2:])
        if b" " in below or b"\t" in below or pc.any(pc.match_substring_regex(headers, _ODD_HEADER)).as_py():
            return None
        lines, fields = number + first, self._fields(number + first, headers)
        if fields is None:
            return None
        residues = after - end - np.diff(first, append=len(ends))  # newlines do not count
        words = pc.ascii_split_whitespace(headers, max_splits=1)
        special = {
            "id": words.flatten().take(words.offsets[:-1]).cast(pa.large_string()),
            "sequence": pa.LargeStringArray.from_buffers(
                len(first),
                pa.py_buffer(np.concatenate([[0], np.cumsum(residues)])),
                pa.py_buffer(below.translate(None, b"\n")),
            ),
        }
        for record in self._below.due(len(first)).tolist():
            self._below.look(int(lines[record]), bodies[record].as_py())
        return lines, [
            special[column.name] if column.name in special else fields[column.source] for column in self._asked
        ]

    def _fields(self, lines: np.ndarray, headers: pa.Array) -> dict[str, pa.Array] | None:
        """Return for each wanted key its value in each header; None where a header is wrong."""
        if not self._keys:
            return {}
        plain = ~pc.match_substring_regex(headers, '"|INTERACTOR=').to_numpy(zero_copy_only=False)
        found: dict[str, pa.Array] = {}
        for key in self._keys:
            pattern = rf'(?:^|\s){re.escape(key)}=(?P<value>[^\s="]*)(?:\s[^\s="]+=|$)'
            found[key] = pc.struct_field(pc.extract_regex(headers, pattern), "value")
            plain &= found[key].is_valid().to_numpy(zero_copy_only=False)
            plain &= (pc.count_substring(headers, f"{key}=").to_numpy() == 1) & key.isidentifier()
        if plain.any():
            self._seen.add(self._keys)
        if plain.all():
            return found
        values = {key: column.to_pylist() for key, column in found.items()}
        for row in np.flatnonzero(~plain).tolist():
            try:
                fields = _header_fields(self._path, int(lines[row]), headers[row].as_py(), self._keys)
            except DataError:
                return None  # `records` raises it, after the records before
            self._note(fields)
            for key, column in values.items():
                column[row] = fields.get(key, "")
        return {key: pa.array(column, pa.large_string()) for key, column in values.items()}

    def _note(self, fields: Mapping[str, str]) -> None:
        self._seen.add(fields)
        for key, several in self._phrases.items():
            if " " in (value := fields.get(key, "")) and len(several) < MOST_PHRASES:
                several.add(value)

    def records(self, blocks: Iterable[tuple[int, str]]) -> Iterator[Record]:
        """Give the records in some text."""
        path, keys = self._path, self._keys
        for start, header, body in _fasta_records(path, blocks):
            if _PIR.match(header) and body.rstrip().endswith("*"):
                cure = "write '>' and the name alone, and remove the line of description below it"
                raise DataError(f"{path}:{start}: {header[:60]!r} begins a record of the format PIR; {cure}")
            name = header.split(maxsplit=1)[0]
            fields = _header_fields(path, start, header, keys) if keys else {}
            if self._labelled:
                body, fields[LABEL_LINE] = _two_lines(path, start, body)
            elif len(self._below.due(1)):
                self._below.look(start, body)
            self._note(fields)
            special = {"id": name, "sequence": "".join(body.split())}
            yield start, [special.get(column.name, fields.get(column.source, "")) for column in self._asked]

    def conclude(self) -> None:
        """Raise DataError, after the last record, for what only the file as a whole shows."""
        if (what := self._below.found(self._path)) is not None:
            raise DataError(what)
        self._seen.check(self._path)
        for key, several in self._phrases.items():
            first = {value.split(" ")[0] for value in several}
            if len(several) >= LEAST_PHRASES and len(first) <= len(several) / LEAST_PHRASES:
                raise DataError(
                    f"{self._path}: {key}= has {len(several)} values of several words that begin with {len(first)} "
                    f'words, as {min(several)[:60]!r}; write {key}="two words" with quotes, so that text behind it is '
                    "told apart"
                )


def _whole_records(path: str) -> Iterator[tuple[int, bytes]]:
    """Give the text of whole records, after the number of its first line; at first of _SAMPLE records or of all."""
    held: list[bytes] = []
    at, begun, unfinished, given = 1, 0, 0, False  # line of what is held, records so far, bytes of the last of them
    for number, block in read_blocks(path):
        cut = block.rfind(b"\n>") + 1  # only a '>' at the start of a line begins a record
        starts = block[:1] == b">"
        begun += block.count(b"\n>") + starts
        unfinished = len(block) - cut if cut or starts else unfinished + len(block)
        if (cut or (starts and held)) and (given or begun > _SAMPLE):
            yield at, b"".join([*held, block[:cut]])
            held, at, block, given = [], number + block.count(b"\n", 0, cut), block[cut:], True
        held.append(block)
        if unfinished > LINE_LIMIT:
            for _ in _fasta_records(path, decoded(path, at, b"".join(held))):
                pass  # it raises what is wrong with so long a record
    if held or not given:
        yield at, b"".join(held)


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


def _fasta_records(path: str, blocks: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    """Give the line, the header and the lines of residues of each record; a record may span blocks of the text."""
    start, header, body = 0, "", ""
    for number, block in blocks:
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


def read_jsonl(path: str, columns: Sequence[Column]) -> Iterator[Block]:
    """Give the records of a file with a JSON object per line; a key that an object lacks is ''."""
    lines = chain.from_iterable(lines_of(path, *block) for block in read_blocks(path))
    filled = ((number, line) for number, line in lines if line.strip())
    cure = "write one object a line"
    return _read_objects(path, columns, ((number, _parsed(f"{path}:{number}", line, cure)) for number, line in filled))


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
    yield from _read_objects(path, columns, enumerate(found, start=1))


def _read_objects(path: str, columns: Sequence[Column], objects: Iterable[tuple[int, Any]]) -> Iterator[Block]:
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
        yield at, _decode_line(path, at, line.rstrip(b"\r")) + "\n"


def _is_text(block: bytes) -> bool:
    try:
        return block.isascii() or bool(block.decode("utf-8"))
    except UnicodeDecodeError:
        return False


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
