"""Weights into a model: every name and shape agrees before anything is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from esm_neuron.errors import CheckpointError
from esm_neuron.parallel.slices import Shard
from esm_neuron.safetensors_folder import some
from esm_neuron.weights import Draw, WeightSource, canonical


@dataclass(frozen=True)
class LoadReport:
    """What `load_into` did with each name."""

    loaded: tuple[str, ...]
    """Parameters of the model filled from the source."""
    drawn: tuple[str, ...]
    """Parameters of the model that the source lacks, drawn anew."""
    ignored: tuple[str, ...]
    """Keys of the source that the model has no use for."""


@runtime_checkable
class Receiver(Protocol):
    """A module that keeps its weight in a form of its own."""

    def receive(self, weight: Tensor) -> None:
        """Take the float weight, of the shape that the meta parameter `weight` had."""
        ...


@dataclass(frozen=True)
class _Slot:
    """One tensor of the model and every place that holds it; several where it is tied."""

    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    tensor: Tensor

    def fill(self, value: Tensor) -> None:
        """Copy `value` in; a meta tensor is replaced, in all its places by one and the same."""
        if self.tensor.device.type != "meta":
            with torch.no_grad():
                self.tensor.copy_(value)
            return
        receiver = self.owners[0]
        if isinstance(receiver, Receiver) and self.names[0].endswith(".weight"):
            receiver.receive(value)
            return
        filled = value.to(self.tensor.dtype)
        if isinstance(self.tensor, nn.Parameter):
            filled = nn.Parameter(filled, requires_grad=self.tensor.requires_grad)
            filled.__dict__.update(self.tensor.__dict__)  # the marks of parallel layers, which gradient norms read
        for name, owner in zip(self.names, self.owners, strict=True):
            setattr(owner, name.rpartition(".")[2], filled)


_DERIVED = re.compile(r".*\.(rotary_embeddings\.inv_freq|embeddings\.position_ids)")
"""Buffers that the shape decides; a checkpoint's copy may have lost precision, so it is never read."""
_OPTIONAL = re.compile(r"esm\.(contact_head|pooler|embeddings\.position_embeddings)\.|lm_head\.|(\w+_)?classifier\.")
"""Parts that some ESM-2 checkpoints have and some models lack."""
_DRAWABLE = re.compile(r"esm\.contact_head\.")
"""Not used in fine-tuning, and left out of many checkpoints."""


def load_into(
    model: nn.Module,
    source: WeightSource,
    draw: Draw,
    new_ok: Callable[[str], bool],
    shard: Callable[[str, tuple[int, ...]], Shard | None] | None = None,
) -> LoadReport:
    """Fill every parameter and persistent buffer of `model`; nothing is read before all names and shapes agree.

    Args:
        model: a transformers ESM-2 on meta or on a device; what is on meta becomes real on the CPU, in its dtype.
        source: whole tensors, keys with or without `esm.`.
        draw: gives values to parameters that the source lacks; those are replicated, so their shape is the whole one.
        new_ok: whether the source may lack the parameter of this name: the head of a task.
        shard: (name, whole shape) -> this rank's part, or None for the whole.

    Raises:
        CheckpointError: a key is missing, unexpected or twice there, or a shape or a tied pair does not agree.
    """
    slots, available = list(_slots(model)), _canonical_keys(source)
    names = {canonical(name) for slot in slots for name in slot.names}
    _check_all_known(source, available, names)
    plan = [(slot, next((n for n in slot.names if canonical(n) in available), None)) for slot in slots]
    missing = [
        slot.names[0]
        for slot, found in plan
        if found is None and not new_ok(slot.names[0]) and not _DRAWABLE.match(canonical(slot.names[0]))
    ]
    if missing:
        raise CheckpointError(
            f"{source.name} lacks {len(missing)} of the model's parameters: {some(missing)}; "
            "use a checkpoint of this model"
        )
    parts = {found: _part(slot, found, source, available, shard) for slot, found in plan if found is not None}
    for slot, found in plan:
        if found is None:
            slot.fill(draw(slot.names[0], tuple(slot.tensor.shape)))
        else:
            slot.fill(_read(source, available[canonical(found)], parts[found]))
    _fill_derived(model)
    return LoadReport(
        loaded=tuple(found for _, found in plan if found is not None),
        drawn=tuple(slot.names[0] for slot, found in plan if found is None),
        ignored=tuple(sorted(key for name, key in available.items() if name not in names)),
    )


