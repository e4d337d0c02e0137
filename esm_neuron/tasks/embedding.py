"""Embedding as a task that learns nothing: its model is the encoder alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esm_neuron.config import TaskConfig
from esm_neuron.config.deferred import module
from esm_neuron.tasks.base import Task

if TYPE_CHECKING:
    from esm_neuron.compat import EsmConfig, PreTrainedModel
    from esm_neuron.models import esm2
else:
    esm2 = module("esm_neuron.models.esm2")


class Embedding(Task):
    """The states of the encoder, one vector per protein or per residue; `esm2.Embedder` makes them."""

    def __init__(self, per_residue: bool) -> None:
        super().__init__(TaskConfig())
        self.predictions_per_token = per_residue

    def build(self, config: EsmConfig) -> PreTrainedModel:
        return esm2.PackedEncoder(config)
