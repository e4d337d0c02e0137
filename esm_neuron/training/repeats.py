"""Runs that belong together, each in a folder of its own: the folds of a cross-validation, the seeds of an ensemble.

Folds: every protein is tested on once, by a model that has not seen it: each run chooses its checkpoint by validation
proteins among the other folds, and opens its own fold at the end. Seeds: the runs share their proteins and differ in
new weights, order and dropout; what is scored is the mean of their predictions (Lakshminarayanan et al. 2017,
arXiv:1612.01474), calibrated as a whole (Rahaman & Thiery 2021, arXiv:2007.08792). The spread over folds or seeds is no
standard error, since they share training proteins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from esm_neuron.backends import opened_backend
from esm_neuron.config import DataConfig, TrainConfig, require, settings
from esm_neuron.distributed import from_main_rank, log_nothing, main_rank_only
from esm_neuron.files import check_ours, claimed, finite, note, write_json, write_text
from esm_neuron.metrics.text import ending
from esm_neuron.redact import Lines
from esm_neuron.run_dir import CALIBRATION, CONFIG, FOLDS, RESAMPLES, RESULT, member_folders, predictions_name
from esm_neuron.tasks import task_class
from esm_neuron.training import final_eval, run

Log = Callable[[str], None]
Scores = dict[str, dict[str, Any]]
"""Metric -> its mean, standard deviation and values by run."""
CACHE = "cache"
"""Folder of tokenized data, which runs that belong together share."""


def train_folds(cfg: TrainConfig, log: Log) -> run.Outcome:
    """Train and test on each fold of `data.folds`; write OUT/fold-1 and so on, and OUT/folds.json.

    With `checkpoint.resume: auto`, finished folds are evaluated again and not trained. Raise EsmNeuronError as
    `run.train` does.
    """
    out = Path(cfg.output)
    with _claimed(out, [FOLDS]) as writes:
        results: list[Mapping[str, Any]] = []
        for number in range(1, int(cfg.data.folds or 0) + 1):
            own = replace(cfg, output=str(out / f"fold-{number}"), data=replace(cfg.data, fold=str(number)))
            log(f"fold {number} of {cfg.data.folds}, in {own.output}")
            outcome = run.train(own, log)
            if outcome.stopped_by is not None:
                return outcome
            results.append(outcome.result)
            # the model that `auto` means, and what else the first fold has resolved, hold for all
            cfg = replace(cfg, model=outcome.evidence.cfg.model) if outcome.evidence else cfg
        summary = summarize(results)
        if writes:
            note(out, [FOLDS])
            write_json(out / FOLDS, summary)
            log(render(summary, task_class(cfg.task.name).greater_is_better))
    return run.Outcome(summary, None)


def train_seeds(cfg: TrainConfig, log: Log) -> run.Outcome:
    """Train with each of `seeds` seeds; write OUT/seed-42 and so on, and the scores of their mean as those of a run.

    With `checkpoint.resume: auto`, finished runs are evaluated again and not trained. Raise EsmNeuronError as
    `run.train` does.
    """
    out, outcomes = Path(cfg.output), list[run.Outcome]()
    names = [CONFIG, RESULT, RESAMPLES, CALIBRATION, *map(predictions_name, ("valid", "test"))]
    with _claimed(out, names) as writes:
        require(
            cfg.checkpoint.resume == "auto" or not (out / RESULT).exists(),
            f"output={out} already holds a run; go on with --checkpoint.resume auto, or choose another --output",
        )
        for number, folder in enumerate(member_folders(out, cfg)):
            own = _member(cfg, number, folder)
            log(f"seed {own.seed}, {number + 1} of {cfg.seeds}, in {own.output}")
            outcome = run.train(own, log)
            if outcome.stopped_by is not None:
                return outcome
            outcomes.append(outcome)
            # the model that `auto` means, and what else the first run has resolved, hold for all
            cfg = replace(cfg, model=outcome.evidence.cfg.model) if outcome.evidence else cfg
        if writes:
            note(out, names)
        result = _ensemble(cfg, outcomes, log)
    return run.Outcome(result, None)


def shared_data(cfg: TrainConfig, out: Path) -> DataConfig:
    """Return the data settings of runs that share tokenized data below `out`, and count no homologs for a reader."""
    data = cfg.data
    # clusters need homologs to be sampled, and the folds of a probe to be made
    homologs = data.homologs if data.sample == "clusters" or cfg.adapter.kind == "probe" else "off"
    return replace(data, homologs=homologs, cache=data.cache or str(out / CACHE))


def _member(cfg: TrainConfig, number: int, folder: Path) -> TrainConfig:
    """Return the settings of a run of an ensemble: the same proteins; what is scored once, of the mean, left out."""
    return replace(
        cfg,
        output=str(folder),
        seed=cfg.seed + number,
        seeds=1,
        data=replace(shared_data(cfg, Path(cfg.output)), sample_seed=cfg.sampling_seed),
        log=replace(cfg.log, baselines=False),
    )


def _ensemble(cfg: TrainConfig, outcomes: Sequence[run.Outcome], log: Log) -> dict[str, Any]:
    """Score the mean of the runs' predictions, write config.yaml and result.json of the whole, and return the result.

    Its steps, residues and seconds are sums.
    """
    out = Path(cfg.output)
    found = [outcome.evidence for outcome in outcomes if outcome.evidence is not None]
    one, results = found[0], [outcome.result for outcome in outcomes]
    held_out = {split: table for split, table in one.tables.items() if split != "train"}
    whole = replace(cfg, model=one.cfg.model, task=one.cfg.task)
    with opened_backend(whole) as backend:
        log = log if backend.topology.is_main else log_nothing
        leaks = from_main_rank(backend, lambda: final_eval.find_leaks(whole, one.tables, log))

        def predict(split: str) -> Any:
            return one.task.averaged([each.predictions[split] for each in found])

        scores = final_eval.score_splits(whole, one.task, backend, one.tables["train"], held_out, predict, leaks, log)
        train = {**results[0]["train"], **{
            name: sum(result["train"][name] for result in results) for name in ("steps", "residues", "seconds")
        }}  # fmt: skip
        result = finite({
            **results[0],
            "chosen_step": sum(result["chosen_step"] for result in results),
            "train": {**train, "residues_per_second": train["residues"] / max(train["seconds"], 1e-9)},
            "seeds": {
                "seeds": [each.cfg.seed for each in found],
                **{split: _scores([result[split] for result in results]) for split in held_out},
            },
            **scores,
        })  # fmt: skip

        def write() -> None:
            write_text(out / CONFIG, settings.dump(whole))
            if scores["calibration"] is not None:
                write_json(out / CALIBRATION, scores["calibration"])
            write_json(out / RESULT, result)

        main_rank_only(backend, write)
        log(render_seeds(result))
        log(Lines.of(ending(result, one.task.unit, cfg.output, one.task.needs_labels)))
    return dict(result)


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what folds.json holds, of the folds' results: metrics of the test proteins, ours and the baselines'."""
    first = results[0]
    baselines = first["baselines"].get("test", {})
    summary: dict[str, Any] = finite(
        {
            "task": first["task"],
            "metric": first["metric"],
            "folds": len(results),
            "proteins": [result["data"]["test"]["records"] for result in results],
            "metrics": _scores([result["test"] for result in results]),
            "clean": _scores([result["clean"].get("test", {}) for result in results]),
            "baselines": {
                name: _scores([result["baselines"]["test"].get(name, {}) for result in results]) for name in baselines
            },
        }
    )
    return summary


