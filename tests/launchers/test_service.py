"""The SDK against moto: the request that goes out is the one that --dry-run prints, with the archive that was meant."""

from __future__ import annotations

import io
import json
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job import Job, metric_definitions

pytestmark = pytest.mark.launchers
boto3 = pytest.importorskip("boto3")
BaseClient = pytest.importorskip("botocore.client").BaseClient
moto = pytest.importorskip("moto")
service = pytest.importorskip("service")

Described = Callable[..., dict[str, Any]]
BAKED = {"image": "123456789012.dkr.ecr.us-west-2.amazonaws.com/esm:1", "baked": True}
CACHE = {"compile_cache": "s3://bucket/cache"}

JOBS: dict[str, dict[str, Any]] = {
    "trn1": {},
    "trn1 x 4": {"instance_count": 4, "encrypt_traffic": True, "tags": {"team": "proteins"}},
    "trn1n x 2": {"instance_type": "ml.trn1n.32xlarge", "instance_count": 2, **CACHE},
    "g5 qlora": {"instance_type": "ml.g5.2xlarge", "overrides": ("--adapter.kind", "qlora", "--optim.lr", "1e-4")},
    "compile only": {"compile_only": True, **CACHE},
    "spot": {"spot": True, "max_run": 3600, "max_wait": 7200, "checkpoints": "s3://bucket/earlier"},
    "warm pool": {"keep_alive": 600},
    "vpc and keys": {"subnets": ("subnet-1",), "security_groups": ("sg-1", "sg-2"), "output_kms_key": "key"},
    "isolated": {"network_isolation": True, **BAKED},
}
"""What is special about a job -> its values."""


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that open nothing."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")


@pytest.fixture
def account(credentials: None) -> Any:
    """moto in this process, with a bucket."""
    with moto.mock_aws():
        region = {"LocationConstraint": "us-west-2"}
        boto3.client("s3", region_name="us-west-2").create_bucket(Bucket="bucket", CreateBucketConfiguration=region)
        yield


