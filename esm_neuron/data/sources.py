"""Read rows of CSV, TSV, FASTA, JSONL (plain or .gz), Parquet, saved and hub datasets, each row with its number.

Every value is text, taken as it stands but for surrounding blanks; nothing is guessed to be a number or missing. A
new format is a function with the signature of `records.Reader` and a row in `FORMATS`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esm_neuron.config import DataConfig, require
from esm_neuron.data.delimited import read_delimited
from esm_neuron.data.fasta import read_fasta
from esm_neuron.data.lmdb import DATA, read_lmdb
from esm_neuron.data.looks import MISSING
from esm_neuron.data.parquet import read_dataset, read_hub, read_parquet, read_workbook
from esm_neuron.data.records import (
    DELIMITED,
    FASTA,
    JSON,
    JSONL,
    LIST_JOINER,
    LMDB,
    MARKS,
    NUMBERED,
    RESIDUE_JOINER,
    TABLES,
    UNKNOWN_RESIDUE,
    Column,
    MissingColumnError,
    Reader,
    Record,
    files_of,
    is_hub,
    place,
    row_number,
    suffix_of,
)
from esm_neuron.data.text_files import read_json_list, read_jsonl
from esm_neuron.data.tokenizer import BREAK
from esm_neuron.errors import DataError

CHUNK_ROWS, CHUNK_CHARACTERS = 16_384, 1 << 24
"""Most rows, and about the most characters, of a chunk."""


def read_chunks(path: str | Path, cfg: DataConfig, joiner: str | None = None) -> Iterator[pa.Table]:
    """Give the rows of a source in its order, a chunk at a time; no more than one chunk is held.

    Columns, all text but `line`: `id`, `sequence`, `line` (int64, from 1: the line a row starts in, in FASTA the
    header's, in Parquet files and datasets the number of the record; of several files see `records.row_number`),
    `label` where `joiner` is given, `split`, `valid` and `unique` where `cfg` names their columns, and
    `filter.<column>` for each column of `cfg.keep` and `cfg.keep_heldout`.

    FASTA headers read `>id key=value key2="two words"`: the first word is the id, whole (`sp|P12345|NAME`).

    Args:
        path: one or more files, see `records.files_of`, or `hf://owner/name@revision/split`.
        cfg: columns and filters.
        joiner: written between the entries where a label is a list; None: labels are not read.

    Raise DataError, after the chunks before the fault, where a file is malformed or empty, or lacks a column.
    """
    source, files = str(path), files_of(str(path))
    by_file = joiner is not None and files[0][1] is not None  # a class per file
    columns = _columns(cfg, None if by_file else joiner)
    held: list[pa.Table] = []
    rows = characters = done = 0
    for place_, (file, label) in enumerate(files):
        empty = True
        for lines, values in _reader(file, cfg.sheet)(file, columns):
            empty = False
            ends = characters + np.cumsum(sum(pc.binary_length(column).to_numpy() for column in values))
            named = {column.name: column_values for column, column_values in zip(columns, values, strict=True)}
            if by_file:
                named["label"] = pa.repeat(pa.scalar(label or "", pa.large_string()), len(lines))
            block = pa.table({"line": row_number(place_, 0) + lines, **named})
            while len(block):
                # A chunk ends with the row that fills it, by rows or by characters.
                size = min(CHUNK_ROWS - rows, int(np.searchsorted(ends, CHUNK_CHARACTERS)) + 1)
                held.append(block.slice(0, size))
                rows, characters = rows + len(held[-1]), int(ends[len(held[-1]) - 1])
                if rows < CHUNK_ROWS and characters < CHUNK_CHARACTERS:
                    break
                yield _finished(source, cfg, pa.concat_tables(held), done)
                done, ends, block = done + rows, ends[size:] - characters, block.slice(size)
                held, rows, characters = [], 0, 0
        if empty:
            raise DataError(f"{file}: the file has no records; check that it was written to its end")
    if held:
        yield _finished(source, cfg, pa.concat_tables(held), done)


def _finished(source: str, cfg: DataConfig, rows: pa.Table, done: int) -> pa.Table:
    """Return the rows of a chunk: ids numbered where the file has none, `done` rows came before; one label."""
    values = {name: rows[name].combine_chunks() for name in rows.column_names}
    lines = values.pop("line")
    values = {name: pc.utf8_trim_whitespace(column) for name, column in values.items()}
    numbered = pc.sum(pc.equal(values["id"], NUMBERED)).as_py()
    if 0 < numbered < len(lines):
        raise DataError(
            f"{source}: some of the files have ids and others none; read them apart, or give all of them ids"
        )
    if numbered:
        values["id"] = pa.array(np.arange(done + 1, done + len(lines) + 1)).cast(pa.large_string())
    labels = len(cfg.label_columns)
    if len(cfg.sequence_columns) > 1:
        chains = [values.pop(f"sequence.{i}") for i in range(len(cfg.sequence_columns))]
        values["sequence"] = _joined(source, lines, chains)
        if _class_column(0) in values:
            regions = [values.pop(_class_column(i)) for i in range(labels)]
            values["label"] = _joined_regions(chains, regions)
    elif _class_column(0) in values:
        columns = [values.pop(_class_column(i)).to_pylist() for i in range(labels)]
        values["label"] = pa.array(_labels_of(source, lines.to_pylist(), cfg.label_columns, columns), pa.large_string())
    if "mask" in values and "label" in values:
        masks, labels = (values.pop(name).to_pylist() for name in ("mask", "label"))
        values["label"] = pa.array(_unmasked(source, lines.to_pylist(), labels, masks), pa.large_string())
    table = pa.table({"line": lines, **values})
    return table.replace_schema_metadata({NUMBERED: ""}) if numbered else table


def _joined(source: str, lines: pa.Array, chains: Sequence[pa.Array]) -> pa.Array:
    """Return the chains of each row as one sequence; where a chain is missing, that alone, as its sequence."""
    joined = pc.binary_join_element_wise(*chains, pa.scalar(BREAK, chains[0].type))
    for chain in reversed(chains):
        for row in np.flatnonzero(pc.match_substring(chain, BREAK).to_numpy(zero_copy_only=False)).tolist():
            where = place(source, lines[row].as_py())
            raise DataError(f"{where}: a chain has {BREAK!r}, which stands between chains; give each a column")
        joined = pc.if_else(pc.is_in(pc.utf8_lower(chain), pa.array(["", *MISSING], chain.type)), chain, joined)
    return joined


def _joined_regions(chains: Sequence[pa.Array], regions: Sequence[pa.Array]) -> pa.Array:
    """Return the regions of each row's residues, with UNKNOWN_RESIDUE for what stands between the chains.

    Where a chain has other residues than regions, those alone, so that their number is wrong in any case.
    """
    lists = pc.match_substring(regions[0], RESIDUE_JOINER)
    between = pc.if_else(lists, f"{RESIDUE_JOINER}{UNKNOWN_RESIDUE}{RESIDUE_JOINER}", UNKNOWN_RESIDUE)
    joined = regions[0]
    for own in regions[1:]:
        joined = pc.binary_join_element_wise(joined, own, between.cast(joined.type))
    for chain, own in zip(chains, regions, strict=True):
        named = pc.if_else(lists, pc.add(pc.count_substring(own, RESIDUE_JOINER), 1), pc.utf8_length(own))
        joined = pc.if_else(pc.equal(named, pc.utf8_length(pc.ascii_rtrim(chain, "*"))), joined, own)
    return joined


def _unmasked(source: str, lines: Sequence[int], labels: Sequence[str], masks: Sequence[str]) -> list[str]:
    """Return the labels of residues with UNKNOWN_RESIDUE wherever the mask is 0."""
    found = []
    for line, label, mask in zip(lines, labels, masks, strict=True):
        if label[:1] in ("[", "(", "{"):
            raise DataError(f"{place(source, line)}: labels in brackets beside a mask; write them without")
        names = label.split(RESIDUE_JOINER) if RESIDUE_JOINER in label else list(label)
        if mask and (len(mask) != len(names) or set(mask) - {"0", "1"}):
            what = f"the mask (data.mask_column) {mask[:60]!r} is not 0 or 1 for each of {len(names)} labels"
            raise DataError(f"{place(source, line)}: {what}; correct it")
        kept = [n if bit == "1" else UNKNOWN_RESIDUE for n, bit in zip(names, mask or "1" * len(names), strict=True)]
        found.append((RESIDUE_JOINER if RESIDUE_JOINER in label else "").join(kept))
    return found


def _labels_of(source: str, lines: Sequence[int], classes: Sequence[str], columns: Sequence[list[str]]) -> list[str]:
    """Return for each row the list of the classes whose column is 1, as JSON."""
    marks = []
    for name, column in zip(classes, columns, strict=True):
        known = {value: MARKS.get(value.lower()) for value in set(column)}
        strange = next((value for value, mark in known.items() if mark is None), None)
        if strange is not None:
            where = place(source, lines[column.index(strange)])
            raise DataError(f"{where}: column {name!r} (data.label_column) has {strange[:60]!r}; write 1 or 0 there")
        marks.append([known[value] for value in column])
    rows = ([name for name, mark in zip(classes, row, strict=True) if mark] for row in zip(*marks, strict=True))
    return [json.dumps(names, ensure_ascii=False) for names in rows]


def read_records(source: str | Path, columns: Sequence[Column], sheet: str | None = None) -> Iterator[Record]:
    """Give the records of a file in any format one by one, with the columns asked for; see `records.Reader`."""
    for lines, values in _reader(str(source), sheet)(str(source), columns):
        texts = zip(*(column.to_pylist() for column in values), strict=True)
        yield from zip(lines.tolist(), map(list, texts), strict=True)


def check_columns(source: str | Path, cfg: DataConfig, joiner: str | None = None) -> None:
    """Raise DataError where a file is missing or lacks a column, as far as its first record shows; see `read_chunks`.

    Datasets, of the hub or saved, are not looked at: their package takes seconds to import.
    """
    for file, name in files_of(str(source)):
        if not is_hub(file) and not os.path.isdir(file):
            next(read_records(file, _columns(cfg, None if name else joiner), cfg.sheet), None)


def columns_of(source: str, sheet: str | None = None) -> tuple[str, ...]:
    """Return the columns of a source's first file: its header, or the keys of its objects or of its FASTA headers."""
    file = files_of(source)[0][0]
    nowhere = Column("any", "a column that no file has", "")
    try:
        for _ in _reader(file, sheet)(file, [nowhere]):
            pass
    except MissingColumnError as error:
        return error.there
    return ()


def check_sheet(sources: Iterable[str], sheet: str | None) -> None:
    """Raise ConfigError where `data.sheet` names a sheet and none of the sources has a workbook."""
    require(
        sheet is None or any(suffix_of(file) == ".xlsx" for source in sources for file, _ in files_of(source)),
        f"data.sheet={sheet} names a sheet of an Excel workbook, and no file is one (.xlsx); leave it out",
    )


def has_labels(source: str, cfg: DataConfig) -> bool:
    """Return whether the first record of a source has the label column; one per class always has labels."""
    file, name = files_of(source)[0]
    columns = _columns(cfg, "")
    try:
        _, values = next(read_records(file, columns, cfg.sheet), (0, []))
    except DataError:
        return False
    # what has a header of its own for each record shows a column only by its value; a .txt may be FASTA
    keys = not _is_table(file) or suffix_of(file) == ".txt"
    return name is not None or not keys or any(v for v, c in zip(values, columns, strict=True) if c.name == "label")


def _is_table(file: str) -> bool:
    saved = os.path.isdir(file) and not os.path.isfile(os.path.join(file, DATA))
    return is_hub(file) or saved or suffix_of(file) in (*DELIMITED, *TABLES)


def make_rows(columns: Mapping[str, Sequence[object]]) -> pa.Table:
    """Return a table in memory: `line` as int64, all else as text (64-bit offsets: a corpus can pass 2 GiB)."""
    schema = pa.schema([(name, pa.int64() if name == "line" else pa.large_string()) for name in columns])
    return pa.table(dict(columns), schema=schema)


def text_bytes(rows: pa.Table, name: str = "sequence") -> tuple[memoryview, np.ndarray]:
    """Return the values of a column end to end, in UTF-8 and not copied, and int64 [rows + 1] where each begins."""
    column = rows[name].combine_chunks()
    if not len(column):
        return memoryview(b""), np.zeros(1, dtype=np.int64)
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64)[column.offset : column.offset + len(column) + 1]
    return memoryview(data)[bounds[0] : bounds[-1]], bounds - bounds[0]


