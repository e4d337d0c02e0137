"""What AWS is asked for jobs: upload, start, follow, stop, fetch, go on. Needs boto3 alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import Job, bucket_and_key, is_s3
from request import create_training_job
from stage import pack, stage

from esm_neuron.config import require
from esm_neuron.errors import ConfigError, TrainingError, one_line

if TYPE_CHECKING:
    import boto3

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
ENDED = ("Completed", "Failed", "Stopped")
RUNNING = "InProgress"
PAUSE = 10.0
"""Seconds between two looks at a job that is followed."""


def session(region: str | None) -> boto3.Session:
    """Return a session with the keys of this machine.

    Raises:
        ConfigError: boto3 is not installed, or the profile of AWS_PROFILE is not known.
    """
    try:
        import boto3
    except ModuleNotFoundError as error:
        cure = "pip install -r launchers/sagemaker/requirements.txt"
        raise ConfigError(f"starting and following jobs needs {error.name}; {cure}") from error
    with asked("the keys of this machine"):
        return boto3.Session(region_name=region)


@contextmanager
def asked(what: str) -> Iterator[None]:
    """Turn an error of AWS's into one line. Raises ConfigError: keys, permissions, a bucket, a quota, a name."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError) as error:
        cure = "check your keys, the region, the name, the bucket, and your permissions (docs/sagemaker.md)"
        raise ConfigError(f"{what}: {one_line(error)}; {cure}") from error


def submit(job: Job, work: Path, boto: boto3.Session) -> dict[str, Any]:
    """Upload what a job needs, with `work` for its archive, and start it; return the request as it was sent."""
    request = create_training_job(job)
    with asked(f"AWS took no job {job.name} in {job.region}"):
        upload(job, work, boto)
        boto.client("sagemaker").create_training_job(**request)
    return request


def upload(job: Job, work: Path, boto: boto3.Session) -> None:
    """Upload the source archive and the inputs that are local, a file or all files of a folder."""
    key = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": job.output_kms_key} if job.output_kms_key else {}
    s3 = boto.client("s3")

    def send(path: Path, uri: str) -> None:
        s3.upload_file(str(path), *bucket_and_key(uri), ExtraArgs=key)

    send(pack(stage(work / "source", job), work / "sourcedir.tar.gz"), job.code_uri)
    for name, value in job.inputs.items():
        if not is_s3(value):
            root = Path(value)
            for path in sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]:
                inside = path.relative_to(root) if root.is_dir() else Path(path.name)
                send(path, job.channels[name] + inside.as_posix())


def describe(name: str, boto: boto3.Session) -> dict[str, Any]:
    """Return what SageMaker knows of a job."""
    with asked(f"job {name}"):
        found: dict[str, Any] = boto.client("sagemaker").describe_training_job(TrainingJobName=name)
    return found


def log_lines(name: str, boto: boto3.Session, places: dict[str, str]) -> Iterator[str]:
    """Yield the lines of a job's log that came since the last call; `places` remembers how far each host was read."""
    logs = boto.client("logs")
    try:
        pages = list(
            logs.get_paginator("describe_log_streams").paginate(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{name}/")
        )
    except logs.exceptions.ResourceNotFoundException:
        return  # no job of this account has written yet
    streams = sorted(stream["logStreamName"] for page in pages for stream in page["logStreams"])
    for stream in streams:
        host = f"[{stream.partition('/')[2].rpartition('-')[0]}] " if len(streams) > 1 else ""
        while True:
            since = {"nextToken": places[stream]} if stream in places else {}
            page = logs.get_log_events(logGroupName=LOG_GROUP, logStreamName=stream, startFromHead=True, **since)
            yield from (host + event["message"] for event in page["events"])
            if places.get(stream) == page["nextForwardToken"]:
                break
            places[stream] = page["nextForwardToken"]


def follow(name: str, boto: boto3.Session, say: Callable[[str], None], pause: float = PAUSE) -> None:
    """Say the lines of a job's log as they come, until it ends.

    Raises:
        TrainingError: the job did not complete.
    """
    places: dict[str, str] = {}
    while True:
        found = describe(name, boto)  # first, so that what is logged before the end is read after it
        with asked(f"log of job {name}"):
            for line in log_lines(name, boto, places):
                say(line)
        if found["TrainingJobStatus"] in ENDED:
            break
        time.sleep(pause)
    if found["TrainingJobStatus"] != "Completed":
        why = " ".join(found.get("FailureReason", found["SecondaryStatus"]).split())
        cure = f"fix it and go on from its checkpoints: jobs.py resume {name}"
        raise TrainingError(f"{name} ended as {found['TrainingJobStatus']}: {why}; {cure}")


def stop(name: str, boto: boto3.Session) -> None:
    """Stop a job; it has 120 seconds to end, and keeps its newest checkpoint."""
    with asked(f"job {name} was not stopped"):
        boto.client("sagemaker").stop_training_job(TrainingJobName=name)


def describe_search(name: str, boto: boto3.Session) -> dict[str, Any]:
    """Return what SageMaker knows of a tuning job."""
    with asked(f"tuning job {name}"):
        client = boto.client("sagemaker")
        found: dict[str, Any] = client.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)
    return found


def stop_search(name: str, boto: boto3.Session) -> None:
    """Stop a tuning job and its trials."""
    with asked(f"tuning job {name} was not stopped"):
        boto.client("sagemaker").stop_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)


def download(uri: str, target: Path, boto: boto3.Session) -> None:
    """Download an object of S3 to a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with asked(uri):
        boto.client("s3").download_file(*bucket_and_key(uri), str(target))


def objects(prefix: str, boto: boto3.Session) -> list[str]:
    """Return the s3:// URIs of what is below a prefix."""
    bucket, start = bucket_and_key(prefix)
    with asked(prefix):
        pages = boto.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start)
        keys = (one["Key"] for page in pages for one in page.get("Contents", []))
        return [f"s3://{bucket}/{key}" for key in keys if not key.endswith("/")]  # not a console's mark of a folder


def resume(name: str, new: str, boto: boto3.Session) -> dict[str, Any]:
    """Start a job that goes on from the checkpoints of one that has ended, with all else the same; return its request.

    Raises:
        ConfigError: the job still runs, has completed, or keeps no checkpoints.
    """
    found = describe(name, boto)  # first: it says in one line what is wrong with keys and region
    client, status = boto.client("sagemaker"), found["TrainingJobStatus"]
    if status not in ("Failed", "Stopped"):
        cure = "there is nothing left to do" if status == "Completed" else f"wait, or stop it: jobs.py stop {name}"
        raise ConfigError(f"resume {name}: its status is {status}; {cure}")
    anew = "a job without checkpoints (a trial of a search) starts anew: launch.py"
    require("CheckpointConfig" in found, f"resume {name}: there is nothing to go on from; {anew}")
    known = client.meta.service_model.operation_model("CreateTrainingJob").input_shape.members
    request = {field: found[field] for field in known if found.get(field)}
    values: Mapping[str, str] = request["HyperParameters"]
    request["HyperParameters"] = {**values, "sagemaker_job_name": json.dumps(new)}
    request["TrainingJobName"] = new
    with asked(f"AWS took no job {new}"):
        tags = client.list_tags(ResourceArn=found["TrainingJobArn"])["Tags"]
        client.create_training_job(**request, **({"Tags": tags} if tags else {}))
    return request
