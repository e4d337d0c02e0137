"""Metrics as people read them: names, digits, intervals, and sentences about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = {
    "loss": "loss", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "mcc": "MCC",
    "macro_f1": "macro-F1", "micro_f1": "micro-F1", "auroc": "AUROC", "auprc": "AUPRC",
    "subset_accuracy": "all labels right", "spearman": "Spearman", "pearson": "Pearson", "rmse": "RMSE", "mae": "MAE",
    "r2": "R²", "perplexity": "perplexity",
}  # fmt: skip
"""Metric -> its name for people."""


def name_of(metric: str) -> str:
    """Return a metric's name for people; one that is not in NAMES is written as it is."""
    return NAMES.get(metric, metric.replace("_", " "))


@dataclass(frozen=True)
class Shown:
    """A metric of one evaluation."""

    key: str
    value: float | None
    interval: tuple[float, float] | None
    of: str = ""
    """The class that it is the metric of, where it is of one of several."""

    @property
    def name(self) -> str:
        return name_of(self.key) + (f" of {self.of}" if self.of else "")

    @property
    def text(self) -> str:
        """Return the value with its 95 % interval; a dash where it is undefined."""
        if self.value is None:
            return "–"
        return number(self.value) + (f" [{', '.join(map(number, self.interval))}]" if self.interval else "")


def number(value: float) -> str:
    """Write three decimals, or four significant digits from 100 on."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def shown(metrics: Mapping[str, Any]) -> list[Shown]:
    """Return the metrics of an evaluation that have an interval, in their order: no counts, no metrics by class."""
    return [show(metrics, name) for name in metrics if f"{name}_ci" in metrics]


def show(metrics: Mapping[str, Any], name: str) -> Shown:
    bounds = metrics.get(f"{name}_ci")
    of = str(metrics.get(f"{name}_of", ""))
    return Shown(name, metrics.get(name), None if bounds is None else (bounds[0], bounds[1]), of)


MOST_COLUMNS = 3
"""Metrics beside each other at the end of a run."""


def use(folder: str | Path, needs_labels: bool) -> str:
    """Return the command that uses a run; one that cannot predict without labels embeds."""
    command, suffix = ("embed", "parquet") if needs_labels else ("predict", "csv")
    return f"esm-neuron {command} --model {folder} --input NEW --output FILE.{suffix}"


def ending(result: Mapping[str, Any], unit: str, folder: str, needs_labels: bool = False) -> list[str]:
    """Return the lines that a run ends with: the model beside its best baseline, the verdict, what is wrong, what next.

    They are of the test proteins, where there are some, else of the validation proteins.
    """
    split = next((split for split in ("test", "valid") if result.get(split)), None)
    next_ = f"  {'next':<12}esm-neuron report {folder}; {use(folder, needs_labels)}"
    if split is None:
        return ["no proteins were held out, so nothing is known of how well it predicts", next_]
    own, found = result[split], (result.get("verdicts") or {}).get(split)
    names = sorted((one.key for one in shown(own)), key=lambda name: (name != result["metric"], name == "loss"))
    columns = names[:MOST_COLUMNS]
    rows = [("this model", own)]
    if found:
        rows.append((found["best"], result["baselines"][split][found["best"]]))
    lines = [f"{split}, {counted(own, unit)}, 95 % intervals", f"  {'':<24}" + _cells([name_of(n) for n in columns])]
    lines += [f"  {name:<24}" + _cells([show(values, n).text for n in columns]) for name, values in rows]
    wrong = (result.get("alarms") or {}).get(split, [])
    if found:
        low_high = found["against"][found["best"]]["difference_ci"]
        said = f"{found['verdict']} by {name_of(found['metric'])}, of the paired difference from {found['best']}"
        lines.append(f"  {'verdict':<12}{said}" + (f": [{low_high[0]:+.3f}, {low_high[1]:+.3f}]" if low_high else ""))
    return [*lines, *(f"  {line}" for line in wrong), next_]


def _cells(texts: list[str]) -> str:
    return "".join(f"{text:<26}" for text in texts).rstrip()


def counted(metrics: Mapping[str, Any], unit: str) -> str:
    """Return what an evaluation has scored: `862 proteins`, or of another unit `9,120 residues of 40 proteins`."""
    proteins = metrics.get("n_records", metrics["n"])
    of_proteins = f"{proteins:,} protein{'' if proteins == 1 else 's'}"
    return f"{metrics['n']:,} {unit} of {of_proteins}" if "n_records" in metrics else of_proteins


def drawn_over(metrics: Mapping[str, Any]) -> str:
    """Say what the intervals of an evaluation are drawn over: `proteins`, or `1,843 clusters of proteins`."""
    clusters = metrics.get("n_clusters")
    return "proteins" if clusters is None else f"{clusters:,} clusters of proteins (families, or mutated positions)"


def clean_of(result: Mapping[str, Any], split: str) -> str:
    """Say what the clean proteins of a split are."""
    return f"without a homolog in training (by {(result.get('leaks') or {}).get(split, {}).get('method')})"


def leak_text(result: Mapping[str, Any], split: str) -> str:
    """Say how many proteins of a split have a homolog in training, or that nobody looked."""
    leak = (result.get("leaks") or {}).get(split)
    if leak is None:
        return f"Homologs of {split} proteins in training were not looked for."
    has_homolog = f"{leak['homologs']:,} of {leak['proteins']:,} {split} proteins"
    return f"{has_homolog} have a homolog in training (by {leak['method']})."


def reading_text(result: Mapping[str, Any]) -> str:
    """Say how the predictions of a run are read, and how often its sets or ranges hold the truth."""
    calibration = result.get("calibration")
    if not calibration:
        none = "Probabilities were not calibrated after training: there were no validation proteins."
        return "" if result.get("valid") else none
    parts = [f"temperature {number(calibration['temperature'])}"] if calibration["temperature"] != 1 else []
    if calibration["thresholds"]:
        parts.append(f"thresholds {', '.join(map(number, calibration['thresholds'][:10]))}")
    more = ", ..." if len(calibration["thresholds"]) > 10 else ""
    proteins = f"{calibration['proteins']:,} validation proteins"
    said = [f"Predictions are read with {' and '.join(parts)}{more}, fitted on {proteins}."] if parts else []
    names = {"test": "test proteins", "clean": "those without a homolog in training"}
    covered = result.get("coverage") or {}
    shares = [
        f"{Shown('', found['covered'], found['covered_ci']).text} of {names.get(part, part)} "
        f"(mean size {number(found['size'])})"
        for part, found in covered.items()
    ]
    for found in list(covered.values())[:1]:  # all are of one level
        said.append(f"`predict --coverage {found['level']}` holds the truth for {', '.join(shares)}.")
    return " ".join(said)
