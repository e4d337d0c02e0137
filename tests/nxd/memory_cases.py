"""Cases about memory: a checkpoint of the 650M shape, and what a rank holds while it reads its part of it."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import RESULTS
from helpers.device_run import LABELS, configuration
from safetensors.torch import save_file

from esm_neuron.backends.neuron import NeuronBackend
from esm_neuron.config import ModelConfig
from esm_neuron.models.hf_folder import fresh_folder, write_shards
from esm_neuron.models.tensor_parallel import whole_shape
from esm_neuron.models.weights import open_weights
from esm_neuron.tasks import create_task
from esm_neuron.training.build import build_model


def write_650m(output: str) -> None:
    """A checkpoint of the 650M shape with cheap weights, in shards as the hub's."""
    config, source = open_weights(ModelConfig(name="esm2_t33_650M", init="random"), 0)
    state = ((key, torch.full(source.shape(key), 0.01)) for key in sorted(source.keys()))
    with fresh_folder(Path(output) / "model") as aside:
        write_shards(state, aside, 500_000_000)
        config.to_json_file(aside / "config.json")
    dist.destroy_process_group()


def load_650m(output: str, model: str, **options: Any) -> None:
    """Bytes of anonymous memory at the peak of building, over those after the imports; and what this rank holds."""
    cfg = configuration(output, **options)
    cfg = replace(cfg, model=ModelConfig(name=model))
    task, backend = create_task(cfg.task, LABELS), NeuronBackend(cfg)
    with Watch() as watch:
        built = build_model(cfg, task, backend)
    held = sum(t.nbytes for t in (*built.model.parameters(), *built.model.buffers()))
    heads, tp = built.config.num_attention_heads, backend.topology.tp
    block = {n: p for n, p in built.model.named_parameters() if ".layer.0." in n and "lora" not in n}
    sizes = {n: math.prod(p.shape) * tp if ".qkv." in n else math.prod(whole_shape(n, p.shape, heads, tp))
             for n, p in block.items()}  # fmt: skip
    layer = sum(size * block[name].element_size() for name, size in sizes.items())
    ranks = backend.gather_host((watch.peak - watch.before, held, layer))
    if backend.topology.is_main:
        save_file({"peak_held_layer": torch.tensor(ranks)}, Path(output) / RESULTS)
    backend.close()


class Watch:
    """Samples this process's anonymous memory every millisecond within the block."""

    def __enter__(self) -> Watch:
        self.before = self.peak = anonymous_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, anonymous_memory())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_memory())


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
