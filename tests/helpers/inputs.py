"""A labelled or unlabelled file, read whole."""

from __future__ import annotations

from pathlib import Path

from esm_neuron.config import DataConfig
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.labels import Labels
from esm_neuron.data.validation import Report


def load_inputs(path: str | Path, cfg: DataConfig, labels: Labels | None = None) -> tuple[ExampleTable, Report]:
    """Return one whole file as a table, and what was done to its rows."""
    chunks = InputChunks(path, cfg, labels)
    return chunks.read(), chunks.report
