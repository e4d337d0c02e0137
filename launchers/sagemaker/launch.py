"""Start a training job on SageMaker:

    python launchers/sagemaker/launch.py --config configs/localization_650m_trn1.yaml \\
        --instance-type ml.trn1.32xlarge --role ARN --region us-west-2 --output s3://bucket/esm [--dry-run] [--wait] \\
        [-- --optim.lr 3e-4 ...]

After `--` come flags of `esm-neuron train`. `--dry-run` prints the request that would be sent, and sends nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from job import Job
from jsonargparse import ArgumentParser

from esm_neuron.errors import ConfigError, EsmNeuronError
from esm_neuron.redact import redact, shown


def parse(argv: Sequence[str]) -> tuple[Job, argparse.Namespace]:
    """Return the job that the words describe, and how to start it.

    Raises:
        ConfigError: a flag is unknown, or the service would refuse the job.
    """
    split = argv.index("--") if "--" in argv else len(argv)
    words = [re.sub(r"^--[\w-]+", lambda found: "--" + found[0][2:].replace("-", "_"), word) for word in argv[:split]]
    how = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    how.add_argument("--dry_run", action="store_true")
    how.add_argument("--wait", action="store_true")
    started, words = how.parse_known_args(words)
    if "--name" not in words and not any(word.startswith("--name=") for word in words):
        words += ["--name", time.strftime("esm-neuron-%Y%m%d-%H%M%S", time.gmtime())]
    parser = ArgumentParser(prog="launch.py", usage=__doc__, exit_on_error=False)
    parser.add_class_arguments(Job, skip={"overrides"}, instantiate=False)
    parser.add_argument("--dry_run", action="store_true", help="print the request, send nothing")
    parser.add_argument("--wait", action="store_true", help="follow the logs until the job ends")
    try:
        values = parser.parse_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    given = {f.name: values[f.name] for f in fields(Job) if f.name != "overrides"}
    return Job(**given, overrides=tuple(argv[split + 1 :])), started


def main(argv: Sequence[str]) -> int:
    """Start a job, or print its request; return the exit code."""
    try:
        job, how = parse(argv)
        with tempfile.TemporaryDirectory() as folder:
            request = submit(job, Path(folder), dry=how.dry_run, wait=how.wait)
    except EsmNeuronError as error:
        sys.stderr.write(shown(f"launch.py: error: {error}") + "\n")
        return error.exit_code
    print(redact(json.dumps(request, indent=2)) if how.dry_run else f"{job.name}: checkpoints in {job.checkpoint_uri}")
    return 0


def submit(job: Job, folder: Path, dry: bool, wait: bool) -> dict[str, Any]:
    """Call `service.submit`; the SDK is imported only here, so that a wrong flag is reported before."""
    os.environ.setdefault("SAGEMAKER_SUPPRESS_V2_WARNING", "1")
    from service import submit as send

    return send(job, folder, dry, wait)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
