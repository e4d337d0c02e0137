"""Find homologs by k-mers and alignments or by MMseqs2: which held-out proteins have one in training, and clusters.

Both ways find proteins with at least 30 % equal residues over at least 80 % of both. `kmers` finds the pairs that are
aligned, `alignment` says which are homologs. How the two ways agree is in docs/dev/homologs.md.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from esm_neuron.config.deferred import module
from esm_neuron.data.alignment import COVERAGE, IDENTITY, Judge, Proteins, shortest_judged
from esm_neuron.data.dataset import ExampleTable, join_tables
from esm_neuron.data.kmers import SEEDS, candidates
from esm_neuron.data.tokenizer import EOS, VOCABULARY, decode
from esm_neuron.errors import DataError
from esm_neuron.files import open_new

if TYPE_CHECKING:
    from scipy import sparse
    from scipy.sparse import csgraph
else:
    sparse, csgraph = module("scipy.sparse"), module("scipy.sparse.csgraph")

Method = Literal["kmer", "mmseqs"]

MOST = 10_000_000
"""Most proteins of a run, held out and training, among which homologs are looked for."""
SEARCHED = 100_000
"""Most proteins that MMseqs2 searches in each other for clusters; more it clusters in linear time, by linclust."""


def find_homologs(held_out: ExampleTable, train: ExampleTable, method: Method) -> np.ndarray:
    """Return which proteins of `held_out` have a homolog in `train`, bool [records]; DataError if mmseqs fails."""
    queries, targets = Proteins.of(held_out), Proteins.of(train)
    has_homolog = np.isin(_hashes(queries), _hashes(targets))  # also where chance could make equal ones
    if method == "mmseqs":
        has_homolog[np.unique([query for query, _ in _mmseqs_pairs(held_out, train)]).astype(np.int64)] = True
        return has_homolog
    judge = Judge(queries, targets)
    for seeds in SEEDS:
        for pairs, rank in candidates(queries, targets, seeds):
            for number in range(int(rank.max(initial=-1)) + 1):  # the best pair of each query first
                tried = pairs[(rank == number) & ~has_homolog[pairs.query]]
                has_homolog[tried.query[judge(tried)]] = True
    return has_homolog


def too_short(held_out: ExampleTable, train: ExampleTable) -> np.ndarray:
    """Return which proteins of `held_out`, bool [records], are too short to tell homologs from chance; copies are."""
    return Proteins.of(held_out).lengths < shortest_judged(len(train.ids))


def homolog_rows(train: ExampleTable, held_out: Mapping[str, ExampleTable], method: Method) -> dict[str, np.ndarray]:
    """Return split -> which of its proteins have a homolog in training, bool [records]; all splits at once."""
    if not held_out:
        return {}
    found = find_homologs(join_tables(list(held_out.values())), train, method)
    ends = np.cumsum([len(table.ids) for table in held_out.values()])
    return dict(zip(held_out, np.split(found, ends[:-1]), strict=True))


def find_clusters(table: ExampleTable, method: Method) -> np.ndarray:
    """Return the cluster of each protein from 0, int64 [records]: homologs, and homologs of homologs, are in one."""
    proteins = Proteins.of(table)
    labels = np.unique(_hashes(proteins), return_inverse=True)[1]
    if method == "mmseqs":
        linked = _mmseqs_clusters(table) if len(labels) > SEARCHED else _mmseqs_pairs(table, table)
        found = np.array(list(linked), dtype=np.int64).reshape(-1, 2)
        return _linked(labels, found[:, 0], found[:, 1])
    judge = Judge(proteins, proteins)
    for seeds in SEEDS:
        for pairs, rank in candidates(proteins, proteins, seeds):
            for chosen in (rank == 0, rank > 0):  # most are in one cluster after the first round
                tried = pairs[chosen & (labels[pairs.query] != labels[pairs.target])]
                homologs = tried[judge(tried)]
                labels = _linked(labels, homologs.query, homologs.target)
    return _linked(labels, np.zeros(0, np.int64), np.zeros(0, np.int64))


def _hashes(proteins: Proteins) -> np.ndarray:
    """Return a hash of each protein's residues, int64 [proteins]."""
    text, bounds = proteins.residues.tobytes(), proteins.bounds.tolist()
    return np.fromiter((hash(text[i:j]) for i, j in itertools.pairwise(bounds)), np.int64, len(proteins))


def _linked(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cluster of each protein when, besides those of equal `labels`, the pairs (one, other) share one."""
    n = len(labels)
    # A graph of n proteins and n nodes for the clusters so far. A protein hangs on its cluster's node and on its
    # partner of each pair, so earlier pairs need not be kept.
    rows, columns = np.concatenate([np.arange(n), one]), np.concatenate([labels + n, other])
    graph = sparse.coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(2 * n, 2 * n))
    found = csgraph.connected_components(graph, directed=False)[1][:n]
    return np.asarray(np.unique(found, return_inverse=True)[1], dtype=np.int64)


def _mmseqs_pairs(queries: ExampleTable, targets: ExampleTable) -> Iterator[tuple[int, int]]:
    """Give the homologs that MMseqs2 finds (of `queries`, of `targets`): IDENTITY over COVERAGE of both."""
    options = ["-s", "7.5", "--max-seqs", "1000", "--format-output", "query,target"]
    return _mmseqs("easy-search", [queries, targets], "found", options)


def _mmseqs_clusters(table: ExampleTable) -> Iterator[tuple[int, int]]:
    """Give (the centre of its cluster, protein) by MMseqs2's linclust: IDENTITY over COVERAGE of both."""
    return _mmseqs("easy-linclust", [table], "found_cluster.tsv", [])


def _mmseqs(
    command: str, tables: Sequence[ExampleTable], result: str, options: Sequence[str]
) -> Iterator[tuple[int, int]]:
    """Run MMseqs2 on proteins and give the numbers in the two columns of its result; DataError where it fails."""
    program = shutil.which("mmseqs")
    if program is None:
        raise DataError("data.homologs=mmseqs: there is no program mmseqs on PATH; install MMseqs2, or use kmer")
    with tempfile.TemporaryDirectory(prefix="esm-neuron-") as name:
        folder, names = Path(name), [f"{number}.fasta" for number in range(len(tables))]
        for part, table in zip(names, tables, strict=True):
            with open_new(folder / part) as file:
                for example, record in enumerate(table.record.tolist()):
                    file.write(f">{record}\n{decode(table.sequence(example)[1:-1]).replace(VOCABULARY[EOS], 'X')}\n")
        words = [program, command, *names, "found", "scratch", "--min-seq-id", str(IDENTITY), "-c", str(COVERAGE)]
        words += ["--cov-mode", "0", "-v", "1", *options]
        # a fixed list of words, our own file names and no shell
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise DataError(f"mmseqs ended with {done.returncode}: {lines[-1][:200] if lines else 'no message'}")
        with (folder / result).open(encoding="ascii") as found:
            for line in found:
                one, other = line.split()
                yield int(one), int(other)
