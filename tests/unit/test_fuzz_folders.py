"""Folders from elsewhere, damaged at random, against every command that reads them: right results, or one line.

Names, kinds of file, values of JSON, contents, files swapped and doubled: of a run, a model folder and shards.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import fuzzing
from helpers.finished import LABELS, RESULT, finish
from helpers.fuzzing import SEEDS, fuzz, mutate
from helpers.weights import state_of, tiny, write_safetensors_folder
from hypothesis import given

from esm_neuron import cli
from esm_neuron.config import settings
from esm_neuron.data.parquet import write_table
from esm_neuron.errors import DataError
from esm_neuron.files import write_json, write_text
from esm_neuron.inference import stream
from esm_neuron.inference.embed import embed

folder = fuzzing.module_folder

SCORES = {"n": 2, "loss": 0.5, "accuracy": 0.5, "accuracy_ci": [0.1, 0.9], "mcc": None}
ODD: list[Any] = [
    None, True, 0, -1, 10**30, 1e308, "", "x", "\x1b[31m", "../../etc/passwd", "a\nb", [], [[]], {}, {"a": {}}, [None],
    "some/repo@main", float("nan"), "nan", 2**31, [0.1], "é" * 3,
]  # fmt: skip
"""Values of JSON that stand where others belong."""
MEMORY = 3 << 30
"""Bytes that a process may grow by in all its cases."""


@cache
def made(where: Path) -> Path:
    """A run of LoRA with its logs and predictions, a base with a language-model head, pickles, and shards."""
    root = where / "made"
    root.mkdir()
    (root / "in.csv").write_text("id,sequence,label\n" + "".join(f"p{i},MKVLA{'ACDEF'[i]},nucleus\n" for i in range(5)))
    (root / "one.fasta").write_text(">one\nMKVLA\n")
    (root / "variants.csv").write_text("variant\nM1A\nK2C\n")
    finish(root / "run", "mean", "lora")
    result = {**RESULT, "task": "sequence_classification", "test": SCORES, "baselines": {"test": {"majority": SCORES}}}
    write_json(root / "run" / "result.json", result)
    columns = {"id": ["a", "b"], "residues": pa.array([9, 8], pa.int32()), "target": ["nucleus", "cytosol"]}
    columns |= {f"p_{label}": pa.array([0.2, 0.5], pa.float32()) for label in LABELS}
    write_table(root / "run" / "predictions-test.parquet", pa.table(columns))
    lines = [{"step": step, "loss": 0.7} for step in range(3)] + [
        {"step": 2, "split": "valid", "loss": 0.5, "mcc": 0.1}
    ]
    write_text(root / "run" / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_safetensors_folder(state_of().items(), tiny(), root / "model", 40_000)
    write_safetensors_folder(state_of().items(), tiny(), root / "flat")
    stop = pytest.MonkeyPatch()
    stop.setattr(stream.Shards, "join", _stop)
    with pytest.raises(DataError):
        embed(str(root / "flat"), root / "in.csv", root / "e.parquet", settings=["--data.pack_tokens=1024"])
    stop.undo()
    return root


def _stop(_: stream.Shards) -> int:
    raise DataError("stopped")


def damage(root: Path, rng: Random) -> None:
    """Damage a folder, up to three times."""
    for _ in range(rng.randint(1, 3)):
        files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            return
        file, other = rng.choice(files), rng.choice(files)
        kind = rng.choice(("json", "json", "json", "bytes", "bytes", "swap", "double", "rename", "kind", "remove"))
        if kind == "json" and file.suffix == ".parquet":
            with suppress(pa.ArrowException, OSError):  # damaged before
                pq.write_table(_other_table(pq.read_table(file), rng), file)
        elif kind == "json" and file.suffix in (".json", ".jsonl"):
            file.write_text(_other_json(file.read_text(errors="replace"), rng))
        elif kind in ("bytes", "json"):
            file.write_bytes(mutate(file.read_bytes(), rng))
        elif kind == "swap":
            content = file.read_bytes()
            file.write_bytes(other.read_bytes())
            other.write_bytes(content)
        elif kind == "double":
            second = file.with_name(rng.choice((f"1{file.name}", "00000007.parquet", "config.json")))
            if second.is_file() or not os.path.lexists(second):
                second.write_bytes(file.read_bytes())
        elif kind == "rename":
            with suppress(OSError):  # a folder has the name
                file.rename(file.with_name(rng.choice(("x", "model.safetensors", "result.json", "manifest.json"))))
        else:
            file.unlink()
            if kind == "kind":
                rng.choice((os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path), _touch))(file)


def _other_table(table: pa.Table, rng: Random) -> pa.Table:
    """A table with a column left out, renamed, of another type, or of other values; or with other rows."""
    at = rng.randrange(table.num_columns)
    name, how = table.column_names[at], rng.choice(("drop", "rename", "values", "values", "rows"))
    if how == "drop" and table.num_columns > 1:
        return table.remove_column(at)
    if how == "rename":
        names = [*table.column_names[:at], rng.choice(("x", "id", "a\nb")), *table.column_names[at + 1 :]]
        return table.rename_columns(names)
    if how == "rows":
        return pa.concat_tables([table] * rng.choice((1, 2, 1000))).slice(rng.choice((0, 1, len(table))))
    odd = [2**31 - 1, -5, float("nan"), "x" * 1000, None, [1.0], True, b"\0"]
    return table.set_column(at, name, pa.array([rng.choice(odd)] * table.num_rows))


def _touch(path: Path) -> None:
    path.touch()


def _other_json(text: str, rng: Random) -> str:
    """A text of JSON, or of its lines, with a value or a key changed."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        lines = text.splitlines()
        at = rng.randrange(len(lines)) if lines else 0
        with suppress(ValueError, IndexError, RecursionError):  # damaged before
            lines[at] = json.dumps(_changed(json.loads(lines[at]), rng))
        return "\n".join(lines) + "\n"
    return json.dumps(_changed(value, rng)) if rng.random() < 0.95 else "[" * 100_000


