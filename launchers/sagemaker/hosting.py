"""Pack a finished run for a SageMaker endpoint on CPU or GPU instances:

    python launchers/sagemaker/hosting.py --model RUN --output model.tar.gz [--backend cuda]

The adapter is merged into its base, so that the endpoint needs no hub. `--model` is the output folder of a training
run, or the unpacked model.tar.gz of a training job. Hosting on Neuron instances is not offered.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stage import HERE, copy_package, write_requirements

from esm_neuron.config import AdapterConfig, BackendName, require, settings
from esm_neuron.config.flags import CommandParser
from esm_neuron.errors import EsmNeuronError
from esm_neuron.files import new_file, write_text
from esm_neuron.inference.export import export
from esm_neuron.inference.load import move_to
from esm_neuron.redact import shown
from esm_neuron.run_dir import CONFIG, MODEL

TORCH: dict[BackendName, tuple[str, ...]] = {
    "cpu": ("--extra-index-url https://download.pytorch.org/whl/cpu", "torch==2.8.0+cpu"),
    "cuda": ("torch==2.8.*",),
}
"""The endpoint's device -> what pip needs for its torch: inference images bring an older one, and the general index's
wheel brings 3 GB of CUDA."""


def lay_out(run: Path, folder: Path, backend: BackendName) -> None:
    """Fill `folder` with config, merged weights, handler and package, to run on `backend`.

    Raises:
        EsmNeuronError: `run` is not a finished run, or its weights are damaged.
    """
    export(run, folder / MODEL)
    cfg = replace(move_to(backend, settings.read_config(run / CONFIG)), adapter=AdapterConfig(kind="none"))
    write_text(folder / CONFIG, settings.dump(cfg))
    code = folder / "code"
    code.mkdir()
    shutil.copy2(HERE / "inference.py", code)
    write_requirements(code, "", *TORCH[backend])
    copy_package(code)


def pack(run: Path, target: Path, backend: BackendName) -> None:
    """Write the archive that SageMaker's CreateModel takes."""
    require(not target.exists(), f"--output {target}: exists already; name a new file")
    with tempfile.TemporaryDirectory(dir=target.resolve().parent) as work, new_file(target) as aside:
        lay_out(run, Path(work), backend)
        with tarfile.open(aside, "w:gz") as archive:
            for path in sorted(Path(work).iterdir()):
                archive.add(path, path.name)


def main(argv: Sequence[str]) -> int:
    """Pack one run; return the exit code."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="output folder of a training run")
    parser.add_argument("--output", required=True, type=Path, help="model.tar.gz to write")
    parser.add_argument(
        "--backend",
        choices=["cpu", "cuda"],
        default="cpu",
        help="the endpoint's device (default: %(default)s)",
    )
    try:
        args = parser.parse_args(argv)
        pack(args.model, args.output, args.backend)
    except EsmNeuronError as error:
        sys.stderr.write(shown(f"hosting.py: error: {error}") + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
