"""`esm-neuron serve`: predictions and embeddings over HTTP, by FastAPI and uvicorn.

The forms of requests are those of `requests.py`; `/ping` and `/invocations` are what SageMaker asks a container for.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from esm_neuron.config import require
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.tokenizer import RESIDUES
from esm_neuron.errors import ConfigError, DataError, EsmNeuronError
from esm_neuron.inference.batcher import Batcher, BusyError, Rows
from esm_neuron.inference.predict import piece_tokens
from esm_neuron.inference.requests import LINES, read_request, write_answer
from esm_neuron.inference.serving import Predictor
from esm_neuron.redact import shown
from esm_neuron.reports.html import environment

try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.exceptions import HTTPException  # FastAPI's own is no base of what a missing path raises
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ConfigError(f"{error.name} is not installed; pip install 'esm-neuron[serve]'") from None

logger = logging.getLogger(__name__)

GRACE = 30
"""Seconds that requests have to be answered after the server was asked to end."""
PIECES = 4
"""How many forward passes' worth of tokens are answered in one go."""
_ANSWERS = {"predict": "predictions", "embed": "embeddings"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
_SEQUENCE = {"type": "string", "pattern": f"^[{RESIDUES}{RESIDUES.lower()}]+$"}
_SEQUENCES = {"type": "array", "minItems": 1, "items": _SEQUENCE, "example": ["MKTAYIAKQRQISFVKSHFSRQ"]}
_RECORD = {"type": "object", "required": ["id", "sequence"],
           "properties": {"id": {"type": ["string", "integer"], "minLength": 1}, "sequence": _SEQUENCE}}  # fmt: skip
_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "oneOf": [
                    {"type": "object", "required": ["sequences"], "properties": {"sequences": _SEQUENCES}},
                    {"type": "object", "required": ["records"],
                     "properties": {"records": {"type": "array", "minItems": 1, "items": _RECORD}}},
                    {"type": "object", "required": ["inputs"],
                     "properties": {"inputs": {"anyOf": [_SEQUENCE, _SEQUENCES]}}},
                ]
            }
        },
        "text/plain": {"schema": {"type": "string", "example": ">P1\nMKTAYIAKQRQISFVKSHFSRQ\n"}},
        "text/csv": {"schema": {"type": "string", "example": "id,sequence\nP1,MKTAYIAKQRQISFVKSHFSRQ\n"}},
        LINES: {"schema": {"type": "string", "example": '{"id": "P1", "sequence": "MKTAYIAKQRQISFVKSHFSRQ"}\n'}},
    },
}  # fmt: skip
_ERRORS = {
    400: "the request cannot be used: `error` says why", 413: "the request is too large", 503: "too much waits",
    504: "no answer within the time limit", 500: "a failure of the server",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a server takes."""

    megabytes: float = 8
    """Largest request."""
    proteins: int = 10_000
    """Most proteins of a request."""
    seconds: float = 60
    """Longest time until an answer."""
    waiting: int = 10_000_000
    """Most tokens of requests that wait."""

    def check(self) -> None:
        """Raise ConfigError where one is not positive."""
        for name, value in vars(self).items():
            require(value > 0, f"--{name} {value} must be above 0")


class TooLargeError(EsmNeuronError):
    """A request with too many bytes or proteins."""


@dataclass(frozen=True)
class Answers:
    """Reads requests, has them answered, and says what is wrong with them."""

    predictor: Predictor
    batcher: Batcher
    limits: Limits

    async def _body(self, request: Request) -> bytes:
        most, parts, size = int(self.limits.megabytes * 1e6), list[bytes](), 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise TooLargeError(
                    f"the request has more than {self.limits.megabytes:g} MB; send fewer proteins at once"
                )
            parts.append(part)
        return b"".join(parts)

    def _read(self, body: bytes, kind: str) -> ExampleTable:
        records = read_request(body, kind)
        if len(records) > self.limits.proteins:
            raise TooLargeError(
                f"{len(records)} proteins, and a request may have {self.limits.proteins}; send them in parts"
            )
        return self.predictor.read(records)

    async def answer(self, request: Request, kind: str) -> Response:
        accept = request.headers.get("accept", "")

        async def work() -> str:
            body = await self._body(request)
            table = await run_in_threadpool(self._read, body, request.headers.get("content-type", ""))
            rows = await asyncio.wrap_future(self.batcher.put(kind, table))
            return await run_in_threadpool(write_answer, rows, accept, _ANSWERS[kind])

        try:
            text = await asyncio.wait_for(work(), self.limits.seconds)
        except Exception as error:
            return self._failure(request, error)
        return Response(text, media_type=LINES if accept.partition(";")[0].strip() == LINES else "application/json")

    def _failure(self, request: Request, error: Exception) -> Response:
        known = {ClientDisconnect: 400, DataError: 400, TooLargeError: 413, BusyError: 503, asyncio.TimeoutError: 504}
        code = next((code for kind, code in known.items() if isinstance(error, kind)), 500)
        said = (
            f"no answer within {self.limits.seconds:g} s"
            if code == 504
            else shown(str(error)) or "the client went away"
        )
        if code == 500:
            logger.exception("%s failed", request.url.path)
            said = "the server failed; its log says why"
        else:
            logger.warning("%s %s: %s", code, request.url.path, said)
        return JSONResponse({"error": said}, code)


def make_app(predictor: Predictor, batcher: Batcher, limits: Limits, title: str) -> FastAPI:
    """Return the application; the batcher answers, and is opened and closed by the caller."""
    app = FastAPI(title="esm-neuron", description=f"Predictions and embeddings by {title}.", version="1")
    answers = Answers(predictor, batcher, limits)
    told: dict[str, Any] = {"openapi_extra": {"requestBody": _BODY},
                            "responses": {code: {"description": text} for code, text in _ERRORS.items()}}  # fmt: skip

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": f"{error.detail}; see /docs"}, error.status_code, error.headers)

    @app.post("/predict", summary="Predict for each protein", **told)
    @app.post("/invocations", summary="As /predict: what SageMaker asks for", **told)
    async def predict(request: Request) -> Response:
        return await answers.answer(request, "predict")

    @app.post("/embed", summary="Return the mean state of the residues of each protein", **told)
    async def embed(request: Request) -> Response:
        return await answers.answer(request, "embed")

    @app.get("/ping", summary="Say that the model is there")
    async def ping() -> dict[str, str]:
        return {"status": "ok", "model": title}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def form() -> HTMLResponse:
        page = environment().get_template("serve.html.jinja").render(title=title, task=predictor.task.summary)
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    return app


def serve(predictor: Predictor, title: str, host: str, port: int, limits: Limits, log: Callable[[str], None]) -> None:
    """Answer requests until the process is asked to end (SIGTERM, ctrl-C); what has been taken is answered then."""

    def compute(kind: str, tables: Sequence[ExampleTable]) -> list[Rows]:
        return predictor.embed_tables(tables) if kind == "embed" else predictor.predict_tables(tables)

    most = piece_tokens(predictor.cfg, predictor.evaluators[0].backend.local_dp, PIECES)
    with Batcher(compute, most, limits.waiting) as batcher, bound(host, port) as listener:
        app = make_app(predictor, batcher, limits, title)
        place = "http://{}:{}".format(*listener.getsockname()[:2])
        log(
            f"{title} answers at {place}/predict and /embed; a form at {place}, the API at {place}/docs; ctrl-C ends it"
        )
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE, lifespan="off")
        uvicorn.Server(config).run(sockets=[listener])


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raise ConfigError where that cannot be."""
    require(0 <= port < 1 << 16, f"--port {port}: must be 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)  # who is told the place may come at once
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: {error}; name another port, 0 for any that is free") from None
    return listener
