"""Metrics of finished evaluations: functions of every protein's prediction, with n and 95 % bootstrap intervals.

They take arrays with each protein once (`evaluation.collect` sees to it), so they are exact whatever the batch size and
the world. Values that are undefined (AUROC with one class present) are None, which is null in JSON.
"""

from esm_neuron.metrics.bootstrap import Scores, Value
from esm_neuron.metrics.classification import classification_metrics
from esm_neuron.metrics.masked_lm import masked_lm_metrics
from esm_neuron.metrics.multi_label import multi_label_metrics
from esm_neuron.metrics.regression import regression_metrics

__all__ = [
    "Scores",
    "Value",
    "classification_metrics",
    "masked_lm_metrics",
    "multi_label_metrics",
    "regression_metrics",
]