def filter_column(source: str) -> str:
    """Return the name, in the rows, of a column that a row filter looks at (it may be the label's as well)."""
    return f"filter.{source}"


def _columns(cfg: DataConfig, joiner: str | None) -> list[Column]:
    columns = [
        Column("id", cfg.id_column, "data.id_column", default=cfg.id_column == DataConfig.id_column),
    ]
    own = cfg.sequence_column == DataConfig.sequence_column
    of = cfg.sequence_columns
    require(len(set(of)) == len(of), f"data.sequence_column={cfg.sequence_column} names a column twice; name each once")
    names = ["sequence"] if len(of) == 1 else [f"sequence.{i}" for i in range(len(of))]
    columns += [
        Column(name, source, "data.sequence_column", default=own) for name, source in zip(names, of, strict=True)
    ]
    labels = cfg.label_columns
    if joiner is not None:
        own = cfg.label_column == DataConfig.label_column
        names = ["label"] if len(labels) == 1 else [_class_column(i) for i in range(len(labels))]
        columns += [Column(n, of, "data.label_column", joiner, own) for n, of in zip(names, labels, strict=True)]
    for name, setting in _NAMED.items():
        source = getattr(cfg, setting)
        if source is not None and (name != "mask" or joiner is not None):
            columns.append(Column(name, source, f"data.{setting}"))
    filters = dict.fromkeys(cfg.keep_heldout, "data.keep_heldout") | dict.fromkeys(cfg.keep, "data.keep")
    return columns + [
        Column(filter_column(source), source, setting, (joiner or LIST_JOINER) if source in labels else None)
        for source, setting in filters.items()
    ]


