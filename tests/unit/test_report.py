"""The report of a run: right numbers, whatever the run has, and nothing that a browser would run or fetch."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.chromium import CHROMIUM, Browser
from sklearn.metrics import confusion_matrix, roc_auc_score

from esm_neuron import cli
from esm_neuron.config import (
    AdapterConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    TaskConfig,
    TrainConfig,
    rules,
    settings,
)
from esm_neuron.config.settings import dump
from esm_neuron.data.dataset import ExampleTable
from esm_neuron.data.splits import check_settings
from esm_neuron.errors import CheckpointError, ConfigError
from esm_neuron.files import write_json
from esm_neuron.metrics import Scores
from esm_neuron.metrics.reliability import group_means, reliability
from esm_neuron.metrics.text import show
from esm_neuron.metrics.verdict import alarms, compare, verdict
from esm_neuron.reports import write_report
from esm_neuron.reports.advice import next_steps
from esm_neuron.reports.compare import write_comparison
from esm_neuron.run_dir import load_predictions, save_predictions, save_resamples
from esm_neuron.tasks import TASKS, create_task

EVIL = "<script>alert(1)</script>"
LABELS = {"plain": ("alpha", "beta", "gamma"), "evil": (EVIL, "$x_1$ & \"q'", "long " * 20)}
PNG = b"\x89PNG\r\n\x1a\n"


def made_table(task: str, classes: int, records: int, ids: str) -> ExampleTable:
    """Random proteins of 10 to 99 residues with labels of the task; every residue's last label is not known."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(10, 100, records)
    offsets = np.concatenate([[0], np.cumsum(lengths + 2)])
    labels: dict[str, Any] = {
        "sequence_classification": rng.integers(0, max(classes, 1), records),
        "multi_label": (rng.random((records, classes)) < 0.5).astype(np.uint8),
        "regression": rng.normal(100, 5, records),
        "residue_classification": rng.integers(0, max(classes, 1), offsets[-1]).astype(np.int16),
        "masked_lm": np.empty(0),
    }
    if task == "residue_classification":
        for place in (offsets[:-1], offsets[1:] - 1, offsets[1:] - 2):
            labels[task][place] = -1
    return ExampleTable(
        tokens=rng.integers(4, 24, offsets[-1]).astype(np.uint8),
        offsets=offsets,
        record=np.arange(records),
        weight=np.ones(records, np.float32),
        labels=labels[task],
        ids=[f"{ids}{i}" for i in range(records)],
    )


