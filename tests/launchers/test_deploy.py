"""Endpoints and batch jobs: three kinds of requests, printed by a dry run and taken by moto."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import deploy
import pytest

ROOT = Path(__file__).parents[2]
WORDS = ["--archive", "s3://bucket/model.tar.gz", "--role", "arn:aws:iam::123456789012:role/trainer", "--region",
         "us-west-2", "--instance-type", "ml.g5.xlarge", "--name", "esm-neuron-1"]  # fmt: skip
PLACES = {
    "real-time": [],
    "asynchronous": ["--output", "s3://bucket/answers/"],
    "batch": ["--input", "s3://bucket/proteins.csv", "--output", "s3://bucket/answers"],
}


@pytest.mark.parametrize("kind", deploy.KINDS)
def test_a_dry_run_prints_what_botocore_accepts(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy.main([kind, *WORDS, *PLACES[kind], "--backend", "cuda", "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    image = found["create_model"]["PrimaryContainer"]["Image"]
    assert image.startswith("763104351884.dkr.ecr.us-west-2.amazonaws.com/pytorch-inference:2.6.0-gpu-")
    if kind == "batch":
        (transform,) = [found["create_transform_job"]]
        assert transform["TransformInput"]["ContentType"] == "text/csv"
        assert transform["TransformInput"]["SplitType"] == transform["TransformOutput"]["AssembleWith"] == "Line"
    else:
        queue = found["create_endpoint_config"].get("AsyncInferenceConfig")
        assert (queue is not None) == (kind == "asynchronous")
        assert queue is None or queue["OutputConfig"]["S3OutputPath"] == "s3://bucket/answers/answers"
    pytest.importorskip("botocore", reason="make test-launchers installs boto3")
    from botocore.loaders import Loader
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    model = ServiceModel(Loader().load_service_model("sagemaker", "service-2"))
    validator = ParamValidator()
    for method, values in found.items():
        operation = "".join(part.title() for part in method.split("_"))
        report = validator.validate(values, model.operation_model(operation).input_shape)
        assert not report.has_errors(), report.generate_report()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["real-time", "--output", "s3://bucket/x"], "--output: real-time needs archive"),
        (["asynchronous"], "--output: asynchronous needs archive, output"),
        (["batch", "--output", "s3://bucket/x"], "--input: batch needs archive, input, output"),
        (["batch", "--output", "s3://bucket/x", "--input", "s3://bucket/a.fasta"], "cut by line; give .csv or .jsonl"),
        (["asynchronous", "--output", "answers"], "--output answers: must be an s3:// URI; upload it first"),
        (["real-time", "--region", "mars-1"], "region=mars-1 is not in images.yaml; give --image"),
        (["real-time", "--instance-count", "0"], "--instance-count 0 is outside 1 to 100"),
        (["real-time", "--name", "x" * 64], "has 64 characters; the service takes at most 63"),
    ],
)
def test_what_would_fail_later(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy.main([words[0], *WORDS, *words[1:], "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("deploy.py: error: ") and message in line


def test_a_dry_run_needs_no_sdk_and_no_torch() -> None:
    lacks = "import sys; sys.modules.update(boto3=None, torch=None, sagemaker=None); import deploy; "
    code = f"{lacks}sys.exit(deploy.main({['real-time', *WORDS, '--dry-run']!r}))"
    folder = ROOT / "launchers" / "sagemaker"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "create_endpoint" in json.loads(done.stdout), done.stderr


@pytest.mark.launchers
@pytest.mark.parametrize("kind", deploy.KINDS)
def test_moto_takes_it(kind: str, account: None) -> None:
    import boto3

    words = [kind, *WORDS, *PLACES[kind], "--instance-type", "ml.g4dn.xlarge"]  # moto knows no newer one
    assert deploy.main(words) == 0
    client: Any = boto3.client("sagemaker", region_name="us-west-2")
    if kind == "batch":
        known = client.describe_transform_job(TransformJobName="esm-neuron-1")
        assert known["TransformOutput"]["S3OutputPath"] == "s3://bucket/answers"
    else:
        assert client.describe_endpoint(EndpointName="esm-neuron-1")["EndpointConfigName"] == "esm-neuron-1"
