"""Every configuration that is shipped can be read, is legal, and fits the machine that it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm_neuron.backends.topology import NEURON_CORES
from esm_neuron.config import settings
from esm_neuron.config.rules import accumulated_passes, validate
from esm_neuron.models.shapes import known_shape
from esm_neuron.planning.memory import predict_memory

CUDA = Path(__file__).parents[2] / "configs" / "cuda"
SPARE = 0.85
"""Share of a GPU that a run may be predicted to need: the allocator keeps more than the tensors take."""


def table() -> list[list[str]]:
    """Cells of the rows of README.md: config, machine, GPUs, GiB, flags, GB."""
    lines = (CUDA / "README.md").read_text().splitlines()
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]


def test_every_file_is_in_the_table() -> None:
    assert {row[0] for row in table()} == {path.name for path in CUDA.glob("*.yaml")}


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_a_run_fits_its_machine(row: list[str]) -> None:
    name, _, gpus, gib, flags, gigabytes = row
    cfg = settings.parse(["--config", str(CUDA / name), "--data.train", "my.csv", *flags.split()])
    validate(cfg)
    assert accumulated_passes(cfg, int(gpus)) >= 1
    shape = known_shape(cfg.model.name)
    assert shape is not None
    needed = predict_memory(cfg, shape, int(gpus)).total
    assert needed < SPARE * int(gib) * 2**30
    assert f"{needed / 1e9:.1f}" == gigabytes, "the table is what is predicted"


@pytest.mark.parametrize("path", sorted(CUDA.parent.glob("*trn1*.yaml")), ids=lambda path: path.stem)
def test_a_run_fits_the_cores_of_a_trn1_as_its_file_says(path: Path) -> None:
    cfg = settings.read_config(path)
    validate(cfg)
    shape, instance = known_shape(cfg.model.name), "trn1.2xlarge" if "2xlarge" in path.name else "trn1.32xlarge"
    assert shape is not None
    for nodes in (1,) if instance == "trn1.2xlarge" else (1, 2, 4):
        dp = nodes * NEURON_CORES[instance] // cfg.parallel.tp
        assert accumulated_passes(cfg, dp) >= 1
        as_set, again = (predict_memory(cfg, shape, dp, checkpointing=on).total / 2**30 for on in (False, True))
        assert not cfg.model.gradient_checkpointing and as_set < SPARE * 16
        assert f"{as_set:.0f} of a core's 16 GiB are predicted, {again:.0f} with true" in path.read_text()
