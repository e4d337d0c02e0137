"""The Snakemake example as it is, by the real snakemake: a CSV and a FASTA, other names, a training that was killed."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.toys import write_proteins

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "snakemake"
CHECKPOINT = "runs/location/checkpoints/step-00000004"
"""The last one: without it and the result a run is as one that was killed before."""

pytestmark = pytest.mark.trackers


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The example beside proteins, with a small network, and `esm-neuron` on the PATH."""
    (tmp_path / "Snakefile").write_text((EXAMPLE / "Snakefile").read_text())
    cfg = yaml.safe_load((EXAMPLE / "config.yaml").read_text())
    assert list(cfg["train"].values()) == [{"data": "my.csv"}] and cfg["predict"] == {"new": "new.fasta"}
    cfg["settings"] |= {"model.name": "tiny", "model.init": "random"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    write_proteins(tmp_path / "my.csv", 80)
    (tmp_path / "new.fasta").write_text(">new-1\nMKVLAAGIVGACDEFGHIKL\n>new-2\nRSTVWYRSTVWYRSTVWY\n")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "esm-neuron"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m esm_neuron.cli "$@"\n')
    program.chmod(0o755)
    return tmp_path


def answers(place: Path, model: str) -> list[dict[str, str]]:
    with (place / "answers" / model / "new.csv").open() as file:
        return list(csv.DictReader(file))


def snakemake(place: Path, fails: bool = False) -> str:
    """What it said."""
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(place)}
    command = [os.environ["SNAKEMAKE"], "--cores", "1", "--nocolor"]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
    logs = "\n".join(log.read_text() for log in place.glob("logs/*"))
    assert (done.returncode != 0) == fails, f"{done.stderr[-3000:]}\n{logs[-3000:]}"
    return done.stderr


def test_a_csv_and_a_fasta_to_a_report_and_answers_once(place: Path) -> None:
    snakemake(place)
    rows = answers(place, "location")
    assert [row["id"] for row in rows] == ["new-1", "new-2"] and {row["label"] for row in rows} <= {"alpha", "beta"}
    assert (place / "runs" / "location" / "report" / "index.html").is_file()
    assert "Nothing to be done" in snakemake(place)
    (place / "new.fasta").write_text(">other\nMKVLAAGIVGACDEFGHIKL\n")
    assert "rule predict" in (said := snakemake(place)) and "rule train" not in said
    write_proteins(place / "my.csv", 60, seed=1)
    assert "rule train" in snakemake(place)  # anew
    assert [row["id"] for row in answers(place, "location")] == ["other"]


def set_up(place: Path, **settings: Any) -> None:
    """Train four steps of LoRA, with a checkpoint after each."""
    cfg = yaml.safe_load((place / "config.yaml").read_text())
    more = {"adapter.kind": "lora", "loop.max_steps": 4, "checkpoint.every": 1, "loop.packs_per_step": 4}
    cfg["settings"] |= {**more, "loop.packs_per_device": 4, **settings}
    (place / "config.yaml").write_text(yaml.safe_dump(cfg))


def test_an_interrupted_training_goes_on(place: Path) -> None:
    set_up(place)
    program = place / "bin" / "esm-neuron"
    whole = program.read_text()
    program.write_text(
        f"{whole.replace('exec ', '')}[ $1 = train ] && rm -r runs/location/result.json {CHECKPOINT} && exit 75\n"
    )
    snakemake(place, fails=True)
    assert not (place / "runs" / "location.trained").exists()
    program.write_text(whole)
    snakemake(place)
    assert "resumed after step 3 of 4" in (place / "logs" / "train-location.log").read_text()


def test_rows_of_the_configuration_with_spaces_and_settings_of_their_own(place: Path) -> None:
    cfg = yaml.safe_load((place / "config.yaml").read_text())
    (place / "my.csv").rename(place / "my proteins.csv")
    more = {"adapter.kind": "lora", "loop.max_steps": 2, "loop.packs_per_step": 4, "loop.packs_per_device": 4}
    cfg["train"] = {"probe": {"data": "my proteins.csv"}, "lora": {"data": "my proteins.csv", "settings": more}}
    (place / "config.yaml").write_text(yaml.safe_dump(cfg))
    snakemake(place)
    assert {path.parent.name for path in place.glob("answers/*/new.csv")} == {"probe", "lora"}
    kinds = {
        path.parent.name: yaml.safe_load(path.read_text())["adapter"]["kind"]
        for path in place.glob("runs/*/config.yaml")
    }
    assert kinds == {"probe": "probe", "lora": "lora"}


def test_a_finished_training_whose_rule_was_killed_is_kept_and_one_of_other_settings_is_not(place: Path) -> None:
    set_up(place)
    program, run = place / "bin" / "esm-neuron", place / "runs" / "location"
    whole = program.read_text()
    program.write_text(f"{whole.replace('exec ', '')}[ $1 = train ] && exit 75\n")  # behind result.json
    snakemake(place, fails=True)
    weights = run / "checkpoints" / Path(CHECKPOINT).name / "model.safetensors"
    trained = weights.stat().st_mtime_ns
    program.write_text(whole)
    snakemake(place)
    log = place / "logs" / "train-location.log"
    assert "resumed after step 4 of 4" in log.read_text() and weights.stat().st_mtime_ns == trained

    set_up(place, **{"optim.lr": "fast"})
    snakemake(place, fails=True)
    assert weights.stat().st_mtime_ns == trained, "what is mistyped removes nothing"
    set_up(place, **{"optim.lr": 5e-3})
    assert "rule train" in snakemake(place)
    assert "resumed" not in log.read_text() and weights.stat().st_mtime_ns > trained
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == 5e-3
