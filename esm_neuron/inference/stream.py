"""The one streaming engine: pieces of the input in its order, each answered, written as a part, joined at the end.

A piece is answered by one data-parallel rank from first to last, so its answers do not depend on how many ranks there
are, nothing is collected over the network, and what is held at once is one piece. All ranks read the input; the folder
of the parts must be one that all of them see.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeAlias, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file
from tqdm import tqdm

from esm_neuron.backends.base import Backend
from esm_neuron.config import require
from esm_neuron.data.loader import prefetch
from esm_neuron.data.records import RESIDUE_JOINER
from esm_neuron.distributed import main_rank_only, raise_on_any_rank
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.files import claimed, new_file, write_json

T = TypeVar("T")

Advance = Callable[[int], None]
"""Told how many tokens have been answered."""


@dataclass(frozen=True)
class Piece(Generic[T]):
    """Some records in the order of the input."""

    content: T
    tokens: int
    """Tokens that the model is given for it, about."""
    digest: bytes
    """Hash of the content."""


Pieces = Callable[[], Iterable[Piece[T]]]
"""Reads the input from its beginning: the same pieces each time."""


@dataclass(frozen=True)
class Survey:
    """What the first reading of the input has found."""

    tokens: tuple[int, ...]
    """Of each piece."""
    digest: str
    """Hash of the whole input, in hexadecimal."""


def read_once(backend: Backend, pieces: Pieces[T]) -> Survey:
    """Read the input to its end before a piece is answered: a fault in its last record is found first.

    Raises:
        DataError: a record cannot be used, or the ranks read different ones.
    """

    def read() -> Survey:
        digest, tokens = hashlib.sha256(), list[int]()
        for piece in pieces():
            digest.update(piece.digest)
            tokens.append(piece.tokens)
        return Survey(tuple(tokens), digest.hexdigest())

    survey = raise_on_any_rank(backend, read)
    if len(set(backend.gather_host(survey.digest))) > 1:
        raise DataError("the ranks read different rows; give every node the same files")
    return survey


def stream(
    backend: Backend,
    target: Path,
    survey: Survey,
    identity: Mapping[str, Any],
    pieces: Pieces[T],
    answer: Callable[[T, Advance], Predictions],
    resume: bool,
    log: Callable[[str], None],
) -> int:
    """Answer every piece and write `target`.

    Args:
        target: the output, in a format of `parts`.
        survey: of the same pieces.
        identity: model and settings that decide the answers; a run that is resumed must have the same.
        answer: makes the rows of a piece, in its order; called on all ranks of a tensor-parallel group.
        resume: go on with the parts that a killed run left.
        say: told what is resumed.

    Returns:
        Rows written, on every rank.

    Raises:
        EsmNeuronError: a piece cannot be answered; there are parts of another run. `target` is then as it was.
    """
    parts, topology, count = Parts(target), backend.topology, len(survey.tokens)
    with ExitStack() as held:
        main_rank_only(backend, lambda: held.enter_context(claimed(parts.folder)))
        begin = main_rank_only(backend, lambda: parts.begin({**identity, "input": survey.digest}, resume))
        done = set(backend.gather_host(begin)[0] or [])
        raise_on_any_rank(backend, parts.check_shared)
        if done:
            log(f"resumed: {len(done)} of {count} parts are there already")
        todo = [number for number in range(count) if number not in done]
        mine = set(todo[topology.dp_rank :: topology.dp])
        bar = tqdm(
            total=sum(survey.tokens[number] for number in mine),
            unit="token",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (topology.is_main and sys.stderr.isatty()),
        )

        def advance(tokens: int) -> None:
            bar.update(tokens)

        def work() -> None:
            for number, piece in _chosen(pieces(), mine, survey.digest):
                predictions = answer(piece.content, advance)
                if topology.tp_rank == 0:
                    parts.write(number, predictions)

        with bar:
            raise_on_any_rank(backend, work)
        rows = main_rank_only(backend, lambda: parts.join(count))
    return int(backend.gather_host(rows)[0] or 0)


def _chosen(pieces: Iterable[Piece[T]], numbers: set[int], expected: str) -> Iterator[tuple[int, Piece[T]]]:
    """The pieces of some numbers, read ahead by a thread; at the end the whole input must be what it was before."""
    digest = hashlib.sha256()

    def wanted() -> Iterator[tuple[int, Piece[T]]]:
        for number, piece in enumerate(pieces):
            digest.update(piece.digest)
            if number in numbers:
                yield number, piece

    if numbers:
        yield from prefetch(wanted(), 1)
        if digest.hexdigest() != expected:
            raise DataError("the input has changed while it was answered; leave it as it is and start anew")


MANIFEST = "manifest.json"
SAFETENSORS = ".safetensors"
HEADER_LIMIT = 100_000_000
"""Longest header of a safetensors file in bytes, a limit of the format's readers."""

Predictions: TypeAlias = "pa.Table | dict[str, np.ndarray]"
"""Rows of a part; or by record id its array, for safetensors."""


