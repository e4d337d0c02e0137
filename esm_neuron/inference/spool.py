"""Read an input once: its records lie, cut into pieces, in a mapped file that all ranks and `--resume` share.

The main rank reads the source to its end and writes the file beside the shards of the output; every rank takes its
pieces from there. A resumed command reads the source again only if the settings, or a size, a time of change or a name
of the source's files, are others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa

from esm_neuron import __version__
from esm_neuron.data.cache import content_key
from esm_neuron.data.records import files_of, is_hub
from esm_neuron.data.remote import is_remote
from esm_neuron.data.validation import Rejected, RejectedRows
from esm_neuron.errors import DataError
from esm_neuron.files import NOTHING, misfit, parse_json, read_bytes, remove, write_json

T = TypeVar("T")

SPOOL, FACTS = "input.arrow", "input.json"
"""The pieces, a record batch each; and what is known of them, which is there only if they are whole."""
_FACTS_LIMIT = 1 << 32
"""Bytes: as large as the list of the rejected records of a corpus."""
_FORM = {"stamp": (str, NOTHING), "pieces": [lambda piece: list(map(type, piece)) == [int, int, str]], "summary": str,
         "rejected": [list]}  # fmt: skip


@dataclass(frozen=True)
class Piece(Generic[T]):
    """Some records in the order of the input; their predictions make one shard."""

    content: T
    tokens: int
    """About how many tokens the model is given for it."""
    rows: int
    """Of its predictions: its records."""


class Source(Protocol[T]):
    """An input, its columns and what is done to its records."""

    @property
    def rejected(self) -> RejectedRows:
        """Return the records that the last reading has left out or changed."""
        ...

    def __call__(self) -> Iterator[Piece[T]]:
        """Read the input from its beginning; raise DataError, after the last piece, where a record cannot be used."""
        ...

    def summary(self) -> str:
        """Return one line about what the last reading has found."""
        ...

    def pack(self, content: T) -> pa.RecordBatch:
        """Return the content of a piece as it is kept in the file."""
        ...

    def unpack(self, batch: pa.RecordBatch) -> T:
        """Return the content that was packed."""
        ...


@dataclass(frozen=True)
class InputScan:
    """What a reading of the input has found."""

    tokens: tuple[int, ...]
    """Of each piece."""
    rows: tuple[int, ...]
    """Of each piece."""
    digests: tuple[str, ...]
    """Hash of each piece, in hexadecimal."""
    summary: str = ""
    rejected: RejectedRows = field(default_factory=RejectedRows)
    """The records that were left out or changed."""

    @property
    def digest(self) -> str:
        """Return a hash of the whole input, in hexadecimal."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()


def scan(folder: Path, source: Source[T], stamp: str | None, resume: bool) -> InputScan:
    """Read an input to its end into `folder`; or, to resume, return what is there already with the same `stamp`.

    Raise DataError where a record cannot be used.
    """
    if resume and stamp is not None and (kept := _kept(folder, stamp)) is not None:
        return kept
    for name in (FACTS, SPOOL):  # whatever is there: a pipe would be waited for
        remove(folder / name)
    found: list[tuple[int, int, str]] = []
    writer: pa.RecordBatchFileWriter | None = None
    try:
        for piece in source():
            batch = source.pack(piece.content)
            writer = writer or pa.ipc.new_file(str(folder / SPOOL), batch.schema)
            writer.write_batch(batch)
            found.append((piece.tokens, piece.rows, digest_of(batch)))
    finally:
        if writer is not None:
            writer.close()
    tokens, rows, digests = zip(*found, strict=True) if found else ((), (), ())
    made = InputScan(tokens, rows, digests, source.summary(), source.rejected)
    facts = {"stamp": stamp, "pieces": found, "summary": made.summary, "rejected": list(made.rejected)}
    write_json(folder / FACTS, facts)
    return made


def _kept(folder: Path, stamp: str) -> InputScan | None:
    """Return what is known of the pieces in `folder`; None where there are none, or those of another source."""
    try:
        facts = parse_json(read_bytes(folder / FACTS, _FACTS_LIMIT))
        if misfit(facts, _FORM) or facts["stamp"] != stamp or not (folder / SPOOL).is_file():
            return None
        rejected = RejectedRows(Rejected(*row) for row in facts["rejected"])
        tokens, rows, digests = zip(*facts["pieces"], strict=True) if facts["pieces"] else ((), (), ())
        return InputScan(tokens, rows, digests, facts["summary"], rejected)
    except (OSError, ValueError, TypeError):
        return None


class Spool(Generic[T]):
    """The pieces of an input that `scan` has read, by their numbers."""

    def __init__(self, folder: Path, source: Source[T], scanned: InputScan) -> None:
        self._path, self._source, self.scanned = folder / SPOOL, source, scanned
        self._file: Any = None

    def __getitem__(self, number: int) -> T:
        """Return the content of a piece; raise DataError where it is not what was written."""
        try:
            self._file = self._file or pa.ipc.open_file(pa.memory_map(str(self._path)))
            batch = self._file.get_batch(number)
            batch.validate(full=True)  # before its offsets are followed
            sound = digest_of(batch) == self.scanned.digests[number]
        except (pa.ArrowException, OSError, ValueError):  # the last: it has fewer pieces
            sound = False
        if not sound:
            self._path.with_name(FACTS).unlink(missing_ok=True)
            raise DataError(f"{self._path}: was changed since it was written; go on with --resume, it is made anew")
        return self._source.unpack(batch)


def digest_of(batch: pa.RecordBatch) -> str:
    return hashlib.sha256(batch.serialize()).hexdigest()


def stamp_of(source: str, settings: Any) -> str | None:
    """Return a name for the files of a source as they are now and for settings (JSON values); None for an address."""
    found = []
    for name, label in files_of(source):
        if is_hub(name) or is_remote(name):
            return None
        path = Path(name)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            try:
                stat = file.stat()
            except OSError:  # reading it says what is wrong
                return None
            found.append([os.path.abspath(file), label, stat.st_size, stat.st_mtime_ns])
    return content_key([__version__, found, settings])
