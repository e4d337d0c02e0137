"""What a job's container would install, by pip itself, over the packages of the Neuron image (image-neuron.txt)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stage
from job import Job
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

Described = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[2]
IMAGE = {
    canonicalize_name(name): version
    for name, version in (line.split("==") for line in stage.IMAGES["neuron"].read_text().split())
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The interpreter of an environment that says of itself that it has the image's packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "image"], check=True)
    (site,) = (tmp_path / "image").glob("lib/python*/site-packages")
    for name, version in IMAGE.items():
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return tmp_path / "image" / "bin" / "python"


@pytest.mark.launchers
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the image has Python 3.11; with it: make test-launchers")
def test_pip_adds_what_the_lock_says_and_leaves_torch_and_protobuf(
    image: Path, described: Described, tmp_path: Path
) -> None:
    source = stage.stage(tmp_path / "source", Job(**described()))
    words = [sys.executable, "-m", "pip", "--python", image, "install", "--dry-run", "--quiet", "--report", "-"]
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [*words, "-r", "requirements.txt"], cwd=source, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    metadata = [one["metadata"] for one in json.loads(done.stdout)["install"]]
    added = {canonicalize_name(one["name"]): one["version"] for one in metadata}
    assert {"transformers", "peft", "optimum-neuron", "datasets"} <= set(added)
    assert set(added).isdisjoint({"torch", "torch-xla", "protobuf", "torchvision", "sagemaker-training", "boto3"})
    assert Version(added["numpy"]).major == Version(IMAGE["numpy"]).major
    lock = {
        name: str(next(iter(entry.specifier)).version)
        for name, line in stage.locked("neuron")
        if (entry := Requirement(line)).marker is None or entry.marker.evaluate({"python_full_version": "3.11.9"})
    }
    assert {name: lock.get(name) for name in added} == added, "a job that starts again later gets the same"
