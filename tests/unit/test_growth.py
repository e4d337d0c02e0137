"""What must not grow with the data: bytes a row, row groups, copies of the data on a node."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.toys import Toy

from esm_neuron.config import DataConfig, TaskConfig, TrainConfig
from esm_neuron.data import parquet
from esm_neuron.data.check import check_file
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.labels import Labels
from esm_neuron.data.parquet import open_table
from esm_neuron.data.splits import load_splits
from esm_neuron.inference.predict import TableSource
from esm_neuron.inference.score import Query, Scorer
from esm_neuron.inference.spool import scan
from esm_neuron.inference.variants import VariantColumns, VariantTable
from esm_neuron.training import run


def table(folder: Path, rows: int) -> Path:
    rng = np.random.default_rng(rows)
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    path = folder / f"{rows}.csv"
    with path.open("w") as file:
        file.write("id,sequence,label,split\n")
        for row in range(rows):
            residues = letters[rng.integers(0, 20, 40)].tobytes().decode()
            file.write(f"P{row},{residues},{'ab'[row % 2]},{'train' if row % 10 else 'test'}\n")
    return path


def test_data_check_holds_few_bytes_a_row(tmp_path: Path) -> None:
    """It held each token twice, 4 kB a protein."""
    cfg, peaks, sizes = DataConfig(split_column="split"), [], (40_000, 120_000)
    for rows in sizes:
        path = str(table(tmp_path, rows))
        tracemalloc.start()
        check_file(path, cfg, Labels.of(TaskConfig(), cfg), "train", None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) < 45


def test_the_pieces_of_an_input_hold_few_bytes_a_row(tmp_path: Path) -> None:
    """What is kept of each piece while an input is read: its sizes and its hash."""
    peaks, sizes = [], (40_000, 120_000)
    for rows in sizes:
        source = TableSource(InputChunks(table(tmp_path, rows), DataConfig()), 16_384)
        tracemalloc.start()
        assert sum(scan(tmp_path, source, None, False).rows) == rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) < 30


def test_row_groups_are_large_whatever_the_shards_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP_ROWS", 1000)
    shard = pa.table({"id": [str(i) for i in range(64)], "p": np.arange(64.0)})
    with open_table(tmp_path / "a.parquet") as append:
        assert sum(append(shard) for _ in range(100)) == 6400
    found = pq.ParquetFile(tmp_path / "a.parquet")
    assert found.metadata.num_row_groups == 7
    assert found.read().equals(pa.concat_tables([shard] * 100).combine_chunks())


class Rank:
    """A process of several on one machine, as far as reading the data needs it."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.topology = type("Topology", (), {"rank": rank})()
        self._shared, self._barrier = shared, barrier

    def gather_host(self, value: Any) -> list[Any]:
        self._shared[self.topology.rank] = value
        self._barrier.wait(60)
        found = list(self._shared)
        self._barrier.wait(60)
        return found


@pytest.mark.parametrize("cached", [False, True])
def test_one_process_of_a_machine_reads_and_all_map(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    cfg: TrainConfig = toy(data={"cache": str(tmp_path / "cache") if cached else None})
    expected, made = load_splits(cfg, Labels), list[Any]()
    was = run.make_splits
    monkeypatch.setattr(run, "make_splits", lambda *given: made.append(given[-1]) or was(*given))
    shared, barrier, found = [None] * 3, threading.Barrier(3), [None] * 3

    def work(rank: int) -> None:
        found[rank] = run.shared_splits(cfg, Labels, Rank(rank, shared, barrier))  # type: ignore[arg-type, call-overload]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 1 and (made[0] is None) == cached
    for splits in found:
        assert splits is not None and splits.fingerprint == expected.fingerprint and splits.task == expected.task
        assert isinstance(splits.train.tokens, np.memmap) and np.array_equal(splits.train.tokens, expected.train.tokens)
        assert list(splits.train.ids) == list(expected.train.ids)
    assert cached or not made[0].exists()


def test_masked_marginals_take_a_pass_for_each_set_of_sites_of_the_file(tmp_path: Path) -> None:
    """Each piece asked for its sets anew: 33 times the passes at the size of GB1."""
    wild = "MKVLAGT"
    names = [
        f"{wild[i]}{i + 1}{a}:{wild[j]}{j + 1}{b}"
        for a in "CDE"
        for b in "FHI"
        for i in range(6)
        for j in range(i + 1, 7)
    ]
    path = tmp_path / "variants.csv"
    path.write_text("\n".join(["variant", *names]) + "\n")
    scorer, asked = Scorer("masked-marginal", wild), list[int]()

    def run_model(queries: Sequence[Query]) -> list[np.ndarray]:
        asked.append(len(queries))
        return [np.zeros((len(query.sites), 33), np.float32) for query in queries]

    table = VariantTable(path, VariantColumns(), DataConfig(), wild, 1, True, 45, scorer.cost)
    pieces = [piece.content for piece in table()]
    assert sum(len(scorer(rows, run_model)) for rows in pieces) == len(names) == 9 * 21
    assert len(pieces) > 4 and sum(asked) == 21
