"""Folders of transformers' Trainer and of plain PEFT are used as a run's own, with the numbers of these libraries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.finished import logits_of
from helpers.toys import Toy
from helpers.trainers import CLASSES, KINDS, SEQUENCES, adapted, answers, base, by_trainer, fasta, fit, moved, small
from peft import IA3Config, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
)

import esm_neuron as en
from esm_neuron.backends import create_backend
from esm_neuron.errors import ConfigError, EsmNeuronError
from esm_neuron.inference.embed import embed
from esm_neuron.inference.evaluate import evaluate
from esm_neuron.inference.export import export
from esm_neuron.inference.load import build_trained, find_trained
from esm_neuron.inference.predict import predict
from esm_neuron.inference.score import score
from esm_neuron.inference.serving import load
from esm_neuron.models.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_folder
from esm_neuron.run_dir import read_calibration
from esm_neuron.training import run

TASKS = {"single": "sequence_classification", "multi": "multi_label", "regression": "regression",
         "tokens": "residue_classification", "lm": "masked_lm"}  # fmt: skip
ALL = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
ADAPTERS: dict[str, tuple[type, tuple[str, ...], dict[str, Any]]] = {
    "sequences": (EsmForSequenceClassification, CLASSES, {"task_type": "SEQ_CLS"}),
    "one value": (EsmForSequenceClassification, ("melting",), {"task_type": "SEQ_CLS", "target_modules": ALL}),
    "tokens": (EsmForTokenClassification, CLASSES, {"task_type": "TOKEN_CLS", "use_rslora": True}),
    "patterns": (
        EsmForSequenceClassification,
        CLASSES,
        {
            "task_type": "SEQ_CLS",
            "target_modules": ALL,
            "rank_pattern": {"query": 2, r"layer\.[01]\.intermediate.dense": 3},
            "alpha_pattern": {"value": 40, "^esm.encoder.layer.1.attention.self.query": 5},
            "use_rslora": True,
        },
    ),
    "dora": (EsmForSequenceClassification, CLASSES, {"task_type": "SEQ_CLS", "use_dora": True, "bias": "lora_only"}),
    "all": (
        EsmForSequenceClassification,
        CLASSES,
        {"task_type": "SEQ_CLS", "target_modules": "all-linear", "bias": "all"},
    ),
    "language": (EsmForMaskedLM, (), {"target_modules": [*ALL, "lm_head.dense"]}),
}  # fmt: skip
"""What an adapter is of -> transformers' class, names of the outputs, and settings of LoraConfig."""


def ours(folder: Path, *words: str) -> Tensor:
    cfg, task = find_trained(str(folder), None, words, "predict")
    return logits_of(build_trained(cfg, task, create_backend(cfg)).model)


def equal(found: Tensor, expected: Tensor) -> bool:
    """To float32's rounding: with adapters as large as these PEFT itself is off by 4e-6 of the largest from float64.

    Padding of a residue model is left out.
    """
    if expected.ndim == 3:
        found, expected = found[0], expected[0]
    return found.shape == expected.shape and float((found - expected).abs().max()) < 1e-5 * max(1, expected.abs().max())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """kind -> the folder that Trainer has written, and transformers' answer; made once."""
    made: dict[str, tuple[Path, Tensor]] = {}

    def get(kind: str) -> tuple[Path, Tensor]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "theirs"
            made[kind] = folder, by_trainer(kind, folder)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """kind -> the folder that PEFT has written, and what PEFT answers from it and its base."""
    made: dict[str, tuple[Path, Tensor]] = {}

    def get(kind: str) -> tuple[Path, Tensor]:
        if kind not in made:
            cls, labels, lora = ADAPTERS[kind]
            home = tmp_path_factory.mktemp("adapter")
            model = adapted(base(home / "base"), cls, labels, **lora)
            model.save_pretrained(home / "adapter")
            again = cls.from_pretrained(home / "base", **({"num_labels": len(labels)} if labels else {}))
            made[kind] = home / "adapter", logits_of(PeftModel.from_pretrained(again, home / "adapter"))
        return made[kind]

    return get


