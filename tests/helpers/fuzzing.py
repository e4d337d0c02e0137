"""What the fuzz tests share: how many cases, what counts as a refusal, names, seeds and damage."""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from esm_neuron.data.tokenizer import RESIDUES
from helpers.refusals import Refusal, outcome

QUICK = 50
CASES = int(os.environ.get("FUZZ_CASES", QUICK))
HANG = 120
"""Seconds that a case may take on a busy machine; then the process ends, also inside a call into C."""
HUNG = Path(tempfile.gettempdir()) / f"esm-neuron-fuzz-hung-{os.getpid()}.txt"
"""Where the stacks of a case that hangs are written; pytest keeps stderr to itself."""
COUNTS: Counter[str] = Counter()
"""Test -> cases that it has passed in this process."""
_profile = settings(
    max_examples=CASES,
    derandomize=CASES == QUICK,
    deadline=None,  # which hypothesis looks at when a case has ended: `HANG` does not wait for that
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def fuzz(test: Any) -> Any:
    """A test by `given` in as many cases as were asked for; a case that hangs ends the process, with its stacks."""
    inner = test.hypothesis.inner_test

    @wraps(inner)
    def case(*args: Any, **values: Any) -> None:
        with HUNG.open("w") as stacks:
            faulthandler.dump_traceback_later(HANG, exit=True, file=stacks)
            try:
                inner(*args, **values)
            finally:
                faulthandler.cancel_dump_traceback_later()
        COUNTS[os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)")] += 1

    test.hypothesis.inner_test = case
    return _profile(test)


@pytest.fixture(scope="module", autouse=True)
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for a module's files; at its end, what was counted goes to the file that FUZZ_COUNTS names."""
    yield tmp_path_factory.mktemp("fuzz")
    HUNG.unlink(missing_ok=True)
    if name := os.environ.get("FUZZ_COUNTS"):
        with Path(name).open("a+") as file:  # two processes share it
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            counts = json.loads(file.read() or "{}") | COUNTS
            file.truncate(0)
            file.write(json.dumps(dict(sorted(counts.items())), indent=2) + "\n")


def refused(call: Callable[[], Any]) -> Any:
    """What `call` returns, or the text of its refusal: one line, or the list of a file's first problems."""
    found = outcome(call)
    if isinstance(found, Refusal):
        first, *rest = found.splitlines()
        assert first and len(first) < 1000, first
        assert not rest or (" problems (" in first and len(rest) <= 20), found
    return found


PRINTABLE = st.characters(codec="utf-8", exclude_categories=("C", "Z"))
NAMES = st.text(PRINTABLE, min_size=1, max_size=12)
VALUES = st.text(PRINTABLE | st.sampled_from(" ;=,\t'#>"), max_size=20)
SEQUENCES = st.text(RESIDUES + RESIDUES.lower(), min_size=1, max_size=40)
DIRTY = SEQUENCES | st.text(RESIDUES + "*-.J1é ", min_size=1, max_size=12)
SEEDS = st.integers(0, 2**63)
"""Of damage: drawn by `random`, which is ten times quicker than a strategy, and a seed is all a failure needs."""
NASTY = [b"\0", b"\r", b"\n", b'"', b",", b"\t", b">", b"\xff", b"\xef\xbb\xbf", b"{", b"]", b"\\ud800", b"=", b"*"]
WORDS = "aZ09_-.:|*éß中 ;,'#"


def mutate(content: bytes, rng: Random) -> bytes:
    """Damage as files meet it, up to four times: cut short, bits flipped, bytes put in, taken out or written twice."""
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.choice(("truncate", "flip", "insert", "delete", "repeat")), rng.randint(0, len(content))
        extra = rng.choice(NASTY) if rng.random() < 0.5 else rng.randbytes(rng.randint(1, 4))
        if kind == "truncate":
            content = content[:at]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (extra[0] or 1)]) + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + extra + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + len(extra) :]
        elif kind == "repeat":
            content = content[:at] + content[max(0, at - 8 * len(extra)) :]
    return content


def stored(folder: Path, name: str, content: bytes) -> Path:
    """`content` in a file."""
    path = folder / name
    path.write_bytes(content)
    return path
