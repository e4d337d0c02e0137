"""One rank of one attempt of soak.py: it trains, writes its step numbers to files, and may kill itself."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tiny_run import Mode

EXIT_ERROR = 2
"""Exit code of a rank that ends with one of the package's own errors, as of the command line."""
LONGEST = 1200.0
"""Seconds after which an attempt is ended, and counts as failed."""


@dataclass(frozen=True)
class Kill:
    """When a process ends itself by SIGKILL."""

    kind: str
    """`step`, `write`, `evaluate`, or `hang`: at a moment as for `step`, stopped rather than killed."""
    at: float
    """Seconds after training has begun; or which file, or batch, counted from 0."""
    rank: int = 0


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill: Kill) -> None:
    """Arrange for this process to die at the moment of `kill`."""
    from esm_neuron.training import checkpoint
    from esm_neuron.training import evaluation as evaluate
    from esm_neuron.training.trainer import Trainer

    passed = Counter[str]()

    def counted(real: Callable[..., Any], cut: bool = False) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            passed["calls"] += 1
            now = passed["calls"] > kill.at
            if now and not cut:
                die()
            value = real(*args, **options)
            if now:
                os.truncate(args[0], args[0].stat().st_size // 2)
                die()
            return value

        return wrapped

    if kill.kind == "write":
        checkpoint.save_tensors = counted(checkpoint.save_tensors, cut=True)
        for name in ("write_json", "prune"):  # called by nothing that reads
            setattr(checkpoint, name, counted(getattr(checkpoint, name)))
    elif kill.kind == "evaluate":
        evaluate.forward = counted(evaluate.forward)
    else:
        fit = Trainer.fit

        def hang() -> None:
            os.kill(os.getpid(), signal.SIGSTOP)

        def timed(trainer: Any) -> Any:
            timer = threading.Timer(kill.at, hang if kill.kind == "hang" else die)
            timer.daemon = True
            timer.start()
            return fit(trainer)

        Trainer.fit = timed


def train(cfg: Any, mode: Mode, rank: int, port: int, kill: Kill | None) -> None:
    """Run one rank of one attempt in a fork; the process ends with its exit code."""
    with Path(f"{cfg.output}.{rank}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(mode.environment)
    if mode.processes > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": mode.processes, "LOCAL_WORLD_SIZE": mode.processes}
        os.environ.update({name: str(value) for name, value in world.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    code = 1
    try:
        from esm_neuron.errors import EsmNeuronError
        from esm_neuron.training import run

        if cfg.backend == "neuron":
            join_standins()
        note_steps(step_file(cfg, rank), begin_file(cfg, rank))
        if kill is not None and kill.rank == rank:
            arm(kill)
        try:
            run.train(cfg, str)
            code = 0
        except EsmNeuronError as error:
            print(f"rank {rank}: {error}", flush=True)
            code = EXIT_ERROR
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def step_file(cfg: Any, rank: int) -> Path:
    """Return the file with the number of a rank's last whole step."""
    return Path(f"{cfg.output}.{rank}.step")


def begin_file(cfg: Any, rank: int) -> Path:
    """Return the file with the step that a rank went on from."""
    return Path(f"{cfg.output}.{rank}.begin")


def note_steps(done: Path, begin: Path) -> None:
    """Have this rank write the two numbers to files, which a kill leaves as they are."""
    from esm_neuron.training.trainer import Trainer

    step, fit, file = Trainer.train_step, Trainer.fit, os.open(done, os.O_WRONLY | os.O_CREAT, 0o644)

    def noted(trainer: Any, data: Any) -> None:
        step(trainer, data)
        os.pwrite(file, b"%08d" % trainer.state.step, 0)

    def begun(trainer: Any) -> Any:
        os.pwrite(file, b"%08d" % trainer.state.step, 0)
        begin.write_text(str(trainer.state.step), encoding="ascii")
        return fit(trainer)

    Trainer.train_step, Trainer.fit = noted, begun


def join_standins() -> None:
    """Set up a process group on gloo, and torch_xla's collectives on it, as tests/nxd/worker.py does."""
    import torch.distributed as dist
    from standins import collectives

    # longer than any watchdog, which a rank that hangs is left to; a connection of a dead peer is closed at once
    dist.init_process_group("gloo", timeout=timedelta(seconds=LONGEST))
    collectives.install()
