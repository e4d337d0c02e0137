"""The plan is what the loaders then do, and its figures follow from the files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from esm_neuron import cli
from esm_neuron.config import TrainConfig, settings
from esm_neuron.data.labels import Labels
from esm_neuron.data.loader import EvalLoader, TrainLoader, select_row_lengths
from esm_neuron.data.splits import Splits, load_splits
from esm_neuron.errors import ConfigError
from esm_neuron.models.shapes import SHAPES, EsmShape, known_shape
from esm_neuron.planning.plan import SET_UP, make_plan, render, tensor_parallel
from esm_neuron.tasks import create_task

Toy = Callable[..., TrainConfig]

BUCKETS = {"max_residues": 190, "pack_tokens": 192, "max_segments": 2, "max_buckets": 3}


@pytest.fixture
def bucketed(toy: Toy, lengthened: Callable[[TrainConfig], TrainConfig]) -> TrainConfig:
    loop = {"packs_per_step": 4, "packs_per_device": 2, "max_steps": None, "epochs": 2.5}
    return lengthened(toy(data=BUCKETS, loop=loop))


def train_loader(cfg: TrainConfig, splits: Splits) -> TrainLoader:
    """That of a backend with static shapes."""
    row_lengths = select_row_lengths(cfg, splits.train.lengths, SHAPES[cfg.model.name].hidden)
    return TrainLoader(splits.train, create_task(cfg.task, splits.labels), cfg, row_lengths=row_lengths)


def test_the_plan_is_what_the_loader_does(bucketed: TrainConfig) -> None:
    splits = load_splits(bucketed, Labels)
    plan = make_plan(bucketed, splits)
    loader = train_loader(bucketed, splits)
    assert plan.total.steps == loader.steps_per_epoch
    assert plan.total.efficiency == pytest.approx(loader.padding_efficiency)
    assert plan.steps == loader.total_steps(bucketed.loop.epochs, None)
    assert plan.total.passes == loader.passes == 2
    shapes, residues = Counter[int](), Counter[int]()
    for step in range(loader.steps_per_epoch):
        data = loader.load(step)
        length = data.batches[0].input_ids.shape[1]
        shapes[length] += 1
        residues[length] += data.residues
        rows = sum(batch.input_ids.shape[0] for batch in data.batches)
        assert rows == next(b.packs_per_step for b in plan.buckets if b.pack_tokens == length)
    assert len(shapes) > 1, "the toy data must give several buckets"
    assert {b.pack_tokens: b.steps for b in plan.buckets if b.steps} == shapes
    assert {b.pack_tokens: b.residues for b in plan.buckets if b.steps} == residues
    assert sum(b.share for b in plan.buckets) == pytest.approx(1)
    assert plan.total.sequences == len(splits.train)


def test_graphs_are_counted_by_the_shapes_that_come(bucketed: TrainConfig) -> None:
    splits = load_splits(bucketed, Labels)
    plan, task = make_plan(bucketed, splits), create_task(bucketed.task, splits.labels)
    loader = train_loader(bucketed, splits)
    trained = {b.input_ids.shape for step in range(plan.steps) for b in loader.batches(step)}
    assert plan.graphs_by_part["training pass"] == len(trained)
    firsts = {b.input_ids.shape for step in loader.first_steps(plan.steps) for b in loader.batches(step)}
    assert firsts == trained
    evaluated, first = set(), set()
    for table in (splits.valid, splits.test):
        assert table is not None
        held_out = EvalLoader(table, task, bucketed, row_lengths=loader.row_lengths)
        evaluated |= {b.input_ids.shape for b in held_out}
        first |= {b.input_ids.shape for b in held_out.first_batches()}
    assert plan.graphs_by_part["evaluation pass"] == len(evaluated)
    assert first == evaluated
    assert plan.graphs == len(trained) + len(evaluated) + 1 + SET_UP


def test_a_run_too_short_for_all_buckets_compiles_fewer(bucketed: TrainConfig) -> None:
    short = replace(bucketed, loop=replace(bucketed.loop, max_steps=1))
    assert make_plan(short, load_splits(short, Labels)).graphs_by_part["training pass"] == 1


def test_packing_saves_rows(toy: Toy) -> None:
    splits = load_splits(toy(), Labels)
    packed, plain = make_plan(toy(), splits), make_plan(toy(data={"packing": False}), splits)
    assert packed.unpacked_efficiency == pytest.approx(plain.total.efficiency)
    assert packed.total.efficiency > 1.5 * packed.unpacked_efficiency


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
    sizes = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 6, "intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    assert known_shape(str(tmp_path)) == EsmShape(layers=3, hidden=24, heads=6, intermediate=96)
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "hidden_size": "wide"}))
    with pytest.raises(ConfigError, match="hidden_size=wide.* must be numbers"):
        known_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json: no shape"):
        known_shape(str(tmp_path))


def test_buckets_of_a_model_that_is_not_here_are_refused(bucketed: TrainConfig) -> None:
    cfg = replace(bucketed, model=replace(bucketed.model, name="someone/else"))
    with pytest.raises(ConfigError, match="someone/else is not here; use data.max_buckets=1"):
        make_plan(cfg, load_splits(cfg, Labels))


def test_the_command(bucketed: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(settings.dump(bucketed))
    plan = make_plan(bucketed, load_splits(bucketed, Labels))
    assert cli.main(["plan", "--config", str(path)]) == 0
    assert capsys.readouterr().out == render(plan) + "\n"
    assert cli.main(["plan", "--json", "--config", str(path), "--loop.packs_per_device", "4"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["total"]["passes"] == 1
    assert said["graphs"] == plan.graphs
    assert cli.main(["plan", "--config", str(path), "--devices", "0"]) == 2
    assert not Path(bucketed.output).exists()
