"""Packing: every example once, nothing over its limits, little padding, and the same plan from the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_neuron.data.packing import (
    PackPlan,
    attention_cost,
    bucket_candidates,
    bucket_rows,
    choose_buckets,
    pack_histogram,
    plan_buckets,
    plan_epoch,
)
from esm_neuron.errors import ConfigError, DataError

ROW = 64


def protein_lengths(number: int, longest: int, seed: int = 0) -> np.ndarray:
    """Lengths in tokens with the law of proteins: log-normal, cropped to the row."""
    residues = np.random.default_rng(seed).lognormal(np.log(longest / 3), 0.7, number)
    return np.clip(residues, 3, longest).astype(np.int64)


def plan_packs(lengths: np.ndarray, pack_tokens: int, max_segments: int, rng: np.random.Generator) -> PackPlan:
    """Rows of one length."""
    return plan_buckets(lengths, (pack_tokens,), max_segments, rng)[0]


def assert_legal(packs: tuple[PackPlan, ...], lengths: np.ndarray, max_segments: int) -> None:
    """Every example once over all plans; no row empty, over its slots or over its segments."""
    members = np.concatenate([pack.members for pack in packs])
    assert np.array_equal(np.sort(members), np.arange(len(lengths)))
    for pack in packs:
        assert pack.row_offsets[0] == 0
        assert pack.row_offsets[-1] == len(pack.members)
        for number in range(pack.rows):
            row = pack.row(number)
            assert 1 <= len(row) <= max_segments
            assert lengths[row].sum() <= pack.pack_tokens


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, ROW), min_size=1, max_size=200),
    row_lengths=st.sets(st.integers(1, ROW - 1), max_size=3),
    max_segments=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_every_example_once_within_limits(
    lengths: list[int], row_lengths: set[int], max_segments: int, seed: int
) -> None:
    array = np.array(lengths)
    buckets = (*row_lengths, ROW)
    packs = plan_buckets(array, buckets, max_segments, np.random.default_rng(seed))
    assert [pack.pack_tokens for pack in packs] == sorted(buckets)
    assert_legal(packs, array, max_segments)


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, ROW), min_size=1, max_size=120),
    packs_per_step=st.integers(1, 7),
    seed=st.integers(0, 2**32),
)
def test_steps_hold_every_example_once_and_one_row_length(lengths: list[int], packs_per_step: int, seed: int) -> None:
    array = np.array(lengths)
    plan = plan_epoch(array, (16, 32, ROW), 8, packs_per_step, np.random.default_rng(seed))
    seen = []
    for index in range(len(plan)):
        pack_tokens, rows = plan.step(index)
        assert len(rows) == packs_per_step * (ROW // pack_tokens)
        assert any(len(row) for row in rows)
        fillers = [len(row) == 0 for row in rows]
        assert fillers == sorted(fillers), "filler rows come last"
        assert all(array[row].sum() <= pack_tokens for row in rows)
        seen.extend(np.concatenate(rows).tolist())
    assert sorted(seen) == list(range(len(lengths)))
    assert 0 < plan.efficiency(array) <= plan.efficiency(array, 1) <= 1


def test_little_padding_on_protein_lengths() -> None:
    lengths = protein_lengths(5000, 1024)
    plan = plan_packs(lengths, 1024, 32, np.random.default_rng(0))
    assert plan.efficiency(lengths) == lengths.sum() / (plan.rows * 1024)
    assert plan.efficiency(lengths) >= 0.99
    assert plan_packs(lengths, 1024, 1, np.random.default_rng(0)).efficiency(lengths) < 0.5


def test_best_fit_by_hand() -> None:
    recipes = pack_histogram(np.bincount([6, 6, 5, 4, 4, 3, 2]), (10,), 8)
    made = sorted((recipe.parts, recipe.rows) for recipe in recipes)
    assert made == [(((5, 1), (3, 1), (2, 1)), 1), (((6, 1), (4, 1)), 2)]


def test_short_sequences_fill_long_rows_before_they_open_short_ones() -> None:
    counts = np.bincount([30] * 2 + [10] * 8)
    rows = {recipe.pack_tokens: recipe.rows for recipe in pack_histogram(counts, (20, 40), 8)}
    assert rows == {40: 2, 20: 3}


def test_same_seed_same_plan_other_seed_other_company() -> None:
    lengths = protein_lengths(500, ROW)
    first, again, other = (plan_packs(lengths, ROW, 8, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.members, again.members)
    assert np.array_equal(first.row_offsets, again.row_offsets)
    assert first.rows == other.rows, "the number of rows depends on the lengths alone"
    assert {frozenset(first.row(r)) for r in range(first.rows)} != {frozenset(other.row(r)) for r in range(other.rows)}


def test_order_within_a_row_and_of_the_rows_is_random() -> None:
    lengths = np.repeat([40, 20], 100)
    plan = plan_packs(lengths, 60, 8, np.random.default_rng(0))
    long_first = [bool(lengths[plan.row(r)[0]] == 40) for r in range(plan.rows)]
    assert 25 <= sum(long_first) <= 75
    lengths = np.array([60] * 50 + [30] * 100)
    plan = plan_packs(lengths, 60, 8, np.random.default_rng(0))
    singles = [len(plan.row(r)) == 1 for r in range(plan.rows)]
    assert 10 <= sum(singles[:50]) <= 40


def test_every_pairing_of_equal_lengths_is_as_likely() -> None:
    """Four sequences, two a row: each of the three pairings comes up in a third of the plans."""
    lengths = np.full(4, 5)
    partners = np.zeros(4, int)
    for seed in range(600):
        row = plan_packs(lengths, 10, 2, np.random.default_rng(seed)).row(0).tolist()
        other = plan_packs(lengths, 10, 2, np.random.default_rng(seed)).row(1).tolist()
        pair = row if 0 in row else other
        partners[sum(pair)] += 1
    assert partners[0] == 0
    assert (np.abs(partners[1:] - 200) < 60).all()


def test_one_segment_a_row() -> None:
    plan = plan_packs(np.array([3, 2, 5]), 10, 1, np.random.default_rng(0))
    assert np.array_equal(plan.row_offsets, np.arange(4))


def test_buckets_mix_over_the_epoch_and_only_the_last_step_of_each_is_short() -> None:
    lengths = np.array([16] * 400 + [64] * 100)
    plan = plan_epoch(lengths, (16, 64), 8, 8, np.random.default_rng(0))
    assert np.array_equal(np.bincount(plan.bucket), [13, 13])
    assert len(set(plan.bucket[:13].tolist())) == 2
    for bucket in (0, 1):
        steps = np.flatnonzero(plan.bucket == bucket)
        assert all(len(row) for step in steps[:-1] for row in plan.step(step)[1])
        assert any(not len(row) for row in plan.step(steps[-1])[1])


def test_single_bucket_ends_with_the_short_step() -> None:
    plan = plan_epoch(np.full(10, 8), (8,), 1, 4, np.random.default_rng(0))
    assert [sum(bool(len(row)) for row in plan.step(index)[1]) for index in range(len(plan))] == [4, 4, 2]
    assert plan.efficiency(np.full(10, 8)) == 10 / 12


def test_too_long_names_the_example_and_the_cure() -> None:
    lengths = np.array([5, 2000, 7])
    message = r"example 1 has 2000 tokens, a row holds 1024; use data.pack_tokens >= 2000, or .*max_residues <= 1022"
    with pytest.raises(DataError, match=message):
        plan_buckets(lengths, (512, 1024), 8, np.random.default_rng(0))
    with pytest.raises(DataError, match=message):
        choose_buckets(lengths, (512, 1024), 2, 8, attention_cost(64))


def test_nothing_to_pack_is_an_error() -> None:
    with pytest.raises(DataError, match="0 examples"):
        plan_packs(np.array([], np.int64), 10, 1, np.random.default_rng(0))
    with pytest.raises(DataError, match="example 1 has 0 tokens"):
        plan_packs(np.array([3, 0]), 10, 1, np.random.default_rng(0))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_width_of_the_lengths_does_not_matter(dtype: type) -> None:
    lengths = protein_lengths(300, ROW)
    reference = plan_packs(lengths, ROW, 8, np.random.default_rng(0))
    plan = plan_packs(lengths.astype(dtype), ROW, 8, np.random.default_rng(0))
    assert np.array_equal(plan.members, reference.members)
    assert plan.members.dtype == np.int32


def test_rows_longer_than_16_bits() -> None:
    lengths = np.array([70_000, 10, 300, 65_536])
    packs = (plan_packs(lengths, 70_100, 8, np.random.default_rng(0)),)
    assert_legal(packs, lengths, 8)


def test_attention_cost_is_linear_plus_quadratic() -> None:
    cost = attention_cost(64)
    assert cost(100) == 12 * 64**2 * 100 + 2 * 64 * 100**2


def test_candidates_fill_a_step() -> None:
    assert bucket_candidates(1024) == (128, 192, 256, 320, 512, 1024)
    assert bucket_candidates(100) == (100,)
    for pack_tokens in bucket_candidates(1024):
        assert bucket_rows(8, pack_tokens, 1024) * pack_tokens >= 0.9 * 8 * 1024


def test_chosen_buckets_are_the_cheapest() -> None:
    """Against a count by hand: with one sequence a row, the cost is that of the shortest row that holds each."""
    lengths = np.array([30] * 50 + [60] * 50 + [120] * 3)
    cost = attention_cost(8)
    chosen = choose_buckets(lengths, (32, 64, 96, 128), 3, 1, cost)
    assert chosen == (32, 64, 128)
    with_two = choose_buckets(lengths, (32, 64, 96, 128), 2, 1, cost)
    by_hand = {
        (32, 128): 50 * cost(32) + 53 * cost(128),
        (64, 128): 100 * cost(64) + 3 * cost(128),
        (96, 128): 100 * cost(96) + 3 * cost(128),
    }
    assert with_two == min(by_hand, key=lambda choice: by_hand[choice])


def test_one_bucket_is_the_longest_candidate() -> None:
    assert choose_buckets(np.array([10, 20]), (32, 64), 1, 4, attention_cost(8)) == (64,)


def test_no_bucket_is_added_where_none_pays() -> None:
    """Full rows without attention cost: shorter rows save nothing, so the fewest buckets win."""
    assert choose_buckets(np.full(64, 64), (32, 64), 2, 4, lambda pack_tokens: float(pack_tokens)) == (64,)


def test_filler_rows_count_against_a_bucket() -> None:
    """Three short sequences pay for a bucket of their own, unless it must be filled up to 64 rows."""
    lengths = np.array([128] * 64 + [64] * 3)
    cost = attention_cost(8)
    assert choose_buckets(lengths, (64, 128), 2, 1, cost, packs_per_step=1) == (64, 128)
    assert choose_buckets(np.array([128] * 61 + [64] * 3), (64, 128), 2, 1, cost, packs_per_step=64) == (128,)


def test_fewer_than_one_bucket_is_an_error() -> None:
    with pytest.raises(ConfigError, match="data.max_buckets=0 is below 1"):
        choose_buckets(np.array([10]), (64,), 0, 4, attention_cost(8))
