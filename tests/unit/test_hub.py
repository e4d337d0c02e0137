"""`model.name: auto` against a hub on loopback: whole, cached, slow, cut off, broken, silent, absent, lying."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.stand_in_hub import COMMIT, StandIn, served
from helpers.toys import Toy

from esm_neuron.config import ModelConfig, settings
from esm_neuron.config.rules import validate
from esm_neuron.models import hub
from esm_neuron.models.shapes import SHIPPED, known_shape, locate
from esm_neuron.training import run

NAME = "facebook/esm2_t6_8M_UR50D"
WEIGHTS = (SHIPPED / "mini" / "model.safetensors").read_bytes()
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def model_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A hub whose 8M has the weights of `mini`, and an empty cache for it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in hub.FILES:
        (folder / name).write_bytes((SHIPPED / "mini" / name).read_bytes())
    stand_in = StandIn(NAME, folder)
    with served(stand_in) as address:
        use(monkeypatch, tmp_path / "hub", address)
        yield stand_in


def use(monkeypatch: pytest.MonkeyPatch, cache: Path, address: str) -> None:
    """Have the hub's client, here and in processes that start, use an address and a cache."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "20")
    for limit in ("ANSWER_SECONDS", "START_SECONDS"):
        monkeypatch.setattr(hub, limit, 300)  # a busy machine's stand-in is no absent hub, nor one that stalls
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def choose(said: list[str], earlier: ModelConfig | None = None, **fields: str) -> ModelConfig:
    return hub.choose(ModelConfig(**fields), earlier, said.append)  # type: ignore[arg-type]


def test_the_hub_s_8m_is_fetched_once_with_its_size_commit_and_checksum(model_hub: StandIn) -> None:
    said: list[str] = []
    found = choose(said)
    assert (found.name, found.revision, found.sha256) == (NAME, COMMIT, DIGEST)
    assert (
        said[0] == f"model.name=auto: fetching {NAME}, {len(WEIGHTS) / 1e6:.0f} MB, once; --model.name mini needs none"
    )
    assert said[-1].startswith(f"{NAME}: fetched in ") and said[-1].endswith(f"commit {COMMIT[:12]}")
    model_hub.asked, said[:] = [], []
    assert choose(said) == found
    assert said == [f"model.name=auto: {NAME}, commit {COMMIT[:12]}, as cached"]
    assert [line for line in model_hub.asked if NAME in line] == [f"GET /api/models/{NAME}?blobs=true"]


def test_a_run_records_what_it_started_from_and_goes_on_with_it(
    model_hub: StandIn, toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cfg, said = toy("out", model={"name": "auto", "init": "pretrained"}, loop={"max_steps": 2}), list[str]()
    run.train(cfg, said.append)
    saved = settings.read_config(Path(cfg.output) / "config.yaml").model
    assert (saved.name, saved.revision, saved.sha256) == (NAME, COMMIT, DIGEST)
    reference = json.loads((Path(cfg.output) / "adapter" / "base_reference.json").read_text())
    assert (reference["name"], reference["revision"]) == (NAME, COMMIT)
    assert not any("demonstration network" in line for line in said)
    # the hub is gone: the run goes on from its checkpoint with the same weights, from the cache
    model_hub.mode, model_hub.asked = "broken", []
    longer = replace(cfg, checkpoint=replace(cfg.checkpoint, resume="auto"))
    assert run.train(longer, said.append).result["model"] == NAME
    assert [line for line in model_hub.asked if NAME in line] == []


def test_an_interrupted_download_is_gone_on_with(model_hub: StandIn) -> None:
    said: list[str] = []
    model_hub.mode = "cut"
    assert choose(said).name == "mini"
    assert said[-1].startswith(f"model.name=auto: no {NAME} here (") and said[-1].endswith("training starts from mini")
    model_hub.mode = "whole"
    assert choose(said).sha256 == DIGEST
    assert model_hub.sent[0] == 0 and 0 < model_hub.sent[-1] < len(WEIGHTS), "from where the first one ended"


def test_a_slow_hub_is_waited_for_with_a_word_and_given_up_where_it_would_take_long(
    model_hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(hub, "TOLD_SECONDS", 0.5)
    monkeypatch.setattr(hub, "LOOK_SECONDS", 0.2)
    model_hub.mode, model_hub.rate = "slow", len(WEIGHTS) // 2
    assert choose(said).sha256 == DIGEST
    assert any(" s left" in line and line.startswith(f"{NAME}: ") for line in said)


def test_a_download_that_would_take_too_long_is_given_up(model_hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(hub, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(hub, "STALL_SECONDS", 3.0)
    monkeypatch.setattr(hub, "LONGEST_SECONDS", 20.0)
    model_hub.mode, model_hub.rate = "slow", len(WEIGHTS) // 60
    assert choose(said).name == "mini"
    assert "the next run goes on)" in said[-1]


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("broken", "500"),
        ("silent", "did not answer within"),
        ("lying", "what came has not the SHA-256 that the hub names"),
        ("climbing", "the hub's answer is not what one says of a model"),
    ],
)
def test_a_hub_that_fails_costs_seconds_and_no_run(
    model_hub: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, reason: str
) -> None:
    said: list[str] = []
    model_hub.mode = mode
    if mode == "silent":
        monkeypatch.setattr(hub, "ANSWER_SECONDS", 1)
    found = choose(said)
    assert (found.name, found.revision, found.sha256) == ("mini", None, None)
    assert reason in said[-1]
    assert not list(tmp_path.rglob("climbed*"))


def test_an_absent_hub_fails_no_run_and_the_cache_stands_in(
    model_hub: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    said: list[str] = []
    with monkeypatch.context() as gone:
        gone.setenv("HF_ENDPOINT", nobody)
        assert choose(said).name == "mini"
    assert choose(said).name == NAME
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    found = choose(said)
    assert (found.name, found.revision, found.sha256) == (NAME, COMMIT, DIGEST)
    assert "from the hub's cache" in said[-1]


def test_offline_no_process_is_started_and_the_line_says_what_mini_is(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "_start", lambda *words: pytest.fail("asked the hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said: list[str] = []
    cfg = toy("out", model={"name": "auto", "init": "pretrained"}, loop={"max_steps": 1})
    assert run.train(cfg, said.append).result["model"] == "mini"
    text = "\n".join(said)
    assert f"no {NAME} here (offline, by HF_HUB_OFFLINE), so training starts from mini" in text
    assert "mini is a demonstration network of this project that knows hardly more than composition" in text


def test_what_is_named_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_start", lambda *words: pytest.fail("asked the hub"))
    for cfg in (ModelConfig(name="mini"), ModelConfig(name="owner/name"), ModelConfig(name="tiny", init="random")):
        assert hub.choose(cfg, None, str) == cfg
    assert hub.choose(ModelConfig(init="random"), None, str).name == "esm2_t6_8M"
    earlier = ModelConfig(name="mini")
    assert hub.choose(ModelConfig(), earlier, str) == earlier


def test_auto_is_the_default_and_known_before_the_run(toy: Toy) -> None:
    cfg = toy(model={"name": "auto", "init": "pretrained"})
    validate(cfg)
    assert ModelConfig().name == "auto"
    assert locate(cfg.model) is None
    assert known_shape("auto") == known_shape(NAME)
