"""Variants, settings, checkpoints and weights: read rightly or refused in one line."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import threading
from functools import cache
from operator import attrgetter
from pathlib import Path
from random import Random

import pytest
import torch
from helpers import fuzzing
from helpers.fuzzing import SEEDS, fuzz, mutate, refused, stored
from helpers.refusals import Refusal
from helpers.weights import write_safetensors_folder
from hypothesis import given
from hypothesis import strategies as st
from transformers import EsmForMaskedLM

from esm_neuron.config import DataConfig, ModelConfig, TrainConfig
from esm_neuron.config.rules import check_values
from esm_neuron.config.settings import dump, known_keys, parse, read_config
from esm_neuron.errors import ConfigError
from esm_neuron.files import write_json
from esm_neuron.inference.variants import (
    STANDARD,
    Substitution,
    VariantColumns,
    VariantTable,
    difference,
    mutated,
    parse_variant,
)
from esm_neuron.models.shapes import SHAPES, esm_config
from esm_neuron.models.weights import Draw, load_into, open_weights
from esm_neuron.training import checkpoint
from esm_neuron.training.checkpoint import Snapshot, TrainState

folder = fuzzing.module_folder


def test_a_refusal_of_many_lines_would_be_seen() -> None:
    def many() -> None:
        raise ConfigError("one\ntwo")

    with pytest.raises(AssertionError):
        refused(many)


def test_a_case_that_hangs_ends_the_process_with_its_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "HANG", 0.5)

    @fuzz
    @given(st.just(0))
    def hangs(_: int) -> None:
        threading.Event().wait()

    process = multiprocessing.get_context("fork").Process(target=hangs)
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert "Timeout" in fuzzing.HUNG.read_text() and "in hangs" in fuzzing.HUNG.read_text()


# --- variants

WILD = "MKTAYIAKQRQISFVKSHFSRQ"
SUBSTITUTIONS = st.dictionaries(st.integers(0, len(WILD) - 1), st.sampled_from(sorted(STANDARD)), max_size=6)


@fuzz
@given(chosen=SUBSTITUTIONS, first=st.integers(-50, 500), lower=st.booleans())
def test_a_variant_is_what_it_says(chosen: dict[int, str], first: int, lower: bool) -> None:
    chosen = {index: mutant for index, mutant in chosen.items() if WILD[index] != mutant}
    first = max(first, 0)  # `A-3G` is no name of a residue
    text = ":".join(f"{WILD[index]}{index + first}{mutant}" for index, mutant in chosen.items()) or "WT"
    variant = parse_variant(text.lower() if lower else text, WILD, first)
    assert variant == tuple(Substitution(i, WILD[i], chosen[i]) for i in sorted(chosen))
    assert difference(mutated(WILD, variant), WILD) == variant


VARIANTS = (
    st.text("AKMTWX0129:*=-_é٣ ", max_size=10)
    | st.text(max_size=8)
    | st.sampled_from(["M1" + "9" * 5000 + "A", "A1G:" * 30_000, "WT", "M1A", "K2R:T3A", "M1*", "M1="])
)


@fuzz
@given(texts=st.lists(VARIANTS, min_size=1, max_size=6), scores=st.sampled_from(["1", "", "nan", "1_0", "٣", "1e999"]))
def test_every_variant_is_used_or_rejected(folder: Path, texts: list[str], scores: str) -> None:
    keys = ("variant", "score")
    path = folder / "v.jsonl"
    path.write_text("".join(json.dumps(dict(zip(keys, (text, scores), strict=True))) + "\n" for text in texts))
    columns, cfg = VariantColumns(score="score"), DataConfig(on_bad_residue="skip")
    table = VariantTable(path, columns, cfg, WILD, 1, True, 1000, lambda row, seen: 1)
    found = refused(lambda: [row for piece in table() for row in piece.content])
    if isinstance(found, Refusal):
        assert table.rows == len(texts) == len(table.rejected) or "\0" in "".join(texts) or "\\ud8" in path.read_text()
        return
    assert len(found) + len(table.rejected) == len(texts)
    assert all("\n" not in row.reason for row in table.rejected)


# --- settings

KEYS = sorted(known_keys())
ODD = st.sampled_from(
    ["", "null", "~", ".inf", "-.nan", "1e400", "-1", "0", "[]", "{}", "[[", "*a", "&a b", "!!int x", "!!bool x",
     "? [a]", "2001-99-99", "0b", "!!python/object:os.system x", "<<", "\ud800", "\0", "9" * 23, "true",
     "a: b", "!!binary x", "1:60", "!!timestamp x", "[null]", "{a: [null]}", "{a: null}", "{a: {b: {c: 1}}}", "--help", "s3://a:b@c"]
)  # fmt: skip
SETTINGS = st.tuples(st.sampled_from([*KEYS, "config", "optim", "no.such"]), ODD | st.text(max_size=12))


@fuzz
@given(chosen=st.lists(SETTINGS, max_size=3), seed=st.none() | SEEDS)
def test_a_config_file_is_right_or_refused(folder: Path, chosen: list[tuple[str, str]], seed: int | None) -> None:
    lines = [] if seed is None else [dump(TrainConfig())]
    for key, value in chosen:
        section, _, name = key.rpartition(".")
        lines.append(f"{section}:\n  {name}: {value}\n" if section else f"{name}: {value}\n")
    content = "".join(lines).encode("utf-8", "surrogatepass")
    path = stored(folder, "c.yaml", content if seed is None else mutate(content, Random(seed)))
    cfg = refused(lambda: read_config(path))
    if isinstance(cfg, Refusal) or isinstance(refused(lambda: check_values(cfg)), Refusal):
        return
    assert read_config(stored(folder, "d.yaml", dump(cfg).encode())) == cfg


@fuzz
@given(words=st.lists(SETTINGS, max_size=3))
def test_flags_are_right_or_refused(folder: Path, words: list[tuple[str, str]]) -> None:
    """What is accepted changes no setting but those named, and a config file of it reads as the same."""
    cfg = refused(lambda: parse([f"--{key}={value}" for key, value in words]))
    if isinstance(cfg, Refusal):
        return
    changed = {key for key in KEYS if attrgetter(key)(cfg) != attrgetter(key)(TrainConfig())}
    assert changed <= {key for key, _ in words}
    if not isinstance(refused(lambda: check_values(cfg)), Refusal):
        assert read_config(stored(folder, "flags.yaml", dump(cfg).encode())) == cfg


# --- checkpoints and weights


@cache
def saved(folder: Path) -> tuple[Path, Snapshot]:
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(3, 4, generator=generator), "b": torch.ones(2).bfloat16()}
    state = TrainState(7, 100, 1.5, {"best": 0.5, "best_loss": 0.7, "best_step": 7, "ties": 0, "bad": 0}, {"seed": 1})
    snapshot = Snapshot(state, weights, {"a/exp_avg": torch.zeros(3, 4)})
    return checkpoint.save(folder / "whole", snapshot), snapshot


@fuzz
@given(seed=SEEDS, signed=st.booleans())
def test_a_damaged_checkpoint_never_passes(folder: Path, seed: int, signed: bool) -> None:
    """Also one whose manifest has the sums of the damaged files: it is refused, or it is a checkpoint."""
    whole, snapshot = saved(folder)
    target, rng = folder / "damaged" / whole.name, Random(seed)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    file = rng.choice(sorted(path.name for path in target.iterdir()))
    content = mutate((target / file).read_bytes(), rng)
    changed = content != (target / file).read_bytes()
    (target / file).write_bytes(content)
    if signed and file != "manifest.json":
        manifest = json.loads((target / "manifest.json").read_text())
        manifest["files"][file]["sha256"] = hashlib.sha256(content).hexdigest()
        write_json(target / "manifest.json", manifest)
    found = refused(lambda: checkpoint.load(target))
    if isinstance(found, Refusal):
        assert changed and str(target) in found
    elif not (signed or file == "manifest.json"):
        assert not changed
        assert found.state == snapshot.state and torch.equal(found.model["a"], snapshot.model["a"])


@cache
def weights(folder: Path) -> Path:
    with torch.random.fork_rng():
        state = EsmForMaskedLM(esm_config(SHAPES["tiny"])).state_dict()
    write_safetensors_folder(state.items(), esm_config(SHAPES["tiny"]), folder / "weights", 40_000)
    return folder / "weights"


def load(path: Path) -> int:
    config, source = open_weights(ModelConfig(name=str(path)), 0)
    with torch.device("meta"):
        model = EsmForMaskedLM(config)
    return len(load_into(model, source, Draw(0, 0.02), lambda name: False).loaded)


@fuzz
@given(seed=SEEDS)
def test_damaged_weights_are_refused_or_loaded(folder: Path, seed: int) -> None:
    """Values may differ unseen, which `model.sha256` is for; names, shapes and kinds of numbers may not."""
    whole, target, rng = weights(folder), folder / "mutated", Random(seed)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    path = rng.choice(sorted(target.iterdir()))
    content, head = path.read_bytes(), rng.choice((400, None))  # the head of a file says what all the rest is
    path.write_bytes(mutate(content[:head], rng) + (b"" if head is None else content[head:]))
    assert refused(lambda: load(target))
