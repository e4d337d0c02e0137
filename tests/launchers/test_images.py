"""The images of launchers/, really built, by buildah: no Docker engine is needed, nor a registry of images.

Their bases are stood in for by Debian (debootstrap) with a Python of this machine. The Neuron base has what pip and our
file see of the real one: the names and versions of its packages, and its entrypoint, which makes a host's name by
compiling a file whose name is relative to `/`. Packages come from the index that pip uses here, some 9 GB, and 30 GB of
disk are needed for a while.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from helpers.processes import wait_for
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from stage import IMAGES

import esm_neuron
from esm_neuron.data.parquet import read_table

pytestmark = pytest.mark.images

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "constraints" / "current.txt"
PATIENCE = 3600
"""Seconds that a step may take on a busy machine with a slow line."""
LIBRARIES = "ca-certificates,libssl3,libffi8,libsqlite3-0,liblzma5,libbz2-1.0,libreadline8,zlib1g,libncursesw6,libuuid1"
"""What a Python needs."""
(PYTHON,) = re.findall(r"BASE=python:([\d.]+)", (ROOT / "launchers" / "Dockerfile.general").read_text())
COMPILER = "gcc,libc6-dev,jq"
SOMEBODY = 4321
"""A user that no image knows."""
TRAIN_ONCE = ["train", "my.csv", "--model", "mini", "--adapter", "lora", "--max_steps", "1", "--output", "runs/mine"]
EMBED = ["embed", "--model", "mini", "--input", "p.fasta", "--output", "vectors.parquet"]
PROTEIN = ">p1\nMKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQ\n"
HOSTNAME = r"""#define _GNU_SOURCE
#include <string.h>
int gethostname(char *name, size_t size) { strncpy(name, PLACEHOLDER, size); return 0; }
"""
START = """#!/bin/bash
if [ "$1" = train ]; then
    host=$(jq .current_host /opt/ml/input/config/resourceconfig.json)
    sed -i "s/PLACEHOLDER/$host/" changehostname.c
    gcc -shared -fPIC -o libchangehostname.so changehostname.c
    LD_PRELOAD=/libchangehostname.so train
else
    eval "$@"
fi
"""
TRAIN = "#!/usr/bin/env python\nimport socket\nprint('host', socket.gethostname())\n"


def buildah(*words: object, fails: bool = False) -> str:
    """Run buildah, return what it prints on stdout; where it `fails`, all that it prints."""
    done = subprocess.run(
        ["buildah", *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert (done.returncode != 0) == fails, f"buildah {words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr if fails else done.stdout.strip()


@dataclass(frozen=True)
class Image:
    """An image by its name, and a container of it."""

    name: str
    container: str

    def config(self) -> dict[str, object]:
        """What docker would read: WorkingDir, Entrypoint, Env."""
        found: dict[str, object] = json.loads(buildah("inspect", "--type", "image", self.name))["Docker"]["config"]
        return found

    def command(
        self, *words: object, volume: str = "", user: int = 0, folder: str = "", entrypoint: str = ""
    ) -> list[str]:
        """`docker run --user USER -v VOLUME -w FOLDER --entrypoint ENTRYPOINT IMAGE WORDS`; with a user HOME is /."""
        more = ["--hostname", "localhost"]  # Docker gives a container's name an address, for which torchrun asks
        more += ["--user", f"{user}:{user}", "--env", "HOME=/"] if user else []
        more += [word for one in volume.split() for word in ("--volume", one)]
        more += ["--workingdir", folder] if folder else []
        start = [entrypoint] if entrypoint else self.config()["Entrypoint"] or []
        assert isinstance(start, list)
        return ["run", "--isolation", "chroot", *more, self.container, "--", *start, *map(str, words)]

    def run(self, *words: object, fails: bool = False, **how: Any) -> str:
        """Run `command`; return what it prints."""
        return buildah(*self.command(*words, **how), fails=fails)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A store of images of its own, which goes with the tests."""
    folder = tmp_path_factory.mktemp("images")
    own = {"XDG_RUNTIME_DIR": str(folder / "run"), "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf")}
    (folder / "run").mkdir()
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    for driver in ("overlay", "vfs"):  # overlay does not work over itself; vfs copies every layer
        lines = [f'{name}root = "{folder}/{name}-{driver}"' for name in ("graph", "run")]
        (folder / "storage.conf").write_text("\n".join(["[storage]", f'driver = "{driver}"', *lines, ""]))
        if subprocess.run(["buildah", "info"], capture_output=True, check=False).returncode == 0:
            break
    yield
    buildah("rm", "--all")
    buildah("rmi", "--all", "--force")
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def debian(storage: None) -> str:
    """The name of an image of this machine's Debian."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text(), re.M))
    container = buildah("from", "scratch")
    words = ["debootstrap", "--variant=minbase", f"--include={LIBRARIES},{COMPILER}", release["VERSION_CODENAME"]]
    done = subprocess.run(
        [*words, buildah("mount", container)], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return committed(container, "debian")


def committed(container: str, name: str) -> str:
    """Make an image of a container, and end the container; return the image's name."""
    buildah("umount", container)
    buildah("commit", "--quiet", container, f"localhost/{name}")
    buildah("rm", container)
    return f"localhost/{name}"


