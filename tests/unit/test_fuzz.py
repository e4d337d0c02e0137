"""Any input is answered rightly or refused in one line: generated files come back whole, damaged ones never pass.

`make test` runs CASES of each; `make fuzz` runs 10,000 of each, from new seeds.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import EsmForMaskedLM

from esm_neuron import checkpoint
from esm_neuron.answers.dms import VariantColumns, VariantTable
from esm_neuron.answers.variants import STANDARD, Substitution, difference, mutated, parse_variant
from esm_neuron.checkpoint import Snapshot, TrainState
from esm_neuron.config import DataConfig, ModelConfig, TaskConfig, TrainConfig
from esm_neuron.data.labels import LabelRows, class_names, targets
from esm_neuron.data.sources import read_chunks, read_rows
from esm_neuron.data.tokenizer import RESIDUES, bad_residues
from esm_neuron.data.validate import Checker, Problems
from esm_neuron.errors import ConfigError, EsmNeuronError
from esm_neuron.files import write_json
from esm_neuron.loading import load_into
from esm_neuron.rules import check_values
from esm_neuron.safetensors_folder import write_safetensors_folder
from esm_neuron.settings import dump, known_keys, parse, read_config
from esm_neuron.shapes import SHAPES, esm_config
from esm_neuron.weights import Draw, open_weights

QUICK = 40
CASES = int(os.environ.get("FUZZ_CASES", QUICK))
fuzz = settings(
    max_examples=CASES,
    derandomize=CASES == QUICK,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

Row = tuple[str, str, str]
"""Id, sequence, label."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def refused(call: Callable[[], Any]) -> Any:
    """What `call` returns, or the text of its refusal: one line, or the list of a file's first problems."""
    try:
        return call()
    except EsmNeuronError as error:
        text = str(error)
    first, *rest = text.splitlines()
    assert first and len(first) < 1000, first
    assert not rest or (" problems (" in first and len(rest) <= 20), text
    return Refusal(text)


class Refusal(str):
    """The text of a known error."""


# --- what is generated

PRINTABLE = st.characters(codec="utf-8", exclude_categories=("C", "Z"))
NAMES = st.text(PRINTABLE, min_size=1, max_size=12)
VALUES = st.text(PRINTABLE | st.sampled_from(" ;=,\t'#>"), max_size=20)
SEQUENCES = st.text(RESIDUES + RESIDUES.lower(), min_size=1, max_size=40)
DIRTY = SEQUENCES | st.text(RESIDUES + "*-.J1é ", min_size=1, max_size=12)
SEEDS = st.integers(0, 2**63)
"""Of damage: drawn by `random`, which is ten times quicker than a strategy, and a seed is all a failure needs."""
NASTY = [b"\0", b"\r", b"\n", b'"', b",", b"\t", b">", b"\xff", b"\xef\xbb\xbf", b"{", b"]", b"\\ud800", b"=", b"*"]
WORDS = "aZ09_-.:|*éß中 ;,'#"


def mutate(content: bytes, rng: Random) -> bytes:
    """Damage as files meet it, up to four times: cut short, bits flipped, bytes put in, taken out or written twice."""
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.choice(("truncate", "flip", "insert", "delete", "repeat")), rng.randint(0, len(content))
        extra = rng.choice(NASTY) if rng.random() < 0.5 else rng.randbytes(rng.randint(1, 4))
        if kind == "truncate":
            content = content[:at]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (extra[0] or 1)]) + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + extra + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + len(extra) :]
        elif kind == "repeat":
            content = content[:at] + content[max(0, at - 8 * len(extra)) :]
    return content


def some_rows(rng: Random) -> list[Row]:
    """Rows with ids of their own."""
    words = ["".join(rng.choices(WORDS, k=rng.randint(0, 9))).strip() for _ in range(rng.randint(1, 6))]
    names = ["".join(word.split()) for word in words]
    return [
        (f"{name}{number}", "".join(rng.choices(RESIDUES, k=rng.randint(1, 40))), word + "x")
        for number, (name, word) in enumerate(zip(names, words, strict=True))
    ]


@st.composite
def tables(draw: st.DrawFn, sequences: st.SearchStrategy[str] = SEQUENCES) -> list[Row]:
    """Rows with ids of their own."""
    ids = draw(
        st.lists(NAMES.filter(lambda name: "=" not in name and '"' not in name), min_size=1, max_size=8, unique=True)
    )
    return [(name, draw(sequences), draw(VALUES)) for name in ids]


