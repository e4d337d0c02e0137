"""`esm-neuron serve`: a real process with real clients, 64 at once, bad ones among them, and an end in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.chromium import CHROMIUM, COMPLAINTS, Browser
from helpers.processes import wait_for
from helpers.toys import make_toys, write_proteins

import esm_neuron as en
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.errors import DataError
from esm_neuron.inference.batcher import Batcher, BusyError
from esm_neuron.inference.requests import FORMS
from esm_neuron.inference.serving import load
from esm_neuron.training import run as training

pytest.importorskip("fastapi", reason="the extra serve is not installed")

JSON, TEXT = "application/json", "text/plain; charset=utf-8"


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        command = [sys.executable, "-m", "esm_neuron.cli", "serve", str(folder), "--port", "0", *words]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            if found := re.search(r" answers at (http://127.0.0.1:\d+)/predict", line):
                self.place = found[1]
                break
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(line.rstrip() for line in self.process.stderr)

    def ask(self, path: str, body: str | bytes | None = None, kind: str = JSON) -> tuple[int, Any]:
        """Return code and value of an answer."""
        data = body.encode() if isinstance(body, str) else body
        request = urllib.request.Request(f"{self.place}/{path}", data, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny network."""
    cfg = make_toys(tmp_path_factory.mktemp("served"))("mine", optim={"lr": 1e-2})
    training.train(cfg, str)
    return Path(cfg.output)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    found = Server(folder, "--megabytes", "0.05", "--proteins", "200")
    yield found
    found.process.terminate()
    assert found.process.wait(60) == -signal.SIGTERM


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    lines = write_proteins(tmp_path_factory.mktemp("new") / "new.csv", 128, seed=9).read_text().splitlines()[1:]
    return [(line.split(",")[0], line.split(",")[1]) for line in lines]


def records(proteins: Sequence[tuple[str, str]]) -> str:
    return json.dumps({"records": [{"id": name, "sequence": residues} for name, residues in proteins]})