def with_python(image: str, version: str) -> tuple[str, Path]:
    """A container of an image with a Python of this machine in /usr/local, as in Docker's images; and its folder."""
    prefix, name = python_of_this_machine(version), f"python{version}"
    container = buildah("from", image)
    root = Path(buildah("mount", container))
    local, left_out = root / "usr" / "local", shutil.ignore_patterns("site-packages", "test", "__pycache__")
    for folder in ("lib", "include"):
        shutil.copytree(prefix / folder / name, local / folder / name, ignore=left_out)
    for library in (prefix / "lib").glob("libpython*.so*"):
        shutil.copy2(library, local / "lib")
    shutil.copy2(prefix / "bin" / name, local / "bin")
    (local / "bin" / "python").symlink_to(name)
    (root / "etc" / "pip.conf").write_text(pip_settings(prefix / "bin" / name, root))
    inside(container, f"ldconfig && {name} -m ensurepip && ln -s pip3 /usr/local/bin/pip")
    return container, root


def python_of_this_machine(version: str) -> Path:
    """The folder of the first Python of a version that runs: in PATH, or pyenv's."""
    name = f"python{version}"
    found = [shutil.which(name), *Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}")]
    for one in filter(None, found):
        words = [one, "-c", "import sys, pip; print(sys.base_prefix)"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return Path(done.stdout.strip())
    pytest.skip(f"no {name} with pip in PATH or of pyenv; with one: make test-images")


def inside(container: str, script: str) -> str:
    return buildah("run", "--isolation", "chroot", container, "--", "sh", "-ec", script)


def pip_settings(python: Path, root: Path) -> str:
    """Where this machine's pip finds packages, as a file for an image; a file of certificates goes with it."""
    said = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    found = dict(re.findall(r"^[^=]*\.(cert|index-url|trusted-host|timeout)='(.*)'$", said, re.M))
    if "cert" in found:
        shutil.copy2(found["cert"], root / "etc" / "pip-cert.pem")
        found["cert"] = "/etc/pip-cert.pem"
    found["retries"] = "0"  # the Neuron SDK's index, which its pins name, may be out of reach: not five times a package
    return "\n".join(["[global]", *(f"{name} = {value}" for name, value in found.items()), ""])


def build(name: str, file: str, base: str, *words: str) -> Image:
    """Build one of our files over a base."""
    name = f"localhost/{name}"
    args = [word for one in (f"BASE={base}", *words) for word in ("--build-arg", one)]
    buildah("bud", "--isolation", "chroot", "-f", ROOT / "launchers" / file, "-t", name, *args, ROOT)
    return Image(name, buildah("from", name))


@pytest.fixture(scope="module")
def python(debian: str) -> str:
    """The name of a stand-in for Docker's python:3.13-slim."""
    return committed(with_python(debian, PYTHON)[0], "python")


@pytest.fixture(scope="module")
def general(python: str) -> Image:
    """The image for CPUs and GPUs, with the server."""
    return build("general", "Dockerfile.general", python, "EXTRA=serve")


@pytest.fixture(scope="module")
def neuron(debian: str) -> Image:
    """The image for trn1."""
    container, root = with_python(debian, "3.11")
    listed = [*IMAGES["neuron"].read_text().split(), *neuron_packages()]
    needed = closure("esm-neuron") | {"pip", "setuptools"}
    real = [one for one in listed if (name := canonicalize_name(one.split("==")[0])) in needed and not of_torch(name)]
    inside(container, "pip install --quiet --no-cache-dir --no-deps --root-user-action ignore " + " ".join(real))
    (site,) = root.glob("usr/local/lib/python3.11/site-packages")
    for one in set(listed) - set(real):
        name, version = one.split("==")
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "RECORD").touch()
    (root / "changehostname.c").write_text(HOSTNAME)
    for name, text in {"start_with_right_hostname.sh": START, "train": TRAIN}.items():
        (root / "usr" / "local" / "bin" / name).write_text(text)
        (root / "usr" / "local" / "bin" / name).chmod(0o755)
    entrypoint = json.dumps(["bash", "-m", "start_with_right_hostname.sh"])
    buildah("config", "--workingdir", "/", "--entrypoint", entrypoint, "--cmd", "/bin/bash", container)
    return build("trn1", "Dockerfile", committed(container, "neuron"))


