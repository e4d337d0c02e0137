"""throughput.py, growth.py and yardsticks.py: what they ask for, refuse, leave out and make of a run's files."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import random
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from esm_neuron.backends.cpu import has_bf16_units
from esm_neuron.config import settings
from esm_neuron.config.rules import validate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def throughput() -> Iterator[ModuleType]:
    """The program as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("throughput")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("words", ["--max-steps 2", "--rows 16", "--backend cuda --warmup 5 --max-steps 5"])
def test_a_warm_up_that_leaves_nothing_is_refused(
    throughput: ModuleType, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        throughput.arguments(words.split())
    assert "none would be timed" in capsys.readouterr().err


def test_different_measurements_have_different_files(throughput: ModuleType) -> None:
    asked = ["", "--rows 64", "--precision fp32", "--checkpointing on", "--checkpointing off on", "--adapters none",
             "--max-steps 9", "--shape tiny", "--backend xla", "--repeats 5", "--peer-repeats 2", "--batch 4",
             "--max-residues 510", "--warmup 1", "--threads 1", "--lr 0.01", "--settings ours", "--data own.tsv",
             "--data other/own.tsv", "--compile on", "--compile off on", "--peak-tflops 70"]  # fmt: skip
    stems = {throughput.stem_of(throughput.arguments(words.split())) for words in asked}
    assert len(stems) == len(asked)
    assert throughput.stem_of(throughput.arguments([])) == "cpu-esm2_t6_8M-fp32+bf16-lora-192rows"


def test_our_side_is_timed_and_what_fails_is_said(throughput: ModuleType, tmp_path: Path) -> None:
    words = (
        "--shape tiny --rows 40 --batch 4 --max-residues 62 --max-steps 4 --precision fp32 --settings ours --threads 1"
    )
    asked = [*words.split(), "--output", str(tmp_path)]
    assert throughput.main(asked) == 0
    (found,) = json.loads((tmp_path / f"{throughput.stem_of(throughput.arguments(asked))}.json").read_text())["runs"]
    assert found["steps"] == 2 and found["residues_per_second"] > 0 < found["peak_rss_mb"]
    with pytest.raises(SystemExit, match="no run came to its end"):
        throughput.main([*asked, "--lr", "nan"])


def test_our_flags_are_settings_and_validation_rows_have_training_classes(
    throughput: ModuleType, tmp_path: Path
) -> None:
    rows = [(f"p{i}", "MKVAC" * 9, "ab"[i % 2], "train") for i in range(40)]
    rows += [(f"v{i}", "MKVAC" * 9, "abz"[i], "valid") for i in range(3)]
    pd.DataFrame(rows, columns=["entry", "sequence", "label", "split"]).to_csv(
        tmp_path / "x.tsv", sep="\t", index=False
    )
    args = throughput.arguments(f"--data {tmp_path / 'x.tsv'} --rows 40 --max-residues 62 --max-steps 4".split())
    packs_per_step = throughput.write_rows(args, tmp_path)
    assert packs_per_step == round(8 * 47 / 64)
    assert pd.read_csv(tmp_path / "valid.tsv", sep="\t")["label"].tolist() == ["a", "b"]
    contestants = importlib.import_module("contestants")
    who = contestants.Contestant(contestants.OURS, "bf16", "none", True)
    cfg = settings.parse(contestants.ours(who, args, tmp_path, packs_per_step))
    validate(cfg)
    assert (cfg.loop.precision, cfg.model.gradient_checkpointing, cfg.loop.eval_packs_per_device) == ("bf16", True, 6)
    rival = contestants.Contestant("HF padded", "bf16", "lora", True)
    _, _, *words = contestants.command(rival, args, tmp_path, packs_per_step)
    assert importlib.import_module("hf_trainer").arguments(words).setting == "padded"
    words = contestants.ours(who, args, tmp_path, packs_per_step)
    assert contestants.planned(words, "cpu") == {}
    assert contestants.planned(words, "xla")["graphs_planned"] >= 4
    peak = contestants.planned(words, "cuda")["predicted_gpu_gb"]
    assert peak == pytest.approx(7.5e6 * 16 / 1e9, rel=0.5), "8M: weights, gradients and moments are most of it"


def test_what_a_run_printed_is_kept_and_no_other_takes_its_place(throughput: ModuleType, tmp_path: Path) -> None:
    contestants = importlib.import_module("contestants")
    who, ran, kept = contestants.Contestant("HF padded", "bf16", "qlora", True), tmp_path / "run", tmp_path / "kept"
    (ran / "out").mkdir(parents=True)
    for number in range(2):
        (ran / "log").write_text(f"run {number}")
        (ran / "out" / "metrics.jsonl").write_text("{}")
        contestants.keep(kept, who, ran)
    found = {str(file.relative_to(kept)): file.read_text() for file in kept.rglob("*") if file.is_file()}
    name = "HF-padded-qlora-bf16-checkpointing"
    assert found == {f"00{n}-{name}/{file}": text for n in (0, 1) for file, text in
                     (("log", f"run {n}"), ("metrics.jsonl", "{}"))}  # fmt: skip


@pytest.mark.parametrize(
    ("warmup", "expected"), [(2, (2 + 1) / (2 / 100 + 1 / 50)), (0, 900 / (10 + 20))], ids=["after", "from the build"]
)
def test_our_rate(throughput: ModuleType, tmp_path: Path, warmup: int, expected: float) -> None:
    lines: list[dict[str, Any]] = [
        {"step": step, "residues_per_second": rate, "graphs": 5} for step, rate in ((2, 7.0), (4, 100.0), (5, 50.0))
    ]
    lines.append({"step": 5, "split": "valid", "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = {"steps": 5, "residues": 900, "seconds": 20.0, "padding_efficiency": 0.9, "graphs": 7}
    (tmp_path / "result.json").write_text(json.dumps({"train": train}))
    metrics = importlib.import_module("contestants").read_ours(tmp_path, warmup, 10.0)
    assert metrics["residues_per_second"] == pytest.approx(expected)
    assert (metrics["steps"], metrics["graphs"], metrics["graphs_in_all"]) == (5 - warmup, 5, 7)


@pytest.mark.parametrize(("units", "slow", "left_out"), [(False, 20.0, True), (False, 30.0, False), (True, 1.0, False)])
def test_bf16_is_left_out_where_it_is_emulated_too_slowly(
    throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: bool, slow: float, left_out: bool
) -> None:
    def run(who: Any, args: Any, folder: Path, packs_per_step: int) -> dict[str, float]:
        assert (args.max_steps, args.batch, packs_per_step) == (2, 1, 1)
        return {"residues_per_second": {"fp32": 100.0, "bf16": slow}[who.precision]}

    monkeypatch.setattr(throughput, "run", run)
    monkeypatch.setattr(throughput, "has_bf16_units", lambda: units)
    who, args = throughput.Contestant(throughput.OURS, "bf16"), throughput.arguments([])
    why = throughput.too_slow(who, args, tmp_path)
    assert (why is not None) == left_out and (why is None or "5.0 times" in why)
    assert throughput.too_slow(throughput.Contestant(throughput.OURS, "fp32"), args, tmp_path) is None


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::gelu_backward", "GELU"),
        ("aten::native_layer_norm", "layer norm"),
        ("aten::index_select", "copies"),
        ("aten::mul", "element-wise and the rest"),
        ("aten::addmm_", "matrix products"),
    ],
)
def test_operations_have_their_kind_in_a_profile(throughput: ModuleType, operation: str, kind: str) -> None:
    assert importlib.import_module("profile_step").kind_of(operation) == kind


def test_the_fastest_peer_has_the_same_adapter_and_checkpointing(throughput: ModuleType) -> None:
    ours, peer = throughput.OURS, "HF dynamic"
    rates = {
        (ours, "bf16", "lora", False): 300, (peer, "bf16", "lora", False): 100, (peer, "fp32", "lora", False): 150,
        (ours, "bf16", "qlora", True): 80, (peer, "bf16", "qlora", True): 40,
    }  # fmt: skip
    contestants = [throughput.Contestant(*of) for of in rates]
    runs = {
        who: [{"residues_per_second": rate, "padding_efficiency": 1.0}]
        for who, rate in zip(contestants, rates.values(), strict=True)
    }
    assert throughput.summary(contestants, runs)["to_fastest_hf"].tolist() == pytest.approx([2, 2 / 3, 1, 2, 1])


def test_growth_has_a_timed_step_everywhere(throughput: ModuleType) -> None:
    growth = importlib.import_module("growth")
    given = throughput.argparse.Namespace(backend="cpu", shape="tiny", threads=1, max_steps=52)
    assert growth.point_of(given, 64, 510).max_steps is None
    assert growth.point_of(given, 1600, 510).max_steps == 52


@pytest.mark.parametrize(
    ("text", "units"),
    [("flags\t\t: fpu avx2\n", False), ("flags : avx512_bf16\n", True), ("Features : fp asimd bf16\n", True)],
)
def test_bf16_units_are_read_from_the_processors_flags(tmp_path: Path, text: str, units: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert has_bf16_units(tmp_path / "cpuinfo") is units
    assert has_bf16_units(tmp_path / "missing") is None


@pytest.fixture(scope="module")
def yardsticks() -> Iterator[ModuleType]:
    """The program as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("yardsticks")
    sys.path.remove(str(BENCHMARKS))


def flip_files(folder: Path) -> None:
    """Write splits in FLIP's form: a regression without and a classification with marked validation proteins."""
    rng = random.Random(0)
    (folder / "gb1").mkdir(parents=True)
    (folder / "scl").mkdir()
    numbers, classes = ["sequence,target,set,validation"], ["sequence,target,set,validation"]
    for row in range(60):
        residues = "".join(rng.choices("ACDEFGHIKL" if row % 2 else "LMNPQRSTVW", k=30))
        split = "test" if row % 5 == 0 else "train"
        numbers.append(f"{residues},{residues.count('L') + rng.random():.3f},{split},")
        classes.append(f"{residues},{'Nucleus' if row % 2 else 'Plastid'},{split},{row % 5 == 1!s}")
    (folder / "gb1" / "three_vs_rest.csv").write_text("\n".join(numbers) + "\n")
    with gzip.open(folder / "scl" / "mixed_hard.csv.gz", "wt") as file:
        file.write("\n".join(classes) + "\n")


def test_yardsticks_run_from_files_to_the_table_beside_the_paper(
    yardsticks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(yardsticks.urllib.request, "urlopen", lambda *_, **__: pytest.fail("nothing was to be fetched"))
    flip_files(tmp_path)
    words = f"--data {tmp_path} --runs {tmp_path / 'runs'} --models mini --kinds head lora --seeds 2 --set"
    short = ["loop.max_steps=2", "loop.packs_per_step=1", "loop.packs_per_device=1", "data.pack_tokens=512",
             "data.max_residues=126"]  # fmt: skip
    args = yardsticks.arguments([*words.split(), *short])
    rows = list(yardsticks.collect(args))
    assert [(row["split"], row["kind"], len(row["values"])) for row in rows] == [
        ("scl/mixed_hard", "head", 2), ("scl/mixed_hard", "lora", 2),
        ("gb1/three_vs_rest", "head", 2), ("gb1/three_vs_rest", "lora", 2),
    ]  # fmt: skip
    assert "left out: " in capsys.readouterr().out, "splits that are not there are named"
    again = list(yardsticks.collect(args))
    assert again == rows, "finished runs are not made again"
    other = yardsticks.arguments([*words.split(), *short[:-1], "data.max_residues=62"])
    asked = (yardsticks.YARDSTICKS[0], tmp_path / "scl" / "mixed_hard.csv.gz", "mini", "lora", 0)
    outputs = {yardsticks.configured(*asked, each).output for each in (args, other)}
    assert len(outputs) == 2, "results of other settings are not taken"
    shown = yardsticks.render([{**rows[1], "model": "8M", "paper": 0.559}])
    assert "| scl/mixed_hard | 8M | lora | accuracy | " in shown and shown.splitlines()[2].endswith("| 0.559 |")
    assert "doi:10.1038/s41467-024-51844-2" in shown


def test_the_paper_s_column_and_the_places_of_the_splits(yardsticks: ModuleType) -> None:
    of = {each.name: each for each in yardsticks.YARDSTICKS}
    location = of["scl/mixed_hard"]
    assert [location.paper(model, kind) for model in ("8M", "650M") for kind in ("probe", "full")] == [
        0.52, 0.559, 0.629, 0.638,
    ]  # fmt: skip
    assert location.paper("mini", "lora") is None
    assert of["gb1/low_vs_high"].url.endswith("/splits/gb1/splits.zip")
    assert of["rhomax/by_wild_type"].url.endswith("/splits/rhomax/by_wild_type.csv.gz")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("__MACOSX/splits/._mixed_hard.csv", "no")
        file.writestr("splits/mixed_hard.csv", "sequence,target\n")
    assert yardsticks.member(archive.getvalue(), "scl/mixed_hard") == b"sequence,target\n"
