"""Labels: from the texts of a label column to targets, and what the training rows decide about them.

A task names its kind of labels (`tasks.Task.label_kind`). Texts are parsed once, while rows are read: names become
codes in order of appearance. When the training rows have named the classes, codes become class indices.

A list, such as JSON or Parquet have it, arrives as text joined by `Labels.joiner`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import TaskConfig, require
from esm_neuron.data.records import LIST_JOINER, RESIDUE_JOINER, to_number
from esm_neuron.data.validation import Problems, is_missing, mixed, quote
from esm_neuron.errors import ConfigError, DataError

UNKNOWN = -1  # class index of a residue without a known label: weight 0
MOST_CLASSES = np.iinfo(np.int16).max  # codes and class indices are int16
LONGEST_NAME = 1000  # characters of a class name; a longer one is another column's content
BINS = 10  # quantiles of a regression's values that a sample of rows is spread over


class Labels:
    """One class per protein; subclasses read other labels."""

    joiner: ClassVar[str] = LIST_JOINER  # what stands between the entries of a label that is a list
    entry: ClassVar[pa.DataType] = pa.int16()  # type of one entry of an encoded label: a code, or a value
    per_residue: ClassVar[bool] = False  # whether a label has one entry per residue
    numeric: ClassVar[bool] = False  # whether labels are values instead of classes

    def __init__(self, task: TaskConfig, column: str) -> None:
        self.task = task  # with its class names where they are known: configured, or those of a finished run
        self.column = column  # the label column's name in the file, for messages
        self.codes = {name: code for code, name in enumerate(dict.fromkeys(task.labels or ()))}  # as they appear
        self.ignored = set(task.ignore) if self.per_residue else set()  # names that stand for an unknown label

    def split(self, text: str, length: int) -> list[str]:
        """Return the class names in a label of a protein of `length` residues; a ValueError says what is wrong."""
        return [text]

    def encode(self, rows: pa.Table, problems: Problems) -> pa.Table:
        """Return the rows with each label's text replaced by the list of its codes (or its value).

        A label that is missing becomes null (`Checker` has noted it), and so does one that cannot be read, which is
        noted in `problems`.
        """
        found: list[list[Any] | None] = []
        lengths = pc.utf8_length(rows["sequence"]).to_pylist()
        for row, (text, length) in enumerate(zip(rows["label"].to_pylist(), lengths, strict=True)):
            try:
                found.append(None if is_missing(text) else self._entries(text, length))
            except ValueError as error:
                self._add(problems, rows, row, str(error))
                found.append(None)
        if len(self.codes) > MOST_CLASSES:  # more would not fit int16; ids or sequences would fill the memory
            raise DataError(
                f"{problems.source}: column {self.column!r} has more than {MOST_CLASSES} classes; is it the right one? "
                "data.label_column names it, and numbers are for task.name=regression"
            )
        return rows.set_column(rows.column_names.index("label"), "label", pa.array(found, pa.list_(self.entry)))

    def _entries(self, text: str, length: int) -> list[Any]:
        names = self.split(text, length)
        for name in dict.fromkeys(names):  # not a set, whose order differs between processes
            if len(name) > LONGEST_NAME:
                raise ValueError(f"a label has more than {LONGEST_NAME} characters; check data.label_column")
            self.codes.setdefault(name, len(self.codes))
        return list(map(self.codes.__getitem__, names))

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
        present = np.unique(np.concatenate([np.unique(flatten(rows)[0]) for rows in train]))
        names = list(self.codes)
        found = sorted({names[code] for code in present} - self.ignored)
        labels = self.task.labels if self.task.labels is not None else tuple(found)
        require(len(set(labels)) == len(labels), f"task.labels={labels} has a name twice; name each class once")
        if len(found) < 2:
            what = f"one class only, {quote(found[0])}," if found else "no class"
            raise DataError(
                f"{source}: column {self.column!r} has {what} in the training proteins; two are needed, check "
                "data.label_column and data.keep"
            )
        self.task = replace(self.task, labels=labels)

    def targets(self, rows: pa.Table, problems: Problems) -> np.ndarray:
        """Return what encoded labels say once the classes are known, here int64 [rows] class indices.

        A label that names no class is noted in `problems`.
        """
        flat, counts = flatten(rows)
        return self._classes(rows, flat, counts, problems).astype(np.int64)

    def _classes(self, rows: pa.Table, flat: np.ndarray, counts: np.ndarray, problems: Problems) -> np.ndarray:
        """Return int16 [entries]: the class index of each code."""
        labels = self.task.labels or ()
        index = {name: i for i, name in enumerate(labels)} | dict.fromkeys(self.ignored, UNKNOWN)
        none = UNKNOWN - 1
        # Each name is looked up once, then all entries are mapped by their codes.
        classes = np.array([index.get(name, none) for name in self.codes], dtype=np.int16)[flat]
        strange = np.flatnonzero(classes == none)
        first = np.cumsum(counts) - counts
        row_of = np.searchsorted(first, strange, side="right") - 1
        names, known = list(self.codes), ", ".join(map(quote, labels[:20])) + (", ..." if len(labels) > 20 else "")
        # One problem per row, its first unknown entry: a residue task could have thousands.
        for row, at in zip(*np.unique(row_of, return_index=True), strict=True):
            place = f" of residue {strange[at] - first[row] + 1}" if self.per_residue else ""
            what = f"label {quote(names[flat[strange[at]]])}{place} is not one of the classes {known}"
            cure = "correct it, add training proteins of it, or filter it with data.keep"
            self._add(problems, rows, int(row), f"{what}; {cure}")
        return np.maximum(classes, UNKNOWN)

    def resolve(self, train: np.ndarray) -> TaskConfig:
        """Return the task with what the training rows decide, here balanced class weights.

        `train` is their `ExampleTable.labels`. Raise ConfigError where class weights do not fit the classes, or a class
        has no training rows to balance; DataError where the values of a regression are all equal.
        """
        task, labels = self.task, self.task.labels or ()
        if task.class_weights == "balanced":
            return replace(task, class_weights=self._balanced(train))
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
    """Any number of classes per protein, joined by `;`."""

    def split(self, text: str, length: int) -> list[str]:
        names = [name.strip() for name in text.split(LIST_JOINER)]
        if "" in names:
            cure = f"write its labels with one {LIST_JOINER!r} between"
            raise ValueError(f"label {quote(text)} has an empty part; {cure}")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"label {quote(text)} has {quote(twice[0])} twice; keep one")
        return names

    def _entries(self, text: str, length: int) -> list[Any]:
        return sorted(super()._entries(text, length))  # so that `A;B` and `B;A` are equal

    def strata(self, rows: pa.Table) -> np.ndarray:
        """Return int64 [rows]: the rarest label of each row, of equally rare ones the first by name."""
        flat, counts = flatten(rows)
        names = list(self.codes)
        by_name = np.empty(len(names), dtype=np.int64)
        by_name[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
        often = np.bincount(flat, minlength=len(names))
        order = np.argsort(np.lexsort((by_name, often)))  # code -> its place, the rarest first
        # Grouped by its rarest label, so that rare labels are spread evenly over the splits; common ones need no help.
        return _numbered(np.minimum.reduceat(order[flat], np.cumsum(counts) - counts))

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
        names = [name.strip() for name in text.split(RESIDUE_JOINER)] if RESIDUE_JOINER in text else list(text)
        names = [text] if length == 1 else names
        if len(names) != length:
            raise ValueError(
                f"{len(names)} residue labels for a sequence of {length} residues; write one character per residue, "
                f"or as many labels with {RESIDUE_JOINER!r} between"
            )
        if "" in names:
            at = names.index("") + 1
            raise ValueError(f"the label of residue {at} is empty; write one of task.ignore where it is unknown")
        return names

    def strata(self, rows: pa.Table) -> np.ndarray:
        return np.zeros(len(rows), dtype=np.int64)

    def targets(self, rows: pa.Table, problems: Problems) -> np.ndarray:
        """Return int16 [residues of all rows]: class indices, `UNKNOWN` for a label in `task.ignore`."""
        return self._classes(rows, *flatten(rows), problems)


class Numbers(Labels):
    """A value per protein."""

    entry = pa.float64()
    numeric = True

    def _entries(self, text: str, length: int) -> list[Any]:
        value = to_number(text)
        if not math.isfinite(value):
            raise ValueError(f"{quote(text)} is no finite number; correct it or remove the record")
        return [value]

    def count(self, rows: pa.Table) -> Counter[str]:
        return Counter()  # values have no classes

    def strata(self, rows: pa.Table) -> np.ndarray:
        # the quantile that each value is in
        values = flatten(rows)[0]
        return np.searchsorted(np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1]), values)

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
