"""Packing: every example once, nothing over its limits, little padding, and the same plan from the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm_neuron.data.packing import EpochPlan, pack_histogram, plan_epoch
from esm_neuron.errors import DataError

PACK = 64


def protein_lengths(number: int, longest: int, seed: int = 0) -> np.ndarray:
    """Lengths in tokens with the law of proteins: log-normal, cropped to the pack."""
    residues = np.random.default_rng(seed).lognormal(np.log(longest / 3), 0.7, number)
    return np.clip(residues, 3, longest).astype(np.int64)


def plan_packs(lengths: np.ndarray, pack_tokens: int, max_segments: int, rng: np.random.Generator) -> EpochPlan:
    """One pack per step."""
    return plan_epoch(lengths, pack_tokens, max_segments, 1, rng)


def assert_legal(plan: EpochPlan, lengths: np.ndarray, max_segments: int) -> None:
    """Every example once; no pack empty, over its slots or over its segments."""
    assert np.array_equal(np.sort(plan.members), np.arange(len(lengths)))
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == len(plan.members)
    for number in range(plan.packs):
        pack = plan.pack(number)
        assert 1 <= len(pack) <= max_segments
        assert lengths[pack].sum() <= plan.pack_tokens


@settings(max_examples=150)
@given(
    lengths=st.lists(st.integers(1, PACK), min_size=1, max_size=200),
    max_segments=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_every_example_once_within_limits(lengths: list[int], max_segments: int, seed: int) -> None:
    array = np.array(lengths)
    assert_legal(plan_packs(array, PACK, max_segments, np.random.default_rng(seed)), array, max_segments)


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, PACK), min_size=1, max_size=120),
    packs_per_step=st.integers(1, 7),
    seed=st.integers(0, 2**32),
)
def test_steps_hold_every_example_once(lengths: list[int], packs_per_step: int, seed: int) -> None:
    array = np.array(lengths)
    plan = plan_epoch(array, PACK, 8, packs_per_step, np.random.default_rng(seed))
    seen = []
    for index in range(len(plan)):
        packs = plan.step(index)
        assert len(packs) == packs_per_step
        assert any(len(pack) for pack in packs)
        fillers = [len(pack) == 0 for pack in packs]
        assert fillers == sorted(fillers), "filler packs come last"
        assert all(array[pack].sum() <= PACK for pack in packs)
        seen.extend(np.concatenate(packs).tolist())
    assert sorted(seen) == list(range(len(lengths)))
    assert 0 < plan.efficiency(array) <= plan.efficiency(array, 1) <= 1


def test_little_padding_on_protein_lengths() -> None:
    lengths = protein_lengths(5000, 1024)
    plan = plan_packs(lengths, 1024, 32, np.random.default_rng(0))
    assert plan.efficiency(lengths) == lengths.sum() / (plan.packs * 1024)
    assert plan.efficiency(lengths) >= 0.99
    assert plan_packs(lengths, 1024, 1, np.random.default_rng(0)).efficiency(lengths) < 0.5


def test_best_fit_by_hand() -> None:
    recipes = pack_histogram(np.bincount([6, 6, 5, 4, 4, 3, 2]), 10, 8)
    made = sorted((recipe.parts, recipe.packs) for recipe in recipes)
    assert made == [(((5, 1), (3, 1), (2, 1)), 1), (((6, 1), (4, 1)), 2)]


def test_same_seed_same_plan_other_seed_other_company() -> None:
    lengths = protein_lengths(500, PACK)
    first, again, other = (plan_packs(lengths, PACK, 8, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.members, again.members)
    assert np.array_equal(first.offsets, again.offsets)
    assert first.packs == other.packs, "the number of packs depends on the lengths alone"
    company = [{frozenset(plan.pack(p)) for p in range(plan.packs)} for plan in (first, other)]
    assert company[0] != company[1]


def test_order_within_a_pack_and_of_the_packs_is_random() -> None:
    lengths = np.repeat([40, 20], 100)
    plan = plan_packs(lengths, 60, 8, np.random.default_rng(0))
    long_first = [bool(lengths[plan.pack(p)[0]] == 40) for p in range(plan.packs)]
    assert 25 <= sum(long_first) <= 75
    lengths = np.array([60] * 50 + [30] * 100)
    plan = plan_packs(lengths, 60, 8, np.random.default_rng(0))
    singles = [len(plan.pack(p)) == 1 for p in range(plan.packs)]
    assert 10 <= sum(singles[:50]) <= 40


def test_a_long_protein_counts_in_an_epoch_for_what_a_short_one_does() -> None:
    lengths, packs = protein_lengths(3000, 510), 8
    weight = np.zeros(len(lengths))
    for seed in range(10):
        plan = plan_epoch(lengths, 512, 32, packs, np.random.default_rng(seed))
        for index in range(len(plan) - 1):  # the last step is a short one
            members = np.concatenate(plan.step(index))
            weight[members] += 1 / len(members)  # a step's loss is the mean over its proteins
    weight /= weight.mean()
    quartile = np.searchsorted(np.quantile(lengths, [0.25, 0.5, 0.75]), lengths)
    means = [weight[quartile == q].mean() for q in range(4)]
    assert max(means) - min(means) < 0.06, means
    assert weight.std() < 0.15


def test_every_pairing_of_equal_lengths_is_as_likely() -> None:
    """Four sequences, two per pack: each of the three pairings comes up in a third of the plans."""
    lengths = np.full(4, 5)
    partners = np.zeros(4, int)
    for seed in range(600):
        one, other = (pack.tolist() for pack in plan_epoch(lengths, 10, 2, 2, np.random.default_rng(seed)).step(0))
        pair = one if 0 in one else other
        partners[sum(pair)] += 1
    assert partners[0] == 0
    assert (np.abs(partners[1:] - 200) < 60).all()


def test_one_segment_per_pack() -> None:
    plan = plan_packs(np.array([3, 2, 5]), 10, 1, np.random.default_rng(0))
    assert np.array_equal(plan.offsets, np.arange(4))


def test_only_the_last_step_is_short() -> None:
    plan = plan_epoch(np.full(10, 8), 8, 1, 4, np.random.default_rng(0))
    assert [sum(bool(len(pack)) for pack in plan.step(index)) for index in range(len(plan))] == [4, 4, 2]
    assert plan.efficiency(np.full(10, 8)) == 10 / 12


def test_too_long_names_the_example_and_the_cure() -> None:
    lengths = np.array([5, 2000, 7])
    message = r"example 1 has 2000 tokens, a pack holds 1024; use data.pack_tokens >= 2000, or .*max_residues <= 1022"
    with pytest.raises(DataError, match=message):
        plan_packs(lengths, 1024, 8, np.random.default_rng(0))


def test_nothing_to_pack_is_an_error() -> None:
    with pytest.raises(DataError, match="0 examples"):
        plan_packs(np.array([], np.int64), 10, 1, np.random.default_rng(0))
    with pytest.raises(DataError, match="example 1 has 0 tokens"):
        plan_packs(np.array([3, 0]), 10, 1, np.random.default_rng(0))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_width_of_the_lengths_does_not_matter(dtype: type) -> None:
    lengths = protein_lengths(300, PACK)
    reference = plan_packs(lengths, PACK, 8, np.random.default_rng(0))
    plan = plan_packs(lengths.astype(dtype), PACK, 8, np.random.default_rng(0))
    assert np.array_equal(plan.members, reference.members)
    assert plan.members.dtype == np.int32


def test_packs_longer_than_16_bits() -> None:
    lengths = np.array([70_000, 10, 300, 65_536])
    assert_legal(plan_packs(lengths, 70_100, 8, np.random.default_rng(0)), lengths, 8)
