"""Search for good settings: runs that are short-listed by their validation proteins, on optuna.

A trial is `run.train` with the values that optuna's tree-structured Parzen estimator proposes (Bergstra et al. 2011),
ended early where its validation metric is below the median of the trials before it. No trial opens a test protein: they
are held out as in the run to come and dropped before they are tokenized. The study is a journal in the output folder,
so that processes share it and a stopped search goes on, in the middle of a trial too.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_neuron.config import TrainConfig, require, settings
from esm_neuron.config.deferred import module
from esm_neuron.config.threads import set_threads
from esm_neuron.distributed import is_alone
from esm_neuron.errors import ConfigError, EsmNeuronError, TrainingError
from esm_neuron.files import (
    check_ours,
    claimed,
    note,
    parse_json,
    read_bytes,
    remove,
    write_bytes,
    write_json,
    write_text,
)
from esm_neuron.models import hub
from esm_neuron.redact import Lines
from esm_neuron.run_dir import LOG_LIMIT, METRICS
from esm_neuron.tasks import task_class
from esm_neuron.training import run
from esm_neuron.training.callbacks import Callback, MetricsLine
from esm_neuron.training.repeats import shared_data
from esm_neuron.training.space import Space, default_space, read_space

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

    from esm_neuron.reports import charts
else:
    optuna, charts = module("optuna"), module("esm_neuron.reports.charts")

logger = logging.getLogger(__name__)

BASE, SPACE, JOURNAL, TABLE, PLOT, BEST, TRIALS = (
    "search.yaml", "space.yaml", "study.journal", "trials.tsv", "search.png", "best.yaml", "trials",
)  # fmt: skip
"""Files of the output folder: the settings that trials start from, the ranges, the study, a line per trial, the plot,
the settings of the best one for `train --config`; and the folders of the trials and of their tokenized data."""
STARTUP = 5
"""Trials that are drawn at random before values are proposed, and before any is ended early."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class Search:
    """What the processes of a search share."""

    cfg: TrainConfig
    """The settings that every trial starts from; `output` is the search's folder."""
    space: Space
    trials: int
    deadline: float | None
    """Second (of `time.time`) after which no trial begins, and running ones stop at their next validation."""

    @property
    def out(self) -> Path:
        return Path(self.cfg.output)

    def over(self) -> bool:
        """Return whether the time is up."""
        return self.deadline is not None and time.time() > self.deadline


class OutOfTimeError(Exception):
    """A trial was at work at the end of the budget; it goes on when the search does."""


def tune(
    cfg: TrainConfig, trials: int = 20, budget: float | None = None, jobs: int = 1, space: Path | None = None,
    log: Log = logger.info,
) -> str | None:  # fmt: skip
    """Search for settings better than those of `cfg`; write a table, a plot and best.yaml to its output folder.

    Return the name of the signal that stopped the search, else None. A search that was stopped, or whose budget was too
    small, goes on with `checkpoint.resume: auto`.

    Args:
        cfg: what is searched from; its own values are the first trial.
        trials: how many trials there are in the end, those of an earlier call included.
        budget: seconds after which no trial begins. The first trial ends in any case.
        jobs: processes that run trials side by side, each with its share of the cores.
        space: YAML with the ranges; None: `default_space`.
        log: takes lines for a person; with several processes a function of a module, which they can import.

    Raises:
        ConfigError: the settings or ranges cannot work, or the folder holds another search.
        EsmNeuronError: no trial has a result.
    """
    run.check(cfg)
    _check(cfg, trials, jobs)
    out, resume = Path(cfg.output), cfg.checkpoint.resume == "auto"
    with claimed(out):
        names = (BASE, SPACE, JOURNAL, TABLE, PLOT, BEST)
        check_ours(out, names)
        known = (out / JOURNAL).is_file()
        require(
            resume or not known,
            f"output={out} already holds a search; go on with --checkpoint.resume auto, or choose another --output",
        )
        earlier = settings.read_config(out / BASE) if known else None
        cfg = replace(cfg, model=hub.choose(cfg.model, None if earlier is None else earlier.model, log))
        ranges = read_space(space, cfg) if space is not None else default_space(cfg)
        _check_same(cfg, ranges, earlier, out)
        note(out, names)
        write_text(out / BASE, settings.dump(cfg))
        write_json(out / SPACE, dict(ranges.ranges))  # which is YAML too
        search = Search(cfg, ranges, trials, None if budget is None else time.time() + budget)
        with _quiet():
            _take_up(search)
            stopped = _side_by_side(search, jobs, log) if jobs > 1 else work(search, 0, log)
            finish(search, stopped is not None, log)
    return stopped


