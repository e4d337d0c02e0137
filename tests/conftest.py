"""What all tests share: few threads, no network, caches of their own; and who runs the suites that need more."""

from __future__ import annotations

import importlib.util
import os
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esm_neuron.config import TrainConfig

# Before torch, transformers or datasets are imported. Processes that tests start inherit all of it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # torch_xla's import would start a pool of compilers
os.environ.setdefault("USE_TORCH_XLA", "0")  # accelerate, under peft, would import torch_xla: half a minute

SUITES = {
    "nxd": "make test-nxd NXD_SRC=<folder with neuronx_distributed's sources>",
    "gpu": "make test-gpu, on a machine with a CUDA GPU",
    "trn1": "make test-trn1, on a trn1 instance",
    "launchers": "make test-launchers",
    "hub": "make test-hub, with a network",
}
"""Marker -> how its tests are run. They run where they are asked for by name; elsewhere they are skipped, visibly."""

_CACHE = tempfile.TemporaryDirectory(prefix="esm-neuron-tests-")


def pytest_configure(config: pytest.Config) -> None:
    """Check what the suite asked for by `-m` needs; keep downloads and caches out of the user's home."""
    suite = config.option.markexpr
    missing = _missing(suite)
    if missing:
        raise pytest.UsageError(f"{suite}: {missing}; run {SUITES[suite]}")
    if suite != "hub":
        os.environ["HF_HOME"] = _CACHE.name
        os.environ["HF_DATASETS_CACHE"] = str(Path(_CACHE.name) / "datasets")


def pytest_unconfigure() -> None:
    """Remove the caches."""
    _CACHE.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of every suite but the one asked for by `-m`."""
    for item in items:
        for suite, command in SUITES.items():
            if item.get_closest_marker(suite) and config.option.markexpr != suite:
                item.add_marker(pytest.mark.skip(reason=f"run {command}"))


def _missing(suite: str) -> str | None:
    """What this machine lacks for a suite, None if nothing: a suite asked for by name never passes by skipping."""
    if suite == "nxd":
        source = os.environ.get("NXD_SRC", "")
        found = (Path(source) / "neuronx_distributed").is_dir() if source else False
        return None if found else f"NXD_SRC={source!r} holds no neuronx_distributed folder"
    if suite == "gpu":
        import torch

        return None if torch.cuda.is_available() else "torch finds no CUDA GPU"
    if suite == "launchers":
        needed = ("moto", "sagemaker", "sagemaker_training", "sagemaker_pytorch_container", "kubeflow")
        lacking = [name for name in needed if importlib.util.find_spec(name) is None]
        return f"{', '.join(lacking)} not installed (extras sagemaker and launchers-tests)" if lacking else None
    if suite == "trn1":
        return None if Path("/dev/neuron0").exists() else "there is no /dev/neuron0"
    return None


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
    """See `toy`, for the runs under `folder`."""
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


def assert_same_metrics(found: Mapping[str, Any], expected: Mapping[str, Any], **tolerance: float) -> None:
    """The same names and values within `tolerance` (see `pytest.approx`), in nested figures too."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        if isinstance(value, Mapping):
            assert_same_metrics(found[name], value, **tolerance)
        else:
            assert found[name] == pytest.approx(value, **tolerance), name


@pytest.fixture(scope="session")
def same_metrics() -> Callable[..., None]:
    """`assert_same_figures`, which a test file cannot import."""
    return assert_same_metrics


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


@pytest.fixture(scope="module")
def task_toys(module_toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainConfig]:
    """Task -> a quick run of it."""
    return make_task_toys(module_toy, tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def proteins(tmp_path: Path) -> Callable[..., Path]:
    """Writes files of toy proteins: `proteins("train.csv", 60, seed=0)`."""
    return lambda name, count, seed=0: write_proteins(tmp_path / name, count, seed)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """Makes configurations of quick runs on toy proteins: `toy("out", loop={"max_steps": 3})`."""
    return make_toys(tmp_path)


@pytest.fixture(scope="module")
def module_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """`toy` for all tests of a file."""
    return make_toys(tmp_path_factory.mktemp("toys"))


def lengthen(cfg: TrainConfig) -> TrainConfig:
    """`cfg` on proteins of which every third is three times as long."""
    for path in map(Path, (str(cfg.data.train), str(cfg.data.valid), str(cfg.data.test))):
        head, *rows = path.read_text().splitlines()
        cells = [row.split(",") for row in rows]
        longer = [[name, residues * (1 if n % 3 else 3), label] for n, (name, residues, label) in enumerate(cells)]
        path.write_text("\n".join([head, *map(",".join, longer)]) + "\n")
    return cfg


@pytest.fixture(scope="session")
def lengthened() -> Callable[[TrainConfig], TrainConfig]:
    """See `lengthen`."""
    return lengthen
