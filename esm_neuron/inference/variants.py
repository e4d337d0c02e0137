"""Read tables of variants of one protein: `A42G`, or several substitutions joined as `A42G:L50P`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from esm_neuron.config import DataConfig, require
from esm_neuron.data.looks import NO_LABEL
from esm_neuron.data.records import Column, Decimals
from esm_neuron.data.sources import CHUNK_ROWS, read_records
from esm_neuron.data.tokenizer import AMINO_ACIDS, VOCABULARY, bad_residues
from esm_neuron.data.validation import Problems, Rejected, RejectedRows, quote
from esm_neuron.errors import DataError
from esm_neuron.inference.spool import Piece

STANDARD = frozenset(VOCABULARY[token] for token in AMINO_ACIDS)
"""The 20 amino acids."""
LEAST_SITES = 4
"""Distinct substitutions below which a numbering may fit by chance."""
MOST_FIT, LEAST_FIT = 0.9, 0.5
"""Share of substitutions from which another numbering is the right one, and up to which the given one is wrong."""
WARNED = 0.1
"""Share of rows that may be left out without a warning."""
WILD_TYPE = "WT"
"""Name of the protein without a substitution."""

_NO_WILD = (
    "the wild type has {} there, which is no amino acid and hardly ever likely, so that every substitution would seem "
    "to gain; give --wild-type with the real residue, or remove the row"
)
_BETWEEN = re.compile(r"\s*[:;,/+]\s*")
_SUBSTITUTION = re.compile(r"([A-Za-z])([0-9]{1,9})([A-Za-z*=])")


@dataclass(frozen=True)
class Substitution:
    """One residue replaced by another."""

    index: int
    """Position in the sequence, from 0."""
    wild: str
    mutant: str


Variant = tuple[Substitution, ...]
"""In order of position; empty for the wild type."""


def parse_variant(text: str, wild_type: str, first: int = 1) -> Variant:
    """Return the substitutions that a name such as `A42G:L50P` or `WT` stands for.

    `wild_type` is the sequence in upper case, `first` the number of its first residue. Raise ValueError where the name
    is wrong; the message says how and what to do, in one line.
    """
    if text.strip().upper() == WILD_TYPE:
        return ()
    found = [_substitution(part.strip(), wild_type, first) for part in _BETWEEN.split(text)]
    for place, times in Counter(each.index for each in found).items():
        if times > 1:
            raise ValueError(f"{quote(text)} substitutes residue {place + first} twice; keep one")
    return tuple(sorted(found, key=lambda each: each.index))


def _substitution(text: str, wild_type: str, first: int) -> Substitution:
    match = _SUBSTITUTION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{quote(text)} is not a substitution; write A42G, several joined by ':', or {WILD_TYPE} for none"
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
    if wild not in STANDARD:
        raise ValueError(f"{quote(text)}: {_NO_WILD.format(wild)}")
    if mutant == "*":
        raise ValueError(f"{quote(text)}: a stop codon has no likelihood in the model; remove the row")
    if mutant == "=" or mutant == wild:
        raise ValueError(f"{quote(text)}: substitutes nothing; write {WILD_TYPE} for the wild type")
    if mutant not in STANDARD:
        raise ValueError(f"{quote(text)}: {mutant} is no standard amino acid; correct it")
    return Substitution(number - first, wild, mutant)


class Numbering:
    """Tell by which number of the first residue the substitutions of a table fit the wild type."""

    def __init__(self, wild_type: str) -> None:
        self._places: dict[str, list[int]] = {}
        for place, residue in enumerate(wild_type):
            self._places.setdefault(residue, []).append(place)
        self._seen: Counter[tuple[str, int]] = Counter()

    def add(self, text: str) -> None:
        """Note the substitutions that a name has, right or wrong."""
        for match in filter(None, map(_SUBSTITUTION.fullmatch, _BETWEEN.split(text))):
            self._seen[match[1].upper(), int(match[2])] += 1

    def better(self, first: int) -> str | None:
        """Return what to say where another number than `first` fits nearly all substitutions, and `first` does not."""
        votes: Counter[int] = Counter()
        for (residue, number), times in self._seen.items():
            for place in self._places.get(residue, ()):
                votes[number - place] += times
        total = sum(self._seen.values())
        best, fits = max(votes.items(), key=lambda vote: (vote[1], -abs(vote[0] - first)), default=(first, 0))
        if len(self._seen) < LEAST_SITES or fits < MOST_FIT * total or votes[first] > LEAST_FIT * total:
            return None
        return (
            f"{votes[first]} of {total} substitutions fit the wild type whose first residue is {first}, and {fits} if "
            f"it is {best}; give --first-residue {best}"
        )


def difference(sequence: str, wild_type: str) -> Variant:
    """Return the substitutions that turn `wild_type` into `sequence`, both in upper case; else raise ValueError."""
    if len(sequence) != len(wild_type):
        raise ValueError(
            f"the sequence has {len(sequence)} residues, the wild type {len(wild_type)}; marginals are for "
            "substitutions only, use --method pseudo-perplexity"
        )
    pairs = enumerate(zip(wild_type, sequence, strict=True))
    found = tuple(Substitution(i, wild, mutant) for i, (wild, mutant) in pairs if wild != mutant)
    for each in found:
        if each.wild not in STANDARD:
            raise ValueError(f"residue {each.index + 1}: {_NO_WILD.format(each.wild)}")
        if each.mutant not in STANDARD:
            raise ValueError(
                f"{each.mutant!r} at residue {each.index + 1} is not one of the 20 amino acids; correct it"
            )
    return found


def mutated(wild_type: str, variant: Variant) -> str:
    """Return the variant's sequence."""
    residues = list(wild_type)
    for each in variant:
        residues[each.index] = each.mutant
    return "".join(residues)


