"""Find homologs by shared k-mers or by MMseqs2: which held-out proteins have one in training, and clusters of them.

The k-mer measure: proteins are written in 13 groups of residues that often replace each other (those of MMseqs2's
linclust, Steinegger & Soding 2018, Nat Commun 9:2542) and described by the set of their 6-mers, each weighted by
ln(1 + n / n_k) where n_k of n proteins have it. Two are homologs when the cosine of their sets is at least 0.03 and
the shorter has at least 80 % of the longer's residues. Random proteins share about 0.01; what the measure finds and
misses of MMseqs2's homologs at 30 % identity is in docs/data.md. Proteins shorter than 6 residues have no homologs.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.data.dataset import ExampleTable, join_tables
from esm_neuron.data.tokenizer import VOCABULARY, decode
from esm_neuron.errors import DataError
from esm_neuron.files import open_new

if TYPE_CHECKING:
    from scipy import sparse
    from scipy.sparse import csgraph
else:
    sparse, csgraph = module("scipy.sparse"), module("scipy.sparse.csgraph")

Method = Literal["kmer", "mmseqs"]

GROUPS = ("A", "ST", "C", "DN", "EQ", "FY", "G", "H", "IV", "KR", "LM", "P", "W")
"""Residues that count as one; others (X, B, Z, U, O) end a k-mer."""
K = 6
"""Residues of a k-mer."""
COSINE = 0.03
"""Least cosine of homologs."""
COVERAGE = 0.8
"""Least residues of the shorter of two homologs, as a share of the longer's."""
IDENTITY = 0.3
"""Least identity of homologs found by MMseqs2."""
MOST = 100_000
"""Most proteins of a run, held out and training, among which homologs are looked for."""
BLOCK = 256
"""Proteins compared at once with all others."""

_NO_GROUP = len(GROUPS)
_GROUP = np.array([next((g for g, of in enumerate(GROUPS) if t in of), _NO_GROUP) for t in VOCABULARY], dtype=np.int64)
_SPECIALS = 2


def find_homologs(held_out: ExampleTable, train: ExampleTable, method: Method) -> np.ndarray:
    """Return which proteins of `held_out` have a homolog in `train`, bool [records]; DataError if mmseqs fails."""
    has_homolog = np.zeros(len(held_out.ids), dtype=bool)
    if method == "mmseqs":
        has_homolog[np.unique([query for query, _ in _mmseqs_pairs(held_out, train)]).astype(np.int64)] = True
        return has_homolog
    both = join_tables([held_out, train])
    profiles, lengths = _profiles(both), _residues(both)
    mine, others = slice(0, len(has_homolog)), slice(len(has_homolog), None)
    for start, pairs in _kmer_pairs(profiles[mine], profiles[others], lengths[mine], lengths[others]):
        has_homolog[start + np.unique(pairs.row)] = True
    return has_homolog


def homolog_rows(train: ExampleTable, held_out: Mapping[str, ExampleTable], method: Method) -> dict[str, np.ndarray]:
    """Return split -> which of its proteins have a homolog in training, bool [records]; all splits at once."""
    if not held_out:
        return {}
    found = find_homologs(join_tables(list(held_out.values())), train, method)
    ends = np.cumsum([len(table.ids) for table in held_out.values()])
    return dict(zip(held_out, np.split(found, ends[:-1]), strict=True))


def find_clusters(table: ExampleTable, method: Method) -> np.ndarray:
    """Return the cluster of each protein from 0, int64 [records]: homologs, and homologs of homologs, are in one."""
    n = len(table.ids)
    labels = np.arange(n)
    if method == "mmseqs":
        pairs = np.array(list(_mmseqs_pairs(table, table)), dtype=np.int64).reshape(-1, 2)
        return _linked(labels, pairs[:, 0], pairs[:, 1])
    profiles, lengths = _profiles(table), _residues(table)
    # Clusters are merged block by block, so that the pairs of all proteins are never held together.
    for start, found in _kmer_pairs(profiles, profiles, lengths, lengths):
        labels = _linked(labels, start + found.row, found.col)
    return labels


