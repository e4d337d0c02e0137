"""docs/neuron-environment.md: the environment variables of the neuron backend, from the table that the code follows."""

from __future__ import annotations

from esm_neuron.backends.neuron_env import SETTINGS
from esm_neuron.config import AdapterConfig, LoopConfig, ParallelConfig, TrainConfig

HEAD = """# Environment of the neuron backend
Made by `make pages` from `esm_neuron/backends/neuron_env.py`. The backend sets these variables before it imports the
Neuron packages, except those that you have set yourself. To your `NEURON_CC_FLAGS` it adds only the flags that are not
in it. The values shown are those of the default seed on several nodes with `loop.precision: bf16`,
`parallel.zero1: false` and `adapter.kind: none`, where all of them apply. `esm-neuron doctor --config FILE` prints what
a run would see, and who set each variable.

| variable | value | meaning | source |
|---|---|---|---|
"""


def page() -> str:
    """Return the whole page."""
    cfg = TrainConfig(
        loop=LoopConfig(precision="bf16"), parallel=ParallelConfig(zero1=False), adapter=AdapterConfig(kind="none")
    )
    values = ((setting, setting.value(cfg, True)) for setting in SETTINGS)
    rows = [
        f"| `{s.name}` | {'not set' if value is None else f'`{value}`'} | {s.meaning} | {s.source} |"
        for s, value in values
    ]
    return HEAD + "\n".join(rows) + "\n"
