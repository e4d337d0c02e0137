"""Predict, embed or score on a Ray cluster: files in, Parquet out, both local or in a bucket.

    python launchers/ray/answers.py predict --model runs/mine --actors 8 --gpus 1 --backend cuda \\
        --input s3://bucket/proteins/ --output s3://bucket/answers/ [--resume] [-- --data.sequence_column seq]
    python launchers/ray/answers.py embed --model facebook/esm2_t33_650M_UR50D --pooling mean --input ... --output ...
    python launchers/ray/answers.py score --model facebook/esm2_t33_650M_UR50D --wild-type wt.fasta --input ...

A Ray Data pipeline: tasks read the files (FASTA, CSV, TSV, JSONL, Parquet) into the pieces of the command of the same
name, actors that hold the model answer each piece, and write it as a Parquet file of its own. The file's name has the
number of the input's file, that of the piece in it, and a hash of the piece, the weights and the settings. So a piece
whose actor or task was lost is answered again under the same name, and none is there twice; the same command again with
--resume does what is missing, and where files were added to the input, what moved is copied, not answered again. Files
are named in the order of the input. After `--` come settings, as for the command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from pyarrow import fs

from esm_neuron.backends import create_backend
from esm_neuron.cli import log
from esm_neuron.config import require
from esm_neuron.config.flags import CommandParser
from esm_neuron.data.parquet import write_table
from esm_neuron.data.validation import save_rejected
from esm_neuron.errors import ConfigError, EsmNeuronError, one_line
from esm_neuron.inference.embed import Pooling, embedding
from esm_neuron.inference.predict import Work, prediction
from esm_neuron.inference.score import Method, Scoring
from esm_neuron.inference.spool import digest_of
from esm_neuron.inference.variants import VariantColumns
from esm_neuron.redact import shown

OURS = re.compile(r"\d{5,}-\d{7}-([0-9a-f]{16})\.parquet(\.tmp)?|_rejected-\d{5,}\.tsv(\.tmp)?")
"""Names of the files that are written."""


def make_work(args: argparse.Namespace) -> Work | Scoring:
    """Return what the command makes of each record; every process makes its own."""
    common = {"backend": args.backend, "settings": args.settings}
    if args.command == "predict":
        return prediction(args.model, coverage=args.coverage, **common)
    if args.command == "embed":
        return embedding(args.model, args.pooling, **common)
    columns = VariantColumns(args.variant_column, args.sequence_column, None)
    wild = args.wild_type
    return Scoring.of(args.model, args.method, wild, columns, args.first_residue, **common).read_wild_type()


def place_of(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URI or local path, and the path in it. Raises ConfigError where there is none."""
    try:
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(uri if "://" in uri else str(Path(uri).resolve()))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{uri}: no file system ({one_line(error)}); give a path, s3://, gs:// or hdfs://") from error
    return found


def files_in(uri: str) -> list[str]:
    """Return the paths of the files of a source, in order: one file, or all below a folder but hidden ones."""
    system, path = place_of(uri)
    try:
        info = system.get_file_info(path)
        selector = fs.FileSelector(path, recursive=True)
        found = [info] if info.type == fs.FileType.File else system.get_file_info(selector)
    except OSError as error:
        raise ConfigError(
            f"--input {uri}: {one_line(error)}; give a file or a folder that every node can read"
        ) from error
    hidden = ("_", ".")
    files = [one.path for one in found if one.type == fs.FileType.File and not one.base_name.startswith(hidden)]
    require(bool(files), f"--input {uri}: holds no files; give a file or a folder that every node can read")
    return sorted(files)


