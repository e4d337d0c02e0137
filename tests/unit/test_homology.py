"""Homologs and clusters by k-mers and by MMseqs2 (a stand-in), on proteins whose family is known."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from esm_neuron.config import DataConfig, TrainConfig
from esm_neuron.data import alignment, homology
from esm_neuron.data.alignment import Pairs, Proteins
from esm_neuron.data.dataset import ExampleTable, chunk_table
from esm_neuron.data.homology import find_clusters, find_homologs, too_short
from esm_neuron.data.tokenizer import RESIDUES as RESIDUES_OF
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.data.validation import Problems
from esm_neuron.errors import DataError
from esm_neuron.training import final_eval

RESIDUES = list("ACDEFGHIKLMNPQRSTVWY")


def protein(rng: np.random.Generator, length: int = 300) -> str:
    return "".join(rng.choice(RESIDUES, length))


def mutated(sequence: str, rng: np.random.Generator, kept: float) -> str:
    change = rng.random(len(sequence)) > kept
    return "".join(rng.choice(RESIDUES) if c else s for s, c in zip(sequence, change, strict=True))


def table(sequences: list[str], window: int | None = None) -> ExampleTable:
    """Each sequence as one example, or as windows of so many residues that share 20, as `data.long_sequences` cuts."""
    if window is None:
        return ExampleTable.of(*encode_many(sequences))
    cfg = DataConfig(max_residues=window, window_overlap=20, long_sequences="window")
    text = pa.large_string()
    rows = pa.table({"id": pa.array(map(str, range(len(sequences))), text), "sequence": pa.array(sequences, text)})
    return chunk_table(rows, cfg, None, Problems("test"))[0]


@pytest.mark.parametrize("window", [None, 120])
def test_homologues_are_found_and_random_proteins_are_not(window: int | None) -> None:
    rng = np.random.default_rng(0)
    train = [protein(rng) for _ in range(200)]
    homologs = [mutated(sequence, rng, 0.75) for sequence in train[:50]]
    strangers = [protein(rng) for _ in range(200)]
    found = find_homologs(table(homologs + strangers, window), table(train, window), "kmer")
    assert found[:50].mean() > 0.9
    assert not found[50:].any()


def test_a_homolog_has_about_the_same_length() -> None:
    rng = np.random.default_rng(0)
    sequence = protein(rng)
    parts = table([sequence, sequence[:245], sequence[:230], sequence[:5]])
    assert find_homologs(parts, table([sequence, protein(rng)]), "kmer").tolist() == [True, True, False, False]


def test_residues_that_two_windows_share_count_once() -> None:
    rng = np.random.default_rng(0)
    sequence = protein(rng, 520)

    def windows(sequence: str, size: int = 510) -> ExampleTable:
        """As `data.long_sequences=window` cuts it, with the most that two can share."""
        cut = [sequence[:size], sequence[-size:]] if len(sequence) > size else [sequence]
        tokens, offsets = encode_many(cut)
        ones, length = np.ones(len(cut), np.float32), np.array([len(sequence)], np.int32)
        return ExampleTable(tokens, offsets, np.zeros(len(cut), np.int64), ones, np.empty(0), ["a"], residues=length)

    copy = mutated(sequence[:505], rng, 0.9)
    assert find_homologs(windows(copy), windows(sequence), "kmer").tolist() == [True]
    assert find_homologs(windows(sequence), windows(copy), "kmer").tolist() == [True]
    assert find_homologs(windows(sequence[:300]), windows(sequence), "kmer").tolist() == [False]


@pytest.mark.parametrize("bias", [0.5, 2.0])
@pytest.mark.parametrize("length", [8, 13, 21, 34, 100, 300, 1000])
def test_chance_makes_no_homologs_at_any_length(length: int, bias: float) -> None:
    rng = np.random.default_rng(length)
    biased = rng.dirichlet(np.full(20, bias), 400)  # each protein has a composition of its own
    train = ["".join(rng.choice(RESIDUES, length, p=share)) for share in biased] + [protein(rng, length)] * 2
    shuffled = ["".join(rng.permutation(list(sequence))) for sequence in train[:300]]
    strangers = [protein(rng, length) for _ in range(300)]
    assert find_homologs(table(shuffled + strangers), table(train), "kmer").mean() <= 0.01


@pytest.mark.parametrize("changes", [0, 1, 2])
def test_short_proteins_of_few_substitutions_are_homologs(changes: int) -> None:
    rng = np.random.default_rng(changes)
    train = [protein(rng, 21) for _ in range(3000)]
    copies = []
    for sequence in train[:200]:
        residues = list(sequence)
        for place in rng.choice(21, changes, replace=False).tolist():
            residues[place] = "W" if residues[place] != "W" else "P"
        copies.append("".join(residues))
    assert find_homologs(table(copies), table(train), "kmer").mean() >= 0.98


def test_windows_of_one_protein_are_homologs() -> None:
    rng = np.random.default_rng(0)
    whole = protein(rng, 2000)
    windows = [whole[i : i + 21] for i in range(0, 1900, 7)]
    assert find_homologs(table(windows[::2]), table(windows[1::2]), "kmer").mean() >= 0.98
    assert not find_homologs(table([protein(rng, 21) for _ in range(200)]), table(windows), "kmer").any()


@pytest.mark.parametrize("sequence", ["MKV", "GAGA", "AAAAAAAAAAAAAAAAAAAAAAAA", "XXAXXAXXAXXAXX"])
def test_a_copy_is_a_homolog_however_short_or_plain(sequence: str) -> None:
    rng = np.random.default_rng(0)
    others = [protein(rng, 30) for _ in range(50)]
    assert find_homologs(table([sequence, others[0][::-1]]), table([*others, sequence]), "kmer").tolist() == [
        True,
        False,
    ]
    assert len(set(find_clusters(table([sequence, *others, sequence]), "kmer").tolist())) == 51


def test_a_homolog_with_gaps_is_found() -> None:
    rng = np.random.default_rng(0)
    train = [protein(rng, 240) for _ in range(100)]
    gapped = [
        s[:40] + s[52:110] + protein(rng, 9) + s[110:180] + s[187:] for s in (mutated(s, rng, 0.6) for s in train)
    ]
    assert find_homologs(table(gapped), table(train), "kmer").mean() >= 0.85


def test_equal_residues_in_a_biased_composition_are_no_homology() -> None:
    rng = np.random.default_rng(0)
    rich = ["".join(rng.choice(list("KE"), 60)) for _ in range(200)]
    assert find_homologs(table(rich[:100]), table(rich[100:]), "kmer").mean() <= 0.05


def test_proteins_too_short_to_judge_are_named() -> None:
    train = table(["MKVAAAC"] * 10_000)
    assert too_short(table(["MKVAA", "MKVAAACDEF"]), train).tolist() == [True, False]


def test_the_alignment_is_that_of_smith_and_waterman() -> None:
    """Score, equal residues and extent of a gapped alignment against the plain dynamic programme."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        one = protein(rng, 60)
        other = mutated(one[:25] + one[28:], rng, 0.7)
        proteins = Proteins.of(table([one])), Proteins.of(table([other]))
        pair = Pairs(*np.zeros((3, 1), np.int64))
        best = max(int(cells.max()) for _, cells in alignment._band(*proteins, pair, 70, packed=False))
        assert best == smith_waterman(one, other)
        equal, rows, columns = (int(found[0]) for found in alignment._best(*proteins, pair, 70))
        assert equal <= min(rows, columns) <= 60


