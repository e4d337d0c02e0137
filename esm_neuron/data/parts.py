"""The rows on their way to a split, and those held out of the training rows where neither file nor column names any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from esm_neuron.config import DataConfig, TrainConfig
from esm_neuron.data.filters import passes
from esm_neuron.data.labels import SHOWN_CLASSES, Labels
from esm_neuron.data.sampling import assign_folds, homolog_clusters, sample_clusters, sample_rows, uneven
from esm_neuron.data.sources import CHUNK_ROWS
from esm_neuron.data.validation import quote
from esm_neuron.errors import DataError


@dataclass(frozen=True)
class Part:
    """Rows on their way to a split, and the file they are from."""

    rows: pa.Table
    """The kept rows of the whole file."""
    source: str
    mask: np.ndarray
    """bool [rows]: which of them are the part's."""

    def __len__(self) -> int:
        return int(self.mask.sum())

    def chunks(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Give the part's rows in order, from CHUNK_ROWS rows of the file at a time; all columns or those named."""
        rows = self.rows if columns is None else self.rows.select(list(columns))
        for start in range(0, len(rows), CHUNK_ROWS):
            mask = self.mask[start : start + CHUNK_ROWS]
            if mask.any():
                yield rows.slice(start, CHUNK_ROWS).filter(pa.array(mask))

    def column(self, name: str) -> list[str]:
        """Return the values of one column."""
        return [value for chunk in self.chunks([name]) for value in chunk[name].to_pylist()]

    def take(self, chosen: np.ndarray) -> Part:
        """Return the rows of the part where `chosen`, bool [rows of the part], holds."""
        mask = self.mask.copy()
        # `chosen` counts the part's own rows: write it to their places among all rows of the file.
        mask[mask] = chosen
        return replace(self, mask=mask)


def labels_of(part: Part) -> pa.Table:
    return pa.concat_tables(part.chunks(["label"]))


def census(parts: Mapping[str, Part], labels: Labels) -> Iterator[str]:
    """Yield a line per held-out split with how often each class is there, as `Labels.describe` does for training."""
    names = labels.task.labels or ()
    for split, part in parts.items():
        counts = labels.count(labels_of(part))
        if split == "train" or not counts or not names:
            continue
        shown = ", ".join(f"{quote(name)[1:-1]} {counts[name]}" for name in names[:SHOWN_CLASSES])
        more = f", and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
        none = [quote(name) for name in names if not counts[name]]
        lacking = f"; none of {', '.join(none[:4])}{', ...' if len(none) > 4 else ''}" if none else ""
        yield f"{split} split: {shown}{more}{lacking}"


def hold_out(
    parts: dict[str, Part], labels: Labels | None, cfg: TrainConfig
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Move rows from training to validation and test where no file has any.

    Return split -> ids of its rows, and warnings about samples by cluster that are short or uneven.
    """
    data = cfg.data
    fractions = {"valid": data.valid_fraction, "test": data.test_fraction}
    wanted = {name: fraction for name, fraction in fractions.items() if name not in parts and fraction > 0}
    if data.folds is not None and data.fold is not None:
        wanted = {"test": 1 / data.folds, **wanted}  # the fold first: the others share what is left
    by_cluster = data.sample == "clusters"
    homologs = homolog_clusters(parts["train"].column("sequence"), data) if wanted and by_cluster else None
    sampled: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for name, fraction in wanted.items():
        train = parts["train"]
        groups, whole = np.zeros(len(train), dtype=np.int64), Counter[str]()
        if labels is not None:
            groups, whole = labels.strata(labels_of(train)), labels.count(labels_of(train))
        allowed = np.concatenate([passes(chunk, data.keep_heldout) for chunk in train.chunks()])
        how: dict[str, Any] = {"seed": cfg.sampling_seed, "split": name, "source": train.source}
        if name == "test" and data.folds is not None:
            chosen = _fold(homologs, groups, allowed, data, cfg.sampling_seed, train.source)
        elif homologs is None:
            chosen = sample_rows(groups, allowed, fraction, **how)
        else:
            chosen = sample_clusters(homologs, groups, allowed, fraction, **how)
        parts |= {"train": train.take(~chosen), name: train.take(chosen)}
        sampled[name] = tuple(parts[name].column("id"))
        if homologs is not None:
            own = Counter[str]() if labels is None or labels.per_residue else labels.count(labels_of(parts[name]))
            counted = whole if own else Counter[str]()
            notes += uneven(name, max(1, round(fraction * len(train))), int(chosen.sum()), counted, own)
            # The next split is sampled from the rows that are left, so the clusters are cut to the same rows.
            homologs = homologs[~chosen]
    return sampled, notes


def _fold(
    homologs: np.ndarray | None, groups: np.ndarray, allowed: np.ndarray, data: DataConfig, seed: int, source: str
) -> np.ndarray:
    """Return which rows are tested on, bool [rows]: those of the fold, but for clusters that may not be held out."""
    folds, number = int(data.folds or 0), int(data.fold or 0)
    clusters = len(np.unique(homologs)) if homologs is not None else len(groups)
    if clusters < 2 * folds:
        unit = "proteins" if homologs is None else "clusters of homologs"
        raise DataError(f"{source}: {clusters} {unit} are too few for data.folds={folds}; use {max(2, clusters // 2)}")
    chosen = assign_folds(homologs, groups, folds, seed) == number - 1
    if homologs is None:
        chosen &= allowed
    else:
        chosen &= ~np.isin(homologs, homologs[~allowed])
    if not chosen.any():
        raise DataError(f"{source}: fold {number} of data.folds={folds} has no proteins that data.keep_heldout leaves")
    return chosen
