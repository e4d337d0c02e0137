"""What all tests share: few threads, no network, caches of their own; and who runs the suites that need more."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Before torch, transformers or datasets are imported. Processes that tests start inherit all of it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SUITES = {
    "nxd": "make test-nxd NXD_SRC=<folder with neuronx_distributed's sources>",
    "gpu": "make test-gpu, on a machine with a CUDA GPU",
    "trn1": "make test-trn1, on a trn1 instance",
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
    if suite == "trn1":
        return None if Path("/dev/neuron0").exists() else "there is no /dev/neuron0"
    return None
