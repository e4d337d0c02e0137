"""Model cards: the hub can read them, and they say what was measured, on what, and what is not known."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard

from esm_neuron.config import AdapterConfig, DataConfig, ModelConfig, TaskConfig, TrainConfig
from esm_neuron.models.hf_folder import BaseReference
from esm_neuron.reports.card import model_card

HUB = "facebook/esm2_t6_8M_UR50D"
BASE = BaseReference(HUB, "c731040f", "ab" * 32)
RESULT: dict[str, Any] = {
    "metric": "mcc",
    "parameters": {"trainable": 1234, "total": 56789},
    "chosen_step": 40,
    "train": {"steps": 60},
    "data": {"train": {"records": 5759, "residues": 2_000_000}, "test": {"records": 862, "residues": 300_000}},
    "valid": {"n": 396, "mcc": 0.25, "mcc_ci": [0.14, 0.33]},
    "test": {"n": 862, "loss": 0.58, "loss_ci": [0.55, 0.61], "mcc": 0.258, "mcc_ci": [0.189, 0.319]},
    "baselines": {"test": {"majority": {"n": 862, "mcc": 0.0, "mcc_ci": [0.0, 0.0], "loss": 0.66, "loss_ci": None}}},
    "verdicts": {"test": {"text": "Better than the best baseline, majority, by MCC"}},
    "alarms": {"test": ["ALARM: it answers *in* everywhere"]},
}


def config(**changes: Any) -> TrainConfig:
    sections = {
        "model": ModelConfig(name=HUB, pooling="cls"),
        "task": TaskConfig(labels=("in", "out")),
        "data": DataConfig(train="secret/folder/proteins.csv", test="secret/folder/others.csv"),
    }
    return TrainConfig(**{**sections, **changes})


def test_the_hub_reads_licence_base_task_and_metrics() -> None:
    data = ModelCard(model_card(config(), RESULT, BASE, "adapter")).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "peft", "text-classification")
    assert (data.base_model, data.base_model_relation) == (HUB, "adapter")
    assert {"esm-2", "lora", "protein"} <= set(data.tags)
    seen = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    assert seen == {("valid", "matthews_correlation"): 0.25, ("test", "loss"): 0.58,
                    ("test", "matthews_correlation"): 0.258}  # fmt: skip
    merged = ModelCard(model_card(config(), RESULT, BASE, "model")).data
    assert (merged.library_name, merged.base_model_relation) == ("transformers", "finetune")


def test_it_tells_data_metrics_intervals_and_where_the_model_loses() -> None:
    text = model_card(config(), RESULT, BASE, "model")
    assert "| MCC | 0.258 \\[0.189, 0.319\\] | 0.000 \\[0.000, 0.000\\] |" in text
    assert "| train | proteins.csv | 5,759 | 2,000,000 |" in text and "| test | others.csv | 862 |" in text
    assert "secret" not in text
    assert "862 proteins (test); validation chose the step on 396 proteins (valid)." in text
    assert "Better than the best baseline, majority, by MCC" in text
    assert "**ALARM: it answers \\*in\\* everywhere**" in text
    assert "95 % bootstrap intervals over proteins." in text
    clustered = {**RESULT, "test": {**RESULT["test"], "n_clusters": 700}}
    assert "intervals over 700 clusters of proteins" in model_card(config(), clustered, BASE, "model")
    assert "c731040f" in text and "1,234 of 56,789" in text and "in, out" in text


def test_what_is_not_known_is_said() -> None:
    random = config(model=ModelConfig(name="tiny", init="random"), adapter=AdapterConfig(kind="none"))
    base = BaseReference("random weights of seed 0", None, "00" * 32)
    nothing = {**RESULT, "valid": None, "test": None, "baselines": {}}
    text = model_card(random, nothing, base, "model")
    card = ModelCard(text)
    assert card.data.license == "other" and card.data.base_model is None and card.data.eval_results is None
    assert "| started from | tiny, newly initialized from seed 42, sha256 0000" in text
    assert "No proteins were held out" in text and "**newly initialized**" in text and "fill in" in text
    assert "optimistic" in model_card(config(), {**RESULT, "test": None}, BASE, "model")


def test_names_cannot_become_markup() -> None:
    labels = ("<script>alert(1)</script>", "a|b", "[x](y)", "two\nlines: {{ 7 * 7 }}")
    cfg = config(task=TaskConfig(labels=labels), data=DataConfig(train="a: b\n---\n<b>.csv"))
    text = model_card(cfg, RESULT, BASE, "model")
    body = ModelCard(text).text
    assert "<script>" not in body and "<b>" not in body and "[x](y)" not in body
    assert "a\\|b" in body and "\\[x\\](y)" in body and "two lines: {{ 7 \\* 7 }}" in body
    assert ModelCard(text).data.eval_results[0].dataset_name == "a: b\n---\n<b>.csv"


def test_clean_proteins_have_metrics_of_their_own() -> None:
    found = {
        **RESULT,
        "leaks": {"test": {"method": "kmer", "proteins": 862, "homologs": 62}},
        "clean": {"test": {"n": 800, "mcc": 0.2, "mcc_ci": [0.1, 0.3]}},
        "clean_baselines": {"test": {"majority": {"n": 800, "mcc": 0.0, "mcc_ci": None}}},
        "clean_verdicts": {"test": {"text": "Undecided against majority"}},
    }
    text = model_card(config(), found, BASE, "model")
    assert "On the 800 proteins among these without a homolog in training (by kmer):" in text
    assert "|  | this model | majority |\n|---|---|---|\n| MCC | 0.200 \\[0.100, 0.300\\] | 0.000 |\n" in text
    assert "Undecided against majority" in text
    assert "62 of 862 test proteins have a homolog in training (by kmer)." in text
    unknown = model_card(config(), RESULT, BASE, "model")
    assert "Homologs of test proteins in training were not looked for." in unknown
