"""docs/errors.md: malformed files, and the line that refuses each."""

from __future__ import annotations

import contextlib
import gzip
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from esm_neuron.config import DataConfig, TaskConfig, TrainConfig
from esm_neuron.config.rules import validate
from esm_neuron.config.settings import read_config
from esm_neuron.data.splits import load_splits
from esm_neuron.errors import EsmNeuronError
from esm_neuron.inference.variants import VariantColumns, VariantTable
from esm_neuron.tasks import task_class
from esm_neuron.training import checkpoint
from esm_neuron.training.checkpoint import Snapshot, TrainState

INTRODUCTION = """# Errors
Malformed files and the error message of each, made by `make pages`. The exit code is 2. A message says where the fault
is (file, line or record, column, and the id of the record), what is wrong, and how to fix it.

Bad records of one file (ids, sequences, labels) are listed together: the first three of each kind, and how many there
are. A file that is malformed as a whole (one value too many, JSON that breaks off, a quote that is never closed) is
read no further than the first such place, because what follows may not be records at all. `--data.on_bad_residue skip`
and `replace` turn the error of a bad character into a count and a line in rejected.tsv. Text in parentheses may be a
library's wording.
"""


@dataclass(frozen=True)
class Malformed:
    """A file that cannot be used, and what is done with it."""

    title: str
    name: str
    content: str | bytes
    use: Callable[[Path], Any]


def train(path: Path, task: str = "sequence_classification", **data: Any) -> None:
    """Read training rows."""
    cfg = TrainConfig(task=TaskConfig(name=task), data=DataConfig(train=str(path), valid_fraction=0.0, **data))
    load_splits(cfg, task_class(task).label_kind)


def residues(path: Path) -> None:
    train(path, "residue_classification")


def several(path: Path) -> None:
    train(path, "multi_label")


def numbers(path: Path) -> None:
    train(path, "regression")


def variants(path: Path) -> None:
    """Read a table of variants of MKTAY."""
    table = VariantTable(path, VariantColumns(), DataConfig(), "MKTAY", 1, True, 1000, lambda row, seen: 1)
    list(table())


def config(path: Path) -> None:
    validate(replace(read_config(path), data=DataConfig(train="x.csv")))


def damaged_checkpoint(path: Path) -> None:
    """Write a checkpoint, cut a file of it short, read it."""
    whole = Snapshot(TrainState(step=7), {"a": torch.zeros(4)}, {"a/exp_avg": torch.zeros(4)})
    folder = checkpoint.save(path.parent / "run" / "checkpoints", whole)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    checkpoint.load(Path(os.path.relpath(folder)))


HEAD = "id,sequence,label\n"
GOOD = HEAD + "P1,MKV,in\n"
TABLE = pa.table({"id": ["P1", "P2"], "sequence": ["MKV", "AAA"], "label": ["in", "out"]})


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


