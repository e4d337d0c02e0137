"""Labels: from the text of a label column to targets, and what the training rows decide about them.

A task whose labels are read has a row in `KINDS`. A list, such as JSON or Parquet have it, arrives as text joined by
`LabelKind.joiner`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import TaskConfig, require
from esm_neuron.data.records import LIST_JOINER, RESIDUE_JOINER, to_number
from esm_neuron.data.validation import Problems, quote
from esm_neuron.errors import ConfigError, DataError

UNKNOWN = -1
"""Class index of a residue that nothing is known of: weight 0."""
MOST_CLASSES = np.iinfo(np.int16).max
"""Class indices are int16."""
LONGEST_NAME = 1000
"""Characters of a class name; a longer one is another column's content."""
COLUMNS = ("id", "label", "sequence", "line")
"""Columns of rows that `LabelRows` needs."""
BINS = 10
"""Quantiles of a regression's values that a sample of rows is spread over."""


@dataclass(frozen=True)
class LabelRows:
    """The label column of some rows, and how errors name it."""

    texts: Sequence[str]
    lengths: Sequence[int]
    """Residues of each row's sequence."""
    lines: Sequence[int]
    """Line or record number of each row."""
    ids: Sequence[str]
    source: str
    column: str

    @classmethod
    def of(cls, rows: pa.Table, source: str, column: str) -> LabelRows:
        """Those of a table with the columns in `COLUMNS`."""
        lengths = pc.utf8_length(rows["sequence"]).to_pylist()
        return cls(rows["label"].to_pylist(), lengths, rows["line"].to_pylist(), rows["id"].to_pylist(), source, column)

    def problem(self, problems: Problems, row: int, message: str) -> None:
        """Note what is wrong with a row's label."""
        problems.add(self.lines[row], f"column {self.column!r} of {quote(self.ids[row])}: {message}")


Parse = Callable[[str, int], list[str]]
"""A label's text and the residues of its protein -> the class names in it. Raises ValueError with what is wrong."""


def _one(text: str, length: int) -> list[str]:
    return [text]


def _several(text: str, length: int) -> list[str]:
    names = [name.strip() for name in text.split(LIST_JOINER)]
    if "" in names:
        raise ValueError(f"label {quote(text)} has an empty part; write its labels with one {LIST_JOINER!r} between")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"label {quote(text)} has {quote(twice[0])} twice; keep one")
    return names


def _each_residue(text: str, length: int) -> list[str]:
    names = [name.strip() for name in text.split(RESIDUE_JOINER)] if RESIDUE_JOINER in text else list(text)
    names = [text] if length == 1 else names
    if len(names) != length:
        raise ValueError(
            f"{len(names)} residue labels for a sequence of {length} residues; write one character a residue, or as "
            f"many labels with {RESIDUE_JOINER!r} between"
        )
    if "" in names:
        raise ValueError(f"the label of residue {names.index('') + 1} is empty; write one of task.ignore where unknown")
    return names


def _number(text: str) -> float:
    value = to_number(text)
    if not math.isfinite(value):
        raise ValueError(f"{quote(text)} is no finite number; correct it or remove the row")
    return value


@dataclass(frozen=True)
class LabelKind:
    """How the labels of a task are written."""

    joiner: str = LIST_JOINER
    parse: Parse | None = None
    """None: labels are numbers."""


KINDS: Mapping[str, LabelKind] = {
    "sequence_classification": LabelKind(parse=_one),
    "multi_label": LabelKind(parse=_several),
    "residue_classification": LabelKind(RESIDUE_JOINER, _each_residue),
    "regression": LabelKind(),
}
"""Task -> its labels; a task that is not here needs none."""


def joiner_of(task: TaskConfig) -> str:
    """What stands between the entries of a label that is a list."""
    return KINDS[task.name].joiner if task.name in KINDS else LIST_JOINER


