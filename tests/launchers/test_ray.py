"""Answers by a real Ray on this machine, two actors: those of the plain command, whatever becomes of a worker.

Ray is in no lock: run `python -m pytest -m ray tests/launchers/test_ray.py` where it is installed beside ours.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import yaml
from helpers.processes import wait_for

from esm_neuron import cli
from esm_neuron.data.parquet import read_table

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "launchers" / "ray" / "answers.py"
PATIENCE = 900
"""Seconds that a cluster may take to start and answer on a busy machine."""
SLOW = {"RAY_raylet_start_wait_time_s": "300", "RAY_worker_register_timeout_seconds": "600"}
SMALL = ("--data.pack_tokens", "128", "--data.max_residues", "126", "--loop.eval_packs_per_device", "1")
"""Pieces of some 30 proteins."""


@pytest.fixture
def proteins(tmp_path: Path) -> Path:
    """A folder with two files of FASTA and one of another kind of name, which is hidden."""
    draw, folder = random.Random(1), tmp_path / "proteins"
    folder.mkdir()
    for file in range(2):
        records = (
            f">P{file}{n:03d}\n{''.join(draw.choices('ACDEFGHIKLMNPQRSTVWY', k=draw.randint(30, 120)))}\n"
            for n in range(150)
        )
        (folder / f"part-{file}.fasta").write_text("".join(records))
    (folder / "_SUCCESS").touch()
    return folder


def start(words: list[str]) -> subprocess.Popen[str]:
    env = {**os.environ, **SLOW, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(PROGRAM), *words, "--actors", "2", "--", *SMALL]
    return subprocess.Popen(program, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(folder: Path) -> pa.Table:
    """All answers, in the order of the files' names."""
    return pa.concat_tables([read_table(path) for path in sorted(folder.glob("*.parquet"))])


def plain(proteins: Path, target: Path, *words: str) -> pa.Table:
    """What the command writes for each file, one behind the other."""
    found = []
    for path in sorted(proteins.glob("*.fasta")):
        one = target.with_name(f"{path.stem}.parquet")
        assert cli.main([words[0], *words[1:], "--input", str(path), "--output", str(one), *SMALL]) == 0
        found.append(read_table(one))
    return pa.concat_tables(found)


@pytest.mark.ray
def test_a_killed_worker_loses_and_doubles_nothing(proteins: Path, tmp_path: Path) -> None:
    """The rows are those of the plain command, to the bit; the same command again has nothing to do."""
    out = tmp_path / "answers"
    words = ["embed", "--model", "mini", "--input", str(proteins), "--output", str(out)]
    job = start(words)
    wait_for(lambda: len(list(out.glob("*.parquet"))) > 1, PATIENCE, [job])
    # One at work: the other may still be starting. Ray writes into a process's command line what it does.
    at_work = [
        one for one in psutil.process_iter(["cmdline"]) if "Answerer).submit" in " ".join(one.info["cmdline"] or [])
    ]
    at_work[0].send_signal(signal.SIGKILL)
    there = len(list(out.glob("*.parquet")))
    said, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, said[-4000:]
    expected = plain(proteins, tmp_path / "plain", "embed", "--model", "mini")
    assert len(expected) == 300 and rows(out).equals(expected)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert there < len(before), "killed after its work"
    (out / "00000-0000000-0123456789abcdef.parquet").write_bytes(b"of other weights")
    job = start([*words, "--resume"])
    said, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0 and f"{len(before)} Parquet files of 2 files, {len(before)} of them there before" in said
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")} == before