def neuron_packages() -> list[str]:
    """The Neuron SDK's own packages, which image-neuron.txt leaves out: no index that can be reached has them."""
    text = (ROOT / "constraints" / "neuron.txt").read_text()
    return re.findall(r"^(?:torch-neuronx|neuronx-cc|libneuronxla|neuronx-distributed)==.*$", text, re.M)


def closure(package: str, seen: set[str] | None = None) -> set[str]:
    """The names of all that a package needs in this environment, itself among them."""
    seen = set() if seen is None else seen
    name = canonicalize_name(package)
    if name not in seen:
        seen.add(name)
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                closure(requirement.name, seen)
    return seen


def of_torch(name: str) -> bool:
    """Whether it comes with torch: too large to be fetched once more."""
    return name in ("torch", "torch-xla", "triton") or name.startswith(("nvidia-", "cuda-"))


def torch_of_this_environment() -> str:
    """Volumes that give an image the torch of the lane that runs these tests."""
    site = Path(metadata.distribution("torch").locate_file(""))
    there = [site / name for name in ("torch", "torchgen", "functorch", "nvidia", "triton") if (site / name).is_dir()]
    return " ".join(f"{one}:/usr/local/lib/python3.11/site-packages/{one.name}:ro" for one in there)


def versions(image: Image) -> dict[str, str]:
    """What pip says is installed."""
    found = json.loads(
        buildah("run", "--isolation", "chroot", image.container, "--", "pip", "list", "--format", "json")
    )
    return {canonicalize_name(one["name"]): one["version"] for one in found}


def proteins(folder: Path, owner: int) -> Path:
    """A folder of a user's with one protein."""
    folder.mkdir()
    (folder / "p.fasta").write_text(PROTEIN)
    os.chown(folder, owner, owner)
    folder.chmod(0o755)
    return folder


def assert_embedded(folder: Path) -> None:
    """The vector of the one protein, as wide as the model."""
    table = read_table(folder / "vectors.parquet")
    assert table["id"].to_pylist() == ["p1"] and len(table["embedding"][0]) == 192


def test_the_version_and_an_answer_for_a_user_that_the_image_does_not_know(general: Image, tmp_path: Path) -> None:
    """By `--user`, as the page says, so that files belong to who asked; nothing but the volume can be written."""
    assert general.run("--version") == esm_neuron.__version__
    volume = f"{proteins(tmp_path / 'mine', SOMEBODY)}:/work"
    general.run(*EMBED, volume=volume, user=SOMEBODY)
    assert_embedded(tmp_path / "mine")
    assert {path.stat().st_uid for path in (tmp_path / "mine").glob("vectors.*")} == {SOMEBODY}


def test_a_volume_of_somebody_else_is_named_in_one_line(general: Image, tmp_path: Path) -> None:
    volume = f"{proteins(tmp_path / 'theirs', SOMEBODY)}:/work"
    said = general.run(*EMBED, volume=volume, user=SOMEBODY + 1, fails=True)
    assert "error: output=vectors.parquet" in said and "Permission denied" in said and "Traceback" not in said
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["p.fasta"]


def labelled(folder: Path) -> Path:
    """A folder of somebody's with a table of proteins and labels."""
    proteins(folder, SOMEBODY)
    rows = [f"p{n},{'ACDEFGHIKLMNPQRSTVWY' * 2},{'ab'[n % 2]}" for n in range(40)]
    (folder / "my.csv").write_text("\n".join(["id,sequence,label", *rows, ""]))
    return folder


