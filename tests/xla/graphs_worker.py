"""Runs graphs by their hash and by tracing, over one XLA:CPU device or four; prints what differs as JSON.

python graphs_worker.py FOLDER DEVICES
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.update(PJRT_DEVICE="CPU", USE_TORCH_XLA="0", CPU_NUM_DEVICES=sys.argv[2])

import torch
import torch_xla.debug.metrics as met

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.device_run import Run, configuration, examples, patched
from torch import Tensor

from esm_neuron.backends.graphs import TracedGraph
from esm_neuron.errors import TrainingError

FOLDER, DEVICES = Path(sys.argv[1]), int(sys.argv[2])
CASES = {"lora": "lora", "weights": "none"}
"""Name of a case -> adapter.kind; dropout is on in all."""


def started(name: str, tracing: str, kind: str = "lora", r: int = 4, **loop: Any) -> Run:
    settings = {
        "adapter.kind": kind,
        "model.dropout": 0.1,
        "adapter.dropout": 0.1 if kind == "lora" else 0.0,
        "adapter.r": r,
        "optim.schedule": "constant",
        "parallel.tp": 2 if DEVICES > 1 else 1,
        "loop.tracing": tracing,
        "loop.packs_per_step": 8,
        "loop.packs_per_device": 2,
        "loop.eval_every": 8,
        **{f"loop.{field}": value for field, value in loop.items()},
    }
    return Run.start(configuration(str(FOLDER / name), backend="xla", set=settings), valid=examples(12, seed=5))


def trained(run: Run) -> dict[str, Tensor]:
    """Everything that 20 steps give: losses, norms, weights, moments, and the loss of an evaluation."""
    found = {**run.train(), **run.state()}
    return found | {"evaluated": torch.tensor(run.metrics()["loss"], dtype=torch.float64)}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


def counting(fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """A function and the list that grows by its calls."""
    calls: list[int] = []

    def wrapped(*args: Any) -> Any:
        calls.append(len(args))
        return fn(*args)

    return wrapped, calls


def ways() -> dict[str, Any]:
    """Each case in the three ways: what differs, and how many tensors were compared."""
    found: dict[str, Any] = {}
    for case, kind in CASES.items():
        always = trained(started(f"{case}-always", "always", kind))
        found[case] = {"tensors": len(always)}
        for way in ("once", "compare"):
            run = started(f"{case}-{way}", way, kind)
            begun = run.backend.graphs()
            found[case][way] = different(always, trained(run))
            found[case][f"{way}: graphs"] = run.backend.graphs() - begun
    return found


def traces() -> dict[str, int]:
    """How often the Python of a pass, an update and an evaluation runs in 20 steps of two passes, evaluated thrice."""
    run = started("traces", "once")
    found = {}
    runners = {
        "passes": run.trainer._run_pass,
        "updates": run.trainer._run_update,
        "evaluations": run.trainer.evaluator._run_pass,
    }
    for name, runner in runners.items():
        runner._fn, found[name] = counting(runner._fn)  # type: ignore[attr-defined]
    run.train()
    return {name: len(calls) for name, calls in found.items()}


def unnamed() -> list[str]:
    """The errors where a pass reads a tensor that nobody named: one from the host, one that a graph has computed."""
    return [_unnamed(lambda stray: stray), _unnamed(lambda stray: stray * 2)]


def _unnamed(made: Callable[[Tensor], Tensor]) -> str:
    run = started("unnamed", "once")
    stray = made(torch.full((3,), 0.5).to(run.backend.device))
    run.backend.sync()
    loss = run.task.loss
    run.task.loss = lambda logits, batch: (lambda value, weight: (value * stray.sum(), weight))(*loss(logits, batch))
    try:
        run.train()
    except TrainingError as error:
        return f"{error} (after step {run.trainer.state.step})"
    return "nothing was refused"


def dropped() -> list[str]:
    """What differs where torch_xla has dropped the graphs in the middle of a run."""
    run, runs = started("dropped", "once"), 0

    def forgetting(method: Any) -> Any:
        def wrapped(graph: TracedGraph, batch: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs in (7, 15):
                graph._hash = bytes(len(graph._hash))
            return method(graph, batch)

        return wrapped

    with patched(TracedGraph, "run", forgetting):
        found = trained(run)
    return different(trained(started("whole", "once")), found)


def evicted() -> dict[str, Any]:
    """What differs where torch_xla keeps two graphs at a time, so that it drops one at each step; none is unplanned."""
    short = {"max_steps": 8, "eval_every": 2}
    runs = {way: started(f"evicted-{way}", way, on_recompile="error", **short) for way in ("once", "compare")}
    kept = {way: trained(run) for way, run in runs.items()}
    again = {f"{way}: compiled again": run.backend._compiled_again for way, run in runs.items()}  # type: ignore[attr-defined]
    always = trained(started("evicted-always", "always", on_recompile="ignore", **short))
    return {**again, **{way: different(always, found) for way, found in kept.items()}}


def unequal() -> dict[str, Any]:
    """What `compare` does where a graph gives other bits by its hash: warnings, and what differs in the end."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("esm_neuron.backends.graphs").addHandler(handler)

    def wrong(method: Any) -> Any:
        def wrapped(graph: TracedGraph, batch: Any) -> Any:
            results = method(graph, batch)
            if results and len(results) == 2:  # the update's: its totals and norm
                return results[0], results[1] + 1
            return results

        return wrapped

    with patched(TracedGraph, "run", wrong):
        found = trained(started("unequal", "compare"))
    return {"lines": lines, "different": different(trained(started("right", "always")), found)}


def memory() -> dict[str, int]:
    """Inputs of the graphs whose memory the results took."""
    run = started("memory", "once", r=3, max_steps=2, eval_every=2)
    met.clear_all()
    run.train()
    aliased = met.metric_data("InputOutputAliasCount")
    return {"aliased": int(aliased[1]) if aliased else 0}


def resumed() -> list[str]:
    """What differs between a run and one that went on from its checkpoint in the middle."""
    whole = trained(started("through", "once"))
    cut = started("cut", "once", max_steps=20)
    cut.trainer.total_steps = 10
    cut.train()
    weights, moments = cut.backend.gather_state(cut.model, cut.trainer.optimizer)
    rest = started("rest", "once")
    rest.backend.load_state(rest.model, rest.trainer.optimizer, weights, moments)
    rest.trainer.state = replace(cut.trainer.state)
    found = trained(rest)
    for name in ("losses", "norms"):
        whole[name] = whole[name][10:]
    return different(whole, found)


if __name__ == "__main__":
    if "XLA_COMPILATION_CACHE_SIZE" in os.environ:
        said: dict[str, Any] = {"evicted": evicted()}
    else:
        said = {"ways": ways(), "unnamed": unnamed()}
        if DEVICES == 1 and "XLA_DISABLE_FUNCTIONALIZATION" not in os.environ:
            said |= {f.__name__: f() for f in (traces, dropped, unequal, memory, resumed)}
    print(json.dumps(said))
