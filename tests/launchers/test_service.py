"""Jobs against moto: the SDK's PyTorch and plain boto3 send the request that --dry-run prints; what commands do."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from job import TOOLKIT_HYPERPARAMETERS, Job, metric_definitions
from request import create_training_job

from esm_neuron.errors import ConfigError

pytestmark = pytest.mark.launchers
boto3 = pytest.importorskip("boto3", reason="make test-launchers installs boto3")
moto = pytest.importorskip("moto", reason="make test-launchers installs moto")
sdk = pytest.importorskip("sdk", reason="make test-launchers installs boto3")
jobs = pytest.importorskip("jobs", reason="make test-launchers installs boto3")
import service  # noqa: E402 - it needs boto3

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
    "files as they are asked for": {"input_mode": "FastFile"},
    "vpc and keys": {"subnets": ("subnet-1",), "security_groups": ("sg-1", "sg-2"), "output_kms_key": "key"},
    "isolated": {"network_isolation": True, **BAKED},
}
"""What is special about a job -> its values."""


@pytest.fixture
def small_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources of one empty file: quick. The archive has a test of its own."""

    def small(folder: Path, job: Job) -> Path:
        folder.mkdir(parents=True)
        (folder / "entry.py").touch()
        return folder

    monkeypatch.setattr(service, "stage", small)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The requests that leave, as botocore has them; each session of ours tells."""
    found: list[dict[str, Any]] = []
    really = service.session

    def session(region: str | None) -> Any:
        boto = really(region)
        event = "provide-client-params.sagemaker.CreateTrainingJob"
        boto.events.register(event, lambda params, **_: found.append(dict(params)))
        return boto

    monkeypatch.setattr(service, "session", session)
    return found


def make(name: str, described: Described) -> Job:
    """A job of `JOBS`; the configuration of `described`, unless it names a file."""
    model = {"model": {"name": "tiny", "init": "random"}} if name == "isolated" else None
    return Job(**{**described(model), **JOBS[name]})


@pytest.mark.parametrize("name", JOBS)
def test_boto3_and_the_sdk_send_the_request_that_is_printed(
    name: str, described: Described, tmp_path: Path, account: None, small_archive: None, sent: list[dict[str, Any]]
) -> None:
    job = make(name, described)
    printed = create_training_job(job)
    service.submit(job, tmp_path / "boto3", service.session(job.region))
    sdk.estimator(replace(job, name="job-2")).fit(sdk.inputs(replace(job, name="job-2")), job_name="job-2", wait=False)
    by_sdk = json.loads(json.dumps(sent[1]).replace("job-2", "job-1"))
    assert sent[0] == printed == json.loads(json.dumps(printed))
    assert by_sdk == printed
    expect(name, job, sent[0])


def expect(name: str, job: Job, sent: dict[str, Any]) -> None:
    """What must be in the request of each job, by hand."""
    resources, hyper = sent["ResourceConfig"], {k: json.loads(v) for k, v in sent["HyperParameters"].items()}
    assert resources["InstanceType"] == job.instance_type and resources["InstanceCount"] == job.instance_count
    assert hyper["sagemaker_torch_distributed_enabled"] is True and hyper["sagemaker_program"] == "entry.py"
    assert hyper["config"] == "run.yaml"
    assert hyper["backend"] == ("cuda" if "g5" in job.instance_type else "neuron")
    assert len(set(sent["HyperParameters"]) - set(job.hyperparameters)) == TOOLKIT_HYPERPARAMETERS
    assert sent["AlgorithmSpecification"]["MetricDefinitions"] == metric_definitions()
    assert sent["AlgorithmSpecification"]["TrainingImage"] == job.image_uri
    place = job.checkpoints or "s3://bucket/esm/job-1/checkpoints"
    assert sent["CheckpointConfig"] == {"S3Uri": f"{place}/"}, "run1/ does not restore run10/"
    assert sent["OutputDataConfig"]["S3OutputPath"] == "s3://bucket/esm", "SageMaker adds the job's name"
    assert sent["RetryStrategy"] == {"MaximumRetryAttempts": 3}
    channels = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in sent["InputDataConfig"]}
    assert channels["train"] == (job.train or "s3://bucket/esm/job-1/input/train/")
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
    service.submit(job, tmp_path, service.session(job.region))
    s3 = boto3.client("s3", region_name="us-west-2")
    body = s3.get_object(Bucket="bucket", Key=job.code_uri.removeprefix("s3://bucket/"))["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        names = {member.name for member in archive if member.isfile()}
        config = archive.extractfile("run.yaml")
        assert config is not None and config.read() == job.config.read_bytes()
    source = {str(path.relative_to(tmp_path / "source")) for path in (tmp_path / "source").rglob("*") if path.is_file()}
    assert names == source and {"entry.py", "requirements.txt", "constraints.txt", "esm_neuron/cli.py"} < names
    data = s3.get_object(Bucket="bucket", Key="esm/job-1/input/train/train.csv")
    assert data["Body"].read() == Path(str(job.run.data.train)).read_bytes()


def as_kept(known: dict[str, Any], printed: dict[str, Any]) -> dict[str, Any]:
    """What moto keeps of a request, for a comparison; it answers with metric definitions of its own."""
    assert known["AlgorithmSpecification"]["TrainingImage"] == printed["AlgorithmSpecification"]["TrainingImage"]
    kept = {key: value for key, value in known.items() if key in printed and key != "AlgorithmSpecification"}
    assert {"HyperParameters", "ResourceConfig", "InputDataConfig", "CheckpointConfig"} <= set(kept)
    return kept


def test_against_a_server_of_its_own(described: Described, tmp_path: Path, server: None, small_archive: None) -> None:
    client = boto3.client("sagemaker", region_name="us-west-2")
    for number, name in enumerate(JOBS):
        job = replace(make(name, described), name=f"job-{number}")
        printed = service.submit(job, tmp_path / str(number), service.session(job.region))
        kept = as_kept(client.describe_training_job(TrainingJobName=job.name), printed)
        assert kept == {key: printed[key] for key in kept}, name


def words_of(values: dict[str, Any]) -> list[str]:
    """A job's flags for the command line."""
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_the_command_prints_json_alone_and_sends_the_same(described: Described, server: None) -> None:
    words = [*words_of(described()), "--spot", "true", "--tags.team", "proteins"]
    program = [sys.executable, str(ROOT / "launchers" / "sagemaker" / "launch.py"), *words]
    dry = subprocess.run(
        [*program, "--dry-run", "--", "--optim.lr", "3e-4"], capture_output=True, text=True, check=True
    )
    printed = json.loads(dry.stdout)
    assert "cost: at most 593.52 dollars on demand, spot about 237.41: 1 x ml.trn1.32xlarge x 24 h" in dry.stderr
    done = subprocess.run([*program, "--", "--optim.lr", "3e-4"], capture_output=True, text=True, check=True)
    assert done.stdout == "" and "job-1 was sent; its checkpoints: s3://bucket/esm/job-1/checkpoints/" in done.stderr
    assert json.loads(printed["HyperParameters"]["optim.lr"]) == "3e-4"
    known = boto3.client("sagemaker", region_name="us-west-2").describe_training_job(TrainingJobName="job-1")
    kept = as_kept(known, printed)
    assert kept == {key: printed[key] for key in kept}


