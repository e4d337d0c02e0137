"""What a run leaves behind answers as the trained model did: in plain transformers and PEFT, and in this package."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.finished import IDS, KINDS, LABELS, Run, finish, logits_of, same
from peft import (
    AutoPeftModel,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModel,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EsmForMaskedLM

from esm_neuron.backends import create_backend
from esm_neuron.config import LoopConfig, OptimConfig, ParallelConfig, TrainConfig
from esm_neuron.config.settings import dump
from esm_neuron.data.tokenizer import PAD
from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.files import LEDGER, sha256, write_text
from esm_neuron.inference.export import export
from esm_neuron.inference.load import build_trained, move_to, read_run
from esm_neuron.models.esm2 import PackedForPooledClassification
from esm_neuron.tasks.base import Task


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """(kind, adapter) -> a finished run, made once."""
    made: dict[tuple[str, str], Run] = {}

    def get(kind: str, adapter: str = "lora") -> Run:
        if (kind, adapter) not in made:
            made[kind, adapter] = finish(tmp_path_factory.mktemp(f"{kind}-{adapter}") / "out", kind, adapter)
        return made[kind, adapter]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_its_base_predicts_in_plain_peft(run: Callable[..., Run], kind: str) -> None:
    finished, (_, _, auto, cls) = run(kind), KINDS[kind]
    base = auto.from_pretrained(finished.out / "base")
    assert type(base) is cls
    assert not same(logits_of(base), finished.logits)
    assert same(logits_of(PeftModel.from_pretrained(base, finished.out / "adapter")), finished.logits)


AUTO = {"residues": AutoPeftModelForTokenClassification, "masked_lm": AutoPeftModel}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_finds_the_class_of_an_adapter_by_itself(run: Callable[..., Run], kind: str) -> None:
    finished, by_score = run(kind), kind.endswith("attention")
    auto = AutoPeftModel if by_score else AUTO.get(kind, AutoPeftModelForSequenceClassification)
    options = {} if kind == "masked_lm" else {"num_labels": finished.logits.shape[-1]}
    assert same(logits_of(auto.from_pretrained(finished.out / "adapter", **options)), finished.logits)


@pytest.mark.parametrize("field", [{"lora_alpha": 64}, {"use_rslora": True}, {"r": 2}])
def test_an_adapter_config_that_was_changed_is_refused(
    run: Callable[..., Run], tmp_path: Path, field: dict[str, Any]
) -> None:
    out = shutil.copytree(run("mean").out, tmp_path / "out")
    path = out / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    cfg, task = read_run(out)
    with pytest.raises(CheckpointError, match=f"{next(iter(field))} is .*, but config.yaml of the run gives"):
        build_trained(cfg, task, create_backend(cfg))


def test_a_pooled_folder_takes_what_trainers_give_it(run: Callable[..., Run]) -> None:
    finished = run("mean", "none")
    model = AutoModelForSequenceClassification.from_pretrained(finished.out / "model")
    mask, labels = (IDS != PAD).long(), torch.tensor([2, 0])
    found = model(input_ids=IDS, attention_mask=mask, labels=labels, return_dict=True, output_attentions=False)
    assert same(found.logits, finished.logits)
    assert float(found.loss) == pytest.approx(float(cross_entropy(finished.logits, labels)), rel=1e-5)
    loss, logits = model(IDS, attention_mask=mask, labels=labels, return_dict=False)
    assert torch.equal(loss, found.loss) and torch.equal(logits, found.logits)
    with pytest.raises(ValueError, match="takes no output_hidden_states"):
        model(IDS, output_hidden_states=True)
    with pytest.raises(ValueError, match="sequences of 1027 tokens, and this model takes 1026"):
        model(IDS.new_full((1, 1_027), 5))


@pytest.mark.parametrize(("kind", "adapter"), [*((kind, "lora") for kind in KINDS), ("mean", "head")])
def test_a_merged_export_predicts_in_plain_transformers(
    run: Callable[..., Run], tmp_path: Path, kind: str, adapter: str
) -> None:
    finished, (_, _, auto, cls) = run(kind, adapter), KINDS[kind]
    export(finished.out, tmp_path / "merged")
    check_plain_folder(tmp_path / "merged", auto, cls, finished)


@pytest.mark.parametrize(
    ("kind", "adapter"), [("cls", "none"), ("cls", "head"), ("mean", "none"), ("masked_lm", "none")]
)
def test_without_adapters_a_run_leaves_a_plain_model(run: Callable[..., Run], kind: str, adapter: str) -> None:
    finished, (_, _, auto, cls) = run(kind, adapter), KINDS[kind]
    left = sorted(path.name for path in finished.out.iterdir() if path.name != LEDGER)
    assert left == ["config.yaml", "model", "result.json"]
    check_plain_folder(finished.out / "model", auto, cls, finished)


def check_plain_folder(folder: Path, auto: type, cls: type, finished: Run) -> None:
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert type(model) is cls
    assert not report["unexpected_keys"]
    assert not report["missing_keys"], "transformers would say that they are newly initialized"
    assert same(logits_of(model), finished.logits)
    for dtype in (torch.bfloat16, torch.float16):
        half = logits_of(auto.from_pretrained(folder, dtype=dtype)).float()
        real = (IDS != PAD) if half.ndim == 3 else slice(None)
        assert float((half - finished.logits)[real].norm() / finished.logits[real].norm()) < 0.1
    assert model.config.architectures == [cls.__name__]
    assert model.dtype == torch.float32
    if cls is not EsmForMaskedLM and finished.task.labels:
        assert model.config.id2label == dict(enumerate(LABELS))
        assert model.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert AutoTokenizer.from_pretrained(folder)("MK<mask>")["input_ids"] == [0, 20, 15, 32, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["adapter", "merged"])
def test_the_model_card_loads_what_it_describes(
    run: Callable[..., Run], kind: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = run(kind)
    if folder == "merged":
        export(finished.out, tmp_path / "merged")
    monkeypatch.chdir(tmp_path / "merged" if folder == "merged" else finished.out / "adapter")
    card = Path("README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    if folder == "adapter" and KINDS[kind].cls is PackedForPooledClassification:
        assert not code and "esm-neuron export --model RUN" in card
        return
    names: dict[str, Any] = {}
    exec(code[0], names)  # as its reader would
    tokens = names["tokenizer"]("MKTAYIAKQRQISFVKSHFSRQ", return_tensors="pt")
    with torch.no_grad():
        expected = finished.built.model.eval()(**tokens).logits
    torch.testing.assert_close(names["logits"], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_run_is_built_again_with_its_weights(run: Callable[..., Run], kind: str, adapter: str) -> None:
    finished = run(kind, adapter)
    cfg, task = read_run(finished.out, "cpu")
    built = build_trained(cfg, task, create_backend(cfg))
    assert same(logits_of(built.model), finished.logits)
    weights = dict(built.model.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in finished.trained.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_what_peft_would_have_saved(run: Callable[..., Run], kind: str) -> None:
    finished = run(kind)
    expected = get_peft_model_state_dict(finished.built.model)
    saved = load_file(finished.out / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)


def test_an_adapter_names_its_base_and_its_sum(run: Callable[..., Run]) -> None:
    folder = run("cls").out
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    reference = json.loads((folder / "adapter" / "base_reference.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base") and reference["name"] == "tiny"
    assert config["r"], config["lora_alpha"] == (4, 8)
    assert config["inference_mode"] is True
    assert len(reference["sha256"]) == 64


def test_a_bfloat16_run_is_exported_in_float32(tmp_path: Path) -> None:
    finished = finish(tmp_path / "out", "cls", "lora", precision="bf16")
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    export(tmp_path / "out", tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    base = load_file(tmp_path / "out" / "base" / "model.safetensors")
    key = "esm.encoder.layer.0.attention.self.query"
    a, b = (finished.trained[f"base_model.model.{key}.lora_{x}.default.weight"] for x in "AB")
    torch.testing.assert_close(weights[f"{key}.weight"], base[f"{key}.weight"] + 8 / 4 * b @ a)


@pytest.fixture
def copied(run: Callable[..., Run], tmp_path: Path) -> tuple[TrainConfig, Task, Path]:
    """A finished run that may be spoilt: what builds it, and its adapter's folder."""
    out = tmp_path / "out"
    shutil.copytree(run("mean").out, out)
    cfg, task = read_run(out, "cpu")
    return cfg, task, out / "adapter"


