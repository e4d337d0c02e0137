"""One verdict, for console, result.json, report, card and docs/results.md: a model beside its baselines, and alarms.

A model and a baseline are scored on the same resamples of the same proteins (or clusters of them), and each resample
gives a difference. The model is better, or worse, where the 95 % interval of the differences lies on one side of 0;
else it is undecided. Intervals of the two alone decide less: the proteins that are hard for one are hard for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esm_neuron.metrics.bootstrap import Scores, Value, interval
from esm_neuron.metrics.text import number, show

BETTER, UNDECIDED, WORSE = "better", "undecided", "worse"
FEW = 50
"""Proteins, or clusters, below which an interval is told to be uncertain: at 20 "95 %" held the truth in 86 to 89 of
100 samples (AUPRC, MCC, AUROC)."""
CHANCE = {"auroc": 0.5, "spearman": 0.0}
"""Metric of ranking -> what it is where nothing was learned."""
_TRY = (
    "try another optim.lr (ten times higher and lower), more loop.max_steps, {weights}or model.init=pretrained with a "
    "larger ESM-2; look at the loss in `esm-neuron report`{labels}"
)
_LABELS = ", and at the labels: are they those of these sequences?"
_TRY_PROBE = (
    "try a larger ESM-2 (model.name), {weights}or fine-tuning from this probe (adapter.kind=lora, adapter.init_from); "
    "look at the labels: are they those of these sequences?"
)


def compare(one: Scores, other: Scores, metric: str, greater_is_better: bool) -> dict[str, Value] | None:
    """Return `difference` of a metric (`one` minus `other`), `difference_ci` and `verdict`, which is about `one`.

    Both are of the same proteins and clusters. None where the metric is undefined for one of the two, or has no
    resamples.
    """
    a, b = one.get(metric), other.get(metric)
    if not isinstance(a, float) or not isinstance(b, float) or not {metric} <= one.drawn.keys() & other.drawn.keys():
        return None
    bounds = interval(one.drawn[metric] - other.drawn[metric], a - b, units_of(one))
    return {"difference": a - b, "difference_ci": bounds, "verdict": decided(bounds, greater_is_better)}


def decided(difference_ci: list[float] | None, greater_is_better: bool) -> str:
    """Return `better`, `worse`, or `undecided` where the interval contains 0 or there is none."""
    if difference_ci is None or difference_ci[0] <= 0 <= difference_ci[1]:
        return UNDECIDED
    return BETTER if (difference_ci[0] > 0) == greater_is_better else WORSE


def units_of(scores: Mapping[str, Any]) -> int:
    """Return how many proteins, or clusters of them, the intervals of an evaluation draw."""
    return int(scores.get("n_clusters", scores.get("n_records", scores["n"])))


def verdict(own: Scores, baselines: Mapping[str, Scores], metric: str, greater_is_better: bool) -> dict[str, Any]:
    """Return the verdict on a model for result.json; empty where no baseline can be compared.

    `text` says it in a sentence or two, `best` is the baseline with the best value of `metric`, `verdict` is against
    that one, and `against` has for every baseline what `compare` found.
    """
    found = {name: compare(own, scores, metric, greater_is_better) for name, scores in baselines.items()}
    against = {name: one for name, one in found.items() if one is not None}
    if not against:
        return {}
    sign = 1 if greater_is_better else -1
    best = max(against, key=lambda name: sign * float(baselines[name][metric]))  # type: ignore[arg-type]
    text = _sentence(own, baselines[best], metric, best, against[best])
    others = {name: str(one["verdict"]) for name, one in against.items() if name != best}
    for said, joined in ((BETTER, "better than"), (UNDECIDED, "undecided against"), (WORSE, "worse than")):
        names = [name for name, word in others.items() if word == said]
        text += f" Also {joined} {', '.join(names)}." if names else ""
    if units_of(own) < FEW:
        text += f" {few_text(own)}"
    return {"metric": metric, "best": best, "verdict": against[best]["verdict"], "text": text, "against": against}


def _sentence(own: Scores, other: Scores, metric: str, name: str, found: Mapping[str, Any]) -> str:
    word = {BETTER: "Better than", UNDECIDED: "Undecided against", WORSE: "Worse than"}[found["verdict"]]
    mine, theirs, bounds = show(own, metric), show(other, metric), found["difference_ci"]
    shown = f" [{signed(bounds[0])}, {signed(bounds[1])}]" if bounds else ""
    return (
        f"{word} the best baseline, {name}, by {mine.name}: {mine.text} against {theirs.text}, a difference of "
        f"{signed(found['difference'])}{shown} on the same resamples."
    )


def signed(value: float) -> str:
    """Write a difference: `+0.031`."""
    return f"{'+' if value >= 0 else '-'}{number(abs(value))}"


def few_text(scores: Mapping[str, Any]) -> str:
    """Say that the intervals of an evaluation are of few proteins or clusters."""
    kind = "independent clusters of proteins" if "n_clusters" in scores else "proteins"
    return f"The intervals are of {units_of(scores)} {kind}; below {FEW} they are often too narrow."


def alarms(scores: Mapping[str, Any], verdict: Mapping[str, Any] | None = None, probe: bool = False) -> list[str]:
    """Return what is wrong with a model by the metrics of a split, each with what to try; empty where nothing is.

    It answers one thing for every protein or residue; the interval of AUROC or Spearman holds chance; or, for a task
    without such a metric, `verdict` does not find it better than its best baseline.
    For a `probe` there is no rate and no number of steps to try.
    """
    found = []
    only = scores.get("only_answer")
    ranking = next((name for name in CHANCE if scores.get(f"{name}_ci") is not None), None)
    ranks = ranking is not None and scores[f"{ranking}_ci"][0] > CHANCE[ranking]
    told = f"{show(scores, ranking).name} {show(scores, ranking).text}" if ranking is not None else ""
    if only is not None:
        learned = f"yet it ranks better than chance: {told}" if ranks else "it shows nothing that tells proteins apart"
        found.append(f"ALARM: it answers {only!r} everywhere; {learned}")
    if ranking is not None and not ranks:
        chance = f"chance, which is {number(CHANCE[ranking])}"
        found.append(f"ALARM: it is not shown to rank better than {chance}: {told}")
    elif ranking is None and only is None and verdict and verdict["verdict"] != BETTER and not _ranks(scores):
        known = "is worse" if verdict["verdict"] == WORSE else "is not shown to be better"
        found.append(f"ALARM: it {known} than {verdict['best']}, which knows frequencies alone")
    weights = "task.class_weights=balanced, " if "macro_f1" in scores else ""
    labels = "" if "perplexity" in scores else _LABELS  # masked LM has none
    return [f"{text}; {(_TRY_PROBE if probe else _TRY).format(weights=weights, labels=labels)}" for text in found]


def _ranks(scores: Mapping[str, Any]) -> bool:
    return any(name in scores for name in CHANCE)
