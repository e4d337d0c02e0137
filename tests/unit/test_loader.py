"""The loader: steps that can be asked for in any order, shared by any number of ranks, with exact weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from esm_neuron.config import DataConfig, LoopConfig, TrainConfig
from esm_neuron.data.dataset import PAD_SEGMENT, Batch, ExampleTable, Target, select_records
from esm_neuron.data.loader import EvalLoader, TrainLoader, eval_interval, prefetch, total_steps
from esm_neuron.data.tokenizer import CLS, EOS, MASK, PAD
from esm_neuron.errors import ConfigError, DataError

PACK = 48


class Label:
    """One class a sequence: the table's label."""

    per_token = False

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        label = table.labels[table.record[example]]
        return Target(table.sequence(example), np.int64(label), table.weight[example])

    def evaluation_target(self, table: ExampleTable, example: int) -> Target:
        return self.example_target(table, example, np.random.default_rng(0))


class Hide:
    """Masked residues, as in masked-language-model training: what is hidden is drawn from `rng`."""

    per_token = True

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        tokens = table.sequence(example)
        hidden = rng.random(len(tokens)) < 0.3
        return Target(np.where(hidden, MASK, tokens), tokens.astype(np.int64), hidden.astype(np.float32))

    def evaluation_target(self, table: ExampleTable, example: int) -> Target:
        return self.example_target(table, example, np.random.default_rng(table.content(example)))


def make_table(examples: int = 60, seed: int = 0) -> ExampleTable:
    rng = np.random.default_rng(seed)
    sequences = [[CLS, *rng.integers(4, 24, n), EOS] for n in rng.integers(1, PACK - 1, examples)]
    return ExampleTable(
        tokens=np.concatenate(sequences).astype(np.uint8),
        offsets=np.cumsum([0, *map(len, sequences)]),
        record=np.arange(examples),
        weight=rng.choice([1, 0.5, 0.25], examples).astype(np.float32),
        labels=rng.integers(0, 3, examples),
        ids=[f"p{i}" for i in range(examples)],
    )


def make_config(packs_per_step: int = 8, packs_per_device: int = 2, **data: object) -> TrainConfig:
    return TrainConfig(
        data=replace(DataConfig(pack_tokens=PACK, max_residues=PACK - 2, max_segments=6), **data),
        loop=LoopConfig(packs_per_step=packs_per_step, packs_per_device=packs_per_device, eval_packs_per_device=3),
    )