def as_csv(rows: list[Row], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([("id", "sequence", "label"), *rows])
    return text.getvalue().encode()


def as_fasta(rows: list[Row]) -> bytes:
    """Sequences in lines of 7 residues; labels without quotes, which headers cannot hold."""
    parts = []
    for name, sequence, label in rows:
        lines = "\n".join(sequence[i : i + 7] for i in range(0, len(sequence), 7))
        parts.append(f'>{name} label="{_quotable(label)}"\n{lines}\n')
    return "".join(parts).encode()


def _quotable(label: str) -> str:
    return label.replace('"', "'")


def as_jsonl(rows: list[Row]) -> bytes:
    keys = ("id", "sequence", "label")
    return "".join(json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: list[Row]) -> bytes:
    ids, sequences, labels = zip(*rows, strict=True)
    table = pa.table({"id": ids, "sequence": pa.array(sequences, pa.large_string()), "label": labels})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=3, use_dictionary=len(rows) % 2 == 0)
    return bytes(sink.getvalue())


WRITERS: dict[str, Callable[[list[Row]], bytes]] = {
    "x.csv": as_csv,
    "x.tsv": lambda rows: as_csv(rows, "\t"),
    "x.fasta": as_fasta,
    "x.jsonl": as_jsonl,
    "x.parquet": as_parquet,
    "x.csv.gz": lambda rows: gzip.compress(as_csv(rows), 1, mtime=0),
}
FORMATS = pytest.mark.parametrize("name", WRITERS)


def stored(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def read(path: Path) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = read_rows(path, DataConfig(), need_label=True).to_pydict()
    return table


# --- files of proteins


@FORMATS
@fuzz
@given(rows=tables(), tail=st.sampled_from(["", "\n\n", "crlf", "bom"]))
def test_what_is_written_comes_back(folder: Path, name: str, rows: list[Row], tail: str) -> None:
    content = WRITERS[name](rows)
    if name in ("x.csv", "x.tsv", "x.fasta", "x.jsonl"):
        changes = {"crlf": content.replace(b"\n", b"\r\n"), "bom": b"\xef\xbb\xbf" + content}
        content = changes.get(tail, content + tail.encode())
    found = read(stored(folder, name, content))
    labels = [_quotable(label) if name == "x.fasta" else label for _, _, label in rows]
    assert found["id"] == [row[0] for row in rows]
    assert found["sequence"] == [row[1] for row in rows]
    assert found["label"] == [label.strip() for label in labels]


@FORMATS
@fuzz
@given(rows=tables(DIRTY), mode=st.sampled_from(["strict", "skip", "replace"]))
def test_every_row_is_used_rejected_or_refused(folder: Path, name: str, rows: list[Row], mode: Any) -> None:
    cfg = DataConfig(on_bad_residue=mode)
    path = stored(folder, name, WRITERS[name](rows))
    checker = Checker(cfg, str(path))
    sequences = ["".join(row[1].split()) if name == "x.fasta" else row[1].strip() for row in rows]
    bad = [number for number, sequence in enumerate(sequences) if bad_residues(sequence)]

    def check() -> list[str]:
        return [text for part in checker.chunks(read_chunks(path, cfg, False)) for text in part["sequence"].to_pylist()]

    found = refused(check)
    if isinstance(found, Refusal):
        empty = "" in sequences
        assert empty or (bad and mode == "strict") or (len(bad) == len(rows) and mode == "skip"), found
        return
    rejected = [row for row in checker.rejected if row.action == "left out"]
    assert len(found) + len(rejected) == len(rows)
    assert len(checker.rejected) == len(bad)
    assert not any(bad_residues(sequence) for sequence in found)


@FORMATS
@fuzz
@given(seed=SEEDS)
def test_damage_is_refused_or_read_as_others_read_it(folder: Path, name: str, seed: int) -> None:
    rng = Random(seed)
    content = mutate(WRITERS[name](some_rows(rng)), rng)
    path = stored(folder, name, content)
    found = refused(lambda: read(path))
    if not isinstance(found, Refusal):
        assert len(found["id"]) == _records(name, content)


def _records(name: str, content: bytes) -> int:
    """Records of a file, counted by other means than ours."""
    if name == "x.parquet":
        return int(pq.read_metadata(io.BytesIO(content)).num_rows)
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode("utf-8-sig").replace("\r\n", "\n")
    if name == "x.fasta":
        return sum(line.startswith(">") for line in text.split("\n"))
    if name == "x.jsonl":
        return sum(bool(line.strip()) for line in text.split("\n"))
    delimiter = "\t" if name == "x.tsv" else ","
    return sum(bool(row) for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)) - 1


