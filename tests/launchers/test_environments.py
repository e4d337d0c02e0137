"""Starting a job from real environments: boto3 alone, and version 3 of SageMaker's SDK. Neither has torch.

Version 2 is that of this environment: test_service.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job import Job
from request import create_training_job

pytestmark = pytest.mark.launchers

Described = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[2]
SDK_3 = "sagemaker-train==1.27.0"
UV = shutil.which("uv") or str(ROOT / ".venv" / "bin" / "uv")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment made as the page says."""
    folder = tmp_path_factory.mktemp("launcher") / "venv"
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    install(folder / "bin" / "python", "--no-deps", "-e", str(ROOT))
    install(folder / "bin" / "python", "-r", str(ROOT / "launchers" / "sagemaker" / "requirements.txt"))
    return folder / "bin" / "python"


def install(python: Path, *what: str) -> None:
    """Install as `pip install` does."""
    subprocess.run([UV, "pip", "install", "--quiet", "--python", python, *what], check=True)


def run(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this repository without what this process has on its path."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "launchers" / "sagemaker")}
    return subprocess.run([python, *words], env=env, capture_output=True, text=True, check=False)


def words_of(values: dict[str, Any]) -> list[str]:
    """A job's flags for the command line."""
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_boto3_alone_starts_and_looks_after_a_job(python: Path, described: Described, server: None) -> None:
    import boto3

    values = described()
    assert run(python, "-c", "import torch").returncode == 1 and run(python, "-c", "import sagemaker").returncode == 1
    done = run(python, str(ROOT / "launchers" / "sagemaker" / "launch.py"), *words_of(values), "--wait")
    assert done.returncode == 0, done.stderr
    known = boto3.client("sagemaker", region_name="us-west-2").describe_training_job(TrainingJobName="job-1")
    wanted = create_training_job(Job(**values))
    assert known["HyperParameters"] == wanted["HyperParameters"]
    done = run(python, str(ROOT / "launchers" / "sagemaker" / "jobs.py"), "status", "job-1", "--region", "us-west-2")
    assert done.stdout.startswith("job-1: Completed"), done.stderr


def test_the_sdks_model_trainer_sends_the_same_request(python: Path, described: Described, server: None) -> None:
    """But for the time behind its name, and the field for the profiler, which it does not have."""
    install(python, SDK_3)
    vpc = {"subnets": "[subnet-1]", "security_groups": "[sg-1]", "output_kms_key": "key"}
    image = {"image": "123456789012.dkr.ecr.us-west-2.amazonaws.com/esm:1", "baked": "true"}
    jobs = [
        {"spot": "true", "max_run": "3600", "max_wait": "7200", "tags.team": "proteins", "retries": "5"},
        {**vpc, "instance_count": "2", "encrypt_traffic": "true", "keep_alive": "600"},
        {**image, "network_isolation": "true", "model": "s3://bucket/esm2/"},
    ]
    lists = [words_of({**described(), **changes}) for changes in jobs]
    done = run(python, str(ROOT / "tests" / "launchers" / "programs" / "model_trainer.py"), json.dumps(lists))
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("REQUESTS "))
    sent = json.loads(line.removeprefix("REQUESTS "))
    import launch

    assert len(sent) == len(jobs)
    for request, words in zip(sent, lists, strict=True):
        wanted = create_training_job(launch.parse(words)[0])
        assert request.pop("TrainingJobName").startswith(wanted.pop("TrainingJobName") + "-")
        assert wanted.pop("ProfilerConfig") == {"DisableProfiler": True}
        assert request == wanted