def smith_waterman(one: str, other: str) -> int:
    """The best local score with affine gaps, cell by cell (Gotoh 1982, J Mol Biol 162:705)."""
    score = {(a, b): int(alignment.SCORES[RESIDUES_OF.index(a), RESIDUES_OF.index(b)]) for a in one for b in other}
    n = len(other) + 1
    before, down, best = [0] * n, [-(10**6)] * n, 0
    for a in one:
        now, across = [0] * n, -(10**6)
        for j in range(1, n):
            down[j] = max(before[j] - 11, down[j] - 1)
            across = max(now[j - 1] - 11, across - 1)
            now[j] = max(0, before[j - 1] + score[a, other[j - 1]], down[j], across)
            best = max(best, now[j])
        before = now
    return best


def test_variants_of_one_protein_are_homologs_though_every_kmer_is_common() -> None:
    rng = np.random.default_rng(0)
    wild = protein(rng, 42)
    variants = [wild[:i] + "A" + wild[i + 1 :] for i in range(42)]
    assert find_homologs(table(variants[:10]), table(variants[10:]), "kmer").all()
    assert set(find_clusters(table(variants), "kmer").tolist()) == {0}


def test_clusters_are_families_linked_through_homologs() -> None:
    rng = np.random.default_rng(1)
    founders = [protein(rng) for _ in range(30)]
    children = [mutated(sequence, rng, 0.8) for sequence in founders[:10]]
    grandchildren = [mutated(sequence, rng, 0.8) for sequence in children]
    found = find_clusters(table(founders + children + grandchildren), "kmer")
    family = np.r_[np.arange(30), np.arange(10), np.arange(10)]
    assert len(set(found.tolist())) == 30
    assert len({(a, b) for a, b in zip(found.tolist(), family.tolist(), strict=True)}) == 30


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A program `mmseqs` that notes its words."""
    program = folder / "mmseqs"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/words\ncp 0.fasta {folder}/q\n{body}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_mmseqs_is_called_and_its_output_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "printf '2\\t0\\n0\\t1\\n' > found")
    three, two = table(["MKV", "AAA", "CCC"]), table(["MKV", "DDD"])
    assert find_homologs(three, two, "mmseqs").tolist() == [True, False, True]
    words = (tmp_path / "words").read_text()
    assert words.startswith("easy-search 0.fasta 1.fasta found scratch --min-seq-id 0.3 -c 0.8 --cov")
    assert (tmp_path / "q").read_text() == ">0\nMKV\n>1\nAAA\n>2\nCCC\n"
    assert find_clusters(three, "mmseqs").tolist() == [0, 0, 0]


@pytest.mark.parametrize("searched", [homology.SEARCHED, 10])
def test_clusters_by_the_real_mmseqs(searched: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By search, and by linclust as above SEARCHED proteins: close homologs are together, strangers apart."""
    if shutil.which("mmseqs") is None:
        pytest.skip("MMseqs2 is not installed (Debian's package mmseqs2)")
    monkeypatch.setattr(homology, "SEARCHED", searched)
    rng = np.random.default_rng(3)
    founders = [protein(rng) for _ in range(30)]
    found = find_clusters(table(founders + [mutated(sequence, rng, 0.9) for sequence in founders]), "mmseqs")
    assert found[:30].tolist() == found[30:].tolist() and len(set(found.tolist())) == 30