_NAMED = {"mask": "mask_column", "split": "split_column", "valid": "valid_column", "unique": "unique_column"}
"""Column of the rows -> the setting that names it in the file, if any does."""


def _class_column(number: int) -> str:
    return f"label.{number}"


def _reader(source: str, sheet: str | None = None) -> Reader:
    if is_hub(source):
        return read_hub
    if "\0" in source:
        raise DataError(f"{source!r}: a zero byte, which no file's name has; correct the name")
    if os.path.isdir(source):
        return read_lmdb if os.path.isfile(os.path.join(source, DATA)) else read_dataset
    suffix = suffix_of(source)
    if source.lower().endswith(".gz") and suffix in TABLES:
        raise DataError(f"{source}: such files are compressed within; unpack it, or name it {suffix} if it is plain")
    if suffix not in FORMATS:
        cure = _HINTS.get(suffix, f"name the file with one of {' '.join(FORMATS)}, text plain or .gz")
        raise DataError(f"{source}: unknown format {suffix!r}; {cure}")
    return partial(read_workbook, sheet=sheet) if suffix == ".xlsx" else FORMATS[suffix]


_HINTS = {
    **dict.fromkeys((".a3m", ".a2m"), "name it .fasta, and take gaps out with data.on_bad_residue=strip"),
    **dict.fromkeys((".aln", ".sto", ".phy"), "save it as .fasta, and take gaps out with data.on_bad_residue=strip"),
    **dict.fromkeys((".fastq", ".fq", ".fna", ".ffn"), "translate the nucleotides into proteins, saved as .fasta"),
    **dict.fromkeys((".pir", ".nbrf", ".gb", ".gbk", ".embl", ".dat", ".xml"), "save the proteins as .fasta"),
    **dict.fromkeys((".pdb", ".ent", ".cif"), "save the sequences of the structure as .fasta"),
    **dict.fromkeys((".xls", ".ods"), "save the sheet as .csv or .xlsx"),
    **dict.fromkeys((".zip", ".bz2", ".xz", ".zst", ".tar", ".tgz"), "unpack it"),
}
"""Suffix of a file that is not read -> what to make of it."""
FORMATS: dict[str, Reader] = {
    **{suffix: partial(read_delimited, delimiter=delimiter) for suffix, delimiter in DELIMITED.items()},
    **dict.fromkeys(FASTA, read_fasta),
    **dict.fromkeys(JSONL, read_jsonl),
    JSON: read_json_list,
    **dict.fromkeys(TABLES, read_parquet),
    ".xlsx": read_workbook,
    **dict.fromkeys(LMDB, read_lmdb),
}
"""Suffix (before .gz) -> reader."""
