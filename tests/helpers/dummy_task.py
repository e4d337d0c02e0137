"""A task that the package does not know: its row in `TASKS` is set here. As a script, it runs every command on it.

python dummy_task.py CONFIG.yaml PROTEINS.csv
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from esm_neuron import cli
from esm_neuron.config import ModelConfig, settings
from esm_neuron.data.dataset import Batch, ExampleTable, Target
from esm_neuron.data.labels import Labels
from esm_neuron.metrics import Scores, Value
from esm_neuron.metrics.bootstrap import bootstrap, with_intervals
from esm_neuron.tasks import TASKS
from esm_neuron.tasks.base import Column, PooledTask, Predictions, record_mean
from esm_neuron.tasks.baselines import Baseline
from esm_neuron.tasks.view import View, lengths, worst

ROW = {"fold_family": f"{__name__}:FoldFamily"}


class FamilyLabels(Labels):
    """The family in labels such as `alpha/beta.1`: the part before the dot."""

    def split(self, text: str, length: int) -> list[str]:
        family, dot, _ = text.partition(".")
        if not dot:
            raise ValueError(f"{text!r} has no dot; write FAMILY.NUMBER")
        return [family]


class FoldFamily(PooledTask):
    """The family of a fold, by least squares; everything differs from the package's own tasks."""

    summary = "the family of a fold"
    settings = ("labels",)
    label_kind = FamilyLabels
    metric = "share_wrong"
    greater_is_better = False
    compared = ("share_wrong",)
    hub_task = None

    @classmethod
    def in_transformers(cls, model: ModelConfig) -> bool:
        return False

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        own = np.zeros(len(self.labels), np.float32)
        if len(table.labels):
            own[table.labels[table.record[example]]] = 1
        return Target(table.sequence(example), own, table.weight[example])

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = (logits.float() - batch.labels).square().sum(-1)
        return (losses * batch.weights).sum(), batch.weights.sum()

    def metrics(
        self, table: ExampleTable, predictions: Predictions, intervals: bool = False, units: np.ndarray | None = None
    ) -> Scores:
        scores, rows = record_mean(table, predictions[0]), np.arange(len(table.ids))
        wrong = (scores.argmax(1) != table.labels).astype(float)
        loss = np.square(scores).sum(1) - 2 * scores[rows, table.labels] + 1
        values: dict[str, Value] = {
            "n": len(rows),
            "loss": float(loss.mean()),
            "share_wrong": float(wrong.mean()),
        }
        if not intervals:
            return Scores(values)
        drawn = bootstrap(len(rows), lambda k: {"loss": k @ loss / len(rows), "share_wrong": k @ wrong / len(rows)})
        return with_intervals(values, drawn, len(rows))

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        scores = record_mean(table, predictions[0])
        return {"family": [self.labels[i] for i in scores.argmax(1)], "score": scores.max(1)}

    def targets(self, table: ExampleTable) -> Column:
        return [self.labels[i] for i in table.labels]

    def baselines(self, train: ExampleTable) -> list[Baseline]:
        first = np.eye(len(self.labels))[0]
        return [Baseline("first family", lambda table: [np.tile(first, (len(table), 1))], len(train), len(train))]

    def view(self, table: pa.Table) -> View:
        target, found = table["target"].to_pylist(), table["family"].to_pylist()
        wrong = np.array([one != other for one, other in zip(target, found, strict=True)], dtype=float)
        return View(
            residues=lengths(table),
            error=wrong,
            weight=np.ones(len(wrong)),
            error_name="share of wrong families",
            worst=worst(table, wrong, lambda i: (target[i], found[i], "another family")),
        )


def commands(config: Path, proteins: Path) -> Iterator[list[str]]:
    """The words of every command that meets a task, in their order."""
    run = Path(settings.read_config(config).output)
    yield ["data", "check", str(proteins), "--task", "fold_family", "--label_column", "label"]
    yield ["plan", "--config", str(config)]
    yield ["train", "--config", str(config)]
    yield ["evaluate", "--model", str(run), "--input", str(proteins), "--output", str(run / "metrics.json")]
    yield ["predict", "--model", str(run), "--input", str(proteins), "--output", str(run / "predicted.csv")]
    yield ["report", str(run)]
    yield ["export", "--model", str(run), "--output", str(run / "exported")]


if __name__ == "__main__":
    TASKS.update(ROW)
    print(json.dumps([cli.main(words) for words in commands(Path(sys.argv[1]), Path(sys.argv[2]))]))
