"""Stream predictions for an input of any size: cut it into pieces, predict each, write it as a shard, join the shards.

One data-parallel rank predicts a piece from first to last, so the predictions do not depend on the number of ranks,
nothing is gathered over the network, and memory holds one piece. The main rank reads the input, once (`spool.py`), and
every rank must see the folder of the shards.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from esm_neuron.config import require
from esm_neuron.config.deferred import module
from esm_neuron.data.loader import prefetch
from esm_neuron.data.parquet import open_table, read_table
from esm_neuron.data.records import RESIDUE_JOINER, files_of
from esm_neuron.data.validation import check_rejected, rejected_path
from esm_neuron.distributed import from_main_rank, main_rank_only, raise_on_any_rank
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.files import (
    MANIFEST,
    check_apart,
    claimed,
    new_file,
    note_output,
    open_new,
    parse_json,
    read_json,
    remove,
    save_tensors,
    sha256,
    write_json,
)
from esm_neuron.inference.spool import FACTS, SPOOL, InputScan, Source, Spool, scan

if TYPE_CHECKING:
    import h5py
    import pandas as pd

    from esm_neuron.backends.base import Backend
else:
    h5py, pd = module("h5py"), module("pandas")

T = TypeVar("T")

Advance = Callable[[float], Any]
"""Called with the number of tokens that have just been predicted; a part of it where several models predict."""
Predictions: TypeAlias = "pa.Table | dict[str, np.ndarray]"
"""Rows of a shard; or, for safetensors, record id -> its array."""


@contextmanager
def spooled(backend: Backend, target: Path, source: Source[T], stamp: str | None, resume: bool) -> Iterator[Spool[T]]:
    """Read the input to its end before anything is predicted, so that a fault in its last record is found first.

    The main rank reads, and holds the folder for the shards of `target` until the block ends. Every rank raises
    DataError where a record cannot be used, and ConfigError where the folder is in use, or where it holds shards and
    `resume` is False.
    """
    folder = shards_folder(target)
    with ExitStack() as held:
        main_rank_only(backend, lambda: held.enter_context(_claimed_shards(target, resume)))
        yield Spool(folder, source, from_main_rank(backend, lambda: scan(folder, source, stamp, resume)))


@contextmanager
def _claimed_shards(target: Path, resume: bool) -> Iterator[None]:
    """Hold the folder, so that no second command writes there; an error that leaves no shards removes it."""
    folder = shards_folder(target)
    with claimed(folder):
        check_shards(target)
        there = _shards_in(target)
        require(
            resume or not there,
            f"{folder}: holds {len(there)} shards of unfinished predictions; go on with --resume, or remove that "
            "folder to start again",
        )
        try:
            yield
        except Exception:
            if not _shards_in(target):
                _remove_shards(folder)
            raise


def stream(
    backend: Backend,
    target: Path,
    spool: Spool[T],
    identity: Mapping[str, Any],
    predict: Callable[[T, Advance], Predictions],
    log: Callable[[str], None],
) -> int:
    """Predict every piece and write `target`; return the number of rows, on every rank. A failure leaves it unchanged.

    Args:
        target: the output; its suffix is a key of `JOIN` or `JOIN_EMBEDDINGS`.
        spool: what `spooled` gives for it; shards of it that are there already are used.
        identity: model and settings that decide the predictions; a resumed command must have the same.
        predict: returns the rows of a piece, in its order; called on all ranks of a tensor-parallel group.
    """
    scanned = spool.scanned
    if target.suffix.lower() == SAFETENSORS:  # before any work, where even the shortest names would be too many
        check_header(target, arrays := sum(scanned.rows), arrays * LEAST_ENTRY)
    shards = Shards(target, {**identity, "input": scanned.digest}, scanned)
    topology, count = backend.topology, len(scanned.tokens)
    done = set(from_main_rank(backend, shards.begin))
    raise_on_any_rank(backend, shards.check_shared)
    if done:
        log(f"resumed: {len(done)} of {count} shards are already there")
    for line in shards.refused:
        log(line)
    todo = [number for number in range(count) if number not in done]
    # What is left is dealt out anew: a resumed command may run on another number of ranks.
    mine = todo[topology.dp_rank :: topology.dp]
    total, hidden = sum(scanned.tokens[number] for number in mine), not (topology.is_main and sys.stderr.isatty())
    bar = tqdm(total=total, desc=target.name, unit="token", unit_scale=True, dynamic_ncols=True, disable=hidden)

    def work() -> None:
        for number, content in prefetch(((number, spool[number]) for number in mine), 1):
            predictions = predict(content, bar.update)
            if topology.tp_rank == 0:
                shards.write(number, predictions)

    with bar:
        try:
            raise_on_any_rank(backend, work)
        except KeyboardInterrupt:
            log(f"{shards.folder} keeps what was predicted so far; go on with the same command and --resume")
            raise
    return from_main_rank(backend, shards.join)


SAFETENSORS, H5 = ".safetensors", ".h5"
HEADER_LIMIT = 100_000_000
"""Longest header in bytes that readers of safetensors accept."""
LEAST_ENTRY = 66
"""Bytes in it for an array, of a million or more: the name of one letter, eight numbers, places of eight digits."""


def check_header(target: Path, arrays: int, size: int) -> None:
    """Raise ConfigError where a safetensors file of so many arrays needs a header of `size` bytes and may not."""
    require(
        size <= HEADER_LIMIT,
        f"{target}: {arrays} arrays need a header of at least {size} bytes, safetensors allows {HEADER_LIMIT}; name a "
        ".parquet file with --output",
    )


class Shards:
    """The shards of one output, `target`, whose suffix is its format; they lie in a folder until it is written."""

    def __init__(self, target: Path, identity: Mapping[str, Any], scanned: InputScan) -> None:
        self.target, self.folder, self._suffix = target, shards_folder(target), shard_suffix(target)
        self._identity, self._scanned = identity, scanned
        self.refused: list[str] = []
        """What is wrong with shards that are there and are predicted anew."""

    def begin(self) -> list[int]:
        """Return the numbers of the shards that a killed command left and that can be used.

        Raise ConfigError where they were made with another `identity`.
        """
        there = _shards_in(self.target)
        identity, cure = self._identity, "remove that folder to start again"
        known = read_json(self.folder / MANIFEST, {}, ConfigError, cure) if there else identity
        different = [key for key in sorted(identity.keys() | known.keys()) if identity.get(key) != known.get(key)]
        require(
            not different,
            f"{self.folder}: was begun with another {' and another '.join(different)}; give --resume the same, or "
            f"{cure}",
        )
        write_json(self.folder / MANIFEST, identity)
        return [number for number in there if number < len(self._scanned.rows) and self._is_sound(number)]

    def _is_sound(self, number: int) -> bool:
        """Return whether a shard is as it was written, for its piece and no other."""
        path = self.path(number)
        try:
            said = read_json(path.with_suffix(".json"))
            wrong = "answers another piece" if said != self._facts(number, path) else ""
        except (OSError, ValueError) as error:
            wrong = f"cannot be read ({error})"
        if wrong:
            self.refused.append(f"{path}: {wrong} or was changed, so it is predicted again")
        return not wrong

    def _facts(self, number: int, path: Path) -> dict[str, Any]:
        """Return what is kept beside a shard: its sum, its rows, and a hash over all that its piece depends on."""
        text = f"{number} {json.dumps(dict(self._identity), sort_keys=True)}"
        piece = hashlib.sha256(f"{text} {self._scanned.digests[number]}".encode()).hexdigest()
        return {"piece": piece, "rows": self._scanned.rows[number], "sha256": sha256(path)}

    def check_shared(self) -> None:
        """Raise ConfigError where this rank does not see the folder that the main rank has made."""
        require(
            (self.folder / MANIFEST).is_file(),
            f"{self.folder}: not every rank sees it; name an output on a file system that all nodes share",
        )

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}{self._suffix}"

    def write(self, number: int, predictions: Predictions) -> None:
        """Write a shard in one move."""
        with new_file(self.path(number)) as aside:
            if isinstance(predictions, pa.Table):
                with open_table(aside) as append:
                    append(predictions)
            else:
                save_tensors(aside, predictions)
            write_json(self.path(number).with_suffix(".json"), self._facts(number, aside))

    def join(self) -> int:
        """Write the output from all shards, remove them, and return its number of rows or arrays."""
        paths, wanted = list(map(self.path, range(len(self._scanned.rows)))), sum(self._scanned.rows)
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise DataError(f"{self.folder}: {len(missing)} shards are missing, first {missing[0]}; use --resume")
        with new_file(self.target) as aside:
            join = {**JOIN, **JOIN_EMBEDDINGS}[self.target.suffix.lower()]
            total = join(paths, aside)
            if total != wanted:
                raise DataError(
                    f"{self.folder}: holds {total} predictions for {wanted} records; remove it, start again"
                )
        note_output(self.target)
        _remove_shards(self.folder)
        return total


def _remove_shards(folder: Path) -> None:
    """Delete the folder of shards; where it lies on NFS, the files in it that are open now go when they are closed."""
    try:
        remove(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise


def shards_folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.shards")


def shard_suffix(target: Path) -> str:
    return SAFETENSORS if target.suffix.lower() == SAFETENSORS else ".parquet"


def _shards_in(target: Path) -> list[int]:
    return sorted(int(path.stem) for path in shards_folder(target).glob(f"[0-9]*{shard_suffix(target)}"))


def check_shards(target: Path) -> None:
    """Raise ConfigError where the folder for the shards of `target` holds what no command of ours left there."""
    folder, ours = (
        shards_folder(target),
        re.compile(rf"\.lock|{MANIFEST}|{SPOOL}|{FACTS}|\d{{8}}(\.json|{shard_suffix(target)})|\..*\.tmp"),
    )
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is in the way: shards of predictions go there; move it, or name another --output")
    others = [path.name for path in folder.iterdir() if not ours.fullmatch(path.name)] if folder.is_dir() else []
    require(
        not others,
        f"{folder} holds {min(others, default='')}, which is no shard of predictions, and the folder would be "
        "deleted; move it, or name another --output",
    )


def _tables(paths: Sequence[Path]) -> Iterator[pa.Table]:
    return (read_table(path) for path in paths)


def _join_csv(paths: Sequence[Path], target: Path, *, separator: str) -> int:
    rows = 0
    with open_new(target) as file:
        writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        for table in _tables(paths):
            if not rows:
                writer.writerow(table.column_names)
            writer.writerows(zip(*(map(_short, column.to_pylist()) for column in table.columns), strict=True))
            rows += table.num_rows
    return rows


def _short(value: object) -> str:
    """Return a value as text: 7 digits of a number, nothing for NaN, and lists, of residues, joined by commas."""
    if isinstance(value, list):
        return RESIDUE_JOINER.join(f"{entry:.7g}" if isinstance(entry, float) else str(entry) for entry in value)
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.7g}"
    return "" if value is None else str(value)


def _join_parquet(paths: Sequence[Path], target: Path) -> int:
    with open_table(target) as write:
        return sum(write(table) for table in _tables(paths))


def _join_jsonl(paths: Sequence[Path], target: Path) -> int:
    rows = 0
    with open_new(target) as file:
        for table in _tables(paths):
            for row in table.to_pylist():
                file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
            rows += table.num_rows
    return rows


def _join_arrays(paths: Sequence[Path], target: Path) -> int:
    """Join safetensors files without holding a tensor: merge the headers, copy the data one behind the other.

    The format: 8 bytes with the header's length (little endian), the header in JSON, the data.
    https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {}
    end = 0
    for path in paths:
        with _data(path) as (entries, _):
            for name, entry in entries.items():
                header[name] = {**entry, "data_offsets": [end + offset for offset in entry["data_offsets"]]}
            # Offsets count from the first byte of data, so a later shard's move by all the data before it.
            end += max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces up to a multiple of 8, so that the data begin aligned.
    text += b" " * (-len(text) % 8)
    check_header(target, len(header), len(text))
    with open_new(target, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for path in paths:
            with _data(path) as (_, data):
                shutil.copyfileobj(data, file, 1 << 20)
    return len(header)


@contextmanager
def _data(path: Path) -> Iterator[tuple[dict[str, Any], BinaryIO]]:
    """Open a safetensors file of ours; yield its header's entries, and the file at its first byte of data."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = parse_json(file.read(length))
        entries.pop("__metadata__", None)
        yield entries, file


JOIN: dict[str, Callable[[Sequence[Path], Path], int]] = {
    ".csv": partial(_join_csv, separator=","),
    ".tsv": partial(_join_csv, separator="\t"),
    ".parquet": _join_parquet,
    ".jsonl": _join_jsonl,
}
"""Suffix of a table -> function of (shards, target) that writes it and returns its rows."""


def _join_h5(paths: Sequence[Path], target: Path) -> int:
    """Write embeddings as files of UniProt, bio_embeddings and biotrainer have them: a dataset of float32 per protein.

    Its name is the id, in which a slash, which would make groups, is `_`; its attribute `original_id` is the id.
    """
    rows = 0
    with h5py.File(target, "w", track_order=True) as file:
        for table in _tables(paths):
            for name, vector in zip(table["id"].to_pylist(), table["embedding"], strict=True):
                key = name.replace("/", "_") if name != "." else "_"
                if key in file:
                    raise DataError(f"{target}: {name!r} and another id are both {key!r} there; write .parquet")
                values = vector.values
                if pa.types.is_fixed_size_list(values.type):  # a vector per residue
                    array = values.flatten().to_numpy().reshape(len(values), -1)
                else:
                    array = values.to_numpy()
                file.create_dataset(key, data=array).attrs["original_id"] = name
            rows += table.num_rows
    return rows


JOIN_EMBEDDINGS = {".parquet": _join_parquet, SAFETENSORS: _join_arrays, H5: _join_h5}
"""The same of embeddings."""


def check_target(
    target: Path, suffixes: Iterable[str], model: str | Path, inputs: Mapping[str, Path | None], words: Sequence[str]
) -> None:
    """Raise ConfigError unless the suffix of `target` is one of `suffixes`, and writing it replaces nothing of others.

    That is its file, its shards and its list of rejected records. `inputs` are sources of records by their options,
    `words` settings, which may name a file.
    """
    require(
        target.suffix.lower() in suffixes,
        f"--output {target}: unknown format {target.suffix!r}; name the file with one of {' '.join(suffixes)}",
    )
    check_output(target, model, inputs, words)
    check_shards(target)


def check_output(target: Path, model: str | Path, inputs: Mapping[str, Path | None], words: Sequence[str]) -> None:
    """Check of an output what `check_target` does, but for its suffix and shards."""
    require(not target.is_dir(), f"--output {target}: this is a folder; name a file in it")
    require(not target.exists() or target.is_file(), f"--output {target}: this is no file, but a device or a pipe")
    files = {option: [name for name, _ in files_of(str(path))] for option, path in inputs.items() if path is not None}
    follows = zip(words, [*words[1:], ""], strict=False)
    files["--config"] = [
        word.partition("=")[2] or next_ for word, next_ in follows if word.partition("=")[0] == "--config"
    ]
    check_apart("--output", target, files, model)
    check_apart("--output: its", rejected_path(target), files)
    check_rejected(rejected_path(target))


def read_back(target: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Return some columns of a table that `Shards.join` wrote."""
    suffix = target.suffix.lower()
    if suffix == ".parquet":
        return pd.read_parquet(target, columns=list(columns))
    if suffix == ".jsonl":
        return pd.read_json(target, lines=True, precise_float=True)[list(columns)]
    return pd.read_csv(target, usecols=list(columns), sep="\t" if suffix == ".tsv" else ",")
