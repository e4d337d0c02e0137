"""A run that is killed, whatever it is doing, ends as if nothing had happened; `make soak` does it in every mode."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


def test_a_run_killed_three_times_ends_byte_for_byte_like_one_that_was_not(tmp_path: Path) -> None:
    results = tmp_path / "soak.json"
    words = [sys.executable, str(SOAK), "--modes", "lora", "--kills", "3", "--steps", "12"]
    words += ["--seed", "2"]  # whose first kill leaves a whole checkpoint, on a machine of any speed
    words += ["--results", str(results), "--folder", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(results.read_text())["modes"]["lora"]
    assert found["kills"] == 3 and found["resumed"] > 0 and found["different"] == [] and found["compared"] > 15
