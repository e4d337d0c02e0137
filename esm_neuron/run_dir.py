"""The folder of a run: the names of its files, and what reads a finished one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from esm_neuron.config import TrainConfig, require
from esm_neuron.config.settings import read_config
from esm_neuron.data.parquet import read_table, write_table
from esm_neuron.errors import CheckpointError, DataError
from esm_neuron.files import NOTHING, NUMBER, misfit, parse_json, read_bytes, read_json
from esm_neuron.metrics import Scores
from esm_neuron.metrics.calibration import Calibration

if TYPE_CHECKING:
    from esm_neuron.data.dataset import ExampleTable
    from esm_neuron.tasks.base import Column, Predictions, Task

CONFIG = "config.yaml"  # every setting, resolved
RESULT = "result.json"  # metrics of the finished run; there is no such file before it has finished
FOLDS = "folds.json"  # of a cross-validation: mean and spread over its runs, in fold-1 and so on
RESAMPLES = "resamples.parquet"  # metrics of every bootstrap resample, by which runs are compared
MACHINE = "machine.json"  # when and where a run was trained, and with which versions
METRICS = "metrics.jsonl"  # one line per logged step and per evaluation
TRACKERS = "trackers.json"  # what W&B and MLflow call this run, so that a resumed one goes on there
NONFINITE = "nonfinite.jsonl"  # one line per step whose loss or gradient was not finite, with the ids of its records
REJECTED = "rejected.tsv"  # rows left out or changed for their characters
ADAPTER, MODEL = "adapter", "model"  # a PEFT adapter, or a whole Hugging Face model
BASE = "base"  # an adapter's base if it is kept nowhere else
REFERENCE = "base_reference.json"  # beside an adapter: the weights it was trained on
DECIDING = ("num_attention_heads", "layer_norm_eps", "token_dropout")  # of a base's config.json, beside its shapes
REPORT = "report"  # the page of `esm-neuron report` and its charts
CALIBRATION = "calibration.json"  # how to read the predictions, in the folder of an adapter or a model
CARD = "README.md"  # model card, in the folder of an adapter or a model
PASSED_OVER = "passed-over-"  # prefix of a checkpoint that a resumed run could not read


MEMBER = "seed-"
"""How the name of a run of an ensemble begins; its seed follows."""


def member_folders(folder: Path, cfg: TrainConfig) -> list[Path]:
    """Return the folders of the runs of an ensemble, whose configuration is `cfg`; none where it is a single run."""
    return [folder / f"{MEMBER}{cfg.seed + number}" for number in range(cfg.seeds)] if cfg.seeds > 1 else []


def predictions_name(split: str) -> str:
    """Return the file with the predictions for `valid` or `test`, see `save_predictions`."""
    return f"predictions-{split}.parquet"


def sampled_name(split: str) -> str:
    """Return the file with the ids of the proteins that were sampled for `valid` or `test`."""
    return f"{split}_ids.txt"


LOG_LIMIT = 1 << 30
"""Largest log in bytes that is read: a line of each step of ten million."""

_VALUE = (*NUMBER, NOTHING, lambda value: isinstance(value, list) and len(value) == 2 and not misfit(value, [NUMBER]))
_SCORES = {
    **dict.fromkeys(("n", "n_records?", "n_clusters?"), int),
    **dict.fromkeys(("auprc_of?", "only_answer?"), str),
    "per_class?": {"*": {"n": int, "*": _VALUE}},
    "*": _VALUE,
}  # fmt: skip
_DIFFERENCE = {"difference": NUMBER, "difference_ci": _VALUE, "verdict": str}
_VERDICT = {**dict.fromkeys(("metric", "best", "verdict", "text"), str), "against": {"*": _DIFFERENCE}}
_CALIBRATION = {"proteins": int, "temperature": NUMBER, "thresholds": [NUMBER], "scores": [NUMBER]}
_COVERAGE = {"level": NUMBER, "covered": NUMBER, "covered_ci": _VALUE, "size": NUMBER}
_SPREAD = {"mean": NUMBER, "sd": (*NUMBER, NOTHING), "values": [_VALUE]}
_RESULT = {
    **dict.fromkeys(("task", "metric", "model", "init", "backend", "adapter"), str),
    "parameters": {"trainable": int, "total": int},
    "chosen_step": int,
    "data": {"*": {"records": int, "residues": int, "classes?": {"*": int}}},
    "train": {
        "steps": int, "residues": int, "seconds": NUMBER, "residues_per_second": (*NUMBER, NOTHING),
        "padding_efficiency": NUMBER,
    },
    **dict.fromkeys(("valid?", "test?"), (NOTHING, _SCORES)),
    "probe?": {
        "layers": (int, str), "penalty": NUMBER, "chosen_on": str, "metrics": _SCORES,
        "tried": {"*": (*NUMBER, NOTHING)}, "proteins": {"*": int}, "seconds": {"*": NUMBER},
    },
    "seeds?": {"seeds": [int], **{key: {"*": _SPREAD} for key in ("valid?", "test?")}},
    "leaks?": {"*": {"method": str, "proteins": int, "homologs": int}},
    "clean?": {"*": _SCORES},
    **{key: {"*": {"*": _SCORES}} for key in ("baselines?", "clean_baselines?")},
    **{key: {"*": _VERDICT} for key in ("verdicts?", "clean_verdicts?")},
    "alarms?": {"*": [str]},
    "calibration?": (NOTHING, _CALIBRATION),
    "coverage?": {"*": _COVERAGE},
}  # fmt: skip
"""The form of result.json, see `files.misfit`."""

FILES = (
    CONFIG, RESULT, RESAMPLES, MACHINE, METRICS, TRACKERS, NONFINITE, REJECTED,
    *(name(split) for name in (predictions_name, sampled_name) for split in ("valid", "test")),
)  # fmt: skip
"""Files that a training run replaces in its output folder; it replaces the folders ADAPTER, MODEL and BASE too."""


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    folder: Path
    cfg: TrainConfig
    result: dict[str, Any]
    log: list[dict[str, Any]]  # lines of training steps, and lines of evaluations, which have a `split`
    predictions: dict[str, pa.Table]  # by split, see `save_predictions`; one that was not kept is missing
    made: dict[str, Any]  # what MACHINE holds; empty where there is none
    trackers: dict[str, dict[str, Any]]  # see `read_trackers`


def read_finished(run: Path) -> Finished:
    """Read everything in a run's folder that is no weights.

    Raise ConfigError where it is no finished run, CheckpointError where a file is damaged or of an older version.
    """
    require((run / CONFIG).is_file(), f"{run}: no {CONFIG} there; name the output folder of a training run")
    cfg, result = read_config(run / CONFIG), read_result(run)
    found = {split: load_predictions(run / predictions_name(split)) for split in ("valid", "test") if result.get(split)}
    predictions = {split: table for split, table in found.items() if table is not None}
    form = {"date": str, "hardware": str, "versions": {"*": str}}
    there = (run / MACHINE).is_file()
    made = read_json(run / MACHINE, form, CheckpointError, "remove it") if there else {}
    return Finished(run, cfg, result, read_log(run), predictions, made, read_trackers(run))


def read_trackers(run: Path) -> dict[str, dict[str, Any]]:
    """Read what W&B (`wandb`) and MLflow (`mlflow`) call a run: `id`, the project (`to`), `url`; empty without them."""
    path, text = run / TRACKERS, (str, NOTHING)
    form = {"*": {"id": str, "to": str, "url": text}}
    return read_json(path, form, CheckpointError, "remove it: the run begins anew there") if path.is_file() else {}


def read_result(run: Path) -> dict[str, Any]:
    """Read a run's result.json; raises as `read_finished` does."""
    path = run / RESULT
    cure = "its training has not finished; go on with --checkpoint.resume auto"
    require(path.is_file(), f"{run}: no {RESULT} there, {cure}")
    return dict(read_json(path, _RESULT, CheckpointError, "another version may have written it; train again"))