def _slots(model: nn.Module) -> Iterator[_Slot]:
    places: dict[int, list[tuple[str, nn.Module, Tensor]]] = {}
    for prefix, module in model.named_modules():
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for leaf, tensor in (module._parameters | buffers).items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if tensor is not None and not _DERIVED.fullmatch(canonical(name)):
                places.setdefault(id(tensor), []).append((name, module, tensor))
    for same in places.values():
        yield _Slot(tuple(p[0] for p in same), tuple(p[1] for p in same), same[0][2])


def _canonical_keys(source: WeightSource) -> dict[str, str]:
    keys: dict[str, str] = {}
    for key in sorted(source.keys()):
        if canonical(key) in keys:
            raise CheckpointError(f"{source.name} has both {keys[canonical(key)]} and {key}; keep one of them")
        keys[canonical(key)] = key
    return keys


def _check_all_known(source: WeightSource, available: dict[str, str], names: set[str]) -> None:
    def known(name: str) -> bool:
        part = _OPTIONAL.match(name)
        unused = part is not None and not any(n.startswith(part[0]) for n in names)
        return name in names or unused or _DERIVED.fullmatch(name) is not None

    unknown = [key for name, key in available.items() if not known(name)]
    if unknown:
        raise CheckpointError(
            f"{source.name} has {len(unknown)} tensors that the model does not: {some(unknown)}; "
            "use a checkpoint of this model"
        )


def _part(
    slot: _Slot,
    found: str,
    source: WeightSource,
    available: dict[str, str],
    shard: Callable[[str, tuple[int, ...]], Shard | None] | None,
) -> Shard | None:
    """The part of the tensor that belongs in `slot`, after its shape and its tied twins have been checked."""
    key = available[canonical(found)]
    whole = source.shape(key)
    part = shard(found, whole) if shard is not None else None
    shape = whole if part is None else part.shape
    if shape != tuple(slot.tensor.shape):
        raise CheckpointError(
            f"{source.name}: {key} is {list(whole)}, which gives {list(shape)}, but the model wants "
            f"{list(slot.tensor.shape)}; use a checkpoint of this model"
        )
    twins = {available[canonical(n)] for n in slot.names if canonical(n) in available} - {key}
    for twin in twins:
        if source.shape(twin) != whole or not torch.equal(source.read(twin), source.read(key)):
            raise CheckpointError(
                f"{source.name}: {key} and {twin} are one tensor in the model, but differ; untie the model"
            )
    return part


def _read(source: WeightSource, key: str, part: Shard | None) -> Tensor:
    tensor = source.read(key) if part is None else part.read(lambda index: source.read(key, index))
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{source.name}: {key} is {tensor.dtype}, no float; use a checkpoint that is not quantized"
        )
    return tensor


def _fill_derived(model: nn.Module) -> None:
    """Compute what `_DERIVED` names wherever the model is still on meta."""
    for prefix, module in model.named_modules():
        for leaf, buffer in list(module._buffers.items()):
            if buffer is None or buffer.device.type != "meta" or not _DERIVED.fullmatch(canonical(f"{prefix}.{leaf}")):
                continue
            count = buffer.shape[-1]
            if leaf == "position_ids":
                value = torch.arange(count).expand(buffer.shape)
            else:  # RoFormer, arXiv:2104.09864: 10000^(-2i/d), with d = 2 * count
                value = 1.0 / 10_000.0 ** (torch.arange(0, 2 * count, 2, dtype=torch.int64).float() / (2 * count))
            setattr(module, leaf, value)
