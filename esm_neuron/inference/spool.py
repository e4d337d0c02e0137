"""An input that is read once: its records lie, cut into pieces, in a mapped file that all ranks and --resume share.

The main rank reads the source, checks it to its end and writes the file beside the shards of the output. Every rank
takes its pieces from there, so that nothing is read or parsed twice; a resumed command whose source has the size and
the time of change that it had reads nothing at all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa

from esm_neuron.data.cache import content_key
from esm_neuron.data.records import files_of, is_hub
from esm_neuron.data.validation import Rejected, RejectedRows
from esm_neuron.errors import DataError
from esm_neuron.files import parse_json, read_bytes, write_json

T = TypeVar("T")

SPOOL, FACTS = "input.arrow", "input.json"
_FACTS_LIMIT = 1 << 32
"""Bytes: as large as the list of the rejected records of a corpus."""


@dataclass(frozen=True)
class Piece(Generic[T]):
    """Some records in the order of the input; their predictions make one shard."""

    content: T
    tokens: int
    """About how many tokens the model is given for it."""
    digest: bytes
    """Hash of the content."""
    rows: int
    """Of its predictions: its records."""


class Source(Protocol[T]):
    """An input, its columns and what is done to its records."""

    @property
    def rejected(self) -> RejectedRows:
        """Return the records that the last reading has left out or changed."""

    def __call__(self) -> Iterator[Piece[T]]:
        """Read the input from its beginning; raise DataError, after the last piece, where a record cannot be used."""

    def summary(self) -> str:
        """Return what the last reading has found."""

    def stamp(self) -> str | None:
        """Return a name for what the input and the settings are now; None where that would need a reading."""

    def pack(self, content: T) -> pa.RecordBatch: ...

    def unpack(self, batch: pa.RecordBatch) -> T: ...

    def digest(self, content: T) -> bytes: ...


@dataclass(frozen=True)
class InputScan:
    """What a reading of the input has found."""

    tokens: tuple[int, ...]
    """Of each piece."""
    rows: tuple[int, ...]
    """Of each piece."""
    digests: tuple[bytes, ...]
    """Of each piece."""
    summary: str = ""
    rejected: RejectedRows = field(default_factory=RejectedRows)

    @property
    def digest(self) -> str:
        """Return a hash of the whole input, in hexadecimal."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()


def scan(folder: Path, source: Source[T], resume: bool) -> InputScan:
    """Read an input to its end into `folder`, or take what a killed command has put there of the same source."""
    stamp = source.stamp()
    if resume and stamp is not None and (kept := _kept(folder, stamp)) is not None:
        return kept
    (folder / FACTS).unlink(missing_ok=True)  # it says that the other file is whole
    found, writer = list[tuple[int, int, bytes]](), None
    try:
        for piece in source():
            batch = source.pack(piece.content)
            writer = writer or pa.ipc.new_file(str(folder / SPOOL), batch.schema)
            writer.write_batch(batch)
            found.append((piece.tokens, piece.rows, piece.digest))
    finally:
        if writer is not None:
            writer.close()
    tokens, rows, digests = zip(*found, strict=True) if found else ((), (), ())
    made = InputScan(tokens, rows, digests, source.summary(), source.rejected)
    facts = {"tokens": tokens, "rows": rows, "digests": [digest.hex() for digest in digests], "summary": made.summary}
    size = (folder / SPOOL).stat().st_size if found else 0
    write_json(folder / FACTS, {"stamp": stamp, "bytes": size, **facts, "rejected": list(made.rejected)})
    return made


def _kept(folder: Path, stamp: str) -> InputScan | None:
    """Return what is known of the spooled input in `folder`; None where there is none, or one of another source."""
    try:
        facts = parse_json(read_bytes(folder / FACTS, _FACTS_LIMIT))
        if facts.pop("stamp") != stamp or facts.pop("bytes") != (folder / SPOOL).stat().st_size:
            return None
        rejected = RejectedRows(Rejected(*row) for row in facts.pop("rejected"))
        digests = tuple(map(bytes.fromhex, facts.pop("digests")))
        sizes = [tuple(map(int, facts.pop(name))) for name in ("tokens", "rows")]
        return InputScan(*sizes, digests, str(facts["summary"]), rejected)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


class Spool(Generic[T]):
    """The pieces of a spooled input by their numbers."""

    def __init__(self, folder: Path, source: Source[T], scanned: InputScan) -> None:
        self._folder, self._source, self.scanned = folder, source, scanned
        self._file: Any = None

    def __getitem__(self, number: int) -> T:
        """Return the content of a piece; raise DataError where it is not what was written."""
        path = self._folder / SPOOL
        try:
            self._file = self._file or pa.ipc.open_file(pa.memory_map(str(path)))
            batch = self._file.get_batch(number)
            batch.validate(full=True)
            content = self._source.unpack(batch)
            sound = self._source.digest(content) == self.scanned.digests[number]
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError):
            sound = False
        if not sound:
            (self._folder / FACTS).unlink(missing_ok=True)
            raise DataError(f"{path}: was changed since it was written; start again with --resume, it is read anew")
        return content


def stamp_of(source: str, settings: Any) -> str | None:
    """Return a name for the files of a source as they are now, and for settings (JSON values); None for a hub's."""
    try:
        found = []
        for name, label in files_of(source):
            if is_hub(name):
                return None
            path = Path(name)
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                stat = file.stat()
                found.append([os.path.abspath(file), label, stat.st_size, stat.st_mtime_ns, stat.st_ino])
    except OSError:
        return None
    return content_key([found, settings])
