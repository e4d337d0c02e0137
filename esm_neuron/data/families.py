"""Which proteins of a split are not independent: clusters of homologs, and variants of one protein by position.

Intervals and paired tests draw these units and not single proteins. Variants of one wild type are homologs of each
other, and would be one unit; what their answers share is where they are mutated, so the unit is the first position that
differs from the most frequent residues (the wild type, or next to it).
"""

from __future__ import annotations

import numpy as np

from esm_neuron.data.alignment import OTHER, Proteins
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.homology import MOST, find_clusters

VARIANTS = 20
"""Fewest proteins of one length that may be variants of one protein."""
DIFFERENT = 4
"""Most residues by which half of the variants differ from the wild type."""
LEAST = 5.0
"""Fewest effective units, (sum of sizes)^2 / sum of sizes^2, that are drawn: with fewer, resamples are mostly of how
often the largest unit was drawn."""


def independent_units(table: ExampleTable, homologs: str) -> np.ndarray | None:
    """Return the unit of each protein, int64 [records]; None where proteins are drawn one by one.

    That is where no two share a unit, or nearly all do (below LEAST effective units), or there are more than MOST, or
    `homologs` (`data.homologs`) is `off`. Otherwise they are found by k-mers, which need no program.
    """
    if homologs == "off" or not 1 < len(table.ids) <= MOST:
        return None
    proteins = Proteins.of(table)
    positions = mutated_positions(proteins, np.arange(len(proteins)))
    if positions is None:
        cluster = find_clusters(table, "kmer")
        positions = np.zeros(len(cluster), dtype=np.int64)
        sizes = np.bincount(cluster)
        for number in np.flatnonzero(sizes >= VARIANTS):
            members = np.flatnonzero(cluster == number)
            own = mutated_positions(proteins, members)
            positions[members] = 0 if own is None else own
        pairs = np.stack([cluster, positions], axis=1)
        positions = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    return enough(positions)


def enough(units: np.ndarray) -> np.ndarray | None:
    """Return `units`, int64 [records], where resamples can draw them: some share one, and LEAST are effective."""
    sizes = np.unique(units, return_counts=True)[1].astype(np.float64)
    if len(sizes) == len(units) or sizes.sum() ** 2 / np.square(sizes).sum() < LEAST:
        return None
    return np.asarray(units, dtype=np.int64)


def most_frequent(residues: np.ndarray) -> np.ndarray:
    """Return the most frequent residue at each place of residues uint8 [proteins, length]: the wild type of variants,
    or next to it."""
    counts = np.stack([(residues == kind).sum(0) for kind in range(OTHER + 1)])
    return counts.argmax(0).astype(np.uint8)


def mutated_positions(proteins: Proteins, members: np.ndarray) -> np.ndarray | None:
    """Return the first residue, from 1, at which each of some proteins differs from the wild type, 0 for none.

    int64 [members]; None where they are no variants of one protein: fewer than VARIANTS, of several lengths, or half of
    them differ in more than DIFFERENT residues, or in more than a tenth.
    """
    lengths = proteins.lengths[members]
    if len(members) < VARIANTS or (lengths != lengths[0]).any():
        return None
    residues = proteins.residues[proteins.bounds[members][:, None] + np.arange(lengths[0])]
    different = residues != most_frequent(residues)
    if np.median(different.sum(1)) > min(DIFFERENT, lengths[0] / 10):
        return None
    return np.asarray(np.where(different.any(1), different.argmax(1) + 1, 0))
