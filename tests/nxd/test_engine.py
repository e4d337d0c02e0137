"""Tensor parallelism, data parallelism, ZeRO-1, head padding, LoRA: the real engine against one plain CPU process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Case = tuple[str, str, dict[str, Any]]
World = Callable[[dict[int, list[Case]], int], dict[str, Path]]

STEP_1 = 1e-5
"""Largest difference of logits, loss and gradients in step 1, as a share of the tensor's largest value."""
STEP_20 = 1e-3
"""The same of weights, moments and norms after 20 steps."""
GRADIENT_FLOOR = 1e-4
"""Gradients below this share of the largest gradient are compared with it: a key's bias has none but rounding."""


def _parity(name: str, tp: int, **settings: Any) -> Case:
    backend = "neuron" if tp else "cpu"
    chosen = {key.replace("__", "."): value for key, value in settings.items()}
    return name, "parity", {"backend": backend, "set": {"parallel.tp": max(tp, 1), **chosen}}


MLM, FULL, PLAIN = {"task__name": "masked_lm"}, {"adapter__kind": "none"}, {"parallel__zero1": False}
PADDED = {"parallel__pad_heads": True}
STEPS = {"optim.schedule": "constant", "optim.warmup_steps": 0}
SECOND_HALF = {**STEPS, "parallel.tp": 1, "loop.max_steps": 10}

WORLDS: dict[int, list[Case]] = {
    1: [
        _parity("cls", 0),
        _parity("mlm", 0, **MLM),
        _parity("full", 0, **FULL),
        ("whole run", "resume", {"backend": "cpu", "set": {**STEPS, "loop.max_steps": 10}}),
        ("plain", "load_plain", {"adapter": "{root}/2/adapter/adapter"}),
        ("650M", "write_650m", {}),
        ("signatures", "signatures", {}),
        ("unlisted", "call_unlisted", {}),
    ],
    2: [
        _parity("cls tp2", 2, **PLAIN),
        _parity("cls tp2 zero1", 2),
        _parity("mlm tp2 zero1", 2, **MLM),
        _parity("full tp2", 2, **FULL, **PLAIN),
        _parity("cls tp1 dp2 zero1", 1),
        _parity("cls tp2 recomputed", 2, model__gradient_checkpointing=True),
        _parity("full tp2 bf16", 2, **FULL, loop__precision="bf16"),
        _parity("cls tp2 bf16", 2, loop__precision="bf16"),
        ("first half", "resume", {"backend": "neuron", "set": {**STEPS, "parallel.tp": 2, "loop.max_steps": 6}}),
        ("second half", "resume", {"backend": "neuron", "set": SECOND_HALF, "source": "{root}/2/first half"}),
        ("adapter", "export", {"backend": "neuron", "set": {"parallel.tp": 2}}),
    ],
    4: [
        _parity("cls tp4", 4, **PLAIN),
        ("memory", "load_650m", {"backend": "neuron", "set": {"parallel.tp": 4}, "model": "{root}/1/650M/model"}),
        _parity("cls tp4 zero1", 4),
        _parity("cls tp2 dp2", 2, **PLAIN),
        _parity("cls tp2 dp2 zero1", 2),
        _parity("mlm tp2 dp2 zero1", 2, **MLM),
        _parity("full tp2 dp2 zero1", 2, **FULL),
        (
            "sharded",
            "load_sharded",
            {"backend": "neuron", "set": {"parallel.tp": 4}, "adapter": "{root}/2/adapter/adapter"},
        ),
    ],
    8: [
        _parity("cls tp8 padded", 8, **PADDED, **PLAIN),
        _parity("cls tp8 padded zero1", 8, **PADDED),
        _parity("mlm tp8 padded zero1", 8, **PADDED, **MLM),
        _parity("cls tp4 dp2 zero1", 4),
        ("tp8", "refuse", {"backend": "neuron", "set": {"parallel.tp": 8}}),
    ],
}

EXACT = [
    (world, name)
    for world, cases in WORLDS.items()
    for name, function, _ in cases
    if world > 1 and function == "parity" and "bf16" not in name
]


