"""Zero-shot scores against a naive reference: transformers' model, one sequence and one mask at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from transformers import EsmForMaskedLM, PreTrainedModel

from esm_neuron import cli
from esm_neuron.config import TrainConfig
from esm_neuron.data.tokenizer import MASK, VOCABULARY, encode_many
from esm_neuron.errors import ConfigError, DataError, EsmNeuronError
from esm_neuron.inference.export import export
from esm_neuron.inference.score import Method, score
from esm_neuron.inference.variants import VariantColumns, parse_variant
from esm_neuron.metrics.bootstrap import RESAMPLES, SEED, resamples
from esm_neuron.metrics.regression import rank_correlation
from esm_neuron.training import run

Toy = Callable[..., TrainConfig]

WILD = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRV"
SMALL = ("--data.max_residues=62", "--data.pack_tokens=64", "--loop.eval_packs_per_device=1")
"""Pieces of 2,048 tokens: 48 masked copies of the wild type."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has an opinion: its LM bias is random too."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    torch.manual_seed(5)
    from esm_neuron.models.shapes import SHAPES, esm_config

    model = EsmForMaskedLM(esm_config(SHAPES["tiny"]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def wild(tmp_path: Path) -> Path:
    path = tmp_path / "wild.fasta"
    path.write_text(f">protein\n{WILD}\n")
    return path


def variants(count: int, seed: int = 0) -> list[str]:
    """`count` different variants of one to three substitutions, in random order, the wild type among them."""
    rng, found = random.Random(seed), {"WT": None}
    while len(found) < count:
        places = sorted(rng.sample(range(len(WILD)), rng.choice((1, 1, 1, 2, 3))))
        names = [f"{WILD[i]}{i + 1}{rng.choice([a for a in 'ACDEFGHIKLMNPQRSTVWY' if a != WILD[i]])}" for i in places]
        found[":".join(names)] = None
    chosen = list(found)
    rng.shuffle(chosen)
    return chosen


class Reference:
    """Log probabilities by transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = EsmForMaskedLM.from_pretrained(folder).eval()

    def log_p(self, sequence: str, masks: list[int]) -> np.ndarray:
        """[residues, 33]."""
        tokens = torch.from_numpy(encode_many([sequence])[0].astype(np.int64))
        tokens[torch.tensor(masks, dtype=torch.long) + 1] = MASK
        with torch.no_grad():
            return self.model(tokens[None]).logits[0, 1:-1].double().log_softmax(-1).numpy()

    def marginal(self, variant: str, masked: bool) -> float:
        total, exchanged = 0.0, [] if variant == "WT" else variant.split(":")
        places = [int(each[1:-1]) - 1 for each in exchanged]
        log_p = self.log_p(WILD, places if masked else [])
        for each, place in zip(exchanged, places, strict=True):
            total += log_p[place, VOCABULARY.index(each[-1])] - log_p[place, VOCABULARY.index(each[0])]
        return float(total)

    def perplexity(self, variant: str) -> float:
        sequence = list(WILD)
        for each in [] if variant == "WT" else variant.split(":"):
            sequence[int(each[1:-1]) - 1] = each[-1]
        text = "".join(sequence)
        log_p = [self.log_p(text, [i])[i, VOCABULARY.index(residue)] for i, residue in enumerate(text)]
        return float(np.exp(-np.mean(log_p)))


@pytest.mark.parametrize(
    ("method", "count"), [("wild-type-marginal", 150), ("masked-marginal", 150), ("pseudo-perplexity", 6)]
)
def test_scores_are_those_of_one_sequence_at_a_time(
    plain: Path, wild: Path, tmp_path: Path, method: Method, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    names, reference = variants(count), Reference(plain)
    expected = {
        "wild-type-marginal": lambda name: reference.marginal(name, masked=False),
        "masked-marginal": lambda name: reference.marginal(name, masked=True),
        "pseudo-perplexity": reference.perplexity,
    }[method]
    values = np.array([expected(name) for name in names])
    measured = values + np.random.default_rng(0).normal(0, np.std(values), len(values))
    table = tmp_path / "dms.csv"
    pd.DataFrame({"mutant": names, "DMS": measured}).to_csv(table, index=False)
    words = ["score", "--model", plain, "--input", table, "--output", tmp_path / "out.csv", "--method", method]
    words += ["--wild-type", wild, "--variant-column", "mutant", "--score-column", "DMS", *SMALL]
    assert cli.main([str(word) for word in words]) == 0
    frame, column = pd.read_csv(tmp_path / "out.csv"), method.replace("-", "_")
    assert list(frame.columns) == ["variant", "measured", column]
    assert list(frame["variant"]) == names
    assert frame[column].to_numpy() == pytest.approx(values, rel=2e-6, abs=1e-5)
    assert np.std(values) > 100 * 1e-5
    said = json.loads(capsys.readouterr().out)
    sign = -1 if method == "pseudo-perplexity" else 1
    assert said["spearman"] == pytest.approx(sign * spearmanr(values, measured)[0])
    low, high = said["spearman_ci"]
    assert said["n"] == count and low <= said["spearman"] <= high and low < high


def test_sequences_instead_of_variants(plain: Path, wild: Path, tmp_path: Path) -> None:
    names = [name for name in variants(40) if name != "WT"]
    rows = pd.DataFrame({"variant": names})
    rows["seq"] = [
        "".join({each.index: each.mutant for each in parse_variant(name, WILD)}.get(i, a) for i, a in enumerate(WILD))
        for name in names
    ]
    rows.to_parquet(tmp_path / "dms.parquet")
    columns = VariantColumns(sequence="seq")
    for method in ("masked-marginal", "wild-type-marginal"):
        given = (str(plain), tmp_path / "dms.parquet")
        score(*given, tmp_path / "a.parquet", method, wild_type=wild)
        score(*given, tmp_path / "b.parquet", method, wild_type=wild, columns=columns)
        one, other = (pd.read_parquet(tmp_path / f"{name}.parquet")[method.replace("-", "_")] for name in "ab")
        assert one.to_numpy() == pytest.approx(other.to_numpy(), abs=1e-6)
    longer = pd.DataFrame({"seq": [WILD + "ACD", WILD[:-3], WILD]})
    longer.to_json(tmp_path / "longer.jsonl", orient="records", lines=True)
    score(str(plain), tmp_path / "longer.jsonl", tmp_path / "c.jsonl", "pseudo-perplexity", columns=columns)
    last = json.loads((tmp_path / "c.jsonl").read_text().splitlines()[-1])
    assert last["sequence"] == WILD
    assert last["pseudo_perplexity"] == pytest.approx(Reference(plain).perplexity("WT"), rel=1e-5)
    with pytest.raises(DataError, match=r"longer.jsonl:1: the sequence has 43 residues, the wild type 40"):
        score(str(plain), tmp_path / "longer.jsonl", tmp_path / "d.csv", wild_type=wild, columns=columns)


def test_a_run_scores_with_its_adapter(plain: Path, wild: Path, toy: Toy, tmp_path: Path) -> None:
    model = {"name": str(plain), "init": "pretrained"}
    cfg = toy(task={"name": "masked_lm"}, model=model, optim={"lr": 1e-2}, loop={"max_steps": 4})
    run.train(cfg, str)
    export(Path(cfg.output), tmp_path / "merged")
    table = tmp_path / "dms.csv"
    pd.DataFrame({"variant": variants(30)}).to_csv(table, index=False)
    score(cfg.output, table, tmp_path / "run.csv", wild_type=wild)
    merged = Reference(tmp_path / "merged")
    found = pd.read_csv(tmp_path / "run.csv")["masked_marginal"].to_numpy()
    assert found == pytest.approx([merged.marginal(name, masked=True) for name in variants(30)], abs=5e-4)
    base = Reference(plain)
    assert np.abs(found - [base.marginal(name, masked=True) for name in variants(30)]).max() > 1e-2


def test_every_bad_variant_is_named_with_its_place(plain: Path, wild: Path, tmp_path: Path) -> None:
    bad = {
        "A42G": "residue 42 is outside 1 to 40 of the wild type; correct it or --first-residue",
        "A1G": "the wild type has M at residue 1, not A; correct it, --wild-type or --first-residue",
        "K2*": "a stop codon has no likelihood in the model; remove the row",
        "K2K": "substitutes nothing; write WT for the wild type",
        "K2X": "X is no standard amino acid",
        "K2": "is not a substitution; write A42G, several joined by ':', or WT for none",
        "K2A:K2R": "substitutes residue 2 twice; keep one",
        "": "the variant is empty; fill it in",
    }
    table = tmp_path / "dms.csv"
    for text, expected in bad.items():
        table.write_text(f'variant,other\nK2A,1\n"{text}",1\n')
        with pytest.raises(DataError) as caught:
            score(str(plain), table, tmp_path / "out.csv", wild_type=wild)
        assert str(caught.value).startswith(f"{table}:3: ") and expected in str(caught.value)
        assert "\n" not in str(caught.value) and "--data.on_bad_residue skip" in str(caught.value)
    table.write_text("variant,value\n" + "".join(f'"{text}",1\n' for text in bad) + "K2A,NaN\nT3C,2\n")
    with pytest.raises(DataError, match="8 problems"):
        score(str(plain), table, tmp_path / "out.csv", wild_type=wild)
    said: list[str] = []
    found = score(
        str(plain),
        table,
        tmp_path / "out.csv",
        wild_type=wild,
        columns=VariantColumns(score="value"),
        settings=("--data.on_bad_residue=skip",),
        log=said.append,
    )
    assert (
        "10 rows; 8 skipped because they cannot be scored; WARNING: what follows is of 20% of the rows alone; 1 w"
        in said[0]
    )
    skip = ("--data.on_bad_residue=skip",)
    score(str(plain), table, tmp_path / "plain.csv", wild_type=wild, settings=skip, log=said.append)
    assert not any("measured" in line for line in said[1:]), "no measured values were asked for"
    rejected = (tmp_path / "out.csv.rejected.tsv").read_text().splitlines()
    assert len(rejected) == 9 and "A42G" in rejected[1] and "outside 1 to 40" in rejected[1]
    assert found == {
        "method": "masked-marginal",
        "rows": 2,
        "left_out": 8,
        "n": 1,
        "spearman": None,
        "spearman_ci": None,
    }
    table.write_text("variant,value\nK2A,high\n")
    with pytest.raises(DataError, match=r":2: column 'value' has 'high', which is not a number"):
        score(str(plain), table, tmp_path / "o.csv", wild_type=wild, columns=VariantColumns(score="value"))


def test_what_cannot_score_is_refused(plain: Path, wild: Path, toy: Toy, tmp_path: Path) -> None:
    table = tmp_path / "dms.csv"
    table.write_text("variant\nK102A\n")
    out = tmp_path / "out.csv"
    score(str(plain), table, out, wild_type=wild, first_residue=101)
    assert len(pd.read_csv(out)) == 1
    two = tmp_path / "two.fasta"
    two.write_text(f">a\n{WILD}\n>b\n{WILD}\n")
    cfg = toy(loop={"max_steps": 1})
    run.train(cfg, str)
    short = ("--data.max_residues=30", "--data.pack_tokens=32")
    cases: list[tuple[Callable[[], object], type[EsmNeuronError], str]] = [
        (lambda: score(str(plain), table, out), ConfigError, "needs the wild type; give --wild-type FILE"),
        (lambda: score(str(plain), table, out, wild_type=two), DataError, "holds 2 proteins; give a file with the one"),
        (lambda: score(cfg.output, table, out, wild_type=wild), ConfigError, "trained for sequence_classification"),
        (
            lambda: score(str(plain), table, out, wild_type=wild, settings=short),
            DataError,
            "40 residues, more than data.max_residues=30; give --data.max_residues 40 --data.pack_tokens 42",
        ),
        (
            lambda: score(str(plain), table, out, wild_type=wild, settings=("--data.on_bad_residue=replace",)),
            ConfigError,
            "a variant cannot be replaced; use strict, or skip",
        ),
        (
            lambda: score(str(plain), table, out, wild_type=wild, columns=VariantColumns(variant="mutant")),
            DataError,
            "no column 'mutant' (--variant-column)",
        ),
    ]
    for act, kind, expected in cases:
        with pytest.raises(kind) as caught:
            act()
        assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_interval_of_a_rank_correlation_is_that_of_scipy_on_drawn_rows() -> None:
    rng = np.random.default_rng(1)
    one = rng.integers(0, 8, 40).astype(float)  # with ties
    other = one + rng.normal(0, 3, 40)
    drawn = []
    for counts in resamples(40, SEED):
        for times in counts.astype(int):
            drawn.append(spearmanr(np.repeat(one, times), np.repeat(other, times))[0])
    assert len(drawn) == RESAMPLES
    found = rank_correlation(one, other)
    assert found["spearman"] == pytest.approx(spearmanr(one, other)[0])
    assert found.drawn["spearman"] == pytest.approx(drawn)
    assert found["spearman_ci"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.03)
    # twenty variants at each site that share its effect are one row each
    sites = np.repeat(np.arange(40), 20)
    many = rank_correlation(one[sites], other[sites], sites)
    assert many["n_clusters"] == 40 and many["spearman_ci"] == pytest.approx(found["spearman_ci"], abs=0.02)
    low, high = rank_correlation(one[sites], other[sites])["spearman_ci"]
    assert high - low < 0.4 * (found["spearman_ci"][1] - found["spearman_ci"][0])


def test_a_wild_type_residue_that_is_not_known_is_refused(plain: Path, tmp_path: Path) -> None:
    wild = tmp_path / "wild.fasta"
    wild.write_text(f">w\n{WILD[:4]}X{WILD[5:]}\n")
    table = tmp_path / "dms.csv"
    table.write_text(f"variant\n{WILD[1]}2A\nX5A\n")
    with pytest.raises(DataError, match=r":3: 'X5A': the wild type has X there, which is no amino acid"):
        score(str(plain), table, tmp_path / "out.csv", wild_type=wild)
    table.write_text(f"sequence\n{WILD}\n")
    with pytest.raises(DataError, match=r":2: residue 5: the wild type has X there"):
        score(str(plain), table, tmp_path / "out.csv", wild_type=wild, columns=VariantColumns(sequence="sequence"))
    table.write_text(f"variant\n{WILD[1]}2A\n")
    assert score(str(plain), table, tmp_path / "out.csv", wild_type=wild)["rows"] == 1, "elsewhere X is context"
