"""Toy proteins and quick runs on them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from esm_neuron.config import TrainConfig

ALPHABETS = {"alpha": "ACDEFGHIKL", "beta": "FGHIKLMNPQRSTVWY"}
"""Label -> residues of a toy protein: overlapping, so that the label takes some learning and can be learnt."""


Toy = Callable[..., TrainConfig]


def write_proteins(path: Path, count: int, seed: int = 0) -> Path:
    """Write a CSV file of random proteins of 20 to 60 residues with their labels."""
    rng = random.Random(seed)
    rows = ["id,sequence,label"]
    for number in range(count):
        label = list(ALPHABETS)[number % len(ALPHABETS)]
        residues = "".join(rng.choices(ALPHABETS[label], k=rng.randint(20, 60)))
        rows.append(f"{seed}-{number},{residues},{label}")
    path.write_text("\n".join(rows) + "\n")
    return path


def make_toys(folder: Path) -> Toy:
    """Return a maker of configurations of quick runs whose files lie under `folder`."""
    sizes = {"train": 60, "valid": 20, "test": 20}
    files = {
        split: str(write_proteins(folder / f"{split}.csv", size, seed))
        for seed, (split, size) in enumerate(sizes.items())
    }
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": "tiny", "init": "random"},
        "data": {**files, "max_residues": 62, "window_overlap": 8, "pack_tokens": 128, "max_segments": 6},
        "loop": {
            "max_steps": 8,
            "packs_per_step": 4,
            "packs_per_device": 4,
            "eval_packs_per_device": 4,
            "eval_every": 4,
        },
        "log": {"every": 1, "tensorboard": False},
    }

    def make(output: str = "out", **changes: dict[str, Any]) -> TrainConfig:
        cfg = TrainConfig(output=str(folder / output))
        for name in {**sections, **changes}:
            values = {**sections.get(name, {}), **changes.get(name, {})}
            cfg = replace(cfg, **{name: replace(getattr(cfg, name), **values)})
        return cfg

    return make


LABEL_COLUMNS = {
    "sequence_classification": "label",
    "multi_label": "several",
    "regression": "value",
    "residue_classification": "residues",
    "masked_lm": "label",
}
"""Task -> the column of `labelled.csv` that it learns from."""

LEARNT: dict[str, dict[str, Any]] = {
    "sequence_classification": {"class_weights": {"alpha": 1.0, "beta": 3.0}, "label_smoothing": 0.1},
    "multi_label": {"class_weights": {"alpha": 0.5, "beta": 1.0, "rich": 4.0}, "label_smoothing": 0.1},
    "residue_classification": {"class_weights": {"E": 1.0, "H": 3.0}, "label_smoothing": 0.1, "focal_gamma": 2.0},
}
"""Task -> what of its loss is not plain, so that whatever shares a run's work has to weigh as one process does."""


def make_task_toys(make: Toy, folder: Path) -> dict[str, TrainConfig]:
    """A quick run of every task, under `folder`: windows for half of the proteins, attention pooling, two epochs. The
    first four test proteins are among those that training and validation rows are sampled from."""
    train = write_proteins(folder / "train.csv", 40, seed=5).read_text().splitlines()[1:]
    test = write_proteins(folder / "test.csv", 21, seed=4).read_text().splitlines()[1:]
    test[:4] = [line.replace("5-", "4-", 1) for line in train[:4]]
    for split, lines in (("train", train), ("test", test)):
        rows = ["id,sequence,label,several,value,residues"]
        for line in lines:
            name, sequence, label = line.split(",")
            helix = "".join("H" if residue in "FGHIKL" else "E" for residue in sequence)
            several = ";".join([label, *(["rich"] if helix.count("H") * 2 > len(helix) else [])])
            value = 100 + 50 * helix.count("H") / len(helix)
            rows.append(f"{name},{sequence},{label},{several},{value:.3f},?{helix[1:]}")
        (folder / f"labelled_{split}.csv").write_text("\n".join(rows) + "\n")
    data = {
        "train": str(folder / "labelled_train.csv"),
        "valid": None,
        "test": str(folder / "labelled_test.csv"),
        "valid_fraction": 0.2,
        "max_residues": 40,
        "long_sequences": "window",
        "pack_tokens": 64,
    }
    return {
        task: make(
            task,
            task={"name": task, **LEARNT.get(task, {})},
            model={"pooling": "attention"},
            data={**data, "label_column": column},
            loop={"max_steps": 6, "packs_per_device": 2, "eval_every": 3},
            optim={"lr": 1e-2},
        )
        for task, column in LABEL_COLUMNS.items()
    }


def lengthen(cfg: TrainConfig) -> TrainConfig:
    """`cfg` on proteins of which every third is three times as long."""
    for path in map(Path, (str(cfg.data.train), str(cfg.data.valid), str(cfg.data.test))):
        head, *rows = path.read_text().splitlines()
        cells = [row.split(",") for row in rows]
        longer = [[name, residues * (1 if n % 3 else 3), label] for n, (name, residues, label) in enumerate(cells)]
        path.write_text("\n".join([head, *map(",".join, longer)]) + "\n")
    return cfg
