"""The one streaming engine: pieces of the input in its order, each answered, written as a part, joined at the end.

A piece is answered by one data-parallel rank from first to last, so its answers do not depend on how many ranks there
are, nothing is collected over the network, and what is held at once is one piece. All ranks read the input; the folder
of the parts must be one that all of them see.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from esm_neuron.agreement import agree, agree_on_main
from esm_neuron.answers.parts import Answers, Parts
from esm_neuron.backends.base import Backend
from esm_neuron.data.loader import prefetch
from esm_neuron.errors import DataError
from esm_neuron.files import claimed

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

    survey = agree(backend, read)
    if len(set(backend.gather_host(survey.digest))) > 1:
        raise DataError("the ranks read different rows; give every node the same files")
    return survey


def stream(
    backend: Backend,
    target: Path,
    survey: Survey,
    identity: Mapping[str, Any],
    pieces: Pieces[T],
    answer: Callable[[T, Advance], Answers],
    resume: bool,
    say: Callable[[str], None],
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
        agree_on_main(backend, lambda: held.enter_context(claimed(parts.folder)))
        begin = agree_on_main(backend, lambda: parts.begin({**identity, "input": survey.digest}, resume))
        done = set(backend.gather_host(begin)[0] or [])
        agree(backend, parts.check_shared)
        if done:
            say(f"resumed: {len(done)} of {count} parts are there already")
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
                answers = answer(piece.content, advance)
                if topology.tp_rank == 0:
                    parts.write(number, answers)

        with bar:
            agree(backend, work)
        rows = agree_on_main(backend, lambda: parts.join(count))
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
