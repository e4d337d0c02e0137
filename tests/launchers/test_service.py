"""The SDK against moto: the request that goes out is the one that --dry-run prints, with the archive that was meant."""

from __future__ import annotations

import io
import json
import socket
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import launch
import pytest
from job import SDK_HYPERPARAMETERS, Job, metric_definitions

from esm_neuron.errors import ConfigError, TrainingError

pytestmark = pytest.mark.launchers
boto3 = pytest.importorskip("boto3", reason="make test-launchers installs boto3")
moto = pytest.importorskip("moto", reason="make test-launchers installs moto")
service = pytest.importorskip("service", reason="make test-launchers installs sagemaker")

Described = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[2]
BAKED = {"image": "123456789012.dkr.ecr.us-west-2.amazonaws.com/esm:1", "baked": True}
CACHE = {"compile_cache": "s3://bucket/cache"}

JOBS: dict[str, dict[str, Any]] = {
    "trn1": {},
    "trn1 x 4": {"instance_count": 4, "encrypt_traffic": True, "tags": {"team": "proteins"}},
    "trn1n x 2": {"instance_type": "ml.trn1n.32xlarge", "instance_count": 2, **CACHE},
    "g5 qlora": {
        "config": ROOT / "configs" / "localization_650m_g5_qlora.yaml",
        "instance_type": "ml.g5.2xlarge",
        "train": "s3://bucket/data/train/",
        "overrides": ("--optim.lr", "1e-4"),
    },
    "compile only": {"compile_only": True, **CACHE},
    "spot": {"spot": True, "max_run": 3600, "max_wait": 7200, "checkpoints": "s3://bucket/earlier"},
    "warm pool": {"keep_alive": 600},
    "vpc and keys": {"subnets": ("subnet-1",), "security_groups": ("sg-1", "sg-2"), "output_kms_key": "key"},
    "isolated": {"network_isolation": True, **BAKED},
}
"""What is special about a job -> its values."""


@pytest.fixture
def small_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources of one empty file: quick. The archive has a test of its own."""

    def small(folder: Path, *_: Any) -> Path:
        folder.mkdir(parents=True)
        (folder / "entry.py").touch()
        return folder

    monkeypatch.setattr(service, "stage", small)


def make(name: str, described: Described) -> Job:
    """A job of `JOBS`; the configuration of `described`, unless it names a file."""
    model = {"model": {"name": "tiny", "init": "random"}} if name == "isolated" else None
    return Job(**{**described(model), **JOBS[name]})


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
    job = make(name, described)
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
    assert hyper["config"] == job.config.name
    assert hyper["backend"] == ("cuda" if "g5" in job.instance_type else "neuron")
    assert set(sent["HyperParameters"]) - set(SDK_HYPERPARAMETERS) == set(job.hyperparameters)
    assert set(SDK_HYPERPARAMETERS) <= set(sent["HyperParameters"])
    assert sent["AlgorithmSpecification"]["MetricDefinitions"] == metric_definitions()
    assert sent["AlgorithmSpecification"]["TrainingImage"] == job.image_uri
    assert sent["CheckpointConfig"] == {"S3Uri": job.checkpoints or "s3://bucket/esm/job-1/checkpoints"}
    assert sent["OutputDataConfig"]["S3OutputPath"] == "s3://bucket/esm/job-1"
    channels = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in sent["InputDataConfig"]}
    assert channels["train"] == (job.train or "s3://bucket/esm/job-1/input/train/train.csv")
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
        assert hyper["optim.lr"] == "1e-4" and job.run.adapter.kind == "qlora"
    if name == "trn1n x 2":
        assert sent["Environment"]["FI_PROVIDER"] == "efa" and sent["Environment"]["FI_EFA_USE_DEVICE_RDMA"] == "1"
    if name == "compile only":
        variables = {"RUN_NEURON_PARALLEL_COMPILE": "1", "NEURON_COMPILE_CACHE_URL": "s3://bucket/cache"}
        assert sent["Environment"] == variables


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
    described: Described, tmp_path: Path, credentials: None, monkeypatch: pytest.MonkeyPatch, small_archive: None
) -> None:
    """moto over HTTP: what botocore really writes on the wire is taken, and is what was printed, for all jobs."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        region = {"LocationConstraint": "us-west-2"}
        boto3.client("s3", region_name="us-west-2").create_bucket(Bucket="bucket", CreateBucketConfiguration=region)
        client = boto3.client("sagemaker", region_name="us-west-2")
        for number, name in enumerate(JOBS):
            folder = tmp_path / str(number)
            job = replace(make(name, described), name=f"job-{number}")
            printed = dry(job, folder, monkeypatch)
            assert service.submit(job, folder / "sent", dry=False, wait=False) == printed, name
            known = client.describe_training_job(TrainingJobName=job.name)
            image = known["AlgorithmSpecification"].pop("TrainingImage")
            assert image == printed["AlgorithmSpecification"]["TrainingImage"]
            # moto answers with metric definitions of its own
            kept = {key: value for key, value in known.items() if key in printed and key != "AlgorithmSpecification"}
            assert {"HyperParameters", "ResourceConfig", "InputDataConfig", "CheckpointConfig"} <= set(kept)
            assert kept == {key: printed[key] for key in kept}, name
    finally:
        server.stop()


def test_the_command_prints_the_request_that_it_sends(
    described: Described, credentials: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = described()
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--spot", "true", "--tags.team", "proteins"]
    assert launch.main([*words, "--dry-run", "--", "--optim.lr", "3e-4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    sent: list[dict[str, Any]] = []
    really = service.submit

    def submit(*how: Any) -> dict[str, Any]:
        sent.append(really(*how))
        return sent[0]

    monkeypatch.setattr(service, "submit", submit)
    with moto.mock_aws():  # only now: it would take the dry run's calls as well
        region = {"LocationConstraint": "us-west-2"}
        boto3.client("s3", region_name="us-west-2").create_bucket(Bucket="bucket", CreateBucketConfiguration=region)
        assert launch.main([*words, "--", "--optim.lr", "3e-4"]) == 0
        known = boto3.client("sagemaker", region_name="us-west-2").describe_training_job(TrainingJobName="job-1")
    assert "job-1: checkpoints in s3://bucket/esm/job-1/checkpoints" in capsys.readouterr().out
    assert sent == [printed] and json.loads(printed["HyperParameters"]["optim.lr"]) == "3e-4"
    assert known["HyperParameters"] == printed["HyperParameters"]


def test_a_job_that_aws_does_not_take_or_that_fails_is_one_line(
    described: Described, account: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_archive: None
) -> None:
    from sagemaker.exceptions import UnexpectedStatusException

    with pytest.raises(
        ConfigError, match="AWS took no job job-1 in us-west-2: .*NoSuchBucket.*; check your keys"
    ) as no:
        service.submit(Job(**described(output="s3://nobody/esm")), tmp_path / "a", dry=False, wait=False)

    def fit(*_: Any, **__: Any) -> None:
        raise UnexpectedStatusException("Error for Training job job-1: Failed.\nReason: AlgorithmError", [], "Failed")

    monkeypatch.setattr(service.PyTorch, "fit", fit)
    with pytest.raises(TrainingError, match="job-1 ended as Failed: .*AlgorithmError; fix it and go on with") as ended:
        service.submit(Job(**described()), tmp_path / "b", dry=False, wait=True)
    assert "\n" not in str(no.value) + str(ended.value)
    assert str(ended.value).endswith("--checkpoints s3://bucket/esm/job-1/checkpoints")


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
