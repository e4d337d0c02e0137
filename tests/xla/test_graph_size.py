"""The graph of a training pass on XLA:CPU keeps its budget: host and compiler pay for every instruction."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.graph_size import check
from helpers.processes import json_of

pytestmark = pytest.mark.xla


def test_a_pass_keeps_its_budget(tmp_path: Path) -> None:
    check(json_of([Path(__file__).with_name("graph_worker.py"), tmp_path]))
