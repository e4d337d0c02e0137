"""What a task is: everything that differs between tasks is a field or a method of `Task`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa

from esm_neuron.config import EVERY_LAYER, ModelConfig, TaskConfig
from esm_neuron.config.deferred import module
from esm_neuron.data.dataset import Batch, ExampleTable, Target, select_records
from esm_neuron.data.labels import Labels
from esm_neuron.data.records import LIST_JOINER
from esm_neuron.files import scratch
from esm_neuron.metrics import Scores
from esm_neuron.metrics.calibration import Calibration
from esm_neuron.models.shapes import EsmShape, read_width
from esm_neuron.tasks.baselines import Baseline
from esm_neuron.tasks.view import View

if TYPE_CHECKING:
    from torch import Tensor

    from esm_neuron import compat
    from esm_neuron.compat import EsmConfig, PreTrainedModel
    from esm_neuron.models import esm2
else:  # labels, metrics and views need no torch
    esm2, compat = module("esm_neuron.models.esm2"), module("esm_neuron.compat")

Own = TypeVar("Own", bound="Task")
Predictions = Sequence[np.ndarray]
"""What `evaluation.collect` found for every example of a table, in the table's order: arrays [examples, ...], or
[tokens of the table, ...] for a task that predicts each token."""
CELLS = 1 << 25
"""Values of predictions that are held at once as float64: 256 MB."""
Column = np.ndarray | list[str] | list[np.ndarray]
"""One value per record: numbers [records], texts, or an array for each record."""
CLASS_SETTINGS = ("labels", "class_weights", "label_smoothing", "focal_gamma")


class Task(ABC):
    """One way of learning from proteins: a subclass, and a row of `tasks.TASKS`.

    The defaults are those of a task without labels that predicts one thing per protein. A task that only predicts,
    such as embedding, needs no `loss`, `metrics` and `outputs`.
    """

    summary: ClassVar[str] = "a task of its own"  # what it predicts, for the model card: `one class per protein`
    unit: ClassVar[str] = "proteins"  # what the metrics count, for the report
    settings: ClassVar[tuple[str, ...]] = ()  # fields of `TaskConfig` that it uses; the others must keep their defaults
    label_kind: ClassVar[type[Labels] | None] = None  # reads the label column; None: the task needs no labels
    needs_labels: bool = False  # whether it cannot predict without labels
    metric: ClassVar[str] = "loss"  # the one of `metrics` that chooses the best checkpoint
    greater_is_better: ClassVar[bool] = False
    compared: ClassVar[tuple[str, ...]] = ()  # metrics of one scale, which the report draws beside the baselines'
    per_token: ClassVar[bool] = False  # whether there is one target per token or one per sequence
    predictions_per_token: bool = False  # whether `predictions` are one per token [R, L, ...] or segment [R, S, ...]
    averages: ClassVar[bool] = False  # whether it has `averaged`: what several models predict together
    covers: ClassVar[bool] = False  # whether it has `covering`: a set or a range that holds the truth
    pools: ClassVar[bool] = False  # whether its head predicts from one vector per protein
    keeps_lm_head: ClassVar[bool] = False  # whether its head is the language model's, which a pretrained ESM-2 has
    hub_task: ClassVar[str | None] = None  # the hub's name for it (`pipeline_tag`); None: the hub has none
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"  # the class of transformers that loads its model
    problem_type: ClassVar[str | None] = None  # transformers' name for what one of its heads answers, where it has one
    peft_task: ClassVar[str | None] = "SEQ_CLS"  # PEFT's name for it, by which it finds its class; None: it has none

    def __init__(self, cfg: TaskConfig, labels: Sequence[str] = ()) -> None:
        self.cfg = cfg  # with what the training rows decide, see `data.labels.Labels.resolve`
        self.labels = tuple(labels)  # class names; empty where the task has none
        weights = cfg.class_weights if isinstance(cfg.class_weights, dict) else dict.fromkeys(labels, 1.0)
        self.class_weights = np.array([weights[label] for label in labels], np.float32)
        self.calibration = Calibration()  # how `metrics` and `outputs` read predictions

    @classmethod
    def labels_of(cls, cfg: TaskConfig) -> type[Labels] | None:
        """Return what reads the label column; None where no labels are read."""
        return cls.label_kind

    # The model

    def configure(self, config: EsmConfig, model: ModelConfig) -> EsmConfig:
        """Return the configuration of the task's model, made from the pretrained one."""
        return config

    @abstractmethod
    def build(self, config: EsmConfig) -> PreTrainedModel:
        """Return the task's model; called under the meta device, so it has shapes and no values."""

    def head(self, config: EsmConfig) -> tuple[str, ...]:
        """Return the names of the modules that a pretrained ESM-2 does not have: newly initialized, always trained."""
        return ()

    def linear_head(self, config: EsmConfig) -> str | None:
        """Return the name of the one linear layer that its head is, which a probe fits; None where it is more."""
        return None

    @classmethod
    def in_transformers(cls, model: ModelConfig) -> bool:
        """Return whether plain transformers can compute what the task's model does."""
        return True

    @classmethod
    def head_sizes(cls, model: ModelConfig, shape: EsmShape, outputs: int) -> list[int]:
        """Return the sizes of the parameters in `head`, for `esm-neuron plan`."""
        return []

    @classmethod
    def head_bytes(cls, hidden: int, outputs: int, number: int) -> int:
        """Return the bytes that head and loss keep for each token (`per_token`) or segment; matmuls give `number`."""
        return 4 * (4 * hidden + 4 * outputs)

    # Learning

    def example_target(self, table: ExampleTable, example: int, rng: np.random.Generator) -> Target:
        """Return what the model sees of one example and what it should predict, here nothing (weight 0).

        `rng` is seeded by (seed, epoch, example).
        """
        return Target(table.sequence(example), np.zeros((), np.int64), np.zeros((), np.float32))

    def evaluation_target(self, table: ExampleTable, example: int) -> Target:
        """Return the same for an evaluation: a function of the example's tokens, whatever the seed and its table."""
        return self.example_target(table, example, np.random.default_rng(table.content(example)))

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (sum of weighted losses, sum of weights), scalars: sums, so that passes and ranks add up exactly."""
        raise NotImplementedError(f"{type(self).__name__} is not trained")

    # Predictions

    def predictions(self, logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """Return what an evaluation keeps of a batch: float32 [R, S, ...] or [R, L, ...] each, here the logits."""
        return (logits.float(),)

    def metrics(
        self, table: ExampleTable, predictions: Predictions, intervals: bool = False, units: np.ndarray | None = None
    ) -> Scores:
        """Return how good the predictions for a table with labels are; with `intervals` also 95 % intervals.

        It needs predictions alone, whatever made them: the loop's network, a probe, a baseline. Intervals draw
        proteins, or the clusters `units` (int64 [records]; see `data.families`).
        """
        raise NotImplementedError(f"{type(self).__name__} is not evaluated")

    def outputs(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return what is written about each record: column -> one value per record, in the order of `table.ids`."""
        raise NotImplementedError(f"{type(self).__name__} has no table of predictions")

    def kept(self, table: ExampleTable, predictions: Predictions) -> dict[str, Column]:
        """Return what a run keeps of held-out records for its report: `outputs`, or less of hundreds of classes."""
        return self.outputs(table, predictions)

    def averaged(self, each: Sequence[Predictions]) -> Predictions:
        """Return the mean of several models' predictions for a table, in the form of one model's; see `averages`.

        Of classes the mean is that of their probabilities, before any temperature.
        """
        raise NotImplementedError(f"{type(self).__name__} averages no models")

    def calibrate(self, table: ExampleTable, predictions: Predictions) -> Calibration:
        """Return what predictions for a table with labels teach, see `Calibration`; the default learns nothing."""
        return Calibration()

    def read_by(self: Own, calibration: Calibration) -> Own:
        """Return a copy of the task that reads predictions by `calibration`."""
        task = copy(self)
        task.calibration = calibration
        return task

    def covering(self, table: ExampleTable, predictions: Predictions, coverage: float) -> dict[str, Column]:
        """Return the columns of `predict --coverage`, where `covers`: what holds the truth with that probability.

        Raise ConfigError where the calibration cannot tell.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sets or ranges")

    def coverage(
        self, table: ExampleTable, predictions: Predictions, units: np.ndarray | None = None
    ) -> dict[str, Any] | None:
        """Return `coverage_scores` of COVERAGE on a table with labels; None where the calibration cannot tell."""
        return None

    def targets(self, table: ExampleTable) -> Column | None:
        """Return what a table's labels say of each record, in the words of `outputs`; None without labels."""
        return None

    def class_counts(self, table: ExampleTable) -> dict[str, int]:
        """Return how many proteins, or residues, of a table are of each class; empty without classes."""
        if not self.labels:
            return {}
        found = table.labels
        several = found.ndim == 2
        counts = found.sum(0, dtype=np.int64) if several else np.bincount(found[found >= 0], minlength=len(self.labels))
        return dict(zip(self.labels, counts.tolist(), strict=True))

    def baselines(self, train: ExampleTable) -> list[Baseline]:
        """Return simple models, fitted on the training table, that the network has to beat."""
        return []

    def view(self, table: pa.Table) -> View | None:
        """Return what the report draws of a table that `run_dir.save_predictions` wrote; None: no charts of it."""
        return None