def _check(cfg: TrainConfig, trials: int, jobs: int) -> None:
    data = cfg.data
    require(trials >= 1, f"--trials {trials} must be at least 1")
    require(1 <= jobs <= 64, f"--jobs {jobs} is outside 1 to 64")
    require(is_alone(), "tune runs trials in processes of its own: --jobs N, not under torchrun")
    given = data.valid or data.split_column or data.valid_column or data.valid_fraction > 0
    require(bool(given), "tune chooses by validation proteins; give data.valid, or a data.valid_fraction above 0")
    require(
        data.folds is None or data.fold is not None,
        f"data.folds={data.folds}: a search has one set of validation proteins; leave folds out, and cross-validate "
        "best.yaml",
    )
    try:
        optuna.create_study  # noqa: B018 - imports it
    except ImportError:
        raise ConfigError("tune needs optuna; run: pip install 'esm-neuron[tune]'") from None


def _check_same(cfg: TrainConfig, space: Space, earlier: TrainConfig | None, out: Path) -> None:
    """Raise ConfigError where a search that goes on has other settings or ranges than it began with."""
    if earlier is None:
        return
    same = replace(earlier, output=cfg.output, checkpoint=cfg.checkpoint, log=cfg.log)
    was = settings.read_yaml(out / SPACE, "--space", "docs/tuning.md")
    cure = "give those of the first call, or choose another --output"
    require(same == cfg, f"output={out}: the search began with other settings, {out / BASE}; {cure}")
    require(was == dict(space.ranges), f"output={out}: the search began with other ranges, {out / SPACE}; {cure}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what optuna says of each trial off the log."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
    optuna.logging.set_verbosity(before)


def open_study(search: Search, worker: int = 0) -> optuna.Study:
    """Return the study in the journal of the output folder, made if there is none."""
    from optuna.storages.journal import JournalFileBackend

    task = task_class(search.cfg.task.name)
    return optuna.create_study(
        study_name="tune",
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(search.out / JOURNAL))),
        sampler=optuna.samplers.TPESampler(
            seed=(search.cfg.seed + worker) % 2**32, n_startup_trials=STARTUP, multivariate=True, constant_liar=True
        ),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=1),
        direction="maximize" if task.greater_is_better else "minimize",
        load_if_exists=True,
    )


def _take_up(search: Search) -> None:
    """Queue the settings' own values as the first trial, or what a stopped search left unfinished, in its folders."""
    study, state = open_study(search), optuna.trial.TrialState
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(search.space.start(search.cfg))
    for left in study.get_trials(deepcopy=False, states=(state.RUNNING,)):
        folder = left.user_attrs.get("folder", left.number)
        study.tell(left.number, state=state.FAIL)
        study.enqueue_trial(left.params, user_attrs={"folder": folder})


def counted(study: optuna.Study) -> list[Any]:
    """Return the trials that count: not those queued, nor those that were stopped and are tried again."""
    state = optuna.trial.TrialState
    whole = (state.COMPLETE, state.PRUNED, state.RUNNING)
    return [each for each in study.get_trials(deepcopy=False) if each.state in whole or "error" in each.user_attrs]


def work(search: Search, worker: int, log: Log) -> str | None:
    """Run trials until there are enough or the time is up; return the name of the signal that stopped it."""
    study = open_study(search, worker)
    ranges = search.space.distributions(search.cfg)
    while len(counted(study)) < search.trials:
        if search.over() and counted(study):
            log("tune: the budget is used up")
            break
        trial = study.ask(ranges)
        stopped = _one(search, study, trial, log)
        if stopped is not None:
            return stopped or None
    return None


