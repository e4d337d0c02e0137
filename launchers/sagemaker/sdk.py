"""Jobs by SageMaker's Python SDK, for notebooks: `PyTorch` of version 2, `ModelTrainer` of version 3.

    from launchers.sagemaker import Job, estimator, inputs
    job = Job(config=Path("configs/localization_650m_g5_qlora.yaml"), instance_type="ml.g5.2xlarge", ...)
    estimator(job).fit(inputs(job), job_name=job.name)

Both send what `launch.py` sends (`request.py`); sources and local inputs are uploaded when they are made.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import service
from job import Job, bucket_and_key, metric_definitions
from request import create_training_job

if TYPE_CHECKING:
    from sagemaker.inputs import TrainingInput
    from sagemaker.pytorch import PyTorch
    from sagemaker.train import ModelTrainer

SDK_CONFIG = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}
"""In place of the SDK's default files, which would change a request unseen. The SDK reports no calls."""


def estimator(job: Job) -> PyTorch:
    """Return the `sagemaker.pytorch.PyTorch` of a job; start it with `.fit(inputs(job), job_name=job.name)`."""
    import sagemaker
    from sagemaker.pytorch import PyTorch

    boto, request = _uploaded(job), create_training_job(job)
    place, stopping, network = request["OutputDataConfig"], request["StoppingCondition"], request.get("VpcConfig", {})
    given = {
        "max_wait": stopping.get("MaxWaitTimeInSeconds"),
        "keep_alive_period_in_seconds": job.keep_alive or None,
        "subnets": network.get("Subnets"),
        "security_group_ids": network.get("SecurityGroupIds"),
    }
    session = sagemaker.Session(
        boto_session=boto, default_bucket=bucket_and_key(job.output)[0], sagemaker_config=SDK_CONFIG
    )
    return PyTorch(
        entry_point="entry.py",
        source_dir=job.code_uri,
        image_uri=job.image_uri,
        input_mode=job.input_mode,
        role=job.role,
        instance_type=job.instance_type,
        instance_count=job.instance_count,
        distribution={"torch_distributed": {"enabled": True}},
        hyperparameters=job.hyperparameters,
        environment=job.variables or None,
        metric_definitions=metric_definitions(),
        output_path=place["S3OutputPath"],
        code_location=place["S3OutputPath"],
        checkpoint_s3_uri=job.checkpoint_uri,
        use_spot_instances=job.spot,
        max_run=job.max_run,
        max_retry_attempts=job.retries,
        volume_size=job.volume_gb,
        volume_kms_key=job.volume_kms_key,
        output_kms_key=job.output_kms_key,
        encrypt_inter_container_traffic=job.encrypt_traffic,
        enable_network_isolation=job.network_isolation,
        tags=request.get("Tags"),
        disable_profiler=True,
        debugger_hook_config=False,
        sagemaker_session=session,
        **{name: value for name, value in given.items() if value is not None},
    )


def inputs(job: Job) -> dict[str, TrainingInput]:
    """Return what `.fit` of an estimator takes: the channels of a job."""
    from sagemaker.inputs import TrainingInput

    return {name: TrainingInput(uri, distribution="FullyReplicated") for name, uri in job.channels.items()}


def model_trainer(job: Job) -> ModelTrainer:
    """Return the `sagemaker.train.ModelTrainer` of a job; start it with `.train()`.

    The SDK puts the time behind the job's name, and knows no field to turn the profiler off.
    """
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.shapes import CheckpointConfig, MetricDefinition, OutputDataConfig, RetryStrategy, Tag
    from sagemaker.core.training.configs import Compute, InputData, Networking, S3DataSource, StoppingCondition
    from sagemaker.train import ModelTrainer

    boto, request = _uploaded(job), create_training_job(job)
    sources = [(one["ChannelName"], one["DataSource"]["S3DataSource"]) for one in request["InputDataConfig"]]
    trainer = ModelTrainer(
        sagemaker_session=Session(boto_session=boto),
        role=job.role,
        base_job_name=job.name,
        training_image=job.image_uri,
        training_input_mode=job.input_mode,
        hyperparameters=request["HyperParameters"],
        environment=job.variables or None,
        input_data_config=[
            InputData(channel_name=name, data_source=S3DataSource(**_snake(source))) for name, source in sources
        ],
        output_data_config=OutputDataConfig(**_snake(request["OutputDataConfig"])),
        stopping_condition=StoppingCondition(**_snake(request["StoppingCondition"])),
        compute=Compute(**_snake(request["ResourceConfig"]), enable_managed_spot_training=job.spot or None),
        networking=Networking(
            **_snake(request.get("VpcConfig", {})),
            enable_network_isolation=job.network_isolation or None,
            enable_inter_container_traffic_encryption=job.encrypt_traffic or None,
        ),
        tags=[Tag(**_snake(tag)) for tag in request.get("Tags", [])] or None,
    )
    trainer.with_checkpoint_config(CheckpointConfig(s3_uri=job.checkpoint_uri))
    trainer.with_retry_strategy(RetryStrategy(maximum_retry_attempts=job.retries))
    return trainer.with_metric_definitions(
        [MetricDefinition(name=one["Name"], regex=one["Regex"]) for one in metric_definitions()]
    )


def _uploaded(job: Job) -> Any:
    boto = service.session(job.region)
    with tempfile.TemporaryDirectory() as work, service.asked(f"job {job.name} was not uploaded"):
        service.upload(job, Path(work), boto)
    return boto


def _snake(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a request by the names that version 3 gives them."""
    from sagemaker.core.utils.code_injection.codec import pascal_to_snake

    return {pascal_to_snake(name): value for name, value in fields.items()}
