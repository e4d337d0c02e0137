"""The composition root of a training run: reads the data, builds the model, trains, evaluates, writes the results."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from esm_neuron.backends import opened_backend
from esm_neuron.config import COMPARED_BY_CONTENT, ModelConfig, TrainConfig, require, settings
from esm_neuron.config.backends import named
from esm_neuron.config.deferred import module
from esm_neuron.config.rules import validate
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.labels import Labels
from esm_neuron.data.loader import EvalLoader, TrainLoader
from esm_neuron.data.records import files_of
from esm_neuron.data.splits import Splits, check_files, data_files, load_splits, make_splits, open_splits
from esm_neuron.data.validation import save_rejected
from esm_neuron.distributed import from_main_rank, is_alone, log_nothing, main_rank_only, raise_on_any_rank
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.files import check_apart, check_ours, claimed, finite, machine_name, note, write_json, write_text
from esm_neuron.metrics.text import ending
from esm_neuron.models import hub
from esm_neuron.models.adapter_folder import MergedWeights
from esm_neuron.models.shapes import SHAPES, locate
from esm_neuron.planning.doctor import this_machine
from esm_neuron.redact import Lines, escaped
from esm_neuron.run_dir import (
    ADAPTER,
    BASE,
    CONFIG,
    FILES,
    MACHINE,
    METRICS,
    MODEL,
    NONFINITE,
    REJECTED,
    RESULT,
    sampled_name,
)
from esm_neuron.tasks import check_model, check_task, create_task, task_class
from esm_neuron.tasks.base import Predictions, Task
from esm_neuron.training.callbacks import Callback, JsonlLogger, ProgressConsole
from esm_neuron.training.init_from import adopted, starting_head
from esm_neuron.training.trackers import TensorBoardLogger, trackers
from esm_neuron.training.trackers import check as check_trackers
from esm_neuron.training.watchdog import Watchdog

if TYPE_CHECKING:
    import torch

    from esm_neuron.backends.base import Backend
    from esm_neuron.models import esm2
    from esm_neuron.training import budget, build, checkpoint, final_eval, optim, probe, repeats, results
    from esm_neuron.training import trainer as loop
    from esm_neuron.training.build import Built
    from esm_neuron.training.final_eval import Leaks
    from esm_neuron.training.probe import Probe
    from esm_neuron.training.trainer import Trainer
else:  # torch is imported when settings, files and columns have been checked
    torch, build, esm2 = (module(name) for name in ("torch", "esm_neuron.training.build", "esm_neuron.models.esm2"))
    budget, checkpoint, final_eval, optim, probe, repeats, results, loop = (
        module(f"esm_neuron.training.{name}")
        for name in ("budget", "checkpoint", "final_eval", "optim", "probe", "repeats", "results", "trainer")
    )

logger = logging.getLogger(__name__)

FREE = {"output", "backend", "parallel", "checkpoint", "log"}
"""Sections that a resumed run may change: they decide where and how it runs, not what it computes."""
FREE_FIELDS = {f"data.{name}" for name in COMPARED_BY_CONTENT} | {
    "data.cache", "data.homologs", "loop.budget", "model.gradient_checkpointing",
    "loop.packs_per_device", "loop.eval_packs_per_device", "loop.torch_compile", "loop.eval_every", "loop.min_evals",
    "loop.patience",
    "loop.on_recompile", "loop.on_nonfinite", "loop.watchdog", "loop.watchdog_slow", "loop.tracing", "loop.optlevel",
}  # fmt: skip
"""Single fields of the same kind."""


@dataclass(frozen=True)
class Evidence:
    """What the scores of a finished run were computed from, on every rank."""

    cfg: TrainConfig
    """With what the data and the hub have decided."""
    task: Task
    tables: dict[str, ExampleTable]
    """Split -> its proteins."""
    predictions: dict[str, Predictions]
    """Held-out split -> the model's predictions for its table."""


@dataclass(frozen=True)
class Outcome:
    """How a training run ended."""

    result: dict[str, Any]
    """What result.json holds; empty when the run was stopped."""
    stopped_by: str | None
    """Name of the signal that stopped it, None when it finished."""
    evidence: Evidence | None = None
    """Of a single run that finished."""