def test_a_dry_run_needs_no_sdk_no_torch_and_no_account(described: Described, tmp_path: Path) -> None:
    """Nor the rest of the training stack: importing any of it is an error here."""
    needless = (
        "torch",
        "transformers",
        "peft",
        "datasets",
        "pandas",
        "sklearn",
        "scipy",
        "tensorboard",
        "boto3",
        "sagemaker",
    )
    block = f"import sys; [sys.modules.__setitem__(name, None) for name in {needless}]; sys.path.insert(0, sys.argv[1])"
    folder = str(ROOT / "launchers" / "sagemaker")
    weights = tmp_path / "weights"
    weights.mkdir()
    sizes = {"num_hidden_layers": 6, "hidden_size": 320, "num_attention_heads": 20, "intermediate_size": 1280}
    (weights / "config.json").write_text(json.dumps({"model_type": "esm", **sizes}))

    def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
        line, env = [sys.executable, "-c", f"{block}; {program}", folder, *words], {"PYTHONPATH": str(ROOT)}
        return subprocess.run(line, capture_output=True, text=True, check=False, env=env)

    words = words_of(described(model=weights))
    launch = "import launch; sys.exit(launch.main(sys.argv[2:]))"
    done = run(launch, *words, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "model" in {one["ChannelName"] for one in json.loads(done.stdout)["InputDataConfig"]}
    assert "estimate, by the roofline" in done.stderr, "the folder's shape is known"
    looking = "import jobs; sys.exit(jobs.main(sys.argv[2:]))"
    for done in (run(launch, *words), run(looking, "status", "job-1")):
        assert done.returncode == 2 and done.stdout == ""
        missing = "starting and following jobs needs boto3; pip install -r launchers/sagemaker/requirements.txt"
        assert missing in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_job_that_aws_does_not_take_is_one_line(
    described: Described, account: None, tmp_path: Path, small_archive: None
) -> None:
    refused = "AWS took no job job-1 in us-west-2: .*NoSuchBucket.*; check your keys"
    with pytest.raises(ConfigError, match=refused) as no:
        service.submit(Job(**described(output="s3://nobody/esm")), tmp_path / "a", service.session("us-west-2"))
    assert "\n" not in str(no.value)


def test_the_result_is_fetched_from_where_the_page_says(
    described: Described, account: None, tmp_path: Path, small_archive: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """moto lays the result where SageMaker does; `fetch` and the page's own command look there."""
    job = Job(**described())
    boto = service.session(job.region)
    service.submit(job, tmp_path / "work", boto)
    found = service.describe(job.name, boto)
    uri = found["ModelArtifacts"]["S3ModelArtifacts"]
    assert uri == "s3://bucket/esm/job-1/output/model.tar.gz"
    page = (ROOT / "docs" / "sagemaker.md").read_text()
    assert uri.replace("job-1", "JOB-NAME") in page
    (tmp_path / "result.json").write_text("{}")
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as packed:
        packed.add(tmp_path / "result.json", "result.json")
    boto.client("s3").upload_file(str(tmp_path / "model.tar.gz"), "bucket", "esm/job-1/output/model.tar.gz")
    boto.client("s3").put_object(Bucket="bucket", Key="esm/job-1/checkpoints/step-1/manifest.json", Body=b"{}")
    boto.client("s3").put_object(Bucket="bucket", Key="esm/job-10/checkpoints/other", Body=b"")
    words = ["job-1", "--region", "us-west-2"]
    assert jobs.main(["fetch", *words, "--output", str(tmp_path / "run")]) == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result.json"]
    assert jobs.main(["fetch", *words, "--output", str(tmp_path / "whole"), "--whole"]) == 0
    whole = [str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert whole == ["step-1/manifest.json"]
    assert jobs.main(["fetch", *words, "--output", str(tmp_path / "run")]) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err
    assert jobs.main(["status", *words]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("job-1: Completed") and f"result: {uri}" in shown


def ended(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """moto's jobs complete at once; this one did not."""
    from moto.sagemaker.models import FakeTrainingJob

    really = FakeTrainingJob.response_object.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(FakeTrainingJob, "response_object", property(lambda self: {**really(self), **changes}))


FAILED = {"TrainingJobStatus": "Failed", "SecondaryStatus": "Failed"}
FAILED["FailureReason"] = "AlgorithmError:\nesm-neuron: error: x"


def test_a_failed_job_is_followed_to_its_reason_and_goes_on_as_a_new_one(
    described: Described,
    account: None,
    tmp_path: Path,
    small_archive: None,
    sent: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = Job(**described(tags={"team": "proteins"}))
    boto = service.session(job.region)
    service.submit(job, tmp_path / "work", boto)
    logs = boto.client("logs")
    logs.create_log_group(logGroupName=service.LOG_GROUP)
    now = int(datetime.now(timezone.utc).timestamp() * 1000)
    for host in ("algo-1", "algo-2"):
        stream = {"logGroupName": service.LOG_GROUP, "logStreamName": f"job-1/{host}-1700000000"}
        logs.create_log_stream(**stream)
        logs.put_log_events(**stream, logEvents=[{"timestamp": now, "message": f"step=1/2 on {host}"}])
    words = ["job-1", "--region", "us-west-2"]
    assert jobs.main(["resume", *words]) == 2
    assert "resume job-1: its status is Completed; there is nothing left to do" in capsys.readouterr().err
    ended(monkeypatch, **FAILED)
    assert jobs.main(["logs", *words, "--follow"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == ["[algo-1] step=1/2 on algo-1", "[algo-2] step=1/2 on algo-2"]
    reason = "job-1 ended as Failed: AlgorithmError: esm-neuron: error: x; fix it and go on from its checkpoints"
    assert err.splitlines() == [f"jobs.py: error: {reason}: jobs.py resume job-1"]
    assert jobs.main(["logs", *words]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert jobs.main(["resume", *words, "--name", "job-2"]) == 0
    first, again = sent
    assert again["TrainingJobName"] == "job-2" and again["CheckpointConfig"] == first["CheckpointConfig"]
    assert again["HyperParameters"] == {**first["HyperParameters"], "sagemaker_job_name": '"job-2"'}
    dropped = {"RetryStrategy", "Environment", "ProfilerConfig"}  # by moto, of what it describes
    same = set(first) - dropped - {"TrainingJobName", "HyperParameters", "AlgorithmSpecification"}
    assert {key: again[key] for key in same} == {key: first[key] for key in same}


def test_a_job_without_checkpoints_is_not_resumed(
    described: Described, account: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request = create_training_job(Job(**described()))
    del request["CheckpointConfig"]
    boto3.client("sagemaker", region_name="us-west-2").create_training_job(**request)
    ended(monkeypatch, **FAILED)
    assert jobs.main(["resume", "job-1", "--region", "us-west-2"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "resume job-1: there is nothing to go on from; a job without checkpoints" in said


def test_an_unknown_profile_is_one_line(account: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert jobs.main(["status", "job-1"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "the keys of this machine: The config profile (nobody) could not be found; check your keys" in said


def test_a_key_that_leads_out_of_the_folder_is_refused(
    described: Described, account: None, tmp_path: Path, small_archive: None, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(**described())
    boto = service.session(job.region)
    service.submit(job, tmp_path / "work", boto)
    boto.client("s3").put_object(Bucket="bucket", Key="esm/job-1/checkpoints/../../out", Body=b"x")
    words = ["fetch", "job-1", "--region", "us-west-2", "--whole", "--output", str(tmp_path / "runs" / "whole")]
    (tmp_path / "runs").mkdir()
    assert jobs.main(words) == 2
    assert "s3://bucket/esm/job-1/checkpoints/../../out: leads out of --output" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir()) and not (tmp_path / "out").exists()


def test_a_running_job_is_stopped_by_a_command(
    described: Described, account: None, tmp_path: Path, small_archive: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(**described())
    service.submit(job, tmp_path / "work", service.session(job.region))
    asked: list[str] = []
    monkeypatch.setattr(service, "session", lambda region: FakeSession(asked))
    assert jobs.main(["stop", "job-1"]) == 0 and asked == ["job-1"]


class FakeSession:
    """moto knows no StopTrainingJob."""

    def __init__(self, asked: list[str]) -> None:
        self.asked = asked

    def client(self, _: str) -> FakeSession:
        return self

    def stop_training_job(self, **job: str) -> None:
        self.asked += job.values()


def test_a_job_without_a_name_of_its_own_is_one_line(account: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.main(["logs", "nobody", "--region", "us-west-2"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("jobs.py: error: job nobody: ")


def test_the_accounts_are_the_sdks(described: Described) -> None:
    from sagemaker.image_uris import config_for_framework

    known = config_for_framework("pytorch")["training"]["versions"]["2.8.0"]["registries"]
    assert Job(**described()).image_uri.startswith(known["us-west-2"])
    import yaml
    from job import IMAGES

    assert yaml.safe_load(IMAGES.read_text())["accounts"] == known
    neuron = config_for_framework("huggingface-neuronx")["training"]["versions"]["4.55.4"]["pytorch2.7.0"]["registries"]
    assert set(yaml.safe_load(IMAGES.read_text())["regions"]["neuron"]) == set(neuron)
