"""The pages that are made from the code or from saved results.

    python tools/pages.py            # write them all (make pages)
    python tools/pages.py --check    # name those that are not current, and exit with 1 if there are any (make lint)

Three kinds are written elsewhere: docs/dev/parity*.md by the runs that they report (`make parity`), the pictures of a
run by `tools/screens.py`, and docs/performance.md by hand.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import screens

os.environ.setdefault("USE_TORCH_XLA", "0")  # accelerate, which peft imports, would import torch_xla: half a minute
ROOT = Path(__file__).resolve().parents[1]


def settings() -> str:
    import settings_page

    return settings_page.page()


def api() -> str:
    import api_page

    return api_page.page()


def errors() -> str:
    import errors_page

    return errors_page.page()


def neuron_environment() -> str:
    import neuron_page

    return neuron_page.page()


def results() -> str:
    import results  # type: ignore[import-not-found]  # of benchmarks/

    return str(results.page(json.loads(results.SAVED.read_text(encoding="utf-8"))))


def adapters() -> str:
    import adapters  # type: ignore[import-not-found]  # of benchmarks/

    return str(adapters.page(json.loads(adapters.SAVED.read_text(encoding="utf-8"))))


def rooms_page() -> str:
    import rooms

    return rooms.page(rooms.read())


def rooms_picture() -> str:
    import rooms

    return rooms.picture(rooms.read())


PAGES: dict[str, Callable[[], str]] = {
    "docs/settings.md": settings,
    "docs/api.md": api,
    "docs/commands.md": screens.page,
    **{f"docs/{screens.file(name)}": partial(screens.help_picture, name) for name in screens.cli.COMMANDS},
    "docs/errors.md": errors,
    "docs/neuron-environment.md": neuron_environment,
    "docs/results.md": results,
    "docs/adapters.md": adapters,
    "docs/dev/rooms.md": rooms_page,
    "docs/dev/rooms.svg": rooms_picture,
}


def comparable(name: str, text: str) -> str:
    """Return what has to be equal: of error messages, not what libraries word differently, the parentheses."""
    while name == "docs/errors.md" and (inner := re.sub(r"\([^()]*\)", "", text)) != text:
        text = inner
    return text


def stale() -> list[str]:
    """Return the names of the pages that differ from what the code makes of them."""
    return [
        name
        for name, make in PAGES.items()
        if not (ROOT / name).exists()
        or comparable(name, (ROOT / name).read_text(encoding="utf-8")) != comparable(name, make())
    ]


def main() -> int:
    """Run the command at the top of this file."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]
    if "--check" in sys.argv[1:]:
        found = stale()
        for name in found:
            print(f"{name} is not current; run make pages", file=sys.stderr)
        return int(bool(found))
    for name, make in PAGES.items():
        (ROOT / name).write_text(make(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
