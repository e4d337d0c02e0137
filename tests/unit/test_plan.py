"""The plan is what the loaders then do, and its figures follow from the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from esm_neuron import cli
from esm_neuron.config import TrainConfig, settings
from esm_neuron.data.labels import Labels
from esm_neuron.data.loader import EvalLoader, TrainLoader, total_steps
from esm_neuron.data.splits import Splits, load_splits
from esm_neuron.errors import ConfigError
from esm_neuron.models.shapes import SHAPES, EsmShape, esm_config, known_shape
from esm_neuron.planning.plan import SET_UP, make_plan, render, tensor_parallel
from esm_neuron.tasks import create_task

Toy = Callable[..., TrainConfig]

PACKS = {"max_residues": 190, "pack_tokens": 192, "max_segments": 2}


@pytest.fixture
def lengthy(toy: Toy, lengthened: Callable[[TrainConfig], TrainConfig]) -> TrainConfig:
    loop = {"packs_per_step": 4, "packs_per_device": 2, "max_steps": None, "epochs": 2.5}
    return lengthened(toy(data=PACKS, loop=loop))


def train_loader(cfg: TrainConfig, splits: Splits) -> TrainLoader:
    """That of a backend with static shapes."""
    return TrainLoader(splits.train, create_task(cfg.task, splits.labels), cfg)


def test_the_plan_is_what_the_loader_does(lengthy: TrainConfig) -> None:
    splits = load_splits(lengthy, Labels)
    plan = make_plan(lengthy, splits)
    loader = train_loader(lengthy, splits)
    assert plan.epoch.steps == loader.steps_per_epoch
    assert plan.epoch.efficiency == pytest.approx(loader.padding_efficiency)
    assert plan.steps == total_steps(loader.steps_per_epoch, lengthy.loop)
    assert plan.epoch.passes == loader.passes == 2
    made = [loader.load(step) for step in range(loader.steps_per_epoch)]
    batches = [batch for data in made for batch in data.batches]
    assert {batch.input_ids.shape[1] for batch in batches} == {plan.epoch.pack_tokens}
    assert {sum(len(batch.input_ids) for batch in data.batches) for data in made} == {plan.epoch.packs_per_step}
    assert sum(int((batch.members[:, 0] >= 0).sum()) for batch in batches) == plan.epoch.packs
    assert sum(data.residues for data in made) == plan.epoch.residues
    assert plan.epoch.sequences == len(splits.train)


def test_graphs_are_counted_by_the_shapes_that_come(lengthy: TrainConfig) -> None:
    splits = load_splits(lengthy, Labels)
    plan, task = make_plan(lengthy, splits), create_task(lengthy.task, splits.labels)
    loader = train_loader(lengthy, splits)
    trained = {b.input_ids.shape for step in range(plan.steps) for b in loader.load(step).batches}
    assert plan.graphs_by_phase["training pass"] == len(trained)
    held_out = [table for table in (splits.valid, splits.test) if table is not None]
    assert len(held_out) == 2
    evaluated = {b.input_ids.shape for table in held_out for b in EvalLoader(table, task, lengthy)}
    assert plan.graphs_by_phase["evaluation pass"] == len(evaluated)
    assert plan.graphs == len(trained) + len(evaluated) + 1 + SET_UP


def test_packing_saves_packs(toy: Toy) -> None:
    splits = load_splits(toy(), Labels)
    packed, plain = make_plan(toy(), splits), make_plan(toy(data={"packing": False}), splits)
    assert packed.epoch.unpacked_efficiency == pytest.approx(plain.epoch.efficiency)
    assert packed.epoch.efficiency > 1.5 * packed.epoch.unpacked_efficiency


def test_devices_that_do_not_share_evenly_are_refused(toy: Toy) -> None:
    cfg = toy(loop={"packs_per_step": 4, "packs_per_device": 4})
    with pytest.raises(ConfigError, match=r"loop\.packs_per_step=4 is not a multiple of 8"):
        make_plan(cfg, load_splits(cfg, Labels), devices=2)


def test_tensor_parallel_degrees_of_the_released_models() -> None:
    mid = tensor_parallel(SHAPES["esm2_t33_650M"])
    assert mid.degrees == (1, 2, 4) and mid.padded == (1, 2, 4, 8, 16, 32)
    assert mid.instances == {"trn1.2xlarge": (1, 2), "trn1.32xlarge": (1, 2, 4, 8, 32)}
    assert tensor_parallel(SHAPES["esm2_t48_15B"]).degrees == (1, 2, 4, 8)


def test_the_shape_of_a_model_by_name_hub_id_and_folder(tmp_path: Path) -> None:
    assert known_shape("facebook/esm2_t33_650M_UR50D") == known_shape("esm2_t33_650M") == SHAPES["esm2_t33_650M"]
    assert known_shape("someone/else") is None
    shape = EsmShape(layers=3, hidden=24, heads=6, intermediate=96)
    raw = esm_config(shape).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert known_shape(str(tmp_path)) == shape
    (tmp_path / "config.json").write_text(json.dumps({**raw, "hidden_size": "wide"}))
    with pytest.raises(ConfigError, match=r"config\.json: hidden_size is 'wide', must be a whole number"):
        known_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json is not of an ESM-2: model_type is None"):
        known_shape(str(tmp_path))


def test_the_command(lengthy: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(settings.dump(lengthy))
    plan = make_plan(lengthy, load_splits(lengthy, Labels))
    assert cli.main(["plan", "--config", str(path)]) == 0
    assert capsys.readouterr().out == render(plan) + "\n"
    assert cli.main(["plan", "--json", "--config", str(path), "--loop.packs_per_device", "4"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["epoch"]["passes"] == 1
    assert said["graphs"] == plan.graphs
    assert cli.main(["plan", "--config", str(path), "--devices", "0"]) == 2
    assert not Path(lengthy.output).exists()
