"""The report of a finished run, and the model cards."""

from esm_neuron.reports.html import write_report

__all__ = ["write_report"]
