"""Run commands in a process that may not reach a network; as a program: guarded.py COMMANDS (a JSON list of lists).

It prints, in its last line, the exit code of each command and what was tried: connections, and functions of stand-ins.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

TRIED: list[str] = []
"""What was tried that nobody asked for."""


def watch(event: str, args: tuple[Any, ...]) -> None:
    """Note and refuse whatever would leave this machine."""
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto", "urllib.Request"):
        TRIED.append(f"{event} {args[-1] if event == 'socket.connect' else args[0]}")
        raise OSError(101, "Network is unreachable")


STAND_IN = '''
"""Stands in for a package that fetches and runs code, or sends what it sees."""
import os
def _note(name):
    def call(*args, **kwargs):
        with open(os.environ["STAND_IN_CALLS"], "a") as file:
            file.write(f"{__name__}.{name} {args} {kwargs}\\n")
        raise OSError("nothing is fetched here")
    return call
for _name in ("get_kernel", "load_kernel", "get_local_kernel", "install_kernel", "init", "login", "log", "has_kernel"):
    globals()[_name] = _note(_name)
class _Nothing:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args else None
    def __getattr__(self, name): return _Nothing()
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return _Nothing
'''


def stand_ins(folder: Path, *names: str) -> dict[str, str]:
    """Write packages that note what is called of them; return the environment in which they are found."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(STAND_IN)
        info = folder / f"{name}-99.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    return {"PYTHONPATH": str(folder), "STAND_IN_CALLS": str(folder / "calls.txt")}


def main() -> None:
    """Run the commands that the first word lists."""
    sys.addaudithook(watch)
    from esm_neuron import cli

    codes = [cli.main(words) for words in json.loads(sys.argv[1])]
    calls = Path(os.environ["STAND_IN_CALLS"])
    TRIED.extend(calls.read_text().splitlines() if calls.is_file() else [])
    there = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    print(json.dumps({"codes": codes, "tried": TRIED, "modules": sorted(sys.modules), "versions": there}))


if __name__ == "__main__":
    main()
