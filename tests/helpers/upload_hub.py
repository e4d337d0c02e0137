"""A Hugging Face hub on loopback that takes uploads: whole, refusing, or gone in the middle."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "standin" * 5
COMMIT = "c0ffee" * 6 + "c0ff"


class UploadHub:
    """Repositories by name, and what was asked.

    `mode` is `whole`; `full`, which takes no large file; or `forbidden`, which lets this token make nothing.
    """

    def __init__(self) -> None:
        self.mode = "whole"
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []


@contextmanager
def taking(hub: UploadHub) -> Iterator[str]:
    """Serve it; yield its address."""
    large: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            if path.startswith("/large/"):  # an address of its own, which the token must not be sent to
                ours = self.headers.get("Authorization") is None and hub.mode != "full"
                large[path.removeprefix("/large/")] = body
                self.reply(200 if ours else 507, {})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.reply(401, {"error": "Invalid username or password."})
            elif hub.mode == "forbidden":
                self.reply(403, {"error": "You don't have the rights to create a model under the namespace owner"})
            else:
                self.answer(path, body)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815 - names of http.server

        def answer(self, path: str, body: bytes) -> None:
            name = "/".join(
                path.removeprefix("/api/models").removesuffix(".git/info/lfs/objects/batch").split("/")[1:3]
            )
            if path == "/api/repos/create":
                self.create(json.loads(body))
            elif path == "/api/validate-yaml":
                self.reply(200, {"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = [
                    {"path": file["path"], "uploadMode": self.kind(file["path"]), "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.reply(200, {"files": files})
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = [{**each, "actions": {"upload": {"href": f"{address}/large/{each['oid']}"}}}
                           for each in json.loads(body)["objects"]]  # fmt: skip
                self.reply(200, {"transfer": "basic", "objects": objects})
            elif "/commit/" in path:
                self.commit(name, [json.loads(line) for line in body.splitlines()])
            elif name in hub.files:
                said = {"id": name, "sha": COMMIT, "private": hub.private[name], "tags": [], "siblings": []}
                self.reply(200, said)
            else:
                self.reply(404, {"error": "Repository not found"})

        def kind(self, name: str) -> str:
            return "lfs" if name.endswith(".safetensors") else "regular"

        def create(self, asked: dict[str, Any]) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            there = name in hub.files
            hub.files.setdefault(name, {})
            hub.private.setdefault(name, private)
            self.reply(409 if there else 200, {"url": f"{address}/{name}", "name": name, "id": name})

        def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    content = large[value["oid"]]
                    assert sha256(content).hexdigest() == value["oid"]
                    hub.files[name][value["path"]] = content
            self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{address}/{name}/commit/{COMMIT}"})

        def reply(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
