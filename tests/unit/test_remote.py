"""Files at an address, of a server in this process: read as the local ones, and told where they cannot be."""

from __future__ import annotations

import gzip
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from helpers.intake import load

from esm_neuron import cli
from esm_neuron.config import DataConfig
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.remote import is_remote, name_of
from esm_neuron.errors import DataError

TEXT = "id,sequence,label\n" + "".join(f"p{i},MKVLAAGIVG{'ACDEF'[i % 5] * 9},{'ab'[i % 2]}\n" for i in range(30))
FILES = {
    "/x/data.csv": TEXT.encode(),
    "/x/packed.csv.gz": gzip.compress(TEXT.encode()),
    "/x/cut.csv": TEXT.encode(),
    "/x/data.fasta": b">a\nMKV\n>b\nMKL\n",
    "/x/cut.parquet": b"PAR1" * 9,
    "/x/odd.parquet": b"PAR1",
}


def _tables() -> dict[str, bytes]:
    """The same rows as a Parquet file and as a workbook."""
    frame, parquet, book = pd.read_csv(io.StringIO(TEXT)), io.BytesIO(), io.BytesIO()
    frame.to_parquet(parquet)
    frame.to_excel(book, index=False)
    return {"/x/data.parquet": parquet.getvalue(), "/x/data.xlsx": book.getvalue()}


FILES |= _tables()


class Handler(BaseHTTPRequestHandler):
    """Answers as a web server does, and S3 for objects; of /x/cut.csv it sends a half."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        content = FILES.get(self.path.partition("?")[0])
        if content is None:
            self.send_error(404)
            return
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if body:
            self.wfile.write(part[: len(part) // 2] if "cut" in self.path else part)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


def sources(server: str) -> dict[str, str]:
    """Ways to name the table."""
    there = f"endpoint_override={server}&scheme=http&region=us-east-1"
    return {
        "https": f"http://{server}/x/data.csv",
        "a query": f"http://{server}/x/data.csv?download=1",
        "one slash": f"http:/{server}/x/data.csv",
        "gzip": f"http://{server}/x/packed.csv.gz",
        "s3": f"s3://anonymous@x/data.csv?{there}",
        "parquet": f"http://{server}/x/data.parquet?download=1",
        "parquet on s3": f"s3://anonymous@x/data.parquet?{there}",
        "a workbook": f"http://{server}/x/data.xlsx",
        "a list": f"[http://{server}/x/data.csv]",
    }


@pytest.mark.parametrize(
    "way", ["https", "a query", "one slash", "gzip", "s3", "parquet", "parquet on s3", "a workbook", "a list"]
)
def test_a_file_at_an_address_is_read_as_a_local_one(server: str, tmp_path: Path, way: str) -> None:
    (tmp_path / "data.csv").write_text(TEXT)
    local, there = load(tmp_path / "data.csv"), load(sources(server)[way])
    assert there.fingerprint == local.fingerprint
    cached = load(sources(server)[way], cache=str(tmp_path / "cache"))
    assert cached.fingerprint == local.fingerprint


def test_a_pathlib_path_of_an_address_is_an_input(server: str) -> None:
    table = InputChunks(Path(f"http://{server}/x/data.fasta"), DataConfig()).read()
    assert list(table.ids) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cut.csv", r"cut.csv:\d+: cannot be read: the connection ended \d+ bytes before the file did; .*download"),
        ("none.csv", r"none.csv: cannot be read \(HTTP Error 404: Not Found\); check the address"),
        (
            "cut.parquet",
            r"cut.parquet: cannot be copied \(the connection ended 18 bytes before the file did\); .*download",
        ),
        ("odd.parquet", r"odd.parquet: no sound Parquet file \(.*; save it anew, or copy it again"),
        ("data.csv.zip", "unknown format '.zip'; unpack it"),
    ],
)
def test_what_cannot_be_read_there_is_one_line(server: str, name: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        load(f"http://{server}/x/{name}")
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", "http://127.0.0.1:9/x.csv"]) == 2
    assert "cannot be read (<urlopen error [Errno 111] Connection refused>)" in capsys.readouterr().err


def test_what_is_an_address() -> None:
    assert is_remote("https://a/b") and is_remote("s3:/a/b") and not is_remote("hf://a/b") and not is_remote("./https")
    assert name_of("https://a/b.csv.gz?x=1#y") == "/b.csv.gz" and name_of("a?b.csv") == "a?b.csv"
