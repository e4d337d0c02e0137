"""The one door to the disk: read with bounds, written whole or not at all, and nothing replaced that is not ours.

What is written goes aside, is flushed to the disk, and is renamed. A folder that commands write to keeps a ledger of
what they wrote there; a name that is not in it belongs to somebody else, and is refused before work starts. No other
module opens files to write, deletes folders, or decodes JSON: `tests/unit/test_doors.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError

from esm_neuron.errors import ConfigError

MANIFEST = "manifest.json"
"""In a folder that is made whole (a checkpoint, cached data, shards): what is in it."""
LEDGER = ".esm-neuron.json"
"""In a folder that commands write to: the names that they wrote there."""

# --- reading

JSON_LIMIT = 1 << 26
"""Largest JSON file in bytes that is read whole; our own have a few megabytes at most."""


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Return the value that a JSON text is; raise ValueError where it is none, or nests too deeply."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """Return the content of a regular file. Raise OSError where it cannot be read, ValueError where it is too large."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        content = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(content) > limit:
        raise ValueError(f"more than {limit} bytes")
    return content


def read_json(path: Path, form: Any = object, kind: type[Exception] | None = None, cure: str = "") -> Any:
    """Return the value in a JSON file, which must have the `form`, see `misfit`.

    Where it is not readable, too large, not JSON, or has another form, raise OSError or ValueError; or an error of a
    `kind` that names the file and the `cure`.
    """
    try:
        value = parse_json(read_bytes(path))
        if wrong := misfit(value, form):
            raise ValueError(wrong)
    except (OSError, ValueError) as error:
        if kind is None:
            raise
        raise kind(f"{path}: cannot be read ({error}); {cure}") from error
    return value


NUMBER = (int, float)
NOTHING = type(None)


def misfit(value: Any, form: Any, name: str = "the value") -> str:
    """Return what is wrong with a value of JSON, "" where it has the `form`.

    A form is a type, where numbers must be finite and of 64 bits; a tuple of forms, of which one must fit; a list with
    the form of each entry; a function that returns whether it fits; or a dict with the form of each key, which may be
    missing if it is written `key?`, and with that of all others under `*` (without it they may be anything).
    """
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{name} is no JSON object"
        names = {key.removesuffix("?") for key in form}
        missing = next((key for key in form if key not in value and key != "*" and not key.endswith("?")), None)
        if missing is not None:
            return f"{name} has no {missing}"
        forms = {key: form.get(key, form.get(f"{key}?")) if key in names else form.get("*", object) for key in value}
        return next(filter(None, (misfit(value[key], inner, f"{name}.{key}") for key, inner in forms.items())), "")
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        return next(filter(None, (misfit(item, form[0], f"{name}[{at}]") for at, item in enumerate(value))), "")
    if isinstance(form, tuple):
        wrong = [misfit(value, each, name) for each in form]
        return "" if "" in wrong else wrong[-1]
    if not isinstance(form, type):
        fits = bool(form(value))
    elif isinstance(value, (bool, int, float)) and form is not object:
        fits = type(value) is form and (math.isfinite(value) if form is float else abs(value) < 2.0**63)
    else:
        fits = isinstance(value, form)
    return "" if fits else f"{name} is {str(value)[:60]!r}"


def count_lines(path: Path) -> int:
    """Return the line breaks in a file of any size."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    if path.exists() and not path.is_file():
        raise OSError(0, "not a regular file", str(path))
    with path.open("rb") as file:
        return digest_of(file)


def digest_of(file: IO[bytes]) -> str:
    """Return the SHA-256 of what is left to read of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


# --- writing


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@cache
def machine_name() -> str:
    """Return a short name of this machine since it booted, and of its processes' numbering, which a container has."""
    parts = [os.uname().nodename]  # many hosts are called localhost
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:6]


