"""Predictions gathered from batches and ranks: each to its own protein or residue, none twice, none missing."""

from __future__ import annotations

import numpy as np
import pytest

from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.training.evaluation import in_table_order, placed

TOKENS, OFFSETS = encode_many(["MKV", "A", "LLLLL", "GG"])
TABLE = ExampleTable(TOKENS, OFFSETS, np.arange(4), np.ones(4, np.float32), np.arange(4), list("abcd"))


def rows(members: np.ndarray, width: int) -> np.ndarray:
    """[R, L, 1]: the index of each token in the table's tokens, as a model sees the rows; 99 in padding."""
    found = np.full((*members.shape[:1], width, 1), 99)
    for r, row in enumerate(members):
        tokens = [np.arange(OFFSETS[e], OFFSETS[e + 1]) for e in row if e >= 0]
        flat = np.concatenate([np.zeros(0, np.int64), *tokens])
        found[r, : len(flat), 0] = flat
    return found


@pytest.mark.parametrize("width", [12, 20])
def test_a_tokens_prediction_is_found_in_any_pack(width: int) -> None:
    members = np.array([[3, 0, -1], [-1, -1, -1], [2, 1, -1]])
    index, predictions = placed(TABLE, members, [rows(members, width)], per_token=True)
    assert sorted(index) == list(range(len(TOKENS)))
    assert (predictions[:, 0] == index).all()


def test_a_segments_prediction_is_its_examples() -> None:
    members = np.array([[3, 0], [1, -1]])
    index, predictions = placed(TABLE, members, [members * 10], per_token=False)
    assert (index.tolist(), predictions.tolist()) == ([3, 0, 1], [30, 0, 10])


def test_predictions_come_back_in_the_tables_order_from_any_ranks() -> None:
    parts = [(np.array([2, 0]), np.array([[20.0], [0.0]])), (np.array([3, 1]), np.array([[30.0], [10.0]]))]
    assert in_table_order(parts, 4)[0].tolist() == [[0.0], [10.0], [20.0], [30.0]]


@pytest.mark.parametrize(
    ("index", "message"), [([0, 1, 1], "1 was predicted 2 times"), ([0, 2], "1 was predicted 0 tim")]
)
def test_an_example_twice_and_a_missing_one_are_errors(index: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_table_order([(np.array(index), np.zeros(len(index)))], 3)
