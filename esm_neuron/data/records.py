"""Shared by all readers of files: the columns that rows need, and the values of records as text."""

from __future__ import annotations

import difflib
import glob
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa

from esm_neuron.data.remote import is_remote, name_of
from esm_neuron.data.tokenizer import residues_of
from esm_neuron.errors import DataError

LIST_JOINER = ";"
"""Between the labels of a protein that has several."""
RESIDUE_JOINER = ","
"""Between the labels of a protein that has one per residue."""
BLOCK_RECORDS, BLOCK_CHARACTERS = 4096, 1 << 22
"""Most records, and about the most characters, that are collected one by one."""
LINE_LIMIT = 1 << 24
"""Longest line in bytes, with its newline, and longest record in characters. No known protein has a hundredth of it."""
EXPANSION_LIMIT = 500
"""How many times larger than its .gz a file may be: proteins shrink to a half, copies of one protein to a hundredth,
and a file that is made to fill memory or disk to a thousandth."""
EXPANSION_FROM = 1 << 26
"""Bytes from which `EXPANSION_LIMIT` holds."""
TABLES = (".parquet", ".pq", ".xlsx")
"""Suffixes of tables whose rows are records, not lines."""
LMDB = (".lmdb", ".mdb")
DELIMITED = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}
"""Suffix of a table in text -> what is between its columns, as a rule."""
FASTA, JSONL, JSON = (".fasta", ".fa", ".faa", ".fas"), (".jsonl", ".ndjson"), ".json"
SUFFIXES = (*DELIMITED, *FASTA, *JSONL, JSON, *TABLES)
"""Suffixes of all files that are read, before .gz."""
_COMPARED = 1000
"""Most columns, and longest name, that are compared with a name that is not there."""


@dataclass(frozen=True)
class Column:
    """A column that rows need."""

    name: str
    """In the rows: id, sequence, label, split or `filter.<source>`."""
    source: str
    """In the file."""
    setting: str
    joiner: str | None = None
    """Written between the entries of a list; '': it is written as JSON; None: a list is refused."""
    default: bool = False
    """Whether the setting was left alone: the file may then write the name in other letters, see `ALSO`."""


Record = tuple[int, list[str]]
"""The line or the number of a record, from 1, and its values in the order of the columns."""
Block = tuple[np.ndarray, list[pa.Array]]
"""Some records: int64 [records] their lines or numbers, and their values, large_string [records] per column."""
Reader = Callable[[str, Sequence[Column]], Iterator[Block]]
"""Gives the records of a source in its order, holding no more than a few of them; raises DataError where it cannot."""


ALSO = {"id": ("entry", "acc", "accession", "identifier", "seq_id", "sequence_id", "#id"), "sequence": ("input_ids",)}
"""Column of the rows -> what files call it too, where its setting was left alone."""
MARKS = {"1": True, "1.0": True, "true": True, "yes": True, "0": False, "0.0": False, "false": False, "no": False}
"""What a mark of a table says, in small letters."""
UNKNOWN_RESIDUE = "?"
"""Label of a residue that a mask hides; one that `task.ignore` has by default."""
NUMBERED = "\0"
"""Id of every record of a table that has no column of ids: a zero byte, which no value has; a mark of such rows too."""
_FILE_SHIFT = 40
"""A row's number holds the place of its file in these upper bits, where a source is several files."""


def in_blocks(records: Iterator[Record], columns: int) -> Iterator[Block]:
    """Collect records with so many columns into blocks; those before a fault are given, then it is raised."""
    fault: DataError | None = None
    ended = False
    while not ended:
        lines: list[int] = []
        values: list[list[str]] = [[] for _ in range(columns)]
        characters = 0
        try:
            while len(lines) < BLOCK_RECORDS and characters < BLOCK_CHARACTERS and not ended:
                line, record = next(records, (0, None))
                if record is None:
                    ended = True
                    break
                lines.append(line)
                for value, column in zip(record, values, strict=True):
                    column.append(value)
                    characters += len(value)
        except DataError as error:
            fault, ended = error, True
        if lines:
            yield np.array(lines, np.int64), [pa.array(column, pa.large_string()) for column in values]
    if fault is not None:
        raise fault