def check(cfg: TrainConfig) -> None:
    """Raise EsmNeuronError for what is wrong with settings, files and columns, as far as it is seen without torch.

    One of several processes looks at no files: another may see them, and has to learn what this one lacks.
    """
    validate(cfg)
    check_trackers(cfg.log)
    check_task(cfg.task)
    check_model(cfg)
    require(
        cfg.seeds == 1 or task_class(cfg.task.name).averages,
        f"seeds={cfg.seeds}: {cfg.task.name} has no mean of several models; leave it out",
    )
    if is_alone():
        locate(cfg.model)
        check_files(cfg.data, task_class(cfg.task.name).labels_of(cfg.task))


def train(cfg: TrainConfig, log: Callable[[str], None] = logger.info, watchers: Sequence[Callback] = ()) -> Outcome:
    """Fine-tune as `cfg` says and write everything under `cfg.output`; with `data.folds` or `seeds`, once for each.

    `watchers` hear of the run besides its own callbacks.
    Raise EsmNeuronError where settings, data or checkpoints cannot be used; nothing half-written is left.
    """
    check(cfg)
    if cfg.data.folds is not None and cfg.data.fold is None:
        return repeats.train_folds(cfg, log)
    if cfg.seeds > 1:
        return repeats.train_seeds(cfg, log)
    if os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1":
        raise ConfigError(
            "NEURON_EXTRACT_GRAPHS_ONLY=1 (neuron_parallel_compile): every value is 0, nothing could be trained; "
            "use `compile` instead of `train`"
        )
    with opened_backend(cfg) as backend, _claimed_output(cfg, backend):
        return _train(cfg, backend, log if backend.topology.is_main else log_nothing, watchers)


def compile_graphs(cfg: TrainConfig, log: Callable[[str], None] = logger.info) -> int:
    """Compile the graphs of the training run of `cfg` ahead of it, and write nothing to `cfg.output`.

    Return the number of graphs that this process asked for. On Trainium it runs under `neuron_parallel_compile`, which
    collects the graphs and compiles them side by side.
    """
    check(cfg)
    require(
        cfg.adapter.kind != "probe",
        "adapter.kind=probe takes no steps, and its graphs are two forward passes: nothing is compiled ahead; train",
    )
    with opened_backend(cfg) as backend:
        if not backend.static_shapes:
            raise ConfigError(f"backend={cfg.backend} compiles nothing; `compile` is for {named(lambda b: b.compiles)}")
        log = log if backend.topology.is_main else log_nothing
        if (note := backend.compile_note()) is not None:
            log(note)
        job = _Job.of(cfg, backend, log, Watchdog.of(cfg, backend.topology.rank))
        job.trainer.compile(list(job.loaders.held_out.values()))
        return backend.graphs()


@dataclass(frozen=True)
class _Job:
    """A run before its first step. Its trainer has the task, the backend, and the settings with the data's classes."""

    splits: Splits
    built: Built
    loaders: Loaders
    trainer: Trainer
    probe: Probe | None

    @classmethod
    def of(
        cls, cfg: TrainConfig, backend: Backend, log: Callable[[str], None], watchdog: Watchdog,
        splits: Splits | None = None,
    ) -> _Job:  # fmt: skip
        """Read the data unless it is given, fit the head of a probe, build the model, make the trainer."""
        cfg = replace(cfg, model=from_main_rank(backend, lambda: hub.choose(cfg.model, _earlier_model(cfg), log)))
        cfg = from_main_rank(backend, lambda: adopted(cfg))
        splits = splits or shared_splits(cfg, task_class(cfg.task.name).labels_of(cfg.task), backend)
        if len(set(backend.gather_host(splits.fingerprint))) > 1:
            raise DataError(f"{cfg.data.train}: the ranks read different records; give every node the same files")
        log(splits.summary())
        cfg = replace(cfg, task=splits.task)
        task = create_task(cfg.task, splits.labels)
        loaders = Loaders.of(cfg, splits, task, backend)
        fitted = None
        if cfg.adapter.kind == "probe":
            fitted = probe.fit_probe(cfg, task, backend, loaders.train.table, log, watchdog.expect)
            cfg = replace(cfg, model=replace(cfg.model, layers=fitted.layers))
        start = fitted.head if fitted else from_main_rank(backend, lambda: starting_head(cfg, task))
        built = raise_on_any_rank(backend, lambda: build.build_model(cfg, task, backend, start=start))
        log(describe(cfg, built))
        same = identity(cfg, splits.fingerprint, from_main_rank(backend, lambda: built.source.reference.sha256))
        trainer = loop.Trainer(cfg, built.model, task, backend, loaders.train, loaders.held_out.get("valid"), [], same)
        for line in (*idle(cfg, splits), *_notes(trainer)):
            log(line)
        return cls(splits, built, loaders, trainer, fitted)


