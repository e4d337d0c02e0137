"""A cache of folders, named by what is in them.

A folder is made by one process while others wait, appears whole or not at all, and is proven by its checksums each
time it is opened: a damaged one is made again, with a warning.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from esm_neuron.data.records import files_of, is_hub
from esm_neuron.data.remote import is_remote, open_remote
from esm_neuron.errors import ConfigError
from esm_neuron.files import MANIFEST, digest_of, flock, new_folder, open_lock, read_json, sha256, write_json

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"@[0-9a-f]{40}/")


def cached(folder: Path, key: str, make: Callable[[Path], None]) -> Path:
    """Return `folder`/`key`, filled by `make` where it is not there whole; processes that want it too wait.

    Every file is read to check its sum; processes do that side by side.
    Raise ConfigError where the cache folder cannot be written or locked.
    """
    what = f"data.cache={folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_lock(folder / f".{key}.lock")
    except OSError as error:
        raise ConfigError(f"{what} cannot be written ({error.strerror}); choose another folder") from None
    path = folder / key
    with lock:
        # Readers share the lock and check sums side by side; whoever must make the folder waits for it alone.
        flock(lock, fcntl.LOCK_SH, what)
        if _damage(path) is None:
            return path
        # A shared lock does not become an exclusive one in one step, so another process may come in between.
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
    """Return a name for what follows from `parts` (JSON values), in hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def content_hash(source: str) -> str:
    """Return the sha256 of a file, or of a folder's names and files; of a hub dataset its pinned name."""
    if is_hub(source):
        if not _COMMIT.search(source):  # the content of a branch or a tag can change
            raise ConfigError(f"{source}: data.cache needs a revision that is a commit hash of 40 hexadecimal digits")
        return source
    if is_remote(source):
        with open_remote(source) as file:
            return digest_of(file)
    files = files_of(source)
    if files != ((source, None),):
        return content_key([[label, content_hash(file)] for file, label in files])
    path = Path(source)
    if path.is_dir():
        return content_key([[file.name, sha256(file)] for file in sorted(path.iterdir()) if file.is_file()])
    return sha256(path)


def _damage(path: Path) -> str | None:
    """Return what is wrong with a cached folder, None where nothing is."""
    try:
        sums = read_json(path / MANIFEST, {"*": str})
        wrong = [name for name, expected in sums.items() if sha256(path / name) != expected]
    except (OSError, ValueError) as error:
        return f"it is not whole ({error})"
    return f"{', '.join(wrong)} changed since it was written" if wrong else None
