"""The package as people get it: versions, pins, the demo's data, and the commands of the Makefile."""

from __future__ import annotations

import gzip
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import esm_neuron
from esm_neuron.backends.neuron_sdk import DRIVER, IMAGE, LAST, PINNED, Sdk

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"


def pins(name: str) -> dict[str, set[str]]:
    """Package -> the versions a constraints file pins it to (several where they differ by Python)."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "constraints" / name).read_text().splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[\w+\])?==([^\s;\\]+)", line)
        if match:
            found.setdefault(match[1].lower().replace("_", "-"), set()).add(match[2])
    return found


def demo_table() -> pd.DataFrame:
    return pd.read_csv(DEMO / "localization.tsv.gz", sep="\t", dtype=str, keep_default_na=False)


def fasta(path: Path) -> dict[str, str]:
    records = [record.split("\n", 1) for record in path.read_text().split(">")[1:]]
    return {header: body.replace("\n", "") for header, body in records}


def test_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("esm-neuron") == esm_neuron.__version__


def requirements(*extras: str) -> list[Requirement]:
    """What the package asks for: itself (""), or one of its extras."""
    every = [Requirement(text) for text in importlib.metadata.requires("esm-neuron") or []]
    return [
        requirement
        for requirement in every
        if ("" in extras and requirement.marker is None)
        or any(extra and requirement.marker and requirement.marker.evaluate({"extra": extra}) for extra in extras)
    ]


LOCKED = {
    "current.txt": ("", "cuda", "tests", "dev"),
    "trn1.txt": ("", "xla", "cuda", "sagemaker", "tests", "nxd-tests", "launchers-tests"),
}
"""Lock -> what it holds."""


@pytest.mark.parametrize(("name", "extras"), [*LOCKED.items(), ("neuron.txt", ("neuron",)), ("trn1.txt", ("neuron",))])
def test_every_requirement_is_pinned_within_its_range(name: str, extras: tuple[str, ...]) -> None:
    """General packages in the two locks, the Neuron wheels in neuron.txt, which has not all that goes with them."""
    found, asked = pins(name), requirements(*extras)
    wheels = {canonicalize_name(package) for package in PINNED.python}
    if name == "trn1.txt":
        asked = [requirement for requirement in asked if canonicalize_name(requirement.name) not in wheels]
    if name == "neuron.txt":
        asked = [requirement for requirement in asked if canonicalize_name(requirement.name) in found]
        assert wheels <= {canonicalize_name(requirement.name) for requirement in asked}
    for requirement in asked:
        versions = found.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement} has no pin in {name}"
        assert all(requirement.specifier.contains(version) for version in versions), (
            f"{requirement} is pinned to {versions}"
        )


def test_the_package_itself_asks_for_ranges() -> None:
    """So it installs beside what is there; only what belongs to one device is pinned."""
    pinned = re.compile(r"==|~=")
    assert not [str(r) for r in requirements("", "cuda", "sagemaker") if pinned.search(str(r.specifier))]
    known = {lane: {name: max(map(Version, found)) for name, found in pins(lane).items()} for lane in LOCKED}
    for name in ("torch", "transformers", "peft", "numpy", "pandas"):
        assert known["current.txt"][name] > known["trn1.txt"][name]


PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin")
PYTHONS = {"current.txt": ("3.10", "3.11", "3.12", "3.13", "3.14"), "trn1.txt": ("3.10", "3.11", "3.12")}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("name", "python"), [(name, python) for name in PYTHONS for python in PYTHONS[name]])
def test_a_lock_has_wheels_for_each_platform_and_python(name: str, python: str, platform: str) -> None:
    """Resolved as on that machine, from wheels alone; torch's are for macOS 14 and later."""
    uv = ROOT / ".venv" / "bin" / "uv"
    if not uv.is_file():
        pytest.skip("no uv in .venv; make install")
    options = f"--quiet --no-header --no-annotate --only-binary :all: --constraints constraints/{name}"
    words = [uv, "pip", "compile", "pyproject.toml", *options.split()]
    # `--python` names any that runs: uv would first look here for the version that is resolved for
    words += ["--python-platform", platform, "--python-version", python, "--python", sys.executable]
    env = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode and re.search(r"dns error|[Ff]ailed to fetch|[Cc]onnect", done.stderr):
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    resolved = dict(line.split("==") for line in done.stdout.split() if "==" in line)
    assert {canonicalize_name(r.name) for r in requirements("")} <= resolved.keys()
    assert all(version in pins(name)[canonicalize_name(package)] for package, version in resolved.items())