def _one(search: Search, study: optuna.Study, trial: optuna.Trial, log: Log) -> str | None:
    """Run one trial and tell the study. Return None; or the signal that stopped it, '' where the time was up.

    A trial that was stopped stays as it is, running by the study: `_take_up` queues it again.
    """
    state, metric = optuna.trial.TrialState, task_class(search.cfg.task.name).metric
    folder = trial.user_attrs.get("folder", trial.number)
    trial.set_user_attr("folder", folder)
    cfg = trial_config(search, trial.params, folder)
    told = ", ".join(f"{name}={_short(value)}" for name, value in trial.params.items())
    log(f"trial {trial.number + 1}: {told}")
    began = time.monotonic()
    try:
        outcome = run.train(cfg, _muted, [Watch(search, trial, metric, Path(cfg.output))])
    except optuna.TrialPruned:
        ended: dict[str, Any] = {"state": state.PRUNED}
    except OutOfTimeError:
        log(f"tune: the budget is used up; trial {trial.number + 1} goes on with --checkpoint.resume auto")
        return ""
    except (TrainingError, MemoryError) as error:
        trial.set_user_attr("error", str(error)[:500])
        ended = {"state": state.FAIL}
    except EsmNeuronError:
        study.tell(trial, state=state.FAIL)
        raise
    else:
        if outcome.stopped_by is not None:
            return outcome.stopped_by
        value = (outcome.result.get("valid") or {}).get(metric)
        if value is None:
            trial.set_user_attr("error", f"{metric} of the validation proteins is not defined")
        ended = {"state": state.FAIL} if value is None else {"values": value}
    trial.set_user_attr("seconds", time.monotonic() - began)
    study.tell(trial, **ended)
    remove(Path(cfg.output) / "checkpoints")
    how = f"{metric} {ended['values']:.4f}" if "values" in ended else ended["state"].name.lower()
    log(f"trial {trial.number + 1}: {how}")
    return None


def trial_config(search: Search, params: dict[str, Any], folder: int) -> TrainConfig:
    """Return the settings of a trial: without the test proteins and all that is only for a reader."""
    cfg = search.space.apply(search.cfg, params)
    return replace(
        cfg,
        output=str(search.out / TRIALS / f"{folder:04d}"),
        seeds=1,
        data=replace(shared_data(cfg, search.out), test=None),
        checkpoint=replace(cfg.checkpoint, every=0, keep=1, resume="auto"),
        log=replace(
            cfg.log, score_test=False, baselines=False, predictions=False, tensorboard=False, wandb=None, mlflow=None
        ),
    )


class Watch(Callback):
    """Report a trial's validations to the study, and end it where it is behind the others or the time is up."""

    def __init__(self, search: Search, trial: optuna.Trial, metric: str, run_folder: Path) -> None:
        self._search, self._trial, self._metric, self._path = search, trial, metric, run_folder / METRICS
        self._reported = self._validated = 0
        self._total: int | None = None

    def on_log(self, step: int, total: int, record: MetricsLine) -> None:
        """Stop where the time is up, once a validation and its checkpoint are done, so that a search always gets on."""
        self._total = total
        if self._search.over() and self._trial.number > 0 and self._validated and step < total:
            raise OutOfTimeError

    def on_eval(self, step: int, record: MetricsLine) -> None:
        """Report what metrics.jsonl has: a resumed trial's first validations too, counted from 1."""
        values = self._validations()
        for number in range(self._reported, len(values)):
            value = values[number]
            if value is not None:
                self._trial.report(value, number + 1)
        self._reported = len(values)
        self._validated += 1
        # a probe's only validation comes after its fit, and before any line of steps
        if self._total is not None and step != self._total and self._trial.should_prune():
            raise optuna.TrialPruned

    def _validations(self) -> list[float | None]:
        lines = map(parse_json, read_bytes(self._path, LOG_LIMIT).decode().splitlines())
        return [line.get(self._metric) for line in lines if line.get("split") == "valid"]


def _muted(line: str) -> None:
    """Keep a trial's own lines off the log; what it reached is in its folder."""


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- processes


def _side_by_side(search: Search, jobs: int, log: Log) -> str | None:
    """Run trials in processes, each with its share of the cores or a GPU of its own; return what stopped them."""
    cores = max(1, len(os.sched_getaffinity(0)) // jobs)
    context, stopped = multiprocessing.get_context("spawn"), list[str]()
    before = dict(os.environ)
    processes = []
    try:
        for worker in range(jobs):
            os.environ.setdefault("OMP_NUM_THREADS", str(cores))  # read when torch is imported, so before it starts
            if search.cfg.backend == "cuda":
                gpus = (before.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(_gpus())))).split(",")
                os.environ["CUDA_VISIBLE_DEVICES"] = gpus[worker % len(gpus)]
            process = context.Process(target=_worker, args=(search, worker, log))
            process.start()
            processes.append(process)
    finally:
        os.environ.clear()
        os.environ.update(before)

    def forward(number: int, frame: object) -> None:
        stopped.append(signal.Signals(number).name)
        for process in processes:
            process.terminate()

    handlers = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for process in processes:
            process.join()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    codes = [process.exitcode for process in processes]
    if not stopped and any(codes):
        raise TrainingError(f"processes of the search ended with {codes}; see their lines above")
    return stopped[0] if stopped else None


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _worker(search: Search, worker: int, log: Log) -> None:
    set_threads()
    with _quiet():
        try:
            work(search, worker, log)
        except EsmNeuronError as error:
            log(f"esm-neuron: error: {error}")
            sys.exit(error.exit_code)