@pytest.mark.parametrize("name", [*WRITERS, "x.fa.gz"])
@fuzz
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_garbage_is_refused(folder: Path, name: str, content: bytes) -> None:
    found = refused(lambda: read(stored(folder, name, content)))
    assert isinstance(found, (Refusal, dict))


@pytest.mark.parametrize("task", ["sequence_classification", "multi_label", "regression", "residue_classification"])
@fuzz
@given(
    texts=st.lists(
        st.text(PRINTABLE | st.sampled_from(",;-? _"), max_size=12) | st.from_type(float).map(str), min_size=1
    ),
    lengths=st.data(),
)
def test_labels_become_targets_or_problems(task: Any, texts: list[str], lengths: st.DataObject) -> None:
    cfg = TaskConfig(name=task)
    sizes = [lengths.draw(st.just(len(text)) | st.integers(1, 12)) for text in texts]
    rows = LabelRows(texts, sizes, list(range(1, len(texts) + 1)), "x.csv", "label")
    names = refused(lambda: class_names(cfg, [rows]))
    if isinstance(names, Refusal):
        return
    problems = Problems("x.csv")
    found = targets(cfg, names, rows, problems)
    assert len(found) == len(texts) and problems.total == 0
    if task == "residue_classification":
        assert [len(each) for each in found] == sizes


# --- variants

WILD = "MKTAYIAKQRQISFVKSHFSRQ"
SUBSTITUTIONS = st.dictionaries(st.integers(0, len(WILD) - 1), st.sampled_from(sorted(STANDARD)), max_size=6)


@fuzz
@given(chosen=SUBSTITUTIONS, first=st.integers(-50, 500), lower=st.booleans())
def test_a_variant_is_what_it_says(chosen: dict[int, str], first: int, lower: bool) -> None:
    chosen = {index: mutant for index, mutant in chosen.items() if WILD[index] != mutant}
    first = max(first, 0)  # `A-3G` is no name of a residue
    text = ":".join(f"{WILD[index]}{index + first}{mutant}" for index, mutant in chosen.items()) or "WT"
    variant = parse_variant(text.lower() if lower else text, WILD, first)
    assert variant == tuple(Substitution(i, WILD[i], chosen[i]) for i in sorted(chosen))
    assert difference(mutated(WILD, variant), WILD) == variant


VARIANTS = (
    st.text("AKMTWX0129:*=-_é٣ ", max_size=10)
    | st.text(max_size=8)
    | st.sampled_from(["M1" + "9" * 5000 + "A", "A1G:" * 30_000, "WT", "M1A", "K2R:T3A", "M1*", "M1="])
)


@fuzz
@given(texts=st.lists(VARIANTS, min_size=1, max_size=6), scores=st.sampled_from(["1", "", "nan", "1_0", "٣", "1e999"]))
def test_every_variant_is_used_or_rejected(folder: Path, texts: list[str], scores: str) -> None:
    keys = ("variant", "score")
    path = folder / "v.jsonl"
    path.write_text("".join(json.dumps(dict(zip(keys, (text, scores), strict=True))) + "\n" for text in texts))
    columns, cfg = VariantColumns(score="score"), DataConfig(on_bad_residue="skip")
    table = VariantTable(path, columns, cfg, WILD, 1, True, 1000, lambda row, seen: 1)
    found = refused(lambda: [row for piece in table() for row in piece.content])
    if isinstance(found, Refusal):
        assert table.rows == len(texts) == len(table.rejected) or "\0" in "".join(texts) or "\\ud8" in path.read_text()
        return
    assert len(found) + len(table.rejected) == len(texts)
    assert all("\n" not in row.reason for row in table.rejected)


# --- settings

KEYS = sorted(known_keys())
ODD = st.sampled_from(
    ["", "null", "~", ".inf", "-.nan", "1e400", "-1", "0", "[]", "{}", "[[", "*a", "&a b", "!!int x", "!!bool x",
     "? [a]", "2001-99-99", "0b", "!!python/object:os.system x", "<<", "\ud800", "\0", "9" * 23, "true",
     "a: b", "!!binary x", "1:60", "!!timestamp x", "[null]", "{a: [null]}", "{a: null}", "{a: {b: {c: 1}}}", "--help", "s3://a:b@c"]
)  # fmt: skip
SETTINGS = st.tuples(st.sampled_from([*KEYS, "config", "optim", "no.such"]), ODD | st.text(max_size=12))


