"""Two chains of an antibody as one sequence, and a mask rate per region: as AWS's sample trains on OAS."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from esm_neuron import cli
from esm_neuron.config import DataConfig, TaskConfig, TrainConfig
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.splits import Splits, check_settings, load_splits
from esm_neuron.data.tokenizer import AMINO_ACIDS, EOS, MASK, hf_tokenizer
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.files import read_json
from esm_neuron.reports.advice import next_steps
from esm_neuron.tasks import create_task
from esm_neuron.tasks.masked_lm import MaskedLM
from esm_neuron.training import run
from esm_neuron.training.callbacks import Callback, MetricsLine

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
COLUMNS = {"sequence_column": "[heavy, light]", "label_column": "[heavy_region, light_region]"}
RATES = {"C": 0.6, "F": 0.1, "-": 0.0}
ROWS = 60


def frame(rows: int = ROWS) -> pd.DataFrame:
    """Pairs as OAS has them, with C for complementarity-determining, F for framework and - for the ends."""
    rng = random.Random(rows)
    chains = {
        name: ["".join(rng.choices(LETTERS, k=rng.randint(40, 50))) for _ in range(rows)] for name in ("heavy", "light")
    }
    regions = {f"{name}_region": ["-----" + "FFFFFCCC" * 9 for _ in texts] for name, texts in chains.items()}
    for name, texts in chains.items():
        regions[f"{name}_region"] = [
            label[: len(text)] for label, text in zip(regions[f"{name}_region"], texts, strict=True)
        ]
    return pd.DataFrame({"id": [f"p{i}" for i in range(rows)], **chains, **regions})


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.csv"
    frame().to_csv(path, index=False)
    return path


def splits(path: Path, rates: dict[str, float] | None = RATES, **data: Any) -> Splits:
    task = TaskConfig(name="masked_lm", mask_rates=rates)
    cfg = TrainConfig(task=task, data=DataConfig(train=str(path), **{**COLUMNS, "valid_fraction": 0.1, **data}))
    return load_splits(cfg, MaskedLM.labels_of(task))


def test_a_pair_is_what_transformers_tokenizer_makes_of_two_texts(pairs: Path) -> None:
    cfg = DataConfig(sequence_column="[heavy, light]")
    table, expected = InputChunks(pairs, cfg).read(), frame()
    tokenizer = hf_tokenizer()
    for row in range(ROWS):
        wanted = tokenizer(expected["heavy"][row], expected["light"][row])["input_ids"]
        assert table.sequence(row).tolist() == wanted


def targets(task: MaskedLM, found: Splits, epochs: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, region codes and which are targets, of each training pair in each epoch."""
    table = found.train
    for epoch in range(epochs):
        for example in range(len(table)):
            part = slice(table.offsets[example], table.offsets[example + 1])
            target = task.example_target(table, example, np.random.default_rng([epoch, example]))
            assert (target.tokens == table.sequence(example))[target.weight == 0].all()
            yield table.sequence(example), table.labels[part], target.weight > 0


def test_each_region_has_its_rate_and_specials_have_none(pairs: Path) -> None:
    found = splits(pairs)
    task = create_task(found.task, found.labels)
    assert isinstance(task, MaskedLM) and task.needs_labels and found.labels == ()
    tokens, regions, chosen = map(np.concatenate, zip(*targets(task, found, 40), strict=True))
    for code, rate in enumerate(RATES.values()):
        n = int((regions == code).sum())
        assert n > 5_000 or rate == 0
        assert abs(chosen[regions == code].mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / n)
    assert not chosen[regions == 2].any(), "exactly none where the rate is 0"
    assert not chosen[~np.isin(tokens, AMINO_ACIDS)].any() and (regions[tokens == EOS] == -1).all()
    assert ((regions == -1) == ~np.isin(tokens, AMINO_ACIDS)).all(), "each residue has the region of its place"
    assert "without a label" not in found.summary(), "what stands between chains is no residue"
    hidden = task.hidden(found.train)
    assert abs(hidden[found.train.labels == 0].mean() - 0.6) < 0.06 and not hidden[found.train.labels == 2].any()
    shown = task.evaluation_target(found.train, 0)
    assert ((shown.tokens == MASK) == (shown.weight > 0)).all()