def same(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """The same proteins and answers; numbers but for the rounding of another pack."""
    assert [(row["id"], row["label"]) for row in found] == [(row["id"], row["label"]) for row in expected]
    assert [row["p_alpha"] for row in found] == pytest.approx([row["p_alpha"] for row in expected], abs=1e-5)


def test_every_form_of_a_request_is_answered_as_by_the_model(
    server: Server, folder: Path, proteins: list[tuple[str, str]]
) -> None:
    some = proteins[:5]
    expected = load(folder).predict(some)
    fasta = "".join(f">{name} a note\n{residues[:20]}\n{residues[20:]}\n" for name, residues in some)
    table = "".join(f"{residues},{name}\n" for name, residues in [("Accession", "Sequence"), *some])
    for path, body, kind in (
        ("predict", records(some), JSON), ("predict", table, "text/csv"), ("predict", fasta, TEXT),
        ("invocations", records(some), JSON),
    ):  # fmt: skip
        code, said = server.ask(path, body, kind)
        assert code == 200 and list(said) == ["predictions"]
        same(said["predictions"], expected)
    code, said = server.ask("predict", json.dumps({"sequences": [residues for _, residues in some]}))
    assert [row["id"] for row in said["predictions"]] == ["0", "1", "2", "3", "4"]
    assert server.ask("predict", "".join(f"{residues}\n" for _, residues in some), TEXT) == (200, said)
    code, said = server.ask("embed", records(some))
    frame = en.embed(dict(some), folder)
    assert [row["id"] for row in said["embeddings"]] == list(frame.index)
    assert said["embeddings"][3]["embedding"] == pytest.approx(frame.iloc[3].to_list(), abs=1e-5)
    assert server.ask("ping") == (200, {"status": "ok", "model": "mine"})


BAD: list[tuple[str | bytes, str, int, str]] = [
    (records([("a", "MK!V")]), JSON, 400, "the sequence of 'a' has '!' at residue 3"),
    (records([("a\nb", "")]), JSON, 400, "has no residues|no sequence|is empty"),
    ("{", JSON, 400, "request: .*; send {"),
    ("{}", JSON, 400, "request: it has none of these; send {"),
    ('{"records": [], "inputs": "MKV"}', JSON, 400, "request: it has records and inputs; send {"),
    ('{"records": [{"id": {}, "sequence": "MKV"}]}', JSON, 400, "an id is dict, neither text nor a whole number"),
    ('{"records": ["MKV"]}', JSON, 400, "str where an object belongs"),
    ('{"sequences": [3]}', JSON, 400, "a sequence is int, not text"),
    ('{"sequences": []}', JSON, 400, "no records; send at least one"),
    ("MKT\n>a\nMKT", TEXT, 400, "request is not FASTA"),
    ("<a/>", "text/xml", 400, "content type 'text/xml'; send application/json"),
    (b"\xff", TEXT, 400, "request is not UTF-8"),
    (records([(str(n), "MKV") for n in range(201)]), JSON, 413, "201 proteins, and a request may have 200"),
    ("x" * 60_000, TEXT, 413, "more than 0.05 MB; send fewer proteins at once"),
]


@pytest.mark.parametrize("path", ["predict", "embed"])
def test_a_bad_request_is_answered_and_logged_in_one_line(server: Server, path: str) -> None:
    for body, kind, code, message in BAD:
        found, said = server.ask(path, body, kind)
        assert found == code and list(said) == ["error"], said
        assert re.search(message, said["error"]) and "\n" not in said["error"]
        line = f"WARNING: {code} /{path}: {said['error']}"
        wait_for(lambda line=line: server.said[-1] == line, processes=[server.process])  # type: ignore[misc]
    assert server.ask("none", "{}") == (404, {"error": "Not Found; see /docs"})
    assert server.ask("predict") == (405, {"error": "Method Not Allowed; see /docs"})


def test_what_the_schema_allows_and_forbids(server: Server, tmp_path: Path) -> None:
    """Requests that schemathesis makes of /openapi.json, good and bad: no 500, nothing bad taken, no other answer.

    A schema cannot say that ids are unique, so good ones may be refused.
    """
    pytest.importorskip("schemathesis", reason="pip install schemathesis, then make test")
    (tmp_path / "lines.py").write_text(
        "import json, schemathesis\n"
        "@schemathesis.serializer('application/jsonlines')\n"
        "def lines(context, value): return (value if isinstance(value, str) else json.dumps(value)).encode()\n"
    )
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.place}/openapi.json"]
    command += ["--max-examples=40", "--seed=1", "--exclude-checks=positive_data_acceptance", "--no-color"]
    paths = {"SCHEMATHESIS_HOOKS": "lines", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout


def test_64_clients_get_their_own_answers_with_bad_ones_among_them(
    server: Server, folder: Path, proteins: list[tuple[str, str]]
) -> None:
    expected = load(folder).predict(proteins)

    def client(number: int) -> None:
        for round_ in range(3):
            first = (number * 7 + round_ * 31) % 120
            code, said = server.ask("predict", records(proteins[first : first + 1 + number % 5]))
            assert code == 200
            same(said["predictions"], expected[first : first + 1 + number % 5])
            if number % 8 == 0:
                assert server.ask("predict", records([("a", "M1")]))[0] == 400
            if number % 8 == 1:
                assert server.ask("embed", records(proteins[:1]))[0] == 200

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(client, range(64)))