@contextmanager
def here(system: fs.FileSystem, path: str) -> Iterator[Path]:
    """Yield a file of a file system as one of this machine."""
    if isinstance(system, fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / PurePosixPath(path).name
        fs.copy_files(path, str(local), source_filesystem=system, destination_filesystem=fs.LocalFileSystem())
        yield local


def put(source: str, system: fs.FileSystem, path: str, of: fs.FileSystem | None = None) -> None:
    """Copy a file, of this machine or `of` a file system, into a file system; it is seen there whole or not at all."""
    aside = path if system.type_name in ("s3", "gcs") else f"{path}.tmp"  # an object is there once it is closed
    fs.copy_files(source, aside, source_filesystem=of or fs.LocalFileSystem(), destination_filesystem=system)
    if aside != path:
        system.move(aside, path)


class Reader:
    """Reads a file into its pieces, in a task."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield each piece of a file as a row; list the records that were left out or changed beside the output."""
        work, (number,), (path,) = make_work(self.args), batch["number"], batch["path"]
        system, target = place_of(self.args.output)
        with here(place_of(self.args.input)[0], path) as source:
            records: Any = work.source(source)
            for place, piece in enumerate(records()):
                held = np.empty(1, object)
                held[0] = (piece.content, digest_of(records.pack(piece.content)))
                yield {"name": np.array([f"{number}-{place:07d}"]), "piece": held}
        if records.rejected:
            with tempfile.TemporaryDirectory() as folder:
                save_rejected(Path(folder) / "rejected.tsv", records.rejected)
                put(f"{folder}/rejected.tsv", system, f"{target}/_rejected-{number}.tsv")


class Answerer:
    """Holds the model, in an actor, and writes the answers of pieces."""

    def __init__(self, args: argparse.Namespace, before: Mapping[str, str]) -> None:
        """`before`: the hash of each file of answers that is there -> its path."""
        work, self.before = make_work(args), before
        self.loaded = work.load(create_backend(work.cfg))
        self.identity = json.dumps(self.loaded.identity, sort_keys=True).encode()
        self.system, self.target = place_of(args.output)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the answers of a piece, where they are not there yet; return the name of their file and its rows."""
        (name,), ((content, digest),) = batch["name"], batch["piece"]
        key = hashlib.sha256(self.identity + digest.encode()).hexdigest()[:16]
        path = f"{self.target}/{name}-{key}.parquet"
        there = self.system.get_file_info(path).type == fs.FileType.File
        if not there and key in self.before:  # its file has another number since files were added, or the order is new
            put(self.before[key], self.system, path, self.system)
        elif not there:
            table: Any = self.loaded(content)
            with tempfile.TemporaryDirectory() as folder:
                write_table(Path(folder) / "answers.parquet", table)
                put(f"{folder}/answers.parquet", self.system, path)
        return {"path": np.array([path]), "done_before": np.array([there or key in self.before])}


def run(args: argparse.Namespace) -> None:
    """Answer every record of the input."""
    make_work(args)  # a wrong model or setting is an error here, not in a task
    files = files_in(args.input)
    system, target = place_of(args.output)
    inside = f"{target}/".startswith(f"{place_of(args.input)[1]}/")
    require(not inside, f"--output {args.output}: is in --input, and would be read with it; name a folder elsewhere")
    system.create_dir(target, recursive=True)
    before = [one.path for one in system.get_file_info(fs.FileSelector(target))]
    names = {path: OURS.fullmatch(PurePosixPath(path).name) for path in before}
    other = next((path for path, ours in names.items() if ours is None), None)
    cure = "which is no answer of this program; name a folder that has only these, or none yet"
    require(other is None, f"--output {args.output}: holds {other}, {cure}")
    require(args.resume or not before, f"--output {args.output}: holds {len(before)} files; add --resume to go on")
    for path in before:
        if PurePosixPath(path).name.startswith("_"):  # every file is read anew, and says anew what was left out
            system.delete_file(path)
    written, known = set[str](), 0
    keys = {ours[1]: path for path, ours in names.items() if ours and path.endswith(".parquet")}
    for row in answered(args, files, keys):
        written.add(row["path"])
        known += bool(row["done_before"])
    for path in before:  # of other weights or settings, or of records that have changed
        if not PurePosixPath(path).name.startswith("_") and path not in written:
            system.delete_file(path)
    said = f", {known} of them there before" if known else ""
    log(
        f"{args.output}: {len(written)} Parquet files of {len(files)} files{said}; their names are in the input's order"
    )


def numbered(files: Sequence[str]) -> list[dict[str, str]]:
    """Return a row per file with its number, which sorts as the files do."""
    width = max(5, len(str(len(files) - 1)))
    return [{"number": f"{number:0{width}d}", "path": path} for number, path in enumerate(files)]


def answered(args: argparse.Namespace, files: Sequence[str], before: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each piece, once it has been written. Raises EsmNeuronError as a task or an actor did."""
    import ray

    ray.init(address=args.address, ignore_reinit_error=True, log_to_driver=args.verbose)
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1  # each piece travels alone, so that no actor waits for another's pieces
    context.enable_progress_bars = args.verbose
    needs: dict[str, Any] = {"num_cpus": args.cpus}
    if args.gpus:
        needs["num_gpus"] = args.gpus
    if args.neuron_cores:
        needs["resources"] = {"neuron_cores": args.neuron_cores}
    rows = (
        ray.data.from_items(numbered(files), override_num_blocks=len(files))
        # No core of their own: actors may hold all there are. And with other needs than theirs Ray does not read in the
        # actors, where a file would be the work of one.
        .map_batches(Reader(args), batch_size=1, num_cpus=0, concurrency=args.actors)
        .map_batches(
            Answerer,
            fn_constructor_args=(args, before),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=args.actors),
            **needs,
        )
    )
    try:
        yield from rows.iter_rows()
    except ray.exceptions.RayError as error:
        raise cause(error) from error


