"""The ESM-2 alphabet without a network: 33 tokens that never change, and a table from characters to token ids.

The order is that of `vocab.txt` in the ESM-2 repositories of the Hugging Face hub and of fair-esm's alphabet "ESM-1b".
Lower-case residues (soft-masked regions) count as their upper-case letters.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from esm_neuron.errors import DataError
from esm_neuron.files import write_text

if TYPE_CHECKING:
    from transformers import EsmTokenizer

RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO"
"""Letters of a sequence: the 20 amino acids in the order of the vocabulary, then X (any), B, U, Z and O."""

VOCABULARY: tuple[str, ...] = ("<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, ".", "-", "<null_1>", "<mask>")
"""Token i of ESM-2."""

CLS, PAD, EOS, UNK, X, MASK = (VOCABULARY.index(token) for token in ("<cls>", "<pad>", "<eos>", "<unk>", "X", "<mask>"))

AMINO_ACIDS = np.arange(4, 24, dtype=np.uint8)
"""uint8 [20]: ids of the standard amino acids."""

BREAK = "|"
"""Between the chains of one sequence in text: <eos>, as transformers' tokenizer puts it between two sequences."""

_BAD = {chains: re.compile(f"[^{RESIDUES}{RESIDUES.lower()}{BREAK if chains else ''}]") for chains in (False, True)}
_LETTERS = (RESIDUES + RESIDUES.lower()).encode()
_TOKENS = bytearray([UNK]) * 256
for _id, _letter in enumerate(RESIDUES, start=4):
    _TOKENS[ord(_letter)] = _TOKENS[ord(_letter.lower())] = _id
_WITH_BREAKS = bytearray(_TOKENS)
_WITH_BREAKS[ord(BREAK)] = EOS


def encode_many(sequences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of many proteins, see `encode_residues`; raise DataError for a character that is no residue."""
    # "replace" writes one "?" for one character outside ASCII, so positions hold.
    residues = "".join(sequences).encode("ascii", "replace")
    if len(not_residues(residues)):
        bad = next(filter(None, map(bad_residues, sequences)))
        what = f"{bad.character!r} at residue {bad.position}"
        raise DataError(f"{what} is not one of the residues {RESIDUES}; correct it")
    return encode_residues(residues, np.array([len(sequence) for sequence in sequences], dtype=np.int64))


def encode_residues(residues: bytes, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of many proteins, whose letters lie end to end; int64 [proteins] `lengths` counts residues.

    A BREAK between chains counts as one, and becomes <eos>.

    Returns:
        tokens: uint8 [total], <cls>, residues and <eos> of each protein.
        offsets: int64 [proteins + 1]; protein i is `tokens[offsets[i]:offsets[i + 1]]`.
    """
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths + 2, out=offsets[1:])
    tokens = np.empty(offsets[-1], dtype=np.uint8)
    inside = np.ones(len(tokens), dtype=bool)
    for positions, token in ((offsets[:-1], CLS), (offsets[1:] - 1, EOS)):
        tokens[positions] = token
        inside[positions] = False
    tokens[inside] = np.frombuffer(residues.translate(_WITH_BREAKS), dtype=np.uint8)
    return tokens, offsets


def not_residues(text: bytes, chains: bool = False) -> np.ndarray:
    """Return the places of the bytes that are no residue; of `chains`, a BREAK may stand between them."""
    if not text.translate(None, _LETTERS):  # the usual case, at the speed of a copy
        return np.empty(0, dtype=np.int64)
    table = _WITH_BREAKS if chains else _TOKENS
    return np.flatnonzero(np.frombuffer(text.translate(table), dtype=np.uint8) == UNK)


@dataclass(frozen=True)
class BadResidues:
    """The characters of a sequence that are no residue, gaps (. -) and stop codons (*) among them."""

    position: int
    """Residue number of the first of them, from 1, in its chain."""
    character: str
    """The first of them."""
    count: int
    chain: int = 0
    """The number of its chain, from 1; 0 where there is one."""


def bad_residues(sequence: str, chains: bool = False) -> BadResidues | None:
    """Return what in a sequence is no residue, None where all are; holds no more than the first of them."""
    first = _BAD[chains].search(sequence)
    if first is None:
        return None
    start, chain = first.start(), sequence.count(BREAK, 0, first.start()) + 1 if chains else 0
    count = sum(1 for _ in _BAD[chains].finditer(sequence, start))
    return BadResidues(start - sequence.rfind(BREAK, 0, start), first.group(), count, chain)


def replace_bad_residues(sequence: str, chains: bool = False) -> str:
    """Return the sequence with X for every character that is no residue."""
    return _BAD[chains].sub("X", sequence)


def decode(tokens: np.ndarray) -> str:
    """Return the text of token ids, such as `<cls>MKV<eos>`."""
    return "".join(VOCABULARY[token] for token in tokens)


def residues_of(tokens: Sequence[object]) -> str:
    """Return the residues of a tokenized protein without <cls>, <eos> and <pad> around; ValueError for other lists."""
    found = []
    for token in tokens:
        if type(token) is not int or not 0 <= token < VOCABULARY.index("<null_1>") or token == UNK:
            raise ValueError(
                f"{str(token)[:40]!r} is no token of a residue of ESM-2; give its `input_ids`, unmasked, or text"
            )
        found.append(VOCABULARY[token] if token > UNK else " ")
    residues = "".join(found).strip()
    if " " in residues:
        at = residues.index(" ") + 1
        raise ValueError(f"a special token stands behind residue {at - 1}, as between two proteins; give one a record")
    return residues


def hf_tokenizer() -> EsmTokenizer:
    """Return the same alphabet as a transformers tokenizer, to be saved beside an exported model."""
    from transformers import EsmTokenizer

    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "vocab.txt")
        write_text(vocabulary, "\n".join(VOCABULARY))
        return EsmTokenizer(str(vocabulary))
