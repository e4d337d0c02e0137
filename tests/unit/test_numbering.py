"""Variants numbered from elsewhere: the right number of the first residue is proposed, chance hits are no result."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esm_neuron import cli
from esm_neuron.config import DataConfig
from esm_neuron.errors import DataError
from esm_neuron.inference.score import Query, Scorer
from esm_neuron.inference.variants import Numbering, Row, VariantColumns, VariantTable, mutated, parse_variant

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
WILD = "".join(random.Random(5).choices(LETTERS, k=60))


def names(first: int, count: int = 40, seed: int = 0) -> list[str]:
    """Single and double substitutions of WILD, whose first residue has the number `first`."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        places = sorted(rng.sample(range(len(WILD)), rng.choice((1, 1, 2))))
        found.append(":".join(f"{WILD[i]}{i + first}{rng.choice(LETTERS.replace(WILD[i], ''))}" for i in places))
    return found


def read(path: Path, texts: list[str], first: int = 1, mode: str = "strict") -> VariantTable:
    path.write_text("variant\n" + "".join(f'"{text}"\n' for text in texts))
    cfg = DataConfig(on_bad_residue=mode)  # type: ignore[arg-type]
    table = VariantTable(path, VariantColumns(), cfg, WILD, first, True, 10**9, lambda row, seen: 1)
    list(table())
    return table


@pytest.mark.parametrize("mode", ["strict", "skip"])
@pytest.mark.parametrize("shift", [1, -1, 2, 5, 24, 100, 500, -3, 30, 1000])
def test_another_numbering_is_proposed_and_works(tmp_path: Path, shift: int, mode: str) -> None:
    texts = (
        names(1 + shift) if shift > 0 else [name for name in names(1) if all(int(p[1:-1]) > 3 for p in name.split(":"))]
    )
    first = 1 if shift > 0 else 1 - shift
    right = 1 + shift if shift > 0 else 1
    with pytest.raises(DataError, match=rf"whose first residue is {first}, .*give --first-residue {right}$"):
        read(tmp_path / "a.csv", texts, first, mode)
    assert not read(tmp_path / "a.csv", texts, right, mode).rejected


@given(first=st.integers(-50, 2000), seed=st.integers(0, 999))
def test_the_right_number_is_found(first: int, seed: int) -> None:
    numbering = Numbering(WILD)
    for name in names(max(first, 1), 60, seed):
        numbering.add(name)
    assert numbering.better(max(first, 1)) is None
    said = numbering.better(max(first, 1) + 7)
    assert said is not None and said.endswith(f"--first-residue {max(first, 1)}")


def test_some_wrong_names_are_no_other_numbering(tmp_path: Path) -> None:
    good = names(1, 30)
    with pytest.raises(DataError, match=r"a.csv:2: .*the wild type has"):
        read(tmp_path / "a.csv", [f"{'A' if WILD[0] != 'A' else 'C'}1G", *good])
    table = read(tmp_path / "a.csv", ["K900A", "x", *good], mode="skip")
    assert len(table.rejected) == 2 and "WARNING" not in table.summary()


def test_a_small_share_is_warned_of(tmp_path: Path) -> None:
    table = read(tmp_path / "a.csv", ["nonsense"] * 30 + names(1, 10), mode="skip")
    assert "30 skipped because they cannot be scored; WARNING: what follows is of 25% of the rows" in table.summary()


@pytest.mark.parametrize("between", [":", ";", ",", "/", "+", "; ", " : "])
def test_substitutions_are_joined_as_people_join_them(between: str) -> None:
    text = between.join([f"{WILD[3]}4{'A' if WILD[3] != 'A' else 'C'}", f"{WILD[9]}10{'A' if WILD[9] != 'A' else 'C'}"])
    assert [each.index for each in parse_variant(text, WILD)] == [3, 9]


def test_single_sites_are_masked_one_at_a_time_and_once() -> None:
    rng = np.random.default_rng(0)
    table = np.log(rng.dirichlet(np.ones(33), len(WILD)))
    asked: list[int] = []

    def model(queries: list[Query]) -> Iterator[np.ndarray]:
        for query in queries:
            assert len(query.sites) == 1 and (query.tokens == 32).sum() == 1
            asked.extend(query.sites.tolist())
        return [table[query.sites] for query in queries]  # type: ignore[return-value]

    scorer = Scorer("single-site-marginal", WILD)
    rows = []
    for name in [*names(1, 20), "WT"]:
        variant = parse_variant(name, WILD)
        rows.append(Row(name, variant, mutated(WILD, variant), float("nan")))
    values = scorer(rows[:10], model) + scorer(rows[10:], model)  # type: ignore[arg-type]
    assert len(asked) == len(set(asked)) == len({each.index for row in rows for each in row.variant})
    from esm_neuron.data.tokenizer import VOCABULARY

    for row, value in zip(rows, values, strict=True):
        expected = sum(
            table[each.index, VOCABULARY.index(each.mutant)] - table[each.index, VOCABULARY.index(each.wild)]
            for each in row.variant
        )
        assert value == pytest.approx(expected)


