"""A tuning job: its trials are the job of launch.py, and what a trial would refuse is refused before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tune
from job import Job
from request import create_training_job

Described = Callable[..., dict[str, Any]]
RANGES = ["--range", "lr=1e-5:1e-3", "--range", "adapter.r=4:32", "--range", "adapter.dropout=0,0.1"]
SEARCH = ["--objective", "mcc", *RANGES, "--trials", "10", "--parallel", "3"]


def words_of(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_a_dry_run_prints_the_request(described: Described, capsys: pytest.CaptureFixture[str]) -> None:
    values = described(instance_type="ml.g5.2xlarge", max_run=3600)
    words = [*words_of(values), "--tags.team", "proteins", *SEARCH, "--max-dollars", "15.2"]
    assert tune.main([*words, "--dry-run", "--", "--log.every", "5"]) == 0
    out, err = capsys.readouterr()
    sent = json.loads(out)
    assert "cost: at most 15.20 dollars, 10 trials; each:" in err
    assert sent["HyperParameterTuningJobConfig"]["HyperParameterTuningJobObjective"] == {
        "Type": "Maximize",
        "MetricName": "valid:mcc",
    }
    ranges = sent["HyperParameterTuningJobConfig"]["ParameterRanges"]
    assert ranges == {
        "ContinuousParameterRanges": [
            {"Name": "optim.lr", "MinValue": "1e-5", "MaxValue": "1e-3", "ScalingType": "Logarithmic"}
        ],
        "IntegerParameterRanges": [{"Name": "adapter.r", "MinValue": "4", "MaxValue": "32", "ScalingType": "Linear"}],
        "CategoricalParameterRanges": [{"Name": "adapter.dropout", "Values": ["0", "0.1"]}],
    }
    job = create_training_job(Job(**values, overrides=("--log.every", "5")))
    trial = sent["TrainingJobDefinition"]
    assert trial.pop("StaticHyperParameters") == job["HyperParameters"]
    assert trial == {key: value for key, value in job.items() if key in trial}
    assert set(job) - set(trial) == {"TrainingJobName", "HyperParameters", "CheckpointConfig", "ProfilerConfig"}
    assert sent["Tags"] == [{"Key": "team", "Value": "proteins"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--range", "optim.lr=1e-3:1e-5"], "--range optim.lr=1e-3:1e-5: 1e-3 is not below 1e-5"),
        (["--range", "optim.lr"], "--range optim.lr: write NAME=FROM:TO or NAME=A,B,C"),
        (["--range", "optim.rate=1:2"], "unknown setting optim.rate"),
        (["--range", "adapter.kind=lora,lorra"], "adapter.kind"),
        (["--range", "data.sequence_column=my column,seq"], "'my column' is not plain"),
        (["--range", "lr=1e-5:1e-3", "--wait"], "--wait: a tuning job is not followed"),
        (["--trials", "2", "--range", "lr=1:2"], "give 1 <= --parallel <= --trials <= 750"),
        (["--max-dollars", "5", "--range", "lr=1e-5:1e-3"], "--max-dollars 5 is below 364.80, 10 trials of 36.48 each"),
        (["--name", "a" * 33, "--range", "lr=1e-5:1e-3"], "has 33 characters; a tuning job's at most 32"),
        (["--spot", "true", "--range", "lr=1e-5:1e-3"], "trials keep no checkpoints and train: no --spot"),
        (["--range", "lr=1e-5:1e-3", "--", "--optim.lr", "1"], "--range optim.lr: also given after --"),
        ([], "no --range; give at least one"),
    ],
)
def test_what_would_fail_later(
    described: Described, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {name: value for name, value in described(instance_type="ml.g5.2xlarge").items() if name != "name"}
    search = ["--objective", "mcc", "--trials", "10", "--parallel", "3"]
    assert tune.main([*words_of(values), *search, *changes]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("tune.py: error: ") and message in said[0]


@pytest.mark.launchers
def test_moto_takes_it(described: Described, account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    import service

    def small(folder: Path, job: Job) -> Path:
        folder.mkdir(parents=True)
        return folder

    monkeypatch.setattr(service, "stage", small)
    assert tune.main([*words_of(described(name="esm-neuron-1")), *SEARCH]) == 0
    client = boto3.client("sagemaker", region_name="us-west-2")
    known = client.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName="esm-neuron-1")
    assert known["TrainingJobDefinition"]["RoleArn"] == "arn:aws:iam::123456789012:role/trainer"
    keys = [one["Key"] for one in boto3.client("s3").list_objects_v2(Bucket="bucket")["Contents"]]
    assert "esm/esm-neuron-1/source/sourcedir.tar.gz" in keys
