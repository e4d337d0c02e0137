"""How large the graphs of a training step are, counted in the HLO that torch_xla would compile; nothing is run.

Widths do not change it, so the model is narrow; a block's share is the difference between two depths.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esm_neuron.backends.base import Backend, trainable
from esm_neuron.models.shapes import EsmShape, esm_config
from esm_neuron.training.evaluation import on_device
from helpers.device_run import Run, configuration

RANK = 16
DEEP = 33
"""Blocks of the 650M."""


@dataclass(frozen=True)
class GraphSize:
    """Of a pass of DEEP blocks, extrapolated; the rest of three blocks."""

    instructions: int
    rank_dots: int
    """float32 products with a dimension of RANK."""
    gathers: int
    update: list[int]
    """Instructions of an update at two depths."""


opened: dict[str, Backend] = {}
"""Backends of this process by name: a process group is joined once."""


def traced(folder: Path, blocks: int, name: str, **values: Any) -> tuple[str, str]:
    """Return the HLO of an update and of one pass, forward and backward, of a model of so many blocks on a backend."""
    shape = folder / f"shape{blocks}"
    esm_config(EsmShape(layers=blocks, hidden=160, heads=20, intermediate=640)).save_pretrained(shape)
    chosen = {"model.name": str(shape), "adapter.r": RANK, "adapter.alpha": 2 * RANK, "loop.precision": "bf16"}
    run = Run.start(configuration(str(folder), backend=name, set={**chosen, **values}), opened.get(name))
    opened[name] = run.backend
    batch = next(iter(on_device(run.trainer.train_loader.load(0).batches[:1], run.backend)))
    run.backend.sync()
    run.model.train()
    from torch_xla import _XLAC

    results = run.trainer._update()
    state = [tensor for _, tensor in run.trainer._state()]
    changed = [t for t, change in zip(state, _XLAC._check_tensor_need_materialization(state), strict=True) if change]
    update: str = _XLAC._get_xla_tensors_hlo([*results, *changed])
    run.backend.sync()
    run.trainer._pass(batch)
    hlo: str = _XLAC._get_xla_tensors_hlo([run.trainer._totals, *(p.grad for p in trainable(run.model))])
    return update, hlo


def graph_size(folder: Path, name: str, **values: Any) -> GraphSize:
    """Trace two depths on the backend `name`; `values` are settings by dotted name."""
    (*updates, few, more) = [text for pair in zip(*(traced(folder, n, name, **values) for n in (2, 3)), strict=True)
                             for text in pair]  # fmt: skip
    *update, small, large = (sum(" = " in line for line in text.splitlines()) for text in (*updates, few, more))
    dots = [line for line in more.splitlines() if " dot(" in line]
    assert len(dots) > 60, "the backward pass is there"
    wide = [line for line in dots if re.search(rf"f32\[(\d+,)*{RANK}(,\d+)*\]", line)]
    gathers = len(re.findall(r" gather\(", more))
    return GraphSize(small + (DEEP - 2) * (large - small), len(wide), gathers, update)


AGAIN = {"model.gradient_checkpointing": True}


def counted(folder: Path, name: str) -> dict[str, dict[str, int]]:
    """Return the sizes without and with recomputation."""
    return {"plain": asdict(graph_size(folder, name)), "recomputed": asdict(graph_size(folder, name, **AGAIN))}


BUDGET = {"plain": 16_500, "recomputed": 23_500}
"""Most instructions of a pass of the 650M, LoRA of rank 16 on six linears, in bf16."""
UPDATE = 200
"""Most of an update, at any depth."""


def check(found: dict[str, dict[str, int]]) -> None:
    """Fail where a graph is larger than its budget, has a float32 product of LoRA, or looks something up."""
    for name, most in BUDGET.items():
        size = found[name]
        assert most // 2 < size["instructions"] <= most, found
        assert size["rank_dots"] == 0, found
        assert size["gathers"] == 2, found  # of the embedding and of the rotary table
        few, more = size["update"]
        assert UPDATE // 2 < few == more <= UPDATE, found
