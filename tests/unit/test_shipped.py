"""The weights that the package carries: what their card says of them, and that they know more than frequencies."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file
from transformers import EsmForMaskedLM

from esm_neuron.config import AdapterConfig, DataConfig, LogConfig, LoopConfig, ModelConfig, TaskConfig, TrainConfig
from esm_neuron.models.shapes import SHAPES, SHIPPED
from esm_neuron.training import run

ROOT = Path(__file__).parents[2]
EMBEDDING = "esm.embeddings.word_embeddings.weight"
CARRIED = sorted(path.name for path in SHIPPED.iterdir() if path.is_dir())


def test_there_are_some() -> None:
    assert CARRIED == ["mini"]


@pytest.mark.parametrize("name", CARRIED)
def test_the_card_names_the_maker_and_the_very_file(name: str) -> None:
    folder = SHIPPED / name
    card, weights = (folder / "README.md").read_text(encoding="utf-8"), folder / "model.safetensors"
    assert "trained by this project, not Meta's weights" in card and "CC BY 4.0" in card
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in card
    assert weights.stat().st_size <= 16_000_000
    found = {key: tuple(tensor.shape) for key, tensor in load_file(weights).items()}
    assert found == {**SHAPES[name].parameters(), "lm_head.decoder.weight": found[EMBEDDING]}, "tied, and written twice"


@pytest.mark.parametrize("name", CARRIED)
def test_plain_transformers_reads_them(name: str) -> None:
    model, said = EsmForMaskedLM.from_pretrained(SHIPPED / name, output_loading_info=True)
    assert all(key.endswith("inv_freq") for key in said["missing_keys"]), "computed, not learnt"
    assert not said["mismatched_keys"] and not said["unexpected_keys"]
    assert model.num_parameters() >= sum(math.prod(s) for s in SHAPES[name].parameters().values())


def test_on_proteins_unlike_its_corpus_it_beats_their_frequencies(tmp_path: Path) -> None:
    """The demo's clean test rows have no homolog in the corpus; random weights do not beat a unigram model there."""
    table = pd.read_csv(ROOT / "examples" / "demo" / "localization.tsv.gz", sep="\t", dtype=str)
    rows = table[(table.split == "test") & (table.leaky == "false")].iloc[:40]
    source = tmp_path / "proteins.csv"
    rows.rename(columns={"entry": "id"})[["id", "sequence"]].to_csv(source, index=False)

    def perplexity(init: str) -> tuple[float, float]:
        cfg = TrainConfig(
            output=str(tmp_path / init),
            model=ModelConfig(name="mini", init=init),
            task=TaskConfig(name="masked_lm"),
            data=DataConfig(train=str(source), test=str(source), valid_fraction=0, max_residues=254, pack_tokens=512),
            adapter=AdapterConfig(kind="none"),
            loop=LoopConfig(max_steps=1, packs_per_step=1, packs_per_device=1, eval_packs_per_device=4),
            log=LogConfig(tensorboard=False),
        )
        cfg = replace(cfg, optim=replace(cfg.optim, lr=1e-9))
        result = run.train(cfg, str).result
        return result["test"]["perplexity"], result["baselines"]["test"]["unigram"]["perplexity"]

    ours, unigram = perplexity("pretrained")
    drawn, _ = perplexity("random")
    assert ours < unigram < drawn