def shared_splits(cfg: TrainConfig, labels: type[Labels] | None, backend: Backend) -> Splits:
    """Return `load_splits`, read by one rank of each node into files that the others there map.

    Without `data.cache` the files are temporary: they have no name any more when all have opened them.
    """
    nodes = backend.gather_host(machine_name())
    first = nodes.index(machine_name()) == backend.topology.rank
    if nodes.count(machine_name()) == 1:
        return raise_on_any_rank(backend, lambda: load_splits(cfg, labels))
    with ExitStack() as held:

        def make() -> Path | None:
            spool = None if cfg.data.cache else Path(held.enter_context(TemporaryDirectory(prefix="esm-neuron-")))
            return make_splits(cfg, labels, spool)

        made = raise_on_any_rank(backend, lambda: make() if first else None)
        folder = cast(Path, backend.gather_host(made)[nodes.index(machine_name())])  # that of the rank which made it
        return raise_on_any_rank(backend, lambda: open_splits(cfg, labels, folder))


def _train(
    cfg: TrainConfig, backend: Backend, log: Callable[[str], None], watchers: Sequence[Callback] = ()
) -> Outcome:
    watchdog = Watchdog.of(cfg, backend.topology.rank)
    with watchdog:
        watchdog.expect("the start of the run (data, weights, checkpoint)", slow=True)
        cfg = from_main_rank(backend, lambda: _with_earlier_steps(cfg, log))
        job = _Job.of(cfg, backend, log, watchdog)
        if cfg.loop.budget is not None:
            loop_cfg, splits = budget.within_budget(job.trainer, job.loaders.held_out, log), job.splits
            del job  # its weights have moved: the run begins anew
            job = _Job.of(replace(cfg, loop=loop_cfg), backend, log_nothing, watchdog, splits)
        cfg, trainer = job.trainer.cfg, job.trainer
        begin = trainer.restore() if cfg.checkpoint.resume == "auto" else 0
        if begin:
            log(f"resumed after step {begin} of {trainer.total_steps}")
        leaks = from_main_rank(backend, lambda: final_eval.find_leaks(cfg, job.loaders.tables(), log))
        # before there is a config.yaml: a run that is refused for want of a key has not begun
        told = main_rank_only(backend, lambda: trackers(cfg, log)) or []
        main_rank_only(backend, lambda: _write_settings(cfg, job.splits))
        main_rank_only(backend, lambda: write_json(Path(cfg.output) / MACHINE, this_machine(cfg.backend)))
        pending = [step["step"] for step in trainer.monitors.losses.nonfinite]
        trainer.callbacks = main_rank_only(backend, lambda: [*_callbacks(cfg, begin, pending), *told, *watchers]) or []
    result: dict[str, Any] = {}
    found: dict[str, Predictions] = {}
    try:
        stopped_by = None
        if job.probe is None:
            stopped_by = trainer.fit()
        else:
            probe.keep(trainer, job.probe)
        for callback in trainer.callbacks:
            callback.on_trained()
        if stopped_by is None:
            with watchdog:
                passes = sum(map(len, job.loaders.held_out.values()))
                watchdog.expect("the end of the run (last evaluation, baselines, export)", passes + 1, slow=True)
                result = _finish(job, leaks, found, log)
    finally:
        for callback in trainer.callbacks:
            callback.on_end(result)
    if result:
        log(Lines.of(ending(result, trainer.task.unit, cfg.output, trainer.task.needs_labels)))
    evidence = Evidence(cfg, trainer.task, job.loaders.tables(), found) if stopped_by is None else None
    return Outcome(result, stopped_by, evidence)


