"""Tokenized tables in files that are mapped into memory, and a cache of folders by what is in them.

A cached folder is made by one process while others wait, appears whole or not at all, and is proven by its checksums
each time it is opened: a damaged one is made again, with a warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa

from esm_neuron.data.dataset import ExampleTable, join_tables, shifted
from esm_neuron.data.records import is_hub
from esm_neuron.errors import ConfigError
from esm_neuron.files import flock, new_folder, sha256, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_IDS = pa.schema([("id", pa.large_string())])
_COMMIT = re.compile(r"@[0-9a-f]{40}/")
_ARRAYS = tuple(field.name for field in fields(ExampleTable) if field.name != "ids")


class MappedNames(Sequence[str]):
    """Ids in a file that is mapped, read one at a time or in order."""

    def __init__(self, path: Path) -> None:
        self._column = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["id"]

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return str(self._column[index].as_py())

    def __iter__(self) -> Iterator[str]:
        return (name for chunk in self._column.chunks for name in chunk.to_pylist())


class TableWriter:
    """Joins tables as they come, in memory or in files.

    Args:
        stem: the files' common beginning, such as `folder/train`; None: memory.
    """

    def __init__(self, stem: Path | None) -> None:
        self._stem = stem
        self._tables: list[ExampleTable] = []
        self._tokens = self._records = 0
        self._types: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._files = contextlib.ExitStack()
        self._open: dict[str, BinaryIO] = {}
        self._ids: pa.RecordBatchFileWriter | None = None

    def add(self, table: ExampleTable) -> None:
        """Put the examples of a table behind those that are there."""
        if self._stem is None:
            self._tables.append(table)
            return
        if self._ids is None:
            self._open = {name: self._files.enter_context(_file(self._stem, name).open("wb")) for name in _ARRAYS}
            self._ids = pa.ipc.new_file(_file(self._stem, "ids"), _IDS)
        moved = shifted(table, self._tokens, self._records)
        for name in _ARRAYS:
            values = getattr(moved, name)
            values = values[1:] if name == "offsets" and self._types else values
            self._open[name].write(np.ascontiguousarray(values).data)
        self._types = {name: (getattr(moved, name).dtype.str, getattr(moved, name).shape[1:]) for name in _ARRAYS}
        self._ids.write_table(pa.table({"id": list(table.ids)}, schema=_IDS))
        self._tokens += len(table.tokens)
        self._records += len(table.ids)

    def table(self) -> ExampleTable:
        """All examples, mapped where they are in files; nothing can be added after."""
        if self._stem is None or self._ids is None:
            return join_tables(self._tables)
        self._ids.close()
        self._files.close()
        write_json(_file(self._stem, "types"), self._types)
        return open_table(self._stem)


def open_table(stem: Path) -> ExampleTable:
    """The table that a `TableWriter` has put in files, mapped."""
    types = json.loads(_file(stem, "types").read_text(encoding="utf-8"))
    arrays = {name: _mapped(_file(stem, name), np.dtype(kind), tuple(shape)) for name, (kind, shape) in types.items()}
    return ExampleTable(**arrays, ids=MappedNames(_file(stem, "ids")))


def cached(folder: Path, key: str, make: Callable[[Path], None]) -> Path:
    """`folder`/`key`, filled by `make` where it is not there whole; processes that want it too wait.

    To prove it, all of it is read; processes do that side by side.

    Raises:
        ConfigError: the cache folder cannot be written or locked.
    """
    what = f"data.cache={folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{key}.lock").open("w+")
    except OSError as error:
        raise ConfigError(f"{what} cannot be written ({error.strerror}); choose another folder") from None
    path = folder / key
    with lock:
        flock(lock, fcntl.LOCK_SH, what)
        if _damage(path) is None:
            return path
        flock(lock, fcntl.LOCK_UN, what)
        flock(lock, fcntl.LOCK_EX, what)
        damage = _damage(path)  # again: another process may have made it in between
        if damage:
            if path.exists():
                logger.warning("%s: %s; the cached data are made again", path, damage)
            with new_folder(path) as aside:
                make(aside)
                write_json(aside / MANIFEST, {file.name: sha256(file) for file in sorted(aside.iterdir())})
    return path


def content_key(parts: Sequence[Any]) -> str:
    """A name for what follows from `parts` (JSON values), in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def content_hash(source: str) -> str:
    """What a source holds: sha256 of a file, or of a folder's names and files; of a hub dataset its pinned name.

    Raises:
        ConfigError: a hub dataset whose revision is no commit hash, so its content can change.
    """
    if is_hub(source):
        if not _COMMIT.search(source):
            raise ConfigError(f"{source}: data.cache needs a revision that is a commit hash of 40 hexadecimal digits")
        return source
    path = Path(source)
    if path.is_dir():
        return content_key([[file.name, sha256(file)] for file in sorted(path.iterdir()) if file.is_file()])
    return sha256(path)


def _file(stem: Path, name: str) -> Path:
    return stem.with_name(f"{stem.name}.{name}")


def _mapped(path: Path, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty((0, *shape), dtype=kind)
    return np.memmap(path, dtype=kind, mode="r").reshape(-1, *shape)


def _damage(path: Path) -> str | None:
    """What is wrong with a cached folder; None: nothing."""
    try:
        sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        wrong = [name for name, expected in sums.items() if sha256(path / name) != expected]
    except (OSError, ValueError, AttributeError) as error:
        return f"it is not whole ({error})"
    return f"{', '.join(wrong)} changed since it was written" if wrong else None