def read_calibration(weights: Path, labels: int) -> Calibration:
    """Read how to read the predictions of a model of `labels` classes; as they are where its folder does not say.

    Raise CheckpointError where the file is damaged.
    """
    path = weights / CALIBRATION
    if not path.is_file():
        return Calibration()
    said = read_json(path, _CALIBRATION, CheckpointError, "delete it to read predictions as they are")
    thresholds, scores = tuple(said["thresholds"]), tuple(said["scores"])
    found = Calibration(said["proteins"], said["temperature"], thresholds, scores)
    if found.wrong(labels):
        raise CheckpointError(f"{path}: {found.wrong(labels)}; delete it to read predictions as they are")
    return found


def read_log(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl, none if there is no such file; CheckpointError at a bad line."""
    path = run / METRICS
    try:
        texts = read_bytes(path, LOG_LIMIT).decode("utf-8").splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove it") from error
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        try:
            line = parse_json(text)
            wrong = misfit(line, {"step": int})
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise CheckpointError(f"{path}:{number}: not a JSON object with a step; delete the line")
        lines.append(line)
    return lines


def save_predictions(
    path: Path, task: Task, table: ExampleTable, predictions: Predictions, has_homolog: np.ndarray | None = None
) -> None:
    """Write `as_table` of the same arguments as a Parquet file."""
    write_table(path, as_table(task, table, predictions, has_homolog))


def as_table(
    task: Task, table: ExampleTable, predictions: Predictions, has_homolog: np.ndarray | None = None
) -> pa.Table:
    """Return what `evaluation.collect` gave for a table with labels: one row per record, in the table's order.

    `has_homolog`, bool [records], says which of them have a homolog among the training rows; None: not known.
    """
    _, bounds = table.residue_slots()
    targets, outputs = task.targets(table), task.kept(table, predictions)
    columns = {
        "id": pa.array(list(table.ids), pa.string()),
        "residues": pa.array(np.diff(bounds), pa.int32()),
        **({} if has_homolog is None else {"has_homolog": pa.array(has_homolog, pa.bool_())}),
        **({} if targets is None else {"target": _array(targets)}),
    }
    return pa.table([*columns.values(), *map(_array, outputs.values())], names=[*columns, *outputs])


def save_resamples(run: Path, scores: Mapping[str, Scores]) -> None:
    """Write the metrics of every resample, by split: columns such as `test/mcc`, float64 [RESAMPLES]."""
    columns = {f"{split}/{name}": of.drawn[name] for split, of in scores.items() for name in of if name in of.drawn}
    write_table(run / RESAMPLES, pa.table(columns))


def load_resamples(run: Path, split: str) -> dict[str, np.ndarray]:
    """Read what `save_resamples` wrote of a split; empty where there is nothing of it."""
    table = load_predictions(run / RESAMPLES)
    names = [] if table is None else [name for name in table.column_names if name.startswith(f"{split}/")]
    return {name.partition("/")[2]: table[name].to_numpy() for name in names}  # type: ignore[index]


def load_predictions(path: Path) -> pa.Table | None:
    """Read what `save_predictions` wrote; None if there is none (`log.predictions` false, or no rows held out)."""
    try:
        return read_table(path) if path.exists() else None
    except DataError as error:
        raise CheckpointError(f"{error}; remove it, or train again") from error


def _array(column: Column) -> pa.Array:
    if isinstance(column, np.ndarray):
        return pa.array(column)
    if not column or isinstance(column[0], str):
        return pa.array(column, pa.string())
    if column[0].dtype == object:
        return pa.array(column, pa.list_(pa.string()))
    return pa.array([part.astype(np.float32) for part in column], pa.list_(pa.float32()))
