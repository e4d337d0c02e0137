"""`esm-neuron data check FILE` and `esm-neuron data get NAME`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from esm_neuron.command_parser import CommandParser
from esm_neuron.config import DataConfig, TaskConfig, TaskName


def check(argv: Sequence[str]) -> int:
    """Lengths, alphabet, repeats, labels, conflicts, leaks and faults of a file; exit code 1 where rows have faults."""
    parser = CommandParser(prog="esm-neuron data check", description=check.__doc__)
    parser.add_argument(
        "file", help="FASTA, CSV, TSV, JSONL, Parquet, a saved dataset or hf://owner/name@revision/split"
    )
    parser.add_argument("--id_column", default=DataConfig.id_column, help="default: %(default)s")
    parser.add_argument("--sequence_column", default=DataConfig.sequence_column, help="default: %(default)s")
    parser.add_argument("--label_column", help="looked at where it is named")
    parser.add_argument(
        "--task",
        choices=[name for name in get_args(TaskName) if name != "masked_lm"],
        default=TaskConfig.name,
        help="what its labels are: one a protein, several joined by `;`, a number, one a residue; default: %(default)s",
    )
    parser.add_argument("--split_column", help="looked at where it is named")
    parser.add_argument("--train", default="train", help="value of the split column for training rows")
    parser.add_argument("--relatives", choices=["kmer", "mmseqs", "off"], default="kmer", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    from esm_neuron.data.check import check_file

    _, valid, test = DataConfig.split_names
    cfg = DataConfig(
        id_column=args.id_column,
        sequence_column=args.sequence_column,
        label_column=args.label_column or DataConfig.label_column,
        split_column=args.split_column,
        split_names=(args.train, valid, test),
    )
    method = None if args.relatives == "off" else args.relatives
    found = check_file(args.file, cfg, args.task if args.label_column else None, method)
    print(json.dumps(asdict(found), indent=2) if args.json else found.render())
    return 1 if found.faults else 0


def get(argv: Sequence[str]) -> int:
    """Fetch the public original of a data set of the docs and rebuild our file from it, both proven by sha256."""
    from esm_neuron.data.download import RECIPES
    from esm_neuron.data.download import get as fetch

    parser = CommandParser(prog="esm-neuron data get", description=get.__doc__)
    parser.add_argument("name", choices=list(RECIPES), help="which data set, see docs/data.md")
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder to write to; default: %(default)s")
    parser.add_argument("--archive", type=Path, help="the package's wheel or .tar.gz where pip cannot fetch it")
    args = parser.parse_args(argv)
    print(fetch(args.name, args.output, args.archive))
    print(RECIPES[args.name].licence)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"check": check, "get": get}
"""Sub-command -> function of the words after it, returning the exit code."""


def data(argv: Sequence[str]) -> int:
    """Look at a file of proteins (`data check`), or get those of the docs (`data get`)."""
    parser = CommandParser(prog="esm-neuron data", description=data.__doc__)
    parser.add_argument("command", choices=list(COMMANDS), help="`data check --help` and `data get --help` tell more")
    args = parser.parse_args(argv[:1])
    return COMMANDS[args.command](argv[1:])
