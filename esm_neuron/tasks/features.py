"""What baselines see of proteins: counts, places and neighbours of residues. A protein's windows count as one sequence.

Rows are proteins; a matrix is a numpy array or, where most entries are 0, a scipy.sparse.csr_matrix.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.data.alignment import OTHER, Proteins
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.tokenizer import PAD, VOCABULARY

if TYPE_CHECKING:
    from scipy import sparse
else:
    sparse = module("scipy.sparse")

END = 50  # residues at each terminus that get a composition of their own: sorting signals sit there
REACH = 7  # neighbors on each side that the baseline of residue classes sees
K = 3  # residues of a k-mer

Features = Any
"""float64 [rows, features]."""


def taken(table: ExampleTable, records: np.ndarray) -> ExampleTable:
    """Return some records of a table, and read no others: a table may be a file larger than memory."""
    order = np.argsort(table.record, kind="stable")
    first = np.searchsorted(table.record, records, "left", order)
    counts = np.searchsorted(table.record, records, "right", order) - first
    examples = order[np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())]
    lengths = table.tokens_of(examples)
    return ExampleTable(
        tokens=np.concatenate([table.sequence(example) for example in examples]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        record=np.repeat(np.arange(len(records)), counts),
        weight=table.weight[examples],
        labels=_labels_of(table, records, examples),
        ids=[str(record) for record in records.tolist()],
        starts=table.starts[examples] if len(table.starts) else table.starts,
        residues=table.residues[records] if len(table.residues) else table.residues,
    )


def _labels_of(table: ExampleTable, records: np.ndarray, examples: np.ndarray) -> np.ndarray:
    if len(table.labels) != len(table.tokens):
        return table.labels[records] if len(table.labels) else table.labels
    return np.concatenate([table.labels[table.offsets[example] : table.offsets[example + 1]] for example in examples])


def composition(proteins: Proteins) -> Features:
    """Return [proteins, 61]: amino-acid frequencies of the protein, of its first and its last 50 residues, and the log
    length."""
    features = np.zeros((len(proteins), 3 * OTHER + 1))
    for row, (start, stop) in enumerate(itertools.pairwise(proteins.bounds.tolist())):
        residues = proteins.residues[start:stop]
        shares = [
            np.bincount(part, minlength=OTHER + 1)[:OTHER] / max(len(part), 1)
            for part in (residues, residues[:END], residues[-END:])
        ]
        features[row] = np.concatenate([*shares, [np.log(max(len(residues), 1))]])
    return features


def kmers(proteins: Proteins) -> Features:
    """Return [proteins, 20^K]: square roots of how often each k-mer is there, scaled to rows of length 1."""
    owner, residues = _owners(proteins), proteins.residues.astype(np.int64)
    ends = max(0, len(residues) - K + 1)
    code, inside = np.zeros(ends, np.int64), owner[:ends] == owner[len(owner) - ends :]
    for shift in range(K):
        part = residues[shift : shift + ends]
        code, inside = code * OTHER + part, inside & (part < OTHER)
    cells = (np.ones(int(inside.sum())), (owner[:ends][inside], code[inside]))
    counts = sparse.csr_matrix(cells, shape=(len(proteins), OTHER**K))
    # the squares of a row's roots add up to the sum of its counts
    total = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    return sparse.diags(total**-0.5) @ counts.sqrt()


def one_hot(proteins: Proteins, length: int) -> Features:
    """Return [proteins, length x 21]: which residue is at each of the first `length` places."""
    owner, column = _owners(proteins), _places(proteins)
    kept = column < length
    cells = (owner[kept], column[kept] * (OTHER + 1) + proteins.residues[kept])
    return sparse.csr_matrix((np.ones(len(cells[0])), cells), shape=(len(proteins), length * (OTHER + 1)))


def sites(proteins: Proteins, wild_type: np.ndarray) -> Features:
    """Return [proteins, length + 42] of variants: which sites differ from the wild type, uint8 [length], and how often
    each residue is lost and comes. What a site does is learned for all residues together."""
    owner, column = _owners(proteins), _places(proteins)
    changed = column < len(wild_type)
    changed[changed] = proteins.residues[changed] != wild_type[column[changed]]
    owner, column, found = owner[changed], column[changed], proteins.residues[changed].astype(np.int64)
    kinds = len(wild_type) + np.concatenate([wild_type[column].astype(np.int64), OTHER + 1 + found])
    cells = (np.tile(owner, 3), np.concatenate([column, kinds]))
    shape = (len(proteins), len(wild_type) + 2 * (OTHER + 1))
    return sparse.csr_matrix((np.ones(len(cells[0])), cells), shape=shape)


def _owners(proteins: Proteins) -> np.ndarray:
    """Return the protein of each residue, int64 [residues]."""
    return np.repeat(np.arange(len(proteins)), proteins.lengths)


def _places(proteins: Proteins) -> np.ndarray:
    """Return the place of each residue in its protein, from 0, int64 [residues]."""
    return np.arange(len(proteins.residues)) - np.repeat(proteins.bounds[:-1], proteins.lengths)


def windows(table: ExampleTable, rows: np.ndarray) -> Features:
    """Return [rows, (2 REACH + 1) x 33]: which token is at each place around the tokens `rows`."""
    example = np.searchsorted(table.offsets, rows, side="right") - 1
    around = rows[:, None] + np.arange(-REACH, REACH + 1)
    # A window never reaches into a neighbor's sequence: places outside the example are padding.
    inside = (around >= table.offsets[example, None]) & (around < table.offsets[example + 1, None])
    tokens = np.where(inside, table.tokens[np.clip(around, 0, len(table.tokens) - 1)], PAD).astype(np.int64)
    columns = tokens + len(VOCABULARY) * np.arange(tokens.shape[1])
    bounds = np.arange(len(rows) + 1) * tokens.shape[1]
    shape = (len(rows), tokens.shape[1] * len(VOCABULARY))
    return sparse.csr_matrix((np.ones(tokens.size), columns.ravel(), bounds), shape=shape)
