"""What doctor says of this machine, and of machines that lack something."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from esm_neuron import cli
from esm_neuron.backends import survey
from esm_neuron.backends.neuron_sdk import (
    COLLECTIVES,
    DRIVER,
    LAST,
    PACKAGES,
    PINNED,
    RUNTIME,
    SDKS,
    fitting,
    host_versions,
)
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


def test_the_last_sdk_brings_a_torch_of_its_own(installed: dict[str, str]) -> None:
    """An environment of constraints/neuron-2.31.txt: its versions are right together, and only together."""
    installed |= {"torch": "2.9.0", "torch_xla": "2.9.0"}
    assert "torch 2.9.0 is not ==2.8.*" in [lack.what for lack in missing_packages("", "")]
    installed |= LAST.python
    assert [missing_packages(extra, "") for extra in ("", "xla", "neuron")] == [[], [], []]
    installed["neuronx-cc"] = PINNED.python["neuronx-cc"]
    assert [lack.what for lack in missing_packages("neuron", "")] == ["neuronx-cc 2.21.33363.0 is not ==2.21"]


class Host:
    """The files of a made-up trn1.2xlarge."""

    def __init__(self, root: Path, driver: str) -> None:
        self.root = root
        for folder in ("dev", "sys/module/neuron", "var/lib/dpkg", "opt/aws/neuron/lib"):
            (root / folder).mkdir(parents=True)
        (root / "dev/neuron0").touch()
        (root / "sys/module/neuron/version").write_text(driver + "\n")

    def dpkg(self, **versions: str) -> None:
        blocks = [
            f"Package: aws-neuronx-{name.replace('_', '-')}\nStatus: install ok installed\n"
            f"Version: {version}-dd5879008\n"
            "Description: a library\n of the runtime: it has a colon"
            for name, version in versions.items()
        ]
        removed = "Package: aws-neuronx-tools\nStatus: deinstall ok config-files\nVersion: 2.26.14.0"
        (self.root / "var/lib/dpkg/status").write_text("\n\n".join([*blocks, removed]) + "\n")

    def library(self, link: str, version: str) -> None:
        """As the packages lay them: libnrt.so.1 -> libnrt.so.2.28.23.0."""
        file = self.root / f"opt/aws/neuron/lib/{link.partition('.')[0]}.so.{version}"
        file.touch()
        (file.parent / link).symlink_to(file.name)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> Callable[[str], Host]:
    monkeypatch.setattr(survey.NeuronSurvey, "root", tmp_path)
    monkeypatch.setattr(survey.platform, "python_version_tuple", lambda: ("3", "11", "7"))
    return lambda driver: Host(tmp_path, driver)


def host_lacks() -> list[str]:
    return [f"{lack.what}; {lack.cure}" for lack in survey.NeuronSurvey().lacks({})]


def test_neuron_cannot_run_without_devices(host: Callable[[str], Host]) -> None:
    assert [lack.what for lack in survey.NeuronSurvey().lacks({})] == ["there is no /dev/neuron0"]
    assert survey.NeuronSurvey().devices() == "none (no /dev/neuron*)"


def test_the_software_of_a_host_is_read_from_its_files(host: Callable[[str], Host]) -> None:
    made = host("2.24.7.0")
    assert host_lacks() == [
        f"{name} is not installed; sudo apt-get install {name}={version}; see docs/ec2-trn1.md"
        for name, version in ((RUNTIME, "2.28.23.0"), (COLLECTIVES, "2.28.27.0"))
    ]
    made.library("libnrt.so.1", "2.28.23.0")
    made.library("libnccom.so.2", "2.28.27.0")
    assert host_lacks() == []
    made.dpkg(runtime_lib="2.29.40.0", collectives="2.29.41.0")
    found = {DRIVER: "2.24.7.0", RUNTIME: "2.29.40.0", COLLECTIVES: "2.29.41.0"}
    assert host_versions(made.root) == found, "a package that was removed is none"
    assert survey.NeuronSurvey().devices() == "2 cores (trn1.2xlarge); driver 2.24.7.0 fits SDK 2.26.1"


@pytest.mark.parametrize(
    ("driver", "runtime", "sdks", "lack"),
    [
        ("2.27.4.0", "2.28.23.0", "2.26.1, 2.27.1, 2.28.1, 2.29.1", None),
        ("2.28.0.0", "2.32.31.0", "2.26.1, 2.27.1, 2.28.1, 2.29.1, 2.30.0", None),
        ("2.30.2.0", "2.33.10.0", "2.31.1", None),
        (
            "2.31.7.0", "2.28.23.0", "2.31.1",
            "runtime 2.28.23.0 does not start over driver 2.31.7.0: driver 2.29 needs runtime 2.33 or later; install "
            "aws-neuronx-dkms=2.24.7.0 on the host, or runtime 2.33.10.0 (SDK 2.31.1)",
        ),
        (
            "2.26.10.0", "2.32.31.0", "2.26.1, 2.27.1, 2.28.1",
            "runtime 2.32.31.0 does not start over driver 2.26.10.0: runtime 2.32 needs driver 2.27 or later; install "
            "aws-neuronx-dkms=2.24.7.0 on the host, or runtime 2.30.51.0 (SDK 2.28.1)",
        ),
    ],
)  # fmt: skip
def test_driver_and_runtime_must_fit(
    host: Callable[[str], Host], driver: str, runtime: str, sdks: str, lack: str | None
) -> None:
    host(driver).dpkg(runtime_lib=runtime, collectives=runtime)
    assert host_lacks() == ([] if lack is None else [lack])
    assert survey.NeuronSurvey().devices() == f"2 cores (trn1.2xlarge); driver {driver} fits SDK {sdks}"


def test_a_missing_library_is_asked_for_as_the_driver_needs_it(host: Callable[[str], Host]) -> None:
    host("2.31.7.0")
    assert (
        host_lacks()[0] == f"{RUNTIME} is not installed; sudo apt-get install {RUNTIME}=2.33.10.0; see docs/ec2-trn1.md"
    )


def test_every_release_runs_over_its_own_driver() -> None:
    for sdk in SDKS:
        assert sdk in fitting(sdk.host[DRIVER])
    assert fitting("2.20.28.0") == []


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(survey.XlaSurvey, "devices", lambda self: "CPU:0")
    assert cli.main(["doctor", "--backend", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["versions"]["torch"] == version("torch")
    assert set(PACKAGES) <= set(said["versions"])
    assert said["lacks"]["cpu"] == []
    assert cli.main(["doctor", "--backend", "neuron"]) == 1
    text = capsys.readouterr().out
    assert "/dev/neuron" in text and "constraints/neuron.txt" in text
    assert "cpu " not in text
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("this machine\n  cpu  ") and "  cpu          can run here: --backend cpu\n" in text
    assert "see esm-neuron doctor --backend neuron" in text and "NEURON_CC_FLAGS" not in text and text.count("\n") < 24
    assert cli.main(["doctor", "--backend", "wrong"]) == 2
    assert "backend=wrong is unknown; use one of cpu, cuda, xla, neuron" in capsys.readouterr().err


def test_the_report_marks_placeholders() -> None:
    found = doctor.Diagnosis({"neuronx-cc": "1.0", "torch": "2.8.0"}, {}, (), {"cpu": ()})
    assert "neuronx-cc              1.0 (EMPTY PLACEHOLDER)" in render(found)