def assert_equal(one: Batch, other: Batch) -> None:
    for name in ("input_ids", "segment_ids", "positions", "labels", "weights"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert np.array_equal(one.members, other.members)


def examples_of(batches: list[Batch]) -> list[int]:
    members = np.concatenate([batch.members.ravel() for batch in batches])
    return sorted(members[members >= 0].tolist())


def by_example(batches: list[Batch]) -> dict[int, tuple[list[int], list[int], list[float]]]:
    """Input, label and weight of every example, wherever it lies."""
    found = {}
    for batch in batches:
        per_token = batch.labels.shape == batch.input_ids.shape
        for row, members in enumerate(batch.members):
            for segment, example in enumerate(members):
                if example >= 0:
                    mine = batch.segment_ids[row] == segment
                    at = mine if per_token else torch.arange(batch.max_segments) == segment
                    found[int(example)] = (
                        batch.input_ids[row][mine].tolist(),
                        batch.labels[row][at].tolist(),
                        batch.weights[row][at].tolist(),
                    )
    return found


@pytest.mark.parametrize("task", [Label(), Hide()])
def test_layout_of_a_batch(task: Label | Hide) -> None:
    table = make_table()
    loader = TrainLoader(table, task, make_config())
    for batch in loader.load(0).batches:
        assert batch.input_ids.shape == (2, PACK)
        assert batch.labels.shape == batch.weights.shape == ((2, PACK) if task.per_token else (2, 6))
        assert {t.dtype for t in (batch.input_ids, batch.segment_ids, batch.positions, batch.labels)} == {torch.int64}
        assert batch.weights.dtype == torch.float32
        for row, members in enumerate(batch.members):
            end = 0
            for segment, example in enumerate(members[members >= 0]):
                start, end = end, end + len(table.sequence(example))
                assert (batch.segment_ids[row, start:end] == segment).all()
                assert torch.equal(batch.positions[row, start:end], torch.arange(end - start))
                assert batch.input_ids[row, start] in (CLS, MASK)
                if not task.per_token:
                    assert batch.input_ids[row, start:end].tolist() == table.sequence(example).tolist()
                    assert batch.labels[row, segment] == table.labels[example]
                    assert batch.weights[row, segment] == table.weight[example]
                else:
                    assert set(batch.weights[row, start:end].tolist()) <= {0.0, 1.0}
            assert (batch.input_ids[row, end:] == PAD).all()
            assert (batch.segment_ids[row, end:] == PAD_SEGMENT).all()
            empty = slice(end, None) if task.per_token else slice(int((members >= 0).sum()), None)
            assert (batch.weights[row, empty] == 0).all()


def test_an_epoch_holds_every_example_once() -> None:
    table = make_table()
    loader = TrainLoader(table, Label(), make_config())
    for epoch in (0, 1):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        batches = [batch for step in steps for batch in loader.load(step).batches]
        assert examples_of(batches) == list(range(len(table)))
        assert {batch.input_ids.shape[1] for batch in batches} == {PACK}
        total = sum(float(batch.weights.sum()) for batch in batches)
        assert total == pytest.approx(float(table.weight.sum()))


def test_epochs_differ() -> None:
    loader = TrainLoader(make_table(), Label(), make_config())
    assert examples_of(loader.load(0).batches) != examples_of(loader.load(loader.steps_per_epoch).batches)


def test_any_step_can_be_asked_for_first() -> None:
    table, cfg = make_table(), make_config()
    walked = TrainLoader(table, Hide(), cfg)
    steps = 2 * walked.steps_per_epoch + 1
    in_order = [walked.load(step).batches for step in range(steps)]
    for step in (steps - 1, 1, walked.steps_per_epoch):
        for expected, found in zip(in_order[step], TrainLoader(table, Hide(), cfg).load(step).batches, strict=True):
            assert_equal(expected, found)
    for expected, found in zip(in_order[0], walked.load(0).batches, strict=True):
        assert_equal(expected, found)


@pytest.mark.parametrize("task", [Label(), Hide()])
@pytest.mark.parametrize(("dp", "packs_per_device"), [(1, 8), (2, 4), (4, 2), (2, 2), (4, 1)])
def test_a_step_holds_the_same_packs_on_any_number_of_ranks_and_passes(
    dp: int, packs_per_device: int, task: Label | Hide
) -> None:
    table = make_table()
    alone = TrainLoader(table, task, make_config(packs_per_device=1))
    ranks = [TrainLoader(table, task, make_config(packs_per_device=packs_per_device), dp, rank) for rank in range(dp)]
    assert {rank.passes for rank in ranks} == {8 // dp // packs_per_device}
    assert {rank.steps_per_epoch for rank in ranks} == {alone.steps_per_epoch}
    for step in range(alone.steps_per_epoch + 1):
        shares = [rank.load(step).batches for rank in ranks]
        in_order = [share[n] for n in range(ranks[0].passes) for share in shares]
        expected = alone.load(step).batches
        for name in ("input_ids", "segment_ids", "positions", "labels", "weights"):
            one, other = (torch.cat([getattr(b, name) for b in batches]) for batches in (expected, in_order))
            assert torch.equal(one, other), name
        assert {rank.load(step).residues for rank in ranks} == {alone.load(step).residues}


def test_randomness_of_an_example_does_not_depend_on_its_neighbours() -> None:
    table = make_table()
    packed = TrainLoader(table, Hide(), make_config())
    unpacked = TrainLoader(table, Hide(), make_config(packing=False))
    epochs = [
        by_example([b for s in range(loader.steps_per_epoch) for b in loader.load(s).batches])
        for loader in (packed, unpacked)
    ]
    assert epochs[0] == epochs[1]
    later = by_example(
        [b for s in range(packed.steps_per_epoch) for b in packed.load(s + packed.steps_per_epoch).batches]
    )
    assert epochs[0] != later, "another epoch hides other residues"


def test_seed_changes_order_and_masks() -> None:
    table = make_table()
    one, other = (TrainLoader(table, Hide(), replace(make_config(), seed=seed)) for seed in (1, 2))
    assert examples_of(one.load(0).batches) != examples_of(other.load(0).batches)
    hidden = [
        by_example([b for s in range(loader.steps_per_epoch) for b in loader.load(s).batches])
        for loader in (one, other)
    ]
    assert hidden[0] != hidden[1]


def test_last_step_is_filled_with_packs_of_no_weight() -> None:
    table = make_table(5)
    loader = TrainLoader(table, Label(), make_config(packs_per_step=16, packs_per_device=16, packing=False))
    (batch,) = loader.load(0).batches
    assert batch.input_ids.shape == (16, PACK)
    filler = batch.members[:, 0] < 0
    assert filler.sum() == 11
    assert (batch.input_ids[filler] == PAD).all()
    assert (batch.segment_ids[filler] == PAD_SEGMENT).all()
    assert (batch.weights[filler] == 0).all()
    assert (batch.weights[~filler] > 0).all()
    assert loader.padding_efficiency == table.lengths.sum() / (16 * PACK)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dp", [1, 2])
def test_efficiency_is_of_what_is_computed_where_shapes_are_free(dp: int, packing: bool) -> None:
    table, cfg = make_table(), make_config(packs_per_step=8, packs_per_device=2, packing=packing)
    ranks = [TrainLoader(table, Label(), cfg, dp, rank, static_shapes=False) for rank in range(dp)]
    made = [batch for rank in ranks for step in range(rank.steps_per_epoch) for batch in rank.load(step).batches]
    held = [batch for batch in made if (batch.segment_ids != PAD_SEGMENT).any()]  # an empty one has a slot, for a shape
    slots = sum(batch.input_ids.numel() for batch in held)
    assert ranks[0].padding_efficiency == pytest.approx(table.lengths.sum() / slots)
    assert ranks[0].padding_efficiency > TrainLoader(table, Label(), cfg, dp).padding_efficiency


@pytest.mark.parametrize("task", [Label(), Hide()])
def test_batch_of_filler_packs_alone_looks_like_any_other(task: Label | Hide) -> None:
    loader = TrainLoader(make_table(2), task, make_config(packing=False))
    full, filler = loader.load(0).batches[0], loader.load(0).batches[-1]
    assert (filler.members == -1).all()
    assert float(filler.weights.sum()) == 0
    for name in ("input_ids", "segment_ids", "positions", "labels", "weights"):
        assert getattr(full, name).shape == getattr(filler, name).shape
        assert getattr(full, name).dtype == getattr(filler, name).dtype


def test_residues_are_counted_without_specials() -> None:
    table = make_table()
    loader = TrainLoader(table, Label(), make_config())
    residues = int(table.lengths.sum()) - 2 * len(table)
    steps = [loader.load(step) for step in range(loader.steps_per_epoch)]
    assert sum(data.residues for data in steps) == residues and sum(data.sequences for data in steps) == len(table)
    slots = sum(
        batch.input_ids.numel() for step in range(loader.steps_per_epoch) for batch in loader.load(step).batches
    )
    assert loader.padding_efficiency == pytest.approx((residues + 2 * len(table)) / slots)


def test_total_steps() -> None:
    loader = TrainLoader(make_table(), Label(), make_config(packs_per_step=2))
    n = loader.steps_per_epoch
    assert n > 3
    assert total_steps(n, LoopConfig(epochs=2)) == 2 * n
    assert total_steps(n, LoopConfig(epochs=1 + 0.5 / n)) == n + 1
    assert total_steps(n, LoopConfig(epochs=2, max_steps=7, min_steps=9)) == 7
    assert total_steps(n, LoopConfig(epochs=1e-9)) == 1
    assert total_steps(n, LoopConfig(epochs=1, min_steps=3 * n)) == 3 * n


@pytest.mark.parametrize(
    ("steps_per_epoch", "loop", "every"),
    [
        (10, {"epochs": 3}, 10),
        (10, {"epochs": 3, "min_evals": 5}, 6),
        (1000, {"epochs": 1, "min_evals": 5}, 200),
        (7, {"epochs": 1, "min_steps": 100, "min_evals": 5}, 7),
        (10, {"max_steps": 3, "min_evals": 5}, 1),
        (10, {"max_steps": 40, "eval_every": 4, "min_evals": 5}, 4),
    ],
)
def test_validations_are_as_many_as_asked_for(steps_per_epoch: int, loop: dict[str, int], every: int) -> None:
    cfg = LoopConfig(**loop)
    assert eval_interval(steps_per_epoch, cfg) == every
    total = total_steps(steps_per_epoch, cfg)
    assert total // every >= min(cfg.min_evals, total)


@pytest.mark.parametrize(("packs", "cure"), [(10, "8 or 16"), (3, "8, or fewer packs per device")])
def test_packs_per_step_that_do_not_divide(packs: int, cure: str) -> None:
    with pytest.raises(ConfigError, match=rf"packs_per_step={packs} is not a multiple of 8 .* use .*={cure}$"):
        TrainLoader(make_table(), Label(), make_config(packs_per_step=packs, packs_per_device=4), dp=2)


def test_example_longer_than_a_pack() -> None:
    with pytest.raises(DataError, match="a pack holds 16"):
        TrainLoader(make_table(), Label(), make_config(pack_tokens=16, max_residues=14))


@pytest.mark.parametrize("task", [Label(), Hide()])
@pytest.mark.parametrize("dp", [1, 2, 3])
def test_evaluation_holds_every_example_once_over_all_ranks(dp: int, task: Label | Hide) -> None:
    table = make_table()
    ranks = [EvalLoader(table, task, make_config(), dp, rank) for rank in range(dp)]
    batches = [list(rank) for rank in ranks]
    assert len({len(share) for share in batches} | {len(rank) for rank in ranks}) == 1
    every = [batch for share in batches for batch in share]
    assert {batch.input_ids.shape for batch in every} == {(3, PACK)}
    assert examples_of(every) == list(range(len(table)))
    alone = by_example(list(EvalLoader(table, task, make_config())))
    assert by_example(every) == alone, "the same questions on any number of ranks"


def test_evaluation_hides_the_same_whatever_the_seed_and_the_rest_of_the_table() -> None:
    table = make_table()
    one, other = (by_example(list(EvalLoader(table, Hide(), replace(make_config(), seed=seed)))) for seed in (1, 2))
    assert one == other
    part, _, _ = select_records(table, np.arange(60) % 2 == 1)
    alone = by_example(list(EvalLoader(part, Hide(), make_config())))
    assert [alone[i] for i in range(30)] == [one[2 * i + 1] for i in range(30)]


def test_evaluation_asks_the_same_every_time() -> None:
    loader = EvalLoader(make_table(), Hide(), make_config())
    for one, other in zip(loader, loader, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("task", [Label(), Hide()])
def test_dynamic_shapes_leave_out_filler_packs_and_common_padding(task: Label | Hide) -> None:
    table = make_table(7)
    cfg = make_config(packing=False)
    fixed = list(EvalLoader(table, task, cfg, 2, 1))
    trimmed = list(EvalLoader(table, task, cfg, 2, 1, static_shapes=False))
    assert len(trimmed) == len(fixed)
    assert by_example(trimmed) == by_example(fixed)
    for batch in trimmed:
        rows, width = batch.input_ids.shape
        real = batch.members[:, 0] >= 0
        assert real.all() or rows == 1, "a batch without examples keeps one filler pack"
        longest = int(table.lengths[batch.members[real, 0]].max()) if real.any() else 1
        assert width == longest
    assert not (trimmed[-1].members >= 0).any(), "rank 1 has nothing left in the last batch"


def test_prefetch_gives_the_same_batches() -> None:
    table, cfg = make_table(), make_config()
    loader = TrainLoader(table, Hide(), cfg)
    steps = 2 * loader.steps_per_epoch
    ahead = list(prefetch(map(TrainLoader(table, Hide(), cfg).load, range(steps)), 3))
    assert [data.step for data in ahead] == list(range(steps))
    for data in ahead:
        for one, other in zip(data.batches, loader.load(data.step).batches, strict=True):
            assert_equal(one, other)


def test_prefetch_raises_what_went_wrong_in_its_place() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("record 3 is damaged")

    items = prefetch(broken(), 8)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(DataError, match="record 3 is damaged"):
        next(items)


def test_prefetch_stops_when_no_longer_wanted() -> None:
    made: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            made.append(len(made))
            yield made[-1]

    items = prefetch(endless(), 2)
    assert [next(items), next(items)] == [0, 1]
    items.close()  # type: ignore[attr-defined]
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}
    assert len(made) <= 4, "never more than two ahead"


def test_prefetch_of_nothing_ahead_is_an_error() -> None:
    with pytest.raises(ValueError, match="depth=0"):
        next(prefetch([1], 0))
