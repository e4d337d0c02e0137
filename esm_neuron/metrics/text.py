"""Figures as people read them: names, digits, intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esm_neuron.config import AdapterConfig

NAMES = {
    "loss": "loss", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "mcc": "MCC",
    "macro_f1": "macro-F1", "micro_f1": "micro-F1", "auroc": "AUROC", "auprc": "AUPRC",
    "subset_accuracy": "all labels right", "spearman": "Spearman", "pearson": "Pearson", "rmse": "RMSE", "mae": "MAE",
    "r2": "R²", "perplexity": "perplexity",
}  # fmt: skip
"""Figure -> its name for people."""
LOWER_IS_BETTER = {"loss", "rmse", "mae", "perplexity"}


@dataclass(frozen=True)
class Shown:
    """A figure of one evaluation."""

    key: str
    value: float | None
    interval: tuple[float, float] | None

    @property
    def name(self) -> str:
        """For people."""
        return NAMES.get(self.key, self.key)

    @property
    def text(self) -> str:
        """The value and its 95 % interval; a dash where it is undefined."""
        if self.value is None:
            return "–"
        return number(self.value) + (f" [{', '.join(map(number, self.interval))}]" if self.interval else "")


def number(value: float) -> str:
    """Three decimals, or four significant digits of what is 100 or more."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def shown(metrics: Mapping[str, Any]) -> list[Shown]:
    """The figures of an evaluation that have an interval, in their order; counts and figures by class have none."""
    names = [name for name in metrics if f"{name}_ci" in metrics]
    return [show(metrics, name) for name in names]


def show(metrics: Mapping[str, Any], name: str) -> Shown:
    """One figure of an evaluation."""
    bounds = metrics.get(f"{name}_ci")
    return Shown(name, metrics.get(name), None if bounds is None else (bounds[0], bounds[1]))


def trained_text(adapter: AdapterConfig) -> str:
    """What of a model was trained, such as `LoRA` or `QLoRA (nf4)`."""
    if adapter.kind == "qlora":
        return f"QLoRA ({adapter.quantization})"
    return {"none": "full fine-tuning", "head": "head only", "lora": "LoRA"}[adapter.kind]


def counted(metrics: Mapping[str, Any], task: str) -> str:
    """What an evaluation has scored: `862 proteins`, `9,120 residues of 40 proteins`."""
    proteins = metrics.get("n_records", metrics["n"])
    of_proteins = f"{proteins:,} protein{'' if proteins == 1 else 's'}"
    if "n_records" not in metrics:
        return of_proteins
    return f"{metrics['n']:,} {'hidden ' if task == 'masked_lm' else ''}residues of {of_proteins}"


def clean_of(result: Mapping[str, Any], split: str) -> str:
    """What the clean rows of a split are."""
    return f"without a homolog in the training rows (by {result['leaks'][split]['method']})"


def leak_text(result: Mapping[str, Any], split: str) -> str:
    """A sentence: how many rows of a split have a homolog in the training rows; that it is not known, where it is."""
    leak = (result.get("leaks") or {}).get(split)
    if leak is None:
        return f"Homologs of {split} rows in the training rows were not looked for."
    has_homolog = f"{leak['homologs']:,} of {leak['rows']:,} {split} rows"
    return f"{has_homolog} have a homolog in the training rows (by {leak['method']})."


def best_baseline(baselines: Mapping[str, Mapping[str, Any]], metric: str) -> tuple[str, Shown] | None:
    """The baseline with the best `metric` and its figure; None where there is none or it is defined for none."""
    known = {name: show(metrics, metric) for name, metrics in baselines.items() if metrics.get(metric) is not None}
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(known.items(), key=lambda item: sign * (item[1].value or 0.0), default=None)


def verdict(metrics: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """A sentence: whether a model is better than the best baseline on `metric`; empty where that cannot be said.

    Intervals that overlap are called undecided; they are of the same rows, so a paired test may still tell.
    """
    best, own = best_baseline(baselines, metric), show(metrics, metric)
    if best is None or own.value is None:
        return ""
    name, other = best
    sign = -1 if metric in LOWER_IS_BETTER else 1
    better = sign * (own.value - (other.value or 0.0)) > 0
    apart = own.interval and other.interval and (
        own.interval[0] > other.interval[1] or own.interval[1] < other.interval[0]
    )  # fmt: skip
    said = "Better than" if better else "Not better than"
    doubt = "" if apart else ", with intervals that overlap" if own.interval and other.interval else ""
    return f"{said} the {name} baseline by {own.name}: {own.text} against {other.text}{doubt}."
