"""What comes from elsewhere runs no code, leads out of no folder and fills no memory; secrets are not passed on."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.datasets import download
from helpers.rows import read_rows

from esm_neuron import cli
from esm_neuron.config import DataConfig, ModelConfig, TaskConfig, TrainConfig
from esm_neuron.config.rules import check_values
from esm_neuron.config.settings import parse
from esm_neuron.errors import ConfigError, DataError
from esm_neuron.inference.serving import _Request
from esm_neuron.redact import MOST, Lines, RedactedRecord, RedactingFormatter, redact, shown

ROOT = Path(__file__).parents[2]
BOMBS = ROOT / "tests" / "helpers" / "bombs.py"

# --- no code


def calls(folder: str) -> Iterator[tuple[Path, str, dict[str, object]]]:
    """File, dotted name and constant keywords of every call of the sources; an import of a module counts as one."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, f"import {alias.name}", {}) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield path, f"import {node.module}", {}
            elif isinstance(node, ast.Call):
                words = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
                yield path, ast.unparse(node.func), words


@pytest.mark.parametrize("folder", ["esm_neuron", "launchers", "benchmarks", "examples"])
def test_nothing_that_is_read_can_run(folder: str) -> None:
    runs = {f"import {name}" for name in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")}
    runs |= {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pd.read_pickle"}
    found = list(calls(folder))
    assert len(found) > 50
    for path, name, words in found:
        assert name not in runs, f"{path}: {name}"
        assert not name.endswith((".extract", ".unpack_archive")), f"{path}: {name}"
        if name.endswith(".extractall"):  # which refuses what would leave the folder, and links, devices and rights
            assert words.get("filter") == "data", f"{path}: {name}"
        assert words.get("trust_remote_code", False) is False, path
        assert words.get("allow_pickle", False) is False, path
        assert words.get("shell", False) is False, path
        if name == "torch.load":
            assert path.name == "convert.py" and words["weights_only"] is True


# --- no way out of a folder


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "sub/x.arrow", "..\\x.arrow", 3])
def test_a_saved_dataset_names_files_beside_it(tmp_path: Path, name: object) -> None:
    rows = {"id": ["P1"], "sequence": ["MKV"], "label": ["in"]}
    Dataset.from_dict({**rows, "id": ["SECRET"]}).save_to_disk(tmp_path / "other")
    shutil.copy(next((tmp_path / "other").glob("*.arrow")), tmp_path / "secret.arrow")
    Dataset.from_dict(rows).save_to_disk(tmp_path / "d")
    assert read_rows(tmp_path / "d", DataConfig(), True)["id"].to_pylist() == ["P1"]
    state = json.loads((tmp_path / "d" / "state.json").read_text())
    (tmp_path / "d" / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match=r"state\.json: names .*; its data are files beside it"):
        read_rows(tmp_path / "d", DataConfig(), True)


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("optim: EVIL.X\n", [], "optim is a section"),
        ("optim: {class_path: EVIL.X}\n", [], "names a module"),
        ("optim: {class_path: EVIL.X, init_args: {lr: 1}}\n", [], "names a module"),
        ("optim.class_path: EVIL.X\n", [], "names a module"),
        ("optim: other.yaml\n", [], "optim is a section"),
        ("config: other.yaml\n", [], "cannot name another"),
        ("seed: 1\n", ["--optim", "EVIL.X"], "--optim is a section"),
        ("seed: 1\n", ["--optim=EVIL.X"], "--optim is a section"),
        ("seed: 1\n", ["--optim.class_path=EVIL.X"], "unknown setting optim.class_path"),
        ("seed: 1\n", ["--optim", "other.yaml"], "--optim is a section"),
    ],
)
def test_a_setting_names_no_module_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, flags: list[str], said: str
) -> None:
    """jsonargparse would import the module, and so run it, and read the file without a look at its size or depth."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil_module.py").write_text("open('ran', 'w')\nclass X: ...\n")
    (tmp_path / "other.yaml").write_text("lr: 0.5\n")
    path = tmp_path / "c.yaml"
    path.write_text(text.replace("EVIL", "evil_module"))
    with pytest.raises(ConfigError) as refused:
        parse(["--config", str(path), *(flag.replace("EVIL", "evil_module") for flag in flags)])
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists() and "evil_module" not in sys.modules


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_is_read_and_never_unpacked(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    archive, evil = tmp_path / "a", "../../data/evil.csv"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(evil, b"x" * 5000)
    else:
        with tarfile.open(archive, "w:gz") as file:
            member = tarfile.TarInfo(evil)
            member.size = 5000
            file.addfile(member, io.BytesIO(b"x" * 5000))
    with pytest.raises(DataError, match=r"data/evil\.csv has not the pinned sha256"):
        download.read_members(archive, {"data/evil.csv": "0"})
    monkeypatch.setattr(download, "MEMBER_LIMIT", 4000)
    with pytest.raises(DataError, match=r"evil\.csv has more than 4000 bytes"):
        download.read_members(archive, {"data/evil.csv": "0"})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "work"]


@pytest.mark.parametrize("suffix", [".csv", ".fasta.gz", ".jsonl", ".parquet", ".yaml"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, suffix: str) -> None:
    pipe = tmp_path / f"pipe{suffix}"
    os.mkfifo(pipe)
    if suffix == ".yaml":
        assert cli.main(["plan", "--config", str(pipe)]) == 2
        return
    with pytest.raises(DataError, match="this is a pipe or a device; write it to a file"):
        read_rows(pipe, DataConfig(), False)


# --- no full memory


def test_small_files_cannot_fill_a_memory(tmp_path: Path) -> None:
    """A gigabyte in a line, in a record, in blank lines; pages of Parquet, depths, aliases, a million classes."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, str(BOMBS), str(tmp_path)],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = {
        "line.csv.gz": ":2: the line has more than 16777216 bytes",
        "zeros.jsonl.gz": ":1: the line has more than 16777216 bytes",
        "record.fasta.gz": ":1: the sequence has more than 16777216 characters",
        "record.csv.gz": ":2: a record of more than 16777216 characters starts here",
        "blank.jsonl.gz": "more than 500 for one",
        "columns.csv": "no column 'sequence'",
        "deep.jsonl": ":1: no sound JSON",
        "number.jsonl": ":1: no sound JSON",
        "same.parquet": 40,
        "long.parquet": ": record 1: holds 20000001 characters, more than 16777216",
        "deep.yaml": ":1: nested more than 20 deep",
        "aliases.yaml": ":2: an alias, *x0",
        "text.yaml": "the value '{a: &a [x], b: &b [*a, *a], c: [*b, *b]}':1: an alias, *a",
        "text_in_text.yaml": "id_column=\"['{a: &a [x], b: &b [*a, *a]}']\"",
        "texts.yaml": "output='output: |",
        "long.yaml": ": more than 4194304 bytes",
        "dashes.yaml": "nested more than 20 deep",
        "aliases behind a sign of equality": "an alias, *a",
        "dashes in a flag": "nested more than 20 deep",
        "aliases in a flag": "an alias, *a",
        "a deep flag": "nested more than 20 deep",
        "prices": ":2: an alias, *x0",
        "deep prices": ":1: nested more than 20 deep",
        "a class a row": "more than 32767 classes",
        "a million classes in a row": "more than 32767 classes",
        "one class of a million letters": "a label has more than 1000 characters",
    }
    found = json.loads(done.stdout)
    assert set(found) == set(expected)
    for name, part in expected.items():
        assert found[name] == part or str(part) in str(found[name]), name


