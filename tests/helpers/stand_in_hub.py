"""A Hugging Face hub on loopback that has one model: whole, slow, broken, or silent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0ff"


class StandIn:
    """What the hub has, how it behaves, and what it was asked.

    `mode` is `whole`; `slow`, which sends `rate` bytes per second; `cut`, which sends half of the weights, and is
    `broken` then, where every answer is an error of the server; `silent`, which takes connections and says nothing;
    `lying`, which announces another checksum; or `climbing`, which announces one that is a path.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.mode, self.rate = name, "whole", 1 << 30
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.asked: list[str] = []
        self.sent: list[int] = []
        """Bytes of the weights that each answer began at."""


@contextmanager
def served(hub: StandIn) -> Iterator[str]:
    """Serve it; yield its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            if hub.mode == "silent":
                time.sleep(60)
                return
            if hub.mode == "broken":
                self.reply(500, b"{}", {}, body)
            elif self.path.startswith(f"/api/models/{hub.name}/tree/"):
                self.reply(200, json.dumps(self.tree()).encode(), {"Content-Type": "application/json"}, body)
            elif self.path.startswith(f"/api/models/{hub.name}"):
                self.reply(200, json.dumps(self.information()).encode(), {"Content-Type": "application/json"}, body)
            elif (file := self.path.partition("?")[0].rpartition("/")[2]) in hub.files:
                self.file(file, body)
            else:
                self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

        def information(self) -> dict[str, object]:
            return {
                "id": hub.name,
                "modelId": hub.name,
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "siblings": [
                    {"rfilename": name, "size": len(content), "blobId": etag(content)}
                    | ({"lfs": self.pointer(content)} if name.endswith(".safetensors") else {})
                    for name, content in hub.files.items()
                ],
            }

        def tree(self) -> list[dict[str, object]]:
            return [
                {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
                | ({"lfs": self.pointer(content)} if name.endswith(".safetensors") else {})
                for name, content in hub.files.items()
            ]

        def pointer(self, content: bytes) -> dict[str, object]:
            announced = {"lying": "0" * 64, "climbing": "../../../climbed"}
            digest = announced.get(hub.mode, sha256(content).hexdigest())
            return {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 134}

        def file(self, name: str, body: bool) -> None:
            content = hub.files[name]
            headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            begin = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
            first = int(begin or 0)
            if body and name.endswith(".safetensors"):
                hub.sent.append(first)
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self.reply(206 if first else 200, content[first:], headers, body, cut=name.endswith(".safetensors"))

        def reply(self, status: int, content: bytes, headers: dict[str, str], body: bool, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if not body:
                return
            if cut and hub.mode == "cut":
                hub.mode = "broken"
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
                return
            step = max(1, hub.rate // 10)
            for start in range(0, len(content), step):
                self.wfile.write(content[start : start + step])
                if cut and hub.mode == "slow":
                    self.wfile.flush()
                    time.sleep(0.1)

        def log_message(self, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def etag(content: bytes) -> str:
    return sha256(content).hexdigest()
