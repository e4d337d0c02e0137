"""Commands as another user: folders that may only be read, those of others, and what is closed.

As root, the processes give up the rights by which root passes over permissions, and what is "ours" is `nobody`'s.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.finished import LABELS, finish
from helpers.weights import state_of, tiny, write_safetensors_folder

ROOT = Path(__file__).parents[2]
NOBODY = 65534
IS_ROOT = os.geteuid() == 0
ROWS = [f"p{i},MKVLAAGIVG{'ACDEFGHIKL'[i % 10] * 5},{LABELS[i % 2]}" for i in range(16)]
TRAIN = "train --model.name tiny --model.init random --loop.max_steps 1 --loop.packs_per_step 1 "
TRAIN += "--loop.packs_per_device 1 --log.tensorboard false --data.train in.csv"


def give_up_rights() -> None:
    """Take CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER from what this process will run."""
    for right in (1, 2, 3):
        if ctypes.CDLL(None, use_errno=True).prctl(24, right, 0, 0, 0):  # PR_CAPBSET_DROP
            raise OSError(ctypes.get_errno(), "rights cannot be given up")


def may_give_up() -> bool:
    """Whether this process can run another without root's rights; some containers keep root from it."""
    try:
        subprocess.run(["true"], preexec_fn=give_up_rights if IS_ROOT else None, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


pytestmark = pytest.mark.skipif(not may_give_up(), reason="root may not give up its rights here; run as another user")

RUN_EACH = """
import contextlib, io, json, sys
from esm_neuron import cli
answers = []
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(words.split())
    answers.append((code, said.getvalue()))
print(json.dumps(answers))
"""
"""Commands one after the other, so that libraries are imported once."""


def as_other(folder: Path, commands: list[str], umask: int = 0o077) -> dict[str, tuple[int, str]]:
    """Command -> its exit code and stderr, in `folder`, with no HOME, no TMPDIR, LC_ALL=C and a umask."""
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "TMPDIR", "LANG")}
    env |= {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, json.dumps(commands)],
        cwd=folder, env=env, umask=umask, capture_output=True, check=False, timeout=900, text=True, errors="replace",
        preexec_fn=give_up_rights if IS_ROOT else None,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    answers = [(code, said) for code, said in json.loads(done.stdout.splitlines()[-1])]
    return dict(zip(commands, answers, strict=True))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of ours that others may read and not write: data, a finished run, a model, predictions."""
    folder = tmp_path_factory.mktemp("ours")
    (folder / "in.csv").write_text("\n".join(["id,sequence,label", *ROWS]) + "\n")
    (folder / "one.fasta").write_text(">one\nMKVLAAGIVG\n")
    (folder / "variants.csv").write_text("variant\nM1A\n")
    write_safetensors_folder(state_of().items(), tiny(), folder / "model")
    finish(folder / "run", "mean", "lora")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
        if IS_ROOT:
            os.chown(path, NOBODY, NOBODY)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def theirs(ours: Path, tmp_path: Path) -> Path:
    """A folder that the other user may write, with links to what is ours."""
    for path in ours.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


READS = {
    "data check in.csv": None,
    "plan --data.train in.csv --model.name model": None,
    f"{TRAIN} --output out": "out/result.json",
    "evaluate --model run --input in.csv --output m.json": "m.json",
    "predict --model run --input in.csv --output p.csv": "p.csv",
    "embed --model model --input in.csv --output e.parquet": "e.parquet",
    "score --model model --input variants.csv --wild-type one.fasta --output s.csv": "s.csv",
    "export --model run --output exported": "exported/model.safetensors",
    "doctor --backend cpu": None,
}
"""Command of a user who may read what is ours and write to a folder of their own -> what it writes."""


def test_what_may_only_be_read_is_enough_to_work_from(theirs: Path) -> None:
    for words, (code, said) in as_other(theirs, list(READS)).items():
        assert code == 0, (words, said)
        written = READS[words]
        if written is not None:
            assert (theirs / written).stat().st_mode & 0o077 == 0, words  # as the umask says
    assert not [path for path in theirs.iterdir() if path.name.endswith(".tmp")]


REFUSED = {
    f"{TRAIN} --output out": "output=out cannot be written (Permission denied); choose another --output",
    f"{TRAIN} --output run --checkpoint.resume auto": "output=run cannot be written (Permission denied)",
    f"{TRAIN} --output {{theirs}} --data.cache cache": "data.cache=cache cannot be written (Permission denied)",
    "evaluate --model run --input in.csv --output m.json": "Permission denied",
    "predict --model run --input in.csv --output p.csv": "cannot be written (Permission denied)",
    "embed --model model --input in.csv --output e.parquet": "cannot be written (Permission denied)",
    "score --model model --input variants.csv --wild-type one.fasta --output s.csv": "(Permission denied)",
    "export --model run --output exported": "Permission denied",
    "report run": "Permission denied",
    "predict --model run --input in.csv --output run/p.csv": "cannot be written (Permission denied)",
}
"""Command within a folder that may not be written -> what is said."""


def test_what_may_not_be_written_is_one_line_and_stays(ours: Path, tmp_path: Path) -> None:
    before = sorted(str(path) for path in ours.rglob("*"))
    wanted = {words.format(theirs=tmp_path / "new"): message for words, message in REFUSED.items()}
    for words, (code, said) in as_other(ours, list(wanted)).items():
        lines = [line for line in said.splitlines() if line.startswith("esm-neuron: error: ")]
        assert code == 2 and len(lines) == 1, (words, said)
        assert wanted[words] in lines[0], words
    assert sorted(str(path) for path in ours.rglob("*")) == before


CLOSED = [
    "data check closed.csv",
    "predict --model run --input closed.csv --output p.csv",
    "embed --model closed --input in.csv --output e.parquet",
    "predict --model closed --input in.csv --output p.csv",
    "report closed",
    f"{TRAIN.replace('in.csv', 'closed.csv')} --output out",
    "plan --config closed.yaml",
    "score --model model --input closed.csv --wild-type one.fasta --output s.csv",
]


def test_what_may_not_be_read_is_one_line(theirs: Path) -> None:
    for name in ("closed.csv", "closed.yaml"):
        (theirs / name).write_text("id,sequence,label\n")
        (theirs / name).chmod(0)
    (theirs / "closed").mkdir(mode=0o700)
    (theirs / "closed").chmod(0)
    answers = as_other(theirs, CLOSED)
    (theirs / "closed").chmod(0o700)
    for words, (code, said) in answers.items():
        assert code == 2 and said.count("esm-neuron: error: ") == 1, (words, said)
