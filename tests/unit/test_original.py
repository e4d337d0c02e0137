"""Our ESM-2 against the original implementation, fair-esm 2.0.0, with the same random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import esm as fair_esm
import pytest
import torch
from helpers.weights import write_safetensors_folder

from esm_neuron.models.esm2 import PackedForMaskedLM, set_attention
from esm_neuron.models.hf_folder import SafetensorsFolder
from esm_neuron.models.shapes import EsmShape, esm_config
from esm_neuron.models.weights import Draw, load_into, read_config

SHAPE = EsmShape(layers=3, hidden=64, heads=4, intermediate=256)
CLS, PAD, EOS, MASK = 0, 1, 2, 32
TOLERANCE = 1e-5
"""Largest difference relative to the largest output, in float32."""

RENAMED = {
    "embed_tokens.": "esm.embeddings.word_embeddings.",
    "layers.": "esm.encoder.layer.",
    "self_attn.q_proj.": "attention.self.query.",
    "self_attn.k_proj.": "attention.self.key.",
    "self_attn.v_proj.": "attention.self.value.",
    "self_attn.out_proj.": "attention.output.dense.",
    "self_attn_layer_norm.": "attention.LayerNorm.",
    "final_layer_norm.": "LayerNorm.",
    "fc1.": "intermediate.dense.",
    "fc2.": "output.dense.",
    "emb_layer_norm_after.": "esm.encoder.emb_layer_norm_after.",
    "contact_head.": "esm.contact_head.",
    "lm_head.weight": "lm_head.decoder.weight",
}
"""Part of a name in fair-esm -> in transformers."""


def renamed(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        if "rot_emb.inv_freq" in name:
            continue
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        yield name, tensor


@pytest.fixture(scope="module")
def original() -> fair_esm.ESM2:
    """Every parameter random, norms and biases too, so that each of them matters to the outputs."""
    model = fair_esm.ESM2(num_layers=SHAPE.layers, embed_dim=SHAPE.hidden, attention_heads=SHAPE.heads).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module", params=["segments", "masked"])
def ours(request: pytest.FixtureRequest, original: fair_esm.ESM2, tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("original") / "hf"
    write_safetensors_folder(renamed(original.state_dict()), esm_config(SHAPE), folder)
    with torch.device("meta"):
        model = PackedForMaskedLM(read_config(folder))
    report = load_into(model, SafetensorsFolder(folder), Draw(0, 0.02), lambda _: False)
    assert report.drawn == () and report.ignored == ()
    set_attention(model.esm, 1026, request.param)
    return model.eval()


def proteins(*lengths: int) -> list[torch.Tensor]:
    """Random proteins with their specials; in every second one a fifth of the residues is masked."""
    generator = torch.Generator().manual_seed(len(lengths))
    made = []
    for number, length in enumerate(lengths):
        residues = torch.randint(4, 24, (length,), generator=generator)
        if number % 2 == 0:
            residues[torch.rand(length, generator=generator) < 0.2] = MASK
        made.append(torch.cat((torch.tensor([CLS]), residues, torch.tensor([EOS]))))
    assert any((protein == MASK).any() for protein in made) and len(set(lengths)) == len(lengths)
    return made


def raise_on_any_rank(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ((mine - theirs).abs().max() / theirs.abs().max()).item() <= TOLERANCE


@torch.no_grad()
def test_padded_batches_agree(original: fair_esm.ESM2, ours: PackedForMaskedLM) -> None:
    sequences = proteins(70, 11, 300, 42, 3)
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD)
    real = tokens != PAD
    theirs, mine = original(tokens)["logits"], ours(tokens, attention_mask=real.long()).logits
    assert raise_on_any_rank(mine[real], theirs[real])


@torch.no_grad()
def test_a_pack_agrees_with_each_sequence_alone(original: fair_esm.ESM2, ours: PackedForMaskedLM) -> None:
    sequences = proteins(70, 11, 120, 42)
    pad = 9
    row = torch.cat((*sequences, torch.full((pad,), PAD)))
    segments = torch.cat([*(torch.full((len(s),), i) for i, s in enumerate(sequences)), torch.full((pad,), -1)])
    positions = torch.cat([*(torch.arange(len(s)) for s in sequences), torch.zeros(pad, dtype=torch.long)])
    mine = ours(row[None], segments[None], positions=positions[None], max_segments=6).logits[0]
    for number, sequence in enumerate(sequences):
        assert raise_on_any_rank(mine[segments == number], original(sequence[None])["logits"][0]), f"sequence {number}"


@torch.no_grad()
def test_the_comparison_feels_masks_and_order(original: fair_esm.ESM2) -> None:
    """What the tests above vary changes the original's outputs by far more than the tolerance."""
    masked = proteins(70, 11)[0]
    plain = torch.where(masked == MASK, torch.tensor(5), masked)
    swapped = torch.cat((plain[:1], plain[1:-1].flip(0), plain[-1:]))
    base = original(plain[None])["logits"]
    assert not raise_on_any_rank(original(masked[None])["logits"], base)
    assert not raise_on_any_rank(original(swapped[None])["logits"].flip(1), base)
    short = original(masked[None])["logits"][0]
    padded = torch.cat((masked, torch.full((40,), PAD)))[None]
    assert raise_on_any_rank(original(padded)["logits"][0, : len(masked)], short)
