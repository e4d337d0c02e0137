"""Tensor parallelism, data parallelism, ZeRO-1, head padding, LoRA: the real engine against one plain CPU process."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity
import parity_page
import pytest
import torch
import vendor_calls
from helpers.graph_size import check
from parity import EXACT, KINDS, PACKED, STEP_1, STEP_20, WORLDS, Case, difference, differences, floored
from safetensors.torch import load_file
from torch import Tensor

from esm_neuron.models.lora import saved_key
from esm_neuron.training import checkpoint

World = Callable[[dict[parity.World, list[Case]], parity.World], dict[str, Path]]


@pytest.mark.parametrize("kind,name", EXACT)
def test_equals_one_plain_process(
    kind: parity.World,
    name: str,
    world: World,
    tensors: Callable[[Path], dict[str, Tensor]],
) -> None:
    expected = tensors(world(WORLDS, 1)[name.split()[0]])
    found = differences(tensors(world(WORLDS, kind)[name]), expected)
    assert {kind: at for kind, at in found.items() if at[0] > KINDS[kind]} == {}


@pytest.mark.parametrize("kind", ["xla", "spmd", 1, 2])
def test_a_protein_in_a_pack_gets_what_it_gets_alone(
    kind: parity.World, world: World, tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    found = packed_against_alone(world(WORLDS, kind), tensors)
    assert {kind: at for kind, at in found.items() if at[0] > PACKED[kind]} == {}


def packed_against_alone(
    folders: dict[str, Path], tensors: Callable[[Path], dict[str, Tensor]]
) -> dict[str, tuple[float, str]]:
    """Largest differences by kind."""
    return differences(tensors(folders["packed"]), tensors(folders["alone"]))


def test_xla_runs_one_graph_per_pass_and_one_per_update(
    torchrun: Callable[..., Any], world: World, tensors: Callable[[Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    """NxD layers and ZeRO-1 traced lazily at tp 1: `compile` has made whatever a run and its evaluation need."""
    ended = torchrun("xla", [{"run": "lazy", "with": {"output": str(tmp_path), "backend": "neuron"}}])
    assert ended.code == 0, ended.output[-4000:]
    expected, got = tensors(world(WORLDS, 1)["cls"]), tensors(tmp_path)
    assert difference(got["losses"], expected["losses"]) <= STEP_20
    assert all(difference(value, expected[key]) <= STEP_20 for key, value in got.items() if key.startswith("metric/"))
    graphs = got["graphs"].tolist()
    assert len(graphs) == 22 and graphs[0] > 0
    assert set(graphs) == {graphs[0]}


@pytest.mark.parametrize("zero1", [True, False])
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_by_hash_gives_the_bits_of_tracing(
    torchrun: Callable[..., Any], tensors: Callable[[Path], dict[str, Tensor]], tmp_path: Path, kind: str, zero1: bool
) -> None:
    """Graphs run by their hash, NxD's layers, ZeRO-1 and their collectives among them: losses, weights and moments."""
    settings = {"adapter.kind": kind, "parallel.zero1": zero1, "loop.precision": "bf16", "model.dropout": 0.1}
    ended = torchrun(
        "xla", [{"run": "hashed", "with": {"output": str(tmp_path), "backend": "neuron", "set": settings}}]
    )
    assert ended.code == 0, ended.output[-4000:]
    assert "gives other bits" not in ended.output
    found = tensors(tmp_path)
    always = {name.partition("/")[2] for name in found if name.startswith("always/")}
    assert len(always) > 80
    for way in ("once", "compare"):
        assert [name for name in always if not torch.equal(found[f"always/{name}"], found[f"{way}/{name}"])] == []


