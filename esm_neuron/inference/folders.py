"""Folders that another trainer wrote: what the head in them answers, as far as their files say.

transformers' Trainer leaves config.json and model.safetensors, as `esm-neuron export` does; PEFT leaves
adapter_config.json and adapter_model.safetensors. Read without torch, and before any other file is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from esm_neuron.config import EVERY_LAYER, ModelConfig, TaskConfig, require
from esm_neuron.errors import ConfigError
from esm_neuron.files import NUMBER, read_json
from esm_neuron.models.adapter_folder import is_adapter, tensor_shapes
from esm_neuron.models.shapes import base_of, find
from esm_neuron.tasks import TASKS, check_task, task_class, task_of_head

logger = logging.getLogger(__name__)

SEQUENCE, TOKEN = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
LANGUAGE = "AutoModelForMaskedLM"
_LAST_LAYER = re.compile(
    r"(?:(?P<pooling>mean|cls|attention|mean_termini)_(?:(?P<layers>concat|mix)_)?)?"
    r"(?P<kind>classifier|regressor)\.(?P<inner>out_proj\.)?weight"
)
"""The layer of a head with a row for each output: transformers' for sequences and for tokens, and this package's."""
POOLINGS = ("mean", "cls", "attention", "mean+termini")


@dataclass(frozen=True)
class Head:
    """What a head answers."""

    auto_class: str
    """The class of transformers that loads such a model."""
    problem_type: str | None = None
    """transformers' name for what it answers; None: not said."""
    outputs: int = 2
    labels: tuple[str, ...] | None = None
    """Names of the outputs in their order; None: not said."""
    model: Mapping[str, Any] = field(default_factory=lambda: {"pooling": "cls"})
    """Settings of `ModelConfig` that say what the head reads, and how."""
    mean: float = 0.0
    sd: float = 1.0


def find_head(model: ModelConfig) -> Head:
    """Return what the model in a folder answers. Raise ConfigError where it has no head that a task here has."""
    folder = Path(model.name).expanduser()
    if not is_adapter(folder):
        return _of_config(folder, _read_config(folder))
    home = find(base_of(model, folder)[1])  # None: on the hub, as a released ESM-2 without another head
    released: dict[str, Any] = {"architectures": ["EsmForMaskedLM"]}
    said = released if home is None else _read_config(home)
    for name, shape in tensor_shapes(folder).items():
        if shape and (last := _LAST_LAYER.fullmatch(name)):
            labels = _labels(home or folder, said) if said.get("id2label") is not None else ()
            regression = last["kind"] == "regressor" or shape[0] == 1
            reads = {
                "pooling": (last["pooling"] or "cls").replace("_", "+"),
                "read_layers": last["layers"] or "last",
                "linear_head": last["inner"] is None,
            }
            return Head(
                SEQUENCE if last["inner"] or last["pooling"] else TOKEN,
                said.get("problem_type") or ("regression" if regression else None),
                shape[0],
                labels if len(labels) == shape[0] else None,
                _reads(home or folder, {**said, **reads}),
                *_scale(home or folder, said),
            )
    return _of_config(home or folder, said)


def _read_config(folder: Path) -> dict[str, Any]:
    form = {"target_mean?": NUMBER, "target_sd?": NUMBER}
    cure = "give a folder that transformers' save_pretrained wrote"
    return dict(read_json(folder / "config.json", form, ConfigError, cure))


def _of_config(folder: Path, said: dict[str, Any]) -> Head:
    path, names = folder / "config.json", said.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if name == "PackedForPooledClassification" and said.get("model_type") == "esm_neuron":
        auto, model = SEQUENCE, _reads(folder, said)
    else:
        auto, model = f"AutoModel{str(name).removeprefix('Esm')}", {"pooling": "cls"}
    if auto not in (SEQUENCE, TOKEN, LANGUAGE):
        classes = ", ".join(each.replace("AutoModel", "Esm") for each in (SEQUENCE, TOKEN, LANGUAGE))
        raise ConfigError(f"{path}: architectures is {names!r}, without a head of a task; heads are known of {classes}")
    if auto == LANGUAGE:
        return Head(auto)
    labels = _labels(folder, said)
    kind = said.get("problem_type") or ("regression" if len(labels) == 1 else None)
    return Head(auto, kind, len(labels), labels, model, *_scale(folder, said))


