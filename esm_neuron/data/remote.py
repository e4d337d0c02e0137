"""Files that lie elsewhere, `https://...` and `s3://...`: text is read as it comes, without a copy on this machine.

Each reading asks for the file anew. Credentials for S3 are found as by AWS's own tools (environment, profile, role).
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from esm_neuron.errors import DataError, first_line

SECONDS = 60
"""How long a server may stay silent."""
_ADDRESS = re.compile(r"(https?|s3):/{1,2}(?=[^/])")  # pathlib makes one slash of two


def is_remote(source: str) -> bool:
    """Return whether a source is an address."""
    return _ADDRESS.match(source) is not None


def name_of(source: str) -> str:
    """Return a source as the name of a file: of an address without `?download=1` and the like."""
    return urlsplit(source).path if is_remote(source) else source


def open_remote(source: str) -> io.BufferedReader:
    """Open an address to read. Raise DataError where that fails."""
    from http.client import HTTPException

    address = _ADDRESS.sub(r"\1://", source)
    try:
        if address.startswith("s3:"):
            from pyarrow import fs

            system, path = fs.FileSystem.from_uri(address)
            return io.BufferedReader(system.open_input_file(path))
        if "@" in urlsplit(address).netloc:  # urllib reads no password there, and shows it in its error
            raise DataError(f"{source}: an address with a name or a password in it is not opened; download the file")
        from urllib.request import urlopen

        return io.BufferedReader(_Whole(urlopen(address, timeout=SECONDS)))  # noqa: S310 - the scheme is known
    except (OSError, ValueError, HTTPException) as error:
        cure = "check the address, your rights and the network, or download the file and name that"
        raise DataError(f"{source}: cannot be read ({first_line(error)}); {cure}") from None


@contextmanager
def nearby(source: str) -> Iterator[str]:
    """Give the name of a file on this machine: the source, or a copy of it that is gone afterwards.

    Parquet files and workbooks are read from their end. Raise DataError where an address cannot be read.
    """
    if not is_remote(source):
        yield source
        return
    with tempfile.NamedTemporaryFile(prefix="esm-neuron-") as copy:
        try:
            with open_remote(source) as there:
                shutil.copyfileobj(there, copy, 1 << 20)
            copy.flush()
        except OSError as error:
            cure = "check the network and the room in the temporary folder, or download the file and name that"
            raise DataError(f"{source}: cannot be copied ({error.strerror or first_line(error)}); {cure}") from None
        yield copy.name


class _Whole(io.RawIOBase):
    """A response of HTTP that is an error where it ends early: `http.client` would take it for the end of the file."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        from http.client import HTTPException

        try:
            count = int(self._response.readinto(buffer))
        except HTTPException as error:
            raise OSError(0, first_line(error)) from error
        if not count and self._response.length:
            raise OSError(0, f"the connection ended {self._response.length} bytes before the file did")
        return count

    def close(self) -> None:
        self._response.close()
        super().close()
