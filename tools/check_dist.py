"""Check dist/: size, metadata and contents; then install the wheel into an empty environment and run it there.

python tools/check_dist.py dist constraints/current.txt python3.12
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[1]
MOST = 12_000_000
"""Bytes of a wheel: `mini` and its tokenizer are most of it."""
NEEDED = ("esm_neuron/py.typed", "esm_neuron/planning/instances.yaml", "esm_neuron/reports/templates/report.html.jinja")


def check_files(folder: Path) -> Path:
    """Return the one wheel of `folder`; raise SystemExit where it or the source archive is not fit to publish."""
    wheels, archives = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(archives) != 1:
        raise SystemExit(f"{folder} has {len(wheels)} wheels and {len(archives)} source archives, must have one each")
    wheel, archive = wheels[0], archives[0]
    for path in (wheel, archive):
        if path.stat().st_size > MOST:
            raise SystemExit(f"{path} has {path.stat().st_size:,} bytes, more than {MOST:,}")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        (header,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(opened.read(header))  # raises where a field is wrong
    lacking = [name for name in NEEDED if name not in names]
    foreign = [name for name in names if not name.startswith(("esm_neuron/", f"esm_neuron-{metadata.version}."))]
    if lacking or foreign:
        raise SystemExit(f"{wheel} lacks {lacking} and has {foreign[:3]} that do not belong")
    with tarfile.open(archive) as opened_archive:
        sources = {name.partition("/")[2] for name in opened_archive.getnames()}
    if lacking := [name for name in (*NEEDED, "pyproject.toml", "LICENSE", "README.md") if name not in sources]:
        raise SystemExit(f"{archive} lacks {lacking}")
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {archive.name}: {archive.stat().st_size:,} bytes")
    return wheel


def try_wheel(wheel: Path, constraints: Path, python: str) -> None:
    """Install the wheel with the versions of a lock, and train and predict with it outside of the repository."""
    uv = Path(sys.executable).with_name("uv")
    python = str(Path(python).absolute()) if Path(python).exists() else python
    with tempfile.TemporaryDirectory() as name:
        folder, env = Path(name), Path(name) / "env"
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}

        def run(*words: object) -> None:
            subprocess.run([str(word) for word in words], check=True, cwd=folder, env=clean | {"VIRTUAL_ENV": str(env)})

        run(uv, "venv", "--quiet", "--python", python, env)
        run(uv, "pip", "install", "--quiet", "-c", constraints.resolve(), wheel.resolve())
        shutil.copy(ROOT / "examples/demo/unknown.fasta", folder)
        rows = [f"P{i},{'MKV' + 'LAGTREW' * (3 + i % 4)},{'in' if i % 2 else 'out'}" for i in range(24)]
        (folder / "proteins.csv").write_text("\n".join(("id,sequence,label", *rows)) + "\n", encoding="utf-8")
        command = env / "bin" / "esm-neuron"
        sizes = ("--data.pack_tokens", 256, "--data.max_residues", 254, "--loop.max_steps", 4)
        run(command, "train", "--data.train", "proteins.csv", "--model.name", "mini", "--output", "run", *sizes)
        run(command, "predict", "--model", "run", "--input", "unknown.fasta", "--output", "predictions.csv")
        run(command, "report", "run")
        lines = (folder / "predictions.csv").read_text(encoding="utf-8").splitlines()
    print(f"installed by {constraints.name} on {python}: trained, predicted {len(lines) - 1} proteins, reported")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dist", type=Path)
    parser.add_argument("constraints", type=Path)
    parser.add_argument("python", help="path or name of an interpreter")
    given = parser.parse_args()
    try_wheel(check_files(given.dist), given.constraints, given.python)