def cause(error: BaseException) -> EsmNeuronError:
    """Return the error of ours that ended a task; any other one is named as it is."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, EsmNeuronError):
            return found
        found = getattr(found, "cause", None) or found.__cause__
    return EsmNeuronError(f"Ray: {one_line(error)}")


def make_parser() -> CommandParser:
    """Return the parser of the commands."""
    parser = CommandParser(prog="answers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("predict", "embed", "score"):
        one = commands.add_parser(command)
        one.add_argument("--model", required=True, help="as for the command; a path that every node sees, or a hub id")
        one.add_argument("--input", required=True, help="file or folder, a path or a URI such as s3://bucket/proteins/")
        one.add_argument("--output", required=True, help="folder of Parquet files, a path or a URI")
        one.add_argument("--resume", action="store_true", help="go on in a folder that holds answers")
        one.add_argument("--backend", choices=["cpu", "cuda", "neuron"], help="default: where the model was trained")
        one.add_argument("--actors", type=int, default=2, help="models at a time (default: %(default)s)")
        one.add_argument("--cpus", type=float, default=1, help="cores of an actor (default: %(default)s)")
        one.add_argument("--gpus", type=float, default=0, help="GPUs of an actor")
        one.add_argument("--neuron-cores", type=int, default=0, help="NeuronCores of an actor")
        one.add_argument("--address", help="of a cluster, such as auto; default: a cluster on this machine")
        one.add_argument("--verbose", action="store_true", help="show Ray's progress and the workers' logs")
        if command == "predict":
            one.add_argument("--coverage", type=float, help="as for esm-neuron predict")
        if command == "embed":
            one.add_argument("--pooling", choices=get_args(Pooling), default="mean")
        if command == "score":
            one.add_argument("--method", choices=get_args(Method), default="masked-marginal")
            one.add_argument("--wild-type", type=Path, help="file with the one protein that variants are named after")
            one.add_argument("--variant-column", default="variant")
            one.add_argument("--sequence-column", help="whole sequences, read instead of variants")
            one.add_argument("--first-residue", type=int, default=1)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one command; return the exit code."""
    split = list(argv).index("--") if "--" in argv else len(argv)
    try:
        args = make_parser().parse_args(argv[:split])
        args.settings = tuple(argv[split + 1 :])
        require(args.actors >= 1, f"--actors {args.actors}: must be at least 1")
        run(args)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        sys.stderr.write(shown('answers.py: error: ray is not installed; pip install "ray[data]"') + "\n")
        return 2
    except EsmNeuronError as error:
        sys.stderr.write(shown(f"answers.py: error: {error}") + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
