"""Folders written with one lane's libraries answer alike with the other's: transformers 4 and 5, PEFT 0.17 and 0.21."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from helpers import finished
from helpers.processes import output_of

ROOT = Path(__file__).parents[2]
LANES = (ROOT / ".venv", ROOT / ".venv-trn1")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs and exports of every kind, written by the libraries of this lane."""
    folder = tmp_path_factory.mktemp("written")
    finished.write(folder)
    return folder


@pytest.fixture(scope="module")
def other_lane() -> list[str]:
    """The words that start `helpers/finished.py` in the other lane's environment."""
    environments = [lane for lane in LANES if (lane / ".installed").is_file() and lane != Path(sys.prefix)]
    if len(environments) != 1:
        pytest.skip("needs both lanes' environments: make install install-trn1")
    return [str(environments[0] / "bin" / "python"), str(ROOT / "tests" / "helpers" / "finished.py")]


def everything_is_equal(equal: dict[str, bool]) -> bool:
    """Each of 5 tasks by 3 poolings by 3 adapters, by this package and transformers; adapters by PEFT too."""
    assert [what for what, is_equal in equal.items() if not is_equal] == []
    return len(equal) == 2 * len(list(finished.each())) + len(finished.KINDS)


def test_every_kind_of_run_is_read_by_its_own_lane(written: Path) -> None:
    assert everything_is_equal(finished.read(written))


def test_every_kind_of_run_is_read_by_the_other_lane(written: Path, other_lane: list[str]) -> None:
    assert everything_is_equal(json.loads(output_of([*other_lane, "read", written], ENVIRONMENT).splitlines()[-1]))


def test_every_kind_of_run_of_the_other_lane_is_read(tmp_path: Path, other_lane: list[str]) -> None:
    output_of([*other_lane, "write", tmp_path], ENVIRONMENT)
    assert everything_is_equal(finished.read(tmp_path))


ENVIRONMENT = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