def _finish(job: _Job, leaks: Leaks, found: dict[str, Predictions], log: Callable[[str], None]) -> dict[str, Any]:
    """Write the best weights, then evaluate them and write the result: a failing evaluation loses no training.

    The predictions by split are added to `found`.
    """
    trainer, loaders = job.trainer, job.loaders
    cfg, backend, state = trainer.cfg, trainer.backend, trainer.state
    chosen, weights = trainer.checkpoints.load_best(trainer.early_stopping.best_step, state.step)
    for line in trainer.early_stopping.remarks(trainer.task.metric):
        log(line)
    out = Path(cfg.output)
    written = main_rank_only(backend, lambda: results.write_results(cfg, trainer.task, job.built, weights))
    try:
        scores = _scores(job, chosen, leaks, found, log)
    except BaseException:
        log(f"the trained weights of step {chosen} are in {out}; the evaluation of them has failed, as follows")
        raise
    result = finite({
        "task": cfg.task.name,
        "metric": trainer.task.metric,
        "model": cfg.model.name,
        "init": cfg.model.init,
        "backend": cfg.backend,
        "adapter": cfg.adapter.kind,
        "parameters": dict(zip(("trainable", "total"), esm2.parameter_count(job.built.model), strict=True)),
        "chosen_step": chosen,
        "data": {split: _size(trainer.task, table) for split, table in loaders.tables().items()},
        "train": {
            "steps": state.step,
            "residues": state.residues,
            "seconds": state.seconds,
            "residues_per_second": state.residues / state.seconds if state.seconds else None,
            "padding_efficiency": loaders.train.padding_efficiency,
            "graphs": backend.graphs(),
        },
        **({} if job.probe is None else {"probe": job.probe.report()}),
        **scores,
    })  # fmt: skip

    def finish() -> None:
        if written is not None:  # on the main rank, as this function is
            written.describe(cfg, result)
        write_json(out / RESULT, result)

    main_rank_only(backend, finish)
    log(
        f"weights of step {chosen} in {written and written.folder}, result in {out / RESULT}, checkpoints in "
        f"{trainer.checkpoints.folder}"
    )
    return dict(result)


def _size(task: Task, table: ExampleTable) -> dict[str, Any]:
    """Return how much a split holds, and of which classes."""
    residues = int(table.whole_residues().sum(dtype=np.int64))
    return {"records": len(table.ids), "residues": residues, "classes": task.class_counts(table)}


def _scores(
    job: _Job, chosen: int, leaks: Leaks, found: dict[str, Predictions], log: Callable[[str], None]
) -> dict[str, Any]:
    trainer, loaders = job.trainer, job.loaders
    held_out = {split: loader.table for split, loader in loaders.held_out.items()}

    def predict(split: str) -> Predictions:
        best = trainer.best_predictions
        known = split == "valid" and best is not None and best[0] == chosen  # these weights have answered for them
        found[split] = best[1] if best and known else trainer.evaluator.collect(loaders.held_out[split])
        return found[split]

    return final_eval.score_splits(
        trainer.cfg, trainer.task, trainer.backend, loaders.train.table, held_out, predict, leaks, log
    )


def _earlier_model(cfg: TrainConfig) -> ModelConfig | None:
    """Return the model of the run that this one goes on with, or whose head it takes over; None without one."""
    earlier = [cfg.output] if cfg.checkpoint.resume == "auto" else []
    earlier += [cfg.adapter.init_from] if cfg.adapter.init_from is not None else []
    saved = next((path for path in (Path(run) / CONFIG for run in earlier) if path.is_file()), None)
    return None if saved is None else settings.read_config(saved).model


def _with_earlier_steps(cfg: TrainConfig, log: Callable[[str], None]) -> TrainConfig:
    """Return the settings with the steps that `loop.budget` gave the run which this one goes on with.

    Raise ConfigError where that run had no budget: its learning rates were set for other steps.
    """
    saved, budget = Path(cfg.output) / CONFIG, cfg.loop.budget
    if budget is None or cfg.checkpoint.resume != "auto" or not saved.is_file():
        return cfg
    steps = settings.read_config(saved).loop.max_steps
    if steps is None:
        raise ConfigError(
            f"loop.budget={budget}: the run in {cfg.output} has passes over its proteins (loop.epochs), which no "
            "budget changes; leave it out to go on, or choose another --output"
        )
    log(f"loop.budget={budget}: {cfg.output} goes on with the {steps} steps that it began with")
    return replace(cfg, loop=replace(cfg.loop, budget=None, max_steps=steps))