CASES = (
    Malformed("an empty file", "x.csv", "", train),
    Malformed("a header and no rows", "x.csv", HEAD, train),
    Malformed("a value too many", "x.csv", GOOD + "P2,MKV,in,4\n", train),
    Malformed("a value too few", "x.csv", GOOD + "P2,MKV\n", train),
    Malformed("a quote that is not closed", "x.csv", GOOD + '\nP2,"MKV,in\nP3,MKV,in\n', train),
    Malformed("a quote in the middle of a value", "x.csv", HEAD + 'P1,"MK"V,in\n', train),
    Malformed("a column by another name", "x.csv", "ID,Sequence,label\nP1,MKV,in\n", train),
    Malformed("a column twice", "x.csv", "id,id,sequence,label\n1,2,MKV,in\n", train),
    Malformed("bytes that are not UTF-8", "x.csv", HEAD.encode() + b"P1,MK\xe9,in\n", train),
    Malformed("UTF-16", "x.csv", GOOD.encode("utf-16"), train),
    Malformed("line ends of old Macs", "x.csv", HEAD + "P1,MKV,in\rP2,MKV,in\n", train),
    Malformed("gzip data by another name", "x.csv", gzip.compress(GOOD.encode(), mtime=0), train),
    Malformed("plain text named .gz", "x.csv.gz", GOOD.encode(), train),
    Malformed(
        "gzip data cut short",
        "x.csv.gz",
        gzip.compress((GOOD + GOOD.partition("\n")[2] * 98).encode(), mtime=0)[:-9],
        train,
    ),
    Malformed(
        "a bomb: a gigabyte of one letter in a megabyte",
        "x.fasta.gz",
        gzip.compress(b">P1 label=in\n", mtime=0) + gzip.compress(b"A" * (1 << 24), mtime=0) * 64,
        train,
    ),
    Malformed("a format that is none of ours", "x.xlsx", "PK", train),
    Malformed("FASTA that begins with something else", "x.fasta", "\nid,sequence\n>P1\nMKV\n", train),
    Malformed("a FASTA header without a name", "x.fasta", ">P1 label=in\nMKV\n> \nMKV\n", train),
    Malformed("a FASTA header with a field twice", "x.fasta", ">P1 label=in label=out\nMKV\n", train),
    Malformed("a FASTA quote that is not closed", "x.fasta", '>P1 label="in\nMKV\n', train),
    Malformed("JSON that breaks off", "x.jsonl", '{"id": "P1"\n', train),
    Malformed("JSON that is no object", "x.jsonl", '\n["P1"]\n', train),
    Malformed("a JSON key twice", "x.jsonl", '{"id": "P1", "id": "P2"}\n', train),
    Malformed("half a surrogate pair", "x.jsonl", r'{"id": "P\ud800", "sequence": "M", "label": "in"}', train),
    Malformed("a list for a sequence", "x.jsonl", '{"id": "P1", "sequence": ["M"], "label": "in"}', train),
    Malformed("Parquet cut short", "x.parquet", parquet(TABLE)[:-20], train),
    Malformed("Parquet without the label", "x.parquet", parquet(TABLE.drop_columns("label")), train),
    Malformed("an id twice", "x.csv", GOOD + "P1,AAA,out\n", train),
    Malformed("a sequence that is empty", "x.csv", GOOD + "P2,,out\n", train),
    Malformed("a stop codon", "x.csv", GOOD + "P2,MK*V,out\n", train),
    Malformed("a label that is empty", "x.csv", GOOD + "P2,AAA,\n", train),
    Malformed("two problems at once", "x.csv", GOOD + "P1,AAA,out\nP3,M-V,out\n", train),
    Malformed("one class only", "x.csv", GOOD, train),
    Malformed("a label of several twice", "x.csv", GOOD + "P2,AAA,in;in\n", several),
    Malformed("a value that is no number", "x.csv", HEAD + "P1,MKV,0.5\nP2,AAA,high\n", numbers),
    Malformed("residue labels that do not fit", "x.csv", HEAD + "P1,MKV,HHE\nP2,AAA,HE\n", residues),
    Malformed("a variant of another protein", "x.csv", "variant\nK2A\nA2G\n", variants),
    Malformed("a variant that is none", "x.csv", "variant\nK2A\np.Lys2Ala\n", variants),
    Malformed("a setting by another name", "x.yaml", "optim:\n  learning_rate: 1e-3\n", config),
    Malformed("a setting twice", "x.yaml", "optim:\n  lr: 1e-3\n  lr: 1e-4\n", config),
    Malformed("a setting of the wrong kind", "x.yaml", "loop:\n  max_steps: many\n", config),
    Malformed("a setting without a value", "x.yaml", "adapter:\n  r:\n", config),
    Malformed("YAML that is none", "x.yaml", "optim: [1\n", config),
    Malformed("a YAML bomb", "x.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", config),
    Malformed("a secret among settings", "x.yaml", "model:\n  name: https://me:pass@example.org/model\n", config),
    Malformed("a checkpoint cut short", "x", "", damaged_checkpoint),
)


@contextlib.contextmanager
def elsewhere() -> Iterator[Path]:
    """Work in an empty folder, so that messages hold file names without folders."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def error_of(case: Malformed) -> str:
    """Return the message that refuses a file. Raises LookupError where nothing does."""
    with elsewhere():
        path = Path(case.name)
        path.write_bytes(case.content.encode() if isinstance(case.content, str) else case.content)
        try:
            case.use(path)
        except EsmNeuronError as error:
            return str(error)
    raise LookupError(f"{case.title}: nothing refuses it")


def page() -> str:
    """Return the whole page."""
    return INTRODUCTION + "".join(f"\n{case.title} (`{case.name}`)\n```\n{error_of(case)}\n```\n" for case in CASES)