@dataclass(frozen=True)
class VariantColumns:
    """Which columns of a table are read."""

    variant: str = "variant"
    """Substitutions such as `A42G:L50P`."""
    sequence: str | None = None
    """Whole sequences, which are read instead."""
    score: str | None = None
    """Measured values."""

    @property
    def what(self) -> str:
        """Return which column names a row: `variant` or `sequence`."""
        return "variant" if self.sequence is None else "sequence"

    def wanted(self) -> list[Column]:
        """Return the columns that a table must have."""
        wanted = [Column(self.what, self.sequence or self.variant, f"--{self.what}-column")]
        return wanted + ([Column("score", self.score, "--score-column")] if self.score else [])

    def check(self, table: Path) -> None:
        """Raise DataError where the table is missing or lacks a column; reads no more than its first row."""
        next(read_records(table, self.wanted()), None)


@dataclass(frozen=True)
class Row:
    """A row that can be scored."""

    text: str
    """The variant or the sequence as the table has it."""
    variant: Variant
    """Empty where there is no wild type to compare with."""
    sequence: str
    measured: float
    """NaN where the table has nothing."""


@dataclass
class VariantTable:
    """The rows of a table in its order, cut into pieces: an input of `stream.spooled`."""

    path: Path
    columns: VariantColumns
    cfg: DataConfig
    """For `max_residues`, and what is done with a row that cannot be scored: `on_bad_residue` strict or skip."""
    wild_type: str | None
    """In upper case; None where sequences need none."""
    first: int
    """Number of the wild type's first residue."""
    compare: bool
    """Whether sequences are turned into variants, by comparing them with the wild type."""
    tokens: int
    """Most tokens in a piece of several rows, as `cost` counts them."""
    cost: Callable[[Row, set[tuple[int, ...]]], int]
    """Returns the tokens that the model gets for a row, given the sites of all earlier rows."""
    rows: int = 0
    unmeasured: int = 0
    rejected: RejectedRows = field(default_factory=RejectedRows)
    """The rows that the last reading left out."""
    _decimals: Decimals = field(default_factory=Decimals, repr=False)

    def __post_init__(self) -> None:
        require(
            self.cfg.on_bad_residue != "replace",
            "data.on_bad_residue=replace: a variant cannot be replaced; use strict, or skip to leave such rows out",
        )

    def summary(self) -> str:
        """Return one line about what the last reading found."""
        parts, left_out = [f"{self.rows} rows"], len(self.rejected)
        if left_out:
            parts.append(f"{left_out} skipped because they cannot be scored")
        if left_out > WARNED * self.rows:
            parts.append(f"WARNING: what follows is of {1 - left_out / self.rows:.0%} of the rows alone")
        if self.unmeasured and self.columns.score:
            parts.append(f"{self.unmeasured} without a measured value")
        return f"{self.path}: " + "; ".join(parts)

    def __call__(self) -> Iterator[Piece[list[Row]]]:
        """Yield the pieces. Raise DataError, after the last of them, where the table or a row cannot be used."""
        rows, seen, tokens = list[Row](), set[tuple[int, ...]](), 0
        for row in self._usable():
            cost = self.cost(row, seen)
            if rows and (tokens + cost > self.tokens or len(rows) == CHUNK_ROWS):
                yield Piece(rows, tokens, len(rows))
                rows, tokens = [], 0
            rows.append(row)
            seen.add(tuple(each.index for each in row.variant))
            tokens += cost
        yield Piece(rows, tokens, len(rows))

    def pack(self, content: list[Row]) -> pa.RecordBatch:
        texts = pa.array([row.text for row in content], pa.large_string())
        return pa.RecordBatch.from_pydict({"text": texts, "measured": pa.array([row.measured for row in content])})

    def unpack(self, batch: pa.RecordBatch) -> list[Row]:
        return list(map(self._row, batch["text"].to_pylist(), batch["measured"].to_pylist()))

    def _usable(self) -> Iterator[Row]:
        problems, numbering = Problems(str(self.path)), Numbering(self.wild_type or "")
        self.rows, self.unmeasured, self.rejected, self._decimals = 0, 0, RejectedRows(), Decimals()
        for line, values in read_records(self.path, self.columns.wanted()):
            self.rows += 1
            if self.columns.what == "variant":
                numbering.add(values[0].strip())
            measured = values[1].strip() if self.columns.score else ""
            try:
                row = self._row(values[0].strip(), self._number(measured))
            except ValueError as error:
                if self.cfg.on_bad_residue == "skip":
                    text = values[0].strip()
                    self.rejected.append(Rejected(str(self.path), line, text, str(error), "left out"))
                else:
                    problems.add(line, f"{error}, or leave such rows out with --data.on_bad_residue skip")
                continue
            self.unmeasured += math.isnan(row.measured)
            # After the first problem no row is given, but all are read: the error then lists every problem.
            if not problems.total:
                yield row
        better = numbering.better(self.first)
        if better is not None:  # the rows that fit by chance are no result
            raise DataError(f"{self.path}: {better}")
        if (doubt := self._decimals.doubt()) is not None:
            problems.add(None, f"column {self.columns.score!r}: {doubt}")
        problems.raise_any()
        if self.rows == len(self.rejected):
            raise DataError(
                f"{self.path}: none of its {self.rows} rows can be scored; check --wild-type and the columns"
            )

    def _row(self, text: str, measured: float) -> Row:
        if not text:
            raise ValueError(f"the {self.columns.what} is empty; fill it in")
        if self.columns.what == "variant":
            wild_type = self.wild_type or ""
            variant = parse_variant(text, wild_type, self.first)
            return Row(text, variant, mutated(wild_type, variant), measured)
        sequence = text.upper().rstrip("*")
        bad = bad_residues(sequence)
        if bad is not None:
            where = f"{bad.character!r} at residue {bad.position}"
            raise ValueError(f"the sequence has {where}, outside the ESM alphabet; correct it")
        if len(sequence) > self.cfg.max_residues:
            raise ValueError(f"the sequence has {len(sequence)} residues, more than data.max_residues; raise it")
        return Row(text, difference(sequence, self.wild_type or "") if self.compare else (), sequence, measured)

    def _number(self, text: str) -> float:
        if text.lower() in NO_LABEL:
            return math.nan
        value = self._decimals.read(text)
        if not math.isfinite(value):
            raise ValueError(f"column {self.columns.score!r} has {quote(text)}, which is not a number; correct it")
        return value
