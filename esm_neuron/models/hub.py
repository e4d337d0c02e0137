"""`model.name: auto`: Meta's smallest ESM-2 where the Hugging Face hub gives it, else `mini`, which is in the package.

The hub is asked by a process of its own, because nothing in a process ends a look-up of names or a download that hangs.
What is fetched goes to the hub's cache; an interrupted download is gone on with, and checked as a whole.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from esm_neuron.config import AUTO_MODEL, ModelConfig, require
from esm_neuron.files import parse_json, sha256
from esm_neuron.models.shapes import SHAPES

SHAPE, SPARE = "esm2_t6_8M", "mini"
"""The shape that `auto` stands for, and the one whose weights take its place."""
ANSWER_SECONDS = 5
"""How long the hub may take to answer at all."""
START_SECONDS = 60
"""How long a process may take to start on a busy machine, before it asks."""
STALL_SECONDS = 30.0
"""How long a download may bring nothing."""
LONGEST_SECONDS = 900.0
"""How long a download may take, judged by how fast it has been."""
MOST_BYTES = 1 << 30
"""Largest file that is fetched without being asked for by name; the 8M's has 31 MB."""
LOOK_SECONDS = 1.0
TOLD_SECONDS = 10.0
"""Between lines on how far a download is."""
FILES = ("config.json", "model.safetensors")
_ASK = """
import json, signal, sys
from huggingface_hub import HfApi
name, revision, seconds = sys.argv[1:]
signal.alarm(int(seconds))
info = HfApi().model_info(name, revision=revision or None, timeout=float(seconds), files_metadata=True)
file = {each.rfilename: each for each in info.siblings}["model.safetensors"]
print(json.dumps({"commit": info.sha, "bytes": file.size, "sha256": file.lfs.sha256 if file.lfs else None}))
"""
_FETCH = """
import fcntl, hashlib, sys
from pathlib import Path
from huggingface_hub import constants, hf_hub_url, snapshot_download
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
constants.DOWNLOAD_CHUNK_SIZE = 1 << 18  # what is written at once, and lost where a download breaks off
name, revision, commit, digest, size, *files = sys.argv[1:]
blob = Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"), "blobs", digest)
if digest:
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(digest + ".part")
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not blob.exists() and file.tell() < int(size):
            url = hf_hub_url(name, files[-1], revision=commit)
            http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=int(size))
        file.flush()
        if blob.exists():
            part.unlink()
        elif hashlib.sha256(part.read_bytes()).hexdigest() == digest:
            part.replace(blob)
        else:
            part.unlink()
            sys.exit("ValueError: what came has not the SHA-256 that the hub names; it is removed, and fetched anew")
print(snapshot_download(name, revision=revision, allow_patterns=files))
"""
"""Fetches the weights on top of what an earlier call left of them, which the hub's client does not do, and checks them;
then has the client lay out the snapshot around them."""

Log = Callable[[str], None]


class HubError(Exception):
    """Why the hub gave nothing; the run goes on without it."""


@dataclass(frozen=True)
class _Answer:
    """What the hub says of a repository."""

    commit: str
    size: int
    """Bytes of model.safetensors."""
    sha256: str | None

    def is_sound(self) -> bool:
        """Return whether commit and checksum, which become names of files, are hashes, and the size is sensible."""
        hashes = re.fullmatch(r"[0-9a-f]{40}", self.commit) and re.fullmatch(r"[0-9a-f]{64}", self.sha256 or "0" * 64)
        return hashes is not None and 0 < self.size <= MOST_BYTES


def choose(cfg: ModelConfig, earlier: ModelConfig | None, log: Log) -> ModelConfig:
    """Return the model that `auto` means here, with its commit and checksum; another `cfg` as it is.

    A run that goes on keeps the model of its `earlier` configuration, whether or not the hub answers now.
    """
    if cfg.name != AUTO_MODEL:
        return cfg
    if cfg.init == "random":
        return replace(cfg, name=SHAPE)
    if earlier is not None and earlier.name != AUTO_MODEL:
        return replace(cfg, name=earlier.name, revision=earlier.revision, sha256=earlier.sha256)
    name = str(SHAPES[SHAPE].hub_id)
    try:
        return _from_hub(replace(cfg, name=name), log)
    except HubError as failure:
        require(
            cfg.revision is None and cfg.sha256 is None,
            f"model.name=auto: no {name} here ({failure}), and model.revision or model.sha256 asks for it; leave these "
            "out to start from mini, or try again where the hub answers",
        )
        log(f"model.name=auto: no {name} here ({failure}), so training starts from {SPARE}")
        return replace(cfg, name=SPARE)