def test_a_client_that_goes_away_disturbs_nobody(server: Server, proteins: list[tuple[str, str]]) -> None:
    host, port = server.place.removeprefix("http://").split(":")
    for sent in (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{", b"\0\xff\r\n\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    body = records(proteins).encode()
    with socket.create_connection((host, int(port))) as connection:  # gone before its answer
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
    assert server.ask("predict", records(proteins[:1]))[0] == 200
    assert server.process.poll() is None


def test_what_was_taken_is_answered_when_the_server_is_asked_to_end(
    folder: Path, proteins: list[tuple[str, str]]
) -> None:
    server = Server(folder)
    began, answered, gone = threading.Event(), list[int](), list[Exception]()

    def client(number: int) -> None:
        for _ in range(50):
            try:
                code, said = server.ask("predict", records(proteins[:16]))
            except (OSError, ValueError) as error:
                gone.append(error)
                return
            assert code == 200 and len(said["predictions"]) == 16
            answered.append(number)
            began.set()

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(client, number) for number in range(8)]
        assert began.wait(120)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == -signal.SIGTERM
        for job in jobs:
            job.result()  # no answer was half of one
    assert answered and gone and not any("Traceback" in line for line in server.said)


def test_the_pages_ask_for_nothing_elsewhere(server: Server) -> None:
    with urllib.request.urlopen(server.place) as answer:
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "connect-src 'self'" in policy and "default-src 'none'" in policy
    assert not re.search(r"(src|href)=.?(https?:)?//", page) and "<textarea" in page and "mine" in page
    _, api = server.ask("openapi.json")
    assert set(api["paths"]) == {"/predict", "/invocations", "/embed", "/ping"}
    assert {"200", "400", "413", "503", "504"} <= set(api["paths"]["/predict"]["post"]["responses"])
    assert set(FORMS) == set(api["paths"]["/predict"]["post"]["requestBody"]["content"])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; apt-get install chromium, then make test")
def test_the_form_shows_answers_and_what_is_wrong_with_a_sequence(
    server: Server, folder: Path, proteins: list[tuple[str, str]], tmp_path: Path
) -> None:
    expected = [row["label"] for row in load(folder).predict(proteins[:3])]
    fasta = "".join(f">{name} a note\n{residues}\n" for name, residues in proteins[:3])
    rows = "[...document.querySelectorAll('#rows tr')].map(r => [...r.cells].map(c => c.textContent))"
    said = "document.getElementById('error').textContent"
    with Browser(tmp_path) as browser:
        for width, dark in ((1400, False), (420, True)):
            seen = browser.open(server.place, width, dark)

            def paste(text: str, until: str, seen: Any = seen) -> None:
                seen.evaluate(f"document.getElementById('proteins').value = {json.dumps(text)}")
                seen.evaluate("document.querySelector('#form button').click()")
                wait_for(lambda: seen.evaluate(until), processes=[server.process])

            paste(fasta, f"{rows}.length === 4")
            head, *shown = seen.evaluate(rows)
            assert head[:2] == ["id", "label"] and [row[0] for row in shown] == [name for name, _ in proteins[:3]]
            assert [row[1] for row in shown] == expected and all(0 <= float(row[2]) <= 1 for row in shown)
            paste("MK!V", f"{said} !== ''")
            assert "has '!' at residue 3" in seen.evaluate(said) and seen.evaluate(rows) == []
            paste(f"{proteins[0][1]}\n\n{proteins[1][1]}", f"{rows}.length === 3")  # one sequence per line
            assert [row[:2] for row in seen.evaluate(rows)[1:]] == [["0", expected[0]], ["1", expected[1]]]
            assert seen.evaluate(said) == ""
            assert seen.evaluate("document.documentElement.scrollWidth") <= width
            asked = [each["params"]["request"]["url"] for each in browser.events
                     if each["method"] == "Network.requestWillBeSent"]  # fmt: skip
            assert set(asked) == {f"{server.place}/", f"{server.place}/predict"}
            complaints = [each for each in browser.events if each["method"] in COMPLAINTS]
            assert [each["params"]["entry"]["url"] for each in complaints] == [f"{server.place}/predict"]  # of the 400


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "--model none: no config.yaml there"),
        (["mine", "--seconds", "0"], "--seconds 0.0 must be above 0"),
        (["mine", "--port", "99999"], "--port 99999"),
        (["mine", "--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["mine", "--lr", "1"], "`serve` has no use for this setting"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    from esm_neuron import cli

    monkeypatch.chdir(folder.parent)
    assert cli.main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# --- the batcher, and an application without a network


def table(*sequences: str) -> ExampleTable:
    return ExampleTable.of(*encode_many(list(sequences)))


class Held:
    """Answers with the number of proteins, once it may."""

    def __init__(self) -> None:
        self.may, self.calls = threading.Event(), list[tuple[str, int]]()

    def __call__(self, kind: str, tables: Sequence[ExampleTable]) -> list[list[dict[str, Any]]]:
        self.calls.append((kind, len(tables)))
        assert self.may.wait(30)
        if kind == "fails":
            raise DataError("no")
        return [[{"n": len(each.ids)}] for each in tables]


def test_requests_that_wait_together_are_answered_together() -> None:
    held = Held()
    with Batcher(held, most_tokens=40, most_waiting=1000) as batcher:
        first = batcher.put("a", table("MKV"))
        while not held.calls:
            pass
        waiting = [batcher.put("a", table("MKVLA", "MK")) for _ in range(4)]  # 11 tokens each
        other = batcher.put("b", table("MKV"))
        fails, given_up = batcher.put("fails", table("MKV")), batcher.put("fails", table("MKV"))
        assert given_up.cancel()
        held.may.set()
        assert first.result(30) == [{"n": 1}] and [each.result(30) for each in waiting] == [[{"n": 2}]] * 4
        assert other.result(30) == [{"n": 1}]
        with pytest.raises(DataError, match="no"):
            fails.result(30)
    assert held.calls == [("a", 1), ("a", 3), ("a", 1), ("b", 1), ("fails", 1)] or held.calls[1] == ("a", 3)
    with pytest.raises(BusyError):
        batcher.put("a", table("MKV"))


def test_what_is_beyond_the_limit_is_refused_and_what_waits_is_answered_at_the_end() -> None:
    held = Held()
    with Batcher(held, most_tokens=100, most_waiting=12) as batcher:
        batcher.put("a", table("MKV"))
        while not held.calls:
            pass
        waits = batcher.put("a", table("MKVLAAAA"))
        with pytest.raises(BusyError, match="10 tokens of other requests wait, at most 12 may; try again later"):
            batcher.put("a", table("MKV"))
        held.may.set()
    assert waits.result(0) == [{"n": 1}]


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ("late", 504, "no answer within 0.2 s"),
        ("fails", 500, "the server failed; its log says why"),
        ("busy", 503, "try again later"),
    ],
)
def test_failures_of_the_server_have_codes_of_their_own(answer: str, code: int, said: str) -> None:
    from esm_neuron.inference.server import Limits, make_app

    class Stub:
        def put(self, kind: str, _: ExampleTable) -> Any:
            from concurrent.futures import Future

            made: Future[Any] = Future()
            if answer == "busy":
                raise BusyError("3 tokens wait; try again later")
            if answer == "fails":
                made.set_exception(RuntimeError("secret details"))
            return made

    reader: Any = SimpleNamespace(read=lambda records: table("MKV"))
    stub: Any = Stub()
    app = make_app(reader, stub, Limits(seconds=0.2), "x")
    found = asyncio.run(post(app, "/predict", b'{"sequences": ["MKV"]}'))
    assert found[0] == code and said in found[1]["error"] and "secret" not in found[1]["error"]


async def post(app: Any, path: str, body: bytes) -> tuple[int, Any]:
    """Give an application a request as a server does; return code and value."""
    sent: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return parts.pop() if parts else await asyncio.Future()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
             "raw_path": path.encode(), "query_string": b"", "headers": [(b"content-type", JSON.encode())],
             "client": ("x", 1), "server": ("x", 1), "scheme": "http", "root_path": ""}  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])
