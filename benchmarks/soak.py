"""Kill training at random moments and resume it until it is done; then all files must be those of an unbroken run.

python benchmarks/soak.py                              every mode that this machine can run, 8 kills each
python benchmarks/soak.py --modes lora gloo --kills 3  some of them
NXD_SRC=<folder> python benchmarks/soak.py --modes nxd the real neuronx-distributed with ZeRO-1, on gloo

A kill is SIGKILL from within the process, so that it can be placed: at a random time of the training loop, after a
random file of a checkpoint (the file cut in half), or before a random batch of an evaluation. If there are peers, one
rank is killed and the others must end by themselves within a minute, with an error that gives the reason; or it hangs,
stopped by SIGSTOP, and their watchdogs must end them. A mode has each kind once before any twice. Each attempt must go
on from the newest checkpoint, because one that began anew would end with the same bytes. Moments are drawn from --seed.
Attempts are forks of this process, which has imported everything and run nothing.
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
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from killed_rank import EXIT_ERROR, LONGEST, Kill, begin_file, step_file, train
from machine import commit
from tiny_run import FORK, MODES, Mode, configuration, import_all, left, write_proteins

RESULTS = Path(__file__).resolve().parent / "results" / "soak.json"
PATIENCE = 60.0
"""Seconds in which a rank whose peer is dead must have ended."""
KINDS = ("step", "write", "evaluate", "hang")
WATCHDOG = 15
"""Seconds that a peer of a rank that hangs allows a step, a checkpoint, or a batch of an evaluation."""
PATIENCE_HUNG = 300.0
"""Seconds in which it must have ended: the last evaluation has most batches."""


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
    """Run all ranks of one attempt to their end.

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
    """Return whether a process is stopped by SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended
        return False


def newest_step(output: Path) -> int:
    """Return the step of the newest checkpoint that can be seen, which must be whole; 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*")), default=0)


def check_not_ahead(cfg: Any, processes: int) -> None:
    """Check after a kill that nothing is saved of a step that not all ranks have done.

    Raises:
        RuntimeError: something is.
    """
    saved, files = newest_step(Path(cfg.output)), [step_file(cfg, rank) for rank in range(processes)]
    done = min(int(file.read_bytes() or b"0") if file.exists() else 0 for file in files)
    if saved > done:
        raise RuntimeError(
            f"{cfg.output}: a checkpoint of step {saved}, but step {done} was the last one all ranks had done"
        )


def check_went_on(cfg: Any, processes: int, newest: int) -> None:
    """Check after an attempt that every rank that trained went on from the checkpoint that was the `newest` before it.

    Raises:
        RuntimeError: one has begun elsewhere.
    """
    for rank in range(processes):
        file = begin_file(cfg, rank)
        if file.exists() and (begun := int(file.read_text(encoding="ascii"))) != newest:
            raise RuntimeError(f"{cfg.output}: rank {rank} began after step {begun}, its newest checkpoint is {newest}")


def check_ended_by_kill(cfg: Any, kill: Kill, codes: list[int]) -> None:
    """Check that one rank was killed, and that its peers gave the reason, or were ended by their watchdogs if it hung.

    Raises:
        RuntimeError: they ended otherwise.
    """
    from esm_neuron.training.watchdog import EXIT_HUNG

    peers = EXIT_HUNG if kill.kind == "hang" else EXIT_ERROR
    if codes != [-signal.SIGKILL if rank == kill.rank else peers for rank in range(len(codes))]:
        raise RuntimeError(f"{cfg.output}: {kill} ended with {codes}; see {cfg.output}.*.log")


def ask(cfg: Any) -> None:
    """Write a finished run's predictions of the test file beside it, in a fork."""

    def predict_there() -> None:
        from esm_neuron.inference.predict import predict

        predict(cfg.output, Path(cfg.data.test), Path(cfg.output) / "predictions.csv", backend="cpu", log=str)
        os._exit(0)

    process = FORK.Process(target=predict_there)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{cfg.output}: predict ended with {process.exitcode}")


def draw(rng: random.Random, mode: Mode, seconds: float, steps: int, found: Counter[str]) -> Kill:
    """Draw the next kill: first of a kind not `found` yet, then of any kind, twice as often anywhere in the loop."""
    kinds = KINDS if mode.processes > 1 else KINDS[:3]
    kind = rng.choice([kind for kind in kinds if not found[kind]] or [*kinds, "step"])
    if kind == "write":
        return Kill(kind, rng.randrange(steps // 3 * 5 // 4))
    at = rng.randrange(12) if kind == "evaluate" else rng.uniform(0, seconds / 2)
    return Kill(kind, at, rng.randrange(mode.processes))


def soak(name: str, kills: int, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run a mode to its end under at least `kills` kills.

    Raises:
        RuntimeError: an attempt ended otherwise than by its kill or by finishing, or began elsewhere.
    """
    mode, rng = MODES[name], random.Random(f"{name} {seed}")
    folder.mkdir()
    write_proteins(folder)
    resumed = 0

    def tried(cfg: Any, kill: Kill | None) -> Ended:
        nonlocal resumed
        newest = newest_step(Path(cfg.output))
        for rank in range(mode.processes):
            begin_file(cfg, rank).unlink(missing_ok=True)
        ended = attempt(cfg, mode, kill)
        check_went_on(cfg, mode.processes, newest)
        resumed += newest > 0
        return ended

    def finish(output: str) -> tuple[Any, Ended]:
        cfg = configuration(folder, output, mode, steps)
        ended = tried(cfg, None)
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
            kill = draw(rng, mode, whole.seconds, steps, found)
            limits = {"watchdog": WATCHDOG, "watchdog_slow": WATCHDOG} if kill.kind == "hang" else {}
            ended = tried(replace(cfg, loop=replace(cfg.loop, **limits)), kill)
            if ended.codes[kill.rank] == 0:
                break  # it was through before the moment came
            check_ended_by_kill(cfg, kill, ended.codes)
            check_not_ahead(cfg, mode.processes)
            found[kill.kind] += 1
            longest = max(longest, ended.survived)
            print(f"  {name}: kill {sum(found.values())}, {kill}, after {ended.seconds:.1f} s", flush=True)
        finish(output)
        rounds += 1
        got = left(Path(cfg.output))
        different += [f"{output}/{key}" for key in sorted({*got, *expected}) if got.get(key) != expected.get(key)]
    return {
        "kills": sum(found.values()), **{f"in {kind}": found[kind] for kind in KINDS}, "resumed": resumed,
        "runs": rounds, "steps": steps, "processes": mode.processes, "compared": len(expected),
        "different": different, "survivors_ended_after_s": round(longest, 1), "commit": commit(),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["| mode | processes | kills | in the loop | in a checkpoint | in an evaluation | hung | files | differ |"]
    lines.append("|" + "---|" * 9)
    for name, r in results.items():
        counts = (r["processes"], r["kills"], *(r.get(f"in {kind}", 0) for kind in KINDS), r["compared"])
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {len(r['different'])} |")
    return "\n".join(lines)


def main() -> int:
    """Soak the modes asked for; if anything differed or failed, keep its folder and return exit code 1."""
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