def _notes(trainer: Trainer) -> Iterator[str]:
    """Yield a note about each setting that is allowed and rarely meant."""
    cfg = trainer.cfg
    if cfg.loop.patience and trainer.valid_loader is None:
        yield f"NOTE: loop.patience={cfg.loop.patience} never ends training: there are no validation proteins to watch"
    steps = trainer.total_steps
    warmup = optim.warmup_steps(steps, cfg.optim)
    if warmup >= steps:
        yield f"NOTE: warm-up (optim.warmup_steps) takes {warmup} of {steps} steps: the rate never reaches optim.lr"
    yield from trainer.backend.notes()


def idle(cfg: TrainConfig, splits: Splits) -> Iterator[str]:
    """Yield a note about each setting that was changed and does nothing beside the others."""
    data, default = cfg.data, TrainConfig()
    given = {f"data.{split}_fraction": split not in splits.sampled for split in ("valid", "test")}
    beside = {
        "data.window_overlap": (data.long_sequences != "window", f"data.long_sequences is {data.long_sequences}"),
        "data.max_segments": (not data.packing, "data.packing is false"),
        "data.sample": (not splits.sampled, "no proteins are sampled"),
        **{name: (is_given, "files or a column give these proteins") for name, is_given in given.items()},
        "optim.min_lr_ratio": (cfg.optim.schedule == "constant", "optim.schedule is constant"),
        "loop.epochs": (cfg.loop.max_steps is not None, "loop.max_steps is given"),
        "loop.watchdog_slow": (cfg.loop.watchdog == 0, "loop.watchdog is 0"),
        **{
            f"adapter.{name}": (cfg.adapter.kind not in ("lora", "qlora"), f"adapter.kind is {cfg.adapter.kind}")
            for name in vars(cfg.adapter)
            if name not in ("kind", "quantization")
        },
        "adapter.quantization": (cfg.adapter.kind != "qlora", f"adapter.kind is {cfg.adapter.kind}"),
    }
    for name, (is_idle, why) in beside.items():
        value = attrgetter(name)(cfg)
        if is_idle and value not in (attrgetter(name)(default), 0):
            yield f"NOTE: {name}={value} has no effect: {why}"


@dataclass(frozen=True)
class Loaders:
    """Batches of each split."""

    train: TrainLoader
    held_out: dict[str, EvalLoader]
    """`valid` and `test`, as far as they have rows."""

    @classmethod
    def of(cls, cfg: TrainConfig, splits: Splits, task: Task, backend: Backend) -> Loaders:
        share: dict[str, Any] = {
            "dp": backend.topology.dp,
            "dp_rank": backend.topology.dp_rank,
            "local_dp": backend.local_dp,
            "static_shapes": backend.static_shapes,
        }
        tables = {"valid": splits.valid, "test": splits.test}
        held_out = {name: EvalLoader(table, task, cfg, **share) for name, table in tables.items() if table is not None}
        for name, loader in held_out.items():
            loader.title = f"predictions, {name} split" if backend.topology.is_main else ""
        return cls(TrainLoader(splits.train, task, cfg, **share), held_out)

    def tables(self) -> dict[str, ExampleTable]:
        return {"train": self.train.table, **{split: loader.table for split, loader in self.held_out.items()}}


