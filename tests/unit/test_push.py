"""`export --push-to-hub` against a hub on loopback, with the hub's own client, in processes of their own.

Large files go by the hub's older protocol, LFS: xet, the newer one, has no server but the hub's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.toys import Toy
from helpers.upload_hub import TOKEN, UploadHub, taking

from esm_neuron.training import run

NAME = "owner/localization"
PUSH = """
import sys
from pathlib import Path
from esm_neuron.errors import EsmNeuronError
from esm_neuron.inference import push
try:
    push.check(sys.argv[2])
    push.push(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["public"], print)
except EsmNeuronError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def upload_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    hub = UploadHub()
    with taking(hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As `export` leaves one."""
    made = tmp_path / "merged"
    made.mkdir()
    (made / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights" * 1000)
    return made


def called(*words: str) -> tuple[int, str]:
    """Exit code of a Python, and all that it said, in which the token is never."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=os.environ)
    said = done.stdout + done.stderr
    assert TOKEN not in said and "Traceback" not in said, said
    return done.returncode, said


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_uploads_a_run_with_its_card_to_a_private_repository(
    toy: Toy, upload_hub: UploadHub, tmp_path: Path
) -> None:
    cfg = toy("run", loop={"max_steps": 1}, log={"baselines": False})
    run.train(cfg)
    words = ["-m", "esm_neuron.cli", "export", "--model", cfg.output, "--output", str(tmp_path / "out")]
    code, said = called(*words, "--push-to-hub", NAME)
    assert code == 0, said
    assert upload_hub.private == {NAME: True} and upload_hub.files[NAME] == files(tmp_path / "out")
    assert {"README.md", "config.json", "model.safetensors"} <= set(upload_hub.files[NAME])
    assert "uploaded: " in said.splitlines()[-1]


def test_what_is_uploaded_is_said_before_and_where_it_is_after(folder: Path, upload_hub: UploadHub) -> None:
    for _ in range(2):  # then to the repository that is there
        code, said = called("-c", PUSH, str(folder), NAME)
        assert code == 0, said
    assert upload_hub.files[NAME] == files(folder)
    address = os.environ["HF_ENDPOINT"]
    sizes = "README.md 0.0 MB, config.json 0.0 MB, model.safetensors 0.0 MB"
    assert said.splitlines()[0] == f"uploading to {address}/{NAME} (private): {sizes}"
    assert f"uploaded: {address}/{NAME}/commit/" in said


def test_public_only_where_it_is_asked_for(folder: Path, upload_hub: UploadHub) -> None:
    assert called("-c", PUSH, str(folder), NAME, "public")[0] == 0
    assert upload_hub.private == {NAME: False}
    upload_hub.files[NAME].clear()
    code, said = called("-c", PUSH, str(folder), NAME)
    assert code == 1 and f"--push-to-hub {NAME}: it is there and public; give --public, or name another" in said
    assert upload_hub.files[NAME] == {}


def test_public_is_not_said_of_a_repository_that_is_private(folder: Path, upload_hub: UploadHub) -> None:
    assert called("-c", PUSH, str(folder), NAME)[0] == 0
    upload_hub.files[NAME].clear()
    code, said = called("-c", PUSH, str(folder), NAME, "public")
    assert code == 1 and f"--push-to-hub {NAME}: it is there and private; leave out --public, or name another" in said
    assert upload_hub.files[NAME] == {}


@pytest.mark.parametrize("mode", ["full", "forbidden"])
def test_an_upload_that_fails_leaves_the_folder_and_says_how_to_go_on(
    folder: Path, upload_hub: UploadHub, mode: str
) -> None:
    upload_hub.mode, before = mode, files(folder)
    code, said = called("-c", PUSH, str(folder), NAME)
    assert code == 1 and files(folder) == before
    assert said.splitlines()[-1].startswith(f"--push-to-hub {NAME} failed (")
    assert (
        f"the folder is complete and, if the repository is new or private: hf upload {NAME} {folder} . --private"
        in said.splitlines()[-1]
    )
    upload_hub.mode = "whole"
    code, said = called("-m", "huggingface_hub.cli.hf", "upload", NAME, str(folder), ".", "--private")
    assert code == 0, said
    assert upload_hub.files[NAME] == before


@pytest.mark.parametrize(
    ("variables", "name", "cure"),
    [
        ({"HF_TOKEN": ""}, NAME, "no token of the hub here; run: hf auth login, or set HF_TOKEN"),
        ({"HF_HUB_OFFLINE": "1"}, NAME, "HF_HUB_OFFLINE is set; unset it"),
        ({}, "localization", "name it OWNER/NAME"),
        ({}, "owner/a--b", "name it OWNER/NAME"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_the_hub_is_asked(
    folder: Path,
    upload_hub: UploadHub,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    name: str,
    cure: str,
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    code, said = called("-c", PUSH, str(folder), name)
    assert code == 1 and said.startswith(f"--push-to-hub {name}: ") and cure in said
    assert upload_hub.asked == []