def test_proteingym_by_its_own_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = tmp_path / "wt.fasta"
    wild.write_text(f">WT\n{WILD}*\n")
    texts = list(dict.fromkeys(names(1, 12)))
    frame = pd.DataFrame({
        "mutant": texts,
        "mutated_sequence": [mutated(WILD, parse_variant(text, WILD)) for text in texts],
        "DMS_score": np.linspace(-1, 1, len(texts)),
        "DMS_score_bin": [0, 1] * (len(texts) // 2) + [0] * (len(texts) % 2),
    })  # fmt: skip
    frame.to_csv(tmp_path / "dms.csv", index=False)
    words = f"score --model mini --wild-type {wild} --input {tmp_path}/dms.csv --output {tmp_path}/out.csv"
    columns = "--variant-column mutant --score-column DMS_score --method single-site-marginal"
    assert cli.main(f"{words} {columns}".split()) == 0
    assert list(pd.read_csv(tmp_path / "out.csv")["variant"]) == texts
    wild.write_text(f">WT\n{WILD[:20]}J{WILD[21:]}\n")
    assert cli.main([*words.split(), "--variant-column", "mutant"]) == 2
    said = capsys.readouterr().err
    assert "'J' (leucine or isoleucine) at residue 21" in said and "on_bad_residue" not in said


def measured(path: Path, values: list[str], mode: str = "strict") -> list[float]:
    texts = names(1, len(values))
    path.write_text("mutant;DMS_score\n" + "".join(f"{t};{v}\n" for t, v in zip(texts, values, strict=True)))
    columns = VariantColumns("mutant", score="DMS_score")
    cfg = DataConfig(on_bad_residue=mode)  # type: ignore[arg-type]
    table = VariantTable(path, columns, cfg, WILD, 1, True, 10**9, lambda row, seen: 1)
    for _ in range(2):  # it is read more than once
        found = [row.measured for piece in table() for row in piece.content]
    return found


@pytest.mark.parametrize("mode", ["strict", "skip"])
def test_measured_values_have_decimal_commas_as_in_training(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.csv"
    assert measured(path, ["0,42", "-1,5", "3", "1e2", "2,5e-1"], mode) == [0.42, -1.5, 3, 100, 0.25]
    assert measured(path, ["1.234", "0.5"], mode) == [1.234, 0.5]
    for values, said in ((["0,42", "1.5"], "'0,42' has a comma, '1.5' has a point"), (["1,234", "2"], "of thousands")):
        with pytest.raises(DataError, match=rf"a.csv: column 'DMS_score': .*{said}; write 1234.5 everywhere$"):
            measured(path, values, mode)


def test_sites_of_earlier_pieces_are_not_asked_for_again(tmp_path: Path) -> None:
    wild, rng = "MKTAYIAKQR", np.random.default_rng(0)

    def variant() -> str:
        places = sorted(rng.choice(10, 2, replace=False).tolist())
        return ":".join(f"{wild[i]}{i + 1}{'CDEFGH'[int(rng.integers(6))]}" for i in places)

    names = [variant() for _ in range(400)]
    path = tmp_path / "v.csv"
    path.write_text("variant\n" + "\n".join(names) + "\n")
    asked: list[tuple[int, ...]] = []

    def run_model(queries: Any) -> list[np.ndarray]:
        asked.extend(tuple(query.sites.tolist()) for query in queries)
        return [values(query) for query in queries]

    def values(query: Query) -> np.ndarray:
        return np.random.default_rng(query.sites).normal(size=(len(query.sites), 33))

    scorer = Scorer("masked-marginal", wild)
    pieces = list(VariantTable(path, VariantColumns(), DataConfig(), wild, 1, True, 40, scorer.cost)())
    scores = [value for piece in pieces for value in scorer(piece.content, run_model)]
    sets = {tuple(int(part[1:-1]) - 1 for part in name.split(":")) for name in names}
    assert len(pieces) > 5 and len(asked) == len(set(asked)) == len(sets)
    whole = [row for piece in pieces for row in piece.content]
    assert scores == Scorer("masked-marginal", wild)(whole, run_model)
    assert sum(piece.tokens for piece in pieces) == len(sets) * (len(wild) + 2)