def _from_hub(cfg: ModelConfig, log: Log) -> ModelConfig:
    """Return the model with commit and checksum, fetched if it is not cached; raise HubError where it cannot be."""
    try:
        answer = _ask(cfg)
    except HubError as failure:
        folder = _cached(cfg.name, cfg.revision)
        if folder is None:
            raise
        log(f"model.name=auto: {cfg.name}, commit {folder.name[:12]}, from the hub's cache ({failure})")
        return replace(cfg, revision=folder.name, sha256=cfg.sha256 or sha256(folder / FILES[1]))
    folder = _cached(cfg.name, answer.commit)
    if folder is None:
        log(f"model.name=auto: fetching {cfg.name}, {answer.size / 1e6:.0f} MB, once; --model.name mini needs none")
        began = time.monotonic()
        folder = _fetch(cfg, answer, log)
        log(f"{cfg.name}: fetched in {time.monotonic() - began:.0f} s, commit {answer.commit[:12]}")
    else:
        log(f"model.name=auto: {cfg.name}, commit {answer.commit[:12]}, as cached")
    found = sha256(folder / FILES[1])
    if answer.sha256 not in (None, found):
        place = (folder / FILES[1]).resolve()
        raise HubError(f"{place} has SHA-256 {found}, the hub's has {answer.sha256}; delete it")
    return replace(cfg, revision=answer.commit, sha256=cfg.sha256 or found)


def _ask(cfg: ModelConfig) -> _Answer:
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE):
        raise HubError("offline, by HF_HUB_OFFLINE")
    child = _start(_ASK, cfg.name, cfg.revision or "", str(ANSWER_SECONDS))
    try:
        said, wrong = child.communicate(timeout=START_SECONDS + ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        _end(child)
    if child.returncode < 0:  # by its own alarm
        raise HubError(f"the hub did not answer within {ANSWER_SECONDS} s")
    if child.returncode:
        raise HubError(_reason(wrong))
    with suppress(ValueError, TypeError, KeyError):
        told = parse_json(said)
        answer = _Answer(told["commit"], told["bytes"], told["sha256"])
        if answer.is_sound():
            return answer
    raise HubError("the hub's answer is not what one says of a model")


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the folder of a snapshot in the hub's cache, None where it is not whole. Asks no hub."""
    from huggingface_hub import snapshot_download

    with suppress(OSError, ValueError):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES), local_files_only=True))
        if all((folder / file).is_file() for file in FILES):
            return folder
    return None


def _fetch(cfg: ModelConfig, answer: _Answer, log: Log) -> Path:
    """Fetch a snapshot and say how far it is; raise HubError where it stalls, would take too long, or fails."""
    name = cfg.name
    before, began = _held(name), time.monotonic()
    # by its branch, so that the cache knows it by that name when the hub is away
    child = _start(_FETCH, name, cfg.revision or "main", answer.commit, answer.sha256 or "", str(answer.size), *FILES)
    grown = told = began
    got = 0
    while child.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            child.wait(LOOK_SECONDS)
        now, held = time.monotonic(), _held(name) - before
        grown, got = (now, held) if held > got else (grown, got)
        left = (answer.size - got) * (now - began) / got if got else 0.0
        stalled = now - grown > STALL_SECONDS + (0 if got else START_SECONDS)
        if stalled or (now - began > STALL_SECONDS and left > LONGEST_SECONDS):
            _end(child)
            took = "nothing more came" if stalled else f"{left / 60:.0f} more minutes were needed"
            raise HubError(f"{got / 1e6:.1f} of {answer.size / 1e6:.0f} MB came, then {took}; the next run goes on")
        if got and now - told > TOLD_SECONDS:
            told = now
            log(f"{name}: {got / 1e6:.0f} of {answer.size / 1e6:.0f} MB, about {left:.0f} s left")
    said, wrong = child.communicate()
    folder = Path(said.decode().strip() or "none")
    if child.returncode or not all((folder / file).is_file() for file in FILES):
        raise HubError(_reason(wrong))
    if folder.name != answer.commit:
        raise HubError(f"it changed from commit {answer.commit} to {folder.name} meanwhile")
    return folder


def _held(name: str) -> int:
    """Return the bytes of a repository in the hub's cache, half of a file included."""
    from huggingface_hub.constants import HF_HUB_CACHE

    def sizes() -> Iterator[int]:
        for file in Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "blobs").glob("*"):
            with suppress(OSError):  # renamed at this moment
                yield file.stat().st_size

    return sum(sizes())


def _start(program: str, *words: str) -> subprocess.Popen[bytes]:
    # without xet, whose downloads neither show in the cache while they come nor are gone on with
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # our own program and no shell
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()


def _reason(stderr: bytes) -> str:
    """Return the line of a traceback that names the error."""
    lines = stderr.decode(errors="replace").splitlines()
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Unavailable|Enabled)\b", line)]
    return named[-1][:200] if named else "the hub gave nothing"
