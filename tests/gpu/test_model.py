"""The model on a CUDA GPU answers as on the CPU; `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from esm_neuron.models.attention import ATTENTIONS
from esm_neuron.models.esm2 import PackedForMaskedLM, set_attention
from esm_neuron.models.shapes import SHAPES, esm_config


@pytest.mark.gpu
@pytest.mark.parametrize("attention", sorted(ATTENTIONS))
def test_logits_equal_those_of_the_cpu(attention: str) -> None:
    torch.manual_seed(0)
    model = PackedForMaskedLM(esm_config(SHAPES["tiny"])).eval()
    set_attention(model.esm, 40, attention)
    ids = torch.randint(4, 24, (2, 40))
    segments = torch.tensor([[0] * 25 + [1] * 15, [0] * 30 + [-1] * 10])
    positions = torch.tensor([[*range(25), *range(15)], [*range(30), *[0] * 10]])
    used = segments >= 0
    with torch.no_grad():
        cpu = model(ids, segments, positions=positions, max_segments=2).logits[used]
        gpu = model.cuda()(ids.cuda(), segments.cuda(), positions=positions.cuda(), max_segments=2).logits.cpu()[used]
    assert (cpu - gpu).abs().max() <= 1e-4 * cpu.abs().max()
