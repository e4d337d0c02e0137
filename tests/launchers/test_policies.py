"""Least rights on SageMaker: a policy is its table in docs/sagemaker.md, and holds what a job uses and nothing else."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from job import Job

Described = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[2]
POLICIES = ("role-policy.json", "launcher-policy.json")
ANYWHERE = {"ecr:GetAuthorizationToken", "cloudwatch:PutMetricData"}
"""Actions that IAM grants on everything or not at all."""
FOR_THE_SERVICE = {"iam:PassRole", "sagemaker:AddTags", "s3:AbortMultipartUpload"}
"""The launcher's rights without a call of its own: to lend a role, to tag the new job, to end a failed upload."""
RIGHTS = {"ListObjectsV2": "ListBucket", "HeadObject": "GetObject"} | dict.fromkeys(
    ("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"), "PutObject"
)
"""Operations of S3 whose right has another name."""
NAMES = {"REGION": "us-west-2", "IMAGE-ACCOUNT": "763104351884", "ACCOUNT": "123456789012", "BUCKET": "bucket"}
NAMES |= {"PREFIX": "esm", "ROLE": "trainer", "IMAGE-REPOSITORY": "pytorch-training-neuronx"}
"""What a user puts for the words in capitals."""


def statements(policy: str) -> list[dict[str, Any]]:
    """The policy's statements, actions as a list."""
    read = json.loads((ROOT / "launchers" / "sagemaker" / policy).read_text())
    assert set(read) == {"Version", "Statement"} and read["Version"] == "2012-10-17"
    found: list[dict[str, Any]] = read["Statement"]
    return [{**one, "Action": [one["Action"]] if isinstance(one["Action"], str) else one["Action"]} for one in found]


def allowed(policy: str) -> dict[str, list[str]]:
    """Action -> the resources that it is allowed on."""
    pairs = [(action, one["Resource"]) for one in statements(policy) for action in one["Action"]]
    assert max(Counter(action for action, _ in pairs).values()) == 1, "each action once"
    return {action: [found] if isinstance(found, str) else found for action, found in pairs}


def filled(resource: str) -> str:
    """A resource with a user's names."""
    return re.sub("|".join(NAMES), lambda found: NAMES[found[0]], resource)