def numbered(records: int) -> pa.Array:
    """Return the ids of records that have none."""
    return pa.repeat(pa.scalar(NUMBERED, pa.large_string()), records)


def is_hub(source: str) -> bool:
    """Return whether a source is a dataset of the Hugging Face hub (pathlib makes `hf:/` of `hf://`)."""
    return source.startswith("hf:/")


def files_of(source: str) -> tuple[tuple[str, str | None], ...]:
    """Return the files that a source stands for, in order, each with the class of all its proteins or None.

    A source is one file, dataset or folder of `Dataset.save_to_disk`; a folder of files with one of SUFFIXES; a
    pattern with `*`; a list `[a.csv, b.csv]`; or a file per class, `{name: a.fasta, other: b.fasta}`.
    """
    if is_hub(source) or is_remote(source) or os.path.isfile(source):
        return ((source, None),)
    inner = [part.strip(" '\"") for part in source[1:-1].split(",")]
    if source.startswith("[") and source.endswith("]"):
        return tuple(file for part in inner for file in files_of(part))
    if source.startswith("{") and source.endswith("}"):
        named = [part.partition(": ") for part in inner]
        if len({name for name, _, _ in named}) < len(named) or not all(path for _, _, path in named):
            raise DataError(f"{source}: write one file per class, as {{membrane: a.fasta, other: b.fasta}}")
        return tuple((file, n.strip(" '\"")) for n, _, path in named for file, _ in files_of(path.strip(" '\"")))
    if "*" in source:
        found = sorted(glob.glob(source, recursive=True))
        if not found:
            raise DataError(
                f"{source}: no file has such a name; check the pattern (it is taken from the current folder)"
            )
        return tuple((path, None) for path in found)
    if os.path.isdir(source) and not {"dataset_info.json", "dataset_dict.json"} & set(os.listdir(source)):
        return tuple((file, None) for file in _files_in(source)) or ((source, None),)
    return ((source, None),)


def _files_in(folder: str) -> list[str]:
    """Return the files of a folder that are one table: of one kind, of one split, and none in folders below it."""
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")
    files = [name for name in names if suffix_of(name) in SUFFIXES and suffix_of(name) != JSON]
    kinds = sorted({suffix_of(name) for name in files})
    if len(kinds) > 1:
        raise DataError(f"{folder}: the folder has files of {' and '.join(kinds)}; name one kind, as {folder}/*.csv")
    splits = {found[1].lower()[:3].replace("dev", "val"): name for name in files if (found := _OF_A_SPLIT.search(name))}
    if len(splits) > 1:
        shown, pattern = " and ".join(splits.values()), f"{folder}/*{kinds[0]}"
        raise DataError(
            f"{folder}: the folder has {shown}, of different splits; name each, or all of them as {pattern}"
        )
    below = (os.path.join(folder, name) for name in names if kinds and os.path.isdir(os.path.join(folder, name)))
    for inner in below:
        if more := next((name for name in os.listdir(inner) if suffix_of(name) == kinds[0]), None):
            raise DataError(f"{inner}/{more}: stands in a folder below {folder}; name all as {folder}/**/*{kinds[0]}")
    return [os.path.join(folder, name) for name in files]


_OF_A_SPLIT = re.compile(r"(?:^|[._-])(train|val|dev|test)(?:ing|id|idation)?(?=[._-])", re.IGNORECASE)
"""What a file's name says about its split."""


def suffix_of(name: str) -> str:
    """Return a file's suffix in small letters, without .gz."""
    path = Path(name_of(name))
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def row_number(file: int, number: int) -> int:
    """Return the number of a row among all files of a source, from the place of its file and its number there."""
    return (file << _FILE_SHIFT) + number


