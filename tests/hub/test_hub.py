"""Real ESM-2 weights from the Hugging Face hub; `make test-hub`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, EsmForMaskedLM

from esm_neuron.config import ModelConfig
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.models.esm2 import PackedForMaskedLM
from esm_neuron.models.weights import Draw, load_into, open_weights

NAME = "facebook/esm2_t6_8M_UR50D"
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


@pytest.mark.hub
def test_the_released_8m_answers_as_in_transformers() -> None:
    config, source = open_weights(ModelConfig(name=NAME), seed=0)
    with torch.device("meta"):
        ours = PackedForMaskedLM(config)
    report = load_into(ours, source, Draw(0, 0.02), lambda name: False)
    assert not [name for name in report.drawn if "contact_head" not in name]
    ids = torch.from_numpy(encode_many([UBIQUITIN])[0]).long().unsqueeze(0)
    assert ids[0].tolist() == AutoTokenizer.from_pretrained(NAME)(UBIQUITIN)["input_ids"]
    with torch.no_grad():
        theirs = EsmForMaskedLM.from_pretrained(NAME).eval()(ids).logits
        mine = ours.eval()(ids).logits
    assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()