def may(rights: dict[str, list[str]], action: str, resource: str) -> bool:
    """Whether IAM lets a user do so, by the user's names."""
    return any(fnmatchcase(resource, filled(one)) for one in rights[action])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_its_table_in_the_documentation(policy: str) -> None:
    text = (ROOT / "docs" / "sagemaker.md").read_text()
    table = text.partition(f"[{policy}]")[2].partition("\n\n| ")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (`[^|]+`) \| .+ \|$", table, re.M)
    assert len(rows) == table.count("\n") - 1, "every row but the head"
    assert {action: re.findall("`([^`]+)`", places) for action, places in rows} == allowed(policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_action_is_a_family_and_no_resource_is_everything(policy: str) -> None:
    for one in statements(policy):
        assert set(one) <= {"Sid", "Effect", "Action", "Resource", "Condition"} and one["Effect"] == "Allow"
    for action, resource in [(action, one) for action, found in allowed(policy).items() for one in found]:
        assert re.fullmatch(r"[a-z0-9]+:[A-Z][A-Za-z]+", action), action
        if resource == "*":
            assert action in ANYWHERE
        else:
            pinned = r"arn:aws:(s3:::BUCKET|(sagemaker|logs|ecr):REGION:(IMAGE-)?ACCOUNT:|iam::ACCOUNT:role/ROLE$)"
            assert re.match(pinned, resource), f"{action} on {resource}"
            assert not re.search(r"\*.", resource) or resource.endswith("/PREFIX/*/checkpoints/*")


def test_what_is_allowed_under_a_condition() -> None:
    conditions = {
        action: one["Condition"]["StringEquals"]
        for policy in POLICIES
        for one in statements(policy)
        for action in one["Action"]
        if "Condition" in one
    }
    assert conditions == {
        "cloudwatch:PutMetricData": {"cloudwatch:namespace": "/aws/sagemaker/TrainingJobs"},
        "iam:PassRole": {"iam:PassedToService": "sagemaker.amazonaws.com"},
    }


def test_the_role_reaches_the_image_and_every_place_of_a_job(described: Described) -> None:
    job = Job(**described(compile_cache="s3://bucket/esm/cache"))
    rights = allowed("role-policy.json")
    registry, _, repository = job.image_uri.partition("/")
    account, _, _, region = registry.split(".")[:4]
    image = f"arn:aws:ecr:{region}:{account}:repository/{repository.partition(':')[0]}"
    images = [action for action in rights if action.startswith("ecr:") and action not in ANYWHERE]
    assert len(images) == 3 and all(list(map(filled, rights[action])) == [image] for action in images)
    for uri in (job.prefix, job.checkpoint_uri.rstrip("/"), str(job.compile_cache)):
        for action in ("s3:GetObject", "s3:PutObject"):
            assert may(rights, action, f"arn:aws:s3:::{uri.removeprefix('s3://')}/a/b")
    delete = "s3:DeleteObject"
    pruned = f"arn:aws:s3:::{job.checkpoint_uri.removeprefix('s3://')}step-1/manifest.json"
    assert may(rights, delete, pruned), "SageMaker deletes in S3 what the run prunes"
    assert may(rights, delete, "arn:aws:s3:::bucket/esm/cache/lock")
    for kept in ("job-1/output/model.tar.gz", "job-1/input/train/train.csv", "data/train.csv"):
        assert not may(rights, delete, f"arn:aws:s3:::bucket/esm/{kept}")


def arn(service: str, params: dict[str, Any]) -> str:
    """The resource of a call."""
    if service == "s3":
        return "arn:aws:s3:::" + params["Bucket"] + (f"/{params['Key']}" if "Key" in params else "")
    search = "hyper-parameter-tuning-job/", "HyperParameterTuningJobName"
    kind, name = {
        "sagemaker": search if search[1] in params else ("training-job/", "TrainingJobName"),
        "logs": ("log-group:", "logGroupName"),
    }[service]
    named = params["ResourceArn"].rpartition("/")[2] if "ResourceArn" in params else params[name]
    return f"arn:aws:{service}:us-west-2:123456789012:{kind}{named}"


@pytest.mark.launchers
def test_the_launcher_makes_each_call_that_it_may_and_no_other(
    described: Described, account: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of launch.py --wait, tune.py and every command of jobs.py."""
    import boto3
    import jobs
    import service
    import tune
    from botocore.client import BaseClient

    job = Job(**described(name="esm-neuron-1", tags={"team": "proteins"}, compile_cache="s3://bucket/esm/cache"))
    logs = boto3.client("logs", region_name="us-west-2")
    logs.create_log_group(logGroupName="/aws/sagemaker/TrainingJobs")
    logs.create_log_stream(logGroupName="/aws/sagemaker/TrainingJobs", logStreamName=f"{job.name}/algo-1")
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz"):
        pass
    s3 = boto3.client("s3", region_name="us-west-2")
    s3.upload_file(str(archive), "bucket", f"esm/{job.name}/output/model.tar.gz")
    s3.put_object(Bucket="bucket", Key=f"esm/{job.name}/checkpoints/step-1", Body=b"")
    called: dict[str, set[str]] = {}
    really = BaseClient._make_api_call

    def call(client: Any, operation: str, params: dict[str, Any]) -> Any:
        name = client.meta.service_model.service_name
        called.setdefault(f"{name}:{RIGHTS.get(operation, operation)}", set()).add(arn(name, params))
        if operation.startswith("Stop"):  # moto has none, and completes a job at once
            return {}
        answer = really(client, operation, params)
        failed = {"TrainingJobStatus": "Failed"} if stopped and operation == "DescribeTrainingJob" else {}
        return {**answer, **failed}

    stopped: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(BaseClient, "_make_api_call", call)
        boto = service.session(job.region)
        sent = service.submit(job, tmp_path, boto)
        service.follow(job.name, boto, print)
        for words in (
            ["status"],
            ["logs"],
            ["fetch", "--output", "a"],
            ["fetch", "--whole", "--output", "b"],
            ["stop"],
        ):
            patch.chdir(tmp_path)
            assert jobs.main([words[0], job.name, "--region", job.region, *words[1:]]) == 0
        search = "esm-neuron-search"
        ranges = [tune.parse_range("optim.lr=1e-5:1e-3")]
        how = {"objective": "mcc", "trials": 2, "parallel": 1}
        boto.client("sagemaker").create_hyper_parameter_tuning_job(
            **tune.request(Job(**described(name=search)), ranges, how)
        )
        for command in ("status", "stop"):
            assert jobs.main([command, search, "--search", "--region", job.region]) == 0
        stopped.append(job.name)
        assert jobs.main(["resume", job.name, "--region", job.region, "--name", "esm-neuron-2"]) == 0
    rights = allowed("launcher-policy.json")
    assert set(called) == set(rights) - FOR_THE_SERVICE
    for action, resources in called.items():
        assert all(may(rights, action, resource) for resource in resources), f"{action} on {resources}"
    assert [sent["RoleArn"]] == list(map(filled, rights["iam:PassRole"]))
