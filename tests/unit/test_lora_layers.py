"""The fused LoRA layer against PEFT's own, and what is left to PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import pytest
import torch
from helpers.packs import Row, build, lay, proteins
from helpers.runs import losses as losses_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import EsmForMaskedLM

from esm_neuron.config import AdapterConfig, TrainConfig
from esm_neuron.models import lora as low_rank
from esm_neuron.models.esm2 import FrozenLayerNorm, freeze_norms, parameter_count
from esm_neuron.models.lora import FusedLoraLinear, JoinedQkv, fuse_lora, join_qkv
from esm_neuron.training import run

ROWS = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))


def layers(dropout: float = 0.0, bias: bool = True, **options: bool) -> tuple[PeftModel, PeftModel]:
    """PEFT's own and ours with the same weights, none of them zero; two linears, of which the second is wider."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 8, bias=bias), nn.Linear(8, 20, bias=bias))
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["0", "1"], lora_dropout=dropout, **options)
    plain = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    fused = deepcopy(plain)
    fuse_lora(fused)
    return plain, fused


def near(found: Tensor, expected: Tensor) -> bool:
    """Equal to rounding, as a share of the largest."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def answered(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of a loss with unlike weights."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    (out * torch.linspace(-1, 1, out.shape[-1])).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None and len(gradients) == 4
    return {"out": out.detach(), "x": x.grad, **gradients}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a call of the fused product."""
    found: list[int] = []
    apply = low_rank._LowRank.apply
    monkeypatch.setattr(low_rank._LowRank, "apply", lambda *given: found.append(1) or apply(*given))
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_peft(calls: list[int], bias: bool) -> None:
    plain, fused = layers(bias=bias)
    expected, found = answered(plain, ROWS), answered(fused, ROWS)
    assert len(calls) == 2
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert near(found[name], value), name