def balance(task: str, rows: LabelRows, problems: Problems) -> Counter[str] | list[float]:
    """How often each class is in the labels of some rows, as the task writes them; of a regression their values.

    Labels that cannot be read are noted in `problems` and not counted.
    """
    parse = KINDS[task].parse
    if parse is None:
        return [float(value) for value in _numbers(rows, problems)]
    return Counter(name for names in _parsed(parse, rows, problems) for name in names)


def label_keys(task: str, rows: LabelRows) -> list[str]:
    """A text for each label, the same for two that say the same, such as `A;B` and `B;A`, or 1 and 1.0; a label that
    cannot be read stands for itself."""
    kind = KINDS[task]

    def key(text: str, length: int) -> str:
        try:
            if kind.parse is None:
                return repr(_number(text))
            names = kind.parse(text, length)
        except ValueError:
            return text
        return kind.joiner.join(sorted(names) if task == "multi_label" else names)

    return [key(text, length) for text, length in zip(rows.texts, rows.lengths, strict=True)]


def class_names(task: TaskConfig, train: Iterable[LabelRows]) -> tuple[str, ...]:
    """The configured class names, or the sorted ones of the training rows, given in chunks; none for a task without
    classes.

    Raises:
        DataError: labels that cannot be read, those of all chunks together; fewer than two classes, or more than
            `MOST_CLASSES`.
        ConfigError: a name twice.
    """
    parse = KINDS[task.name].parse
    present: set[str] = set()
    problems = Problems("")
    for rows in train:
        problems.source = rows.source
        if parse is None:
            _numbers(rows, problems)
        else:
            present.update(name for names in _parsed(parse, rows, problems) for name in names)
        if len(present) > MOST_CLASSES:
            raise DataError(
                f"{rows.source}: column {rows.column!r} has more than {MOST_CLASSES} classes in the training rows; "
                "is it the right one? data.label_column names it, and numbers are for task.name=regression"
            )
    problems.raise_any()
    if parse is None:
        return ()
    if task.name == "residue_classification":
        present -= set(task.ignore)
    found = sorted(present)
    labels = task.labels if task.labels is not None else tuple(found)
    require(len(set(labels)) == len(labels), f"task.labels={labels} has a name twice; name each class once")
    if len(found) < 2:
        what = f"one class only, {quote(found[0])}," if found else "no class"
        raise DataError(
            f"{rows.source}: column {rows.column!r} has {what} in the training rows; two are needed, check "
            "data.label_column and data.keep"
        )
    return labels


def _rarest(texts: Sequence[str]) -> np.ndarray:
    names = [_several(text, 0) for text in texts]
    often = Counter(name for row in names for name in row)
    return _numbered([min(row, key=lambda name: (often[name], name)) for row in names])


def _quantiles(texts: Sequence[str]) -> np.ndarray:
    values = np.array([_number(text) for text in texts])
    return np.searchsorted(np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1]), values)


def _numbered(names: Sequence[str]) -> np.ndarray:
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([index[name] for name in names], dtype=np.int64)


STRATA: Mapping[str, Callable[[Sequence[str]], np.ndarray]] = {
    "sequence_classification": _numbered,
    "multi_label": _rarest,
    "regression": _quantiles,
}
"""Task -> groups int64 [rows] of label texts, of which a sample takes equal shares: classes; of several labels the
rarest; quantiles of a value. Tasks that are not here have one group."""


