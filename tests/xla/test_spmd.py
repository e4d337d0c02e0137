"""The `xla` backend over four virtual CPU devices, tp 2 x dp 2, against the plain CPU: same training, really cut."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import parity
import pytest
from helpers.processes import json_of
from helpers.xla_tasks import TASKS, task_runs

from esm_neuron.config import TrainConfig

pytestmark = pytest.mark.xla

WORKER = Path(__file__).with_name("spmd_worker.py")
STEP_1, STEP_20 = 1e-5, 1e-3
"""Largest difference as a share of the tensor's largest value: in step 1, and after 20 steps."""

TP = 2
COLUMN = r"attention\.self\.(query|key|value)|intermediate\.dense"
ROW = r"attention\.output\.dense|output\.dense"
CUT = [
    (rf"layer\.\d+\.({COLUMN})\.base_layer\.(weight|bias)", 0),
    (rf"layer\.\d+\.({COLUMN})\.lora_B\.default\.weight", 0),
    (rf"layer\.\d+\.({ROW})\.base_layer\.weight", 1),
    (rf"layer\.\d+\.({ROW})\.lora_A\.default\.weight", 1),
]
"""Parameter -> the dimension that is cut, written apart from the plan; all others are whole on each device."""

TILES = {
    None: "{replicated}",
    (1, 0): "{devices=[2,2]0,2,1,3 last_tile_dim_replicate}",
    (2, 0): "{devices=[2,1,2]0,2,1,3 last_tile_dim_replicate}",
    (2, 1): "{devices=[1,2,2]0,2,1,3 last_tile_dim_replicate}",
}
"""(dimensions, which is cut) -> XLA's word for it: devices 0 and 2 hold one half, 1 and 3 the other."""


