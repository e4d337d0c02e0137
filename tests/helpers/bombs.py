"""Small files that would fill a memory, read in a small one.

`python tests/helpers/bombs.py FOLDER` prints what comes of each.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import sys
from collections.abc import Iterator
from functools import reduce
from itertools import islice
from pathlib import Path
from textwrap import indent

import pyarrow as pa
import pyarrow.parquet as pq

from esm_neuron.config import DataConfig, TaskConfig
from esm_neuron.config.settings import parse, read_config
from esm_neuron.data.labels import Labels, LabelSets
from esm_neuron.data.sources import make_rows, read_chunks
from esm_neuron.data.validation import Problems
from esm_neuron.planning.instances import read_prices
from helpers.refusals import outcome

MORE = 600 << 20
"""Bytes of address space that reading may take beyond what the imports took."""


def packed(head: bytes, block: bytes, times: int) -> bytes:
    """gzip data of `head` and then `times` of `block`, without making all of it."""
    return gzip.compress(head, mtime=0) + gzip.compress(block, 9, mtime=0) * times


def parquet(length: int, rows: int) -> bytes:
    """The same sequence in every row: stored once."""
    sequence = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["A" * length]))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(map(str, range(rows))), "sequence": sequence}), sink)
    return bytes(sink.getvalue())


def fill(folder: Path) -> None:
    """Write the files."""
    lines = b"A" * 1023 + b"\n"
    ten = ["x: &x0 [1, 1]", *(f"y{i}: &x{i} [*x{i - 1}, *x{i - 1}, *x{i - 1}]" for i in range(1, 40))]
    files = {
        "line.csv.gz": packed(b"id,sequence,label\nP1,", b"A" * (1 << 24), 64),
        "zeros.jsonl.gz": packed(b"", bytes(1 << 24), 64),
        "record.fasta.gz": packed(b">P1\n", lines * (1 << 14), 64),
        "record.csv.gz": packed(b'id,sequence,label\nP1,MKV,"', (b"a" * 1020 + b'\n","') * (1 << 14), 64),
        "blank.jsonl.gz": packed(b"", (b" " * 65_535 + b"\n") * (1 << 8), 64),
        "columns.csv": b",".join(b"c%d" % i for i in range(1_500_000)) + b"\n",
        "deep.jsonl": b'{"id": ' + b"[" * 1_000_000,
        "number.jsonl": b'{"id": ' + b"9" * 1_000_000 + b"}",
        "same.parquet": parquet(10_000_000, 2000),
        "long.parquet": parquet(20_000_000, 2),
        "deep.yaml": b"data: " + b"[" * 100_000,
        "aliases.yaml": "\n".join(ten).encode(),
        "text.yaml": b"output: '{a: &a [x], b: &b [*a, *a], c: [*b, *b]}'",
        "text_in_text.yaml": b"data: {id_column: \"['{a: &a [x], b: &b [*a, *a]}']\"}",
        "texts.yaml": reduce(lambda inner, _: "output: |\n" + indent(inner, " "), range(30), "&*").encode(),
        "long.yaml": b"# " + b"x" * (1 << 23),
        "dashes.yaml": b"output: '" + b"- " * 1_000_000 + b"x'",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)


def rows_of(path: Path) -> int:
    """Rows of the first chunks of a file."""
    return sum(len(chunk) for chunk in islice(read_chunks(path, DataConfig()), 20))


def many_classes(names: Iterator[str], kind: type[Labels]) -> None:
    texts = list(names)
    numbers = list(range(len(texts)))
    rows = make_rows({"id": texts, "sequence": ["MKV"] * len(texts), "label": texts, "line": numbers})
    problems = Problems("x.csv")
    kind(TaskConfig(), "label").encode(rows, problems)
    problems.raise_any()


def main(folder: Path) -> None:
    """Print a JSON object: file -> rows or error, and the peak of the resident memory in MB."""
    fill(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MORE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found: dict[str, object] = {}
    for path in sorted(folder.iterdir()):
        found[path.name] = outcome(lambda p=path: str(read_config(p)) if p.suffix == ".yaml" else rows_of(p))
    aliases = "{a: &a [x], b: &b [*a, *a], c: [*b, *b]}"
    found["aliases in a flag"] = outcome(lambda: parse([f"--data.keep={aliases}"]))
    behind = "{q: '=', a: &a [x], b: &b [*a, *a], c: [*b, *b]}"
    found["aliases behind a sign of equality"] = outcome(lambda: parse(["--data.keep", behind]))
    found["dashes in a flag"] = outcome(lambda: parse(["--output", "- " * 100_000 + "x"]))
    found["a deep flag"] = outcome(lambda: parse(["--data.keep=" + "[" * 100_000]))
    found["prices"] = outcome(lambda: read_prices(folder / "aliases.yaml"))
    found["deep prices"] = outcome(lambda: read_prices(folder / "deep.yaml"))
    found["a class a row"] = outcome(lambda: many_classes((f"c{i}" for i in range(1_000_000)), Labels))
    found["a million classes in a row"] = outcome(
        lambda: many_classes(iter([";".join(map(str, range(1_000_000)))]), LabelSets)
    )
    found["one class of a million letters"] = outcome(lambda: many_classes(iter(["a" * 1_000_000]), LabelSets))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
