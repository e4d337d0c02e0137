"""Homologs and clusters by k-mers and by MMseqs2 (a stand-in), on proteins whose family is known."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.homology import find_clusters, find_homologs
from esm_neuron.data.tokenizer import encode_many
from esm_neuron.errors import DataError

RESIDUES = list("ACDEFGHIKLMNPQRSTVWY")


def protein(rng: np.random.Generator, length: int = 300) -> str:
    return "".join(rng.choice(RESIDUES, length))


def mutated(sequence: str, rng: np.random.Generator, kept: float) -> str:
    change = rng.random(len(sequence)) > kept
    return "".join(rng.choice(RESIDUES) if c else s for s, c in zip(sequence, change, strict=True))


def table(sequences: list[str], pieces: int = 1) -> ExampleTable:
    """Each sequence as one example, or as so many windows."""
    cut = [s[i * len(s) // pieces : (i + 1) * len(s) // pieces] for s in sequences for i in range(pieces)]
    tokens, offsets = encode_many(cut)
    record = np.repeat(np.arange(len(sequences)), pieces)
    return ExampleTable(
        tokens, offsets, record, np.ones(len(cut), np.float32), np.empty(0), [str(i) for i in range(len(sequences))]
    )


@pytest.mark.parametrize("pieces", [1, 3])
def test_homologues_are_found_and_random_proteins_are_not(pieces: int) -> None:
    rng = np.random.default_rng(0)
    train = [protein(rng) for _ in range(200)]
    homologs = [mutated(sequence, rng, 0.75) for sequence in train[:50]]
    strangers = [protein(rng) for _ in range(200)]
    found = find_homologs(table(homologs + strangers, pieces), table(train, pieces), "kmer")
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
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/words\ncp queries.fasta {folder}/q\n{body}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_mmseqs_is_called_and_its_output_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "printf '2\\t0\\n0\\t1\\n' > found.tsv")
    three, two = table(["MKV", "AAA", "CCC"]), table(["MKV", "DDD"])
    assert find_homologs(three, two, "mmseqs").tolist() == [True, False, True]
    words = (tmp_path / "words").read_text()
    assert words.startswith("easy-search queries.fasta targets.fasta found.tsv scratch --min-seq-id 0.3 -c 0.8 --cov")
    assert (tmp_path / "q").read_text() == ">0\nMKV\n>1\nAAA\n>2\nCCC\n"
    assert find_clusters(three, "mmseqs").tolist() == [0, 0, 0]


def test_mmseqs_that_fails_or_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "echo 'no space' >&2; exit 3")
    with pytest.raises(DataError, match="^mmseqs ended with 3: no space$"):
        find_homologs(table(["MKV"]), table(["MKV"]), "mmseqs")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(DataError, match="there is no program mmseqs on PATH; install MMseqs2, or use kmer"):
        find_homologs(table(["MKV"]), table(["MKV"]), "mmseqs")