@contextmanager
def _claimed_output(cfg: TrainConfig, backend: Backend) -> Iterator[None]:
    """Lock the output folder for this run; every rank raises when it cannot be had."""
    out = Path(cfg.output)
    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(claimed(out))
            sources = {f"data.{split}": path for split, path in data_files(cfg.data).items()}
            inputs = {setting: [file for file, _ in files_of(path)] for setting, path in sources.items()}
            for setting, name in (("model.name", cfg.model.name), ("model.base", cfg.model.base)):
                if name is not None and Path(os.path.realpath(out)) in Path(os.path.realpath(name)).parents:
                    inputs[setting] = [name]
            for name in (*FILES, ADAPTER, MODEL, BASE):
                check_apart("output:", out / name, inputs)
            # a run whose ledger was left behind is known by its checkpoints
            begun = cfg.checkpoint.resume == "auto" and checkpoint.steps(out / "checkpoints")
            check_ours(out, (*(() if begun else FILES), ADAPTER, MODEL, BASE))
            if (out / "checkpoints").is_symlink():  # two runs with one folder of checkpoints would prune each other's
                held.enter_context(claimed((out / "checkpoints").resolve()))
            used = checkpoint.steps(out / "checkpoints") or (out / RESULT).exists()
            if used and cfg.checkpoint.resume == "no":
                cure = "go on with --checkpoint.resume auto, or choose another --output"
                raise ConfigError(f"output={out} already holds a run; {cure}")

        main_rank_only(backend, claim)
        yield


def identity(cfg: TrainConfig, fingerprint: str, base: str) -> dict[str, Any]:
    """Return what two runs must share for one to continue the other: dotted settings, the data, the base weights."""
    values: dict[str, Any] = {"data": fingerprint, "base": base}

    def flatten(prefix: str, value: Any) -> None:
        if prefix in FREE_FIELDS:
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                flatten(f"{prefix}.{key}" if prefix else key, item)
        else:
            values[prefix] = list(value) if isinstance(value, tuple) else value

    flatten("", {key: value for key, value in asdict(cfg).items() if key not in FREE})
    return values


def describe(cfg: TrainConfig, built: Built) -> str:
    """Say in a line or two what is trained."""
    trainable, total = esm2.parameter_count(built.model)
    trained = f"{trainable:,} of {total:,} parameters trained ({trainable / total:.2%})"
    threads = f", {torch.get_num_threads()} threads" if cfg.backend == "cpu" else ""
    lines = [f"{cfg.model.name} on {cfg.backend}{threads}: {trained}"]
    if cfg.model.init == "random":
        lines.append(
            "NOTE: it starts from RANDOM weights, not from a pretrained ESM-2; expect a small network's metrics"
        )
    elif cfg.model.name in SHAPES:
        lines.append(
            f"NOTE: {cfg.model.name} is a demonstration network of this project that knows hardly more than "
            "composition; its metrics show that things work, not what ESM-2 can do; for real work: --model.name "
            "facebook/esm2_t6_8M_UR50D, or larger"
        )
    drawn = [name for name in built.report.drawn if "contact_head" not in name]
    source = getattr(built.source, "source", built.source)  # with all of its blocks
    if isinstance(source, MergedWeights):
        base, adapter = source.base.name, source.name
        lines.append(f"training starts from {base} with the adapter of {adapter} merged into it")
    if built.head:
        lines.append(built.head)
    if drawn:
        lines.append(f"newly initialized from seed {cfg.seed}: {', '.join(drawn)}")
    return Lines.of(lines)


def _write_settings(cfg: TrainConfig, splits: Splits) -> None:
    """Save the resolved configuration, and check that it reads back as itself, as it must once the run is finished."""
    out = Path(cfg.output)
    note(out, FILES)
    write_text(out / CONFIG, settings.dump(cfg))
    saved = settings.read_config(out / CONFIG)
    validate(saved)
    if saved != cfg:
        raise ConfigError(f"{out / CONFIG}: does not read back as the configuration of this run; please report it")
    for split, ids in splits.sampled.items():
        write_text(out / sampled_name(split), "".join(f"{escaped(name)}\n" for name in ids))
    save_rejected(out / REJECTED, splits.rejected)


def _callbacks(cfg: TrainConfig, begin: int, pending: Sequence[int]) -> list[Callback]:
    """Return the callbacks of a run after step `begin`; its logs are cut there, and `pending` non-finite steps too."""
    out = Path(cfg.output)
    jsonl = JsonlLogger(out / METRICS)
    jsonl.truncate_after(begin)
    JsonlLogger(out / NONFINITE).truncate_after(begin, pending)
    callbacks: list[Callback] = [jsonl, ProgressConsole(begin)]
    if cfg.log.tensorboard:
        callbacks.append(TensorBoardLogger(out / "tensorboard", begin))
    return callbacks
