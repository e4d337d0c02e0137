"""Proteins in small files, and the splits of a run on them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from esm_neuron.config import DataConfig, TaskConfig, TrainConfig
from esm_neuron.data.splits import Splits, load_splits
from esm_neuron.tasks import task_class

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def protein(seed: int, length: int = 40) -> str:
    return "".join(random.Random(seed).choices(LETTERS, k=length))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def table(path: Path, labels: list[str], sequences: list[str] | None = None) -> Path:
    """A TSV of proteins p0, p1, ... with these labels."""
    sequences = sequences or [protein(i) for i in range(len(labels))]
    rows = [f"p{i}\t{sequence}\t{label}" for i, (sequence, label) in enumerate(zip(sequences, labels, strict=True))]
    return write(path, "\n".join(["id\tsequence\tlabel", *rows]) + "\n")


def load(source: Path | str, task: str = "sequence_classification", /, **fields: Any) -> Splits:
    """The splits of a run; `labels` and `ignore` are the task's, all else is `data`."""
    own = {name: fields.pop(name) for name in ("labels", "ignore") if name in fields}
    data = DataConfig(train=str(source), **{"valid_fraction": 0.0, **fields})
    cfg = TrainConfig(task=TaskConfig(name=task, **own), data=data)
    return load_splits(cfg, task_class(task).label_kind)


def named(splits: Splits) -> list[str]:
    """The class of each training protein."""
    return [splits.labels[label] for label in splits.train.labels]


def sets(splits: Splits) -> list[list[str]]:
    """The labels of each training protein."""
    return [[name for name, has in zip(splits.labels, row, strict=True) if has] for row in splits.train.labels]


HEAD, ROWS = ("id", "sequence", "label"), [(f"p{i}", protein(i), "AB"[i % 2]) for i in range(6)]
"""A table of six proteins: its columns and its rows."""