# --- secrets

TOKEN = "hf_" + "aB3" * 11
SECRETS = {
    f"https://me:p@ss:w0rd@example.org/{TOKEN}": "https://***@example.org/***",
    "s3 GET https://b.s3.amazonaws.com/k?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=0aF3&x=1": "s3 GET "
    "https://b.s3.amazonaws.com/k?X-Amz-Credential=***&X-Amz-Signature=***&x=1",
    "https://x.blob.core.windows.net/c?sv=1&sig=a%2Bb%3D;": "https://x.blob.core.windows.net/c?sv=1&sig=***;",
    'Authorization: Bearer abcdefghijkl, {"HF_TOKEN": "xyz"}': 'Authorization: Bearer ***, {"HF_TOKEN": "***"}',
    "aws_secret_access_key = abc/def+1": "aws_secret_access_key = ***",
    "key AKIAIOSFODNN7EXAMPLE ghp_0123456789abcdef0123": "key *** ***",
    f"git clone, as github_pat_11{'aB3_' * 20}": "git clone, as ***",
    "https://x.org/?access-token=abc&x=1": "https://x.org/?access-token=***&x=1",
    "https://me:a/b@example.org/x, s3:/k:s@bucket/y": "https://***@example.org/x, s3:/***@bucket/y",
    "AccountName=x;AccountKey=a+b/c==;EndpointSuffix=y": "AccountName=x;AccountKey=***;EndpointSuffix=y",
    '"Authorization": "Basic dXNlcjpwYXNz"': '"Authorization": "Basic ***"',
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- x": "*** x",
    f"glpat-{'a1' * 10} xoxb-1234567890-abc sk-{'a1B' * 12}": "*** *** ***",
    "x eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl y": "x *** y",
}


@pytest.mark.parametrize("text", ["-" * 30 + "\x92", "\x07" + "?" * 30])
def test_a_text_that_is_no_yaml_is_plain_text(text: str) -> None:
    assert parse([f"--output={text}"]).output == text


