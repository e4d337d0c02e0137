"""Variants of one protein: `A42G`, or several substitutions joined as `A42G:L50P`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from esm_neuron.data.tokenizer import AMINO_ACIDS, VOCABULARY
from esm_neuron.data.validate import quote

STANDARD = frozenset(VOCABULARY[token] for token in AMINO_ACIDS)
"""The 20 amino acids."""
WILD_TYPE = "WT"
"""Names the protein without a substitution."""

_SUBSTITUTION = re.compile(r"([A-Za-z])([0-9]{1,9})([A-Za-z*=])")


@dataclass(frozen=True)
class Substitution:
    """One residue exchanged."""

    index: int
    """Place in the sequence, from 0."""
    wild: str
    mutant: str


Variant = tuple[Substitution, ...]
"""By rising place; empty for the wild type."""


def parse_variant(text: str, wild_type: str, first: int = 1) -> Variant:
    """The substitutions that a variant's name tells.

    Args:
        text: such as `A42G:L50P`, or `WT`.
        wild_type: the sequence, in upper case.
        first: number of its first residue.

    Raises:
        ValueError: with what is wrong and its cure, in one line.
    """
    if text.strip().upper() == WILD_TYPE:
        return ()
    found = [_substitution(part.strip(), wild_type, first) for part in text.split(":")]
    for place, times in Counter(each.index for each in found).items():
        if times > 1:
            raise ValueError(f"{quote(text)} exchanges residue {place + first} twice; keep one")
    return tuple(sorted(found, key=lambda each: each.index))


def _substitution(text: str, wild_type: str, first: int) -> Substitution:
    match = _SUBSTITUTION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{quote(text)} is no substitution; write such as A42G, several joined by ':', {WILD_TYPE} for none"
        )
    wild, mutant, number = match[1].upper(), match[3].upper(), int(match[2])
    last = first + len(wild_type) - 1
    if not first <= number <= last:
        raise ValueError(
            f"{quote(text)}: residue {number} is outside {first} to {last} of the wild type; "
            "correct it or --first-residue"
        )
    there = wild_type[number - first]
    if wild != there:
        raise ValueError(
            f"{quote(text)}: the wild type has {there} at residue {number}, not {wild}; "
            "correct it, --wild-type or --first-residue"
        )
    if mutant == "*":
        raise ValueError(f"{quote(text)}: a stop codon, for which the model has no likelihood; remove the row")
    if mutant == "=" or mutant == wild:
        raise ValueError(f"{quote(text)}: exchanges nothing; write {WILD_TYPE} for the wild type")
    if mutant not in STANDARD:
        raise ValueError(f"{quote(text)}: {mutant} is none of the 20 amino acids; correct it")
    return Substitution(number - first, wild, mutant)


def difference(sequence: str, wild_type: str) -> Variant:
    """The substitutions that make `sequence` of `wild_type`, both in upper case.

    Raises:
        ValueError: lengths differ, or a residue is none of the 20 amino acids.
    """
    if len(sequence) != len(wild_type):
        raise ValueError(
            f"the sequence has {len(sequence)} residues, the wild type {len(wild_type)}; marginals know substitutions "
            "only, use --method pseudo-perplexity"
        )
    pairs = enumerate(zip(wild_type, sequence, strict=True))
    found = tuple(Substitution(i, wild, mutant) for i, (wild, mutant) in pairs if wild != mutant)
    for each in found:
        if each.mutant not in STANDARD:
            raise ValueError(f"{each.mutant!r} at residue {each.index + 1} is none of the 20 amino acids; correct it")
    return found


def mutated(wild_type: str, variant: Variant) -> str:
    """The variant's sequence."""
    residues = list(wild_type)
    for each in variant:
        residues[each.index] = each.mutant
    return "".join(residues)
