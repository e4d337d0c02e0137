"""What a finished run has written, read back without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from esm_neuron.config import TrainConfig, require
from esm_neuron.errors import CheckpointError
from esm_neuron.folders import CONFIG, METRICS, RESULT, answers_name
from esm_neuron.held_out import load_answers
from esm_neuron.settings import read_config

_KEYS = ("task", "metric", "model", "init", "backend", "adapter", "parameters", "chosen_step", "data", "train")


@dataclass(frozen=True)
class Finished:
    """A run that ended by itself."""

    folder: Path
    cfg: TrainConfig
    result: dict[str, Any]
    """result.json."""
    log: list[dict[str, Any]]
    """metrics.jsonl: lines of the training, and with a `split` of evaluations."""
    answers: dict[str, pa.Table]
    """Split -> its answers, see `held_out`; a split that was not kept is missing."""


def read_finished(run: Path) -> Finished:
    """Everything of a run's folder that needs no network.

    Raises:
        ConfigError: it is no run, or one that has not finished.
        CheckpointError: one of its files is damaged, or of an older version of this package.
    """
    require((run / CONFIG).is_file(), f"{run}: no {CONFIG} there; name the output folder of a training run")
    cfg, result = read_config(run / CONFIG), read_result(run)
    found = {split: load_answers(run / answers_name(split)) for split in ("valid", "test") if result.get(split)}
    answers = {split: table for split, table in found.items() if table is not None}
    return Finished(run, cfg, result, read_log(run), answers)


def read_result(run: Path) -> dict[str, Any]:
    """What a run's result.json holds; raises as `read_finished` does."""
    path = run / RESULT
    require(
        path.is_file(),
        f"{run}: no {RESULT} there, its training has not finished; go on with --checkpoint.resume auto",
    )
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in _KEYS if key not in result]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); train again") from error
    if missing:
        raise CheckpointError(f"{path}: has no {missing[0]}, as of another version of esm-neuron; train again")
    return dict(result)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, none where there is no such file. Raises CheckpointError at a bad line."""
    path = run / METRICS
    try:
        texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove it") from error
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}:{number}: not a JSON object with a step; delete the line") from error
    return lines
