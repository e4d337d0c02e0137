"""Start a training job on SageMaker:

    python launchers/sagemaker/launch.py --config configs/localization_650m_trn1.yaml \\
        --instance-type ml.trn1.32xlarge --role ARN --region us-west-2 --output s3://bucket/esm \\
        [--max-dollars 50] [--dry-run] [--wait] [-- --optim.lr 3e-4 ...]

After `--` come flags of `esm-neuron train`. `--dry-run` prints the request that would be sent, and sends nothing: it
needs no account, no SDK and no torch. What the job costs at most is said before it is sent. `jobs.py` follows, stops
and fetches jobs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import money
import service
from job import Job
from jsonargparse import ArgumentParser
from request import create_training_job

from esm_neuron.cli import log
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
        for line in money.lines(job):
            log(line)
        if how.dry_run:
            print(redact(json.dumps(create_training_job(job), indent=2)))
        else:
            start(job, how.wait)
    except EsmNeuronError as error:
        sys.stderr.write(shown(f"launch.py: error: {error}") + "\n")
        return error.exit_code
    return 0


def start(job: Job, wait: bool) -> None:
    """Send a job, and with `wait` follow its log until it ends."""
    boto = service.session(job.region)
    with tempfile.TemporaryDirectory() as folder:
        service.submit(job, Path(folder), boto)
    log(f"{job.name} was sent; its checkpoints: {job.checkpoint_uri}")
    log(f"follow, stop, fetch: python launchers/sagemaker/jobs.py {{logs,stop,fetch}} {job.name} --region {job.region}")
    if wait:
        service.follow(job.name, boto, log)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
