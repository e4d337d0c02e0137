"""Predictions: what a trained task says of each record, in the order of the input."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from esm_neuron.answers.opened import open_model
from esm_neuron.answers.parts import JOIN, Answers, check_target
from esm_neuron.answers.records import Answerer, answer_file
from esm_neuron.config import BackendName
from esm_neuron.data.batch import ExampleTable
from esm_neuron.errors import ConfigError

log = logging.getLogger(__name__)


def predict(
    model: str,
    source: Path,
    target: Path,
    *,
    backend: BackendName | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    say: Callable[[str], None] = log.info,
) -> int:
    """Answer every record of `source` with a finished run. The windows of a long sequence are averaged, as in
    evaluation.

    Args:
        model: output folder of a training run.
        source: FASTA, CSV, TSV, JSONL or Parquet; columns as the run's configuration names them, labels not needed.
        target: CSV, TSV, JSONL or Parquet: `id`, and what `Task.outputs` gives.
        backend: where to run; None: where it was trained.
        settings: words that overrule the run's, such as `--data.sequence_column seq`.
        resume: go on with the parts that a killed command left beside `target`.
        say: told what was read, left out or cut.

    Returns:
        Records written.

    Raises:
        EsmNeuronError: the run, the weights or a record cannot be used; `target` is then as it was.
    """
    check_target(target, tuple(JOIN))
    opened = open_model(model, backend, settings, "predict")
    task = opened.trained
    if task is None:
        raise ConfigError(f"--model {model}: no config.yaml there; predict needs the output folder of a training run")

    def write(table: ExampleTable, answers: Sequence[np.ndarray]) -> Answers:
        columns = task.outputs(table, answers)
        made = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
        return pa.table({"id": pa.array(list(table.ids), pa.string()), **made})

    answerer = Answerer(command="predict", options={}, task=task, model=lambda built: built.model, write=write)
    return answer_file(opened, answerer, source, target, resume, say)