def test_several_processes_train_in_one_container(general: Image, tmp_path: Path) -> None:
    """By torchrun as the entrypoint, as the page says: two ranks of one run, whose main rank alone writes."""
    folder = labelled(tmp_path / "several")
    words = ["--nproc_per_node=2", "-m", "esm_neuron.cli", *TRAIN_ONCE, "--loop.packs_per_device"]
    how: dict[str, Any] = {"volume": f"{folder}:/work", "user": SOMEBODY, "entrypoint": "torchrun"}
    assert "on 2 data-parallel ranks" in general.run(*words, 8, **how, fails=True)
    general.run(*words, 4, **how)
    lines = [json.loads(line) for line in (folder / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "grad_norm" in line] == [1]
    assert (folder / "runs" / "mine" / "result.json").stat().st_uid == SOMEBODY


@pytest.fixture
def cpu_index(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """An index like PyTorch's of CPU wheels, with an empty torch of the lock's version; its address, the version."""
    requirements = map(Requirement, re.findall(r"^torch==[^\\\n]*", LOCK.read_text(), re.M))
    here = {"python_full_version": f"{PYTHON}.0", "python_version": PYTHON}
    (locked,) = [str(one.specifier) for one in requirements if one.marker is None or one.marker.evaluate(here)]
    version = f"{locked.removeprefix('==')}+cpu"
    (tmp_path / "torch").mkdir()
    with zipfile.ZipFile(tmp_path / "torch" / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        info = f"torch-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", version
        server.shutdown()


def test_an_index_of_cpu_wheels_leaves_cudas_libraries_out(python: str, cpu_index: tuple[str, str]) -> None:
    """pip takes the lock's torch from INDEX, all else from where it finds packages."""
    address, version = cpu_index
    found = versions(build("cpu", "Dockerfile.general", python, f"INDEX={address}"))
    assert found["torch"] == version and found["esm-neuron"] == esm_neuron.__version__
    assert not [name for name in found if of_torch(name) and name != "torch"]


def test_the_server_answers_in_its_container(general: Image, tmp_path: Path) -> None:
    """Trained, started and asked in the image, by a user that it does not know."""
    volume = f"{labelled(tmp_path / 'served')}:/work"
    general.run(*TRAIN_ONCE, volume=volume, user=SOMEBODY)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    serve = general.command("serve", "runs/mine", "--port", port, volume=volume, user=SOMEBODY)
    server = subprocess.Popen(["buildah", *serve], start_new_session=True)
    try:
        wait_for(lambda: listens(port), PATIENCE, [server])
        body = json.dumps({"sequences": ["MKTAYIAKQR"]}).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            (prediction,) = json.load(answer)["predictions"]
        assert prediction["label"] in ("a", "b")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(PATIENCE)


def listens(port: int) -> bool:
    """Whether there is a server on a port of this machine, whose network the container shares."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_the_neuron_image_keeps_its_bases_packages(neuron: Image) -> None:
    """torch, protobuf and the Neuron packages above all; numpy is the one that our extra pins."""
    before = {canonicalize_name(n): v for n, v in (one.split("==") for one in IMAGES["neuron"].read_text().split())}
    after = versions(neuron)
    changed = {name: (version, after.get(name)) for name, version in before.items() if after.get(name) != version}
    assert not {"torch", "torch-xla", "torchvision", "protobuf", "boto3", "sagemaker-training"} & set(changed)
    assert {one.split("==")[0] for one in neuron_packages()} <= set(after)


def test_a_host_keeps_its_name_where_the_image_starts_and_nowhere_else(neuron: Image, tmp_path: Path) -> None:
    """The entrypoint is the base's; from another folder it does not find its file, and all hosts share a name."""
    (tmp_path / "resourceconfig.json").write_text('{"current_host": "algo-7"}')
    volume = f"{tmp_path}:/opt/ml/input/config"
    elsewhere = neuron.run("train", volume=volume, folder="/opt/esm-neuron")
    assert elsewhere.startswith("host ") and elsewhere != "host algo-7"
    assert neuron.run("train", volume=volume) == "host algo-7"


def test_the_neuron_image_answers_and_finds_what_pods_run(neuron: Image, tmp_path: Path) -> None:
    """On the CPU, with the torch of this lane, which is the base's version."""
    volume = f"{proteins(tmp_path / 'in', 0)}:/in {torch_of_this_environment()}"
    neuron.run("esm-neuron", *EMBED, "--backend", "cpu", volume=volume, folder="/in")
    assert_embedded(tmp_path / "in")
    words = ["launchers/torchrun.sh", "--dry-run", "--config", "configs/localization_650m_trn1.yaml"]
    assert "esm_neuron" in neuron.run(*words, folder="/opt/esm-neuron")
