"""A finished run behind an endpoint: the archive's handler predicts as `esm-neuron predict` does."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosting
import inference
import pandas as pd
import pytest

from esm_neuron import cli
from esm_neuron.config import TaskConfig, TrainConfig
from esm_neuron.config.settings import read_config
from esm_neuron.errors import DataError
from esm_neuron.tasks import create_task
from esm_neuron.training import run

Toy = Callable[..., TrainConfig]

HANDLER = """
import json, sys
sys.path.insert(0, sys.argv[1] + "/code")
import esm_neuron, inference
assert esm_neuron.__file__.startswith(sys.argv[1]), esm_neuron.__file__
model = inference.model_fn(sys.argv[1])
for line in sys.stdin:
    body, kind = json.loads(line)
    print(inference.output_fn(inference.predict_fn(inference.input_fn(body, kind), model), "application/json"))
"""


@pytest.mark.launchers
def test_the_handler_predicts_as_the_command_does(toy: Toy, tmp_path: Path) -> None:
    cfg = toy()
    run.train(cfg, str)
    archive, served = tmp_path / "model.tar.gz", tmp_path / "served"
    assert hosting.main(["--model", cfg.output, "--output", str(archive)]) == 0
    with tarfile.open(archive) as packed:
        packed.extractall(served, filter="data")
    assert {path.name for path in served.iterdir()} == {"config.yaml", "model", "code"}
    lines = (served / "code" / "requirements.txt").read_text().splitlines()
    assert "torch==2.8.0+cpu" in lines and any(line.startswith("--extra-index-url") for line in lines)

    rows = pd.read_csv(str(cfg.data.test))
    records = [{"id": str(row.id), "sequence": row.sequence} for row in rows.itertuples()]
    fasta = "".join(f">{r['id']} a protein\n{r['sequence'][:30]}\n{r['sequence'][30:]}\n" for r in records)
    requests: list[tuple[Any, str]] = [(json.dumps({"records": records}), "application/json; charset=utf-8")]
    requests += [(fasta, "text/plain"), (json.dumps({"sequences": [records[0]["sequence"]]}), "application/json")]
    done = subprocess.run(
        [sys.executable, "-c", HANDLER, str(served)],
        input="\n".join(map(json.dumps, requests)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    many, by_fasta, single = (json.loads(line)["predictions"] for line in done.stdout.splitlines())
    assert many == by_fasta

    assert (
        cli.main(["predict", "--model", cfg.output, "--input", str(cfg.data.test), "--output", f"{tmp_path}/a.csv"])
        == 0
    )
    wanted = pd.read_csv(tmp_path / "a.csv")
    assert [prediction["id"] for prediction in many] == list(wanted["id"]) and list(many[0]) == list(wanted.columns)
    for prediction, (_, row) in zip(many, wanted.iterrows(), strict=True):
        for name, value in row.items():
            assert prediction[name] == (pytest.approx(value, abs=2e-5) if isinstance(value, float) else value)
    assert single[0]["label"] == many[0]["label"]

    hosting.lay_out(Path(cfg.output), tmp_path / "gpu", "cuda")
    assert read_config(tmp_path / "gpu" / "config.yaml").backend == "cuda", "where the handler answers"
    assert "torch==2.8.*" in (tmp_path / "gpu" / "code" / "requirements.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("{", "application/json", "request: .* send {"),
        ('{"records": [{"id": 1}]}', "application/json", "a record has no sequence"),
        ('{"sequences": [3]}', "application/json", "a sequence is int, not text"),
        ("MKT\n>a\nMKT", "text/plain", "request is not FASTA"),
        (
            "a,b",
            "text/html",
            "content type 'text/html'; send application/json, application/jsonlines, text/csv, text/pl",
        ),
        ("a,b,MKT", "text/csv", "3 columns, none of them called sequence"),
        ("a,MKT\nMKV", "text/csv", "rows of several lengths"),
        ("", "text/csv", "no rows"),
        ('{"id": "a"}', "application/jsonlines", "a record has no inputs; send .* on each line"),
        ('["MKT"]', "application/jsonlines", "list where an object belongs; send .* on each line"),
        ('{"inputs": {"a": 1}}', "application/json", "inputs is dict, not a list"),
    ],
)
def test_requests_that_cannot_be_used(body: str, kind: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        inference.input_fn(body, kind)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ('{"inputs": ["MKT", "MKV"]}', "application/json"),
        ('{"sequences": ["MKT", "MKV"]}', "application/json; charset=utf-8"),
        ('{"inputs": "MKT"}\n{"sequence": "MKV"}\n', "application/jsonlines"),
        ("MKT\nMKV\n", "text/csv"),
        ('0,MKT\r\n1,"MKV"', "text/csv"),
        ("Sequence,kingdom,ID\nMKT,plants,0\nMKV,fungi,1", "text/csv"),
        (">0 one\nMK\nT\n>1\nMKV\n", "text/plain"),
    ],
)
def test_the_forms_of_a_request(body: str, kind: str) -> None:
    assert inference.input_fn(body.encode(), kind) == [("0", "MKT"), ("1", "MKV")]


def test_one_sequence_as_hugging_faces_endpoints_take_it() -> None:
    assert inference.input_fn('{"inputs": "MKT"}', "application/json") == [("0", "MKT")]


def test_predictions_a_line_for_batch_jobs() -> None:
    """Batch transform splits the input by lines and joins the answers by lines."""
    told = inference.output_fn([{"id": "a", "label": "x"}, {"id": "b", "label": "y"}], "application/jsonlines")
    assert [json.loads(line)["label"] for line in told.splitlines()] == ["x", "y"] and told.endswith("\n")


def test_half_a_surrogate_pair_is_refused_as_in_a_file() -> None:
    model = inference.Predictor(TrainConfig(), create_task(TaskConfig(), "ab"), ())  # none is asked
    records = inference.input_fn(r'{"records": [{"id": "P1", "sequence": "MK\ud800"}]}', "application/json")
    with pytest.raises(DataError, match="^request:1: column 'sequence' holds half a surrogate pair"):
        inference.predict_fn(records, model)


def test_a_prediction_that_json_cannot_hold_is_not_sent() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        inference.output_fn([{"id": "a", "perplexity": float("nan")}], "application/json")


def test_no_run_no_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hosting.main(["--model", str(tmp_path / "none"), "--output", str(tmp_path / "m.tar.gz")]) == 2
    assert capsys.readouterr().err.startswith("hosting.py: error: --model ")
    assert list(tmp_path.iterdir()) == []
