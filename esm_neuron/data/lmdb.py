"""Read the LMDB files of TAPE and PEER, whose values are pickles, without doing what a pickle says.

The pages are those of LMDB 0.9 on 64 bits, little endian (its mdb.c): a B+ tree of keys and values. The instructions of
a pickle are listed by `pickletools` and followed here as far as they make plain values and arrays of numbers. Nothing
is imported or called by a name that stands in the file; any other name or instruction is an error.
"""

from __future__ import annotations

import mmap
import pickletools
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esm_neuron.data.records import LINE_LIMIT, Block, Column, check_expansion
from esm_neuron.data.remote import is_remote
from esm_neuron.data.text_files import read_objects
from esm_neuron.errors import DataError

DATA = "data.mdb"
"""The file in a folder that LMDB makes."""
_MAGIC, _BRANCH, _LEAF, _ELSEWHERE = (0xBEEFC0DE, 1), 1, 2, 1
_PUSHED = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
     "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8")
)  # fmt: skip
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NAME = re.compile(
    r"numpy (?P<type>ndarray|dtype)|numpy\._?core\.multiarray (?P<made>_reconstruct|scalar)|numpy\._?core\.numeric "
    "(?P<buffer>_frombuffer)"
)
_NUMBERS = re.compile(r"b1|[iu][1248]|f[248]")


def read_lmdb(path: str, columns: Sequence[Column]) -> Iterator[Block]:
    """Give the records of an LMDB, a file or the folder of one, in the order of its keys, which are texts: 0, 1, 10."""
    if is_remote(path):
        raise DataError(f"{path}: an LMDB is read from a disk; download it first")
    file = Path(path, DATA) if Path(path).is_dir() else Path(path)
    return read_objects(path, columns, _objects(path, file))


def _objects(path: str, file: Path) -> Iterator[tuple[int, Any]]:
    done, number, where = 0, 0, path
    try:
        for key, value in _entries(file):
            where, done = f"{path}: key {key[:20]!r}", done + len(value)
            check_expansion(str(file), where, done, "of values came out of")
            if key != b"num_examples":
                number += 1
                yield number, unpickled(value)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, struct.error, OSError) as error:
        cure = "copy it again; of pickles only numbers, text, lists and arrays of numbers are read"
        raise DataError(f"{where}: is no LMDB as TAPE's and PEER's ({error}); {cure}") from None


def _entries(file: Path) -> Iterator[tuple[bytes, bytes]]:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (size,) = struct.unpack_from("<I", data, 40)
        metas = [at for at in (0, size) if struct.unpack_from("<II", data, at + 16) == _MAGIC]
        if not metas or not 256 <= size <= 1 << 16:
            raise ValueError("its first bytes are others")
        newest = max(metas, key=lambda at: struct.unpack_from("<Q", data, at + 144))
        todo, left = list(struct.unpack_from("<Q", data, newest + 128)), len(data) // size
        while todo:
            page, left = todo.pop() * size, left - 1
            flags, lower = struct.unpack_from("<HH", data, page + 10)
            places = struct.unpack_from(f"<{max(0, lower - 16) // 2}H", data, page + 16)
            if left < 0 or flags not in (_BRANCH, _LEAF):
                raise ValueError("its pages are no tree")
            for node in [page + at for at in (places if flags == _LEAF else reversed(places))]:
                low, high, kind, key = struct.unpack_from("<HHHH", data, node)
                if flags == _BRANCH:
                    todo.append(low | high << 16 | kind << 32)
                    continue
                start, length = node + 8 + key, low | high << 16
                if kind == _ELSEWHERE:
                    start = struct.unpack_from("<Q", data, start)[0] * size + 16
                if kind not in (0, _ELSEWHERE) or start + length > len(data):
                    raise ValueError("a value lies outside")
                yield data[node + 8 : node + 8 + key], data[start : start + length]


class Array:
    """An array, or the type of one, while a pickle is read."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


def unpickled(data: bytes) -> dict[str, Any]:
    """Return the record that a pickle holds, arrays of one dimension as lists; raise ValueError, among others."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def above() -> list[Any]:
        mark = marks.pop()
        items = stack[mark:]
        del stack[mark:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _PUSHED:
            if isinstance(argument, int) and argument.bit_length() > 64:
                raise ValueError("a number of more than 64 bits")
            stack.append(argument)
        elif name in _MADE:
            stack.append(_MADE[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _TUPLES or name == "TUPLE":
            marks += [len(stack) - _TUPLES[name]] if name in _TUPLES else []
            stack.append(tuple(above()))
        elif name in ("APPEND", "APPENDS"):
            items = above() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            marks += [len(stack) - 2] if name == "SETITEM" else []
            items = above()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            marks += [len(stack) - 2] if argument is None else []
            stack.append(_name(argument or " ".join(above())))
        elif name == "REDUCE":
            given, called = stack.pop(), stack.pop()
            stack.append(_made(called, given))
        elif name == "BUILD":
            _fill(stack.pop(), stack[-1])
        elif name == "STOP":
            return _plain(stack.pop())
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the instruction {name}")
    raise ValueError("no end")


def _name(text: str) -> re.Match[str]:
    found = _NAME.fullmatch(text)
    if found is None:
        raise ValueError(f"the name {text[:60]!r}")
    return found


def _made(called: re.Match[str], given: tuple[Any, ...]) -> Any:
    """Return what numpy's function of this name would make; the type of an array comes as an `Array`."""
    if called["type"] == "dtype" and _NUMBERS.fullmatch(given[0]):
        return Array(np.dtype(given[0]))
    if called["made"] == "_reconstruct":
        return Array()
    if called["made"] == "scalar":
        return np.frombuffer(given[1], given[0].value, 1)[0].item()
    if called["buffer"]:
        return Array(np.frombuffer(given[0], given[1].value).reshape(given[2], order=given[3]))
    raise ValueError(f"a call of {called[0]}")


def _fill(state: tuple[Any, ...], made: Array) -> None:
    if isinstance(made.value, np.dtype):
        made.value = made.value.newbyteorder(state[1])
    else:
        _, shape, kind, by_columns, content = state
        made.value = np.frombuffer(content, kind.value).reshape(shape, order="F" if by_columns else "C")


def _plain(record: Any) -> dict[str, Any]:
    """Return a record with arrays as lists; what was named again and again in a list must not fill the memory."""
    if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
        raise ValueError("no record with names")
    for key, value in record.items():
        if isinstance(value, bytes):
            record[key] = value.decode("ascii")
        if isinstance(value, Array) and isinstance(value.value, np.ndarray) and value.value.ndim < 2:
            size = value.value.size
            record[key] = value.value.tolist() if size <= LINE_LIMIT else None
        else:
            size = sum(len(entry) for entry in value if isinstance(entry, str)) if isinstance(value, list) else 0
        if size > LINE_LIMIT:
            raise ValueError(f"more than {LINE_LIMIT} characters or numbers in {key[:60]!r}")
    return record
