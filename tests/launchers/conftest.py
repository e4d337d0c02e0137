"""What tests of the launchers share. The SageMaker launcher's modules lie beside each other and in no package."""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from esm_neuron.config import TrainConfig, settings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launchers" / "sagemaker"))

Toy = Callable[..., TrainConfig]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`make test-launchers` runs all of this folder, what `make test` runs too among it."""
    if config.option.markexpr == "launchers":
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker("launchers")


@pytest.fixture
def described(toy: Toy, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The values of a job that nothing is wrong with, the 650M on ml.trn1.32xlarge; changes come on top."""

    def describe(config: dict[str, dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
        shape = {
            "model": {"name": "facebook/esm2_t33_650M_UR50D", "init": "pretrained"},
            "loop": {"packs_per_step": 128, "packs_per_device": 1},
        }
        path = tmp_path / "run.yaml"
        path.write_text(settings.dump(toy(**{**shape, **(config or {})})))
        values = {
            "config": path,
            "instance_type": "ml.trn1.32xlarge",
            "output": "s3://bucket/esm",
            "role": "arn:aws:iam::123456789012:role/trainer",
            "region": "us-west-2",
            "name": "job-1",
        }
        return {**values, **changes}

    return describe


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that open nothing."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")


@pytest.fixture
def account(credentials: None) -> Iterator[None]:
    """moto in this process, with a bucket."""
    import boto3
    import moto

    with moto.mock_aws():
        region = {"LocationConstraint": "us-west-2"}
        boto3.client("s3", region_name="us-west-2").create_bucket(Bucket="bucket", CreateBucketConfiguration=region)
        yield


@pytest.fixture
def server(credentials: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """moto over HTTP, for this process and others: what botocore really writes on the wire."""
    import boto3
    from moto.server import ThreadedMotoServer

    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    started.start()
    host, port = started.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    region = {"LocationConstraint": "us-west-2"}
    boto3.client("s3", region_name="us-west-2").create_bucket(Bucket="bucket", CreateBucketConfiguration=region)
    yield
    started.stop()


Shown = Callable[..., None]


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Shown:
    """Keeps what a test saw where a file is named: LAUNCHERS_SHOWN=benchmarks/results/nodes.json make test-launchers.

    `shown(weights={"whole": SHA256, ...}, stopped=LOG)`: of a log (text), the lines that say what went wrong or on.
    """

    def keep(weights: dict[str, str], **logs: str) -> None:
        path = Path(os.environ.get("LAUNCHERS_SHOWN") or os.devnull)
        before = json.loads(path.read_text()) if path.is_file() and path.stat().st_size else {}
        lines = {name: filter(TELLING.search, text.splitlines()) for name, text in logs.items()}
        said = {name: [re.sub(r"/\S*/", "", line)[:240] for line in found] for name, found in lines.items()}
        before[request.node.name] = {"sha256 of the final weights": weights, "log": said}
        path.write_text(json.dumps(before, indent=2) + "\n")

    return keep


TELLING = re.compile(r"SIGTERM|resumed after|watchdog\)|a peer has|requeue|failure of node|state set|^packets", re.I)
