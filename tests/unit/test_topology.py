"""Ranks, groups and what is legal, with the cure in the message."""

from __future__ import annotations

import pytest

from esm_neuron.backends.topology import Topology, divisors, legal_tp, neuron_stride
from esm_neuron.errors import ConfigError

T650M = (20, 1280, 5120, "esm2_t33_650M_UR50D")


def test_consecutive_ranks_share_a_model() -> None:
    places = [Topology(rank, rank, 4, 2) for rank in range(4)]
    assert [(place.dp, place.dp_rank, place.tp_rank) for place in places] == [
        (2, 0, 0),
        (2, 0, 1),
        (2, 1, 0),
        (2, 1, 1),
    ]
    assert places[0].tp_groups() == [[0, 1], [2, 3]]
    assert places[0].dp_groups() == [[0, 2], [1, 3]]
    assert [place.is_main for place in places] == [True, False, False, False]


def test_tp_4_on_trn1_takes_every_eighth_rank_of_a_node() -> None:
    """The groups in the comment of NxD 0.15's initialize_model_parallel for two trn1.32xlarge."""
    stride = neuron_stride(tp=4, local_world=32)
    place = Topology(0, 0, 64, 4, stride)
    assert place.tp_groups()[:2] == [[0, 8, 16, 24], [1, 9, 17, 25]]
    assert place.tp_groups()[-1] == [39, 47, 55, 63]
    assert place.dp_groups()[1] == [*range(8, 16), *range(40, 48)]


@pytest.mark.parametrize("tp,stride", [(1, 1), (2, 1), (8, 1), (4, 1), (4, 2), (4, 4)])
def test_every_rank_is_in_its_own_groups(tp: int, stride: int) -> None:
    for rank in range(16):
        if (16 // tp) % stride:
            continue
        place = Topology(rank, rank, 16, tp, stride)
        assert place.rank_of(place.dp_rank, place.tp_rank) == rank
        assert place.tp_groups()[place.dp_rank][place.tp_rank] == rank
        assert place.dp_groups()[place.tp_rank][place.dp_rank] == rank


def test_from_env() -> None:
    env = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    assert Topology.from_env(2, env=env) == Topology(9, 1, 16, 2, 1)
    assert Topology.from_env(4, neuron=True, env=env) == Topology(9, 1, 16, 4, 2)
    assert Topology.from_env(env={}) == Topology()
    with pytest.raises(ConfigError, match="RANK='one' is not a number"):
        Topology.from_env(env={"RANK": "one"})


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((0, 0, 4, 3), r"tp=3 does not divide the world of 4 processes; use tp=1, 2 or 4$"),
        ((0, 0, 1, 2), r"tp=2 does not divide the world of 1 processes; use tp=1$"),
        ((4, 0, 4, 2), r"rank 4 is outside a world of 4"),
        ((0, 0, 8, 4, 3), r"stride 3 does not divide the data-parallel degree 2"),
    ],
)
def test_a_world_that_does_not_fit(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Topology(*arguments)


def test_heads_that_tp_does_not_divide() -> None:
    place = Topology(0, 0, 8, 8)
    with pytest.raises(ConfigError) as error:
        place.validate(*T650M)
    assert str(error.value) == (
        "tp=8 does not divide 20 attention heads of esm2_t33_650M_UR50D; use tp=1, 2 or 4, or parallel.pad_heads=true"
    )
    place.validate(*T650M, pad_heads=True)
    Topology(0, 0, 8, 8).validate(40, 2560, 10240, "esm2_t36_3B_UR50D")


def test_widths_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="tp=2 does not divide the intermediate size 21 of x; use tp=1$"):
        Topology(0, 0, 2, 2).validate(2, 8, 21, "x")
    with pytest.raises(ConfigError, match="hidden size 9 of x is not a multiple of its 2 attention heads"):
        Topology().validate(2, 9, 16, "x")


def test_legal_tp_of_the_published_models() -> None:
    assert legal_tp(20, 5120) == [1, 2, 4]
    assert legal_tp(40, 10240) == [1, 2, 4, 8]
    assert legal_tp(20, 5120, pad_heads=True) == [1, 2, 4, 8, 16, 32]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


SUPPORTED = {
    (2, 1): [1],
    (2, 2): [1, 2],
    (32, 1): [1],
    (32, 2): [1, 2],
    (32, 8): [1, 2, 4, 8],
    (32, 32): [1, 2, 4, 8, 32],
}
"""(NeuronCores, processes on a node) -> degrees of tensor parallelism; no other place is supported."""


@pytest.mark.parametrize("nodes", [1, 2])
def test_places_that_neuron_supports(nodes: int) -> None:
    def fits(cores: int, local: int, tp: int) -> bool:
        try:
            Topology(0, 0, nodes * local, tp).validate_neuron(cores, local)
        except ConfigError:
            return False
        return True

    found = {(cores, local): [tp for tp in range(1, 65) if fits(cores, local, tp)]
             for cores in (1, 2, 16, 32, 64) for local in range(1, 65)}  # fmt: skip
    expected = SUPPORTED if nodes == 1 else {(32, 32): SUPPORTED[32, 32]}
    assert {place: degrees for place, degrees in found.items() if degrees} == expected


@pytest.mark.parametrize(
    "cores,local,world,tp,message",
    [
        (4, 4, 4, 1, r"4 NeuronCores found"),
        (32, 4, 4, 4, r"4 processes on trn1.32xlarge; start 1, 2, 8 or 32"),
        (2, 2, 4, 2, r"several nodes need trn1.32xlarge"),
        (32, 8, 16, 2, r"8 processes a node on several nodes; start all 32"),
        (32, 32, 32, 16, r"tp=16 does not lie on the links of trn1.32xlarge .*; use tp=1, 2, 4, 8 or 32$"),
        (32, 32, 64, 64, r"tp=64 .*; use tp=1, 2, 4, 8 or 32$"),
    ],
)
def test_places_that_neuron_refuses(cores: int, local: int, world: int, tp: int, message: str) -> None:
    place = Topology(0, 0, world, tp)
    with pytest.raises(ConfigError, match=message):
        place.validate_neuron(cores, local)