def made_answers(task: str, table: ExampleTable, classes: int, noise: float = 1.0) -> list[np.ndarray]:
    """Answers that are right more often than not, of classes the less often the more `noise` there is."""
    rng = np.random.default_rng(2)
    if task == "masked_lm":
        hidden = rng.integers(0, 9, len(table))
        return [hidden * rng.gamma(9, 0.3, len(table)), hidden, hidden // 2]
    if task == "regression":
        return [(table.labels - 100) / 5 + rng.normal(0, 0.6, len(table))]
    targets = table.labels if task == "multi_label" else np.eye(classes)[np.maximum(table.labels, 0)]
    return [2 * targets + rng.normal(0, noise, targets.shape)]


def made_run(
    out: Path, name: str, splits: tuple[str, ...] = ("valid", "test"), evil: bool = False, scatter: float = 1.0
) -> Path:
    """A finished run without its training."""
    out.mkdir(parents=True)
    scores: dict[str, Scores] = {}
    labels = () if name in ("regression", "masked_lm") else LABELS["evil" if evil else "plain"]
    scale = {"target_mean": 100.0, "target_sd": 5.0} if name == "regression" else {}
    task_config = TaskConfig(name=name, labels=labels or None, **scale)  # type: ignore[arg-type]
    cfg = TrainConfig(output=str(out), task=task_config, data=DataConfig(train=f"{EVIL}.csv" if evil else "my.csv"))
    task = create_task(task_config, labels)
    lines: list[dict[str, Any]] = [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in range(1, 9)]
    result: dict[str, Any] = {
        "task": name, "metric": task.metric, "model": "tiny", "init": "pretrained", "backend": "cpu",
        "adapter": "lora", "parameters": {"trainable": 10, "total": 1000}, "chosen_step": 4,
        "data": {"train": {"records": 50, "residues": 3000}},
        "train": {"steps": 8, "residues": 9000, "seconds": 3.0, "residues_per_second": 3000.0,
                  "padding_efficiency": 0.99, "graphs": 0},
        "valid": None, "test": None, "baselines": {}, "leaks": {}, "clean": {}, "clean_baselines": {},
        "verdicts": {}, "alarms": {},
    }  # fmt: skip
    for split, records in (("valid", 12), ("test", 60)):
        if split in splits:
            table = made_table(name, len(labels), records, f"{EVIL}-" if evil else f"{split}-")
            predictions = made_answers(name, table, len(labels), scatter)
            save_predictions(out / f"predictions-{split}.parquet", task, table, predictions)
            own = task.metrics(table, predictions, True, np.arange(records) // 2)
            result[split] = scores[split] = own
            noise = [answer[::-1] if name == "masked_lm" else np.zeros_like(answer) for answer in predictions]
            worse = task.metrics(table, noise, True, np.arange(records) // 2)
            worse.update(fitted_on=40, training=50)
            result["baselines"][split] = {"majority": worse}
            if found := verdict(own, {"majority": worse}, task.metric, task.greater_is_better):
                result["verdicts"][split] = found
            result["alarms"][split] = [*alarms(own), f"ALARM of {EVIL}"]
            result["leaks"][split] = {"method": "kmer", "proteins": records, "homologs": 0}
            result["data"][split] = {"records": records, "residues": 99}
            if split == "valid":
                lines += [{"step": step, "split": "valid", **task.metrics(table, predictions)} for step in (4, 8)]
    (out / "config.yaml").write_text(dump(cfg))
    write_json(out / "result.json", result)
    save_resamples(out, scores)
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task -> a finished run with its report; and one full of markup."""
    folder = tmp_path_factory.mktemp("runs")
    made = {task: made_run(folder / task, task) for task in TASKS}
    made["evil"] = made_run(folder / "<b>evil", "multi_label", evil=True)
    for run in made.values():
        write_report(run)
    return made


@pytest.fixture
def spoilt(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a run that may be damaged."""
    shutil.copytree(runs["sequence_classification"], tmp_path / "run")
    return tmp_path / "run"


class Page(HTMLParser):
    """Tags that are open, what is asked for from elsewhere, scripts, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open += [] if tag in ("meta", "link", "br", "input") else [tag]
        self.asked += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


_CLASSES = {"loss", "metric", "comparison", "classes", "confusion", "ranking", "calibration", "length"}
CHARTS = {
    **dict.fromkeys(("sequence_classification", "multi_label", "residue_classification"), _CLASSES),
    "regression": {"loss", "metric", "comparison", "scatter", "residuals", "length"},
    "masked_lm": {"loss", "comparison", "perplexity", "length"},
}


@pytest.mark.parametrize("task", TASKS)
def test_a_page_has_what_its_task_has_and_asks_for_nothing(task: str, runs: dict[str, Path]) -> None:
    folder = runs[task] / "report"
    text = (folder / "index.html").read_text()
    page = Page(text)
    assert page.open == [] and "img" not in page.tags and text.count("<script") == 1  # ours, which its policy names
    script = text[text.index("<script>") + 8 : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:" in text
    assert all(asked.startswith(("#", "data:,")) for asked in page.asked)
    assert all(reference in page.ids for reference in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text) for reference
               in reference if reference)  # fmt: skip
    assert len(page.ids) == len(set(page.ids))
    files = {path.stem: path for path in folder.glob("*.png")}
    assert set(files) == CHARTS[task] <= set(page.ids)
    assert all(path.read_bytes().startswith(PNG) for path in files.values())
    result = json.loads((runs[task] / "result.json").read_text())
    for split in ("valid", "test"):
        for values in (result[split], result["baselines"][split]["majority"]):
            assert all(
                show(values, name[:-3]).text.split(" [")[0] in page.text for name in values if name[-3:] == "_ci"
            )
    assert "majority on 40 of 50" in page.text
    assert "0 of 60 test proteins have a homolog in training (by kmer)." in page.text
    assert "without a homolog" not in page.text
    assert "95 % bootstrap intervals over 30 clusters of proteins" in page.text
    assert (task == "regression") == (result["verdicts"] == {}), "a constant has no correlation"
    assert result["verdicts"].get("test", {"text": ""})["text"] in page.text
    assert result["alarms"]["test"][-1] in page.text


def test_clean_rows_have_a_table_of_their_own(spoilt: Path) -> None:
    result = json.loads((spoilt / "result.json").read_text())
    result["leaks"]["test"]["homologs"] = 20
    result["clean"]["test"] = {**result["test"], "n": 40, "mcc": 0.123}
    write_json(spoilt / "result.json", result)
    page = Page(write_report(spoilt).read_text())
    assert "20 of 60 test proteins have a homolog in training (by kmer)." in page.text
    assert "Test set without a homolog in training (by kmer): 40 proteins" in page.text and "0.123" in page.text


def test_markup_in_ids_labels_and_paths_stays_text(runs: dict[str, Path]) -> None:
    text = (runs["evil"] / "report" / "index.html").read_text()
    page = Page(text)
    assert text.count("<script") == 1
    assert EVIL not in text and "<b>evil" not in text
    assert f"{EVIL}-" in page.text and "<b>evil" in page.text and "$x_1$ & \"q'" in page.text


def test_confusion_and_errors_are_those_of_the_predictions(runs: dict[str, Path]) -> None:
    table = load_predictions(runs["sequence_classification"] / "predictions-test.parquet")
    assert table is not None
    frame = table.to_pandas()
    result = json.loads((runs["sequence_classification"] / "result.json").read_text())["test"]
    seen = create_task(TaskConfig(), LABELS["plain"]).view(table)
    assert seen.confusion is not None
    assert (seen.confusion.counts == confusion_matrix(frame["target"], frame["label"], labels=LABELS["plain"])).all()
    assert 1 - seen.error.mean() == pytest.approx(result["accuracy"])
    wrong = frame[frame["target"] != frame["label"]]
    assert [record.id for record in seen.worst][: min(10, len(wrong))] == list(
        wrong.assign(p=wrong.iloc[:, -3:].max(axis=1)).sort_values("p", ascending=False, kind="stable")["id"][:10]
    )


def test_views_agree_with_the_metrics_of_every_other_task(runs: dict[str, Path]) -> None:
    def of(task: str) -> tuple[Any, dict[str, Any]]:
        table = load_predictions(runs[task] / "predictions-test.parquet")
        assert table is not None
        result = json.loads((runs[task] / "result.json").read_text())["test"]
        return create_task(TaskConfig(name=task, target_mean=0.0, target_sd=1.0), LABELS["plain"]).view(table), result

    seen, result = of("residue_classification")
    assert 1 - seen.error.sum() / seen.weight.sum() == pytest.approx(result["accuracy"])
    assert seen.confusion.counts.sum() == seen.weight.sum() == result["n"] == (seen.residues - 1).sum()
    seen, result = of("multi_label")
    assert (seen.error == 0).mean() == pytest.approx(result["subset_accuracy"])
    assert list(seen.confusion.totals) == [values["n"] for values in result["per_class"].values()]
    seen, result = of("regression")
    assert seen.error.mean() == pytest.approx(result["mae"])
    seen, result = of("masked_lm")
    assert seen.error.sum() / seen.weight.sum() == pytest.approx(result["loss"])
    assert len(seen.spread) == result["n_records"]


def test_calibration_error_and_group_means_by_hand() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    right, protein = rng.random(500) < confidence**2, np.repeat(np.arange(50), 10)
    bins = pd.cut(confidence, np.linspace(0, 1, 11), labels=False, include_lowest=True)
    rows = pd.DataFrame({"p": confidence, "right": right, "bin": bins}).groupby("bin")
    expected = ((rows["right"].mean() - rows["p"].mean()).abs() * rows.size()).sum() / 500
    found = reliability(confidence, right, protein)
    assert found is not None
    assert found.ece == pytest.approx(expected)
    assert [group.rows for group in found.right] == list(rows.size())
    assert all(group.interval[0] <= group.mean <= group.interval[1] for group in found.right if group.interval)
    # a protein whose rows are all alike counts once: ten copies of it say no more than one
    value = (np.arange(40) % 2).astype(float)
    once = group_means(value, np.ones(40), np.zeros(40, int), 2, np.arange(40))
    tenfold = group_means(np.repeat(value, 10), np.ones(400), np.zeros(400, int), 2, np.repeat(np.arange(40), 10))
    assert once[1] is None
    assert once[0].interval == pytest.approx(tenfold[0].interval)  # type: ignore[union-attr]
    assert reliability(confidence[:0], right[:0], protein[:0]) is None


def test_a_chart_has_room_for_the_best_baselines_alone(spoilt: Path) -> None:
    result = json.loads((spoilt / "result.json").read_text())
    (worse,) = result["baselines"]["test"].values()
    result["baselines"]["test"] = {f"number {i}": {**worse, "mcc": i / 10} for i in range(6)}
    write_json(spoilt / "result.json", result)
    page = write_report(spoilt).read_text()
    chart = page[page.index('id="comparison"') : page.index("</figure>", page.index('id="comparison"'))]
    assert [f"number {i}" in chart for i in range(6)] == [False, False, False, True, True, True]
    assert all(f"number {i}" in page for i in range(6)), "the table has all of them"


@pytest.mark.parametrize("splits", [(), ("valid",), ("test",)])
def test_a_run_without_some_rows_gets_a_page_that_says_so(tmp_path: Path, splits: tuple[str, ...]) -> None:
    run = made_run(tmp_path / "run", "sequence_classification", splits)
    page = Page(write_report(run).read_text())
    assert ("No proteins were held out" in page.text) == (splits == ())
    assert ("their metrics are optimistic" in page.text) == (splits == ("valid",))
    assert ("confusion" in page.ids) == (splits != ())
    assert ("metric" in page.ids) == ("valid" in splits)


def test_a_run_that_kept_no_predictions_and_logged_nothing_gets_a_page(spoilt: Path) -> None:
    (spoilt / "predictions-test.parquet").unlink()
    (spoilt / "metrics.jsonl").unlink()
    page = Page(write_report(spoilt).read_text())
    assert "predictions for the test set were not kept (log.predictions)" in page.text
    assert {path.stem for path in (spoilt / "report").glob("*.png")} == {"comparison", "classes"}


def test_what_cannot_be_reported_is_one_line_and_leaves_the_old_report(
    spoilt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = (spoilt / "report" / "index.html").read_bytes()

    def refused(error: type[Exception], *words: str) -> None:
        with pytest.raises(error) as caught:
            write_report(spoilt)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
        assert (spoilt / "report" / "index.html").read_bytes() == old

    (spoilt / "predictions-test.parquet").write_bytes(b"no parquet")
    refused(CheckpointError, "predictions-test.parquet", "no sound Parquet file")
    (spoilt / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n')
    (spoilt / "predictions-test.parquet").unlink()
    refused(CheckpointError, "metrics.jsonl:2", "not a JSON object with a step")
    (spoilt / "result.json").write_text("{")
    refused(CheckpointError, "result.json", "cannot be read")
    (spoilt / "result.json").write_text('{"task": "regression"}')
    refused(CheckpointError, "result.json", "has no metric")
    (spoilt / "result.json").unlink()
    refused(ConfigError, "has not finished", "--checkpoint.resume auto")
    assert cli.main(["report", str(spoilt)]) == 2
    assert cli.main(["report", str(spoilt / "nowhere")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("esm-neuron: error: ") for line in lines)


def test_predictions_need_not_be_kept() -> None:
    assert LogConfig().predictions and not replace(LogConfig(), predictions=False).predictions


def test_a_page_says_when_where_and_of_what_it_was_made_and_what_to_try(spoilt: Path) -> None:
    made = {"date": "2026-12-01 07:10 UTC", "hardware": "2 cores of a kind", "versions": {"torch": "2.13"}}
    write_json(spoilt / "machine.json", made)
    result = json.loads((spoilt / "result.json").read_text())
    result["data"]["train"]["classes"] = {"alpha": 17, "beta": 1234, "gamma": 3}
    for split in ("valid", "test"):
        result["data"][split]["classes"] = {"alpha": 7, "beta": 4, "gamma": 0}
    result |= {"verdicts": {"test": {**result["verdicts"]["test"], "verdict": "undecided"}}, "chosen_step": 8}
    write_json(spoilt / "result.json", result)
    page = Page(write_report(spoilt).read_text())
    assert "Seed 42. 2026-12-01 07:10 UTC, on 2 cores of a kind; torch 2.13." in page.text
    assert "1,234" in page.text and "How many of each class." in page.text
    assert "the last step was the best: train longer" in page.text and "--max_steps 24" in page.text
    assert "few proteins decide little" in page.text and "--model facebook/esm2_t12_35M_UR50D" not in page.text
    assert page.text.index("ALARM") < page.text.index("95 %:"), "alarms and the verdict come before the figures"


_SORTED = """
let click, sorted;
const none = () => {}, head = { firstChild: { addEventListener: (_, act) => { click = act; } }, getAttribute: none,
  setAttribute: none, removeAttribute: none };
const rows = TEXTS.map((text) => ({ cells: [{ textContent: text }], textContent: text }));
const table = { tBodies: [{ rows, append: (...given) => { sorted = given; } }], tHead: { rows: [{ cells: [head] }] } };
const box = { querySelector: (name) => (name === "table" ? table : { value: "", addEventListener: none }) };
globalThis.document = { querySelectorAll: () => [box] };
SCRIPT
click();
console.log(JSON.stringify(sorted.map((row) => row.textContent)));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, to run the page's script")
@pytest.mark.parametrize(
    "texts",
    [["-2", "-0.5", "+0.25", "+0.3", "+1e+03"], ["perplexity 9.8", "perplexity 10.25", "perplexity 10.3"],
     ["9.5%", "12.0%"], ["2 of 10 wrong", "10 of 10 wrong"], ["P2", "P10", "Q1"], ["9", "1,000"]],
)  # fmt: skip
def test_the_table_of_proteins_is_sorted_by_numbers_where_it_has_them(texts: list[str]) -> None:
    script = (Path(__file__).parents[2] / "esm_neuron/reports/templates/table.js").read_text()
    program = _SORTED.replace("TEXTS", json.dumps(texts[::-1])).replace("SCRIPT", script)
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == texts


@pytest.mark.parametrize("kind", ["probe", "lora"])
def test_what_is_to_be_tried_is_a_command_that_can_be(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    cfg = TrainConfig(data=DataConfig(train="my.csv"), model=ModelConfig(name="mini"), adapter=AdapterConfig(kind=kind))
    result = json.loads((runs["sequence_classification"] / "result.json").read_text())
    result |= {"verdicts": {"test": {"verdict": "undecided"}}, "chosen_step": 8}
    (tmp_path / "config.yaml").write_text(dump(cfg))
    told = next_steps(cfg, result, tmp_path)
    commands = [shlex.split(line[line.index("esm-neuron") :])[1:] for line in told]
    assert [words[0] for words in commands] == ["train", "train", "train", "predict"]
    for _, *words in commands[:-1]:
        changed = settings.parse(words)
        rules.validate(changed)
        check_settings(changed.data, None)
        assert changed.output == f"{tmp_path}-2" and changed != cfg


def test_a_larger_model_is_tried_without_what_belongs_to_the_smaller_one(runs: dict[str, Path], tmp_path: Path) -> None:
    """`auto` writes the commit and the sum of the 8M into config.yaml, and a head is of one model."""
    model = ModelConfig(name="facebook/esm2_t6_8M_UR50D", revision="a" * 40, sha256="b" * 64)
    adapter = AdapterConfig(kind="lora", init_from="runs/probe")
    cfg = TrainConfig(data=DataConfig(train="my.csv"), model=model, adapter=adapter)
    result = json.loads((runs["sequence_classification"] / "result.json").read_text())
    (tmp_path / "config.yaml").write_text(dump(cfg))
    told = next_steps(cfg, result | {"verdicts": {"test": {"verdict": "worse"}}}, tmp_path)
    line = next(line for line in told if line.startswith("a larger ESM-2"))
    changed = settings.parse(shlex.split(line[line.index("esm-neuron") :])[2:])
    assert changed.model == replace(model, name="facebook/esm2_t12_35M_UR50D", revision=None, sha256=None)
    assert changed.adapter == replace(adapter, init_from=None)


@pytest.mark.parametrize("name", ["sequence_classification", "multi_label", "residue_classification"])
def test_a_threshold_on_the_curves_gives_the_recall_of_the_predictions(name: str, runs: dict[str, Path]) -> None:
    table = load_predictions(runs[name] / "predictions-test.parquet")
    assert table is not None
    found = create_task(TaskConfig(name=name, labels=LABELS["plain"]), LABELS["plain"]).view(table)
    assert found is not None and [curve.name for curve in found.curves] == list(LABELS["plain"])
    for curve in found.curves:
        result = json.loads((runs[name] / "result.json").read_text())["test"]["per_class"][curve.name]
        assert roc_auc_score(curve.truth, curve.score) == pytest.approx(result["auroc"], abs=1e-4)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; apt-get install chromium, then make test")
def test_the_table_of_proteins_is_searched_and_sorted(runs: dict[str, Path], tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        url = (runs["sequence_classification"] / "report" / "index.html").resolve().as_uri()
        seen = browser.open(url, 1200, False)
        rows = "[...document.querySelectorAll('.search tbody tr')].filter(r => !r.hidden)"
        type_ = (
            "(f => { f.value = '%s'; f.dispatchEvent(new Event('input')); })(document.querySelector('.search input'))"
        )
        assert seen.evaluate(f"{rows}.length") == 60
        seen.evaluate(type_ % "TEST-17")
        assert seen.evaluate(f"{rows}.map(r => r.cells[0].textContent)") == ["test-17"]
        assert seen.evaluate("document.querySelector('.search output').textContent") == "1 of 60"
        seen.evaluate(type_ % "")
        residues = f"{rows}.map(r => +r.cells[1].textContent)"
        for order in (1, -1):
            seen.evaluate("document.querySelectorAll('.search button')[1].click()")
            found = seen.evaluate(residues)
            assert found == sorted(found)[::order] and len(found) == 60
        assert seen.complaints == []


_LAID_OUT = """
(() => {
  const boxes = (name, within) => [...(within ?? document).querySelectorAll(name)].map(e => e.getBoundingClientRect());
  const near = (a, b) => Math.abs(a - b) < 2, faults = [];
  for (const grid of document.querySelectorAll(".charts, .tiles")) {
    const [whole, cells] = [grid.getBoundingClientRect(), boxes("figure, .tile", grid)];
    for (const top of new Set(cells.map(c => Math.round(c.top)))) {
      const row = cells.filter(c => near(c.top, top));
      if (!row.every(c => near(c.bottom, row[0].bottom))) faults.push(`cards of several heights at ${top}`);
      if (!near(row[0].left, whole.left) || !near(row.at(-1).right, whole.right)) faults.push(`a hole at ${top}`);
    }
  }
  for (const each of document.querySelectorAll("p, li, h1, figcaption, caption, figure svg text")) {
    const box = each.getBoundingClientRect(), parent = each.closest("figure, .table, body").getBoundingClientRect();
    if (box.right > parent.right + 1 || each.scrollWidth > each.clientWidth + 1 && !each.closest("svg"))
      faults.push(`cut off: ${each.textContent.slice(0, 60)}`);
  }
  for (const box of boxes("figure svg")) if (box.width < 250 || box.height < 60) faults.push("a chart too small");
  return faults;
})()
"""
"""Faults of a page's layout: rows of cards that do not fill the width, texts that are cut off, charts too small."""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; apt-get install chromium, then make test")
def test_a_browser_fetches_nothing_complains_of_nothing_and_lays_pages_out_without_holes(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    one, other = (runs["sequence_classification"], made_run(tmp_path / "other", "sequence_classification", scatter=9.0))
    pages = {name: run / "report" / "index.html" for name, run in runs.items()}
    pages["compare"] = write_comparison([one, other], tmp_path / "compare.html")
    with Browser(tmp_path) as browser:
        for name, page in pages.items():
            url = page.resolve().as_uri()
            for width, dark in ((1400, False), (1400, True), (800, True), (420, False)):
                seen = browser.open(url, width, dark)
                assert seen.requests == [url], (name, width)
                assert seen.complaints == [], (name, width)
                assert seen.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
                background = seen.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
                assert seen.evaluate("document.querySelectorAll('figure svg text').length") > 20, name
                assert seen.evaluate(_LAID_OUT) == [], (name, width)


def test_a_small_table_of_predictions_cannot_fill_a_memory(spoilt: Path) -> None:
    """A million times one text of 4,000 letters is a file of kilobytes."""
    column = pa.array(["x" * 4000]).dictionary_encode().take(pa.array(np.zeros(10**6, np.int8)))
    path = spoilt / "predictions-test.parquet"
    pq.write_table(pa.table({"id": column}), path, compression="zstd")
    assert path.stat().st_size < 500_000
    with pytest.raises(CheckpointError, match=r"predictions-test.parquet: \d+ bytes of values are packed into"):
        write_report(spoilt)


def test_predictions_that_do_not_fit_the_run_are_a_line(spoilt: Path) -> None:
    path = spoilt / "predictions-test.parquet"
    table = pq.read_table(path)
    for other in (
        table.drop_columns(["target"]),
        table.set_column(0, "id", pa.array([None] * len(table))).select(["id"]),
    ):
        pq.write_table(other, path)
        with pytest.raises(CheckpointError, match="its predictions, result.json and config.yaml do not fit each other"):
            write_report(spoilt)


# --- compare


@pytest.mark.parametrize("task", TASKS)
def test_runs_are_compared_by_paired_differences(task: str, runs: dict[str, Path], tmp_path: Path) -> None:
    other = made_run(tmp_path / "other", task, scatter=9.0)
    page = Page(write_comparison([runs[task], other], tmp_path / "pages" / "compare.html").read_text())
    assert page.open == [] and "script" not in page.tags
    assert all(asked.startswith(("#", "data:,")) for asked in page.asked)
    assert {"train-loss", "valid-loss"} <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert "30 clusters of proteins" in page.text
    assert "Settings that differ" in page.text
    told = re.findall(r"(better|worse|undecided) ([+-][0-9.]+) (\[.*?\])", page.text)
    assert len(told) == 2
    assert {word for word, *_ in told} == (
        {"undecided"} if task in ("regression", "masked_lm") else {"better", "worse"}
    )
    assert told[0][1].lstrip("+-") == told[1][1].lstrip("+-")


def test_a_difference_is_that_of_the_same_resamples(runs: dict[str, Path], tmp_path: Path) -> None:
    """As of a model and its baseline: those of two runs say what `verdict.compare` says of their predictions."""
    other = made_run(tmp_path / "other", "sequence_classification", scatter=9.0)
    page = Page(write_comparison([runs["sequence_classification"], other], tmp_path / "c.html").read_text())
    table = made_table("sequence_classification", 3, 60, "test-")
    task = create_task(TaskConfig(labels=LABELS["plain"]), LABELS["plain"])
    one, two = (
        task.metrics(table, made_answers("sequence_classification", table, 3, noise), True, np.arange(60) // 2)
        for noise in (1.0, 9.0)
    )
    found = compare(one, two, "mcc", True)
    assert found is not None and f"better +{found['difference']:.3f}" in page.text


def test_runs_that_cannot_be_compared_are_refused(
    runs: dict[str, Path], spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = runs["sequence_classification"]

    def refused(other: Path, *words: str, good: Path = good) -> None:
        assert cli.main(["compare", str(good), str(other), "--output", str(tmp_path / "c.html")]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words) and said.count("\n") == 1
        assert not (tmp_path / "c.html").exists()

    refused(runs["regression"], "different tasks, sequence_classification and regression")
    refused(good, "named twice")
    refused(made_run(tmp_path / "valid", "sequence_classification", ("valid",)), "no predictions for test proteins")
    (spoilt / "resamples.parquet").unlink()
    refused(spoilt, "no resamples.parquet there for test proteins", "--resume auto")
    frame = pd.read_parquet(spoilt / "predictions-test.parquet")
    frame.assign(target=frame["target"].to_numpy()[::-1]).to_parquet(spoilt / "predictions-test.parquet")
    refused(spoilt, "has another label")
    frame.iloc[:50].to_parquet(spoilt / "predictions-test.parquet")
    refused(spoilt, "60 and 50 test proteins, of which they share 50", "data.test")
    other = made_run(tmp_path / "masked", "masked_lm")
    frame = pd.read_parquet(other / "predictions-test.parquet")
    frame.assign(hidden=frame["hidden"] + 1).to_parquet(other / "predictions-test.parquet")
    refused(other, "has another label, or other hidden residues", "task.mask_probability", good=runs["masked_lm"])
    (tmp_path / "c.html").write_text("mine")
    assert cli.main(["compare", str(good), str(runs["evil"]), "--output", str(tmp_path / "c.html")]) == 2
    assert (tmp_path / "c.html").read_text() == "mine"