def _work(mode: str, devices: int, folder: Path, tasks: Sequence[Path] = ()) -> dict[str, Any]:
    path = os.pathsep.join([str(parity.HERE), str(parity.HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices), "USE_TORCH_XLA": "0", "PYTHONPATH": path.strip(":")}
    return json_of([WORKER, mode, folder, *tasks], env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spmd")


@pytest.fixture(scope="module")
def mesh(folder: Path, task_toys: dict[str, TrainConfig]) -> dict[str, Any]:
    return _work("mesh", 4, folder, task_runs(task_toys))


def _dimension(name: str) -> int | None:
    return next((dim for pattern, dim in CUT if re.search(pattern + "$", name)), None)


@pytest.mark.parametrize("task", ["cls", "mlm"])
def test_trains_as_the_plain_cpu_does(mesh: dict[str, Any], task: str) -> None:
    found = mesh[task]
    assert found["logits"] <= STEP_1
    assert found["losses"][0] == pytest.approx(found["expected_losses"][0], rel=STEP_1)
    assert len(found["gradients"]) >= 24 and min(found["largest_gradients"].values()) > 0
    assert max(found["gradients"].values()) <= STEP_1
    assert len(found["losses"]) == 20
    assert found["losses"] == pytest.approx(found["expected_losses"], rel=STEP_20)
    assert found["norms"] == pytest.approx(found["expected_norms"], rel=STEP_20)
    assert max(found["norms"]) > 0.5, "nothing was clipped"
    assert {name.partition("/")[0] for name in found["state"]} == {"weight", "moment"}
    assert max(found["state"].values()) <= STEP_20
    assert found["metrics"] == pytest.approx(found["expected_metrics"], rel=STEP_1)


@pytest.mark.parametrize("task", ["cls", "mlm"])
def test_a_pass_holds_the_rows_of_every_device(mesh: dict[str, Any], task: str) -> None:
    found = mesh[task]
    assert found["local_dp"] == 2
    assert found["passes"] == [4, 2], "the same four rows a step: four passes on one device, two on two"
    assert found["batches"][1] == -(-found["batches"][0] // 2)


def test_a_step_that_is_no_number_moves_nothing(mesh: dict[str, Any]) -> None:
    assert (mesh["left_out"]["norm"], mesh["left_out"]["moved"]) == ("nan", [])


@pytest.mark.parametrize("run", ["cls", "mlm", "mesh_after_cpu", "left_out"])
def test_every_tensor_is_cut_as_planned(mesh: dict[str, Any], run: str) -> None:
    layout = mesh[run]["layout"]
    cut = {name for name in layout if _dimension(name) is not None}
    assert len(cut) == 2 * (4 * 2 + 2), "two blocks: weight and bias of four linears, the weight of two"
    trained = 0
    for name, held in layout.items():
        dim, shape = _dimension(name), held["shape"]
        tile = TILES[None if dim is None else (len(shape), dim)]
        part = [length // TP if d == dim else length for d, length in enumerate(shape)]
        assert set(held["specs"].values()) == {tile}, name
        assert all(parts == [part] * 4 for parts in held["parts"].values()), name
        trained += set(held["specs"]) == {"value", "gradient", "exp_avg", "exp_avg_sq"}
    assert trained == 1, "all that LoRA trains is one vector, whole on each device"


def test_the_rows_of_a_batch_are_shared_out(mesh: dict[str, Any]) -> None:
    rows = mesh["rows"]
    assert set(rows) == {"input_ids", "segment_ids", "positions", "labels", "weights", "logits"}
    assert rows.pop("logits") == "{devices=[2,1,1,2]0,1,2,3 last_tile_dim_replicate}"
    assert set(rows.values()) == {"{devices=[2,1,2]0,1,2,3 last_tile_dim_replicate}"}


@pytest.mark.parametrize("task", ["cls", "mlm"])
def test_one_graph_for_a_pass_an_update_and_an_evaluation(mesh: dict[str, Any], task: str) -> None:
    graphs = mesh[task]["graphs"]
    once = {"first pass": [1, 0], "first update": [1], "first evaluation": [1]}
    never = {"later pass": 19 * 2, "later update": 19, "later evaluation": 2, "save": 2}
    expected = {**once, **{part: [0] * times for part, times in never.items()}}
    assert {part: graphs.pop(part) for part in expected} == expected
    assert not any(sum(counts) for counts in graphs.values()), "elsewhere"


def test_a_pack_predicts_as_each_protein_alone(mesh: dict[str, Any]) -> None:
    assert mesh["packs"]["most_in_a_row"] >= 3
    assert mesh["packs"]["difference"] <= STEP_1


def test_checkpoints_pass_between_mesh_and_cpu(mesh: dict[str, Any]) -> None:
    expected = mesh["cls"]["losses"][10:]
    assert len(set(expected)) == 10
    assert mesh["cpu_after_mesh"]["losses"] == pytest.approx(expected, rel=STEP_1)
    assert mesh["mesh_after_cpu"]["losses"] == pytest.approx(expected, rel=STEP_1)
    assert not any(sum(counts) for counts in mesh["mesh_after_cpu"]["graphs"].values())


def test_a_mesh_checkpoint_goes_on_with_one_device(mesh: dict[str, Any], folder: Path) -> None:
    single = _work("single", 1, folder)
    assert single["local_dp"] == 1
    assert single["losses"] == pytest.approx(mesh["cls"]["losses"][10:], rel=STEP_1)
    assert single["message"] == (
        "parallel.tp=2: this process has one XLA device; use parallel.tp=1, or give it more devices "
        "(on the CPU: CPU_NUM_DEVICES)"
    )


def test_train_and_predict_as_commands(mesh: dict[str, Any]) -> None:
    commands = mesh["commands"]
    assert commands["steps"] == 2
    assert commands["ids"] == [f"valid {number}" for number in range(24)]
    assert commands["difference"] <= STEP_1


def test_what_does_not_fit_is_refused_with_the_cure(mesh: dict[str, Any]) -> None:
    assert mesh["messages"] == {
        "devices": "parallel.tp=3 does not divide the 4 devices of this process; use parallel.tp=1, 2 or 4",
        "heads": "tp=4 does not divide 2 attention heads of tiny; use tp=1 or 2",
        "intermediate": "tp=4 does not divide the intermediate size 126 of tiny; use tp=1 or 2",
        "padding": "parallel.pad_heads=true: only the neuron backend adds zero heads; use parallel.pad_heads=false",
        "rows": "loop.packs_per_step=4 is not a multiple of 8 (loop.packs_per_device=4 on 2 data-parallel ranks); "
        "use loop.packs_per_step=8, or fewer packs per device",
    }


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_and_scores_as_on_the_cpu(
    mesh: dict[str, Any], task: str, same_metrics: Callable[..., None]
) -> None:
    cpu, xla = mesh["tasks"][task]
    assert len(cpu["losses"]) == (0 if task == "probe" else 6)
    assert xla["losses"] == pytest.approx(cpu["losses"], rel=1e-4)
    same_metrics(xla["test"], cpu["test"], abs=1e-3)