# --- transformers' Trainer


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_trainer_answers_as_transformers_does(
    trained: Callable[[str], tuple[Path, Tensor]], kind: str, tmp_path: Path
) -> None:
    folder, expected = trained(kind)
    cfg, task = find_trained(str(folder), None, (), "predict")
    assert cfg.task.name == TASKS[kind] and task.labels == (
        () if kind in ("lm", "regression") else KINDS[kind][1]["labels"]
    )
    assert equal(ours(folder), expected)
    assert equal(ours(folder / "checkpoint-2"), expected)
    export(folder, tmp_path / "exported")
    assert equal(logits_of(KINDS[kind][0].from_pretrained(tmp_path / "exported")), expected)
    assert equal(ours(tmp_path / "exported"), expected)


def probabilities(kind: str, logits: np.ndarray) -> np.ndarray:
    if kind == "multi":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("kind", ["single", "multi", "regression", "tokens"])
def test_predict_and_evaluate_give_the_numbers_of_transformers(
    trained: Callable[[str], tuple[Path, Tensor]], kind: str, tmp_path: Path
) -> None:
    folder, _ = trained(kind)
    theirs = answers(KINDS[kind][0].from_pretrained(folder))
    assert predict(str(folder), fasta(tmp_path / "in.fasta"), tmp_path / "out.parquet") == len(SEQUENCES)
    table, names = pd.read_parquet(tmp_path / "out.parquet"), KINDS[kind][1]["labels"]
    if kind == "regression":
        np.testing.assert_allclose(table["value"], np.concatenate(theirs), rtol=1e-5)
        found = evaluate(folder, fasta(tmp_path / "a.fasta", ["40", "50", "60"]), None)
        error = np.concatenate(theirs) - [40, 50, 60]
        assert found["rmse"] == pytest.approx(float(np.sqrt(np.mean(error**2))), rel=1e-4)
        return
    columns = [table[f"p_{name}"] for name in names]
    for number, logits in enumerate(theirs):
        expected = probabilities(kind, logits)
        np.testing.assert_allclose(np.stack([c[number] for c in columns], -1), expected, rtol=2e-5, atol=1e-6)
    if kind == "tokens":
        best = ["".join(names[i] for i in logits.argmax(-1)) for logits in theirs]
        assert list(table["labels"]) == best
    elif kind == "single":
        best = [names[logits.argmax()] for logits in theirs]
        assert list(table["label"]) == best
    else:
        best = [";".join(n for n, v in zip(names, x, strict=True) if v > 0) or names[0] for x in theirs]
    assert evaluate(folder, fasta(tmp_path / "b.fasta", best), None)[
        "subset_accuracy" if kind == "multi" else "accuracy"
    ] == pytest.approx(1.0 if kind != "multi" else np.mean([(x > 0).any() or False for x in theirs]))


def test_what_embeds_scores_and_serves_takes_them_too(
    trained: Callable[[str], tuple[Path, Tensor]], adapter: Callable[[str], tuple[Path, Tensor]], tmp_path: Path
) -> None:
    source = fasta(tmp_path / "in.fasta")
    folder, _ = adapter("language")
    theirs = PeftModel.from_pretrained(EsmForMaskedLM.from_pretrained(folder.parent / "base"), folder)
    assert embed(str(folder), source, tmp_path / "e.parquet", "cls") == len(SEQUENCES)
    encoder = theirs.get_base_model().esm
    from esm_neuron.data.tokenizer import hf_tokenizer

    with torch.no_grad():
        state = encoder(**hf_tokenizer()(SEQUENCES[0], return_tensors="pt")).last_hidden_state[0, 0]
    np.testing.assert_allclose(pd.read_parquet(tmp_path / "e.parquet")["embedding"][0], state, atol=2e-5)
    (tmp_path / "variants.csv").write_text("sequence\n" + SEQUENCES[2] + "\n")
    from esm_neuron.inference.variants import VariantColumns

    asked = {"method": "pseudo-perplexity", "columns": VariantColumns(sequence="sequence")}
    score(str(folder), tmp_path / "variants.csv", tmp_path / "s.csv", **asked)
    merged = tmp_path / "merged"
    theirs.merge_and_unload().save_pretrained(merged)
    score(str(merged), tmp_path / "variants.csv", tmp_path / "t.csv", **asked)
    found, expected = (pd.read_csv(tmp_path / name)["pseudo_perplexity"][0] for name in ("s.csv", "t.csv"))
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(EsmNeuronError, match="has no language-model head"):
        score(str(adapter("sequences")[0]), tmp_path / "variants.csv", tmp_path / "x.csv", **asked)
    answer = load(trained("single")[0]).predict([("a", SEQUENCES[0])])
    assert answer[0]["label"] in CLASSES and sum(answer[0][f"p_{name}"] for name in CLASSES) == pytest.approx(1)