def test_the_constraints_files_of_trn1_agree() -> None:
    general, neuron, held = pins("trn1.txt"), pins("neuron.txt"), pins("trn1.in")
    shared = general.keys() & neuron.keys()
    assert {"torch", "torch-xla", "transformers", "peft", "numpy", "pandas", "optimum-neuron"} <= shared
    assert {name: neuron[name] for name in shared} == {name: general[name] for name in shared}
    assert {name: general[name] for name in held} == held


@pytest.mark.parametrize(("name", "sdk"), [("neuron.txt", PINNED), ("neuron-2.31.txt", LAST)])
def test_pins_are_those_of_a_release_of_the_sdk(name: str, sdk: Sdk) -> None:
    found = pins(name)
    assert {package: found[package] for package in sdk.python} == {p: {version} for p, version in sdk.python.items()}


def test_the_last_sdks_pins_are_whole_and_else_those_of_trn1() -> None:
    """They are installed without requirements, for those of optimum-neuron ask for torch 2.8."""
    found, general = pins("neuron-2.31.txt"), pins("trn1.txt")
    assert {canonicalize_name(requirement.name) for requirement in requirements("")} <= found.keys()
    for package in found.keys() - LAST.python.keys():
        assert found[package] <= general[package], package


def test_the_page_of_trn1_names_what_the_table_of_releases_has() -> None:
    page = (ROOT / "docs" / "ec2-trn1.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.startswith("| 2.")]
    assert [row[:5] for row in rows] == [[sdk.version, *sdk.host.values()] for sdk in (PINNED, LAST)]
    installed = [dict(re.findall(r"(aws-neuronx-[\w-]+)=([\d.]+)", block)) for block in page.split("```sh")]
    last = {name: version for name, version in LAST.host.items() if name != DRIVER}  # the AMI's own
    assert [block for block in installed if block] == [dict(PINNED.host), last]
    image = re.escape(IMAGE.rpartition("/")[2])
    for file in ("docs/ec2-trn1.md", "launchers/Dockerfile", "launchers/sagemaker/images.yaml"):
        assert re.search(image + "$", (ROOT / file).read_text(), re.M), f"{file} names another image than {IMAGE}"


def test_neuron_pins_refuse_placeholders() -> None:
    """The general index has empty packages of these names, at versions 0.1 and 1.0."""
    neuron = pins("neuron.txt")
    for name in ("torch-neuronx", "neuronx-cc", "libneuronxla", "neuronx-distributed"):
        (version,) = neuron[name]
        assert Version(version) not in (Version("0.1"), Version("1.0"))
        assert name not in pins("trn1.txt")


@pytest.mark.parametrize("name", ["current.txt", "trn1.txt", "uv.txt"])
def test_constraints_are_hashed_and_name_no_index(name: str) -> None:
    text = (ROOT / "constraints" / name).read_text()
    blocks = re.split(r"\n(?=[a-z0-9])", text.split("make lock\n", 1)[1])
    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text
    assert "find-links" not in text


def test_demo_data() -> None:
    assert (DEMO / "localization.tsv.gz").stat().st_size <= 3_000_000
    table = demo_table()
    assert list(table.columns) == ["entry", "sequence", "label", "split", "cluster30", "leaky"]
    assert len(table) == 7183
    assert table.entry.is_unique
    assert table.label.value_counts().to_dict() == {"Membrane": 4718, "Cytoplasm": 2465}
    clean = table[table.leaky == "false"]
    assert clean.split.value_counts().to_dict() == {"train": 5759, "test": 862, "valid": 396}
    assert set(table.leaky) == {"true", "false"}
    assert set("".join(table.sequence)) <= set("ACDEFGHIKLMNPQRSTUVWXY")


def test_clean_rows_share_no_cluster_with_training() -> None:
    table = demo_table()
    training = set(table.cluster30[table.split == "train"])
    held_out = table[(table.split != "train") & (table.leaky == "false")]
    assert len(held_out) == 1258
    assert not held_out.cluster30.isin(training).any()


def test_demo_data_is_a_reproducible_gzip() -> None:
    """No time stamp and no file name in the header: the same rows give the same bytes."""
    data = (DEMO / "localization.tsv.gz").read_bytes()
    assert data[3:8] == bytes(5)
    assert gzip.decompress(data).endswith(b"\n")


def test_unknown_proteins_are_clean_test_rows_without_labels() -> None:
    unknown = fasta(DEMO / "unknown.fasta")
    table = demo_table().set_index("entry")
    rows = table.loc[list(unknown)]
    assert list(rows.sequence) == list(unknown.values())
    assert set(rows.split) == {"test"}
    assert set(rows.leaky) == {"false"}
    assert rows.label.value_counts().to_dict() == {"Cytoplasm": 6, "Membrane": 6}


def write_wheel(folder: Path, version: str) -> None:
    """A torch of nothing but a name."""
    home = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{home}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{home}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{home}/RECORD", "")


@pytest.mark.parametrize("offered", [True, False])
def test_the_cpu_build_of_torch_is_taken_where_the_index_has_one(offered: bool, tmp_path: Path) -> None:
    uv, lock, target = ROOT / ".venv" / "bin" / "uv", ROOT / "constraints" / "current.txt", tmp_path / "lock.txt"
    if not uv.is_file():
        pytest.skip("no uv in .venv; make install")
    versions = re.findall(r"^torch==([\w.]+)", lock.read_text(), re.M)
    for version in versions:
        write_wheel(tmp_path, version + ("+cpu" if offered else ""))
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    index = {"UV_NO_INDEX": "1", "UV_FIND_LINKS": str(tmp_path), "VIRTUAL_ENV": str(tmp_path / "venv")}
    words = [sys.executable, ROOT / "tools" / "cpu_lock.py", lock, target, uv]
    said = subprocess.run(words, env=os.environ | index, capture_output=True, text=True, check=True).stdout
    made, before = target.read_text(), lock.read_text()
    if not offered:
        assert "TORCH=cpu: the package index has no CPU build of torch" in said and made == before
        return
    assert not said and re.findall(r"^torch==(\S+)", made, re.M) == [f"{version}+cpu" for version in versions]
    changed = {line for line in before.splitlines() if line not in set(made.splitlines())}
    hashes = before.split("\ntorch==")[1:]
    assert all(line.startswith(("torch==", "    --hash")) for line in changed) and len(hashes) == len(versions)


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", makefile, re.M)[1].replace("\\\n", " ").split())  # type: ignore[index]
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in shown.splitlines() if line.startswith("  ")} == targets
    assert [line.split()[0] for line in shown.splitlines() if line[:1].strip()] == ["Daily", "Suites:", "Pages,"]
    assert {"install", "demo", "test", "lint", "type", "bench", "test-nxd", "test-gpu", "test-trn1"} <= targets


def test_make_names_the_cure_without_a_python(tmp_path: Path) -> None:
    """In a copy of the Makefile, so that nothing is installed."""
    (tmp_path / "constraints").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints/current.txt", "constraints/uv.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(
        ["make", "--no-print-directory", "install", "PYTHON="],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "make PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


SUITE_TESTS = """
import pytest
@pytest.mark.{suite}
def test_in_the_suite():
    pass
def test_everywhere():
    pass
"""


@pytest.mark.parametrize("suite", ["nxd", "trn1"])
def test_a_suite_skips_unasked_and_fails_where_it_cannot_run(suite: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_suite.py").write_text(SUITE_TESTS.format(suite=suite))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
        command += ["-p", "no:cacheprovider", *arguments, str(tmp_path)]
        environment = {key: value for key, value in os.environ.items() if key != "NXD_SRC"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    unasked = run()
    assert unasked.returncode == 0
    assert "1 passed, 1 skipped" in unasked.stdout
    assert f"make test-{suite}" in unasked.stdout
    asked = run("-m", suite)
    assert asked.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"make test-{suite}" in asked.stderr