def record_mean(
    table: ExampleTable, values: np.ndarray, of: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> np.ndarray:
    """Return [records, ...]: the mean over the windows of each record of what `of` makes of `values` [examples, ...].

    It is float64; of more than CELLS values float32 in a file, which is gone when nothing uses it any more. `of` gets
    at most CELLS values at once.
    """
    # the window weights are float32 and sum to 1 only nearly
    total = np.bincount(table.record, table.weight.astype(np.float64), len(table.ids))
    share = (table.weight / total[table.record]).reshape(-1, *[1] * (values.ndim - 1))
    shape = (len(table.ids), *values.shape[1:])
    mean = np.zeros(shape) if math.prod(shape) <= CELLS else scratch(shape)
    for part in pieces(values):
        if len(values) == len(mean):  # one window each
            mean[table.record[part]] = of(values[part])
        else:
            np.add.at(mean, table.record[part], of(values[part]) * share[part])
    return mean


def pieces(values: np.ndarray) -> Iterator[slice]:
    """Give the rows of an array in pieces of at most CELLS values, or of one row."""
    step = max(1, CELLS // max(1, values[:1].size))
    return (slice(first, first + step) for first in range(0, len(values), step))


def thinned(table: ExampleTable, predictions: Predictions) -> tuple[ExampleTable, Predictions]:
    """Return a table and its predictions, or every k-th record of them, so that these are at most CELLS values."""
    every = math.ceil(predictions[0].size / CELLS)
    if every <= 1:
        return table, predictions
    kept, examples, _ = select_records(table, np.arange(len(table.ids)) % every == 0)
    return kept, [values[examples] for values in predictions]


def combined(each: Sequence[Predictions], combine: Callable[[np.ndarray], np.ndarray]) -> Predictions:
    """Return what `combine` makes, [n, ...], of several models' predictions, float64 [models, n, ...]; in float32."""
    arrays = [predictions[0] for predictions in each]
    found = np.empty(arrays[0].shape, np.float32)
    for part in pieces(found):
        found[part] = combine(np.stack([array[part] for array in arrays]).astype(np.float64))
    return [found]


def mean_softmax(logits: np.ndarray) -> np.ndarray:
    """Return [n, C]: the logarithms, which are logits too, of the mean probabilities of logits [models, n, C]."""
    return np.asarray(np.logaddexp.reduce([log_softmax(own) for own in logits]) - np.log(len(logits)))


def joined(labels: Sequence[str], chosen: np.ndarray, joiner: str = LIST_JOINER) -> list[str]:
    """Return the names of the classes that are not 0 in each row of [n, C]."""
    return [joiner.join(labels[c] for c in np.flatnonzero(row).tolist()) for row in chosen]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return float64 [n, C]: log probabilities of logits [n, C]."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True, initial=-np.inf)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def cross_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Return - log p in nats of what is true: of the probabilities that are shown, so after a mean over windows."""
    return np.asarray(-np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)))


