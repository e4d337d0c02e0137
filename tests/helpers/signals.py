"""A training that is asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from esm_neuron.training import run
from esm_neuron.training.callbacks import Callback


class Stop(Callback):
    """A callback that sends this process a SIGTERM after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, step: int, total: int, record: Any) -> None:
        if step == self.step:
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def stopping_after(step: int) -> Iterator[None]:
    """Have a training within the block be asked to stop after `step`."""
    make = run._callbacks
    with mock.patch.object(run, "_callbacks", lambda *of: [*make(*of), Stop(step)]):
        yield
