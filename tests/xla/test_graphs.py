"""Graphs that are traced once and run by their hash (`backends/graphs.py`): the same bits, and nothing stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.processes import json_of

pytestmark = pytest.mark.xla

WORKER = Path(__file__).with_name("graphs_worker.py")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker saw on one device."""
    return json_of([WORKER, tmp_path_factory.mktemp("one"), 1])


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What it saw over four, tp 2 x dp 2."""
    return json_of([WORKER, tmp_path_factory.mktemp("four"), 4])


@pytest.fixture(scope="module")
def neuron(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What it saw on one device as torch-neuronx sets torch_xla up: a clone is then the tensor's own buffer."""
    return json_of([WORKER, tmp_path_factory.mktemp("neuron"), 1], {"XLA_DISABLE_FUNCTIONALIZATION": "1"})


@pytest.mark.parametrize("case", ["lora", "weights"])
@pytest.mark.parametrize("devices", ["said", "mesh", "neuron"])
def test_by_hash_gives_the_bits_of_tracing(devices: str, case: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(devices)["ways"][case]
    assert found["tensors"] > 80
    assert found["once"] == found["compare"] == []


@pytest.mark.parametrize("case", ["lora", "weights"])
def test_one_graph_each_for_a_pass_an_update_and_an_evaluation(said: dict[str, Any], case: str) -> None:
    assert said["ways"][case]["once: graphs"] == 3


def test_the_python_of_a_graph_runs_once(said: dict[str, Any]) -> None:
    assert said["traces"] == {"passes": 1, "updates": 1, "evaluations": 1}


@pytest.mark.parametrize("devices", ["said", "mesh", "neuron"])
def test_a_tensor_that_nobody_named_is_refused_before_the_first_step(
    devices: str, request: pytest.FixtureRequest
) -> None:
    from_host, computed = request.getfixturevalue(devices)["unnamed"]
    for error in (from_host, computed):
        assert "reads a tensor (torch.float32 [3])" in error
        assert "--loop.tracing always" in error and "(after step 0)" in error


def test_a_graph_that_torch_xla_dropped_is_traced_again(said: dict[str, Any]) -> None:
    assert said["dropped"] == []


def test_a_graph_that_torch_xla_drops_for_others_is_no_unplanned_one(tmp_path: Path) -> None:
    found = json_of([WORKER, tmp_path, 1], {"XLA_COMPILATION_CACHE_SIZE": "2"})["evicted"]
    assert found["once: compiled again"] > 0 and found["compare: compiled again"] > 0
    assert found["once"] == found["compare"] == []


def test_other_bits_are_said_and_traced_from_then_on(said: dict[str, Any]) -> None:
    found = said["unequal"]
    assert found["different"] == []
    assert len(found["lines"]) == 1 and "the graph of _update gives other bits" in found["lines"][0]
    assert "loop.tracing=always" in found["lines"][0]


def test_results_take_the_memory_of_what_they_replace(said: dict[str, Any]) -> None:
    # of the pass the gradient and the sums; of the update also the vector, its moments and their count of steps
    assert said["memory"]["aliased"] == 2 + 6


def test_a_resumed_run_goes_on_to_the_bit(said: dict[str, Any]) -> None:
    assert said["resumed"] == []
