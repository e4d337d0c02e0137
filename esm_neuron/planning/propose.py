"""Propose the settings of a run for a file of proteins: columns, task, split, and what could not be decided.

Files are read, and labels judged, by what `train` and `data check` use; here is only what to ask of them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from esm_neuron.config import DataConfig, TaskConfig, TrainConfig, settings
from esm_neuron.data.check import Check, check_file
from esm_neuron.data.filters import SPLITS, split_of, truth
from esm_neuron.data.label_forms import listed, locations, marked, other_separator
from esm_neuron.data.labels import MOST_LEVELS, Labels
from esm_neuron.data.looks import NO_LABEL, is_nothing
from esm_neuron.data.records import (
    ALSO,
    FASTA,
    LIST_JOINER,
    MARKS,
    RESIDUE_JOINER,
    SEQUENCES,
    Column,
    files_of,
    suffix_of,
    to_number,
)
from esm_neuron.data.sources import columns_of, read_records
from esm_neuron.data.tokenizer import bad_residues
from esm_neuron.errors import DataError
from esm_neuron.tasks import task_class

LOOKED = 100_000
"""Records of the file by which its columns are judged."""
LABELS = ("label", "labels", "target", "class", "location", "localization", "score", "fitness", "value", "y")
"""Names that people give to what is to be learned, the likeliest first."""
_PROTEIN_LETTERS = 13
"""Different letters that a column of proteins has at least; fewer are structures or nucleotides."""
_SHORT = 50
"""Median length below which homologs cannot be told from chance."""
_MOSTLY = 0.9
"""Share of values that shows what a column holds."""
_FEW = 300
"""Proteins below which a tenth of them is too small a test set."""
_NAMES_ID, _NAMES_GROUP = re.compile("id|name|accession|entry|protein", re.I), re.compile("fold|partition|clust", re.I)
_VALID = ("valid", "validation", "is_valid")

Values = Sequence[str]


@dataclass
class Proposal:
    """Settings for a file, and what they were chosen by."""

    rows: list[tuple[str, Any, str]] = field(default_factory=list)
    """Name of a setting, its value, and what it means or why it is so."""
    seen: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """What `train` would refuse, the first of it."""

    def put(self, name: str, value: Any, why: str) -> None:
        self.rows.append((name, value, why))

    @property
    def config(self) -> TrainConfig:
        return settings.parse(settings.to_words({name: value for name, value, _ in self.rows}))

    def yaml(self) -> str:
        """Return a file for `train --config`, with comments."""
        heads = {"What was seen:": self.seen, "What could not be decided, look at it:": self.undecided,
                 "What has to be mended in the file first:": self.faults}  # fmt: skip
        lines = ["# Proposed by esm-neuron new. Run it from this folder: esm-neuron train --config FILE"]
        lines += [f"# {line}" for head, of in heads.items() if of for line in (head, *(f"  {each}" for each in of))]
        last = ""
        for name, value, why in self.rows:
            section, _, key = name.rpartition(".")
            lines += [f"{section}:"] if section and section != last else []
            last = section
            lines.append(f"{'  ' if section else ''}{key + ': ' + json.dumps(value, ensure_ascii=False):<42} # {why}")
        return "\n".join(line.replace("\n", " ") for line in lines) + "\n"


def propose(source: str) -> Proposal:
    """Look at a file and return settings for it. Raise DataError where it cannot be read as proteins."""
    made, table = Proposal(), _Table(source)
    made.put("output", "runs/mine", "folder for all that the run writes")
    made.put("backend", "cpu", "cuda: an NVIDIA GPU; neuron: trn1; xla: a TPU")
    data = _columns(table, made)
    task, why, more = _task(table, data, made)
    made.put("task.name", task, why)
    if "class_weights" in task_class(task).settings:
        made.put("task.class_weights", "auto", "weighs rare classes, if there are any, and says so")
    made.put("data.train", source, "proteins")
    for name, value in {**data, **more}.items():
        made.put(f"data.{name}", value, _ABOUT[name])
    check = _checked(made, table)
    if "split_column" not in data:
        _sampled(table, check, made)
    _training(check, made)
    return made


_ABOUT = {
    "id_column": "names of the proteins", "sequence_column": "residues", "label_column": "what is learned",
    "split_column": "which split a protein belongs to", "valid_column": "marks the proteins for validation",
    "label_separator": "between the labels of a protein",
}  # fmt: skip


class _Table:
    """The first records of a source, by column."""

    def __init__(self, source: str) -> None:
        file, label = files_of(source)[0]
        self.by_file = label is not None
        """Whether there is a file per class."""
        self.is_fasta = suffix_of(file) in FASTA
        names = list(columns_of(source))
        columns = [Column(f"column {i}", name, "", joiner="") for i, name in enumerate(names)]
        if self.is_fasta:
            columns = [Column("id", "id", ""), Column("sequence", "sequence", ""), *columns]
        rows = [values for _, values in islice(read_records(file, columns), LOOKED)]
        self.columns = {column.source: [row[i].strip() for row in rows] for i, column in enumerate(columns)}
        if self.is_fasta:
            self.columns |= _name_parts(self.columns["id"])

    def known(self, name: str, more: Sequence[str] = ()) -> str | None:
        """Return the column that is taken for `name` unless a setting names another, or one of `more`."""
        lower = {column.lower(): column for column in self.columns}
        return next((lower[each] for each in (name, *ALSO[name], *more) if each in lower), None)

    def kinds(self, name: str) -> Counter[str]:
        """Return how often each value of a column is there, without those that stand for nothing."""
        return Counter(value for value in self.columns[name] if not is_nothing(value, NO_LABEL))


def _name_parts(ids: Values) -> dict[str, list[str]]:
    """Return the parts of names behind a bar by which proteins are grouped, where all names have as many."""
    rows = [name.split("|") for name in ids]
    parts = zip(*rows, strict=True) if len({len(row) for row in rows}) == 1 else ()
    named = {f"part{place}": list(part) for place, part in enumerate(parts, start=1)}
    named.pop("part1", None)  # the name itself, or a database's
    return {name: part for name, part in named.items() if 1 < len(set(part)) <= len(part) / 2}


def _columns(table: _Table, made: Proposal) -> dict[str, str]:
    """Return the settings that name columns, those that are taken in any case left out."""
    sequence, found = _sequence_column(table, made), dict[str, str]()
    if not table.is_fasta and sequence.lower() not in ("sequence", *ALSO["sequence"]):
        found["sequence_column"] = sequence
    own = table.known("id")
    if own is None:
        unique = [n for n, values in table.columns.items() if len(set(values)) == len(values) and n != sequence]
        own = next(filter(_NAMES_ID.search, unique), None)
        found |= {} if own is None else {"id_column": own}
    left = [name for name, of in table.columns.items() if name not in (sequence, own) and not _counts_rows(of)]
    for name in list(left):
        kinds = table.kinds(name)
        places = {split_of(value, DataConfig()) for value in kinds}
        if 0 in places and -1 not in places and len(places) > 1:
            found.setdefault("split_column", name)
        elif name.lower() in _VALID and None not in map(truth, kinds):
            found["valid_column"] = name
        elif _NAMES_GROUP.search(name) and len(kinds) > 1:
            made.undecided.append(f"does column {name!r} name folds? Then test on one: data.split_column and data.fold")
        else:
            continue
        left.remove(name)
    label = None if table.by_file else _label_column(table, left, sequence, made)
    return found | ({} if label is None else {"label_column": label})


def _counts_rows(values: Values) -> bool:
    """Return whether a column is a running number, of which nothing is learned."""
    if not all(value.isascii() and value.isdigit() and len(value) < 10 for value in values):
        return False
    return [int(value) - int(values[0]) for value in values] == list(range(len(values)))


def _sequence_column(table: _Table, made: Proposal) -> str:
    """Return the column with the residues, by its name or else by what it holds."""
    named = table.known("sequence", SEQUENCES)
    if named is not None:
        return named
    fit: dict[str, float] = {}
    for name, values in table.columns.items():
        filled = [value for value in values if value]
        whole = sum(len(value) > 1 and bad_residues(value.upper()) is None for value in filled)
        if filled and whole >= _MOSTLY * len(filled) and len(set("".join(filled[:1000]).upper())) >= _PROTEIN_LETTERS:
            fit[name] = len(set(filled)) * sum(map(len, filled)) / len(filled)
    if not fit:
        shown = ", ".join(map(repr, list(table.columns)[:20])) or "none"
        raise DataError(f"no column holds residues; the file has {shown}; name it sequence, or write it as FASTA")
    best, *others = sorted(fit, key=lambda name: -fit[name])
    if others:
        made.undecided.append(f"residues are taken from {best!r}, and {', '.join(map(repr, others))} hold some too")
    return best


def _label_column(table: _Table, left: Sequence[str], sequence: str, made: Proposal) -> str | None:
    """Return the column with what is to be learned; None where there is none."""
    some = {name: table.kinds(name) for name in left if DataConfig(label_column=name).label_columns == (name,)}
    # neither one value for all nor, of text, one for each: those are notes and names
    fit = [name for name, kinds in some.items() if len(kinds) > 1 and _teaches(table, name, kinds, sequence)]
    marks = [name for name in fit if set(map(str.lower, some[name])) <= MARKS.keys()]
    marks = [name for name in marks if DataConfig(label_column=f"[{name}]").label_columns == (name,)]
    named = next((name for wanted in LABELS for name in fit if name.lower() == wanted), None)
    if named is None and len(marks) > 1:
        made.undecided.append(f"{len(marks)} columns hold 0 or 1; they are taken for one class each")
        return f"[{', '.join(marks)}]"
    if named is None and not fit:
        return None
    best = fit[0] if named is None else named
    others = [name for name in fit if name != best]
    if others:
        made.undecided.append(f"what is learned is taken from {best!r}; {', '.join(map(repr, others))} could be too")
    return best


def _teaches(table: _Table, name: str, kinds: Mapping[str, int], sequence: str) -> bool:
    values = table.columns[name]
    return _is_number(kinds) or _per_residue(values, table.columns[sequence]) or 2 * len(kinds) <= len(values)


def _is_number(kinds: Mapping[str, int]) -> bool:
    return all(to_number(value.replace(",", ".")) == to_number(value.replace(",", ".")) for value in kinds)


def _per_residue(values: Values, sequences: Values) -> bool:
    """Return whether most values have one entry per residue."""
    pairs = [(v, len(s)) for v, s in zip(values, sequences, strict=True) if v and len(s) > 1]
    fits = sum(
        size in (len(value), value.count(RESIDUE_JOINER) + 1, len(value.split()), len(listed(value) or ""))
        for value, size in pairs
    )
    return bool(pairs) and fits >= _MOSTLY * len(pairs) and any(size > 2 for _, size in pairs)


def _task(table: _Table, data: Mapping[str, str], made: Proposal) -> tuple[str, str, dict[str, str]]:
    """Return the task, why, and settings of the labels that go with it."""
    label = data.get("label_column")
    if table.by_file:
        return "sequence_classification", "one file per class", {}
    if label is None:
        made.undecided.append("there is no column with something to learn; name one by data.label_column and task.name")
        return "masked_lm", "no labels: the language model itself is trained on", {}
    if label.startswith("["):
        return "multi_label", "a column per class", {}
    kinds = table.kinds(label)
    sequence = data.get("sequence_column") or table.known("sequence") or ""
    if _per_residue(table.columns[label], table.columns[sequence]):
        return "residue_classification", "one label per residue", {}
    if _is_number(kinds):
        points = {value.replace(",", "."): count for value, count in kinds.items()}
        certain = Labels(TaskConfig(), label).fault(points, sum(kinds.values()))
        if len(kinds) <= MOST_LEVELS:
            made.undecided.append(
                f"{label!r} has {len(kinds)} numbers, taken for classes; measured: task.name=regression"
            )
            return "sequence_classification", "few different numbers", {}
        if certain is None:
            made.undecided.append(
                f"{label!r} has whole numbers, taken for measured; else task.name=sequence_classification"
            )
        return "regression", f"{len(kinds)} different numbers", {}
    names = list(kinds)
    lists = [one for one in names[:1000] if any(_read(form, one) is not None for form in (locations, marked, listed))]
    if len(lists) * 2 > len(names[:1000]):
        return "multi_label", "lists of labels", {}
    separator = other_separator(names, "")
    if separator is not None:
        more = {} if separator == LIST_JOINER else {"label_separator": separator}
        return "multi_label", f"several labels, with {separator!r} between", more
    return "sequence_classification", f"{len(kinds)} classes", {}


def _read(form: Callable[[str], Sequence[str] | None], text: str) -> Sequence[str] | None:
    try:
        return form(text)
    except ValueError:
        return None


def _checked(made: Proposal, table: _Table) -> Check:
    """Look at the whole file as `data check` does; what can be left out is, and what is found is told."""
    column = made.config.data.split_column
    names = table.kinds(column) if column else {}
    train = next((name for name in names if split_of(name, DataConfig()) == 0), SPLITS[0])
    check = _check(made.config, train)
    for name, what in (("on_missing", "without sequence or label"), ("on_bad_residue", "with other characters")):
        if not check.faults:
            break
        tried = [*made.rows, (f"data.{name}", "skip", f"leaves proteins {what} out, counted")]
        less = _check(Proposal(tried).config, train)
        if less.faults < check.faults:
            check, made.rows = less, tried
    made.seen += check.render().split("\n")[: -1 - len(check.first_faults)]
    made.faults += check.first_faults
    return check


def _check(cfg: TrainConfig, train: str) -> Check:
    kind = task_class(cfg.task.name).label_kind
    return check_file(str(cfg.data.train), cfg.data, kind.of(cfg.task, cfg.data) if kind else None, train, None)


def _sampled(table: _Table, check: Check, made: Proposal) -> None:
    """Choose how test proteins are sampled, where no column names them."""
    lengths = check.lengths
    alike = lengths["q1"] == lengths["q3"] and lengths["median"] >= _SHORT
    sample, why = "clusters", "whole families, so that held-out proteins have no homolog in training"
    if alike:
        sample, why = "proteins", "most are of one length, as variants of one protein, which are one family"
    elif lengths["median"] < _SHORT:
        sample, why = "proteins", "too short to tell homologs from chance"
    made.put("data.test_fraction", 0.1, "looked at once, at the end; as many are sampled for validation")
    made.put("data.sample", sample, why)
    if alike:
        made.undecided.append("are these variants of one protein? Then esm-neuron score ranks them without training")
    if check.proteins < _FEW:
        made.undecided.append(
            f"{check.proteins} proteins are few; data.folds=5 in place of data.test_fraction tests on each of them once"
        )


def _training(check: Check, made: Proposal) -> None:
    """Choose the start that `train` takes where it is told of nothing but data, and what the lengths ask for."""
    task, longest = task_class(made.config.task.name), check.lengths["max"]
    data = DataConfig()
    if longest > data.max_residues:
        why = f"the longest has {longest} residues, {data.max_residues} are read; or: crop_ends, window, skip"
        made.put("data.long_sequences", data.long_sequences, why)
    fit = int(data.pack_tokens // (check.lengths["q1"] + 2))
    if fit > data.max_segments:
        made.put("data.max_segments", fit, "so many of these short sequences fill a pack")
    made.put("model.name", "auto", "Meta's 8M where the hub answers, else mini, a demonstration; larger is better")
    if task.keeps_lm_head:
        made.put("adapter.kind", "lora", "what is trained: small matrices beside frozen weights")
        return
    given = settings.FIRST_STEP | (settings.FIRST_STEP_POOLED if task.pools else {})
    about = {"model.layers": "found by folds of training", "model.pooling": "also over both ends of a protein",
             "adapter.kind": "a linear head, in minutes; to fine-tune: lora"}  # fmt: skip
    for name in sorted(given.keys() & about.keys(), key=lambda name: not name.startswith("model.")):
        made.put(name, given[name], about[name])