def test_recomputed_blocks_have_their_gradients_on_xla(
    torchrun: Callable[..., Any], world: World, tensors: Callable[[Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    """torch_xla's own checkpointing under NxD's layers and LoRA: reentrant, it drops what no input asks for."""
    again = {"output": str(tmp_path), "backend": "neuron", "set": {"model.gradient_checkpointing": True}}
    ended = torchrun("xla", [{"run": "lazy", "with": again}])
    assert ended.code == 0, ended.output[-4000:]
    expected, got = tensors(world(WORLDS, 1)["cls"]), tensors(tmp_path)
    assert difference(got["losses"], expected["losses"]) <= STEP_20
    assert len(set(got["graphs"].tolist())) == 1


def test_a_pass_keeps_its_budget(torchrun: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_DISABLE_FUNCTIONALIZATION", "1")  # as torch-neuronx sets it
    ended = torchrun("xla", [{"run": "graph", "with": {"output": str(tmp_path)}}])
    assert ended.code == 0, ended.output[-4000:]
    check(json.loads((tmp_path / "sizes.json").read_text(encoding="utf-8")))


def test_the_reference_clips_and_moves(world: World, tensors: Callable[[Path], dict[str, Tensor]]) -> None:
    """Parity would prove little if nothing were clipped or nothing were learnt."""
    reference = tensors(world(WORLDS, 1)["cls"])
    assert (reference["norms"] > 0.5).any()
    assert reference["losses"][-1] < reference["losses"][0]
    assert all(value.any() for key, value in reference.items() if key.startswith("gradient/"))


@pytest.mark.parametrize("name", parity.LEFT_OUT)
def test_a_loss_that_is_no_number_on_one_rank_moves_nothing_on_any(
    name: str, world: World, tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    """Nor does what ZeRO-1 gathers into the model: masters, moments and their count are as after the step before."""
    found = tensors(world(WORLDS, 2)[f"left out {name}"])
    before = {key.partition("/")[2]: value for key, value in found.items() if key.startswith("before/")}
    assert any(key.endswith("/step") and value == 3 for key, value in before.items())
    assert {key for key, value in before.items() if not torch.equal(found[f"after/{key}"], value)} == set()
    assert found["finite"] and found["seen"].tolist() == [1, 1]


def test_bf16_without_masters_goes_where_float32_goes(
    world: World, tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    """Rounded to nearest here; on the device stochastically, so that small updates survive."""
    expected, got = tensors(world(WORLDS, 1)["full"]), tensors(world(WORLDS, 4)["full tp2 dp2 bf16"])
    key = "weight/esm.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(got[key].bfloat16().float(), got[key].float())
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=0.05, atol=0.05)


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


@pytest.mark.parametrize(("kind", "name"), parity.ROUNDED)
def test_gradients_in_bf16_are_those_of_one_process(
    kind: parity.World, name: str, world: World, tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    """Losses alone hide a gradient that NxD did not sum: they then differ by 0.4 %.

    Both sides round. So a gradient may be off by twice what bfloat16 moves it in one process, away from float32, where
    that is more than the common bound: where its terms cancel, as of the first layer's norms.
    """
    learnt = name.split()[0]
    whole, expected = (tensors(world(WORLDS, 1)[case]) for case in (learnt, f"{learnt} bf16"))
    got = tensors(world(WORLDS, kind)[name])
    distances, rounding = parity.gradient_distances(got, expected), parity.gradient_distances(expected, whole)
    allowed = {key: max(parity.BF16_GRADIENT, 2 * moved) for key, moved in rounding.items()}
    assert {key: value for key, value in distances.items() if not value <= allowed[key]} == {}
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=0.02, atol=0.02)


def test_spmd_in_bf16_goes_where_float32_goes(world: World, tensors: Callable[[Path], dict[str, Tensor]]) -> None:
    expected, got = tensors(world(WORLDS, 1)["cls"]), tensors(world(WORLDS, "spmd")["cls tp2 dp2 bf16"])
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=0.02, atol=0.02)
    assert not torch.equal(got["logits"], expected["logits"])


@pytest.mark.parametrize(
    ("kind", "name", "learnt"), [(4, "dropout", "cls"), ("spmd", "dropout", "cls"), (4, "dropout full bf16", "full")]
)
def test_dropout_is_one_within_a_model_and_another_in_its_copies(
    kind: parity.World, name: str, learnt: str, world: World, tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    """At tp2 x dp2: a mask that differed between the shards of a model would drive their common weights apart.

    Under SPMD the masks are XLA's own business; the copies on the four devices are read one by one.
    """
    without, got = tensors(world(WORLDS, 1)[learnt]), tensors(world(WORLDS, kind)[name])
    assert difference(got["losses"], without["losses"]) > STEP_20
    assert got["losses"][-1] < got["losses"][0]
    # two copies of each tensor-parallel part; under SPMD LoRA's one vector is whole on all four devices
    assert (int(got["copies"]), int(got["differ"])) == (4 if kind == "spmd" else 2, 0)
    if kind == 4:  # ranks 0 and 1 hold one model, 2 and 3 the other
        masks = got["masks"]
        assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
        assert not torch.equal(masks[0], masks[2])


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
    """Rewrites contract.json when they are not, and fails so that the change is looked at.

    With another NxD than the contract's, our calls have to fit that one too.
    """
    written = (world(WORLDS, 1)["signatures"] / "contract.json").read_text(encoding="utf-8")
    real, before = json.loads(written), vendor_calls.CONTRACT.read_text(encoding="utf-8")
    committed = json.loads(before)
    if real["neuronx_distributed"] == committed["neuronx_distributed"]:
        if written != before:
            vendor_calls.CONTRACT.write_text(written, encoding="utf-8")
        assert written == before, "contract.json was rewritten: look at the change and commit it"
    assert vendor_calls.misfits(vendor_calls.vendor_calls(), real["calls"]) == []
    assert (real["attributes"], set(real["names"])) == (committed["attributes"], set(committed["names"]))


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
        assert 0.9 * held < peak <= held + layer


def test_heads_that_tp_does_not_divide(world: World) -> None:
    message = (world(WORLDS, 8)["tp8"] / "message.txt").read_text(encoding="utf-8")
    assert message == "tp=8 does not divide 4 attention heads of tiny; use tp=1, 2 or 4, or parallel.pad_heads=true"


@pytest.fixture(scope="module", params=[1, 2], ids=["a copy of the model", "a half of the model"])
def bereft(
    request: pytest.FixtureRequest, torchrun: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """A world of two whose rank 1 has died in its fourth step, and its output folder."""
    output, options = tmp_path_factory.mktemp("bereft"), {"backend": "neuron", "set": {"parallel.tp": request.param}}
    return torchrun(2, [{"run": "die", "with": {"output": str(output), **options}}]), output


def test_a_rank_that_dies_ends_the_others_and_nothing_is_saved(bereft: tuple[Any, Path]) -> None:
    ended, output = bereft
    assert ended.code != 0
    assert "exitcode  : 13" in ended.output
    assert checkpoint.steps(output / "checkpoints") == [2, 3], "the newest two are kept"
    reason = (output / "reason").read_text(encoding="utf-8")
    assert reason.startswith("rank 0: a peer has failed or does not answer (") and "nothing is saved" in reason
    assert float((output / "died").read_text()) + 60 > ended.at


@pytest.mark.parametrize("zero1", [True, False])
def test_a_finished_run_writes_the_weights_that_validation_chose(
    torchrun: Callable[..., Any], tmp_path: Path, zero1: bool
) -> None:
    """From a file to the adapter; ZeRO-1's master copies are those of the last step when the best ones come back."""
    rng = random.Random(0)
    rows = [f"p{i},{''.join(rng.choices('ACDEFGHIKLMNPQRSTVWY', k=20))},{'abc'[i % 3]}" for i in range(60)]
    (tmp_path / "proteins.csv").write_text("id,sequence,label\n" + "\n".join(rows) + "\n")
    options = {"output": str(tmp_path), "backend": "neuron", "set": {"parallel.zero1": zero1}}
    ended = torchrun(2, [{"run": "finish", "with": options}])
    assert ended.code == 0, ended.output[-4000:]
    assert json.loads((tmp_path / "result.json").read_text())["chosen_step"] == 1
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first, last = (checkpoint.load(checkpoint.step_folder(tmp_path / "checkpoints", step)).model for step in (1, 5))
    for name, value in first.items():
        assert torch.equal(written[saved_key(name)], value), name
    assert any(not torch.equal(last[name], value) for name, value in first.items())


@pytest.mark.skipif("PARITY_PAGE" not in os.environ, reason="make parity NXD_SRC=<folder> writes docs/dev/parity.md")
def test_the_page(world: World, tensors: Callable[[Path], dict[str, Tensor]], bereft: tuple[Any, Path]) -> None:
    """Written from the runs that the tests above have judged."""
    reference = world(WORLDS, 1)
    compared = {}
    for kind, name in EXACT:
        found = differences(tensors(world(WORLDS, kind)[name]), tensors(reference[name.split()[0]]))
        compared[kind, name] = {kind: value for kind, (value, _) in found.items()}
    packed = {kind: packed_against_alone(world(WORLDS, kind), tensors) for kind in (1, "xla", "spmd", 2)}
    whole, second = tensors(reference["whole run"]), tensors(world(WORLDS, 2)["second half"])
    floors = sorted({name for case in parity.LEARNT for name in floored(tensors(reference[case]))})
    trained = tensors(world(WORLDS, 2)["adapter"])["logits"]
    plain, sharded = (tensors(folder)["logits"] for folder in (reference["plain"], world(WORLDS, 4)["sharded"]))
    peak, held, layer = (1e-6 * tensors(world(WORLDS, 4)["memory"])["peak_held_layer"].max(0).values).tolist()
    ended, output = bereft
    seconds = ended.at - float((output / "died").read_text())
    facts = [
        f"Gradients compared with the floor: {', '.join(f'`{name}`' for name in floors) or 'none'}.",
        "",
        "## Packs",
        "Logits of 24 proteins and gradients of their mean loss, several to a row against each in a row of its own "
        f"(allowed {PACKED['logits']:g} and {PACKED['gradient']:g}):",
        "",
        *(
            f"- {parity_page.WHERE[kind]}: logits {found['logits'][0]:.1e}, gradients {found['gradient'][0]:.1e}"
            for kind, found in packed.items()
        ),
        "",
        "## Round trips",
        "- Adapter trained at tp2 with ZeRO-1, in plain PEFT on the whole model: logits differ by "
        f"{difference(plain, trained):.1e}; as PEFT has saved it, in a world of tp4: "
        f"{difference(sharded, trained):.1e}.",
        "- Checkpoint of tp2 x dp1 after 6 steps, continued at tp1 x dp2, beside one process that was never stopped: "
        f"losses of the next 4 steps differ by {difference(second['losses'], whole['losses'][6:]):.1e}, gradient norms "
        f"by {difference(second['norms'], whole['norms'][6:]):.1e}.",
        "- The 650M shape read at tp4 from sharded safetensors: a rank's peak of anonymous memory over that after the "
        f"imports is {peak:.0f} MB; it holds {held:.0f} MB in the end, and a layer has {layer:.0f} MB.",
        "",
        "## Messages",
        f"- A tp that does not fit: `{(world(WORLDS, 8)['tp8'] / 'message.txt').read_text(encoding='utf-8')}`",
        "- The general index's empty packages in place of Neuron's: "
        f"`{(reference['placeholders'] / 'message.txt').read_text(encoding='utf-8')}`",
        f"- A rank that dies (exit code 13) in step 4 of a world of two: the world had ended {seconds:.0f} s later, "
        "with torchrun's exit code and the dead rank's named, and no checkpoint after step 3's. The survivor: "
        f"`{re.sub(r'[(].*[)]', '(...)', (output / 'reason').read_text(encoding='utf-8'))}`",
        "",
        "## Patches and stand-ins behind the columns",
        (world(WORLDS, 2)["stand-ins"] / "message.txt").read_text(encoding="utf-8"),
    ]
    version = (reference["signatures"] / "version.txt").read_text(encoding="utf-8")
    Path(os.environ["PARITY_PAGE"]).write_text(parity_page.page(version, compared, facts), encoding="utf-8")