# --- what is written at the end


def finish(search: Search, stopped: bool, log: Log) -> None:
    """Write the table, the plot and best.yaml, and log the best trials; raise where none has a result.

    A search that was stopped may have none.
    """
    study, state = open_study(search), optuna.trial.TrialState
    metric, every = task_class(search.cfg.task.name).metric, study.get_trials(deepcopy=False)
    write_text(search.out / TABLE, table(every, list(search.space.ranges), metric))
    done = [each for each in every if each.state == state.COMPLETE]
    if not done and stopped:
        return
    if not done:
        errors = [each.user_attrs["error"] for each in every if "error" in each.user_attrs]
        why = errors[0] if errors else "the budget was too small, or it was stopped"
        raise TrainingError(f"no trial has a result: {why}; see {search.out / TABLE}")
    write_bytes(search.out / PLOT, plot(every, search, metric))
    best = study.best_trial
    cfg = replace(search.space.apply(search.cfg, best.params), output=str(search.out / "best"))
    head = f"# The best of {len(done)} finished trials by {metric} of the validation proteins: {best.value:.4f}.\n"
    write_text(search.out / BEST, head + settings.dump(cfg))
    ended = [f"{sum(each.state == of for each in every)} {of.name.lower()}" for of in (state.COMPLETE, state.PRUNED)]
    sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
    lines = [f"tune: {', '.join(ended)} trials in {search.out}; {metric} of the validation proteins:"]
    for each in sorted(done, key=lambda trial: sign * float(trial.value or 0))[:5]:
        told = ", ".join(f"{name}={_short(value)}" for name, value in each.params.items())
        lines.append(f"  {each.value:.4f}  trial {each.number + 1}: {told}")
    lines.append(
        f"the best of many is chosen by luck too; its test tells: esm-neuron train --config {search.out / BEST}"
    )
    log(Lines.of(lines))


def table(trials: Sequence[Any], names: Sequence[str], metric: str) -> str:
    """Return a line per trial, tab-separated: number, how it ended, the metric, seconds, and the value of each name."""
    rows = [["trial", "state", metric, "validations", "seconds", *names, "error"]]
    for each in trials:
        last = max(each.intermediate_values, default=None)
        value = each.value if each.value is not None else each.intermediate_values.get(last)
        cells = [each.number + 1, each.state.name.lower(), "" if value is None else f"{value:.6g}"]
        cells += [len(each.intermediate_values), f"{each.user_attrs.get('seconds', 0):.1f}"]
        cells += [each.params.get(name, "") for name in names]
        error = str(each.user_attrs.get("error", ""))
        rows.append([re.sub(r"\s+", " ", str(cell)) for cell in (*cells, error)])
    return "".join("\t".join(row) + "\n" for row in rows)


def plot(trials: Sequence[Any], search: Search, metric: str) -> bytes:
    """Return a PNG: the metric by trial with the best so far, and by the value of each setting."""
    done = [each for each in trials if each.value is not None]
    values = [float(each.value) for each in done]
    greater = task_class(search.cfg.task.name).greater_is_better
    best = [(max if greater else min)(values[: end + 1]) for end in range(len(values))]

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, 1 + len(search.space.ranges), sharey=True, squeeze=False)[0]
        panels[0].plot([each.number + 1 for each in done], values, ".", label="trial")
        panels[0].step([each.number + 1 for each in done], best, where="post", label="best so far")
        panels[0].set(xlabel="trial", ylabel=f"{metric}, validation")
        panels[0].legend()
        for axes, (name, of) in zip(panels[1:], search.space.ranges.items(), strict=True):
            having = [each for each in done if name in each.params]
            shown_as = [str(each.params[name]) if isinstance(of, list) else each.params[name] for each in having]
            axes.plot(shown_as, [each.value for each in having], ".")
            axes.set(xlabel=name, xscale="log" if isinstance(of, dict) and of.get("log") else axes.get_xscale())

    size = (2.6 * (1 + len(search.space.ranges)), 2.8)
    caption = f"{metric} of the validation proteins by trial, and by the value of each setting."
    return charts.draw("search", "Search", caption, size, paint).png