def test_rates_in_another_order_are_those_of_the_same_regions(pairs: Path, tmp_path: Path) -> None:
    """A cached label is the place of its region among the rates."""
    for rates in (RATES, dict(reversed(RATES.items())), {**RATES, "F": 0.2}):
        found = splits(pairs, rates, cache=str(tmp_path / "cache"))
        task = create_task(found.task, found.labels)
        assert isinstance(task, MaskedLM)
        share, letters = task.rates(found.train, slice(1, 46)), frame()["heavy_region"][int(found.train.ids[0][1:])]
        assert np.asarray(share)[:40].tolist() == [rates[letter] for letter in letters[:40]]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_regions_are_those_of_the_residues_in_any_writing(tmp_path: Path, pairs: Path) -> None:
    found, rows = splits(pairs), frame()
    texts = dict(zip(rows["id"], rows["heavy_region"] + "?" + rows["light_region"], strict=True))
    table = found.train
    for example, name in enumerate(table.ids):
        codes = table.labels[table.offsets[example] + 1 : table.offsets[example + 1] - 1]
        assert "".join([*RATES, "?"][code] for code in codes) == texts[name]
    for column in ("heavy_region", "light_region"):
        rows[column] = rows[column].map(list)
    rows.to_parquet(tmp_path / "lists.parquet")
    rows.to_json(tmp_path / "lists.jsonl", orient="records", lines=True)
    for name in ("lists.parquet", "lists.jsonl"):
        assert splits(tmp_path / name).fingerprint == found.fingerprint


def test_regions_are_cut_as_their_sequence_is(pairs: Path) -> None:
    whole, cut = splits(pairs), splits(pairs, max_residues=60, long_sequences="crop_ends")
    assert list(whole.train.ids) == list(cut.train.ids)
    for example in range(len(cut.train)):
        labels = [t.labels[t.offsets[example] + 1 : t.offsets[example + 1] - 1] for t in (whole.train, cut.train)]
        assert labels[1].tolist() == [*labels[0][:30], *labels[0][-30:]]


def test_the_unigram_baseline_counts_residues_by_their_rate(pairs: Path) -> None:
    rows = frame()
    for chain in ("heavy", "light"):  # what is hidden is all W, the rest A
        marks = rows[f"{chain}_region"].map(lambda text: "".join("W" if mark == "C" else "A" for mark in text))
        rows[chain] = marks
    rows.to_csv(pairs, index=False)
    found = splits(pairs, {"C": 0.5, "F": 0.0, "-": 0.0})
    task = create_task(found.task, ())
    (baseline,) = task.baselines(found.train)
    sums = task._sums(found.train, baseline.predict(found.train))
    assert sums[:, 1].sum() == task.hidden(found.train).sum() > 100
    assert sums[:, 2].sum() == sums[:, 1].sum(), "W is the likeliest of what is hidden, though A is more often there"


def test_a_rate_for_all_is_as_without_regions(pairs: Path) -> None:
    alike, plain = splits(pairs, dict.fromkeys(RATES, 0.15)), splits(pairs, None)
    tasks = [create_task(found.task, ()) for found in (alike, plain)]
    assert plain.train.labels.size == 0 and alike.train.tokens.tolist() == plain.train.tokens.tolist()
    for example in range(5):
        one, other = (
            task.example_target(found.train, example, np.random.default_rng(example))
            for task, found in zip(tasks, (alike, plain), strict=True)
        )
        assert one.tokens.tolist() == other.tokens.tolist() and one.weight.tolist() == other.weight.tolist()


