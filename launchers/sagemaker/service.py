"""Send a checked job to SageMaker: the only file that uses the SDK (version 2, `sagemaker.pytorch.PyTorch`)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import boto3
import sagemaker
from boto3.exceptions import Boto3Error
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.exceptions import BotoCoreError, ClientError
from job import Job, is_s3, metric_definitions
from sagemaker.exceptions import UnexpectedStatusException
from sagemaker.inputs import TrainingInput
from sagemaker.pytorch import PyTorch
from stage import stage

from esm_neuron.errors import ConfigError, TrainingError, one_line

REQUEST = "provide-client-params.sagemaker.CreateTrainingJob"
"""The event of botocore that holds the request before it is sent."""

SDK_CONFIG = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}


UPLOAD = b"<InitiateMultipartUploadResult><UploadId>dry-run</UploadId></InitiateMultipartUploadResult>"


class Body(io.BytesIO):
    """The body of a response to a request that was not sent."""

    def stream(self, **_: Any) -> Any:
        """Yield all of it."""
        yield self.read()


def respond(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
    """Return a success for a dry run; where a large upload begins (the source archive), an id for its parts."""
    body = UPLOAD if request.url.endswith("?uploads") else b""
    return AWSResponse(request.url, 200, {"ETag": "dry-run"}, Body(body))


def submit(job: Job, folder: Path, dry: bool, wait: bool) -> dict[str, Any]:
    """Upload and start the job through the SDK; return the request as it was sent.

    Args:
        job: what to start.
        folder: an empty folder for the source archive.
        dry: do everything, but respond to every call here instead of sending it; no account is needed.
        wait: follow the logs until the job ends.

    Raises:
        ConfigError: AWS refused a call: keys, permissions, the bucket, a quota, a name that was used before.
        TrainingError: the job did not complete.
    """
    keys = {"aws_access_key_id": "dry-run", "aws_secret_access_key": "dry-run"} if dry else {}  # nosec B105
    boto3.setup_default_session(region_name=job.region, **keys)  # the SDK makes a client of its own from it
    boto = boto3.Session(region_name=job.region, **keys)
    sent: list[dict[str, Any]] = []
    boto.events.register(REQUEST, lambda params, **_: sent.append(dict(params)))
    if dry:
        boto.events.register_first("before-send.*", respond)
    bucket = job.output.removeprefix("s3://").partition("/")[0]
    # our own config: the SDK's default files would change the request unseen, and the SDK would report each call
    session = sagemaker.Session(boto_session=boto, default_bucket=bucket, sagemaker_config=SDK_CONFIG)
    started = estimator(job, folder, session)
    try:
        started.fit(channels(job, session), job_name=job.name, wait=wait, logs="All" if wait else None)
    except (Boto3Error, BotoCoreError, ClientError) as error:
        cure = "check your keys, the bucket, the job's name, and your permissions (docs/sagemaker.md)"
        raise ConfigError(f"AWS took no job {job.name} in {job.region}: {one_line(error)}; {cure}") from error
    except UnexpectedStatusException as error:
        cure = f"fix it and go on with --checkpoints {job.checkpoint_uri}"
        raise TrainingError(f"{job.name} ended as {error.actual_status}: {one_line(error)}; {cure}") from error
    return sent[0]


def estimator(job: Job, folder: Path, session: sagemaker.Session) -> PyTorch:
    """Return the SDK's description of the job."""
    optional: dict[str, Any] = {}
    if job.spot:
        optional["max_wait"] = job.max_wait if job.max_wait is not None else job.max_run
    if job.keep_alive:
        optional["keep_alive_period_in_seconds"] = job.keep_alive
    if job.subnets:
        optional |= {"subnets": list(job.subnets), "security_group_ids": list(job.security_groups)}
    return PyTorch(
        entry_point="entry.py",
        source_dir=str(stage(folder / "source", job.config, job.instance.kind, job.baked)),
        image_uri=job.image_uri,
        role=job.role,
        instance_type=job.instance_type,
        instance_count=job.instance_count,
        distribution={"torch_distributed": {"enabled": True}},
        hyperparameters=job.hyperparameters,
        environment=job.variables,
        metric_definitions=metric_definitions(),
        output_path=job.prefix,
        code_location=job.output.rstrip("/"),
        checkpoint_s3_uri=job.checkpoint_uri,
        use_spot_instances=job.spot,
        max_run=job.max_run,
        volume_size=job.volume_gb,
        output_kms_key=job.output_kms_key,
        encrypt_inter_container_traffic=job.encrypt_traffic,
        enable_network_isolation=job.network_isolation,
        tags=[{"Key": key, "Value": value} for key, value in job.tags.items()] or None,
        disable_profiler=True,
        debugger_hook_config=False,
        sagemaker_session=session,
        **optional,
    )


def channels(job: Job, session: sagemaker.Session) -> dict[str, TrainingInput]:
    """Return a channel per input, local ones uploaded; every host gets all of it."""
    bucket, _, key = job.prefix.removeprefix("s3://").partition("/")
    found = {}
    for name, value in job.inputs.items():
        uri = value if is_s3(value) else session.upload_data(value, bucket, f"{key}/input/{name}", **_encryption(job))
        found[name] = TrainingInput(uri, distribution="FullyReplicated")
    return found


def _encryption(job: Job) -> dict[str, Any]:
    if job.output_kms_key is None:
        return {}
    return {"extra_args": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": job.output_kms_key}}
