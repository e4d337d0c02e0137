"""A finished run as one self-contained HTML page, with its pictures beside it as PNG."""

from esm_neuron.report.page import write_report

__all__ = ["write_report"]
