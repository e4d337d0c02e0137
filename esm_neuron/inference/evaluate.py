"""Metrics of a finished run on a labelled file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esm_neuron.backends import opened_backend
from esm_neuron.config import BackendName, require
from esm_neuron.config.deferred import module
from esm_neuron.data.families import independent_units
from esm_neuron.data.inputs import InputChunks
from esm_neuron.data.loader import EvalLoader
from esm_neuron.distributed import from_main_rank, is_alone, log_nothing, main_rank_only, raise_on_any_rank
from esm_neuron.files import finite, note_output, write_json
from esm_neuron.inference.load import find_members
from esm_neuron.inference.predict import write_rejected
from esm_neuron.inference.stream import check_output
from esm_neuron.metrics.verdict import alarms

if TYPE_CHECKING:
    from esm_neuron.training import evaluation
else:
    evaluation = module("esm_neuron.training.evaluation")

logger = logging.getLogger(__name__)


def evaluate(
    model: str | Path,
    source: Path,
    target: Path | None,
    backend_name: BackendName | None = None,
    log: Callable[[str], None] = logger.info,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the metrics of a trained model on a labelled file, with 95 % bootstrap intervals.

    Args:
        model: output folder of a training run, which may be an ensemble's, or a folder with a trained model by
            transformers or PEFT.
        source: file with labels; the row filters and the split column of training are not applied, `data.keep` is.
        target: JSON file to write as well, with TARGET.rejected.tsv if records were left out or changed.
        backend_name, log: as for `predict`.
        overrides: words that overrule the model's settings, such as `--data.label_column class`.
    """
    if target is not None:
        require(
            target.suffix.lower() == ".json",
            f"--output {target}: metrics are JSON; name a .json file (`predict` writes tables)",
        )
        check_output(target, model, {"--input": source}, overrides)
        target.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before the work
    specs, task = find_members(model, backend_name, overrides, "evaluate")
    cfg = specs[0].cfg
    kind = task.labels_of(cfg.task)
    labels = None if kind is None else kind.of(cfg.task, cfg.data)
    inputs = InputChunks(source, cfg.data, labels)
    if is_alone():
        inputs.check()
    with opened_backend(cfg) as backend:
        log = log if backend.topology.is_main else log_nothing
        table = raise_on_any_rank(backend, inputs.read)
        log(inputs.report.summary())
        where = (backend.topology.dp, backend.topology.dp_rank)
        loader = EvalLoader(table, task, cfg, *where, local_dp=backend.local_dp, static_shapes=backend.static_shapes)
        each = [evaluation.Evaluator(spec.load(task, backend).model, task, backend).collect(loader) for spec in specs]
        predictions = each[0] if len(each) == 1 else task.averaged(each)
        units = from_main_rank(backend, lambda: independent_units(table, cfg.data.homologs))
        values = finite(task.metrics(table, predictions, True, units))
        for line in alarms(values, probe=cfg.adapter.kind == "probe"):
            log(line)
        if target is not None:
            main_rank_only(backend, lambda: write_json(target, values))
            main_rank_only(backend, lambda: note_output(target))
            write_rejected(backend, target, inputs.rejected, log)
    return dict(values)
