"""The template of an account: AWS's own rules for it, its rights, and a job of the user whom it lets start one."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from job import IMAGES, Job, bucket_and_key

Described = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "launchers" / "sagemaker" / "quickstart.yaml"
ACCOUNT = "123456789012"


def statements(document: dict[str, Any], names: dict[str, str]) -> set[tuple[Any, ...]]:
    """(action, resource, condition) of each right of a policy, by a user's names."""
    found = set()
    for one in document["Statement"]:
        actions, places = ([v] if isinstance(v, str) else v for v in (one["Action"], one["Resource"]))
        for action in actions:
            for place in places:
                filled = re.sub("|".join(names), lambda match: names[match[0]], place)
                found.add((action, filled, json.dumps(one.get("Condition", {}), sort_keys=True)))
    return found


@pytest.mark.launchers
def test_cfn_lint_has_nothing_to_say() -> None:
    lint = Path(sys.executable).with_name("cfn-lint")
    done = subprocess.run([lint, "--include-checks", "I", "--", TEMPLATE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.fixture
def stack(account: None) -> dict[str, Any]:
    """What CloudFormation makes of the template, in moto: outputs, and both policies."""
    import boto3

    client = boto3.client("cloudformation", region_name="us-west-2")
    client.create_stack(StackName="esm", TemplateBody=TEMPLATE.read_text(), Capabilities=["CAPABILITY_IAM"])
    (made,) = client.describe_stacks(StackName="esm")["Stacks"]
    assert made["StackStatus"] == "CREATE_COMPLETE"
    outputs = {one["OutputKey"]: one["OutputValue"] for one in made["Outputs"]}
    iam = boto3.client("iam")
    version = iam.get_policy(PolicyArn=outputs["LauncherPolicy"])["Policy"]["DefaultVersionId"]
    held = iam.get_policy_version(PolicyArn=outputs["LauncherPolicy"], VersionId=version)["PolicyVersion"]
    role = iam.get_role_policy(RoleName=outputs["Role"].rpartition("/")[2], PolicyName="esm-neuron")
    documents = {"launcher-policy.json": held["Document"], "role-policy.json": role["PolicyDocument"]}
    read = {name: ast.literal_eval(one) if isinstance(one, str) else one for name, one in documents.items()}
    return {**outputs, **read}  # moto gives a role's as the text of a dict


@pytest.mark.launchers
def test_the_rights_are_those_of_the_policies(stack: dict[str, Any]) -> None:
    bucket, _, prefix = stack["Output"].removeprefix("s3://").partition("/")
    names = {"REGION": "us-west-2", "IMAGE-ACCOUNT": "763104351884", "ACCOUNT": ACCOUNT, "BUCKET": bucket}
    names |= {"PREFIX": prefix, "ROLE": stack["Role"].rpartition("/")[2]}
    repositories = [yaml.safe_load(IMAGES.read_text())[kind].partition(":")[0] for kind in ("gpu", "neuron")]
    for policy in ("role-policy.json", "launcher-policy.json"):
        written = json.loads((TEMPLATE.parent / policy).read_text())
        wanted = set()
        for repository in repositories:
            wanted |= statements(written, {**names, "IMAGE-REPOSITORY": repository})
        assert statements(stack[policy], {"$^": ""}) == wanted, policy


@pytest.mark.launchers
def test_a_job_runs_in_the_bucket_and_by_the_role_of_the_stack(
    described: Described, stack: dict[str, Any], tmp_path: Path
) -> None:
    import boto3
    import service

    where = {"role": stack["Role"], "output": stack["Output"], "name": "esm-neuron-1"}
    job = Job(**{**described(), **where})
    service.submit(job, tmp_path, service.session(job.region))
    known = boto3.client("sagemaker", region_name="us-west-2").describe_training_job(TrainingJobName=job.name)
    assert known["RoleArn"] == stack["Role"] and known["CheckpointConfig"]["S3Uri"].startswith(f"{stack['Output']}/")
    for uri in (job.code_uri, f"{job.channels['train']}train.csv"):
        bucket, key = bucket_and_key(uri)
        assert boto3.client("s3").head_object(Bucket=bucket, Key=key)["ContentLength"] > 0, "lies in the stack's bucket"


def test_what_the_optional_parts_make() -> None:
    resources = yaml.safe_load(TEMPLATE.read_text())["Resources"]
    conditions = {name: one["Condition"] for name, one in resources.items() if "Condition" in one}
    assert conditions == {
        "Budget": "HasEmail",
        "EfaGroup": "HasVpc",
        "EfaIn": "HasVpc",
        "EfaOut": "HasVpc",
        "ToS3": "HasRoutes",
    }
    for way, other in (("EfaIn", "SourceSecurityGroupId"), ("EfaOut", "DestinationSecurityGroupId")):
        rule = resources[way]["Properties"]
        assert rule["GroupId"] == rule[other] and rule["IpProtocol"] == "-1", "a group lets itself in and out"
