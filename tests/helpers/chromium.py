"""A headless Chromium, driven through its debugging pipe: what a page asks for, says on its console, how it lies."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COMPLAINTS = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
"""Events of lines on the console, and of errors and warnings of the browser."""
PATIENCE = 300
"""Seconds without a word from Chromium after which it is given up."""


@dataclass
class Seen:
    """A page after it has loaded."""

    browser: Browser
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for, the page's own first."""
    complaints: list[str] = field(default_factory=list)
    """Lines of the console, errors and warnings of the browser."""

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.browser.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")


class Browser:
    """A Chromium with one tab; a context manager. Commands and events are those of the DevTools protocol."""

    def __init__(self, folder: Path) -> None:
        """Keep the profile under `folder`."""
        self.folder = folder
        self.number = 0
        self.session: str | None = None
        self.buffer = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        commands, self.write_end = os.pipe()
        self.read_end, predictions = os.pipe()
        words = [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            f"--user-data-dir={self.folder / 'profile'}", "about:blank",
        ]  # fmt: skip
        # Chromium reads commands from descriptor 3 and writes answers to 4
        shell = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{predictions}', "chromium", *words]
        self.process = subprocess.Popen(
            shell, pass_fds=(commands, predictions), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(predictions)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        os.close(self.write_end)
        os.close(self.read_end)

    def open(self, url: str, width: int, dark: bool) -> Seen:
        """Load a page in a window of `width` pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())
        seen = Seen(self)
        seen.evaluate("document.fonts.ready && 1")  # what was said before this answer has come by then
        for event in self.events:
            values = event["params"]
            if event["method"] == "Network.requestWillBeSent" and not values["request"]["url"].startswith("data:"):
                seen.requests.append(values["request"]["url"])
            if event["method"] in COMPLAINTS:
                seen.complaints.append(json.dumps(values))
        return seen

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], PATIENCE)
            assert ready, f"chromium has said nothing for {PATIENCE} s"
            chunk = os.read(self.read_end, 1 << 16)
            assert chunk, "chromium has ended"
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        return dict(json.loads(message))
