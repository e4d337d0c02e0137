"""Break things on purpose, and write down what training says and leaves: benchmarks/results/faults.json and a table.

python benchmarks/faults.py

Each fault hits a copy of a finished run of 20 steps, or a new run, in a fork of this process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import pkgutil
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tiny_run
from machine import commit

from esm_neuron.config import BackendName

RESULTS = Path(__file__).resolve().parent / "results" / "faults.json"
STEPS = 20
BALLAST = "ballast"
"""The file that fills the run's disk."""


def nothing(*_: Any) -> None:
    """Do nothing: there is no fault of this kind."""


@dataclass(frozen=True)
class Fault:
    """What is broken, and how."""

    name: str
    files: Callable[[Path], None] = nothing
    """Done to the folder of a finished run before it is resumed."""
    process: Callable[[], None] = nothing
    """Done within the training process before it begins."""
    settings: dict[str, Any] | None = None
    """`section.name` -> value."""
    resumed: bool = True
    """Whether a finished run is resumed, or a new one started."""
    disk: bool = False
    """Whether the run has a disk of its own: a tmpfs of 16 MB, which only root may mount."""
    root: bool = False
    """Whether only root can make it happen, for another reason."""


def newest(run: Path, file: str) -> Path:
    """Return a file of the newest checkpoint."""
    return max((run / "checkpoints").iterdir()) / file


def flip(run: Path) -> None:
    path = newest(run, "model.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(run: Path) -> None:
    path = newest(run, "optimizer.safetensors")
    os.truncate(path, path.stat().st_size - 1)


def all_damaged(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "model.safetensors").write_bytes(b"")


def other_version(run: Path) -> None:
    path = newest(run, "manifest.json")
    path.write_text(path.read_text(encoding="utf-8").replace('"version": 1', '"version": 9'), encoding="utf-8")


def from_step_8(act: Callable[[Path], object]) -> Callable[[], None]:
    """Have `act` change the run's folder before step 8."""

    def arm() -> None:
        from esm_neuron.training.trainer import Trainer

        step = Trainer.train_step

        def broken(self: Any, data: Any) -> None:
            if data.step == 7:
                act(Path(self.cfg.output))
            step(self, data)

        Trainer.train_step = broken

    return arm


def small_files(_: Path) -> None:
    """Let no file grow beyond 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def fill(run: Path, free: int) -> None:
    """Fill the run's disk until it has `free` bytes left."""
    with (run / BALLAST).open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(4096)) == 4096:
                pass
        file.truncate(file.tell() - free)


def become_nobody(_: Path) -> None:
    """Become a user who may read, but not write, what root has made."""
    os.setuid(65534)


def spoil(*steps: int) -> Callable[[], None]:
    """Make the proteins' loss weights NaN in these steps, counted from 1."""

    def arm() -> None:
        from esm_neuron.data.loader import TrainLoader

        load = TrainLoader.load

        def spoiled(self: Any, step: int) -> Any:
            data = load(self, step)
            if step + 1 not in steps:
                return data
            return replace(data, batches=[replace(b, weights=b.weights * float("nan")) for b in data.batches])

        TrainLoader.load = spoiled

    return arm


def hang() -> None:
    """Let step 7 wait for its packs for ever."""
    from esm_neuron.data.loader import TrainLoader

    load = TrainLoader.load

    def stuck(self: Any, step: int) -> Any:
        if step == 6:
            threading.Event().wait()
        return load(self, step)

    TrainLoader.load = stuck


def signalled(owner: str, name: str, call: int, *pauses: float) -> Callable[[], None]:
    """Send SIGTERM at the beginning of the `call`th call of a function, and again after each pause, in seconds."""

    def arm() -> None:
        place = pkgutil.resolve_name(owner)
        real, calls = getattr(place, name), itertools.count(1)

        def busy(*args: Any, **options: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
                for pause in pauses:
                    time.sleep(pause)
                    os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **options)

        setattr(place, name, busy)

    return arm


def signalled_compiling(*moments: float) -> Callable[[], None]:
    """Send SIGTERM these seconds after the first step went to the compiler; a second counts as new after 0.2 s."""

    def arm() -> None:
        from esm_neuron.backends.xla import XlaBackend
        from esm_neuron.training import signals
        from esm_neuron.training.trainer import Trainer

        step, sync, signals.ECHO = Trainer.train_step, XlaBackend.sync, 0.2

        def compiling(self: Any) -> None:
            XlaBackend.sync = sync
            began = time.monotonic()
            for moment in moments:  # from another process, for the compiler may hold this one's interpreter
                subprocess.Popen(["sh", "-c", f"sleep {moment}; kill -TERM {os.getpid()}"])
            sync(self)
            took = time.monotonic() - began
            print(f"WARNING: compiled for {took:.1f} s{', AND NO SIGNAL CAME' * (took < max(moments))}", flush=True)

        def first(self: Any, data: Any) -> None:
            Trainer.train_step, XlaBackend.sync = step, compiling
            step(self, data)

        Trainer.train_step = first

    return arm


