"""Names within a run's folder."""

from __future__ import annotations

CONFIG = "config.yaml"
"""Every setting, resolved."""
RESULT = "result.json"
"""Figures of the finished run; there is none before it has finished."""
METRICS = "metrics.jsonl"
"""A line a logged step, a line an evaluation."""
NONFINITE = "nonfinite.jsonl"
"""A line a step whose loss or gradient was not finite, with the ids of its records; there only if there was one."""
REJECTED = "rejected.tsv"
"""Rows left out or changed for their characters."""
ADAPTER, MODEL, BASE = "adapter", "model", "base"
"""A PEFT adapter, or a whole Hugging Face model; and an adapter's base where it has no other home."""
REPORT = "report"
"""The page of `esm-neuron report` and its pictures."""
CARD = "README.md"
"""Model card, in the folder of an adapter or a model."""
PASSED_OVER = "passed-over-"
"""What the name of a checkpoint begins with that a resumed run could not read."""


def answers_name(split: str) -> str:
    """The file with the answers to `valid` or `test`, see `held_out`."""
    return f"answers-{split}.parquet"
