"""Write files that are either whole or not there: write aside, flush to the disk, rename."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from esm_neuron.errors import ConfigError


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write; the file replaces `path` if the block succeeds, and is removed if it fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        fsync(aside)
        aside.replace(path)
        fsync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path` in one move."""
    with new_file(path) as aside:
        aside.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Replace the content of `path` by `value` as indented JSON; NaN is refused, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return `value` with every NaN and infinity inside replaced by None: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write numpy arrays or torch tensors as safetensors; raise OSError where that fails, as other writes do."""
    arrays = any(type(tensor).__module__.partition(".")[0] == "numpy" for tensor in tensors.values())
    library = import_module("safetensors.numpy" if arrays else "safetensors.torch")
    try:
        library.save_file(dict(tensors), path, None if arrays else {"format": "pt"})
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it replaces `path` if the block succeeds, and is removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        # Contents first, then the folder, then the rename: after a crash the name leads to everything or to nothing
        # new.
        for file in aside.iterdir():
            fsync(file)
        fsync(aside)
        shutil.rmtree(path, ignore_errors=True)
        aside.replace(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


JSON_LIMIT = 1 << 26
"""Largest JSON file in bytes that is read whole; our own have a few megabytes at most."""


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raise OSError or ValueError where it is not readable, too large or not JSON."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        content = file.read(JSON_LIMIT + 1)
    if len(content) > JSON_LIMIT:
        raise ValueError(f"more than {JSON_LIMIT} bytes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def flock(lock: IO[str], operation: int, what: str) -> None:
    """Call `fcntl.flock`; raise ConfigError, which names the setting `what`, where the file system has no locks."""
    try:
        fcntl.flock(lock, operation)
    except BlockingIOError:
        raise
    except OSError as error:  # ENOSYS, EOPNOTSUPP, ENOLCK: as on Lustre without `flock`
        raise ConfigError(
            f"{what} cannot be locked ({error.strerror}); choose a folder on a file system with locks, or mount this "
            "one with them (Lustre: mount -o flock)"
        ) from error


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock `folder` until the block ends or the process dies; raise ConfigError where another process uses it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be written ({error.strerror}); choose another --output") from error
    with lock:
        try:
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, f"output={folder}")
        except BlockingIOError as error:
            raise ConfigError(
                f"output={folder} is in use by a running process; wait for it or choose another --output"
            ) from error
        yield