def _aside(path: Path) -> Path:
    """Return where to write what will be `path`, after removing what killed processes left there."""
    name = path.name if len(os.fsencode(path.name)) < 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    left = re.compile(rf"\.{re.escape(name)}\.{machine_name()}-(\d+)(-old)?\.tmp")
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            found = left.fullmatch(entry.name)
            if found and (int(found[1]) == os.getpid() or not _runs(int(found[1]))):
                if found[2] and not os.path.lexists(path):  # killed between two renames
                    os.rename(entry.path, path)
                remove(Path(entry.path))
    return path.with_name(f".{name}.{machine_name()}-{os.getpid()}.tmp")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def remove(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link but not what it leads to; nothing is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write; the file replaces `path` if the block succeeds, and is removed if it fails."""
    aside = _aside(path)
    try:
        yield aside
        fsync(aside)
        aside.replace(path)
        fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):
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


def append_line(path: Path, text: str) -> None:
    """Append a line to a file; an error of the file system names it."""
    try:
        # Buffered: an unbuffered write to a full disk may write half a line and report no error.
        with path.open("ab") as file:
            file.write(f"{text}\n".encode())
    except OSError as error:
        error.filename = str(path)
        raise


def finite(value: Any) -> Any:
    """Return `value` with every NaN and infinity inside replaced by None: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_new(path: Path, mode: str = "w") -> IO[Any]:
    """Open a file that `new_file` gave, to write text in UTF-8 (`w`), its line ends as they are, or bytes (`wb`)."""
    return open(path, mode) if "b" in mode else open(path, mode, encoding="utf-8", newline="")


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


def scratch(shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 zeros that lie in a temporary file, which is gone when nothing uses them any more.

    Raise OSError where the disk has no room for them: later that would be a signal, which ends the process.
    """
    with tempfile.TemporaryFile(prefix="esm-neuron-") as file:
        if hasattr(os, "posix_fallocate"):  # Linux
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
        return np.memmap(file, np.float32, "w+", shape=shape)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it replaces `path` if the block succeeds, and is removed if it fails.

    Raise ConfigError where `path` holds what we did not write. In a folder with a ledger, its files are noted there.
    """
    check_ours(path.parent, [path.name])
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    aside.mkdir()
    old = aside.with_name(f"{aside.name[:-4]}-old.tmp")
    try:
        yield aside
        # Contents first, then the folder, then the rename: after a crash the name leads to everything or to nothing
        # new.
        for file in aside.iterdir():
            fsync(file)
        fsync(aside)
        if (path.parent / LEDGER).is_file():
            note(path.parent, [f"{path.name}/{file.relative_to(aside).as_posix()}" for file in _files(aside)])
        if os.path.lexists(path):
            path.rename(old)
        aside.rename(path)
        fsync(path.parent)
    finally:
        if os.path.lexists(old) and not os.path.lexists(path):  # the second rename failed: what was there comes back
            old.rename(path)
        for left in (aside, old):
            with contextlib.suppress(OSError):
                remove(left)


# --- whose it is


def _files(folder: Path) -> Iterator[Path]:
    """Yield what is below a folder and is no folder itself, links to folders included."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place, name) for name in (*files, *links))


def check_ours(folder: Path, names: Iterable[str]) -> None:
    """Raise ConfigError where `folder` has one of `names` and we did not write it: we are about to replace it.

    Ours is what the ledger of the folder names, a folder whose manifest lists its files, and an empty folder.
    """
    ledger = None
    for name in names:
        path = folder / name
        if not os.path.lexists(path) or _is_listed(path):
            continue
        if ledger is None:
            ledger = _ledger(folder)
        for file in [path] if path.is_symlink() or not path.is_dir() else _files(path):
            if file.relative_to(folder).as_posix() not in ledger:
                raise ConfigError(
                    f"{file} is in the way: esm-neuron would replace it, and did not write it; move it, or choose "
                    "another output"
                )


_HASH = re.compile("[0-9a-f]{32}")


def _is_listed(folder: Path) -> bool:
    """Return whether a folder has a manifest of ours that names all of its files, or a name that only we give."""
    if _HASH.fullmatch(folder.name) and (folder / MANIFEST).is_file():  # cached data, whose manifest may be damaged
        return True
    try:
        said = read_json(folder / MANIFEST, {})
    except (OSError, ValueError):
        return False
    listed = {*said, *(said.get("files") or ()), MANIFEST} if isinstance(said.get("files", {}), dict) else {MANIFEST}
    return all(file.relative_to(folder).as_posix() in listed for file in _files(folder))


def _ledger(folder: Path, kind: str = "wrote") -> set[str]:
    try:
        return set(read_json(folder / LEDGER, {"wrote": [str], "outputs": [str]})[kind])
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return set()


def note(folder: Path, names: Iterable[str], kind: str = "wrote") -> None:
    """Note in the ledger of `folder` names that we write there, `folder/file` for those of a folder in it.

    What a command was told to write there (`--output`) is of the `kind` outputs, and may be replaced by another one.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Of two commands that end together, each would write what it has read and lose what the other notes. The ledger
        # is replaced, so the folder is locked. Where that cannot be (NFS), there are few commands at the same moment.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        known = {each: _ledger(folder, each) for each in ("wrote", "outputs")}
        known[kind] |= set(names)
        write_json(folder / LEDGER, {each: sorted(found) for each, found in known.items()})
    finally:
        os.close(handle)


def note_output(path: Path) -> None:
    """Note an output where its folder has a ledger: a run's, whose own files no output may replace."""
    if (path.parent / LEDGER).is_file():
        note(path.parent, [path.name], "outputs")


def check_apart(
    option: str, target: Path, inputs: Mapping[str, Iterable[str]], model: str | Path | None = None
) -> None:
    """Raise ConfigError where an output is one of the inputs, or in one, by this name, a link or another spelling.

    Each of `inputs` is named by its option. In the folder of a `model` an output must have a name of its own, or that
    of an earlier output.
    """
    place = Path(os.path.realpath(target))  # `resolve` raises where links go round
    for name, files in {**inputs, "--model": [] if model is None else [str(model)]}.items():
        for file in filter(os.path.exists, files):
            source = Path(os.path.realpath(file))
            same = source == place or (target.exists() and os.path.samefile(target, source))
            if source in place.parents and source.is_dir():
                same = name != "--model" or place.parent != source or not _is_free(target)
            if same:
                raise ConfigError(
                    f"{option} {target} would replace what {name} {file} names or holds; name another output"
                )


def _is_free(path: Path) -> bool:
    """Return whether a file in the folder of a model is an earlier output, or is neither there nor a run's own."""
    if path.name in _ledger(path.parent, "outputs"):
        return True
    return not (os.path.lexists(path) or path.suffix == ".safetensors" or path.name in _ledger(path.parent))


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


def open_lock(path: Path) -> IO[str]:
    """Open a file to lock, made if it is not there; what it holds stays, and a link is refused."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock `folder` until the block ends or the process dies; raise ConfigError where another process uses it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_lock(folder / ".lock")
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