def _linked(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cluster of each protein when, besides those of equal `labels`, the pairs (one, other) share one."""
    n = len(labels)
    # A graph of n proteins and n nodes for the clusters so far. A protein hangs on its cluster's node and on its
    # partner of each pair, so earlier pairs need not be kept.
    rows, columns = np.concatenate([np.arange(n), one]), np.concatenate([labels + n, other])
    graph = sparse.coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(2 * n, 2 * n))
    found = csgraph.connected_components(graph, directed=False)[1][:n]
    return np.asarray(np.unique(found, return_inverse=True)[1], dtype=np.int64)


def _residues(table: ExampleTable) -> np.ndarray:
    """Return the residues of each protein that are in the table, those that two windows share counted once."""
    found = np.bincount(table.record, table.lengths - _SPECIALS, len(table.ids)).astype(np.int64)
    return np.asarray(np.minimum(found, table.residues)) if len(table.residues) else found


def _profiles(table: ExampleTable) -> sparse.csr_matrix:
    """Return the weighted set of 6-mers of each protein as a row of norm 1, float32 [records, k-mers].

    A k-mer of one protein alone counts in its norm and has no column, since it matches nothing.
    """
    groups = _GROUP[table.tokens]
    ends = max(0, len(groups) - K + 1)
    codes, inside = np.zeros(ends, dtype=np.int64), np.ones(ends, dtype=bool)
    for shift in range(K):
        part = groups[shift : shift + ends]
        codes = codes * len(GROUPS) + part
        inside &= part != _NO_GROUP  # specials between proteins are in no group, so no k-mer spans two
    record = np.repeat(table.record, table.lengths)[:ends][inside]
    possible = len(GROUPS) ** K
    # One number per protein and k-mer. Only distinct ones are kept: a k-mer counts once, however often it occurs.
    own = np.unique(record * possible + codes[inside])
    record, codes = own // possible, own % possible
    _, column, having = np.unique(codes, return_inverse=True, return_counts=True)
    n = len(table.ids)
    weight = np.log1p(n / having).astype(np.float32)[column]
    # The norm is taken over all k-mers, before those that no other protein has lose their columns.
    length = np.sqrt(np.bincount(record, weight**2, n))
    shared = having[column] > 1
    values = (weight / length[record])[shared].astype(np.float32)
    places = np.unique(column[shared], return_inverse=True)[1]
    return sparse.csr_matrix((values, (record[shared], places)), shape=(n, int(places.max(initial=-1)) + 1))


def _kmer_pairs(
    queries: sparse.csr_matrix, targets: sparse.csr_matrix, query_lengths: np.ndarray, target_lengths: np.ndarray
) -> Iterator[tuple[int, sparse.coo_matrix]]:
    """Give the first index of each BLOCK of queries and its pairs of homologs (row within the block, column)."""
    if not targets.shape[1]:
        return
    across = targets.T.tocsr()
    # The product holds every pair that shares a k-mer; a block of queries at a time bounds its memory.
    for start in range(0, queries.shape[0], BLOCK):
        found = (queries[start : start + BLOCK] @ across).tocoo()
        a, b = query_lengths[start + found.row], target_lengths[found.col]
        keep = (found.data >= COSINE) & (np.minimum(a, b) >= COVERAGE * np.maximum(a, b))
        yield start, sparse.coo_matrix((found.data[keep], (found.row[keep], found.col[keep])), shape=found.shape)


def _mmseqs_pairs(queries: ExampleTable, targets: ExampleTable) -> Iterator[tuple[int, int]]:
    """Give the homologs that MMseqs2 finds (of `queries`, of `targets`): IDENTITY over COVERAGE of both."""
    program = shutil.which("mmseqs")
    if program is None:
        raise DataError("data.homologs=mmseqs: there is no program mmseqs on PATH; install MMseqs2, or use kmer")
    with tempfile.TemporaryDirectory(prefix="esm-neuron-") as name:
        folder = Path(name)
        for part, table in (("queries", queries), ("targets", targets)):
            with open_new(folder / f"{part}.fasta") as file:
                for example, record in enumerate(table.record.tolist()):
                    file.write(f">{record}\n{decode(table.sequence(example)[1:-1])}\n")
        words = [program, "easy-search", "queries.fasta", "targets.fasta", "found.tsv", "scratch"]
        words += ["--min-seq-id", str(IDENTITY), "-c", str(COVERAGE), "--cov-mode", "0", "-s", "7.5"]
        words += ["--max-seqs", "1000", "--format-output", "query,target", "-v", "1"]
        # a fixed list of words, our own file names and no shell
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise DataError(f"mmseqs ended with {done.returncode}: {lines[-1][:200] if lines else 'no message'}")
        with (folder / "found.tsv").open(encoding="ascii") as found:
            for line in found:
                query, target = line.split()
                yield int(query), int(target)
