"""Labels: from the texts of a label column to targets, and what the training rows decide about them.

A task names its kind of labels (`tasks.Task.label_kind`). Texts are parsed once, while rows are read: names become
codes in order of appearance. When the training rows have named the classes, codes become class indices.

A list, such as JSON or Parquet have it, arrives as text joined by `Labels.joiner`. People write labels in other ways
too, see `label_forms`; what cannot be read for certain is refused with the way to write it.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import DataConfig, TaskConfig, require
from esm_neuron.data.class_weights import tempered
from esm_neuron.data.label_forms import (
    has_quoted,
    in_order,
    listed,
    locations,
    loosely,
    marked,
    one_hot,
    other_separator,
    same,
    vector,
)
from esm_neuron.data.looks import NO_LABEL, NO_RESIDUE_LABELS, is_nothing
from esm_neuron.data.records import LIST_JOINER, RESIDUE_JOINER, UNKNOWN_RESIDUE, Decimals, to_number
from esm_neuron.data.sources import text_bytes
from esm_neuron.data.validation import Problems, mixed, quote
from esm_neuron.errors import ConfigError, DataError

UNKNOWN = -1  # class index of a residue without a known label: weight 0
MOST_CLASSES = np.iinfo(np.int16).max  # codes and class indices are int16
LONGEST_NAME = 1000  # characters of a class name; a longer one is another column's content
MOST_LEVELS = 10  # classes that are numbers and yet no measured values, for certain
SHOWN_CLASSES = 20  # classes that are named with their counts before training
GAP = "-"  # of a residue: a class in many files, and no label in others
IGNORED = (GAP, "?", ".")  # labels of residues that are unknown where `task.ignore` is not given
MOST_GAPS = 0.1  # share of training residues with GAP from which it may be a class
_SPACES = "\x1c\x1d\x1e\x1f"  # blanks to str.split beside string.whitespace
_DATE = re.compile(r"[0-9]{1,2}-(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)")
BINS = 10  # quantiles of a regression's values that a sample of rows is spread over


def alike(names: Iterable[str]) -> list[str]:
    """Return a remark about names that a careless writer takes for one, if there are any."""
    plain = Counter(map(loosely, names := sorted(names)))
    found = [quote(name) for name in names if plain[loosely(name)] > 1]
    return [f"{', '.join(found[:4])} differ in capital letters, blanks or marks alone"] if found else []


class Labels:
    """One class per protein; subclasses read other labels."""

    joiner: str = ""  # what stands between the entries of a label that is a list; '': one is written as JSON, `["a"]`
    entry: ClassVar[pa.DataType] = pa.int16()  # type of one entry of an encoded label: a code, or a value
    per_residue: ClassVar[bool] = False  # whether a label has one entry per residue
    numeric: ClassVar[bool] = False  # whether labels are values instead of classes
    unknown_cure: ClassVar[str] = "correct it, add training proteins of it, or filter it with data.keep"

    def __init__(self, task: TaskConfig, column: str, separator: str | None = None) -> None:
        self.task = task  # with its class names where they are known: configured, or those of a finished run
        self.column = column  # the label column's name in the file, for messages
        self.joiner = separator or type(self).joiner if type(self).joiner else ""
        self.codes = {name: code for code, name in enumerate(dict.fromkeys(task.labels or ()))}  # as they appear
        # what stands for no label, in small letters, unless it is named as a class
        self.nothing = (NO_RESIDUE_LABELS if self.per_residue else NO_LABEL) - {n.lower() for n in task.labels or ()}
        # names that stand for an unknown label; what is named as a class is none
        known = set(task.labels or ()) if task.ignore is None else set()
        self.ignored = set(IGNORED if task.ignore is None else task.ignore) - known if self.per_residue else set()

    @classmethod
    def of(cls, task: TaskConfig, data: DataConfig) -> Labels:
        """Return the reader of the label column that `data` names."""
        labels = cls(task, data.label_column, data.label_separator)
        if data.mask_column is not None:  # what a mask hides is never a class
            labels.ignored.add(UNKNOWN_RESIDUE)
        return labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the classes by their index, once they are known."""
        return self.task.labels or ()

    def split(self, text: str, length: int) -> list[str]:
        """Return the class names in a label of a protein of `length` residues; a ValueError says what is wrong."""
        if text in self.codes and text in (self.task.labels or ()):
            return [text]
        names = marked(text)
        names = locations(text) if names is None else names
        if names is None:
            names, marks = listed(text), vector(text)
            if marks is None and (names is None or (names and not has_quoted(text))):
                return [text]  # such as the class [2Fe-2S]
            names = (marks and one_hot(marks, self.task.labels)) or names or marks or []
        if len(names) != 1:
            raise ValueError(f"{quote(text)} is a list of {len(names)} labels; use task.name=multi_label, or keep one")
        return names

    def encode(self, rows: pa.Table, problems: Problems) -> pa.Table:
        """Return the rows with each label's text replaced by the list of its codes (or its value).

        A label that is missing becomes null (`Checker` has noted it), and so does one that cannot be read, which is
        noted in `problems`.
        """
        labels = self._encode_alike(rows, problems.source)
        if labels is None:
            labels = self._encode_each(rows, problems)
        return rows.set_column(rows.column_names.index("label"), "label", labels)

    def _coded(self, entries: Sequence[Sequence[Any] | None], source: str) -> pa.Array:
        """Return labels as lists of their codes, or values; raise DataError where there are too many classes."""
        if len(self.codes) > MOST_CLASSES:  # more would not fit int16; ids or sequences would fill the memory
            raise DataError(
                f"{source}: column {self.column!r} has more than {MOST_CLASSES} classes; is it the right one? "
                "data.label_column names it, and numbers are for task.name=regression"
            )
        return pa.array(entries, pa.list_(self.entry))

    def _encode_alike(self, rows: pa.Table, source: str) -> pa.Array | None:
        """Return all labels' entries, each text read once; None, with nothing learned, where one cannot be read."""
        texts = rows["label"].combine_chunks().dictionary_encode()
        known, found = len(self.codes), []
        try:
            for text in texts.dictionary.to_pylist():
                found.append(None if is_nothing(text, self.nothing) else self._entries(text, 0))
        except ValueError:
            while len(self.codes) > known:
                self.codes.popitem()
            return None
        return self._coded(found, source).take(texts.indices)

    def _encode_each(self, rows: pa.Table, problems: Problems) -> pa.Array:
        """Return each label's entries, null for one that cannot be read, which is noted."""
        found: list[list[Any] | None] = []
        lengths = pc.utf8_length(rows["sequence"]).to_pylist()
        for row, (text, length) in enumerate(zip(rows["label"].to_pylist(), lengths, strict=True)):
            try:
                found.append(None if is_nothing(text, self.nothing) else self._entries(text, length))
            except ValueError as error:
                self._add(problems, rows, row, str(error))
                found.append(None)
        return self._coded(found, problems.source)

    def _entries(self, text: str, length: int) -> list[Any]:
        names = list(map(self._bare, self.split(text, length)))
        for name in dict.fromkeys(names):  # not a set, whose order differs between processes
            if len(name) > LONGEST_NAME:
                raise ValueError(f"a label has more than {LONGEST_NAME} characters; check data.label_column")
            self.codes.setdefault(name, len(self.codes))
        return list(map(self.codes.__getitem__, names))

    def _bare(self, name: str) -> str:
        """Return a class name without the quotes around it, unless the class is called so."""
        inner = name[1:-1].strip()
        quoted = inner and name[0] == name[-1] and name[0] in "'\"" and name[0] not in inner
        return inner if quoted and name not in (self.task.labels or ()) else name

    def conclude(self, problems: Problems) -> None:
        """Note, after the last row, what only the column as a whole shows."""

    def _add(self, problems: Problems, rows: pa.Table, row: int, message: str) -> None:
        name, line = rows["id"][row].as_py(), rows["line"][row].as_py()
        problems.add(line, f"column {self.column!r} of {quote(name)}: {message}")

    def hashes(self, rows: pa.Table) -> np.ndarray:
        """Return uint64 [rows]: equal for labels that say the same, such as `A;B` and `B;A`, or 1 and 1.0."""
        flat, counts = flatten(rows)
        ends = np.cumsum(counts)
        place = np.arange(len(flat)) - np.repeat(ends - counts, counts)
        # An entry is hashed with its place, so the order within a label counts. A label's hash is the sum over its
        # entries, taken from one running sum.
        entries = mixed(mixed(flat.astype(np.float64) + 0.0) + place.astype(np.uint64))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(entries, dtype=np.uint64)])
        return np.asarray(sums[ends] - sums[ends - counts])  # modulo 2^64, as the sums are

    def count(self, rows: pa.Table) -> Counter[str]:
        """Return how often each class is in the labels of some rows."""
        times = np.bincount(flatten(rows)[0], minlength=len(self.codes))
        return Counter({name: int(times[code]) for name, code in self.codes.items() if times[code]})

    def strata(self, rows: pa.Table) -> np.ndarray:
        """Return int64 [rows]: groups of which a sample takes equal shares, here the classes."""
        return _numbered(flatten(rows)[0])

    def learn_classes(self, train: Iterable[pa.Table], source: str) -> None:
        """Name the classes in `self.task`: the configured ones, or the sorted ones of the training rows."""
        chunks = list(train)
        names: Counter[str] = Counter()
        for rows in chunks:
            names.update(self.count(rows))
        fault = self.fault(names, sum(map(len, chunks)))
        if fault is not None:
            raise DataError(f"{source}: {fault}")
        labels = self.task.labels if self.task.labels is not None else tuple(in_order(set(names) - self.ignored))
        require(len(set(labels)) == len(labels), f"task.labels={labels} has a name twice; name each class once")
        self.task = replace(self.task, labels=labels)

    def fault(self, counts: Mapping[str, int], proteins: int) -> str | None:
        """Return why the classes of so many training proteins cannot be learned; None where they can.

        They are values, one class written twice, or fewer than two; `counts` has how often each is there.
        """
        names, what = in_order(set(counts) - self.ignored), f"column {self.column!r}"
        if len(names) < 2:
            found = f"one class only, {quote(names[0])}," if names else "no class"
            cure = "two are needed, check data.label_column and data.keep"
            return f"{what} has {found} in the training proteins; {cure}"
        if self.task.labels is not None:
            return None
        values = [to_number(name) for name in names]
        if len(names) > MOST_LEVELS and all(map(math.isfinite, values)):
            broken = not all(map(float.is_integer, values))
            if len(names) > proteins / (5 if broken else 2):
                return (
                    f"{what} has {len(names)} classes in {proteins} training proteins, all of them numbers; if they "
                    "are measured values use task.name=regression, else name the classes in task.labels"
                )
        first: dict[str | int, str] = {}
        for name in names:
            other = first.setdefault(same(name), name)
            if other != name:
                return (
                    f"{what} has the classes {other[:60]!a} and {name[:60]!a}, which are the same; write them alike, "
                    "or name both in task.labels"
                )
        return None

    def describe(self, train: pa.Table) -> str:
        """Return one line with the classes of the training rows and how often each is there, and what looks wrong."""
        counts, labels = self.count(train), self.task.labels or ()
        shown = ", ".join(f"{quote(name)[1:-1]} {counts[name]}" for name in labels[:SHOWN_CLASSES])
        more = f", and {len(labels) - SHOWN_CLASSES} more" if len(labels) > SHOWN_CLASSES else ""
        unit = "residues" if self.per_residue else "proteins"
        line = f"classes: {len(labels)} (training {unit}): {shown}{more}"
        rare = sum(counts[name] < 2 for name in labels)
        notes = [f"{rare} of {len(labels)} classes have at most one training protein"] if 2 * rare > len(labels) else []
        notes += alike(labels)
        date = next(filter(_DATE.fullmatch, labels), None)
        notes += [f"{quote(date)} is a date, which spreadsheets make of names such as SEPT2"] if date else []
        tagged = next((name for name in labels if "{ECO:" in name), None)
        if tagged is not None:
            notes.append(f"{quote(tagged)} is UniProt's free text; its columns of keywords and GO terms have labels")
        separator = other_separator(labels, "")
        if separator is not None and type(self) is Labels:
            joined = next(name for name in labels if separator in name)
            notes.append(f"{quote(joined)} is one class; for several labels per protein use task.name=multi_label")
        return "\n".join([line, *(f"NOTE: {note}" for note in notes)])

    def targets(self, rows: pa.Table, problems: Problems) -> np.ndarray:
        """Return what encoded labels say once the classes are known, here int64 [rows] class indices.

        A label that names no class is noted in `problems`.
        """
        flat, counts = flatten(rows)
        return self._classes(rows, flat, counts, problems).astype(np.int64)

    def _classes(self, rows: pa.Table, flat: np.ndarray, counts: np.ndarray, problems: Problems) -> np.ndarray:
        """Return int16 [entries]: the class index of each code."""
        labels = self.class_names
        index = {name: i for i, name in enumerate(labels)} | dict.fromkeys(self.ignored, UNKNOWN)
        alike, none = {same(name): i for i, name in enumerate(labels)}, UNKNOWN - 1
        # Each name is looked up once, then all entries are mapped by their codes.
        found = [index.get(name, alike.get(same(name), none)) for name in self.codes]
        classes = np.array(found, dtype=np.int16)[flat]
        strange = np.flatnonzero(classes == none)
        first = np.cumsum(counts) - counts
        row_of = np.searchsorted(first, strange, side="right") - 1
        names, known = list(self.codes), ", ".join(map(quote, labels[:20])) + (", ..." if len(labels) > 20 else "")
        # One problem per row, its first unknown entry: a residue task could have thousands.
        for row, at in zip(*np.unique(row_of, return_index=True), strict=True):
            place = f" of residue {strange[at] - first[row] + 1}" if self.per_residue else ""
            what = f"label {quote(names[flat[strange[at]]])}{place} is not one of the classes {known}"
            self._add(problems, rows, int(row), f"{what}; {self.unknown_cure}")
        return np.maximum(classes, UNKNOWN)

    def resolve(self, train: np.ndarray) -> TaskConfig:
        """Return the task with what the training rows decide, here balanced class weights.

        `train` is their `ExampleTable.labels`. Raise ConfigError where class weights do not fit the classes, or a class
        has no training rows to balance; DataError where the values of a regression are all equal.
        """
        task, labels = self.task, self.task.labels or ()
        if task.class_weights == "balanced":
            return replace(task, class_weights=self._balanced(train))
        if task.class_weights == "auto":
            return replace(task, class_weights=tempered(labels, *self._weigh(train, len(labels))))
        if isinstance(task.class_weights, dict):
            for label in sorted(set(task.class_weights) ^ set(labels)):
                what = "is no class" if label in task.class_weights else "has no weight"
                raise ConfigError(f"task.class_weights: {label!r} {what}; weigh each of {', '.join(labels)}")
        return task

    def _balanced(self, train: np.ndarray) -> dict[str, float]:
        labels = self.task.labels or ()
        counts, weights = self._weigh(train, len(labels))
        for label, count, weight in zip(labels, counts, weights, strict=True):
            require(
                count > 0 and weight > 0,
                f"task.class_weights=balanced: {'no' if count == 0 else 'every'} training protein is of class {label!r}"
                "; weigh the classes by hand, or leave it out of task.labels",
            )
        return {label: round(float(weight), 6) for label, weight in zip(labels, weights, strict=True)}

    def _weigh(self, train: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how many rows each class has, and its weight: n / (classes x n_c), as in scikit-learn."""
        counts = np.bincount(train[train >= 0], minlength=classes)
        return counts, counts.sum() / (classes * np.maximum(counts, 1))


class LabelSets(Labels):
    """Any number of classes per protein, joined by `;`; none at all is written `[]`."""

    joiner = LIST_JOINER

    def __init__(self, task: TaskConfig, column: str, separator: str | None = None) -> None:
        super().__init__(task, column, separator)
        self._pair: str | None = None  # a label that is a 0 and a 1, while all are; '' once another was there

    def split(self, text: str, length: int) -> list[str]:
        names = marked(text)
        names = locations(text) if names is None else names
        if names is not None:
            self._pair = ""
            return names
        names = listed(text)
        if names is None:  # UniProt writes `PF00069;PF00130;`
            names = [name.strip() for name in text.removesuffix(self.joiner).split(self.joiner)]
        marks = list(text) if re.fullmatch("[01]{3,}", text) and text not in self.codes else vector(text, self.joiner)
        known = one_hot(marks or names, self.task.labels)
        if known is not None:
            return known
        # Of two classes, `0;1` may be both of the classes 0 and 1, or a mark for each: all rows tell.
        self._pair = text if marks and sorted(marks) == ["0", "1"] and self._pair != "" else ""
        if marks and len(marks) > len(set(marks)):
            what = f"label {quote(text)} is 0 or 1 for each of {len(marks)} classes"
            raise ValueError(f"{what}; name these in their order: task.labels=[...]")
        if "" in names:
            cure = f"write its labels with one {self.joiner!r} between, or [] for a protein without any"
            raise ValueError(f"label {quote(text)} has an empty part; {cure}")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"label {quote(text)} has {quote(twice[0])} twice; keep one")
        return names

    def _entries(self, text: str, length: int) -> list[Any]:
        return sorted(super()._entries(text, length))  # so that `A;B` and `B;A` are equal

    def _encode_alike(self, rows: pa.Table, source: str) -> pa.Array | None:
        pair = self._pair
        found = super()._encode_alike(rows, source)
        if found is None:
            self._pair = pair
        elif self._pair:  # the message shows the last one
            texts = reversed(rows["label"].to_pylist())
            self._pair = next(text for text in texts if not is_nothing(text, self.nothing))
        return found

    def conclude(self, problems: Problems) -> None:
        if self._pair and self.task.labels is None:
            what = f"column {self.column!r}: every label, as {quote(self._pair)}, is 0 or 1 for each of 2 classes"
            problems.add(None, f"{what}; name these in their order: task.labels=[...]")
            return
        separator = other_separator(list(self.codes), self.joiner)
        if separator is not None and self.task.labels is None:
            joined = next(name for name in self.codes if separator in name)
            problems.add(
                None,
                f"column {self.column!r}: {quote(joined)} is one label, since labels are separated by {self.joiner!r}, "
                f"but its parts are labels too; name the separator, data.label_separator={separator!r}, or the classes "
                "in task.labels",
            )

    def strata(self, rows: pa.Table) -> np.ndarray:
        """Return int64 [rows]: the rarest label of each row, of equally rare ones the first by name, or none."""
        flat, counts = flatten(rows)
        names = list(self.codes)
        by_name = np.empty(len(names), dtype=np.int64)
        by_name[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
        often = np.bincount(flat, minlength=len(names))
        order = np.argsort(np.lexsort((by_name, often)))  # code -> its place, the rarest first
        # Grouped by its rarest label, so that rare labels are spread evenly over the splits; common ones need no help.
        rarest = np.full(len(counts), len(names))
        some = counts > 0
        rarest[some] = np.minimum.reduceat(order[flat], (np.cumsum(counts) - counts)[some]) if some.any() else 0
        groups = _numbered(rarest)
        # Where most proteins have a label of their own, none could be held out: such labels are not spread.
        return groups if 2 * len(np.unique(groups)) <= len(groups) else np.zeros_like(groups)

    def targets(self, rows: pa.Table, problems: Problems) -> np.ndarray:
        """Return uint8 [rows, classes]: 1 for each label that a row has."""
        flat, counts = flatten(rows)
        classes = self._classes(rows, flat, counts, problems)
        found = np.zeros((len(counts), len(self.task.labels or ())), np.uint8)
        found[np.repeat(np.arange(len(counts)), counts), classes] = 1
        return found

    def _weigh(self, train: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how many rows have each label, and its weight: negatives / positives."""
        counts = train.sum(0, dtype=np.int64)
        return counts, (len(train) - counts) / np.maximum(counts, 1)


class ResidueLabels(Labels):
    """One class per residue: one character for each, or names joined by `,`; those in `task.ignore` are unknown."""

    joiner = RESIDUE_JOINER
    per_residue = True

    def split(self, text: str, length: int) -> list[str]:
        found = listed(text) if len(text) != length else None
        if found is not None:
            names = found
        elif self.joiner in text:
            names = [name.strip() for name in text.split(self.joiner)]
        else:
            names = [text] if length == 1 else text.split() if len(text.split()) == length else list(text)
        if len(names) != length:
            raise ValueError(
                f"{len(names)} residue labels for a sequence of {length} residues; write one character per residue, "
                f"or as many labels with {self.joiner!r} between"
            )
        if "" in names:
            at = names.index("") + 1
            raise ValueError(f"the label of residue {at} is empty; write one of task.ignore where it is unknown")
        return names

    def _encode_alike(self, rows: pa.Table, source: str) -> pa.Array | None:
        """Return the codes of labels that are all written as one ASCII character per residue."""
        (text, ends), (_, bounds) = text_bytes(rows, "label"), text_bytes(rows, "sequence")
        nothing = pa.array(sorted(self.nothing), pa.large_string())
        if not np.array_equal(ends, bounds) or pc.any(pc.is_in(pc.utf8_lower(rows["label"]), nothing)).as_py():
            return None
        letters = np.frombuffer(text or b"", np.uint8)
        used, first = np.unique(letters, return_index=True)
        plain = bytes(used).isascii() and not set(bytes(used).decode()) & {*self.joiner, *string.whitespace, *_SPACES}
        if not plain:
            return None
        code = np.zeros(256, np.int16)
        for letter in used[np.argsort(first)].tolist():
            code[letter] = self.codes.setdefault(chr(letter), len(self.codes))
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(code[letters], self.entry))

    def strata(self, rows: pa.Table) -> np.ndarray:
        return np.zeros(len(rows), dtype=np.int64)

    def fault(self, counts: Mapping[str, int], proteins: int) -> str | None:
        share = counts.get(GAP, 0) / max(1, sum(counts.values()))
        if self.task.ignore is None and GAP in self.ignored and share > MOST_GAPS and set(counts) - self.ignored:
            return (
                f"column {self.column!r} has {GAP!r} for {share:.0%} of the training residues: a class such as coil, "
                "or a label that is not known? Say task.ignore=[?, .] if it is a class, or task.ignore=[-, ?, .] to "
                "leave these residues out"
            )
        return super().fault(counts, proteins)

    def targets(self, rows: pa.Table, problems: Problems) -> np.ndarray:
        """Return int16 [residues of all rows]: class indices, `UNKNOWN` for a label in `task.ignore`."""
        return self._classes(rows, *flatten(rows), problems)


