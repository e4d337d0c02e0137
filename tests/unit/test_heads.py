"""A head that a folder holds is taken over where it answers the task's question, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.finished import IDS, logits_of, same
from transformers import EsmConfig, EsmForSequenceClassification, EsmForTokenClassification

from esm_neuron.backends import create_backend
from esm_neuron.config import AdapterConfig, ModelConfig, TaskConfig, TrainConfig
from esm_neuron.models.shapes import SHAPES, esm_config
from esm_neuron.tasks import create_task
from esm_neuron.training.build import Built, build_model

CLASSES = ("cyto", "memb", "nucl")


@pytest.fixture
def foreign(tmp_path: Path) -> Any:
    """(class of transformers, labels) -> a model as another trainer leaves it, and its folder."""

    def write(kind: type, labels: tuple[str, ...], **more: Any) -> tuple[torch.nn.Module, Path]:
        config = EsmConfig.from_dict(
            esm_config(SHAPES["tiny"]).to_dict() | {"id2label": dict(enumerate(labels)), **more}
        )
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / "theirs")
        return model, tmp_path / "theirs"

    return write


def built(
    folder: Path, task: str = "sequence_classification", pooling: str = "cls", seed: int = 0, **more: Any
) -> Built:
    settings = {"labels": CLASSES} if "classification" in task or task == "multi_label" else more
    cfg = TrainConfig(
        seed=seed,
        model=ModelConfig(name=str(folder), pooling=pooling),
        task=TaskConfig(name=task, **settings),
        adapter=AdapterConfig(kind="none"),
    )
    return build_model(cfg, create_task(cfg.task, cfg.task.labels or ()), create_backend(cfg))


def test_a_head_with_the_same_classes_is_taken_over(foreign: Any) -> None:
    theirs, folder = foreign(EsmForSequenceClassification, CLASSES)
    ours = built(folder)
    assert ours.head == f"head taken over from {folder}" and not ours.report.drawn
    assert same(logits_of(ours.model), logits_of(theirs))


@pytest.mark.parametrize("kind", ["sequence_classification", "residue_classification"])
def test_classes_in_another_order_keep_their_meaning(foreign: Any, kind: str) -> None:
    auto = EsmForSequenceClassification if kind.startswith("sequence") else EsmForTokenClassification
    theirs, folder = foreign(auto, ("nucl", "cyto", "memb"))
    ours = built(folder, kind)
    assert ours.head == f"head taken over from {folder}, its classes in the task's order"
    assert same(logits_of(ours.model), logits_of(theirs)[..., [1, 2, 0]])


@pytest.mark.parametrize(
    ("labels", "task", "pooling", "said"),
    [
        (("LABEL_0", "LABEL_1", "b"), "sequence_classification", "cls", "its classes are LABEL_0, LABEL_1, b"),
        (("cyto", "memb"), "sequence_classification", "cls", "its classes are cyto, memb, the task's cyto, memb, nucl"),
        (CLASSES, "sequence_classification", "mean", "classifier is of another task or pooling"),
        (CLASSES, "residue_classification", "cls", "classifier is of another task or pooling"),
        (CLASSES, "multi_label", "cls", "its problem type is single_label_classification"),
        (CLASSES, "masked_lm", "cls", None),
    ],
)  # fmt: skip
def test_any_other_is_drawn_with_a_line(
    foreign: Any, labels: tuple[str, ...], task: str, pooling: str, said: str | None
) -> None:
    _, folder = foreign(EsmForSequenceClassification, labels)
    if said is None:  # a classifier has lost the head that this task needs, and no head is drawn for it
        with pytest.raises(Exception, match="lacks .* lm_head"):
            built(folder, task, pooling)
        return
    first, second = built(folder, task, pooling), built(folder, task, pooling, seed=1)
    assert first.head.startswith(f"head of {folder} not used: {said}")
    heads = [name for name in first.report.drawn if "contact_head" not in name]
    assert heads and all("classifier" in name for name in heads)
    assert not same(logits_of(first.model), logits_of(second.model)), "the head is drawn from the seed"


def test_a_regression_is_taken_over_in_its_own_unit_alone(tmp_path: Path, foreign: Any) -> None:
    from helpers.finished import finish

    run = finish(tmp_path / "run", "regression_mean", "none")
    scale = {"target_mean": 30.0, "target_sd": 2.0}
    again = built(run.out / "model", "regression", "mean", **scale)
    assert again.head.startswith("head taken over") and same(logits_of(again.model), run.logits)
    other = built(run.out / "model", "regression", "mean", **scale | {"target_sd": 3.0})
    assert "its mean and sd is [30.0, 2.0], the task's [30.0, 3.0]" in other.head
    assert logits_of(other.model).shape == (len(IDS), 1)
