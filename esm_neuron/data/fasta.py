"""Read FASTA: each record with the line of its header, and the fields of that."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.data.looks import LabelLines
from esm_neuron.data.records import LINE_LIMIT, Block, Column, Record, Seen, in_blocks
from esm_neuron.data.text_files import decoded, read_blocks
from esm_neuron.errors import DataError

LABEL_LINE = "line3"
"""Name of the column that the third line of a record is, where every record of a FASTA file has one."""
MOST_PHRASES, LEAST_PHRASES = 1000, 20
"""Most values of several words that are kept, and how many, for each first word, look like labels with free text."""
_SAMPLE = 50
"""Records that show whether a FASTA file has such lines."""

_FIELD = re.compile(r'(?:^|\s)([^\s="]+)=(?:"([^"]*)"(?=\s|$)|((?:(?!\s[^\s="]+=).)*))')
_PIR = re.compile(r"[A-Z][A-Z0-9];")
_NAME_PART = re.compile(r"part([0-9]{1,3})")
_ODD_HEADER = "^$|^[A-Z][A-Z0-9];"
_PLAIN = bytes(range(32, 127)) + b"\t\n"
"""What a FASTA file is made of, as a rule."""


def read_fasta(path: str, columns: Sequence[Column]) -> Iterator[Block]:
    """Give the records of a FASTA file; columns but id and sequence are header fields ('' where absent).

    A column `part2` is the second part of the name between bars. Where each record has a third line with labels
    (SignalP, NetSurfP), that is the column LABEL_LINE and no part of the sequence.
    """
    if any(column.name.startswith("sequence.") for column in columns):
        raise DataError(f"{path}: a record of FASTA has one sequence; write chains as columns of a CSV")
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
