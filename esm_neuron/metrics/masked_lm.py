"""Metrics of masked language modeling: over hidden residues, with proteins, or clusters of them, resampled."""

from __future__ import annotations

import numpy as np

from esm_neuron.metrics.bootstrap import Scores, Value, bootstrap, numbered, with_intervals


def masked_lm_metrics(sums: np.ndarray, intervals: bool = False, units: np.ndarray | None = None) -> Scores:
    """Return n (residues hidden, each counted in every window that hides it), n_records (proteins with such residues),
    loss (nats per residue), perplexity = exp(loss), accuracy; None where nothing was hidden.

    `sums`, float64 [proteins, 3], are summed cross entropy (nats), hidden residues, and right predictions; with
    `intervals` also `<name>_ci`, drawn over proteins, or over the clusters `units` (int64 [proteins]; their number is
    n_clusters).
    """
    asked = sums[:, 1] > 0
    sums = sums[asked]
    values: dict[str, Value] = {"n": round(float(sums[:, 1].sum())), "n_records": len(sums)}
    values.update(dict.fromkeys(("loss", "perplexity", "accuracy")))
    if len(sums):
        values.update({name: float(value[0]) for name, value in _metrics(sums.sum(0, keepdims=True)).items()})
    if not intervals:
        return Scores(values)
    size, unit = numbered(None if units is None else units[asked], len(sums))
    if size < len(sums):
        values["n_clusters"] = size
    of_unit = np.zeros((size, 3))
    np.add.at(of_unit, unit, sums)
    return with_intervals(values, bootstrap(size, lambda counts: _metrics(counts @ of_unit)), size)


def _metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return metrics, each [k], of sums [k, 3]."""
    loss, weight, right = sums.T
    return {"loss": loss / weight, "perplexity": np.exp(loss / weight), "accuracy": right / weight}
