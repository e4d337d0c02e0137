"""AUROC and average precision of many bootstrap resamples at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

MOST_THRESHOLDS = 4096
"""Distinct scores kept apart in resamples; of more, neighbours share a threshold, which moves an interval's bounds far
less than resampling does. Point values use every score."""


@dataclass(frozen=True)
class Curve:
    """How often each score occurs in each protein, by falling score: all that a resample needs.

    Rows are sorted once; a resample only changes how often each of them counts.
    """

    positive: sparse.csr_matrix
    """float64 [proteins, thresholds]: rows of the class."""
    negative: sparse.csr_matrix
    """float64 [proteins, thresholds]: rows of other classes."""

    @classmethod
    def of(cls, score: np.ndarray, truth: np.ndarray, unit: np.ndarray, units: int) -> Curve:
        """From rows: score float64 [n], truth bool [n], and the protein int64 [n] (0 to units - 1) of each."""
        distinct, place = np.unique(-score, return_inverse=True)  # rows of one score are one threshold
        thresholds = min(len(distinct), MOST_THRESHOLDS)
        place = place * thresholds // max(len(distinct), 1)

        def counted(rows: np.ndarray) -> sparse.csr_matrix:
            cells = (np.ones(int(rows.sum())), (unit[rows], place[rows]))
            return sparse.csr_matrix(cells, shape=(units, thresholds))

        return cls(counted(truth), counted(~truth))

    @property
    def thresholds(self) -> int:
        """Scores that are told apart."""
        return int(self.positive.shape[1])

    def areas(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC (Mann-Whitney U, ties count half) and average precision, each [k], of resamples [k, proteins].

        NaN where a resample has rows of one kind only.
        """
        positive, negative = counts @ self.positive, counts @ self.negative
        above, false = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
        p, n = above[:, -1], false[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):
            auroc = (negative * (above - positive / 2)).sum(1) / (p * n)
            precision = np.nan_to_num(above / (above + false))  # 0 / 0 only before the first row drawn: recall 0
            auprc = (positive * precision).sum(1) / p
        return auroc, np.where(n > 0, auprc, np.nan)