def test_under_autocast_it_is_as_near_to_float32_as_peft(calls: list[int]) -> None:
    plain, fused = layers()
    exact = answered(plain, ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, found = answered(plain, ROWS), answered(fused, ROWS)
    assert len(calls) == 2
    assert found["out"].dtype == torch.bfloat16
    for name, value in exact.items():
        assert found[name].dtype == rounded[name].dtype
        error, of_peft = ((each[name].float() - value).norm() / value.norm() for each in (found, rounded))
        assert 0 < error < max(2 * float(of_peft), 0.01), name


def test_dropout_is_fused_and_what_is_not_plain_goes_the_way_of_peft(calls: list[int]) -> None:
    plain, fused = layers(dropout=0.5)
    for model in (plain, fused):
        torch.manual_seed(3)
        model.dropped = answered(model, ROWS)
        model.eval()
    assert len(calls) == 2 and all(near(fused.dropped[name], value) for name, value in plain.dropped.items())
    assert not near(fused(ROWS), fused.dropped["out"]), "there is no dropout in evaluation"
    assert near(fused(ROWS), plain(ROWS))
    calls.clear()
    with fused.disable_adapter(), plain.disable_adapter():
        assert torch.equal(fused(ROWS), plain(ROWS))
    assert calls == []
    before = fused(ROWS)
    fused.merge_adapter()
    calls.clear()
    assert near(fused(ROWS), before) and calls == []
    dora, also = layers(use_dora=True)
    assert torch.equal(dora(ROWS), also(ROWS)) and calls == []


def test_a_linear_that_is_trained_itself_goes_the_way_of_peft(calls: list[int]) -> None:
    _, fused = layers()
    fused.requires_grad_(True)
    fused(ROWS).sum().backward()
    assert calls == []


def test_runs_use_it_and_leave_plain_adapters(
    toy: Callable[..., TrainConfig], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = toy("fused", loop={"max_steps": 4})
    losses = _losses(cfg)
    assert len(calls) > 100
    calls.clear()
    monkeypatch.setattr("esm_neuron.models.lora.fuse_lora", lambda model: None)
    assert _losses(toy("plain", loop={"max_steps": 4})) == pytest.approx(losses, rel=1e-5)
    assert calls == []


def _losses(cfg: TrainConfig) -> list[float]:
    run.train(cfg, str)
    return losses_of(cfg)


def test_quantized_linears_keep_their_class() -> None:
    class Special(nn.Linear):
        """As bitsandbytes' are."""

    model = get_peft_model(nn.Sequential(Special(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0", "1"]))
    fuse_lora(model)
    kinds = [type(model.get_submodule(f"base_model.model.{place}")) is FusedLoraLinear for place in "01"]
    assert kinds == [False, True]


def encoders(dropout: float = 0.0) -> tuple[PeftModel, PeftModel]:
    """The tiny model with PEFT's own layers, and with all that a device that compiles gets; unlike adapters."""
    lora = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=list(AdapterConfig().targets))
    plain = get_peft_model(build("masked_lm", "masked"), lora)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    joined = deepcopy(plain)
    fuse_lora(joined)
    freeze_norms(joined)
    join_qkv(joined)
    return plain, joined


def learnt(model: nn.Module, dtype: torch.dtype, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Logits and every gradient over packs with several segments and filler."""
    model.zero_grad()
    packs = lay(proteins(masked=True), rows, 128)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(**packs).logits.float()
    (logits * torch.linspace(-1, 1, logits.shape[-1])).square().sum().backward()
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("rows", [[(0, 1, 2, 3)], [(0, 1, 2), (3, 4)]], ids=["a pack", "two"])
def test_joined_queries_keys_values_and_frozen_norms_give_the_same(rows: Sequence[Row]) -> None:
    plain, joined = encoders()
    kinds = {type(module) for module in joined.modules()}
    assert {JoinedQkv, FrozenLayerNorm, FusedLoraLinear} <= kinds and nn.LayerNorm not in kinds
    assert parameter_count(joined) == parameter_count(plain)
    expected, found = learnt(plain, torch.float32, rows), learnt(joined, torch.float32, rows)
    assert found.keys() == expected.keys() and len(found) > 24
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) < 2e-5, name
    rounded, also = learnt(plain, torch.bfloat16, rows), learnt(joined, torch.bfloat16, rows)
    for name, value in expected.items():
        error, of_peft = (float((each[name] - value).norm() / value.norm()) for each in (also, rounded))
        assert 0 < error < max(2 * of_peft, 0.01), name


def loss_of(logits: Tensor) -> Tensor:
    return (logits * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).square().sum()


def gradients_of_transformers(adapted: PeftModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every gradient of Hugging Face's own model under PEFT, one protein at a time; bfloat16 by autocast."""
    config = deepcopy(adapted.get_base_model().config)
    config._attn_implementation = "eager"
    lora = deepcopy(adapted.peft_config["default"])
    theirs = get_peft_model(EsmForMaskedLM(config).eval(), lora)
    lacking, unknown = theirs.load_state_dict(adapted.state_dict(), strict=False)
    assert not unknown and all("inv_freq" in name for name in lacking)
    theirs.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for protein in proteins(masked=True)[:4]:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            logits = theirs(input_ids=protein[None], attention_mask=torch.ones_like(protein[None])).logits
        loss_of(logits if dtype == torch.float64 else logits.float()).backward()
    return {name: p.grad.double() for name, p in theirs.named_parameters() if p.grad is not None}


def gradients_of_packs(joined: PeftModel, dtype: torch.dtype) -> dict[str, Tensor]:
    packs = lay(proteins(masked=True), [(0, 1, 2, 3)], 128)
    joined.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        logits = joined(**packs).logits.float()
    loss_of(logits[packs["segment_ids"] >= 0]).backward()
    return {name: p.grad for name, p in joined.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_are_as_near_to_those_in_float64_as_hugging_faces_own(dtype: torch.dtype) -> None:
    ours, theirs = [], []
    for seed in range(4):  # how much rounding matters depends on the weights
        torch.manual_seed(seed)
        plain, joined = encoders()
        exact = gradients_of_transformers(plain, torch.float64)
        both = gradients_of_packs(joined, dtype), gradients_of_transformers(plain, dtype)
        assert len(exact) == 24
        for found, errors in zip(both, (ours, theirs), strict=True):
            assert found.keys() == exact.keys()
            errors += [float((found[name].double() - value).norm() / value.norm()) for name, value in exact.items()]
    assert 0 < sum(ours) < 1.5 * sum(theirs)


def test_with_dropout_or_a_trained_linear_the_three_stay_apart() -> None:
    assert not any(isinstance(module, JoinedQkv) for module in encoders(dropout=0.1)[1].modules())
    model = build("masked_lm", "masked")
    join_qkv(model)
    freeze_norms(model)
    assert not any(isinstance(module, JoinedQkv | FrozenLayerNorm) for module in model.modules())
