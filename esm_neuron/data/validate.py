"""Rows that can be used: ids are unique, sequences are residues, labels are there; all else is named or counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset

from esm_neuron.config import DataConfig
from esm_neuron.data.sources import make_rows
from esm_neuron.data.tokenizer import bad_residues, replace_bad_residues
from esm_neuron.errors import DataError

MOST_LISTED = 20
"""Problems that an error lists; the rest is counted."""

_SPECIAL = {"*": " (a stop codon)", "-": " (a gap)", ".": " (a gap)", "J": " (leucine or isoleucine)"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to the rows of a file or of a split. Counts are rows where nothing else is said."""

    name: str
    """The file or the split."""
    rows: int = 0
    """Rows read (file) or used (split)."""
    filtered: int = 0
    """Left out by `data.keep`."""
    filtered_heldout: int = 0
    """Validation and test rows left out by `data.keep_heldout`."""
    skipped: int = 0
    """Left out for a character that is no residue."""
    replaced: int = 0
    """With characters replaced by X."""
    replaced_residues: int = 0
    """Characters replaced by X."""
    cropped: int = 0
    """Longer than `data.max_residues` and cut to it."""
    cropped_residues: int = 0
    """Residues cut off."""
    windowed: int = 0
    """Longer than `data.max_residues` and cut into windows."""
    windows: int = 0
    """Windows made of them."""
    repeated: int = 0
    """With a sequence that an earlier row of the same split has."""
    in_train: int = 0
    """Validation or test rows with a sequence that a training row has too."""
    conflicting: int = 0
    """With a sequence that has another label elsewhere: in training, or in the same split."""

    def summary(self) -> str:
        """One line: the rows and every count that is not 0."""
        texts = {
            "filtered": "left out by data.keep",
            "filtered_heldout": "left out by data.keep_heldout",
            "skipped": "skipped for characters that are no residues",
            "replaced": f"with {self.replaced_residues} characters replaced by X",
            "cropped": f"cropped, {self.cropped_residues} residues cut off",
            "windowed": f"cut into {self.windows} windows",
            "repeated": "repeat a sequence of the same split",
            "in_train": "have a sequence that is in the training rows too",
            "conflicting": "have a sequence with conflicting labels",
        }
        parts = [f"{getattr(self, key)} {text}" for key, text in texts.items() if getattr(self, key)]
        return f"{self.name}: " + "; ".join([f"{self.rows} rows", *parts])


@dataclass
class Problems:
    """Collects what is wrong with a file, so that one error tells it all."""

    source: str
    """The file."""
    first: list[str] = field(default_factory=list)
    """The first MOST_LISTED problems, a line each."""
    total: int = 0

    def add(self, line: int, message: str) -> None:
        """Note a problem of the record that starts in `line`."""
        self.total += 1
        if len(self.first) < MOST_LISTED:
            self.first.append(f"{self.source}:{line}: {message}")

    def raise_any(self) -> None:
        """Raise what was noted: one line for one problem; else a line with the count, then the first of them.

        Raises:
            DataError: there was a problem.
        """
        if self.total == 1:
            raise DataError(self.first[0])
        if self.total:
            shown = f"the first {len(self.first)}" if self.total > len(self.first) else "all listed"
            raise DataError("\n  ".join([f"{self.source}: {self.total} problems ({shown}):", *self.first]))


def check_rows(rows: Dataset, cfg: DataConfig, source_name: str) -> tuple[Dataset, Report]:
    """The rows that can be used, their sequences in upper case, and what was done to the others.

    Labels are checked where `rows` has the column `label`. Characters that are no residue are treated by
    `cfg.on_bad_residue`; every other fault is an error whatever that says.

    Raises:
        DataError: empty id, sequence or label, id used twice, a character outside the alphabet (strict); no row left.
    """
    columns: dict[str, list[str]] = rows[:]
    lines: list[int] = list(rows["line"][:])
    problems = Problems(source_name)
    _check_ids(columns["id"], lines, problems)
    if "label" in columns:
        for line, name, label in zip(lines, columns["id"], columns["label"], strict=True):
            if is_missing(label):
                problems.add(
                    line, f"column {cfg.label_column!r} of {quote(name)} is empty; give a label or remove the row"
                )
    sequences, kept, replaced = _check_sequences(columns, lines, cfg, problems)
    problems.raise_any()
    if not kept:
        raise DataError(f"{source_name}: all {len(lines)} rows have characters that are no residues; is it protein?")
    clean = {name: [values[i] for i in kept] for name, values in columns.items()}
    clean["sequence"] = sequences
    report = Report(
        name=source_name,
        rows=len(lines),
        skipped=len(lines) - len(kept),
        replaced=len(replaced),
        replaced_residues=sum(replaced),
    )
    return make_rows(clean), report


def is_missing(value: str) -> bool:
    """Whether a value stands for nothing: '' or NaN. NA and None can be labels."""
    return value == "" or value.lower() == "nan"


def quote(value: str) -> str:
    """A value as an error shows it: on one line, shortened to 60 characters."""
    return repr(value if len(value) <= 60 else value[:57] + "...")


def _check_ids(ids: Sequence[str], lines: Sequence[int], problems: Problems) -> None:
    first: dict[str, int] = {}
    for line, name in zip(lines, ids, strict=True):
        if not name:
            problems.add(line, "the id is empty; give every row a name")
        elif first.setdefault(name, line) != line:
            problems.add(line, f"id {quote(name)} was used in line {first[name]} already; make ids unique")


def _check_sequences(
    columns: dict[str, list[str]], lines: Sequence[int], cfg: DataConfig, problems: Problems
) -> tuple[list[str], list[int], list[int]]:
    """Sequences to use, the indices of their rows, and for each row with characters replaced how many."""
    sequences: list[str] = []
    kept: list[int] = []
    replaced: list[int] = []
    for i, (line, name, sequence) in enumerate(zip(lines, columns["id"], columns["sequence"], strict=True)):
        bad = bad_residues(sequence)
        if not sequence:
            problems.add(line, f"the sequence of {quote(name)} is empty; give it residues or remove the row")
        elif bad and cfg.on_bad_residue == "strict":
            problems.add(line, _bad_message(name, bad))
        if bad and cfg.on_bad_residue == "skip":
            continue
        if bad:
            replaced.append(len(bad))
            sequence = replace_bad_residues(sequence)
        sequences.append(sequence.upper())
        kept.append(i)
    return sequences, kept, replaced


def _bad_message(name: str, bad: list[tuple[int, str]]) -> str:
    position, character = bad[0]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    shown = repr(character) + _SPECIAL.get(character.upper(), "")
    what = f"the sequence of {quote(name)} has {shown} at residue {position}{more}"
    cure = "use data.on_bad_residue=skip (leave the row out) or replace (write X)"
    return f"{what}, outside the ESM alphabet; correct it, or {cure}"
