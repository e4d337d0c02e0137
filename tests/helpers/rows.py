"""Whole files and tables at once, by the functions that take them in chunks."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from esm_neuron.config import DataConfig
from esm_neuron.data.dataset import chunk_table
from esm_neuron.data.records import LIST_JOINER
from esm_neuron.data.sources import make_rows, read_chunks
from esm_neuron.data.tokenizer import decode
from esm_neuron.data.validation import Checker, Problems, Report


def read_rows(path: str | Path, cfg: DataConfig, need_label: bool, joiner: str = LIST_JOINER) -> pa.Table:
    """Return the rows of one file in its order."""
    return pa.concat_tables(read_chunks(path, cfg, joiner if need_label else None))


def check_rows(rows: pa.Table, cfg: DataConfig, source: str) -> tuple[pa.Table, Report]:
    """Return the rows that can be used, and what was done to the others."""
    checker = Checker(cfg, source)
    checked = checker(rows)
    checker.finish()
    return checked, Report(name=source, **checker.counts)


def cut_sequence(sequence: str, cfg: DataConfig) -> list[str]:
    """Return the residues of each example that a sequence becomes."""
    rows = make_rows({"line": [2], "id": ["a"], "sequence": [sequence]})
    table, _ = chunk_table(rows, cfg, None, Problems("x.csv"))
    return [decode(table.sequence(example)[1:-1]) for example in range(len(table))]