@pytest.mark.parametrize(("text", "clean"), SECRETS.items(), ids=range(len(SECRETS)))
def test_secrets_are_left_out(text: str, clean: str) -> None:
    assert redact(text) == clean
    assert redact(clean) == clean


def test_text_without_secrets_stays() -> None:
    for text in (
        "hf://owner/name@main/train",
        "pad_token_id is 2",
        "--data.pack_tokens=64",
        "s3://bucket/key",
        "a@b.org",
        "api-keys: 3, x-tokenizer=esm, design=9, github_pattern: y, a x-api-key is needed; account-key-free: yes",
        "basic helix-loop-helix, basic leucine-zipper, Bearer of oxygen transport, sig:nal, secret: yes, token=5",
        "password=abc --token 3 runs/token=5/x.csv http://localhost:8080/@me hf:/owner/name@main",
    ):
        assert redact(text) == text
    for page in ("docs/errors.md", "docs/sagemaker.md", "configs/demo.yaml"):
        text = (ROOT / page).read_text(encoding="utf-8").replace("https://***@", "")
        assert redact(text) == text


PARTS = [
    "-",
    "a",
    "a-",
    "--a",
    "token-",
    "token ",
    "sig-",
    "x-amz-",
    "github_pat-",
    "://a",
    ":/",
    "a:b@",
    "eyJaaaaaaaaa.",
]


@pytest.mark.parametrize("part", PARTS)
def test_long_text_is_looked_at_once(part: str) -> None:
    """Tenths of a second, and not the minutes of a pattern that looks at each character from each other one."""
    began = time.process_time()
    for text in (part * 10_000, "--" + part * 10_000, "token" + part * 10_000 + "=", " " * 10_000 + part):
        redact(text)
    assert time.process_time() - began < 10


