"""What an interval draws: families of homologs, positions of variants, else proteins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from esm_neuron.config import TrainConfig
from esm_neuron.data.alignment import Proteins
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.families import independent_units, mutated_positions
from esm_neuron.data.nearest import find_nearest
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.inference.evaluate import evaluate
from esm_neuron.training import run

LETTERS = np.array(list("LAGVSERTIDPKQNFYMHWC"))


def protein(rng: np.random.Generator, n: int) -> str:
    return "".join(rng.choice(LETTERS, n))


def changed(rng: np.random.Generator, text: str, share: float) -> str:
    return "".join(rng.choice(LETTERS) if rng.random() < share else c for c in text)


def of(sequences: list[str]) -> ExampleTable:
    return ExampleTable.of(*encode_many(sequences))


def test_families_are_units_and_strangers_are_one_each() -> None:
    rng = np.random.default_rng(0)
    ancestors = [protein(rng, int(n)) for n in rng.integers(90, 200, 12)]
    family = np.repeat(np.arange(12), 4)
    table = of([changed(rng, ancestors[i], 0.2) for i in family] + [protein(rng, 120) for _ in range(10)])
    units = independent_units(table, "kmer")
    assert units is not None
    for i in range(12):
        assert len(set(units[:48][family == i].tolist())) == 1
    assert len(set(units.tolist())) == 22
    assert independent_units(table, "off") is None
    assert independent_units(of([protein(rng, 120) for _ in range(30)]), "kmer") is None, "all are strangers"
    assert independent_units(of([changed(rng, ancestors[0], 0.2) for _ in range(10)]), "kmer") is None, "one family"


def mutants(rng: np.random.Generator, wild: str, n: int, most: int = 2) -> tuple[list[str], list[int]]:
    """Variants, and the first position, from 1, of each."""
    rows, first = [], []
    for _ in range(n):
        row = list(wild)
        at = rng.choice(len(wild), rng.integers(1, most + 1), replace=False)
        for i in at:
            row[i] = rng.choice([c for c in LETTERS if c != wild[i]])
        rows.append("".join(row))
        first.append(int(min(at)) + 1)
    return rows, first


def test_variants_of_one_protein_are_drawn_by_position() -> None:
    rng = np.random.default_rng(0)
    wild = protein(rng, 42)
    rows, first = mutants(rng, wild, 200)
    units = independent_units(of([*rows, wild]), "kmer")
    assert units is not None and units.tolist() == [*first, 0]
    # two proteins and their variants in one file, beside strangers
    other = protein(rng, 60)
    more, second = mutants(rng, other, 100)
    units = independent_units(of([*rows, *more, *(protein(rng, 80) for _ in range(5))]), "kmer")
    assert units is not None
    names = [("a", i) for i in first] + [("b", i) for i in second] + [("c", i) for i in range(5)]
    assert len(set(zip(names, units.tolist(), strict=True))) == len(set(names)) == len(set(units.tolist()))


def test_proteins_of_one_length_are_not_variants_for_that() -> None:
    rng = np.random.default_rng(0)
    strangers = Proteins.of(of([protein(rng, 50) for _ in range(40)]))
    assert mutated_positions(strangers, np.arange(40)) is None
    assert mutated_positions(Proteins.of(of(mutants(rng, protein(rng, 50), 10)[0])), np.arange(10)) is None, "too few"


def test_a_library_of_a_few_sites_is_drawn_by_protein() -> None:
    rng = np.random.default_rng(0)
    wild = protein(rng, 56)
    rows = []
    for _ in range(100):  # as GB1: four sites, all of them changed
        row = list(wild)
        for i in (38, 39, 40, 53):
            row[i] = rng.choice([c for c in LETTERS if c != wild[i]])
        rows.append("".join(row))
    assert independent_units(of(rows), "kmer") is None


def test_the_nearest_of_one_length_is_the_one_with_the_most_equal_places() -> None:
    rng = np.random.default_rng(0)
    wild = protein(rng, 30)
    targets, _ = mutants(rng, wild, 60, 6)
    queries, _ = mutants(rng, wild, 25, 6)
    found = find_nearest(*(Proteins.of(of(rows)) for rows in (queries, targets)))
    equal = np.array([[sum(a == b for a, b in zip(q, t, strict=True)) for t in targets] for q in queries])
    assert found.target.tolist() == equal.argmax(1).tolist()
    assert found.identity.tolist() == (equal.max(1) / 30).tolist()


def test_the_nearest_of_other_lengths_is_the_relative() -> None:
    rng = np.random.default_rng(0)
    ancestors = [protein(rng, int(n)) for n in rng.integers(90, 200, 20)]
    targets = of([changed(rng, a, 0.1) for a in ancestors])
    queries = of([*(changed(rng, a, 0.1)[3:] for a in ancestors), protein(rng, 120)])
    found = find_nearest(Proteins.of(queries), Proteins.of(targets))
    assert found.target.tolist() == [*range(20), -1]
    assert (found.diagonal[:20] == -3).all(), "three residues were cut off"
    assert ((found.identity[:20] > 0.7) & (found.identity[:20] < 0.95)).all() and found.identity[20] == 0


def test_evaluate_draws_families_or_single_proteins_as_it_is_told(
    toy: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    cfg = toy(loop={"max_steps": 1}, log={"baselines": False})
    run.train(cfg, str)
    rng = np.random.default_rng(3)
    ancestors = [protein(rng, 60) for _ in range(12)]
    sequences = [changed(rng, ancestors[i // 3], 0.1) for i in range(36)]
    rows = {"id": [f"p{i}" for i in range(36)], "sequence": sequences, "label": ["alpha", "beta"] * 18}
    pd.DataFrame(rows).to_csv(tmp_path / "families.csv", index=False)
    drawn = {
        how: evaluate(cfg.output, tmp_path / "families.csv", None, overrides=[f"--data.homologs={how}"])
        for how in ("kmer", "off")
    }
    assert drawn["kmer"]["n_clusters"] == 12 and "n_clusters" not in drawn["off"]
    assert drawn["kmer"]["loss"] == drawn["off"]["loss"] and drawn["kmer"]["loss_ci"] != drawn["off"]["loss_ci"]
