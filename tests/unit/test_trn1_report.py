"""The first hour on a trn1, as far as a machine without one can tell: its page, its order, its time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.trn1_report import Report

ROOT = Path(__file__).resolve().parents[2]


def test_figures_are_on_the_page_at_once_under_their_question(tmp_path: Path) -> None:
    report = Report(tmp_path / "page.md", "Report", "driver 2.26\n", 60)
    report.add("host", "tokens per second", "1|2")
    report.add("right", "loss", "1e-5", "<= 1e-4")
    lines = report.page.read_text().splitlines()
    heads = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert heads == ["Are the numbers right?", "Does the host keep up with the device?", "Measured on"]
    assert "| loss | 1e-5 | <= 1e-4 |" in lines and "| tokens per second | 1\\|2 | a figure |" in lines
    assert lines[-3:] == ["```", "driver 2.26", "```"]
    with pytest.raises(KeyError):
        report.add("speed", "tokens per second", 1)


def test_what_would_not_end_in_time_is_left_out_and_named(tmp_path: Path) -> None:
    now = [0.0]
    report = Report(tmp_path / "page.md", "Report", "", 60, clock=lambda: now[0])
    assert report.has_time("first", 45)
    now[0] = 20 * 60
    assert not report.has_time("second", 45) and report.has_time("third", 40)
    said = [line for line in report.page.read_text().splitlines() if line.startswith("- ")]
    assert said == ["- second: about 45 minutes, 40 of 60 were left (TRN1_MINUTES)"]


@pytest.mark.xla
def test_the_beginning_of_the_hour_is_rehearsed(tmp_path: Path) -> None:
    """On XLA:CPU: a comparison with the CPU. `make rehearse-trn1` runs the whole hour so."""
    page = tmp_path / "page.md"
    env = {**os.environ, "TRN1_REHEARSAL": "1", "TRN1_REPORT": str(page), "TRN1_MINUTES": "0"}
    words = [sys.executable, "-m", "pytest", "-m", "trn1", "tests/trn1", "-v", "-p", "no:cacheprovider"]
    words += ["-k", "float32_is_that_of_the_cpu and not tp2 and not dp2"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    found = [line.partition("::")[2].split() for line in done.stdout.splitlines() if line.startswith("tests/trn1")]
    assert [(name.partition("[")[0], outcome) for name, outcome, *_ in found] == [
        ("test_float32_is_that_of_the_cpu", "PASSED")
    ]
    assert "tiny, LoRA, float32, 1 cores, tp 1, against the CPU: loss of step 1" in page.read_text()
