"""The alphabet equals that of transformers and of the original implementation; nothing needs a network."""

from __future__ import annotations

import numpy as np
import pytest

from esm_neuron.data import tokenizer as t
from esm_neuron.errors import DataError


def random_sequences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(t.RESIDUES), size=rng.integers(1, 200))) for _ in range(count)]


def test_ids_equal_those_of_transformers() -> None:
    theirs = t.hf_tokenizer()
    assert len(t.VOCABULARY) == len(theirs) == 33
    for sequence in random_sequences(50):
        assert t.encode_many([sequence])[0].tolist() == theirs(sequence)["input_ids"]
    assert (theirs.cls_token_id, theirs.pad_token_id, theirs.eos_token_id) == (t.CLS, t.PAD, t.EOS)
    assert (theirs.unk_token_id, theirs.mask_token_id) == (t.UNK, t.MASK)


def test_saved_transformers_tokenizer_reads_back(tmp_path) -> None:
    from transformers import EsmTokenizer

    t.hf_tokenizer().save_pretrained(tmp_path)
    assert EsmTokenizer.from_pretrained(tmp_path)("MKVX")["input_ids"] == t.encode_many(["MKVX"])[0].tolist()


def test_ids_equal_those_of_fair_esm() -> None:
    import esm

    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    assert tuple(alphabet.all_toks) == t.VOCABULARY
    batch = [(str(i), sequence) for i, sequence in enumerate(random_sequences(8, seed=1))]
    tokens = alphabet.get_batch_converter()(batch)[2].numpy()
    for row, (_, sequence) in zip(tokens, batch, strict=True):
        assert row[: len(sequence) + 2].tolist() == t.encode_many([sequence])[0].tolist()


def test_many_at_once_equal_one_by_one() -> None:
    sequences = ["", "M", *random_sequences(20)]
    tokens, offsets = t.encode_many(sequences)
    assert tokens.dtype == np.uint8
    for i, sequence in enumerate(sequences):
        one = tokens[offsets[i] : offsets[i + 1]]
        assert one.tolist() == t.encode_many([sequence])[0].tolist()
        assert t.decode(one) == f"<cls>{sequence}<eos>"
    assert t.encode_many([])[1].tolist() == [0]


def test_lower_case_counts_as_upper_case() -> None:
    assert t.encode_many(["mkvLx"])[0].tolist() == t.encode_many(["MKVLX"])[0].tolist()
    assert t.bad_residues("acdefghiklmnpqrstvwyxbuzo") is None


def test_amino_acids_are_the_twenty() -> None:
    assert sorted(t.VOCABULARY[i] for i in t.AMINO_ACIDS) == sorted("ACDEFGHIKLMNPQRSTVWY")


@pytest.mark.parametrize(
    "bad", ["*", "-", ".", "J", "j", " ", "1", "é", "\u017f", "\u212a", "\0", "?", "\U0001f9ec", "<"]
)
def test_other_characters_are_no_residues(bad: str) -> None:
    sequence = f"MK{bad}V{bad}"
    assert t.bad_residues(sequence) == t.BadResidues(3, bad, 2)
    assert t.replace_bad_residues(sequence) == "MKXVX"
    with pytest.raises(DataError, match="at residue 3 is not one of the residues LAGV"):
        t.encode_many(["MKV", sequence])
