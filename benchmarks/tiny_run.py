"""The tiny run that soak.py kills, faults.py breaks and long_run.py watches: proteins, modes, what it leaves."""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from esm_neuron.config import BackendName, TrainConfig
from esm_neuron.files import sha256
from esm_neuron.run_dir import PASSED_OVER

os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("USE_TORCH_XLA", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")
"""How processes start: with all that this one has imported."""
TIMING = {"residues_per_second", "sequences_per_second", "graphs", "peak_memory_gb", "seconds"}
"""Values that depend on the clock, or on what was compiled before."""


@dataclass(frozen=True)
class Mode:
    """One way to train."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Section -> name -> value, on top of those that all modes share."""
    backend: BackendName = "cpu"
    processes: int = 1
    environment: dict[str, str] = field(default_factory=dict)


ONE_PACK = {"loop": {"packs_per_device": 1}}
DEVICES = {
    "gloo": Mode(ONE_PACK, processes=2),
    "xla": Mode(backend="xla"),
    "spmd": Mode({"parallel": {"tp": 2}, **ONE_PACK}, "xla", environment={"CPU_NUM_DEVICES": "4"}),
    "nxd": Mode(ONE_PACK, "neuron", processes=2, environment={"NXD_CPU_MODE": "1"}),
}
FULL = {"adapter": {"kind": "none", "dropout": 0.0}}
MASKED = {"task": {"name": "masked_lm"}, **FULL}
MODES = {
    "lora": Mode(),
    "full": Mode(FULL),
    "masked-lm": Mode(MASKED),
    "asynchronous": Mode({"checkpoint": {"asynchronous": True}}),
    "gloo-asynchronous": Mode({**ONE_PACK, "checkpoint": {"asynchronous": True}}, processes=2),
    **{
        f"{name}{trained}": replace(mode, settings={**mode.settings, **settings})
        for name, mode in DEVICES.items()
        for trained, settings in (("", {}), ("-full", FULL), ("-masked-lm", MASKED))
    },
}
"""Modes by name; a device's name alone trains LoRA."""


def configuration(folder: Path, output: str, mode: Mode, steps: int) -> TrainConfig:
    """Configure a tiny run with all that a resume could get wrong: dropout, accumulation, packs, epochs that end."""
    sections: dict[str, Any] = {
        "model": {"name": "tiny", "init": "random", "dropout": 0.1},
        "data": {
            **{split: str(folder / f"{split}.csv") for split in ("train", "valid", "test")},
            "max_residues": 62, "window_overlap": 8, "pack_tokens": 128, "max_segments": 6,
        },
        "adapter": {"dropout": 0.1},
        "optim": {"lr": 5e-3, "warmup_steps": 3},
        "loop": {"max_steps": steps, "packs_per_step": 4, "packs_per_device": 2, "eval_packs_per_device": 2,
                 "eval_every": max(2, steps // 6), "watchdog": 3600},
        "checkpoint": {"every": 3, "keep": 3, "resume": "auto"},
        "log": {"every": 1, "tensorboard": False, "baselines": False},
    }  # fmt: skip
    cfg = TrainConfig(output=str(folder / output), backend=mode.backend)
    for name in {*sections, *mode.settings}:
        values = {**sections.get(name, {}), **mode.settings.get(name, {})}
        cfg = replace(cfg, **{name: replace(getattr(cfg, name), **values)})
    return cfg


def write_proteins(folder: Path) -> None:
    """Write random proteins of 20 to 60 residues, each with one of two labels."""
    rng = random.Random(0)
    for split, count in (("train", 60), ("valid", 24), ("test", 24)):
        rows = ["id,sequence,label"]
        for number in range(count):
            label, alphabet = (("a", "ACDEFGHIKL"), ("b", "FGHIKLMNPQRSTVWY"))[number % 2]
            rows.append(f"{split}{number},{''.join(rng.choices(alphabet, k=rng.randint(20, 60)))},{label}")
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def left(output: Path) -> dict[str, Any]:
    """Return the content of all files of a finished run by name, without clocks."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in output.rglob("*") if p.is_file() and not p.parent.name.startswith(PASSED_OVER)):
        name = str(path.relative_to(output))
        if path.suffix in (".safetensors", ".parquet", ".csv"):
            found[name] = sha256(path)
        elif path.name == "metrics.jsonl":
            lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            found[name] = [{k: v for k, v in line.items() if k not in TIMING} for line in lines]
        elif path.name in ("result.json", "state.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            found[name] = without_timing(content)
    return found


def begun_after(cfg: TrainConfig) -> int:
    """Return the step that a run went on from by its log; 0 if it began anew, which can end with the same bytes."""
    lines = Path(f"{cfg.output}.log").read_text(encoding="utf-8")
    found = re.search(r"^resumed after step (\d+)", lines, re.MULTILINE)
    return int(found[1]) if found else 0


def without_timing(value: Any) -> Any:
    """Return `value` without the entries named in TIMING, at any depth."""
    if isinstance(value, dict):
        return {key: without_timing(item) for key, item in value.items() if key not in TIMING}
    return value


def import_all(modes: list[str]) -> None:
    """Import everything that forks will need; none of it may start threads or open devices."""
    backends = {MODES[mode].backend for mode in modes}
    if "neuron" in backends:
        sys.path[:0] = [os.environ["NXD_SRC"], str(ROOT / "tests" / "nxd")]
        from standins import vendor

        vendor.install()
        for package in ("neuronx_distributed.optimizer", "optimum.neuron.peft"):
            importlib.import_module(package)
    import torch

    torch.set_num_threads(1)
    needed = ["esm_neuron.inference.predict", "esm_neuron.training.run", "torch._dynamo", "pyarrow.pandas_compat"]
    needed += ["bitsandbytes"] if importlib.util.find_spec("bitsandbytes") else []  # peft looks for it
    needed += ["torch_xla"] if "xla" in backends else []
    for package in needed:
        importlib.import_module(package)