def _scores(runs: Sequence[Mapping[str, Any]]) -> Scores:
    """Return mean and standard deviation (of a sample, n - 1) of each number that some run has."""
    found: Scores = {}
    for name in dict.fromkeys(name for one in runs for name in one):
        values = [one.get(name) for one in runs]
        known = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if known:
            sd = stdev(known) if len(known) > 1 else None
            found[name] = {"mean": mean(known), "sd": sd, "values": values}
    return found


def render(summary: Mapping[str, Any], greater_is_better: bool) -> str:
    """Return a line per contestant: mean, spread and values of the task's metric, and how many folds it wins."""
    metric, own = summary["metric"], summary["metrics"]
    lines = [f"{summary['folds']} folds of {', '.join(map(str, summary['proteins']))} test proteins, {metric}:"]
    for name, scores in {"this model": own, **summary["baselines"]}.items():
        if metric not in scores:
            continue
        line = f"  {name}: {_told(scores[metric])}"
        if scores is not own:
            both = zip(own[metric]["values"], scores[metric]["values"], strict=True)
            pairs = [pair for pair in both if None not in pair]
            won = sum((ours > theirs) if greater_is_better else (ours < theirs) for ours, theirs in pairs)
            line += f"; ours is better in {won} of {len(pairs)}"
        lines.append(line)
    return Lines.of(lines)


def render_seeds(result: Mapping[str, Any]) -> str:
    """Return a line per split: mean, spread and values of the task's metric by seed, and that of all together."""
    metric, seeds = result["metric"], result["seeds"]
    lines = [f"{len(seeds['seeds'])} seeds, {metric}:"]
    for split in ("valid", "test"):
        if metric in seeds.get(split, {}):
            together = result[split][metric]
            of_mean = "not defined" if together is None else f"{together:.3f}"
            lines.append(f"  {split}: {_told(seeds[split][metric])}; together {of_mean}")
    return Lines.of(lines)


def _told(scores: Mapping[str, Any]) -> str:
    shown = " ".join("-" if value is None else f"{value:.3f}" for value in scores["values"])
    return f"mean {scores['mean']:.3f}, sd {scores['sd'] or 0:.3f} ({shown})"


@contextmanager
def _claimed(out: Path, names: Sequence[str]) -> Iterator[bool]:
    """Claim the folder where this process writes; yield whether it does, as only the first of several does."""
    writes = os.environ.get("RANK", "0") == "0"
    with claimed(out) if writes else nullcontext():
        if writes:
            check_ours(out, names)
        yield writes
