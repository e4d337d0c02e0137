"""Answers for new proteins: a table with a row for each record of the input, in its order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from esm_neuron.backends import create_backend
from esm_neuron.config import BackendName
from esm_neuron.data.loader import EvalLoader
from esm_neuron.data.splits import load_inputs
from esm_neuron.evaluate import collect
from esm_neuron.export import build_trained, read_run
from esm_neuron.files import write_text

log = logging.getLogger(__name__)


def predict(
    run: Path,
    source: Path,
    target: Path,
    backend_name: BackendName | None = None,
    say: Callable[[str], None] = log.info,
) -> pd.DataFrame:
    """Classify every record of `source` with a finished run and write `target` as CSV.

    The windows of a long sequence are averaged by probability, as in evaluation.

    Args:
        run: output folder of a training run.
        source: FASTA, CSV or TSV; columns as the run's configuration names them, labels not needed.
        target: columns `id`, `label`, and the probability of each class.
        backend_name: where to run; None: where it was trained.
        say: told what was read, left out or cut.

    Raises:
        EsmNeuronError: the run, the weights or a record cannot be used; `target` is then not written.
    """
    cfg, task = read_run(run, backend_name)
    backend = create_backend(cfg)
    try:
        table, report = load_inputs(source, cfg.data)
        say(report.summary())
        built = build_trained(cfg, task, backend)
        where = (backend.topology.dp, backend.topology.dp_rank)
        loader = EvalLoader(table, task, cfg, *where, local_dp=backend.local_dp, static_shapes=backend.static_shapes)
        answers = collect(built.model, task, backend, loader)
    finally:
        backend.close()
    columns = task.outputs(table, answers)
    frame = pd.DataFrame({"id": list(table.ids), **columns})
    if backend.topology.is_main:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, frame.to_csv(index=False, float_format="%.6f"))
    return frame
