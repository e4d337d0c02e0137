"""Search hyperparameters on SageMaker: a tuning job, whose trials are the job that launch.py would start.

    python launchers/sagemaker/tune.py --objective mcc --range optim.lr=1e-5:1e-3 --range adapter.r=4:32 \\
        --range adapter.dropout=0,0.1 --trials 20 --parallel 4 --max-dollars 200 [--dry-run] \\
        --config FILE --instance-type ml.g5.2xlarge --role ARN --region us-west-2 --output s3://bucket/esm [-- ...]

A range is FROM:TO, of whole numbers where both are, drawn on a logarithm where TO is ten times FROM or more; or a
list. The other flags are those of launch.py; `--max-dollars` and the cost that is said are of all trials.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import money
import service
from job import EVAL_METRICS, PLAIN, Job
from request import create_training_job

from esm_neuron.cli import log
from esm_neuron.config import require
from esm_neuron.config.flags import CommandParser
from esm_neuron.config.settings import full_name
from esm_neuron.errors import ConfigError, EsmNeuronError
from esm_neuron.redact import redact, shown

LOWER_IS_BETTER = {"loss", "perplexity", "rmse", "mae"}
MOST_NAME = 32
"""Longest name of a tuning job that the service allows; its trials add to it."""
LEFT_OUT = ("TrainingJobName", "HyperParameters", "CheckpointConfig", "ProfilerConfig", "Tags")
"""Fields of a job that a trial does not have: trials may not go on from each other's checkpoints."""


def parse_range(text: str) -> tuple[str, str, list[str]]:
    """Return name, kind (`Continuous`, `Integer` or `Categorical`) and the two ends, or all values, of a `--range`."""
    name, _, values = text.partition("=")
    name = full_name(name)
    if "," in values:
        return name, "Categorical", values.split(",")
    ends = values.split(":")
    cure = "write NAME=FROM:TO or NAME=A,B,C, such as optim.lr=1e-5:1e-3"
    try:
        low, high = map(float, ends)
    except ValueError as error:
        raise ConfigError(f"--range {text}: {cure}") from error
    require(low < high, f"--range {text}: {ends[0]} is not below {ends[1]}")
    return name, "Integer" if all(end.isdecimal() for end in ends) else "Continuous", ends


def request(job: Job, ranges: Sequence[tuple[str, str, list[str]]], how: Mapping[str, Any]) -> dict[str, Any]:
    """Return CreateHyperParameterTuningJob: a job's request, but for its tuned hyperparameters and its checkpoints."""
    whole = create_training_job(job)
    tuned: dict[str, list[dict[str, Any]]] = {}
    for name, kind, values in ranges:
        one: dict[str, Any] = {"Name": name}
        if kind == "Categorical":
            one["Values"] = values
        else:
            wide = 0 < float(values[0]) * 10 <= float(values[1])
            one |= {"MinValue": values[0], "MaxValue": values[1], "ScalingType": "Logarithmic" if wide else "Linear"}
        tuned.setdefault(f"{kind}ParameterRanges", []).append(one)
    names = {name for name, _, _ in ranges}
    fixed = {name: value for name, value in whole["HyperParameters"].items() if name not in names}
    found: dict[str, Any] = {
        "HyperParameterTuningJobName": job.name,
        "HyperParameterTuningJobConfig": {
            "Strategy": "Bayesian",
            "HyperParameterTuningJobObjective": {
                "Type": "Minimize" if how["objective"] in LOWER_IS_BETTER else "Maximize",
                "MetricName": f"valid:{how['objective']}",
            },
            "ResourceLimits": {
                "MaxNumberOfTrainingJobs": how["trials"],
                "MaxParallelTrainingJobs": how["parallel"],
            },
            "ParameterRanges": tuned,
            "TrainingJobEarlyStoppingType": "Auto",
            "RandomSeed": job.run.seed % 2**31,
        },
        "TrainingJobDefinition": {
            **{field: value for field, value in whole.items() if field not in LEFT_OUT},
            "StaticHyperParameters": fixed,
        },
    }
    return {**found, **({"Tags": whole["Tags"]} if "Tags" in whole else {})}


def check(job: Job, ranges: Sequence[tuple[str, str, list[str]]], how: Mapping[str, Any]) -> None:
    """Raise ConfigError where a trial would fail, or where all of them could cost too much."""
    require(bool(ranges), "no --range; give at least one, such as optim.lr=1e-5:1e-3")
    require(len(job.name) <= MOST_NAME, f"name={job.name} has {len(job.name)} characters; a tuning job's at most 32")
    require(1 <= how["parallel"] <= how["trials"] <= 750, "give 1 <= --parallel <= --trials <= 750")
    require(not job.spot and not job.compile_only, "trials keep no checkpoints and train: no --spot, no --compile-only")
    for name, _, values in ranges:
        require(name not in job.flags, f"--range {name}: also given after --; leave one out")
        for value in values:  # the values within a range lie between two that are allowed
            require(
                PLAIN.fullmatch(value) is not None, f"--range {name}: {value!r} is not plain: no blanks and brackets"
            )
            replace(job, overrides=(*job.overrides, f"--{name}", value), max_dollars=None)
    most = job.most_dollars
    limit = how["max_dollars"]
    if limit is not None:
        require(most is not None, f"--max-dollars {limit:g}: the price of {job.instance_type} is not known")
        total = (most or 0.0) * how["trials"]
        over = f"--max-dollars {limit:g} is below {total:,.2f}, {how['trials']} trials of {most or 0:,.2f} each"
        require(total <= limit, f"{over}; lower --max-run or --trials")


def main(argv: Sequence[str]) -> int:
    """Start a tuning job, or print its request; return the exit code."""
    parser = CommandParser(
        prog="tune.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--objective", choices=EVAL_METRICS, required=True, help="metric of the validation proteins")
    parser.add_argument("--range", action="append", default=[], help="NAME=FROM:TO or NAME=A,B; once for each setting")
    parser.add_argument("--trials", type=int, default=20, help="training jobs in all (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=2, help="at a time (default: %(default)s)")
    parser.add_argument(
        "--max-dollars", "--max_dollars", type=float, help="refuse if all trials together could cost more"
    )
    split = list(argv).index("--") if "--" in argv else len(argv)
    try:
        args, rest = parser.parse_known_args(argv[:split])
        job, how = launch.parse([*rest, *argv[split:]])
        require(not how.wait, "--wait: a tuning job is not followed; see jobs.py status --search")
        require(job.checkpoints is None, "--checkpoints: trials keep none; leave it out")
        ranges = [parse_range(text) for text in args.range]
        check(job, ranges, vars(args))
        sent = request(job, ranges, vars(args))
        if job.most_dollars is not None:
            log(f"cost: at most {args.trials * job.most_dollars:,.2f} dollars, {args.trials} trials; each:")
        for line in money.lines(job):
            log(line)
        if how.dry_run:
            print(redact(json.dumps(sent, indent=2)))
        else:
            start(job, sent)
    except EsmNeuronError as error:
        sys.stderr.write(shown(f"tune.py: error: {error}") + "\n")
        return error.exit_code
    return 0


def start(job: Job, sent: dict[str, Any]) -> None:
    """Upload what the trials share, and start them."""
    boto = service.session(job.region)
    with tempfile.TemporaryDirectory() as folder, service.asked(f"AWS took no tuning job {job.name} in {job.region}"):
        service.upload(job, Path(folder), boto)
        boto.client("sagemaker").create_hyper_parameter_tuning_job(**sent)
    log(f"{job.name} was sent; jobs.py status --search {job.name} tells of its trials, stop --search ends them")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