def refusal(cfg: TrainConfig, task: Task) -> str:
    with pytest.raises(CheckpointError) as caught:
        build_trained(cfg, task, create_backend(cfg))
    return str(caught.value)


def test_a_run_may_be_moved(run: Callable[..., Run], copied: tuple[TrainConfig, Task, Path]) -> None:
    cfg, task, adapter = copied
    assert cfg.model.name == str(adapter.parent / "base")
    assert same(logits_of(build_trained(cfg, task, create_backend(cfg)).model), run("mean").logits)


def test_other_base_weights_are_refused(copied: tuple[TrainConfig, Task, Path]) -> None:
    cfg, task, adapter = copied
    weights = adapter.parent / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["esm.encoder.emb_layer_norm_after.weight"][0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    message = refusal(cfg, task)
    assert str(adapter) in message
    assert "was trained on" in message


def test_a_damaged_adapter_is_refused(copied: tuple[TrainConfig, Task, Path]) -> None:
    cfg, task, adapter = copied
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    save_file({**tensors, "unknown": torch.zeros(1)}, weights)
    assert "the first is unknown" in refusal(cfg, task)
    save_file({key: value for key, value in tensors.items() if key != first}, weights)
    assert f"{weights}: is not what training wrote" in refusal(cfg, task)  # by its sum
    reference = adapter / "base_reference.json"
    said = json.loads(reference.read_text())
    reference.write_text(json.dumps({**said, "adapter": sha256(weights)}))
    assert first.removesuffix(".weight") in refusal(cfg, task).replace(".default", "").replace(".modules_to_save", "")
    save_file({**tensors, first: torch.zeros(2, 2)}, weights)
    reference.write_text(json.dumps({**said, "adapter": sha256(weights)}))
    assert "1 parameters differ" in refusal(cfg, task)
    weights.write_bytes(weights.read_bytes()[:100])
    assert str(weights) in refusal(cfg, task)
    weights.unlink()
    assert str(weights) in refusal(cfg, task)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"name": 1}'])