def test_mmseqs_that_fails_or_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "echo 'no space' >&2; exit 3")
    with pytest.raises(DataError, match="^mmseqs ended with 3: no space$"):
        find_homologs(table(["MKV"]), table(["MKV"]), "mmseqs")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(DataError, match="there is no program mmseqs on PATH; install MMseqs2, or use kmer"):
        find_homologs(table(["MKV"]), table(["MKV"]), "mmseqs")


def test_homologs_are_looked_for_once_with_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run, and every one on the same proteins, takes what was found before."""
    rng = np.random.default_rng(7)
    train = [protein(rng) for _ in range(40)]
    tables = {
        "train": table(train),
        "valid": table([*train[:3], protein(rng)]),
        "test": table([protein(rng), train[5]]),
    }
    looked: list[str] = []
    found = homology.find_homologs

    def counted(*given: Any) -> np.ndarray:
        looked.append(given[2])
        return found(*given)

    monkeypatch.setattr(homology, "find_homologs", counted)

    def leaks(**data: Any) -> dict[str, list[bool]]:
        cfg = TrainConfig(data=DataConfig(**data))
        return {split: has.tolist() for split, has in final_eval.find_leaks(cfg, tables, str).items()}

    cache = str(tmp_path / "cache")
    expected = {"valid": [True, True, True, False], "test": [False, True]}
    assert leaks() == leaks(cache=cache) == leaks(cache=cache) == expected and looked == ["kmer"] * 2
    (kept,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    (kept / "valid").write_bytes(b"\0")
    assert leaks(cache=cache) == expected and len(looked) == 3, "what was damaged is looked for again"
    tables["test"] = table([train[5], train[6]])
    assert leaks(cache=cache)["test"] == [True, True] and len(looked) == 4
    monkeypatch.setattr(final_eval, "LONG", 40)
    said: list[str] = []
    final_eval.find_leaks(TrainConfig(), tables, said.append)
    assert "46 proteins in all: about" in said[0]