def _reads(folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    """Return what a head of this package reads, as `PooledTask.configure` has written it."""
    layers, pooling = said.get("read_layers", "last"), said.get("pooling")
    for name, value, known in (("pooling", pooling, POOLINGS), ("read_layers", layers, ("last", *EVERY_LAYER))):
        require(value in known, f"{folder / 'config.json'}: {name} is {value!r}; export the folder again")
    return {
        "pooling": pooling,
        "layers": layers if layers in EVERY_LAYER else "all",
        "composition": said.get("composition") is True,
        "head": "linear" if said.get("linear_head") is True else None,
    }


def _labels(folder: Path, said: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the outputs; where config.json has none, those that transformers gives them."""
    found = said.get("id2label")
    found = {"0": "LABEL_0", "1": "LABEL_1"} if found is None else found
    places = {str(place) for place in range(len(found))} if isinstance(found, dict) else set()
    named = isinstance(found, dict) and found.keys() == places and all(isinstance(n, str | int) for n in found.values())
    names = tuple(str(found[str(place)]) for place in range(len(found))) if named else ()
    require(
        0 < len(names) == len(set(names)),
        f"{folder / 'config.json'}: id2label must give each output 0, 1, ... a name of its own; correct it",
    )
    return names


def _scale(folder: Path, said: dict[str, Any]) -> tuple[float, float]:
    """Return what predictions of a regression are added to and multiplied by, which transformers does not have."""
    found = (said.get("target_mean", 0.0), said.get("target_sd", 1.0))
    require(found[1] > 0, f"{folder / 'config.json'}: target_sd is {found[1]}; export the folder again")
    return found


def task_config(head: Head, given: TaskConfig, model: str, command: str) -> TaskConfig:
    """Return the task of a head, with what the user has given for what the folder does not say.

    Raise ConfigError where something is still missing, or what was given contradicts the folder.
    """
    changed = {f.name: getattr(given, f.name) for f in fields(given) if getattr(given, f.name) != f.default}
    name = task_of_head(head.auto_class, head.problem_type if head.auto_class == SEQUENCE else None)
    if head.auto_class == SEQUENCE and head.problem_type is None:
        name = task_of_head(SEQUENCE, "single_label_classification")
        own = [each for each in TASKS if task_class(each).auto_class == SEQUENCE]
        name = given.name if given.name in own else name
    require(name is not None, f"--model {model}: problem_type is {head.problem_type!r}, which no task here has")
    require(
        given.name in (name, TaskConfig.name), f"--task.name {given.name}: {model} has a head for {name}; leave it out"
    )
    found = TaskConfig(name=str(name))
    used = task_class(found.name).settings
    if "target_mean" in used:
        require(head.outputs == 1, f"--model {model}: it gives {head.outputs} values per protein, and only one is read")
        found = replace(found, target_mean=head.mean, target_sd=head.sd)
    if "labels" in used:
        found = replace(found, labels=given.labels or head.labels)
        _check_labels(found, head, given, model, command)
    task = replace(found, **{**changed, "name": found.name})
    check_task(task)
    return task


def _check_labels(found: TaskConfig, head: Head, given: TaskConfig, model: str, command: str) -> None:
    cure = f"name the classes in the order of the outputs: --task.labels '[{', '.join('ABC'[: head.outputs])}"
    cure += ", ...]'" if head.outputs > 3 else "]'"
    if found.labels is None:
        raise ConfigError(f"--model {model}: nothing here says what its {head.outputs} classes are called; {cure}")
    count = len(found.labels)
    require(count == head.outputs, f"--task.labels names {count} classes, and {model} has {head.outputs}; {cure}")
    if given.labels is None and found.labels == tuple(f"LABEL_{place}" for place in range(count)):
        what = f"--model {model}: its config.json does not name its {count} classes"
        require(command != "evaluate", f"{what}; {cure}")
        logger.warning("%s: they are called LABEL_0, ... as by transformers; %s", what, cure)