def test_an_adapter_that_does_not_know_its_base_is_refused(
    copied: tuple[TrainConfig, Task, Path], content: str | None
) -> None:
    cfg, task, adapter = copied
    reference = adapter / "base_reference.json"
    if content is None:
        reference.unlink()
    else:
        reference.write_text(content)
    assert str(reference) in refusal(cfg, task)


def test_a_pretrained_base_is_named_and_not_copied(run: Callable[..., Run], tmp_path: Path) -> None:
    base = run("masked_lm", "none").out / "model"
    finished = finish(tmp_path / "out", "cls", "lora", base=str(base))
    assert not (tmp_path / "out" / "base").exists()
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    assert same(logits_of(PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter")), finished.logits)
    cfg, task = read_run(tmp_path / "out", "cpu")
    assert same(logits_of(build_trained(cfg, task, create_backend(cfg)).model), finished.logits)
    other = replace(cfg, model=replace(cfg.model, name=str(run("masked_lm").out / "base")))
    assert "give the weights it was trained on" in refusal(other, task)


def test_a_pooled_adapter_names_a_base_that_plain_transformers_refuses(run: Callable[..., Run], tmp_path: Path) -> None:
    finished = finish(tmp_path / "out", "mean", "lora", base=str(run("masked_lm", "none").out / "model"))
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    assert json.loads((tmp_path / "out" / "base" / "config.json").read_text())["model_type"] == "esm_neuron"
    with pytest.raises(OSError, match="no file named"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "base")
    cfg, task = read_run(tmp_path / "out", "cpu")
    assert same(logits_of(build_trained(cfg, task, create_backend(cfg)).model), finished.logits)


@pytest.mark.parametrize(("backend", "precision"), [("cpu", "fp32"), ("xla", "bf16")])
def test_a_run_on_another_device_leaves_behind_what_only_its_own_has(backend: Any, precision: str) -> None:
    loop = LoopConfig(precision="bf16", tf32=True, torch_compile=True, eval_packs_per_device=3)
    trained = TrainConfig(
        backend="cuda", loop=loop, parallel=ParallelConfig(fsdp=True), optim=OptimConfig(kind="adamw8bit", lr=1e-4)
    )
    found = move_to(backend, trained)
    assert (found.backend, found.parallel, found.optim.kind) == (backend, ParallelConfig(), "adamw")
    assert (found.loop.precision, found.loop.tf32, found.loop.torch_compile) == (precision, False, False)
    assert (found.loop.eval_packs_per_device, found.optim.lr, found.adapter) == (3, 1e-4, trained.adapter)


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config.yaml there"):
        read_run(tmp_path)
    write_text(tmp_path / "config.yaml", dump(TrainConfig()))
    with pytest.raises(ConfigError, match=r"no adapter and no model there"):
        read_run(tmp_path)


def test_a_run_without_its_result_is_not_exported(run: Callable[..., Run], tmp_path: Path) -> None:
    shutil.copytree(run("cls").out, tmp_path / "out")
    (tmp_path / "out" / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"has not finished"):
        export(tmp_path / "out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_export_overwrites_nothing(run: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"exists already"):
        export(run("cls").out, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["nan", "inf", "int32", "bool", "float8_e4m3fn"])
def test_an_adapter_of_other_values_is_refused(run: Callable[..., Run], tmp_path: Path, value: str) -> None:
    out = shutil.copytree(run("mean").out, tmp_path / "out")
    path = out / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if value in ("nan", "inf"):
        tensors[name][-1] = float(value)
    else:
        tensors[name] = tensors[name].to(getattr(torch, value))
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"adapter_model.safetensors: {re.escape(name)} (is torch|holds NaN)"):
        export(out, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