def write(path: Path, **changes: dict[int, str]) -> Path:
    rows = frame(4)
    for column, values in changes.items():
        for row, value in values.items():
            rows.loc[row, column] = value
    rows.to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"light": {1: "MKV!L"}}, r"pairs.csv:3: the sequence of 'p1' has '!' at residue 4 of chain 2"),
        ({"heavy": {1: "M1V"}}, r"pairs.csv:3: the sequence of 'p1' has '1' at residue 2 of chain 1"),
        ({"light": {2: "MK|V"}}, r"pairs.csv:4: a chain has '\|', which stands between chains"),
        ({"heavy": {0: "nan"}}, r"pairs.csv:2: the sequence of 'p0' is 'nan', which stands for none"),
        ({"light": {0: ""}}, r"pairs.csv:2: the sequence of 'p0' is empty"),
        ({"light_region": {3: "F" * 59}}, r"pairs.csv:5: column .* of 'p3': 59 residue labels for a sequence"),
    ],
)
def test_a_fault_of_a_chain_is_told_with_its_place(
    tmp_path: Path, changes: dict[str, dict[int, str]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        splits(write(tmp_path / "pairs.csv", **changes), valid_fraction=0.0)


def test_a_region_too_many_is_not_made_up_for_by_one_too_few(tmp_path: Path) -> None:
    rows = frame(4)
    heavy, light = (rows[column][1] for column in ("heavy_region", "light_region"))
    path = write(tmp_path / "pairs.csv", heavy_region={1: heavy + "F"}, light_region={1: light[:-1]})
    with pytest.raises(DataError, match=r"pairs.csv:3: column .* of 'p1': \d+ residue labels for a sequence"):
        splits(path, valid_fraction=0.0)


def test_what_holds_no_pairs_is_told_and_the_cure_cures(tmp_path: Path, pairs: Path) -> None:
    fasta = tmp_path / "pairs.fasta"
    fasta.write_text(">a heavy=MKV light=MKL\nMKA\n")
    with pytest.raises(DataError, match="a record of FASTA has one sequence; write chains as columns of a CSV"):
        splits(fasta, None)
    with pytest.raises(ConfigError, match=r"sequence_column=\[heavy, heavy\] names a column twice"):
        splits(pairs, None, sequence_column="[heavy, heavy]")
    text, metadata = pairs.read_text(), '"{""Run"": ""SRR1"", ""Species"": ""human""}"\n'  # as OAS's files begin
    pairs.write_text(metadata + text)
    with pytest.raises(DataError, match=r"pairs.csv:1: the line holds what the table is about, in JSON; remove it"):
        splits(pairs)
    pairs.write_text(text)
    assert len(splits(pairs).train) == 54


def test_a_region_without_a_rate_is_refused_and_the_cure_cures(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.csv")
    with pytest.raises(
        DataError, match=r"label '-' of residue 1 is not one of the classes 'C', 'F'; .*task.mask_rates"
    ):
        splits(path, {"C": 0.5, "F": 0.1}, valid_fraction=0.0)
    assert len(splits(path, RATES, valid_fraction=0.0).train) == 4


def test_stops_gaps_and_rows_without_a_chain_are_treated_as_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.csv", heavy={0: "MKV*", 1: "MK-V"}, light={0: "MKL**", 2: "none"})
    chains = DataConfig(sequence_column="[heavy, light]", on_bad_residue="strip", on_missing="skip")
    inputs = InputChunks(path, chains)
    table = inputs.read()
    tokenizer = hf_tokenizer()
    assert list(table.ids) == ["p0", "p1", "p3"]
    assert table.sequence(0).tolist() == tokenizer("MKV", "MKL")["input_ids"]
    assert table.sequence(1).tolist()[:5] == tokenizer("MKV", "A")["input_ids"][:5]
    assert "1 with a * taken off" in inputs.report.summary()
    replaced = InputChunks(path, replace(chains, on_bad_residue="replace")).read()
    assert replaced.sequence(1).tolist()[:6] == tokenizer("MKXV", "A")["input_ids"][:6]


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ({"name": "sequence_classification"}, COLUMNS, "joins chains, which is for task.name=masked_lm"),
        ({"name": "residue_classification"}, COLUMNS, "joins chains, which is for task.name=masked_lm"),
        ({"name": "masked_lm", "mask_rates": RATES}, {**COLUMNS, "label_column": "x"}, "must name 2 columns"),
    ],
)
def test_what_chains_are_not_for_is_refused(task: dict[str, Any], data: dict[str, Any], message: str) -> None:
    from esm_neuron.tasks import task_class

    cfg = TaskConfig(**task)
    with pytest.raises(ConfigError, match=message):
        check_settings(DataConfig(train="x.csv", **data), task_class(cfg.name).labels_of(cfg))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task.mask_rates {C:1.5}", "must be 0 to 0.99 each"),
        ("--task.mask_rates {C:0}", "one of them above 0"),
        ("--task.mask_rates {C:0.3} --task.mask_probability 0.2", "has no effect beside task.mask_rates"),
    ],
)
def test_rates_that_mean_nothing_are_refused(
    pairs: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    words = [word.replace(":", ": ") if "{" in word else word for word in flags.split()]
    assert cli.main(["train", str(pairs), "--task.name", "masked_lm", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_on_pairs_resumes_to_the_same_weights_and_packs_change_nothing(
    pairs: Path, tmp_path: Path, toy: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    data = {**COLUMNS, "train": str(pairs), "valid": None, "test": None, "max_residues": 126, "homologs": "off"}
    task = {"name": "masked_lm", "mask_rates": RATES}
    steps = {"max_steps": 4, "packs_per_step": 2, "packs_per_device": 2, "eval_every": 2, "eval_packs_per_device": 2}

    def config(name: str, **changes: Any) -> TrainConfig:
        cfg = toy(str(tmp_path / name), data=data, task=task, loop={**steps, **changes})
        return replace(cfg, checkpoint=replace(cfg.checkpoint, every=2, resume="auto"))

    said: list[str] = []
    run.train(config("whole"), said.append)
    assert any("regions (training residues, mask rate): C " in line and " at 0.6" in line for line in said)
    stopped = config("parts")
    with pytest.raises(KeyboardInterrupt):
        run.train(stopped, said.append, watchers=[_Stop()])
    run.train(stopped, said.append)
    assert any("resumed after step 2 of 4" in line for line in said)
    weights = [load_file(next((tmp_path / name).glob("*/adapter_model.safetensors"))) for name in ("whole", "parts")]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    result = read_json(tmp_path / "whole" / "result.json")
    assert "unigram" in str(result)
    assert "esm-neuron embed --model" in said[-1] and "esm-neuron predict" not in said[-1], "predict is refused, below"
    assert "use it: esm-neuron embed --model" in next_steps(config("whole"), result, tmp_path / "whole")[-1]

    model = str(tmp_path / "whole")
    for name, packing in (("one", "true"), ("two", "false")):
        words = ["embed", "--model", model, "--input", str(pairs), "--output", str(tmp_path / f"{name}.parquet")]
        assert cli.main([*words, "--data.packing", packing]) == 0
    one, two = (np.stack(pd.read_parquet(tmp_path / f"{name}.parquet")["embedding"]) for name in ("one", "two"))
    assert np.abs(one - two).max() < 1e-5
    assert cli.main(["evaluate", "--model", model, "--input", str(pairs)]) == 0
    capsys.readouterr()
    assert cli.main(["predict", "--model", model, "--input", str(pairs), "--output", str(tmp_path / "p.csv")]) == 2
    assert "the run masks by region (task.mask_rates), and predict reads no regions" in capsys.readouterr().err
    wild = tmp_path / "wild.fasta"
    wild.write_text(">w\nMKVLA\n")
    (tmp_path / "variants.csv").write_text("variant\nM1A\nK2A\n")
    score = ["score", "--model", model, "--input", str(tmp_path / "variants.csv"), "--wild-type", str(wild)]
    score += ["--output", str(tmp_path / "s.csv")]
    assert cli.main(score) == 2
    assert "give --data.sequence_column sequence" in capsys.readouterr().err
    assert cli.main([*score, "--data.sequence_column", "sequence"]) == 0, "the cure cures"


class _Stop(Callback):
    def on_log(self, step: int, total: int, record: MetricsLine) -> None:
        if step == 3:
            raise KeyboardInterrupt