def file_and_number(files: Sequence[tuple[str, str | None]], number: int) -> tuple[str, int]:
    """Return the file that a row of a source is in, of its `files_of`, and its line or record there."""
    return files[number >> _FILE_SHIFT][0], number & ((1 << _FILE_SHIFT) - 1)


def row_unit(source: str) -> str:
    """Return what the number of a row counts: `line` in text, `record` in JSON lists, tables and datasets."""
    table = is_hub(source) or suffix_of(source) in (JSON, *TABLES, *LMDB) or os.path.isdir(source)
    return "record" if table else "line"


def place(source: str, number: int) -> str:
    """Return where a row is, as errors begin: `x.csv:3`, or `x.parquet: record 2`."""
    file, number = file_and_number(files_of(source), number)
    return f"{file}:{number}" if row_unit(file) == "line" else f"{file}: record {number}"


def check_regular(path: str) -> None:
    """Raise DataError unless `path` is a file that can be read, and read again; of an address its reader tells."""
    if is_remote(path):
        return
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path (it is taken from the current folder)") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}; check the file and its permissions") from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: this is a folder; name a file in it")
    if not stat.S_ISREG(mode):  # a pipe would be waited for, and would be empty when it is read again
        raise DataError(f"{path}: this is a pipe or a device; write it to a file and name that")


def check_expansion(path: str, where: str, size: int, what: str) -> None:
    """Raise DataError where a file holds more bytes than proteins do that are packed into its size."""
    if is_remote(path):  # its size is not known, and no more of it is held than a line
        return
    packed = os.stat(path).st_size
    if size > max(EXPANSION_FROM, packed * EXPANSION_LIMIT):
        raise DataError(
            f"{where}: {size} bytes {what} {packed}, more than {EXPANSION_LIMIT} for one; no proteins are so much "
            "alike, check the file"
        )


SEQUENCES = ("seq", "aa_seq", "protein_sequence", "primary", "aa")
"""Other names that people give to a column of sequences, the likeliest first."""