@fuzz
@given(chosen=st.lists(SETTINGS, max_size=3), seed=st.none() | SEEDS)
def test_a_config_file_is_right_or_refused(folder: Path, chosen: list[tuple[str, str]], seed: int | None) -> None:
    lines = [] if seed is None else [dump(TrainConfig())]
    for key, value in chosen:
        section, _, name = key.rpartition(".")
        lines.append(f"{section}:\n  {name}: {value}\n" if section else f"{name}: {value}\n")
    content = "".join(lines).encode("utf-8", "surrogatepass")
    path = stored(folder, "c.yaml", content if seed is None else mutate(content, Random(seed)))
    cfg = refused(lambda: read_config(path))
    if isinstance(cfg, Refusal) or isinstance(refused(lambda: check_values(cfg)), Refusal):
        return
    assert read_config(stored(folder, "d.yaml", dump(cfg).encode())) == cfg


@fuzz
@given(words=st.lists(SETTINGS, max_size=3))
def test_flags_are_right_or_refused(words: list[tuple[str, str]]) -> None:
    argv = [f"--{key}={value}" for key, value in words]
    cfg = refused(lambda: parse(argv))
    if not isinstance(cfg, Refusal):
        refused(lambda: check_values(cfg))


# --- checkpoints and weights


@cache
def saved(folder: Path) -> tuple[Path, Snapshot]:
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(3, 4, generator=generator), "b": torch.ones(2).bfloat16()}
    state = TrainState(7, 100, 1.5, {"best": 0.5, "best_step": 7, "bad": 0}, {"seed": 1})
    snapshot = Snapshot(state, weights, {"a/exp_avg": torch.zeros(3, 4)})
    return checkpoint.save(folder / "whole", snapshot), snapshot


@fuzz
@given(seed=SEEDS, signed=st.booleans())
def test_a_damaged_checkpoint_never_passes(folder: Path, seed: int, signed: bool) -> None:
    """Also one whose manifest has the sums of the damaged files: it is refused, or it is a checkpoint."""
    whole, snapshot = saved(folder)
    target, rng = folder / "damaged" / whole.name, Random(seed)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    file = rng.choice(sorted(path.name for path in target.iterdir()))
    content = mutate((target / file).read_bytes(), rng)
    changed = content != (target / file).read_bytes()
    (target / file).write_bytes(content)
    if signed and file != "manifest.json":
        manifest = json.loads((target / "manifest.json").read_text())
        manifest["files"][file]["sha256"] = hashlib.sha256(content).hexdigest()
        write_json(target / "manifest.json", manifest)
    found = refused(lambda: checkpoint.load(target))
    if isinstance(found, Refusal):
        assert changed and str(target) in found
    elif not (signed or file == "manifest.json"):
        assert not changed
        assert found.state == snapshot.state and torch.equal(found.model["a"], snapshot.model["a"])


@cache
def weights(folder: Path) -> Path:
    with torch.random.fork_rng():
        state = EsmForMaskedLM(esm_config(SHAPES["tiny"])).state_dict()
    write_safetensors_folder(state.items(), esm_config(SHAPES["tiny"]), folder / "weights", 40_000)
    return folder / "weights"


def load(path: Path) -> int:
    config, source = open_weights(ModelConfig(name=str(path)), 0)
    with torch.device("meta"):
        model = EsmForMaskedLM(config)
    return len(load_into(model, source, Draw(0, 0.02), lambda name: False).loaded)


@fuzz
@given(seed=SEEDS)
def test_damaged_weights_are_refused_or_loaded(folder: Path, seed: int) -> None:
    """Values may differ unseen, which `model.sha256` is for; names, shapes and kinds of numbers may not."""
    whole, target, rng = weights(folder), folder / "mutated", Random(seed)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    path = rng.choice(sorted(target.iterdir()))
    content, head = path.read_bytes(), rng.choice((400, None))  # the head of a file says what all the rest is
    path.write_bytes(mutate(content[:head], rng) + (b"" if head is None else content[head:]))
    assert refused(lambda: load(target))


def test_a_refusal_of_many_lines_would_be_seen() -> None:
    def many() -> None:
        raise ConfigError("one\ntwo")

    with pytest.raises(AssertionError):
        refused(many)