STEP = ("esm_neuron.training.trainer:Trainer", "train_step", 6)
EVALUATE = ("esm_neuron.training.evaluation", "forward", 7)
"""The second batch of the evaluation after step 6."""
SAVE = ("esm_neuron.training.checkpoint", "save_tensors", 4)
"""The second file of the checkpoint of step 6."""
XLA = {"backend": "xla"}

FAULTS = [
    Fault("a bit of the newest checkpoint's weights flipped", flip),
    Fault("its optimizer file a byte too short", truncate),
    Fault("its state.json missing", lambda run: newest(run, "state.json").unlink()),
    Fault("its model.safetensors missing", lambda run: newest(run, "model.safetensors").unlink()),
    Fault("its manifest of version 9", other_version),
    Fault("every checkpoint damaged", all_damaged),
    Fault("another learning rate on resuming", settings={"optim.lr": 1e-3}),
    Fault("from step 8 on no file may grow beyond 20 kB", process=from_step_8(small_files), resumed=False),
    Fault(
        "the same, saving beside training", process=from_step_8(small_files), resumed=False,
        settings={"checkpoint.asynchronous": True},
    ),
    Fault(
        "before step 8 the disk fills up but for 16 kB", process=from_step_8(partial(fill, free=16_384)),
        resumed=False, disk=True,
    ),
    Fault(
        "before step 8 the disk fills up to the last byte, with TensorBoard's file on it",
        process=from_step_8(partial(fill, free=0)), resumed=False, disk=True, settings={"log.tensorboard": True},
    ),
    Fault("the folder may only be read", process=partial(become_nobody, Path()), resumed=False, root=True),
    Fault("before step 8 the folder may only be read", process=from_step_8(become_nobody), resumed=False, root=True),
    Fault("the loss of step 8 is NaN: stop", process=spoil(8), resumed=False),
    Fault("the loss of step 8 is NaN: skip", process=spoil(8), resumed=False, settings={"loop.on_nonfinite": "skip"}),
    Fault("the loader hangs in step 7", process=hang, resumed=False, settings={"loop.watchdog": 3}),
    Fault("SIGTERM in step 6", process=signalled(*STEP), resumed=False),
    Fault("SIGTERM in the evaluation after step 6", process=signalled(*EVALUATE), resumed=False),
    Fault(
        "SIGTERM in the evaluation after step 6, and again there, 6 s later", process=signalled(*EVALUATE, 6.0),
        resumed=False,
    ),
    Fault("SIGTERM while the checkpoint of step 6 is written", process=signalled(*SAVE), resumed=False),
    Fault(
        "SIGTERM while the checkpoint of step 6 is written, and again there, 6 s later",
        process=signalled(*SAVE, 6.0), resumed=False,
    ),
    Fault(
        "xla: SIGTERM while the first step compiles", process=signalled_compiling(0.1), resumed=False, settings=XLA
    ),
    Fault(
        "xla: SIGTERM while the first step compiles, and again there",
        process=signalled_compiling(0.1, 0.6), resumed=False, settings=XLA,
    ),
]  # fmt: skip