def _changed(value: Any, rng: Random) -> Any:
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        changed = value.copy()
        how = rng.random()
        if how < 0.15:
            del changed[key]
        elif how < 0.25 and isinstance(changed, dict):
            changed[rng.choice(("_attn_implementation", "x", "", "a\nb"))] = rng.choice(ODD)
        else:
            changed[key] = _changed(value[key], rng)
        return changed
    return rng.choice(ODD)


COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "report": (("run",), "report run"),
    "evaluate": (("run",), "evaluate --model run --input in.csv --output m.json"),
    "predict": (("run",), "predict --model run --input in.csv --output p.csv"),
    "embed a run": (("run",), "embed --model run --input in.csv --output r.parquet"),
    "export": (("run",), "export --model run --output exported"),
    "embed": (("model",), "embed --model model --input in.csv --output e.safetensors"),
    "score": (("flat",), "score --model flat --input variants.csv --wild-type one.fasta --output s.csv"),
    "plan": (("model",), "plan --data.train in.csv --model.name model"),
    "resume": (("e.parquet.shards",), "embed --model flat --input in.csv --output e.parquet --resume"),
}
"""Command -> what is damaged, and its words."""


OUTPUTS = {
    "evaluate": "m.json", "predict": "p.csv", "embed a run": "r.parquet", "export": "exported",
    "embed": "e.safetensors", "score": "s.csv", "resume": "e.parquet",
}  # fmt: skip
"""Command -> what it writes."""
DECIDES = {
    "run": re.compile(r"run/config\.yaml"),
    **dict.fromkeys(("model", "flat"), re.compile(r"\w+/(config\.json|model.*\.safetensors.*|x|manifest\.json|1.*)")),
    "e.parquet.shards": re.compile("never"),
}
"""What is damaged -> the files in it that decide a result and are the user's to change; of a run its settings alone."""


def content(root: Path) -> dict[str, bytes]:
    """Name -> bytes of each regular file below `root`, or of the one that it is; no model cards: they quote results."""
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    files = [path for path in files if path.parent.name != "exported" or path.name != "README.md"]
    return {path.relative_to(root.parent).as_posix(): path.read_bytes() for path in files}


@cache
def expected(whole: Path, command: str) -> dict[str, bytes]:
    """What a command writes when nothing is damaged."""
    place = whole.parent / f"expected {command}"
    shutil.copytree(whole, place, symlinks=True)
    assert run_in(place, COMMANDS[command][1])[0] == 0
    return content(place / OUTPUTS[command])


def run_in(place: Path, words: str) -> tuple[int, str]:
    """The exit code of a command in a folder, and what it said."""
    before = os.getcwd()
    os.chdir(place)
    try:
        return quietly(lambda: cli.main(words.split()))
    finally:
        os.chdir(before)


def quietly(act: Callable[[], int]) -> tuple[int, str]:
    """The exit code of `act` and what it said."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        code = act()
    return code, said.getvalue()


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Let the process grow by MEMORY at most: a small file that asks for more is a MemoryError, and so a failure."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.fixture(autouse=True, scope="module")
def parsed_once() -> Iterator[None]:
    """Parse equal settings once in all cases: else that is half of their time."""
    plain, found = settings._parsed, dict[tuple[object, ...], Any]()

    def parsed(words: list[str], *more: Any) -> Any:
        file = Path(words[1]) if words[:1] == ["--config"] else None
        key = (*words, *map(repr, more), file.read_bytes() if file and file.is_file() else b"")
        if key not in found:
            found[key] = plain(words, *more)  # what is refused is refused anew
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "_parsed", parsed)
        yield


@pytest.mark.parametrize("command", COMMANDS)
@fuzz
@given(seed=SEEDS)
def test_a_damaged_folder_is_used_rightly_or_refused_in_a_line(folder: Path, command: str, seed: int) -> None:
    whole, rng = made(folder), Random(seed)
    place, (damaged, words) = folder / "case", COMMANDS[command]
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place)
    if command in OUTPUTS:
        wanted = expected(whole, command)
    for name in damaged:
        damage(place / name, rng)
    code, said = run_in(place, words)
    lines = [line for line in said.splitlines() if line.startswith("esm-neuron: error: ")]
    assert code in (0, 1, 2) and len(lines) == (code != 0), said
    assert "out of memory" not in said and "Traceback" not in said and "\x1b" not in said
    if code:
        assert code == 2 or "NaN or infinite" in said, said
        assert not any(
            (place / name).exists() for name in ("m.json", "p.csv", "r.parquet", "exported", "e.safetensors")
        )
    elif command in OUTPUTS and content(place / OUTPUTS[command]) != wanted:
        (name,) = damaged
        assert any(DECIDES[name].fullmatch(file) for file in changed(whole / name, place / name)), said


def changed(whole: Path, damaged: Path) -> set[str]:
    """The names of the files that differ."""
    before, after = content(whole), content(damaged)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


if sys.platform != "linux":
    pytest.skip("limits memory by Linux's ways", allow_module_level=True)
