"""Whether the head that a folder holds is the one that a task wants, and in which order its classes are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from esm_neuron.compat import EsmConfig, PreTrainedModel
from esm_neuron.models.hf_folder import some
from esm_neuron.models.weights import HEAD, Changed, WeightSource

PER_CLASS = re.compile(r"(\w+_)?classifier\.(out_proj\.)?(weight|bias)")
"""Those with a row for each class."""


def with_head(
    source: WeightSource,
    found: EsmConfig,
    model: PreTrainedModel,
    head: tuple[str, ...],
    start: Mapping[str, Tensor] | None = None,
) -> tuple[WeightSource, str]:
    """Return the weights as `model` can load them, and a line on the head that they hold ("" without one).

    `found` is the configuration of the source, `head` the names of the model's head. A head is taken over where it
    answers the same question: its parameters, its classes in any order, and the unit of its values. Otherwise it is
    hidden, so that a new one is drawn: taken by name and shape alone, it would answer with its classes swapped. A head
    to `start` from takes its place.
    """
    theirs = frozenset(filter(HEAD.fullmatch, source.keys()))
    if start:
        return Changed(source, theirs, start), ""
    if not theirs:
        return source, ""
    new = tuple(f"{part}." for part in head)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith(new)} if new else {}
    there, here = _question(found), _question(cast(EsmConfig, model.config))
    classes = there.pop("classes"), here.pop("classes")
    if wanted.keys() - theirs or not wanted:
        reason = f"{', '.join(sorted({key.partition('.')[0] for key in theirs}))} is of another task or pooling"
    elif sorted(classes[0]) != sorted(classes[1]):
        reason = f"its classes are {some(classes[0])}, the task's {some(classes[1])}"
    elif different := [name for name, value in there.items() if value != here[name]]:
        reason = f"its {different[0]} is {there[different[0]]}, the task's {here[different[0]]}"
    elif wrong := [name for name, shape in wanted.items() if source.shape(name) != shape]:
        reason = f"{wrong[0]} is {list(source.shape(wrong[0]))}, the task's {list(wanted[wrong[0]])}"
    else:
        order = tuple(classes[0].index(name) for name in classes[1])
        moved = order != tuple(range(len(order)))
        line = f"head taken over from {source.name}" + (", its classes in the task's order" if moved else "")
        rows = filter(PER_CLASS.fullmatch, wanted) if moved else ()
        return Changed(source, theirs - wanted.keys(), {key: source.read(key)[list(order)] for key in rows}), line
    return Changed(source, theirs), f"head of {source.name} not used: {reason}"


def _question(config: EsmConfig) -> dict[str, Any]:
    """Return what a head of this configuration answers."""
    labels: dict[Any, str] = config.id2label or {}
    classes = [str(labels[place]) for place in sorted(labels)]
    kind = config.problem_type or ("regression" if len(classes) == 1 else "single_label_classification")
    if kind == "regression":
        classes = ["value"] * len(classes)  # whatever it is called
    unit = [float(getattr(config, name, default)) for name, default in (("target_mean", 0.0), ("target_sd", 1.0))]
    return {"problem type": kind, "mean and sd": unit, "classes": classes}
