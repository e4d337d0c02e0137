"""What doctor says of this machine, and of machines that lack something."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest

from esm_neuron import cli
from esm_neuron.backends import survey
from esm_neuron.backends.neuron_env import PACKAGES
from esm_neuron.backends.survey import Lack
from esm_neuron.config import AdapterConfig, LoopConfig, ParallelConfig, TrainConfig
from esm_neuron.planning import doctor
from esm_neuron.planning.doctor import environment, lacks, missing_packages, render


def test_the_environment_says_who_set_what() -> None:
    env = {"NEURON_FUSE_SOFTMAX": "0", "NEURON_CC_FLAGS": "--auto-cast=all"}
    whole = AdapterConfig(kind="none")
    cfg = TrainConfig(seed=7, loop=LoopConfig(precision="bf16"), parallel=ParallelConfig(zero1=False), adapter=whole)
    rows = {row.name: row for row in environment(cfg, env)}
    assert (rows["NEURON_FUSE_SOFTMAX"].value, rows["NEURON_FUSE_SOFTMAX"].set_by) == ("0", "user")
    assert rows["NEURON_CC_FLAGS"].set_by == "both"
    assert (rows["NEURON_CC_FLAGS"].value or "").startswith("--auto-cast=all --model-type=transformer")
    seed = rows["NEURON_RT_STOCHASTIC_ROUNDING_SEED"]
    assert (seed.value, seed.set_by) == ("7", "esm-neuron")
    assert (rows["FI_PROVIDER"].value, rows["FI_PROVIDER"].set_by) == (None, "nobody")
    assert env == {"NEURON_FUSE_SOFTMAX": "0", "NEURON_CC_FLAGS": "--auto-cast=all"}


REQUIRED = [
    "torch==2.8.*", "peft==0.17.*", 'torch_xla==2.8.1; extra == "xla"', 'torch_xla==2.8.1; extra == "neuron"',
    'torch-neuronx==2.8.0; extra == "neuron"', 'neuronx-cc==2.21; extra == "neuron"',
]  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages of a made-up machine, to be changed by the test."""
    found = {"torch": "2.8.0", "peft": "0.17.1", "torch_xla": "2.8.1", "torch-neuronx": "2.8.0", "neuronx-cc": "2.21"}
    monkeypatch.setattr(doctor, "installed_version", found.get)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: REQUIRED)
    return found


def test_nothing_is_missing_where_all_is_there(installed: dict[str, str]) -> None:
    assert [missing_packages(extra, "") for extra in ("", "xla", "neuron")] == [[], [], []]


def test_a_missing_package_is_named_with_its_cure(installed: dict[str, str]) -> None:
    del installed["torch_xla"]
    assert missing_packages("xla", "pip install -e '.[xla]'") == [
        Lack("torch_xla is not installed", "pip install -e '.[xla]'")
    ]
    assert lacks("cpu") == []


def test_a_wrong_version_is_named(installed: dict[str, str]) -> None:
    installed["peft"] = "0.18.0"
    assert [lack.what for lack in lacks("cpu")] == ["peft 0.18.0 is not ==0.17.*"]
    assert [lack.what for lack in lacks("xla")] == ["peft 0.18.0 is not ==0.17.*"]


@pytest.mark.parametrize("version", ["0.1", "1.0"])
def test_a_placeholder_is_named(installed: dict[str, str], version: str) -> None:
    installed["neuronx-cc"] = version
    (lack,) = missing_packages("neuron", "")
    assert lack.what == f"neuronx-cc {version} is an empty placeholder of the general index"
    assert "constraints/neuron.txt" in lack.cure


def test_a_tree_that_was_never_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", absent)
    assert [lack.what for lack in missing_packages("", "")] == ["esm-neuron itself is not installed"]


def test_neuron_cannot_run_without_devices(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    monkeypatch.setattr(survey, "neuron_cores", lambda: 0)
    assert any("/dev/neuron0" in lack.what for lack in lacks("neuron"))


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(survey.XlaSurvey, "devices", lambda self: "CPU:0")
    assert cli.main(["doctor", "--backend", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["versions"]["torch"].startswith("2.8")
    assert set(PACKAGES) <= set(said["versions"])
    assert said["lacks"]["cpu"] == []
    assert cli.main(["doctor", "--backend", "neuron"]) == 1
    text = capsys.readouterr().out
    assert "/dev/neuron" in text and "constraints/neuron.txt" in text
    assert "cpu                  can run here" in text
    assert cli.main(["doctor", "--backend", "wrong"]) == 2
    assert "backend=wrong is unknown; use one of cpu, cuda, xla, neuron" in capsys.readouterr().err


def test_the_report_marks_placeholders() -> None:
    found = doctor.Diagnosis({"neuronx-cc": "1.0", "torch": "2.8.0"}, {}, (), {"cpu": ()})
    assert "neuronx-cc           1.0 (EMPTY PLACEHOLDER)" in render(found)