def by_class(labels: Sequence[str], columns: Iterable[Column]) -> dict[str, Column]:
    """Return one column `p_<class>` per class."""
    return {f"p_{name}": column for name, column in zip(labels, columns, strict=True)}


def weighted(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (sum of weighted losses, sum of weights)."""
    return (losses * batch.weights).sum(), batch.weights.sum()


class PooledTask(Task):
    """One vector per protein, and a head on it; subclasses say what is predicted and how it is learned."""

    pools = True
    greater_is_better = True
    label_kind: ClassVar[type[Labels] | None] = Labels
    problem_type: ClassVar[str | None] = "single_label_classification"

    def configure(self, config: EsmConfig, model: ModelConfig) -> EsmConfig:
        """Add the outputs and the pooling; what transformers would compute otherwise becomes a type of its own."""
        values = config.to_dict() | {"pooling": model.pooling} | self._output_config()
        if not self.is_plain(model):
            values["read_layers"] = model.layers if model.layers in EVERY_LAYER else "last"
            values |= {"composition": model.composition, "linear_head": model.head == "linear"}
        values.update(label2id={label: i for i, label in values["id2label"].items()})
        values.pop("model_type", None)
        kind = compat.EsmConfig if self.is_plain(model) else esm2.PooledEsmConfig
        configured: EsmConfig = kind.from_dict(values)
        return configured

    def _output_config(self) -> dict[str, Any]:
        """Return entries of the model's configuration: `id2label`, `problem_type`."""
        return {"id2label": dict(enumerate(self.labels)), "problem_type": self.problem_type}

    @classmethod
    def in_transformers(cls, model: ModelConfig) -> bool:
        every_layer = model.layers in EVERY_LAYER
        return model.pooling == "cls" and not (every_layer or model.composition or model.head == "linear")

    def is_plain(self, model: ModelConfig) -> bool:
        """Return whether plain transformers can compute what this task's model does, see `in_transformers`."""
        return self.in_transformers(model)

    def build(self, config: EsmConfig) -> PreTrainedModel:
        if isinstance(config, esm2.PooledEsmConfig):
            return esm2.PackedForPooledClassification(config)
        return esm2.PackedForSequenceClassification(config)

    def head(self, config: EsmConfig) -> tuple[str, ...]:
        return esm2.head_names(config)

    def linear_head(self, config: EsmConfig) -> str | None:
        return esm2.head_name(config)

    @classmethod
    def head_sizes(cls, model: ModelConfig, shape: EsmShape, outputs: int) -> list[int]:
        hidden, every = shape.hidden, shape.layers + 1
        pooling = [hidden] if model.pooling == "attention" else []
        mix = [every] if model.layers == "mix" else []
        width = read_width(model.pooling, hidden, every if model.layers == "concat" else 1, model.composition)
        if model.head == "linear":
            return [outputs * width, outputs, *pooling, *mix]
        return [width * hidden, hidden, outputs * hidden, outputs, *pooling, *mix]