def test_no_message_and_no_log_line_has_a_secret(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = f"https://me:hunter2@example.org/x.csv?X-Amz-Signature=0123abcd&token={TOKEN}"
    for words in (
        ["plan", "--data.train", secret],
        ["plan", f"--model.revision={TOKEN}", "--data.train", "x.csv"],
        ["plan", "--data.train", "x.csv", "--model.name", secret],
        ["data", "check", secret],
        ["report", "x", f"--token={TOKEN}"],
        ["predict", "--model", "x", "--input", "y", "--output", "z", "--backend", secret],
    ):
        assert cli.main(words) != 0
    said = capsys.readouterr().err
    assert said.count("***") >= 7 and len(said.splitlines()) == 6
    assert not any(part in said for part in ("hunter2", "0123abcd", TOKEN))
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "retrying %s", (secret,), None)
    assert RedactingFormatter("%(message)s").format(record).startswith("retrying https://***@example.org/x.csv?")
    assert "hunter2" not in RedactingFormatter("%(message)s").format(record)
    library, own = logging.getLogger("a_library"), logging.StreamHandler()  # as huggingface_hub has one
    library.addHandler(own)
    library.warning("Error while downloading from %s", secret)
    library.removeHandler(own)
    said = capsys.readouterr().err
    assert said.startswith("Error while downloading from https://***@example.org/x.csv?X-Amz-Signature=***&token=***")
    assert "hunter2" not in said
    monkeypatch.setattr(sys, "argv", ["esm-neuron", "--version"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    assert cli.main() == 0
    with caplog.at_level(logging.WARNING):
        warnings.warn(f"GET {secret}", stacklevel=1)  # as a library does
    logging.captureWarnings(False)
    assert "GET https://***@example.org/x.csv" in caplog.text and "hunter2" not in caplog.text
    error = RuntimeError(f"GET {secret}")
    sys.excepthook(RuntimeError, error, None)
    threading.excepthook(threading.ExceptHookArgs((RuntimeError, error, None, None)))
    full = OSError(28, "No space left on device", secret)
    threading.excepthook(threading.ExceptHookArgs((OSError, full, None, threading.Thread(name="writer"))))
    shown = "RuntimeError: GET https://***@example.org/x.csv?X-Amz-Signature=***&token=***"
    *tracebacks, line = capsys.readouterr().err.splitlines()
    assert tracebacks == [shown, shown]
    assert line.startswith("WARNING: writer: [Errno 28] No space left on device: 'https://***@example.org/x.csv?")
    monkeypatch.syspath_prepend(str(ROOT / "launchers" / "sagemaker"))
    import entry

    entry.write_failure(tmp_path, f"OSError: {secret}")
    assert "hunter2" not in (tmp_path / "output" / "failure").read_text()


def test_a_traceback_of_the_program_in_a_sagemaker_container_holds_no_secret(tmp_path: Path) -> None:
    entry = ROOT / "launchers" / "sagemaker" / "entry.py"
    code = f"""
import runpy, sys
from esm_neuron import cli

sys.path.insert(0, {str(entry.parent)!r})  # as where it is started as a program

def fail(argv):
    raise RuntimeError("GET https://me:hunter2@example.org/x.csv")

cli.run = fail
sys.argv = ["entry.py", "--backend=cpu"]
runpy.run_path({str(entry)!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SAGEMAKER_BASE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    for said in (done.stderr, (tmp_path / "output" / "failure").read_text()):
        assert "Traceback (most recent call last)" in said and "https://***@example.org/x.csv" in said
        assert "hunter2" not in done.stdout + said


@pytest.mark.parametrize(
    "cfg",
    [
        TrainConfig(output="s3://a:secret@b/c"),
        TrainConfig(model=ModelConfig(revision=TOKEN)),
        TrainConfig(data=DataConfig(train="https://me:secret@example.org/x.csv")),
    ],
)
def test_a_place_cannot_hold_a_secret(cfg: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"^(output|model\.revision|data\.train)=.*\*\*\*.* holds a secret"):
        check_values(cfg)


@pytest.mark.parametrize(
    "text", ["basic helix-loop-helix", "token=abc", "secret: x", "sig:x", "password=1", f"x {TOKEN}"]
)
def test_names_that_come_from_data_are_never_judged(text: str) -> None:
    check_values(TrainConfig(task=TaskConfig(labels=(text, "b"))))
    check_values(TrainConfig(task=TaskConfig(class_weights={text: 1.0}), data=DataConfig(keep={text: [text]})))
    check_values(TrainConfig(data=DataConfig(label_column=text, split_names=(text, "v", "t"))))


# --- what is shown

EVIL = "a\x1b[31m\rb\nERROR: c\u202ed\u2028e\x9bf\udcff\u200bg\ttab"
QUIET = "a\\x1b[31m\\rb\\nERROR: c\\u202ed\\u2028e\\x9bf\\udcff\\u200bg\\ttab"


def test_a_terminal_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(EVIL) == QUIET and shown(QUIET) == QUIET
    assert shown(Lines.of([EVIL, "x"], "  ")) == f"{QUIET}\n  x"
    cli.log(EVIL)
    cli.show(EVIL)
    assert tuple(capsys.readouterr()) == (f"{QUIET}\n", f"{QUIET}\n")
    long = shown("head" + "x" * 10**6 + "tail")
    assert long.startswith("head") and long.endswith("tail") and len(long) < MOST + 100 and "996008 characters" in long


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--data.train", EVIL],
        ["plan", "--data.train", "x.csv", "--model.name", EVIL],
        ["predict", "--model", EVIL, "--input", "x", "--output", "y.csv"],
        ["export", "--model", "x", "--output", EVIL],
        ["evaluate", "--model", EVIL, "--input", "x"],
        ["data", "check", EVIL],
        ["report", EVIL],
        ["report", "x", EVIL],
        [EVIL],
    ],
)
def test_an_error_is_one_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("esm-neuron: error: ")
    assert not set("\x1b\r\u202e\u2028\x9b\u200b") & set(said)


def test_labels_ids_and_columns_reach_a_terminal_as_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": f"p{i}", "sequence": "MKV" * (i + 1), "label": EVIL.replace("\udcff", "")} for i in range(3)]
    rows.append({"id": EVIL.replace("\udcff", ""), "sequence": "M1V", "label": "x"})
    rows.append({"id": EVIL.replace("\udcff", ""), "sequence": "", "label": "x"})
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", "check", str(path), "--label_column", "label"]) == 1
    assert cli.main(["plan", "--data.train", str(path)]) == 2
    assert cli.main(["plan", "--data.train", str(path), "--data.label_column", EVIL]) == 2
    said = "".join(capsys.readouterr())
    assert "\\nERROR: c\\u202ed" in said and "\nERROR" not in said
    assert not set("\x1b\r\u202e\u2028\x9b\u200b") & set(said)


def test_a_log_line_of_a_library_is_one_line() -> None:
    record = RedactedRecord("x", logging.WARNING, "x.py", 1, "%s\n", (EVIL,), None)
    assert RedactingFormatter("%(levelname)s: %(message)s").format(record) == f"WARNING: {QUIET}"


def test_an_endpoint_gives_ids_back_as_they_came() -> None:
    found = _Request([(" a ", " MKV\n"), ("a", "MKV")], DataConfig()).read()
    assert list(found.ids) == [" a ", "a"] and list(found.residues) == [3, 3]
    with pytest.raises(DataError, match=r"^request: record 1|^request:1: column 'id' holds half a surrogate pair"):
        _Request([("\ud800", "MKV")], DataConfig())
