"""What a run is predicted to need is what its tensors take on the CPU; and the figures move as they must."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esm_neuron import cli
from esm_neuron.backends import create_backend
from esm_neuron.config import (
    AdapterConfig,
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TaskConfig,
    TrainConfig,
    settings,
)
from esm_neuron.models import cpu_attention
from esm_neuron.models.quantize import Nf4Linear
from esm_neuron.models.shapes import SHAPES
from esm_neuron.planning.memory import Memory, predict_memory
from esm_neuron.tasks import create_task
from esm_neuron.training.build import build_model
from esm_neuron.training.optim import parameter_groups

Toy = Callable[..., TrainConfig]

TOLERANCE = 0.06
"""Share of the measured peak by which the prediction may be off."""
GB = 10**9


def config(
    name: str = "tiny",
    kind: str = "lora",
    precision: str = "fp32",
    again: bool = False,
    task: str = "sequence_classification",
    pooling: str = "mean",
    **others: Any,
) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(name=name, init="random", gradient_checkpointing=again, pooling=pooling),
        task=TaskConfig(name=task, **({"target_mean": 0.0, "target_sd": 1.0} if task == "regression" else {})),
        data=DataConfig(pack_tokens=512, max_residues=510, max_segments=4),
        adapter=AdapterConfig(kind=kind),
        loop=LoopConfig(precision=precision, packs_per_device=2, packs_per_step=2),
        **others,
    )


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def see(self, *tensors: Any) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in self._seen:
                self._seen.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(*tree_leaves(result))
        return result


def measure(cfg: TrainConfig) -> tuple[int, int]:
    """Bytes of tensors between two steps, and at the peak of one."""
    backend, task = create_backend(cfg), create_task(cfg.task, ("A", "B"))
    model = build_model(cfg, task, backend).model
    optimizer = backend.optimizer(model, parameter_groups(model, cfg.optim), cfg.optim)
    rows, length, segments = cfg.loop.packs_per_device, cfg.data.pack_tokens, cfg.data.max_segments
    shape = (rows, length) if task.per_token else (rows, segments)
    labels = {"regression": torch.zeros(shape), "multi_label": torch.zeros(*shape, 2)}
    known = labels.get(cfg.task.name, torch.zeros(shape, dtype=torch.int64))
    batch = type("Batch", (), {"labels": known, "weights": torch.ones(shape)})
    places = torch.arange(length).expand(rows, length)
    each = length // segments
    packs = {"segment_ids": places // each, "positions": places % each, "max_segments": segments}
    live = Live()
    live.see(*model.parameters(), *(p.grad for p in model.parameters()), *scales(model))
    live.see(*(value for state in optimizer.state.values() for value in state.values()))
    held = live.now
    with live:
        with backend.autocast():
            loss, weight = task.loss(model(input_ids=torch.full((rows, length), 5), **packs).logits, batch)
        loss.backward()
        backend.step(model, optimizer, torch.stack((loss.detach(), weight)), 1.0)
    return held, live.most


def scales(model: torch.nn.Module) -> list[torch.Tensor]:
    """What quantized linears keep beside their integers, the levels they share left out."""
    states = [m._state for m in model.modules() if isinstance(m, Nf4Linear)]
    return [tensor for state in states for tensor in (state.absmax, state.state2.absmax)]


CASES = [
    config(),
    config(kind="none"),
    config(precision="bf16"),
    config(task="masked_lm"),
    config("esm2_t6_8M"),
    config("esm2_t6_8M", kind="head"),
    config("esm2_t6_8M", precision="bf16", again=True),
    config(kind="qlora"),
    config("esm2_t6_8M", kind="qlora", precision="bf16", again=True),
    config("esm2_t6_8M", kind="none", precision="bf16", task="masked_lm"),
    config(task="residue_classification"),
    config(task="regression", kind="none", pooling="attention"),
    config(task="multi_label", pooling="cls"),
]


@pytest.mark.parametrize(
    "cfg", CASES, ids=lambda c: f"{c.model.name}-{c.adapter.kind}-{c.loop.precision}-{c.task.name}"
)
def test_the_prediction_is_what_the_tensors_take(cfg: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "by_products", lambda dtype: False)
    held, most = measure(cfg)
    outputs = 1 if cfg.task.name == "regression" else 2
    predicted = predict_memory(cfg, SHAPES[cfg.model.name], outputs=outputs)
    assert predicted.state == pytest.approx(held, rel=0.01)
    assert predicted.total == pytest.approx(most, rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_by_products_takes_no_more(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, most = config("esm2_t6_8M", precision=precision), {}
    for products in (True, False):
        monkeypatch.setattr(cpu_attention, "by_products", lambda dtype, chosen=products: chosen)
        _, most[products] = measure(cfg)
    assert 0.8 * most[False] < most[True] <= most[False]


def of(name: str, **changes: Any) -> Memory:
    return predict_memory(config(name, **changes), SHAPES[name])


def test_known_sizes() -> None:
    """650M parameters; AdamW in float32 holds 16 bytes of each that is trained."""
    full = of("esm2_t33_650M", kind="none", task="masked_lm")
    assert full.state == pytest.approx(16 * SHAPES["esm2_t33_650M"].parameter_count(), rel=1e-3)
    assert of("esm2_t36_3B", kind="qlora", precision="bf16", again=True).total < 3 * GB
    lora = of("esm2_t33_650M", precision="bf16")
    assert lora.weights["bfloat16"] == pytest.approx(1.3 * GB, rel=0.02)
    assert lora.gradients == lora.adapters == lora.optimizer // 2


def test_recomputing_costs_an_input_a_block_and_one_block() -> None:
    cfg, shape = config("esm2_t33_650M", precision="bf16"), SHAPES["esm2_t33_650M"]
    kept, again = predict_memory(cfg, shape), predict_memory(cfg, shape, checkpointing=True)
    assert again.state == kept.state and again.activations < kept.activations / 8
    assert predict_memory(config("esm2_t33_650M", precision="bf16", again=True), shape) == again


def test_devices_share_the_model_and_the_optimizer() -> None:
    shape = SHAPES["esm2_t36_3B"]
    one = config("esm2_t36_3B", kind="none", precision="bf16", backend="neuron")
    eight = replace(one, parallel=ParallelConfig(tp=8))
    alone, cut = predict_memory(one, shape), predict_memory(eight, shape)
    assert sum(cut.weights.values()) == pytest.approx(sum(alone.weights.values()) / 8, rel=0.01)
    assert predict_memory(eight, shape, dp=4).optimizer == pytest.approx(cut.optimizer / 4, rel=1e-6)
    whole = predict_memory(replace(eight, parallel=ParallelConfig(tp=8, zero1=False)), shape, dp=4)
    assert whole.optimizer > predict_memory(eight, shape, dp=4).optimizer


def test_fsdp_shares_everything_that_stays() -> None:
    shape = SHAPES["esm2_t36_3B"]
    one = config("esm2_t36_3B", kind="none", precision="bf16", backend="cuda")
    alone = predict_memory(one, shape)
    shared = predict_memory(replace(one, parallel=ParallelConfig(fsdp=True)), shape, dp=8)
    assert shared.state == pytest.approx(alone.state / 8, rel=1e-6)
    assert shared.working > alone.working
    eight_bits = predict_memory(replace(one, optim=OptimConfig(kind="adamw8bit")), shape)
    assert eight_bits.optimizer == pytest.approx(alone.optimizer / 4, rel=0.02)


def test_plan_prints_it(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, path = toy(), tmp_path / "run.yaml"
    path.write_text(settings.dump(cfg))
    assert cli.main(["plan", "--json", "--config", str(path)]) == 0
    said = json.loads(capsys.readouterr().out)["memory"]
    expected = predict_memory(cfg, SHAPES["tiny"], outputs=2)
    assert said["optimizer"] == expected.optimizer and said["weights"] == expected.weights
    assert cli.main(["plan", "--config", str(path)]) == 0
    assert "memory of a device" in capsys.readouterr().out