def dry(job: Job, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The request of --dry-run, on a machine without keys that cannot open a connection."""
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name, raising=False)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a dry run opened a connection")

        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "create_connection", refuse)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
        return service.submit(job, folder / "dry", dry=True, wait=False)


@pytest.mark.parametrize("name", JOBS)
def test_the_request_is_the_one_that_was_printed(
    name: str, described: Described, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credentials: None
) -> None:
    model = {"config": {"model": {"name": "tiny", "init": "random"}}} if name == "isolated" else {}
    job = Job(**described(**{**JOBS[name], **model}))
    printed = dry(job, tmp_path, monkeypatch)
    with moto.mock_aws():
        region = {"LocationConstraint": "us-west-2"}
        boto3.client("s3", region_name="us-west-2").create_bucket(Bucket="bucket", CreateBucketConfiguration=region)
        sent = service.submit(job, tmp_path / "sent", dry=False, wait=False)
        known = boto3.client("sagemaker", region_name="us-west-2").describe_training_job(TrainingJobName=job.name)
    assert sent == printed == json.loads(json.dumps(printed))
    assert known["TrainingJobName"] == "job-1"
    expect(name, job, sent)


def expect(name: str, job: Job, sent: dict[str, Any]) -> None:
    """What must be in the request of each job, by hand."""
    resources, hyper = sent["ResourceConfig"], {k: json.loads(v) for k, v in sent["HyperParameters"].items()}
    assert resources["InstanceType"] == job.instance_type and resources["InstanceCount"] == job.instance_count
    assert hyper["sagemaker_torch_distributed_enabled"] is True and hyper["sagemaker_program"] == "entry.py"
    assert hyper["config"] == "run.yaml" and hyper["backend"] == ("cuda" if "g5" in job.instance_type else "neuron")
    assert sent["AlgorithmSpecification"]["MetricDefinitions"] == metric_definitions()
    assert sent["AlgorithmSpecification"]["TrainingImage"] == job.image_uri
    assert sent["CheckpointConfig"] == {"S3Uri": job.checkpoints or "s3://bucket/esm/job-1/checkpoints"}
    assert sent["OutputDataConfig"]["S3OutputPath"] == "s3://bucket/esm/job-1"
    channels = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in sent["InputDataConfig"]}
    assert channels["train"] == "s3://bucket/esm/job-1/input/train/train.csv"
    assert ("code" in channels) == (name == "isolated"), "isolated containers get their code as a channel"
    assert sent.get("Environment", {}) == job.variables
    wanted: dict[str, dict[str, Any]] = {
        "trn1 x 4": {"EnableInterContainerTrafficEncryption": True, "Tags": [{"Key": "team", "Value": "proteins"}]},
        "spot": {
            "EnableManagedSpotTraining": True,
            "StoppingCondition": {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 7200},
        },
        "vpc and keys": {"VpcConfig": {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1", "sg-2"]}},
        "isolated": {"EnableNetworkIsolation": True},
    }
    for key, value in wanted.get(name, {}).items():
        assert sent[key] == value
    assert resources.get("KeepAlivePeriodInSeconds") == (600 if name == "warm pool" else None)
    assert sent["OutputDataConfig"].get("KmsKeyId") == ("key" if name == "vpc and keys" else None)
    if name == "g5 qlora":
        assert hyper["optim.lr"] == "1e-4" and hyper["adapter.kind"] == "qlora"
    if name == "trn1n x 2":
        assert sent["Environment"]["FI_PROVIDER"] == "efa" and sent["Environment"]["FI_EFA_USE_DEVICE_RDMA"] == "1"
    if name == "compile only":
        variables = {"RUN_NEURON_PARALLEL_COMPILE": "1", "NEURON_COMPILE_CACHE_URL": "s3://bucket/cache"}
        assert sent["Environment"] == variables


IAM = {"HeadBucket": "ListBucket", "HeadObject": "GetObject", "CreateMultipartUpload": "PutObject"}
"""Operations of S3 whose right has another name."""
MADE_FOR = {"sagemaker": "arn:aws:sagemaker:REGION:ACCOUNT:training-job/esm-neuron-*", "s3": "arn:aws:s3:::BUCKET"}


def test_the_launchers_policy_allows_every_call_and_no_other(
    described: Described, account: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()
    really = BaseClient._make_api_call

    def call(client: Any, operation: str, params: dict[str, Any]) -> Any:
        called.add(f"{client.meta.service_model.service_name}:{IAM.get(operation, operation)}")
        return really(client, operation, params)

    monkeypatch.setattr(BaseClient, "_make_api_call", call)
    service.submit(Job(**described()), tmp_path, dry=False, wait=False)
    policy = json.loads((Path(service.__file__).parent / "launcher-policy.json").read_text())
    allowed = {
        action: statement["Resource"]
        for statement in policy["Statement"]
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }
    assert {"sagemaker:CreateTrainingJob", "s3:PutObject"} <= called <= set(allowed)
    for name in called:
        assert allowed[name].startswith(MADE_FOR[name.partition(":")[0]])


def test_the_uploaded_archive(described: Described, account: None, tmp_path: Path) -> None:
    job = Job(**described())
    sent = service.submit(job, tmp_path, dry=False, wait=False)
    bucket, _, key = (
        json.loads(sent["HyperParameters"]["sagemaker_submit_directory"]).removeprefix("s3://").partition("/")
    )
    body = boto3.client("s3", region_name="us-west-2").get_object(Bucket=bucket, Key=key)["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        names = {member.name for member in archive if member.isfile()}
        config = archive.extractfile("run.yaml")
        assert config is not None and config.read() == job.config.read_bytes()
    source = {str(path.relative_to(tmp_path / "source")) for path in (tmp_path / "source").rglob("*") if path.is_file()}
    assert names == source and {"entry.py", "requirements.txt", "esm_neuron/cli.py"} < names
    data = boto3.client("s3", region_name="us-west-2").get_object(
        Bucket="bucket", Key="esm/job-1/input/train/train.csv"
    )
    assert data["Body"].read() == Path(str(job.run.data.train)).read_bytes()


def test_against_a_server_of_its_own(
    described: Described, tmp_path: Path, credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto over HTTP: what botocore really writes on the wire is taken."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        region = {"LocationConstraint": "us-west-2"}
        boto3.client("s3", region_name="us-west-2").create_bucket(Bucket="bucket", CreateBucketConfiguration=region)
        sent = service.submit(Job(**described()), tmp_path, dry=False, wait=False)
        known = boto3.client("sagemaker", region_name="us-west-2").describe_training_job(TrainingJobName="job-1")
    finally:
        server.stop()
    assert known["HyperParameters"] == sent["HyperParameters"]
    assert known["ResourceConfig"]["InstanceType"] == "ml.trn1.32xlarge"


def test_wait_follows_the_logs(described: Described, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def fit(self: Any, inputs: Any, **how: Any) -> None:
        calls.append(how)
        self.sagemaker_session.sagemaker_client.meta.events.emit(service.REQUEST, params={}, model=None, context={})

    monkeypatch.setattr(service.PyTorch, "fit", fit)
    service.submit(Job(**described()), tmp_path / "a", dry=True, wait=True)
    service.submit(Job(**described()), tmp_path / "b", dry=True, wait=False)
    assert [(how["wait"], how["logs"]) for how in calls] == [(True, "All"), (False, None)]


def test_the_accounts_are_the_sdks(described: Described) -> None:
    from sagemaker.image_uris import config_for_framework

    known = config_for_framework("pytorch")["training"]["versions"]["2.8.0"]["registries"]
    assert Job(**described()).image_uri.startswith(known["us-west-2"])
    import yaml
    from job import IMAGES

    assert yaml.safe_load(IMAGES.read_text())["accounts"] == known