def answer(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> int:
    """Run the pipeline in this process, piece by piece: what its tasks and actors do, without Ray."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import answers

    def here(args: Any, files: list[str], before: dict[str, str]) -> Any:
        actor = answers.Answerer(args, before)
        for file in answers.numbered(files):
            for piece in answers.Reader(args)({name: [value] for name, value in file.items()}):
                row = actor(piece)
                yield {name: values[0] for name, values in row.items()}

    monkeypatch.setattr(answers, "answered", here)
    return int(answers.main([*words, "--", *SMALL]))


def test_embeddings_of_a_bucket_and_back(proteins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a file system of pyarrow that is no local one."""
    from pyarrow import fs

    class Elsewhere(fs.SubTreeFileSystem):
        """Not local to those who ask."""

    (tmp_path / "bucket" / "in").mkdir(parents=True)
    bucket = Elsewhere(str(tmp_path / "bucket"), fs.LocalFileSystem())
    fs.copy_files(str(proteins), "in", destination_filesystem=bucket)
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import answers

    monkeypatch.setattr(answers, "place_of", lambda uri: (bucket, uri.removeprefix("s3://bucket/")))
    words = ["embed", "--model", "mini", "--input", "s3://bucket/in", "--output", "s3://bucket/out"]
    assert answer(monkeypatch, words) == 0
    expected = plain(proteins, tmp_path / "plain", "embed", "--model", "mini")
    assert rows(tmp_path / "bucket" / "out").equals(expected)


def test_files_that_are_added_leave_the_answers_of_the_others(
    proteins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One before all others gives them other numbers: their answers move, and no model is asked for them."""
    out = tmp_path / "answers"
    words = ["embed", "--model", "mini", "--input", str(proteins), "--output", str(out), "--resume"]
    assert answer(monkeypatch, words) == 0
    before = {path.name[6:] for path in out.iterdir()}
    (proteins / "one-before.fasta").write_text(">new\nMKTAYIAKQR\n")
    import answers

    asked: list[int] = []
    kept = answers.write_table
    monkeypatch.setattr(answers, "write_table", lambda path, table: asked.append(len(table)) or kept(path, table))
    assert answer(monkeypatch, words) == 0
    assert asked == [1] and {path.name[6:] for path in out.iterdir()} > before
    assert len(list(out.iterdir())) == len(before) + 1
    expected = plain(proteins, tmp_path / "plain", "embed", "--model", "mini")
    assert rows(out).equals(expected)


def test_a_hundred_thousand_files_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import answers

    numbers = [row["number"] for row in answers.numbered([""] * 100_001)]
    assert numbers == sorted(numbers) and len(set(numbers)) == 100_001
    assert answers.OURS.fullmatch(f"{numbers[-1]}-0000000-0123456789abcdef.parquet")


def test_scores_and_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wild.fasta").write_text(">w\nMKTAYIAKQRQISFVKSHFSRQ\n")
    (tmp_path / "variants.csv").write_text("variant\nM1A\nK2R\nK2R:T3S\n")
    common = ["score", "--model", "mini", "--wild-type", str(tmp_path / "wild.fasta"), "--input"]
    words = [*common, str(tmp_path / "variants.csv"), "--output", str(tmp_path / "scores")]
    assert answer(monkeypatch, words) == 0
    assert cli.main([*common, str(tmp_path / "variants.csv"), "--output", str(tmp_path / "plain.parquet"), *SMALL]) == 0
    assert rows(tmp_path / "scores").equals(read_table(tmp_path / "plain.parquet"))
    capsys.readouterr()
    assert answer(monkeypatch, words) == 2
    assert f"--output {tmp_path}/scores: holds 1 files; add --resume to go on" in capsys.readouterr().err
    (tmp_path / "variants.csv").write_text("variant\nM1A\nA2R\n")
    assert answer(monkeypatch, [*words, "--resume"]) == 2
    assert "variants.csv:3:" in capsys.readouterr().err
    assert answer(monkeypatch, [*common, str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 2
    assert f"--input {tmp_path}/none: " in capsys.readouterr().err


def test_only_answers_of_before_are_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that holds anything else is left alone, whatever was asked; a list of what is right now goes."""
    proteins, out = tmp_path / "proteins", tmp_path / "out"
    proteins.mkdir()
    (proteins / "p.csv").write_text("id,sequence\na,MKTAYIAKQR\nb,MKT1YIAKQR\n")
    words = ["embed", "--model", "mini", "--input", str(proteins), "--output", str(out), "--resume"]

    def run(*more: str) -> int:
        monkeypatch.setattr(sys.modules[__name__], "SMALL", (*SMALL, *more))
        return answer(monkeypatch, words)

    assert run("--data.on_bad_residue", "skip") == 0
    (old,) = out.glob("*.parquet")
    assert [path.name for path in out.glob("_*")] == ["_rejected-00000.tsv"]
    (proteins / "p.csv").write_text("id,sequence\na,MKTAYIAKQR\nb,MKTAYIAKQW\n")
    assert run() == 0
    assert not old.exists() and len(rows(out)) == 2 and not list(out.glob("_*"))
    (out / "mine.parquet").write_bytes(b"something dear")
    there = set(out.iterdir())
    capsys.readouterr()
    assert run() == 2
    assert f"holds {out}/mine.parquet, which is no answer" in capsys.readouterr().err
    assert set(out.iterdir()) == there
    words[-2] = str(proteins / "answers")
    assert run() == 2
    assert "is in --input" in capsys.readouterr().err and not (proteins / "answers").exists()


def test_the_clusters_files_have_one_version_and_start_what_is_here() -> None:
    job = yaml.safe_load((PROGRAM.parent / "kuberay.yaml").read_text())
    answers = job["spec"]["entrypoint"].split()
    assert job["kind"] == "RayJob" and (ROOT / answers[1]) == PROGRAM
    cluster = yaml.safe_load((PROGRAM.parent / "ec2.yaml").read_text())
    assert cluster["head_node_type"] in cluster["available_node_types"]
    assert f"=={job['spec']['rayClusterSpec']['rayVersion']}" in " ".join(cluster["setup_commands"])
    assert cluster["setup_commands"][-1].endswith(">> ~/.bashrc"), "where ray submit finds its python"


@pytest.mark.ray
def test_ray_takes_the_file_of_its_cluster() -> None:
    from ray.autoscaler._private import util

    cluster = yaml.safe_load((PROGRAM.parent / "ec2.yaml").read_text())
    util.validate_config(util.prepare_config(cluster))
    with pytest.raises(Exception, match="max_wrkers"):
        util.validate_config(util.prepare_config({**cluster, "max_wrkers": 1}))
