"""What comes of a call that may be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from esm_neuron.errors import EsmNeuronError


class Refusal(str):
    """The text of a known error."""


def outcome(call: Callable[[], Any]) -> Any:
    """What `call` returns, or the text of the known error that it raises."""
    try:
        return call()
    except EsmNeuronError as error:
        return Refusal(error)