def targets(task: TaskConfig, labels: Sequence[str], rows: LabelRows, problems: Problems) -> list[np.ndarray]:
    """What each row's label says; what cannot be read, or names no class of `labels`, is noted in `problems`.

    Returns:
        An array a row: int64 [] class index; uint8 [classes], 1 for each label it has; float64 [] value; int16
        [residues] class indices, `UNKNOWN` for a label in `task.ignore`.
    """
    parse = KINDS[task.name].parse
    if parse is None:
        return _numbers(rows, problems)
    index = {label: i for i, label in enumerate(labels)}
    if task.name == "residue_classification":
        index |= dict.fromkeys(task.ignore, UNKNOWN)
    known = ", ".join(quote(label) for label in labels[:20]) + (", ..." if len(labels) > 20 else "")
    found = []
    for row, names in enumerate(_parsed(parse, rows, problems)):
        strange = [name for name in names if name not in index]
        if strange:
            at = f" of residue {names.index(strange[0]) + 1}" if task.name == "residue_classification" else ""
            cure = "correct it, add training rows of it, or filter it with data.keep"
            what = f"label {quote(strange[0])}{at} is not one of the classes {known}; {cure}"
            rows.problem(problems, row, what)
            names = []
        classes = np.array([index[name] for name in names], dtype=np.int16)
        if task.name == "multi_label":
            classes = np.bincount(classes, minlength=len(labels)).astype(np.uint8)
        found.append(classes if task.name != "sequence_classification" else classes.astype(np.int64).sum())
    return found


def _numbers(rows: LabelRows, problems: Problems) -> list[np.ndarray]:
    found = []
    for row, text in enumerate(rows.texts):
        try:
            found.append(np.float64(_number(text)))
        except ValueError as error:
            rows.problem(problems, row, str(error))
    return [np.asarray(value) for value in found]


def _parsed(parse: Parse, rows: LabelRows, problems: Problems) -> list[list[str]]:
    found = []
    for row, (text, length) in enumerate(zip(rows.texts, rows.lengths, strict=True)):
        try:
            names = parse(text, length)
            if max(map(len, names)) > LONGEST_NAME:
                raise ValueError(f"a label has more than {LONGEST_NAME} characters; check data.label_column")
        except ValueError as error:
            rows.problem(problems, row, str(error))
            names = []
        found.append(names)
    return found


def resolve(task: TaskConfig, labels: Sequence[str], train: np.ndarray) -> TaskConfig:
    """The task with what the training rows decide: class names, balanced class weights, a regression's mean and sd.

    Args:
        task: as configured.
        labels: class names.
        train: `ExampleTable.labels` of the training rows.

    Raises:
        DataError: a regression whose training values are all equal.
        ConfigError: class weights that do not fit the classes, or a class without training rows to balance.
    """
    task = replace(task, labels=tuple(labels) or None)
    if task.name == "regression":
        return _standardised(task, train)
    if task.class_weights == "balanced":
        return replace(task, class_weights=_balanced(task, labels, train))
    if isinstance(task.class_weights, dict):
        for label in sorted(set(task.class_weights) ^ set(labels)):
            what = "is no class" if label in task.class_weights else "has no weight"
            raise ConfigError(f"task.class_weights: {label!r} {what}; weigh each of {', '.join(labels)}")
    return task


def _standardised(task: TaskConfig, values: np.ndarray) -> TaskConfig:
    mean, sd = float(values.mean()), float(values.std())
    if sd == 0:
        raise DataError(f"every training value is {mean:g}: there is nothing to learn; check data.label_column")
    return replace(
        task,
        target_mean=mean if task.target_mean is None else task.target_mean,
        target_sd=sd if task.target_sd is None else task.target_sd,
    )


def _balanced(task: TaskConfig, labels: Sequence[str], train: np.ndarray) -> dict[str, float]:
    """n / (classes x n_c), as in scikit-learn; of several labels, negatives / positives of each."""
    if task.name == "multi_label":
        counts = train.sum(0, dtype=np.int64)
        weights = (len(train) - counts) / np.maximum(counts, 1)
    else:
        counts = np.bincount(train[train >= 0], minlength=len(labels))
        weights = counts.sum() / (len(labels) * np.maximum(counts, 1))
    for label, count, weight in zip(labels, counts, weights, strict=True):
        require(
            count > 0 and weight > 0,
            f"task.class_weights=balanced: {'no' if count == 0 else 'every'} training row is of class {label!r}; weigh "
            "the classes by hand, or leave it out of task.labels",
        )
    return {label: round(float(weight), 6) for label, weight in zip(labels, weights, strict=True)}