def command(cfg: Any, process: Callable[[], None]) -> None:
    """Run `esm-neuron train` with a fault, in a fork."""
    from esm_neuron.cli import main
    from esm_neuron.config import settings

    path = Path(f"{cfg.output}.yaml")
    path.write_text(settings.dump(cfg), encoding="utf-8")
    with Path(f"{cfg.output}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.root.handlers.clear()  # torch_xla's import brings one, and the command would add none
    process()
    code = main(["train", "--config", str(path)])
    sys.stdout.flush()
    os._exit(code)


def run(cfg: Any, process: Callable[[], None] = nothing) -> tuple[int, list[str]]:
    """Return the exit code, and the warnings and errors."""
    child = tiny_run.FORK.Process(target=command, args=(cfg, process))
    child.start()
    child.join()
    text = Path(f"{cfg.output}.log").read_text(encoding="utf-8")
    logged = re.findall(r"^(?:WARNING: |esm-neuron: error: )?((?<=: ).*|stopped by .*)", text, re.MULTILINE)
    return child.exitcode or 0, [line.replace(f"{Path(cfg.output).parent}/", "") for line in logged]


def whole_steps(cfg: Any) -> list[int]:
    """Return the steps of the checkpoints that can be loaded."""
    from esm_neuron.errors import CheckpointError
    from esm_neuron.training import checkpoint

    found = []
    for step in checkpoint.steps(Path(cfg.output) / "checkpoints"):
        try:
            checkpoint.load(checkpoint.step_folder(Path(cfg.output) / "checkpoints", step))
        except CheckpointError:
            continue
        found.append(step)
    return found


def unbroken(folder: Path, backend: BackendName) -> dict[str, Any]:
    """Return what an unbroken run leaves; train it first if that has not been done."""
    cfg = tiny_run.configuration(folder, f"whole-{backend}", tiny_run.Mode(backend=backend), STEPS)
    if not Path(cfg.output).exists():
        code, logged = run(cfg)
        if code:
            sys.exit(f"the unbroken run ended with {code}: {logged}")
    return tiny_run.left(Path(cfg.output))


@contextmanager
def own_disk(folder: Path) -> Iterator[None]:
    """Mount a small tmpfs at `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def inject(fault: Fault, folder: Path, number: int) -> dict[str, Any]:
    """Return the outcome of a fault, and whether the run, finished or continued, left what the unbroken one did."""
    chosen = dict(fault.settings or {})
    backend = chosen.pop("backend", "cpu")
    expected = unbroken(folder, backend)
    plain = cfg = tiny_run.configuration(folder, f"run{number}", tiny_run.Mode(backend=backend), STEPS)
    for name, value in chosen.items():
        section, leaf = name.split(".")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{leaf: value})})
    out = Path(cfg.output)
    with own_disk(out) if fault.disk else nullcontext():
        if fault.resumed:
            shutil.copytree(folder / f"whole-{backend}", out)
            (out / "result.json").unlink()
            fault.files(out)
        code, logged = run(cfg, fault.process)
        finished = (out / "result.json").exists()
        if finished and fault.resumed and not tiny_run.begun_after(cfg):
            sys.exit(f"{fault.name}: the run began anew, which ends with the same bytes")
        found = {"fault": fault.name, "exit": code, "logged": logged, "finished": finished,
                 "as_unbroken": tiny_run.left(out) == expected if finished else None,
                 "whole_checkpoints": whole_steps(cfg), "goes_on": None, "commit": commit()}  # fmt: skip
        if not (finished or fault.resumed):
            (out / BALLAST).unlink(missing_ok=True)
            found["goes_on"] = run(plain)[0] == 0 and tiny_run.left(out) == expected
            found["goes_on"] &= tiny_run.begun_after(plain) == max(found["whole_checkpoints"], default=0)
    return found


def outcome(found: dict[str, Any]) -> str:
    """Return one cell of the table."""
    end = {True: "finished, byte for byte as unbroken", False: "finished", None: f"ended with {found['exit']}"}
    kept = f"whole checkpoints: {', '.join(map(str, found['whole_checkpoints'])) or 'none'}"
    on = {True: "; gone on without it: byte for byte as unbroken", False: "; GONE ON, AND DIFFERS", None: ""}
    return f"{end[found['as_unbroken']]}; {kept}{on[found.get('goes_on')]} | {' / '.join(found['logged'])}"


def main() -> None:
    """Inject the faults and write what happened."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", nargs="+", default=[""], help="parts of names: the other faults' results stay")
    only = words.parse_args().only
    results = {} if not RESULTS.exists() else {r["fault"]: r for r in json.loads(RESULTS.read_text(encoding="utf-8"))}
    chosen = {number: fault for number, fault in enumerate(FAULTS) if any(part in fault.name for part in only)}
    tiny_run.import_all(["xla"] if XLA in [fault.settings for fault in chosen.values()] else ["lora"])
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        tiny_run.write_proteins(folder)
        folder.chmod(0o755)
        for number, fault in chosen.items():
            if (fault.disk or fault.root) and os.geteuid() != 0:
                print(f"left out: {fault.name}; it takes root, in a container for example", flush=True)
                continue
            results[fault.name] = inject(fault, folder, number)
            print(results[fault.name], flush=True)
            found = [results[fault.name] for fault in FAULTS if fault.name in results]
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    found = [results[fault.name] for fault in FAULTS if fault.name in results]
    print("| fault | outcome | logged |\n|---|---|---|")
    for each in found:
        print(f"| {each['fault']} | {outcome(each)} |")


if __name__ == "__main__":
    main()
