"""Kill training at random moments and resume it until it is done; then everything must be what one run would have left.

python benchmarks/soak.py                              every mode that this machine can run, 8 kills each
python benchmarks/soak.py --modes lora gloo --kills 3  some of them
NXD_SRC=<folder> python benchmarks/soak.py --modes nxd the real neuronx-distributed with ZeRO-1, on gloo

A kill is SIGKILL, from within the process so that it can be placed: at a random time of the training loop, after a
random file of a checkpoint (the file cut in half), or before a random batch of an evaluation. Where there are peers,
one rank is killed and the others must end by themselves within a minute; or it hangs, stopped by SIGSTOP, and their
watchdogs must end them. Moments are drawn from --seed. Attempts are forks of this process, which has imported
everything and run nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from tiny_run import FORK, MODES, Mode, configuration, import_all, left, write_proteins

RESULTS = Path(__file__).resolve().parent / "results" / "soak.json"
PATIENCE = 60.0
"""Seconds in which a rank whose peer is dead must have ended."""
KINDS = ("step", "write", "evaluate", "hang")
WATCHDOG = 15
"""Seconds that a peer of a rank that hangs allows a step, a checkpoint, or a batch of an evaluation."""
PATIENCE_HUNG = 300.0
"""Seconds in which it must have ended: the last evaluation has most batches."""
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
    """As by `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill: Kill) -> None:
    """Have this process die at the moment of `kill`."""
    from esm_neuron import checkpoint, evaluate
    from esm_neuron.trainer import Trainer

    passed = Counter[str]()

    def counted(real: Callable[..., Any], cut: bool = False) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            passed["calls"] += 1
            now = passed["calls"] > kill.at
            if now and not cut:
                die()
            value = real(*args, **options)
            if now:
                os.truncate(args[1], args[1].stat().st_size // 2)
                die()
            return value

        return wrapped

    if kill.kind == "write":
        checkpoint.save_file = counted(checkpoint.save_file, cut=True)
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
    """In a fork: one rank of one attempt; the process ends with its exit code."""
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
        from esm_neuron import run
        from esm_neuron.errors import EsmNeuronError

        if cfg.backend == "neuron":
            join_standins()
        note_steps(Path(f"{cfg.output}.{rank}.step"))
        if kill is not None and kill.rank == rank:
            arm(kill)
        try:
            run.train(cfg, str)
            code = 0
        except EsmNeuronError as error:
            print(f"rank {rank}: {error}", flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def note_steps(path: Path) -> None:
    """Have this rank keep the number of its last whole step in a file, which a kill leaves as it is."""
    from esm_neuron.trainer import Trainer

    step, fit, file = Trainer._train_step, Trainer.fit, os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)

    def noted(trainer: Any, data: Any) -> None:
        step(trainer, data)
        os.pwrite(file, b"%08d" % trainer.state.step, 0)

    def begun(trainer: Any) -> Any:
        os.pwrite(file, b"%08d" % trainer.state.step, 0)
        return fit(trainer)

    Trainer._train_step, Trainer.fit = noted, begun


def join_standins() -> None:
    """As tests/nxd/worker.py does: a process group on gloo, and torch_xla's calls between processes on it."""
    import torch.distributed as dist
    from standins import collectives

    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    collectives.install()


@dataclass
class Ended:
    """How an attempt ended."""

    codes: list[int]
    """Exit code of each rank; -9 for one that was killed."""
    seconds: float
    """Of the whole attempt."""
    survived: float
    """Seconds that the others lived on after a rank was killed."""


def attempt(cfg: Any, mode: Mode, kill: Kill | None) -> Ended:
    """All ranks of one attempt, to their end.

    Raises:
        RuntimeError: a rank lived on a minute after its peer had died, or five after it hung; or nothing ended at all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    ranks = [FORK.Process(target=train, args=(cfg, mode, rank, port, kill)) for rank in range(mode.processes)]
    for process in ranks:
        process.start()
    survived, last = 0.0, began + LONGEST
    try:
        if kill is not None:
            victim = ranks[kill.rank]
            while victim.is_alive() and not is_stopped(victim.pid):
                if time.monotonic() > last:
                    raise RuntimeError(f"{cfg.output}: not ended after {LONGEST:g} s")
                time.sleep(0.05)
            died = time.monotonic()
            patience = PATIENCE_HUNG if kill.kind == "hang" else PATIENCE
            for process in (each for each in ranks if each is not victim):
                process.join(max(0.0, died + patience - time.monotonic()))
                if process.is_alive():
                    raise RuntimeError(f"{cfg.output}: a rank was alive {patience:g} s after its peer had failed")
            survived = time.monotonic() - died
            if victim.is_alive():
                victim.kill()
        for process in ranks:
            process.join(max(0.0, last - time.monotonic()))
            if process.is_alive():
                raise RuntimeError(f"{cfg.output}: not ended after {LONGEST:g} s")
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return Ended([process.exitcode or 0 for process in ranks], time.monotonic() - began, survived)


def is_stopped(pid: int | None) -> bool:
    """Whether a process is stopped by SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended
        return False


def check_not_ahead(output: Path, processes: int) -> None:
    """After a kill: nothing may be saved of a step that not all ranks have done.

    Raises:
        RuntimeError: something is.
    """
    saved = max((int(p.name.removeprefix("step-")) for p in (output / "checkpoints").glob("step-*")), default=0)
    files = [Path(f"{output}.{rank}.step") for rank in range(processes)]
    done = min(int(file.read_bytes() or b"0") if file.exists() else 0 for file in files)
    if saved > done:
        raise RuntimeError(
            f"{output}: a checkpoint of step {saved}, but step {done} was the last one all ranks had done"
        )


def ask(cfg: Any) -> None:
    """Predictions of a finished run on the test file, beside it; in a fork."""

    def predict_there() -> None:
        from esm_neuron.answers.predict import predict

        predict(cfg.output, Path(cfg.data.test), Path(cfg.output) / "predictions.csv", backend="cpu", say=str)
        os._exit(0)

    process = FORK.Process(target=predict_there)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{cfg.output}: predict ended with {process.exitcode}")


def draw(rng: random.Random, mode: Mode, seconds: float, steps: int) -> Kill:
    """The next kill: of any kind alike, but twice as often anywhere in the loop."""
    kind = rng.choice((*KINDS, "step") if mode.processes > 1 else (*KINDS[:3], "step"))
    if kind == "write":
        return Kill(kind, rng.randrange(steps // 3 * 5 // 4))
    at = rng.randrange(12) if kind == "evaluate" else rng.uniform(0, seconds / 2)
    return Kill(kind, at, rng.randrange(mode.processes))


def soak(name: str, kills: int, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run a mode to its end under at least `kills` kills.

    Raises:
        RuntimeError: an attempt ended otherwise than by its kill or by finishing.
    """
    mode, rng = MODES[name], random.Random(f"{name} {seed}")
    folder.mkdir()
    write_proteins(folder)

    def finish(output: str) -> tuple[Any, Ended]:
        cfg = configuration(folder, output, mode, steps)
        ended = attempt(cfg, mode, None)
        if any(ended.codes):
            raise RuntimeError(f"{cfg.output}: ended with {ended.codes}; see {cfg.output}.*.log")
        if cfg.task.name != "masked_lm":
            ask(cfg)
        return cfg, ended

    reference, whole = finish("reference")
    expected = left(Path(reference.output))
    found = Counter[str]()
    different: list[str] = []
    rounds, longest = 0, 0.0
    while sum(found.values()) < kills:
        output = f"killed-{rounds}"
        cfg = configuration(folder, output, mode, steps)
        while sum(found.values()) < kills:
            kill = draw(rng, mode, whole.seconds, steps)
            limits = {"watchdog": WATCHDOG, "watchdog_slow": WATCHDOG} if kill.kind == "hang" else {}
            ended = attempt(replace(cfg, loop=replace(cfg.loop, **limits)), mode, kill)
            if ended.codes[kill.rank] == 0:
                break  # it was through before the moment came
            if ended.codes[kill.rank] != -signal.SIGKILL or 0 in ended.codes:
                raise RuntimeError(f"{cfg.output}: {kill} ended with {ended.codes}; see {cfg.output}.*.log")
            check_not_ahead(Path(cfg.output), mode.processes)
            found[kill.kind] += 1
            longest = max(longest, ended.survived)
            print(f"  {name}: kill {sum(found.values())}, {kill}, after {ended.seconds:.1f} s", flush=True)
        finish(output)
        rounds += 1
        got = left(Path(cfg.output))
        different += [f"{output}/{key}" for key in sorted({*got, *expected}) if got.get(key) != expected.get(key)]
    return {
        "kills": sum(found.values()), **{f"in {kind}": found[kind] for kind in KINDS},
        "runs": rounds, "steps": steps, "processes": mode.processes, "compared": len(expected),
        "different": different, "survivors_ended_after_s": round(longest, 1),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| mode | processes | kills | in the loop | in a checkpoint | in an evaluation | hung | files | differ |"]
    lines.append("|" + "---|" * 9)
    for name, r in results.items():
        counts = (r["processes"], r["kills"], *(r.get(f"in {kind}", 0) for kind in KINDS), r["compared"])
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {len(r['different'])} |")
    return "\n".join(lines)


def main() -> int:
    """Soak the modes asked for; the exit code is 1 where anything differed or failed: its folder is then kept."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    able = [name for name in MODES if not name.startswith("nxd") or "NXD_SRC" in os.environ]
    words.add_argument("--modes", nargs="+", choices=list(MODES), default=able)
    words.add_argument("--kills", type=int, default=8, help="kills a mode, at least")
    words.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--results", type=Path, default=RESULTS, help="JSON file; modes that were not run are kept")
    words.add_argument("--folder", type=Path, help="keep the runs and their logs there")
    args = words.parse_args()
    import_all(args.modes)
    before = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    results: dict[str, Any] = dict(before.get("modes", {}))
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in args.modes:
        began = time.monotonic()
        results.pop(name, None)
        try:
            results[name] = soak(name, args.kills, args.steps, args.seed, folder / name)
            results[name] |= {"seed": args.seed, "minutes": round((time.monotonic() - began) / 60, 1)}
            failed |= bool(results[name]["different"])
            print(f"{name}: {results[name]}", flush=True)
        except RuntimeError as error:
            failed = True
            print(f"{name}: FAILED: {error}", flush=True)
        args.results.parent.mkdir(parents=True, exist_ok=True)
        kept = {mode: results[mode] for mode in MODES if mode in results}
        content = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "modes": kept}
        args.results.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(table(kept))
    if not (failed or args.folder):
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
