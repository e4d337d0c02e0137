"""What CreateTrainingJob gets for a job, field by field. Needs no SDK and no account.

`launch.py` sends it by boto3; the SDK's `PyTorch` and `ModelTrainer` of `sdk.py` make the same one.
"""

from __future__ import annotations

import json
from typing import Any

from job import Job, metric_definitions

ISOLATED_CODE = "/opt/ml/input/data/code/sourcedir.tar.gz"
"""Where a container without a network finds its sources: it cannot fetch them, so they come as a channel."""


def create_training_job(job: Job) -> dict[str, Any]:
    """Return the request of a job. Fields that it leaves at the service's default are left out."""
    channels = dict(job.channels)
    if job.network_isolation:
        channels["code"] = job.code_uri
    found: dict[str, Any] = {
        "TrainingJobName": job.name,
        "RoleArn": job.role,
        "AlgorithmSpecification": {
            "TrainingImage": job.image_uri,
            "TrainingInputMode": job.input_mode,
            "MetricDefinitions": metric_definitions(),
        },
        "HyperParameters": {name: json.dumps(value) for name, value in hyperparameters(job).items()},
        "InputDataConfig": [channel(name, uri) for name, uri in channels.items()],
        "OutputDataConfig": {"S3OutputPath": job.output.rstrip("/")},
        "CheckpointConfig": {"S3Uri": job.checkpoint_uri},
        "ResourceConfig": {
            "InstanceType": job.instance_type,
            "InstanceCount": job.instance_count,
            "VolumeSizeInGB": job.volume_gb,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": job.max_run},
        "RetryStrategy": {"MaximumRetryAttempts": job.retries},
        "ProfilerConfig": {"DisableProfiler": True},
    }
    if job.output_kms_key:
        found["OutputDataConfig"]["KmsKeyId"] = job.output_kms_key
    if job.volume_kms_key:
        found["ResourceConfig"]["VolumeKmsKeyId"] = job.volume_kms_key
    if job.keep_alive:
        found["ResourceConfig"]["KeepAlivePeriodInSeconds"] = job.keep_alive
    if job.spot:
        found["EnableManagedSpotTraining"] = True
        found["StoppingCondition"]["MaxWaitTimeInSeconds"] = job.max_run if job.max_wait is None else job.max_wait
    if job.subnets:
        found["VpcConfig"] = {"Subnets": list(job.subnets), "SecurityGroupIds": list(job.security_groups)}
    if job.variables:
        found["Environment"] = job.variables
    if job.tags:
        found["Tags"] = [{"Key": key, "Value": value} for key, value in job.tags.items()]
    if job.encrypt_traffic:
        found["EnableInterContainerTrafficEncryption"] = True
    if job.network_isolation:
        found["EnableNetworkIsolation"] = True
    return found


def hyperparameters(job: Job) -> dict[str, Any]:
    """Return the flags of the entry point, and what the container's toolkit reads to start it under torchrun."""
    return {
        **job.hyperparameters,
        "sagemaker_submit_directory": ISOLATED_CODE if job.network_isolation else job.code_uri,
        "sagemaker_program": "entry.py",
        "sagemaker_container_log_level": 20,
        "sagemaker_job_name": job.name,
        "sagemaker_region": job.region,
        "sagemaker_torch_distributed_enabled": True,
        "sagemaker_instance_type": job.instance_type,
    }


def channel(name: str, uri: str) -> dict[str, Any]:
    """Return a channel whose content every host gets whole."""
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}