class MissingColumnError(DataError):
    """A column that a source lacks; `there` has those that it has, of objects and FASTA headers the first of them."""

    def __init__(self, message: str, there: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.there = tuple(there)


def no_column(source: str, column: Column, there: Sequence[str]) -> NoReturn:
    """Raise DataError for a column that is not there, with the nearest name that is."""
    shown = ", ".join(repr(name[:60]) for name in there[:20]) + (", ..." if len(there) > 20 else "")
    # longer or later names are no typing errors, and comparing a million of them takes minutes
    by_lower = {re.sub(r"\W+", "_", name.lower()): name for name in there[:_COMPARED] if len(name) <= _COMPARED}
    near = difflib.get_close_matches(re.sub(r"\W+", "_", column.source.lower()), by_lower, n=1)
    near = near or [name for name in SEQUENCES if name in by_lower and column.name == "sequence"]
    cure = f"name one of these as {column.setting}, or add it" if there else "add it"
    cure = f"did you mean {by_lower[near[0]]!r}?" if near else cure
    what = f"no column {column.source!r} ({column.setting})"
    raise MissingColumnError(f"{source}: {what}; the file has {shown or 'none'}; {cure}", there)


class Seen:
    """Note the keys of records that each have their own, such as JSON objects, to tell a column that is never there."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.names: dict[str, None] = {}  # the first keys, in order, for messages
        self._missing = {column.source: column for column in columns}

    def add(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._missing.pop(key, None)
            if len(self.names) < _COMPARED:
                self.names[key] = None

    def check(self, source: str) -> None:
        """Raise DataError for a wanted key that no record had."""
        for column in self._missing.values():
            no_column(source, column, list(self.names))


def pick_columns(source: str, header: Sequence[str], columns: Sequence[Column]) -> list[int]:
    """Return the place in `header` of each column, -1 for an id that is not there and need not be.

    Raise DataError for a column that is not there, or twice.
    """
    return [_pick(source, list(header), column) for column in columns]


def _pick(source: str, header: list[str], column: Column) -> int:
    if header.count(column.source) > 1:
        raise DataError(f"{source}: the header has column {column.source!r} twice; rename one")
    if column.source in header:
        return header.index(column.source)
    if column.default:
        names = [name.lower() for name in header[:_COMPARED]]
        for known in (column.source.lower(), *ALSO.get(column.name, ())):
            if names.count(known) == 1:
                return names.index(known)
        if column.name == "id":
            return -1
    no_column(source, column, header)


def text(value: object, source: str, number: int, column: Column) -> str:
    """Return a value of a format that knows types as text, or raise DataError.

    None and NaN become '', booleans `true` or `false`, numbers what Python writes; `column.joiner` joins lists, and an
    empty one is `[]`; a sequence may be a list of ESM's tokens.
    """
    if isinstance(value, str):
        what = "a zero byte, which is no text; remove it" if "\0" in value else ""
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            what = what or "half a surrogate pair, which is no character; save the file as UTF-8"
        if what:
            raise DataError(f"{place(source, number)}: column {column.source!r} holds {what}")
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, Decimal):
        return format(value.normalize(), "f") if value.is_finite() else ""
    if isinstance(value, (list, tuple)) and column.joiner is not None:
        return _joined(value, source, number, column) if value else "[]"
    if isinstance(value, (list, tuple)) and column.name == "mask" and all(v in (0, 1) for v in value):
        return "".join(str(int(entry)) for entry in value)
    if isinstance(value, (list, tuple)) and column.name == "sequence":
        try:
            return residues_of(value)
        except ValueError as error:
            raise DataError(f"{place(source, number)}: column {column.source!r}: {error}") from None
    expected = "text, a number, true or false" + (", or a list of these" if column.joiner is not None else "")
    raise DataError(
        f"{place(source, number)}: column {column.source!r} holds a {type(value).__name__}; "
        f"it must be {expected}, convert it"
    )


def to_number(text: str) -> float:
    """Return the number that a text is, NaN where it is none. Digits are 0 to 9, without the `_` that Python allows."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


class Decimals:
    """Read the numbers of a column, with a point or a comma as decimal mark."""

    def __init__(self) -> None:
        self._marks = {".": "", ",": ""}  # decimal mark -> a value with it
        self._grouped = True  # whether every comma could be one of thousands

    def read(self, text: str) -> float:
        """Return the number that a text is, NaN where it is none."""
        if "." in text:
            self._marks["."] = text
        elif _DECIMAL_COMMA.fullmatch(text):
            self._marks[","] = text
            self._grouped = self._grouped and _THOUSANDS.fullmatch(text) is not None
            return to_number(text.replace(",", "."))
        return to_number(text)

    def doubt(self) -> str | None:
        """Return, after the last number, what to say where a comma may be no decimal mark."""
        point, comma = self._marks["."], self._marks[","]
        if not comma or not (point or self._grouped):
            return None
        other = f"{comma[:60]!r} has a comma, " + (
            f"{point[:60]!r} has a point" if point else "it may be one of thousands"
        )
        return f"{other}; write 1234.5 everywhere"


_DECIMAL_COMMA = re.compile(r"[-+]?[0-9]*,[0-9]+([eE][-+]?[0-9]+)?")
_THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2},[0-9]{3}")


def _joined(values: Sequence[object], source: str, number: int, column: Column) -> str:
    entries = [text(value, source, number, Column(column.name, column.source, column.setting)) for value in values]
    joiner = column.joiner
    if not joiner:
        return json.dumps(entries, ensure_ascii=False)
    for entry in entries:
        if not entry or joiner in entry:
            what = f"holds {joiner!r}, which joins the entries of a list" if entry else "is empty"
            where = f"{place(source, number)}: column {column.source!r}"
            raise DataError(f"{where}: entry {entry[:60]!r} {what}; rename it")
    return joiner.join(entries)
