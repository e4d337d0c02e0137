"""Runs that are killed, whatever they are doing, end as if nothing had happened; `make soak` does this 64 times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


def test_killed_runs_end_byte_for_byte_like_one_that_was_not(tmp_path: Path) -> None:
    """One process, and two on gloo of which one is killed: the other says so, and saves nothing more."""
    results = tmp_path / "soak.json"
    words = [sys.executable, str(SOAK), "--modes", "lora", "gloo", "--kills", "2", "--steps", "12"]
    words += ["--results", str(results), "--folder", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name, found in json.loads(results.read_text())["modes"].items():
        assert found["kills"] == 2 and found["different"] == [] and found["compared"] > 15, name
    survivors = "".join(log.read_text() for log in (tmp_path / "gloo").glob("killed-*.log"))
    assert "a peer has failed or does not answer (" in survivors or "(loop.watchdog)" in survivors