# --- PEFT


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_peft_answers_as_peft_does(
    adapter: Callable[[str], tuple[Path, Tensor]], kind: str, tmp_path: Path
) -> None:
    folder, expected = adapter(kind)
    words = [] if len(ADAPTERS[kind][1]) < 2 else [f"--task.labels=[{', '.join(CLASSES)}]"]
    assert equal(ours(folder, *words), expected)
    export(folder, tmp_path / "exported", words)
    assert equal(logits_of(ADAPTERS[kind][0].from_pretrained(tmp_path / "exported")), expected)


def test_a_bare_adapter_of_the_encoder(tmp_path: Path) -> None:
    model = adapted(base(tmp_path / "base"), EsmModel, use_rslora=True)
    model.save_pretrained(tmp_path / "adapter")
    assert embed(str(tmp_path / "adapter"), fasta(tmp_path / "in.fasta"), tmp_path / "e.parquet", "cls") == 3
    from esm_neuron.data.tokenizer import hf_tokenizer

    with torch.no_grad():
        state = model(**hf_tokenizer()(SEQUENCES[0], return_tensors="pt")).last_hidden_state[0, 0]
    np.testing.assert_allclose(pd.read_parquet(tmp_path / "e.parquet")["embedding"][0], state, atol=2e-5)


def test_trainer_with_an_adapter_inside_and_a_head_in_the_base(tmp_path: Path) -> None:
    start = base(tmp_path / "base", EsmForSequenceClassification, CLASSES)
    model = adapted(start, EsmForSequenceClassification, CLASSES, task_type="SEQ_CLS")
    fit(model.train(), [2, 0], tmp_path / "theirs")
    expected = logits_of(model)
    for folder in (tmp_path / "theirs", tmp_path / "theirs" / "checkpoint-2"):
        assert equal(ours(folder), expected), "the names of the classes are the base's"
    inner = adapted(start, EsmForSequenceClassification, CLASSES)  # without modules_to_save: the base's head stays
    inner.save_pretrained(tmp_path / "inner")
    assert equal(ours(tmp_path / "inner"), logits_of(inner))
    start.rename(tmp_path / "moved")
    with pytest.raises(EsmNeuronError, match=r"base .* is not here; .*--model.base"):
        ours(tmp_path / "inner")
    assert equal(ours(tmp_path / "inner", f"--model.base={tmp_path / 'moved'}"), logits_of(inner))
    loaded = en.load(tmp_path / "inner", base=tmp_path / "moved", sequence_column="seq")
    assert len(loaded.embed(pd.DataFrame({"id": ["a"], "seq": [SEQUENCES[0]]}))) == 1
    for written in (
        loaded.export(tmp_path / "a"),
        en.export(tmp_path / "inner", tmp_path / "b", base=tmp_path / "moved"),
    ):
        assert equal(ours(written), logits_of(inner))


def test_training_starts_from_an_adapter_and_carries_its_base(
    adapter: Callable[[str], tuple[Path, Tensor]], toy: Toy, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter("sequences")[0], tmp_path / "adapter")
    said: list[str] = []
    cfg = toy(model={"name": str(folder), "init": "pretrained"}, loop={"max_steps": 2})
    run.train(cfg, said.append)
    start = adapter("sequences")[0].parent / "base"
    assert f"training starts from {start} with the adapter of {folder} merged into it" in "\n".join(said)
    assert f"head of {folder} not used: classifier is of another" in "\n".join(said)
    shutil.rmtree(folder)
    predict(cfg.output, Path(str(cfg.data.test)), tmp_path / "out.csv")
    again = AutoModelForSequenceClassification.from_pretrained(Path(cfg.output) / "base")
    assert equal(logits_of(PeftModel.from_pretrained(again, Path(cfg.output) / "adapter")), ours(Path(cfg.output)))


