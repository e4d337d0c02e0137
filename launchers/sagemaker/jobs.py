"""Look after jobs on SageMaker, by their names:

    python launchers/sagemaker/jobs.py status NAME [--search] [--region us-west-2]
    python launchers/sagemaker/jobs.py logs NAME [--follow]
    python launchers/sagemaker/jobs.py stop NAME [--search]
    python launchers/sagemaker/jobs.py fetch NAME --output runs/job [--whole]   the result, or all of the run
    python launchers/sagemaker/jobs.py resume NAME [--name NEW] [--wait]        a new job from its checkpoints

Without --region, that of your AWS configuration; with --search NAME is a tuning job's.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

import service

from esm_neuron.cli import log
from esm_neuron.config import require
from esm_neuron.config.flags import CommandParser
from esm_neuron.errors import EsmNeuronError
from esm_neuron.files import new_folder
from esm_neuron.planning.instances import read_prices
from esm_neuron.redact import Lines, shown


def status(name: str, boto: Any) -> str:
    """Return how a job stands, what was billed, its last metrics, and where its results are."""
    found = service.describe(name, boto)
    what, why = found["TrainingJobStatus"], found.get("FailureReason", "")
    lines = [f"{name}: {what}, {found['SecondaryStatus']}{f': {why}' if why else ''}", billed(found)]
    metrics = {one["MetricName"]: one["Value"] for one in found.get("FinalMetricDataList", [])}
    if metrics:
        lines.append("  ".join(f"{metric}={value:.4g}" for metric, value in sorted(metrics.items())))
    if "ModelArtifacts" in found and what == "Completed":
        lines.append(f"result: {found['ModelArtifacts']['S3ModelArtifacts']}")
    if "CheckpointConfig" in found:
        lines.append(f"checkpoints: {found['CheckpointConfig']['S3Uri']}")
    return Lines.of(lines)


def search_status(name: str, boto: Any) -> str:
    """Return how a tuning job stands: its trials, and the best one with its hyperparameters."""
    found = service.describe_search(name, boto)
    counts = found.get("TrainingJobStatusCounters", {})
    lines = [
        f"{name}: {found['HyperParameterTuningJobStatus']}; trials: " + ", ".join(f"{k} {n}" for k, n in counts.items())
    ]
    best = found.get("BestTrainingJob")
    if best is not None:
        metric = best["FinalHyperParameterTuningJobObjectiveMetric"]
        lines.append(f"best: {best['TrainingJobName']}, {metric['MetricName']}={metric['Value']:.4g}")
        lines.append("  ".join(f"--{key} {value}" for key, value in sorted(best["TunedHyperParameters"].items())))
    return Lines.of(lines)


def billed(found: dict[str, Any]) -> str:
    """Return instances, seconds and dollars of a job, by the price list; a spot job costs less."""
    machines, start = found["ResourceConfig"], found.get("TrainingStartTime")
    now = found.get("TrainingEndTime") or datetime.now(timezone.utc)
    seconds = found.get("BillableTimeInSeconds") or ((now - start).total_seconds() if start else 0)
    head = f"{machines['InstanceCount']} x {machines['InstanceType']}, {seconds:,.0f} s"
    known = read_prices().instances.get(machines["InstanceType"].removeprefix("ml."))
    price = known.prices.get("sagemaker") if known else None
    if price is None:
        return f"{head}; its price is not known"
    return f"{head}, {machines['InstanceCount'] * seconds / 3600 * price:,.2f} dollars at {price} an hour"


def fetch(name: str, target: Path, whole: bool, boto: Any) -> None:
    """Download the result of a job into a new folder, or with `whole` all of the run, as its checkpoints have it."""
    require(not target.exists(), f"--output {target}: exists already; name a new folder")
    found = service.describe(name, boto)
    with new_folder(target) as aside:
        if whole:
            require(
                "CheckpointConfig" in found, f"fetch {name} --whole: the job keeps no checkpoints; leave --whole out"
            )
            prefix = found["CheckpointConfig"]["S3Uri"].rstrip("/") + "/"
            uris = service.objects(prefix, boto)
            require(bool(uris), f"fetch {name} --whole: nothing is below {prefix}; the job saved no checkpoint")
            for uri in uris:
                inside = PurePosixPath(uri.removeprefix(prefix))
                require(not inside.is_absolute() and ".." not in inside.parts, f"{uri}: leads out of --output")
                service.download(uri, aside / inside, boto)
            return
        done = found["TrainingJobStatus"]
        require(done == "Completed", f"fetch {name}: its status is {done}; only --whole has something before the end")
        with tempfile.TemporaryDirectory() as work:
            archive = Path(work) / "model.tar.gz"
            service.download(found["ModelArtifacts"]["S3ModelArtifacts"], archive, boto)
            with tarfile.open(archive) as packed:
                packed.extractall(aside, filter="data")


def make_parser() -> CommandParser:
    """Return the parser of all commands."""
    parser = CommandParser(prog="jobs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("status", "logs", "stop", "fetch", "resume"):
        one = commands.add_parser(command)
        one.add_argument("job", metavar="NAME", help="of the job")
        one.add_argument("--region", help="default: that of your AWS configuration")
        if command in ("status", "stop"):
            one.add_argument("--search", action="store_true", help="NAME is that of a tuning job (tune.py)")
        if command == "logs":
            one.add_argument("--follow", action="store_true", help="until the job ends")
        if command == "fetch":
            one.add_argument("--output", type=Path, required=True, help="new folder")
            one.add_argument("--whole", action="store_true", help="the run's folder, checkpoints included")
        if command == "resume":
            one.add_argument("--name", help="of the new job; default: by the time")
            one.add_argument("--wait", action="store_true", help="follow the log until the job ends")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one command; return the exit code."""
    try:
        args = make_parser().parse_args(argv)
        run(args, service.session(args.region))
    except EsmNeuronError as error:
        sys.stderr.write(shown(f"jobs.py: error: {error}") + "\n")
        return error.exit_code
    return 0


def run(args: argparse.Namespace, boto: Any) -> None:
    """Do what one command asks."""
    name: str = args.job
    if args.command == "status":
        print(shown((search_status if args.search else status)(name, boto)))
    elif args.command == "logs" and args.follow:
        service.follow(name, boto, lambda line: print(shown(line), flush=True))
    elif args.command == "logs":
        service.describe(name, boto)  # a wrong name is an error, not an empty log
        with service.asked(f"log of job {name}"):
            for line in service.log_lines(name, boto, {}):
                print(shown(line))
    elif args.command == "stop":
        (service.stop_search if args.search else service.stop)(name, boto)
        log(f"{name} is stopping" + ("" if args.search else f"; its checkpoints stay: jobs.py resume {name}"))
    elif args.command == "fetch":
        fetch(name, args.output, args.whole, boto)
        log(f"{args.output}: written")
    else:
        new = args.name or time.strftime("esm-neuron-%Y%m%d-%H%M%S", time.gmtime())
        service.resume(name, new, boto)
        log(f"{new} goes on from the checkpoints of {name}")
        if args.wait:
            service.follow(new, boto, log)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