class Regions(ResidueLabels):
    """The region of each residue, one of `task.mask_rates`; what stands between chains has none."""

    unknown_cure = "correct it, or give it a rate in task.mask_rates"

    def __init__(self, task: TaskConfig, column: str, separator: str | None = None) -> None:
        super().__init__(
            replace(task, labels=tuple(task.mask_rates or ()), ignore=(UNKNOWN_RESIDUE,)), column, separator
        )
        self.task = task

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.task.mask_rates or ())

    def fault(self, counts: Mapping[str, int], proteins: int) -> str | None:
        return None

    def learn_classes(self, train: Iterable[pa.Table], source: str) -> None:
        """Do nothing: `task.mask_rates` names the regions."""

    def describe(self, train: pa.Table) -> str:
        """Return one line with the training residues of each region and its rate."""
        counts = self.count(train)
        rates = (f"{name} {counts[name]} at {rate:g}" for name, rate in (self.task.mask_rates or {}).items())
        return f"regions (training residues, mask rate): {', '.join(rates)}"


class Numbers(Labels):
    """A value per protein."""

    joiner = LIST_JOINER

    entry = pa.float64()
    numeric = True

    def __init__(self, task: TaskConfig, column: str, separator: str | None = None) -> None:
        super().__init__(task, column, separator)
        self._numbers = Decimals()
        self._any = False  # whether a label is a number

    def _entries(self, text: str, length: int) -> list[Any]:
        names = listed(text)
        value = self._numbers.read(names[0] if names and len(names) == 1 else text)
        if not math.isfinite(value):
            raise ValueError(f"{quote(text)} is no finite number; write such as 1234.5, or remove the record")
        self._any = True
        return [value]

    def _encode_alike(self, rows: pa.Table, source: str) -> pa.Array | None:
        """Return the values of labels that are all plain numbers."""
        texts = rows["label"].combine_chunks()
        try:
            values = texts.cast(pa.float64()).to_numpy()
        except pa.ArrowInvalid:
            return None
        if not np.isfinite(values).all():
            return None
        self._any = self._any or len(values) > 0
        points = np.flatnonzero(pc.match_substring(texts, ".").to_numpy(zero_copy_only=False))
        if len(points):
            self._numbers.read(texts[int(points[-1])].as_py())  # it remembers the last one
        return pa.ListArray.from_arrays(pa.array(np.arange(len(values) + 1), pa.int32()), pa.array(values))

    def conclude(self, problems: Problems) -> None:
        """Note that no label is a number, or a comma that is a decimal mark here and may be another thing elsewhere."""
        if problems.total > 1 and not self._any:
            cure = "name a column of numbers with data.label_column, or take words as classes"
            what = f"column {self.column!r} has no number at all"
            problems.add(None, f"{what}; {cure}: task.name=sequence_classification")
        if (doubt := self._numbers.doubt()) is not None:
            problems.add(None, f"column {self.column!r}: {doubt}")

    def describe(self, train: pa.Table) -> str:
        """Return one line about the training values."""
        values = flatten(train)[0]
        low, high = float(values.min()), float(values.max())
        return f"values: {len(values)} in training, {low:.6g} to {high:.6g}, mean {values.mean():.6g}"

    def count(self, rows: pa.Table) -> Counter[str]:
        return Counter()  # values have no classes

    def strata(self, rows: pa.Table) -> np.ndarray:
        # the quantile that each value is in
        values = flatten(rows)[0]
        return np.searchsorted(np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1]), values)

    def fault(self, counts: Mapping[str, int], proteins: int) -> str | None:
        return None

    def learn_classes(self, train: Iterable[pa.Table], source: str) -> None:
        """Do nothing: values have no classes."""

    def targets(self, rows: pa.Table, problems: Problems) -> np.ndarray:
        return flatten(rows)[0]

    def resolve(self, train: np.ndarray) -> TaskConfig:
        """Return the task with the mean and the standard deviation of the training values, where none are given."""
        mean, sd, task = float(train.mean()), float(train.std()), self.task
        if sd == 0:
            raise DataError(f"every training value is {mean:g}: there is nothing to learn; check data.label_column")
        return replace(
            task,
            target_mean=mean if task.target_mean is None else task.target_mean,
            target_sd=sd if task.target_sd is None else task.target_sd,
        )


def flatten(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of all encoded labels, end to end, and int64 [rows] how many each label has; null has 0."""
    column = rows["label"].combine_chunks()
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return pc.list_flatten(column).to_numpy(zero_copy_only=False), counts


def _numbered(groups: np.ndarray) -> np.ndarray:
    """Return int64 [rows]: groups numbered in the order in which they first appear."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group]
