"""Break things on purpose and write down what training says and leaves: benchmarks/results/faults.json and a table.

python benchmarks/faults.py

Each fault meets a copy of a finished run of 20 steps, or a new run, in a fork of this process, by the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny_run

RESULTS = Path(__file__).resolve().parent / "results" / "faults.json"
STEPS = 20


def nothing(*_: Any) -> None:
    """No fault of this kind."""


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


def newest(run: Path, file: str) -> Path:
    """A file of the newest checkpoint."""
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


def small_disk() -> None:
    """From step 8 on no file may grow beyond 20 kB."""
    from esm_neuron.trainer import Trainer

    step = Trainer._train_step

    def limited(self: Any, data: Any) -> None:
        if data.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        step(self, data)

    Trainer._train_step = limited


def spoil(*steps: int) -> Callable[[], None]:
    """Make the weights of the proteins of these steps, counted from 1, NaN."""

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
    """Step 7 never gets its rows."""
    from esm_neuron.data.loader import TrainLoader

    load = TrainLoader.load

    def stuck(self: Any, step: int) -> Any:
        if step == 6:
            threading.Event().wait()
        return load(self, step)

    TrainLoader.load = stuck


def signals(*numbers: signal.Signals) -> Callable[[], None]:
    """The first comes after step 6; each later one 6 s on, while evaluation is held up."""

    def arm() -> None:
        from esm_neuron.trainer import Trainer

        step, validate = Trainer._train_step, Trainer._validate

        def watched(self: Any, data: Any) -> None:
            step(self, data)
            if data.step == 5:
                for late, number in enumerate(numbers):
                    timer = threading.Timer(0.01 + 6 * late, os.kill, (os.getpid(), number))
                    timer.daemon = True
                    timer.start()

        def slow(self: Any) -> None:
            if len(numbers) > 1:
                threading.Event().wait(20)
            validate(self)

        Trainer._train_step, Trainer._validate = watched, slow

    return arm


FAULTS = [
    Fault("a bit of the newest checkpoint's weights flipped", flip),
    Fault("its optimizer file a byte too short", truncate),
    Fault("its state.json missing", lambda run: newest(run, "state.json").unlink()),
    Fault("its model.safetensors missing", lambda run: newest(run, "model.safetensors").unlink()),
    Fault("its manifest of version 9", other_version),
    Fault("every checkpoint damaged", all_damaged),
    Fault("another learning rate on resuming", settings={"optim.lr": 1e-3}),
    Fault("from step 8 on no file may grow beyond 20 kB", process=small_disk, resumed=False),
    Fault(
        "the same, saving beside training", process=small_disk, resumed=False,
        settings={"checkpoint.asynchronous": True},
    ),
    Fault("the loss of step 8 is NaN: stop", process=spoil(8), resumed=False),
    Fault("the loss of step 8 is NaN: skip", process=spoil(8), resumed=False, settings={"loop.on_nonfinite": "skip"}),
    Fault(
        "the loss of step 8 is NaN: rollback", process=spoil(8), resumed=False,
        settings={"loop.on_nonfinite": "rollback"},
    ),
    Fault("the loader hangs in step 7", process=hang, resumed=False, settings={"loop.watchdog": 3}),
    Fault("SIGTERM after step 6", process=signals(signal.SIGTERM), resumed=False),
    Fault(
        "SIGTERM after step 6, and again in its evaluation, 6 s later",
        process=signals(signal.SIGTERM, signal.SIGTERM), resumed=False,
    ),
]  # fmt: skip


def command(cfg: Any, process: Callable[[], None]) -> None:
    """In a fork: `esm-neuron train`, broken."""
    from esm_neuron import settings
    from esm_neuron.cli import main

    path = Path(f"{cfg.output}.yaml")
    path.write_text(settings.dump(cfg), encoding="utf-8")
    with Path(f"{cfg.output}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    process()
    code = main(["train", "--config", str(path)])
    sys.stdout.flush()
    os._exit(code)


def run(cfg: Any, process: Callable[[], None] = nothing) -> tuple[int, list[str]]:
    """Exit code, and what was said in warnings and errors."""
    child = tiny_run.FORK.Process(target=command, args=(cfg, process))
    child.start()
    child.join()
    text = Path(f"{cfg.output}.log").read_text(encoding="utf-8")
    said = re.findall(r"^(?:WARNING: |esm-neuron: error: )?((?<=: ).*|stopped by .*)", text, re.MULTILINE)
    return child.exitcode or 0, [line.replace(f"{Path(cfg.output).parent}/", "") for line in said]


def whole_steps(cfg: Any) -> list[int]:
    """Steps of the checkpoints that can be loaded."""
    from esm_neuron import checkpoint
    from esm_neuron.errors import CheckpointError

    found = []
    for step in checkpoint.steps(Path(cfg.output) / "checkpoints"):
        try:
            checkpoint.load(checkpoint.step_folder(Path(cfg.output) / "checkpoints", step))
        except CheckpointError:
            continue
        found.append(step)
    return found


def inject(fault: Fault, folder: Path, number: int) -> dict[str, Any]:
    """One fault, its outcome, and whether a run that finished left what the unbroken one did."""
    cfg = tiny_run.configuration(folder, f"run{number}", tiny_run.Mode(), STEPS)
    for name, value in (fault.settings or {}).items():
        section, leaf = name.split(".")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{leaf: value})})
    out = Path(cfg.output)
    if fault.resumed:
        shutil.copytree(folder / "whole", out)
        (out / "result.json").unlink()
        fault.files(out)
    code, said = run(cfg, fault.process)
    finished = (out / "result.json").exists()
    same = tiny_run.left(out) == tiny_run.left(folder / "whole") if finished else None
    return {"fault": fault.name, "exit": code, "said": said, "finished": finished, "as_unbroken": same,
            "whole_checkpoints": whole_steps(cfg)}  # fmt: skip


def outcome(found: dict[str, Any]) -> str:
    """One cell of the table."""
    end = {True: "finished, byte for byte as unbroken", False: "finished", None: f"ended with {found['exit']}"}
    kept = f"whole checkpoints: {', '.join(map(str, found['whole_checkpoints'])) or 'none'}"
    return f"{end[found['as_unbroken']]}; {kept} | {' / '.join(found['said'])}"


def main() -> None:
    """Inject the faults and write what happened."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", nargs="+", default=[""], help="parts of names: the other faults' results stay")
    only = words.parse_args().only
    results = {} if not RESULTS.exists() else {r["fault"]: r for r in json.loads(RESULTS.read_text(encoding="utf-8"))}
    tiny_run.import_all(["lora"])
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        tiny_run.write_proteins(folder)
        code, said = run(tiny_run.configuration(folder, "whole", tiny_run.Mode(), STEPS))
        if code:
            sys.exit(f"the unbroken run ended with {code}: {said}")
        for number, fault in enumerate(FAULTS):
            if any(part in fault.name for part in only):
                results[fault.name] = inject(fault, folder, number)
                print(results[fault.name], flush=True)
    found = [results[fault.name] for fault in FAULTS if fault.name in results]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("| fault | outcome | said |\n|---|---|---|")
    for each in found:
        print(f"| {each['fault']} | {outcome(each)} |")


if __name__ == "__main__":
    main()