def test_training_goes_on_with_the_head_of_the_same_classes(trained: Any, toy: Toy) -> None:
    for kind, more in (("single", {"name": TASKS["single"], "labels": ("memb", "cyto", "nucl")}),
                       ("regression", {"name": "regression", "target_mean": 0.0, "target_sd": 1.0})):  # fmt: skip
        from esm_neuron.tasks import create_task
        from esm_neuron.training.build import build_model

        cfg = toy(model={"name": str(trained(kind)[0]), "init": "pretrained", "pooling": "cls"}, task=more)
        built = build_model(cfg, create_task(cfg.task, cfg.task.labels or ()), create_backend(cfg))
        assert built.head.startswith("head taken over from")


# --- what is refused, by name and before any work


def change(folder: Path, target: Path, name: str, **fields: Any) -> str:
    """A copy of a folder with some fields of a JSON file changed; None takes one out."""
    path = shutil.copytree(folder, target) / name
    said = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return str(target)


def test_what_does_not_fit_is_one_line(
    trained: Callable[[str], tuple[Path, Tensor]], adapter: Callable[[str], tuple[Path, Tensor]], tmp_path: Path
) -> None:
    theirs, peft = trained("single")[0], adapter("sequences")[0]
    named = "--task.labels=[a, b, c]"
    other = tmp_path / "ia3"
    get_peft_model(EsmModel(small()), IA3Config(target_modules=["key"], feedforward_modules=[])).save_pretrained(other)
    prompts = tmp_path / "prompts"
    tuning = PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=2, num_attention_heads=4, token_dim=32, num_layers=2
    )
    get_peft_model(EsmForSequenceClassification(small()), tuning).save_pretrained(prompts)
    bert = tmp_path / "bert"
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=33)
    BertForSequenceClassification(tiny).save_pretrained(bert)
    encoder = tmp_path / "encoder"
    EsmModel(small()).save_pretrained(encoder)
    embedded = tmp_path / "embedded"
    adapted(peft.parent / "base", EsmModel, target_modules=["word_embeddings"]).save_pretrained(embedded)
    pickled = Path(shutil.copytree(peft, tmp_path / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    broken = Path(shutil.copytree(peft, tmp_path / "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    only = Path(shutil.copytree(theirs, tmp_path / "only"))
    (only / "config.json").unlink()
    nested = change(peft, tmp_path / "nested", "adapter_config.json", base_model_name_or_path=str(peft))
    values = change(theirs, tmp_path / "values", "config.json", problem_type="regression")
    cases: list[tuple[Any, list[str], str]] = [
        (peft, [], "nothing here says what its 3 classes are called; name the classes in the order of the outputs: "
         r"--task.labels '\[A, B, C\]'"),
        (peft, ["--task.labels=[a, b]"], "--task.labels names 2 classes, and .* has 3"),
        (theirs, ["--task.name=regression"], "--task.name regression: .* has a head for sequence_classification"),
        (theirs, ["--model.base=mini"], "model.base=mini is for the folder of an adapter"),
        (other, [], "peft_type is 'IA3', and only LORA is read; merge it with PEFT"),
        (prompts, [], "peft_type is 'PROMPT_TUNING', and only LORA is read"),
        (bert, [], r"architectures is \['BertForSequenceClassification'\], without a head of a task"),
        (encoder, [], r"architectures is \['EsmModel'\], without a head of a task"),
        (embedded, [], "word_embeddings.lora_embedding_A is no tensor of a LoRA adapter of linear layers"),
        (pickled, [named], "has no adapter_model.safetensors; save the adapter again with PEFT's save_pretrained"),
        (broken, [named], "adapter_model.safetensors: cannot be read"),
        (only, [], "holds checkpoints of transformers' Trainer and no model; name one: .*checkpoint-2"),
        (nested, [named], "is an adapter itself; export that first"),
        (values, [], "it gives 3 values per protein, and only one is read"),
    ]  # fmt: skip
    fields: list[tuple[dict[str, Any], str]] = [
        ({"base_model_name_or_path": None}, "it names no base; give .*--model.base"),
        ({"base_model_name_or_path": "/none/of/this"}, "its base /none/of/this is not here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"use_qalora": True}, "use_qalora is True, which is not read"),
        ({"something_new": [1]}, r"something_new is \[1\], which is not read"),
        ({"r": 2}, r"lora_A.weight is \[4, 32\], but rank 2 and the base .* make \[2, 32\]"),
        ({"r": "8"}, "r is '8', which is not read"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "alpha_pattern is .*, which is not read"),
        ({"use_dora": True}, "lora_ has A, B, wanted A, B, magnitude_vector"),
    ]
    for number, (changed, expected) in enumerate(fields):
        cases.append((change(peft, tmp_path / f"c{number}", "adapter_config.json", **changed), [named], expected))
    for number, (changed, expected) in enumerate([
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "id2label must give each output 0, 1, ... a name of its own"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must give"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking', which no task here has"),
        ({"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}}, "classifier.out_proj.* is \\[3"),
        ({"architectures": None}, "architectures is None, without a head"),
    ]):  # fmt: skip
        cases.append((change(theirs, tmp_path / f"d{number}", "config.json", **changed), [], expected))
    source = fasta(tmp_path / "in.fasta")
    for folder, words, expected in cases:
        with pytest.raises(EsmNeuronError, match=expected) as caught:
            predict(str(folder), source, tmp_path / "out.csv", settings=words)
        assert "\n" not in str(caught.value) and not (tmp_path / "out.csv").exists()


def test_classes_without_names_are_called_as_by_transformers_or_by_the_user(tmp_path: Path) -> None:
    moved(EsmForSequenceClassification(small())).save_pretrained(tmp_path / "theirs")
    source = fasta(tmp_path / "in.fasta", ["a", "b", "b"])
    predict(str(tmp_path / "theirs"), source, tmp_path / "out.csv")
    assert {"p_LABEL_0", "p_LABEL_1"} < set(pd.read_csv(tmp_path / "out.csv").columns)
    with pytest.raises(EsmNeuronError, match=r"does not name its 2 classes; .*--task.labels '\[A, B\]'"):
        evaluate(tmp_path / "theirs", source, None)
    assert evaluate(tmp_path / "theirs", source, None, overrides=["--task.labels=[a, b]"])["n"] == 3
    multi = ["--task.name=multi_label", "--task.labels=[a, b]"]
    assert "subset_accuracy" in evaluate(tmp_path / "theirs", source, None, overrides=multi)


def test_a_run_folder_is_no_start_but_its_export_is(toy: Toy, tmp_path: Path) -> None:
    cfg = toy(loop={"max_steps": 1})
    run.train(cfg, str)
    with pytest.raises(EsmNeuronError, match="is the output folder of a training run; run: esm-neuron export --model"):
        run.train(toy("again", model={"name": cfg.output, "init": "pretrained"}), str)
    with pytest.raises(EsmNeuronError, match="is the adapter of a training run; name the run"):
        find_trained(f"{cfg.output}/adapter", None, (), "predict")
    export(cfg.output, tmp_path / "exported")
    run.train(
        toy("again", model={"name": str(tmp_path / "exported"), "init": "pretrained"}, loop={"max_steps": 1}), str
    )
    temperature = read_calibration(Path(cfg.output) / "adapter", 2).temperature
    assert temperature != 1
    assert equal(ours(tmp_path / "exported") * temperature, ours(Path(cfg.output)))  # it is in the exported head


def test_names_of_layers_that_would_be_compared_forever_are_refused(tmp_path: Path) -> None:
    said = {"peft_type": "LORA", "base_model_name_or_path": "mini", "rank_pattern": {"a?" * 30 + "a" * 30: 4}}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="rank_pattern is .* which is not read"):
        read_adapter_folder(tmp_path)


def test_an_adapter_with_a_head_of_no_dimension_is_refused_in_a_line(tmp_path: Path) -> None:
    said = {"peft_type": "LORA", "base_model_name_or_path": "mini", "task_type": "SEQ_CLS"}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(said))
    save_file({"base_model.model.classifier.out_proj.weight": torch.zeros(())}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(EsmNeuronError):
        predict(str(tmp_path), fasta(tmp_path / "in.fasta"), tmp_path / "out.parquet")