def difference(got: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Largest difference as a share of the expected tensor's largest value, or of `least` where that is larger."""
    scale = max(float(expected.abs().max()), least) or 1.0
    return float((got - expected).abs().max()) / scale


@pytest.mark.parametrize("size,name", EXACT)
def test_equals_one_plain_process(
    size: int,
    name: str,
    world: World,
    tensors: Callable[[Path], dict[str, Tensor]],
) -> None:
    expected = tensors(world(WORLDS, 1)[name.split()[0]])
    got = tensors(world(WORLDS, size)[name])
    assert {key: value.shape for key, value in got.items()} == {key: value.shape for key, value in expected.items()}
    largest = max(float(value.abs().max()) for key, value in expected.items() if key.startswith("gradient/"))
    for key, value in expected.items():
        kind = key.split("/")[0]
        allowed = STEP_1 if kind in ("logits", "loss", "gradient") else STEP_20
        least = GRADIENT_FLOOR * largest if kind == "gradient" else 0.0
        assert difference(got[key], value, least) <= allowed, key


def test_one_program_a_pass_and_one_an_update_on_xla(
    torchrun: Callable[..., Any], world: World, tensors: Callable[[Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    """NxD layers and ZeRO-1 traced lazily at tp 1: nothing is compiled after step 1, not even for learning rate 0."""
    ended = torchrun(1, [{"run": "lazy", "with": {"output": str(tmp_path), "backend": "neuron"}}], lazy=True)
    assert ended.code == 0, ended.output[-4000:]
    expected, got = tensors(world(WORLDS, 1)["cls"]), tensors(tmp_path)
    assert difference(got["losses"], expected["losses"]) <= STEP_20
    before_updates = got["programs"].tolist()
    assert len(before_updates) == 20
    assert before_updates[1] == before_updates[0] + 1
    assert set(before_updates[1:]) == {before_updates[1]}


def test_the_reference_clips_and_moves(world: World, tensors: Callable[[Path], dict[str, Tensor]]) -> None:
    """Parity would prove little if nothing were clipped or nothing were learnt."""
    reference = tensors(world(WORLDS, 1)["cls"])
    assert (reference["norms"] > 0.5).any()
    assert reference["losses"][-1] < reference["losses"][0]
    assert all(value.any() for key, value in reference.items() if key.startswith("gradient/"))


def test_bf16_keeps_float32_masters(world: World, tensors: Callable[[Path], dict[str, Tensor]]) -> None:
    """Full fine-tuning: the saved weights are finer than bf16, and the losses go where those of float32 go."""
    expected, got = tensors(world(WORLDS, 1)["full"]), tensors(world(WORLDS, 2)["full tp2 bf16"])
    key = "weight/esm.encoder.layer.0.intermediate.dense.weight"
    assert got[key].dtype == torch.float32
    assert (got[key].bfloat16().float() != got[key]).float().mean() > 0.9
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=0.02, atol=0.02)


def test_bf16_with_lora_trains_float32_matrices(world: World, tensors: Callable[[Path], dict[str, Tensor]]) -> None:
    expected, got = tensors(world(WORLDS, 1)["cls"]), tensors(world(WORLDS, 2)["cls tp2 bf16"])
    assert all(value.dtype == torch.float32 for key, value in got.items() if key.startswith("weight/"))
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=0.02, atol=0.02)


def test_a_checkpoint_goes_on_at_another_tp_and_dp(world: World, tensors: Callable[[Path], dict[str, Tensor]]) -> None:
    """Saved at tp2 x dp1 with ZeRO-1 after 6 steps, resumed at tp1 x dp2: the next losses are those of one run."""
    expected, got = tensors(world(WORLDS, 1)["whole run"]), tensors(world(WORLDS, 2)["second half"])
    assert int(got["begin"]) == 6 and int(expected["begin"]) == 0
    assert difference(got["losses"], expected["losses"][6:]) <= STEP_1
    assert difference(got["norms"], expected["norms"][6:]) <= STEP_20


def test_an_adapter_written_at_tp2_loads_in_plain_peft_and_at_tp4(
    world: World, tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    trained = tensors(world(WORLDS, 2)["adapter"])["logits"]
    untrained = tensors(world(WORLDS, 1)["cls"])["logits"]
    assert difference(untrained, trained) > 1e-2
    assert difference(tensors(world(WORLDS, 1)["plain"])["logits"], trained) <= STEP_1
    assert difference(tensors(world(WORLDS, 4)["sharded"])["logits"], trained) <= STEP_1


def test_the_committed_signatures_are_the_real_ones(world: World) -> None:
    """Rewrites contract.json when NxD or our calls have changed, and fails so that the change is looked at."""
    written = (world(WORLDS, 1)["signatures"] / "contract.json").read_text(encoding="utf-8")
    committed = Path(__file__).resolve().parent / "contract.json"
    before = committed.read_text(encoding="utf-8") if committed.exists() else "{}"
    if written != before:
        committed.write_text(written, encoding="utf-8")
    assert written == before, "contract.json was rewritten: look at the change and commit it"


def test_stand_ins_refuse_what_they_do_not_serve(world: World) -> None:
    vendor, collectives = "tests/nxd/standins/vendor.py lists no", "tests/nxd/standins/collectives.py does not serve it"
    assert (world(WORLDS, 1)["unlisted"] / "message.txt").read_text(encoding="utf-8").splitlines() == [
        f"torch_neuronx.xla_impl.compile_graph was called, and {vendor} behaviour for it",
        f"torch_xla.core.xla_model.all_to_all was called, and {collectives}",
        f"torch_xla.runtime.process_index was called, and {collectives}",
    ]


def test_a_rank_never_holds_more_than_its_slice_and_a_layer(
    world: World, tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    """Building the 650M shape at tp4 from safetensors: anonymous memory over that after the imports."""
    ranks = tensors(world(WORLDS, 4)["memory"])["peak_held_layer"]
    assert ranks.shape == (4, 3)
    for peak, held, layer in ranks.tolist():
        assert 600e6 < held < 700e6 and layer == 4 * (12 * 1280**2 + 13 * 1280)
        assert peak <= held + layer


def test_heads_that_tp_does_not_divide(world: World) -> None:
    message = (world(WORLDS, 8)["tp8"] / "message.txt").read_text(encoding="utf-8")
    assert message == "tp=8 does not divide 4 attention heads of tiny; use tp=1, 2 or 4, or parallel.pad_heads=true"


def test_a_rank_that_dies_ends_the_others_and_nothing_is_saved(torchrun: Callable[..., Any], tmp_path: Path) -> None:
    ended = torchrun(2, [{"run": "die", "with": {"output": str(tmp_path), "backend": "neuron"}}])
    assert ended.code != 0
    assert "exitcode  : 13" in ended.output
    assert not (tmp_path / "checkpoints").exists()
