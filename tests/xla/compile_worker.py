"""Compiles ahead, trains, and plants what a monitor must find; prints what happened as JSON.

python compile_worker.py CONFIG.yaml FOLDER
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.reads import reads, strict, zero

from esm_neuron.backends.xla import XlaBackend
from esm_neuron.config import TrainConfig, settings
from esm_neuron.data.dataset import Batch
from esm_neuron.data.labels import Labels
from esm_neuron.data.loader import StepData, TrainLoader
from esm_neuron.data.splits import load_splits
from esm_neuron.errors import ConfigError
from esm_neuron.planning.plan import make_plan
from esm_neuron.training import run

PLANTED = 3
"""The step that is made to differ, from 0."""


def cut(batch: Batch, rows: int, tokens: int) -> Batch:
    """The first packs and tokens of a batch."""
    both = {name: getattr(batch, name)[:rows, :tokens] for name in ("input_ids", "segment_ids", "positions")}
    return replace(batch, **both, **{name: getattr(batch, name)[:rows] for name in ("labels", "weights", "members")})


def planted(change: Callable[[Batch], Batch]) -> Callable[[TrainLoader, int], StepData]:
    load = TrainLoader.load

    def loaded(self: TrainLoader, step: int) -> StepData:
        data = load(self, step)
        return replace(data, batches=[change(batch) for batch in data.batches]) if step == PLANTED else data

    return loaded


def refused(cfg: TrainConfig, owner: type, name: str, changed: Any) -> str:
    """The message that ends a run with a changed method."""
    before = getattr(owner, name)
    setattr(owner, name, changed)
    try:
        run.train(cfg, str)
    except ConfigError as error:
        return str(error)
    finally:
        setattr(owner, name, before)
    return "nothing was refused"


class Forgetful:
    """What a careless backend would do: another branch of the code at one of its steps."""

    def __init__(self) -> None:
        self.before, self.calls = XlaBackend.step, 0

    def __call__(self, backend: XlaBackend, model: Any, optimizer: Any, weight: Any, max_norm: float) -> Any:
        self.calls += 1
        return self.before(backend, model, optimizer, weight, 0.0 if self.calls > PLANTED else max_norm)

    def method(self) -> Any:
        return lambda backend, *args: self(backend, *args)


def main(config: Path, folder: Path) -> None:
    cfg = settings.read_config(config)

    def at(name: str, **loop: Any) -> TrainConfig:
        return replace(cfg, output=str(folder / name), loop=replace(cfg.loop, **loop))

    said: dict[str, Any] = {"graphs": dict(make_plan(cfg, load_splits(cfg, Labels)).graphs_by_phase)}
    said["compiled"] = run.compile_graphs(at("ahead"), str)
    said["written"] = [str(path) for path in (folder / "ahead").rglob("*")]
    result = run.train(at("after"), str).result
    said["compiled by training"] = result["train"]["graphs"] - said["compiled"]
    said["steps"] = result["train"]["steps"]

    for name, answer in (("zero", zero), ("strict", strict)):
        for kind in ("lora", "none"):
            one = replace(at(f"{name}-{kind}", max_steps=2, eval_every=2), adapter=replace(cfg.adapter, kind=kind, r=3))
            with reads(answer):
                compiled = run.compile_graphs(one, str)
                done = run.train(replace(one, output=one.output + "-trained"), str).result["train"]
            said.setdefault(name, {})[kind] = [compiled > 0, done["steps"]]

    def short(name: str, **loop: Any) -> TrainConfig:
        return at(name, max_steps=6, eval_every=6, **loop)

    said["length"] = refused(short("length"), TrainLoader, "load", planted(lambda b: cut(b, 4, 180)))
    said["packs"] = refused(short("packs"), TrainLoader, "load", planted(lambda b: cut(b, 3, 192)))
    said["value"] = refused(short("value", tracing="always"), XlaBackend, "step", Forgetful().method())
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("esm_neuron.training.monitors").addHandler(handler)
    # Another rank, so other programs: this process keeps those that the run before has compiled.
    other = replace(short("warned", on_recompile="warn", tracing="always"), adapter=replace(cfg.adapter, r=2))
    XlaBackend.step = Forgetful().method()  # type: ignore[method-assign]
    warned = run.train(other, str).result
    said["warned"] = {"steps": warned["train"]["steps"], "lines": lines}
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