class Parts:
    """The parts of one output.

    Args:
        target: the output; its suffix, one of `SUFFIXES` or `.safetensors`, is its format.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f"{target.name}.parts")
        """Holds the parts until the output is written."""
        self._suffix = SAFETENSORS if target.suffix.lower() == SAFETENSORS else ".parquet"

    def begin(self, identity: Mapping[str, Any], resume: bool) -> list[int]:
        """Make the folder, or enter the one of a run that was killed.

        Args:
            identity: what the answers are made from, in JSON's types.
            resume: go on where such a run stopped.

        Returns:
            Numbers of the parts that are there already.

        Raises:
            ConfigError: there are parts and `resume` is False, or they were made from something else.
        """
        done = self._finished()
        require(
            resume or not done,
            f"{self.folder}: holds {len(done)} parts of answers that were not finished; go on with --resume, or remove "
            "that folder to start anew",
        )
        known = self._known() if done else identity
        different = [key for key in sorted(identity.keys() | known.keys()) if identity.get(key) != known.get(key)]
        if different:
            raise ConfigError(
                f"{self.folder}: was begun with another {' and another '.join(different)}; give --resume the same, or "
                "remove that folder to start anew"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / MANIFEST, identity)
        return done

    def _known(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); remove that folder to start anew") from error
        return known

    def _finished(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob(f"[0-9]*{self._suffix}"))

    def check_shared(self) -> None:
        """Raise ConfigError where this rank does not see the folder that the main rank has made."""
        require(
            (self.folder / MANIFEST).is_file(),
            f"{self.folder}: is not seen by every rank; name an output on a file system that all nodes share",
        )

    def path(self, number: int) -> Path:
        """Where part `number`, from 0, is or will be."""
        return self.folder / f"{number:08d}{self._suffix}"

    def write(self, number: int, predictions: Predictions) -> None:
        """Write a part in one move."""
        with new_file(self.path(number)) as aside:
            if isinstance(predictions, pa.Table):
                pq.write_table(predictions, aside)
            else:
                save_file(predictions, aside)

    def join(self, count: int) -> int:
        """Write the output from parts 0 to `count` - 1 and remove them.

        Returns:
            Its rows, or its arrays.

        Raises:
            DataError: a part is missing.
        """
        paths = [self.path(number) for number in range(count)]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise DataError(f"{self.folder}: {len(missing)} parts are missing, the first is {missing[0]}; use --resume")
        with new_file(self.target) as aside:
            joined = _join_arrays if self._suffix == SAFETENSORS else JOIN[self.target.suffix.lower()]
            total = joined(paths, aside)
        shutil.rmtree(self.folder)
        return total


def _tables(paths: Sequence[Path]) -> Iterator[pa.Table]:
    return (pq.read_table(path) for path in paths)


def _join_csv(paths: Sequence[Path], target: Path, *, separator: str) -> int:
    rows = 0
    with target.open("w", encoding="utf-8", newline="") as file:
        for table in _tables(paths):
            frame = _flat(table)
            frame.to_csv(file, index=False, header=rows == 0, sep=separator, float_format="%.7g", lineterminator="\n")
            rows += len(frame)
    return rows


def _flat(table: pa.Table) -> pd.DataFrame:
    """A table whose lists are text, such as values of each residue: numbers with 7 digits, joined by a comma."""
    frame = table.to_pandas()
    for field in table.schema:
        if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
            frame[field.name] = [RESIDUE_JOINER.join(map(_short, values)) for values in frame[field.name]]
    return frame


def _short(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, (float, np.floating)) else str(value)


def _join_parquet(paths: Sequence[Path], target: Path) -> int:
    schema = pq.read_schema(paths[0])
    with pq.ParquetWriter(target, schema) as writer:
        for table in _tables(paths):
            writer.write_table(table)
    return int(pq.read_metadata(target).num_rows)


def _join_jsonl(paths: Sequence[Path], target: Path) -> int:
    rows = 0
    with target.open("w", encoding="utf-8") as file:
        for table in _tables(paths):
            for row in table.to_pylist():
                file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
            rows += table.num_rows
    return rows


def _join_arrays(paths: Sequence[Path], target: Path) -> int:
    """Safetensors from safetensors without holding a tensor: headers merged, data copied behind each other.

    The format: 8 bytes with the header's length (little endian), the header in JSON, the data.
    https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {}
    end = 0
    for path in paths:
        with _data(path) as (entries, _):
            for name, entry in entries.items():
                header[name] = {**entry, "data_offsets": [end + offset for offset in entry["data_offsets"]]}
            end += max(entry["data_offsets"][1] for entry in entries.values())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ConfigError(
            f"{target}: {len(header)} arrays need a header of {len(text)} bytes, safetensors allows {HEADER_LIMIT}; "
            "name a .parquet file with --output"
        )
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for path in paths:
            with _data(path) as (_, data):
                shutil.copyfileobj(data, file, 1 << 20)
    return len(header)


@contextmanager
def _data(path: Path) -> Iterator[tuple[dict[str, Any], BinaryIO]]:
    """The entries of a safetensors file, and the file at its first byte of data."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        yield entries, file


def _join_tsv(paths: Sequence[Path], target: Path) -> int:
    return _join_csv(paths, target, separator="\t")


def _join_comma(paths: Sequence[Path], target: Path) -> int:
    return _join_csv(paths, target, separator=",")


JOIN: dict[str, Callable[[Sequence[Path], Path], int]] = {
    ".csv": _join_comma,
    ".tsv": _join_tsv,
    ".parquet": _join_parquet,
    ".jsonl": _join_jsonl,
}
"""Suffix of a table -> (parts, target) -> rows written."""


def check_target(target: Path, suffixes: Sequence[str]) -> Path:
    """`target`, if its suffix is one of `suffixes` and it is no folder; else ConfigError."""
    require(
        target.suffix.lower() in suffixes,
        f"--output {target}: unknown format {target.suffix!r}; name the file with one of {' '.join(suffixes)}",
    )
    require(not target.is_dir(), f"--output {target}: this is a folder; name a file in it")
    return target


def read_back(target: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Some columns of a table that `Parts.join` wrote."""
    suffix = target.suffix.lower()
    if suffix == ".parquet":
        return pd.read_parquet(target, columns=list(columns))
    if suffix == ".jsonl":
        return pd.read_json(target, lines=True, precise_float=True)[list(columns)]
    return pd.read_csv(target, usecols=list(columns), sep="\t" if suffix == ".tsv" else ",")
