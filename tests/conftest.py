"""What all tests share: few threads, no network, caches of their own; and who runs the suites that need more."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import assert_same_metrics
from helpers.toys import Toy, lengthen, make_task_toys, make_toys, write_proteins

from esm_neuron.config import TrainConfig

# Before torch, transformers or datasets are imported. Processes that tests start inherit all of it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # torch_xla's import would start a pool of compilers
os.environ.setdefault("USE_TORCH_XLA", "0")  # accelerate, under peft, would import torch_xla: half a minute

if importlib.util.find_spec("hypothesis") is not None:  # which not every suite's environment has
    from hypothesis import settings

    settings.register_profile("no deadline", deadline=None)  # a busy machine fails no test
    settings.load_profile("no deadline")

SUITES = {
    "nxd": "make test-nxd NXD_SRC=<folder with neuronx_distributed's sources>",
    "gpu": "make test-gpu, on a machine with a CUDA GPU",
    "trn1": "make test-trn1, on a trn1 instance",
    "launchers": "make test-launchers",
    "ray": "python -m pytest -m ray, where ray[default,data] is installed beside ours",
    "images": "make test-images, as root, with buildah and debootstrap",
    "hub": "make test-hub, with a network",
    "trackers": "make test-trackers, which installs wandb, mlflow and snakemake to an environment of their own",
}
"""Marker -> how its tests are run. They run where they are asked for by name; elsewhere they are skipped, visibly."""

_CACHE = tempfile.TemporaryDirectory(prefix="esm-neuron-tests-")


def pytest_configure(config: pytest.Config) -> None:
    """Check what the suite asked for by `-m` needs; keep downloads and caches out of the user's home."""
    suite = config.option.markexpr
    missing = _missing(suite)
    if missing:
        raise pytest.UsageError(f"{suite}: {missing}; run {SUITES.get(suite, 'make test-trn1-lane')}")
    if suite != "hub":
        os.environ["HF_HOME"] = _CACHE.name
        os.environ["HF_DATASETS_CACHE"] = str(Path(_CACHE.name) / "datasets")


def pytest_unconfigure() -> None:
    """Remove the caches."""
    _CACHE.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of every suite but the one asked for by `-m`, and XLA's on a lane without it."""
    no_xla = importlib.util.find_spec("torch_xla") is None
    for item in items:
        if no_xla and item.get_closest_marker("xla"):
            item.add_marker(pytest.mark.skip(reason="no torch_xla here; run make test-trn1-lane"))
        for suite, command in SUITES.items():
            if item.get_closest_marker(suite) and config.option.markexpr != suite:
                item.add_marker(pytest.mark.skip(reason=f"run {command}"))


def _missing(suite: str) -> str | None:
    """What this machine lacks for a suite, None if nothing: a suite asked for by name never passes by skipping."""
    if suite == "nxd":
        source = os.environ.get("NXD_SRC", "")
        found = (Path(source) / "neuronx_distributed").is_dir() if source else False
        return None if found else f"NXD_SRC={source!r} holds no neuronx_distributed folder"
    if suite == "xla":
        return None if importlib.util.find_spec("torch_xla") else "torch_xla is not installed"
    if suite == "ray":
        return None if importlib.util.find_spec("ray") else "ray is not installed"
    if suite == "gpu":
        import torch

        return None if torch.cuda.is_available() else "torch finds no CUDA GPU"
    if suite == "launchers":
        needed = ("moto", "sagemaker", "sagemaker_training", "sagemaker_pytorch_container", "kubeflow")
        lacking = [name for name in needed if importlib.util.find_spec(name) is None]
        return f"{', '.join(lacking)} not installed (extras sagemaker and launchers-tests)" if lacking else None
    if suite == "trackers":
        lacking = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name) is None]
        lacking += [name for name in ("MLFLOW", "SNAKEMAKE") if not Path(os.environ.get(name, "")).is_file()]
        return f"{', '.join(lacking)} not there" if lacking else None
    if suite == "images":
        lacking = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
        lacking += [] if os.geteuid() == 0 else ["root"]
        return f"{', '.join(lacking)} missing (apt-get install buildah debootstrap)" if lacking else None
    if suite == "trn1":
        rehearsed = os.environ.get("TRN1_REHEARSAL") == "1"  # tests/trn1/conftest.py
        return None if rehearsed or Path("/dev/neuron0").exists() else "there is no /dev/neuron0"
    return None


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


@pytest.fixture(scope="module")
def task_toys(module_toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainConfig]:
    """Task -> a quick run of it."""
    return make_task_toys(module_toy, tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def same_metrics() -> Callable[..., None]:
    """`helpers.runs.assert_same_metrics`."""
    return assert_same_metrics


@pytest.fixture(scope="session")
def lengthened() -> Callable[[TrainConfig], TrainConfig]:
    """`helpers.toys.lengthen`."""
    return lengthen
