"""The program inside a SageMaker training container: the container's torchrun starts it once per device.

SM_* variables and channels become flags of `esm-neuron`. The run writes to the checkpoint folder, which SageMaker keeps
in S3 and restores after an interruption; its results are copied to the model folder.

Flags (a job's hyperparameters): those of `esm-neuron train`, `--config` first of all.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from channels import source_in

# These imports need no torch, so that a wrong flag is reported at once.
from esm_neuron import cli
from esm_neuron.config import AUTO_MODEL, TrainConfig, settings
from esm_neuron.data.filters import SPLITS
from esm_neuron.errors import EsmNeuronError
from esm_neuron.files import write_text
from esm_neuron.redact import redact

RESULTS = ("result.json", "metrics.jsonl", "valid_ids.txt", "adapter", "base", "model")
"""Files and folders of a finished run, except config.yaml."""
SHOWN = 1024
"""Characters of the failure file that SageMaker shows as the reason."""
TUNER_FLAG = "--_tuning_objective_metric"


def base_folder(env: Mapping[str, str]) -> Path:
    """Return /opt/ml, or the folder that the container's toolkit uses instead."""
    return Path(env.get("SAGEMAKER_BASE_DIR", "/opt/ml"))


def flags(argv: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """Return the flags of this container's run: those of the job, then the folders of this container.

    Raises:
        EsmNeuronError: a flag of the job is wrong, or a channel holds nothing that can be read.
    """
    cfg = settings.parse(argv)
    words = [*argv, "--output", str(base_folder(env) / "checkpoints"), "--checkpoint.resume", "auto"]
    for split in SPLITS:
        folder = env.get(f"SM_CHANNEL_{split.upper()}")
        if folder is not None:
            words += [f"--data.{split}", str(source_in(split, Path(folder), getattr(cfg.data, split)))]
    if "SM_CHANNEL_MODEL" in env:
        words += ["--model.name", env["SM_CHANNEL_MODEL"]]
    return words


def own_flags(argv: Sequence[str]) -> list[str]:
    """Return the flags of a job without the one that SageMaker's tuner adds: its name for the objective."""
    words = list(argv)
    if TUNER_FLAG in words:
        at = words.index(TUNER_FLAG)
        del words[at : at + 2]
    return [word for word in words if not word.startswith(f"{TUNER_FLAG}=")]


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Train, or compile under neuron_parallel_compile; write the failure file on an error; return the exit code."""
    argv = own_flags(argv)
    try:
        words = flags(argv, env)
        # neuron_parallel_compile sets it for the run that collects graphs
        command = "compile" if env.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1" else "train"
        code = cli.run([command, *words])
        if code == 0 and command == "train" and env.get("RANK", "0") == "0":
            lay_out(base_folder(env) / "checkpoints", Path(env["SM_MODEL_DIR"]), settings.parse(argv))
        return code
    except (EsmNeuronError, OSError) as error:
        write_failure(base_folder(env), f"esm-neuron: error: {error}")
        cli.log(f"esm-neuron: error: {error}")
        return error.exit_code if isinstance(error, EsmNeuronError) else 2
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:
            reason = redact(traceback.format_exc())  # before the cut, which could separate a secret from its name
            write_failure(base_folder(env), reason[-SHOWN:])
        raise


def lay_out(run: Path, target: Path, submitted: TrainConfig) -> None:
    """Copy a finished run to the model folder; its config names data and base weights as the submitted job did."""
    target.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        if (run / name).is_dir():
            shutil.copytree(run / name, target / name, dirs_exist_ok=True)
        elif (run / name).exists():
            shutil.copy2(run / name, target / name)
    cfg = settings.read_config(run / "config.yaml")
    # what `auto` was is known by the run alone
    model = cfg.model if submitted.model.name == AUTO_MODEL else replace(cfg.model, name=submitted.model.name)
    data = replace(cfg.data, **{split: getattr(submitted.data, split) for split in SPLITS})
    write_text(target / "config.yaml", settings.dump(replace(cfg, model=model, data=data)))


def write_failure(base: Path, reason: str) -> None:
    """Write the failure file, which SageMaker shows as the reason; the first rank that fails writes it."""
    (base / "output").mkdir(parents=True, exist_ok=True)
    try:
        with (base / "output" / "failure").open("x", encoding="utf-8") as file:
            file.write(redact(reason)[:SHOWN])
    except FileExistsError:
        return


if __name__ == "__main__":
    sys.excepthook, threading.excepthook = cli.show_traceback, cli.show_failure  # CloudWatch keeps what is printed
    sys.exit(main(sys.argv[1:], os.environ))
