"""The page for those who come from AWS's sample: its commands, on a small table with DeepLoc's columns."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from-aws-sample.md").read_text()


def table(path: Path) -> None:
    """Proteins of DeepLoc's columns whose composition tells the label."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ACC", "Sequence", "Kingdom", "Partition", "Membrane", "Cytoplasm"])
        for n in range(60):
            residues = draw.choices("LIVFAG" if n % 2 else "DEKRSTNQ", k=draw.randint(105, 130))
            kingdom = "Metazoa" if n % 5 else "Fungi"
            rows.writerow([f"P{n:05d}", "M" + "".join(residues), kingdom, n % 5, n % 2, 1 - n % 2])


@pytest.mark.launchers
def test_the_commands_of_the_page(tmp_path: Path) -> None:
    """In order, as they stand, with few steps of a small model."""
    table(tmp_path / "deeploc.csv")
    programs = tmp_path / "bin"
    programs.mkdir()
    few = "--model.name tiny --model.init random --loop.max_steps 2"
    (programs / "esm-neuron").write_text(
        f'#!/bin/sh\n[ "$1" = train ] && set -- "$@" {few}\nexec {sys.executable} -m esm_neuron.cli "$@"\n'
    )
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    for name in ("configs", "launchers", "examples", "constraints"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) == 4
    outputs = []
    for block in blocks:
        words = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr[-3000:]}"
        outputs.append(done.stdout)
    request = json.loads(outputs[2])
    assert [one["ChannelName"] for one in request["InputDataConfig"]] == ["train"]
    assert list((tmp_path / "runs" / "membrane").rglob("*.html")) and (tmp_path / "model.tar.gz").exists()


def test_the_names_that_the_page_gives_are_settings() -> None:
    from esm_neuron.config.settings import known_keys

    named = set(re.findall(r"--((?:data|model|loop|optim|adapter|parallel|task)\.\w+)", PAGE))
    assert len(named) > 15 and named <= set(known_keys())
