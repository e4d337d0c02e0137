"""Bars of the phases of a command, with their names and the time left: on a terminal alone, a log has lines instead."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from esm_neuron.config.deferred import module

if TYPE_CHECKING:
    import tqdm
else:
    tqdm = module("tqdm")

T = TypeVar("T")


def bar(name: str, items: Iterable[T]) -> Iterable[T]:
    """Return the items, with a bar while they are taken; an empty name has none."""
    if not name or not sys.stderr.isatty():
        return items
    return tqdm.tqdm(items, desc=name, leave=False, dynamic_ncols=True)


@contextmanager
def beside_bars() -> Iterator[None]:
    """Take the bars that are shown away while a line is written to stderr."""
    if "tqdm" not in sys.modules or not sys.stderr.isatty():
        yield
        return
    with tqdm.tqdm.external_write_mode(sys.stderr):
        yield
