"""How a run ends: validation proteins are not evaluated twice, and six lines say what came of it; how one goes on."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from screens import Screen

from esm_neuron import cli
from esm_neuron.config import TrainConfig
from esm_neuron.inference import predict
from esm_neuron.metrics.text import ending
from esm_neuron.training import run
from esm_neuron.training.evaluation import Evaluator

Toy = Callable[..., TrainConfig]


@pytest.mark.parametrize(("steps", "best", "passes"), [(8, 8, 2), (8, 4, 2)])
def test_the_chosen_step_is_validated_once(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, steps: int, best: int, passes: int
) -> None:
    """Two validations while training and none after it, whether the last step was chosen or one before."""
    seen: list[int] = []
    collect = Evaluator.collect

    def counted(self: Evaluator, loader: Any, *args: Any, **options: Any) -> Any:
        seen.append(len(loader.table.ids))
        return collect(self, loader, *args, **options)

    monkeypatch.setattr(Evaluator, "collect", counted)
    cfg = toy(loop={"max_steps": steps}, optim={"lr": 1e-2 if best == 8 else 3.0, "max_grad_norm": 0.0})
    data = Path(str(cfg.data.valid)).read_text().splitlines()
    Path(str(cfg.data.valid)).write_text("\n".join(data[:-1]) + "\n")  # 19 proteins, of which the test has 20
    result = run.train(cfg, str).result
    assert seen == [19] * passes + [20]
    monkeypatch.setattr(Evaluator, "collect", collect)
    valid = json.loads((Path(cfg.output) / "result.json").read_text())["valid"]
    input = ["evaluate", "--model", cfg.output, "--input", str(cfg.data.valid), "--output", f"{cfg.output}.json"]
    assert cli.main(input) == 0
    again = json.loads(Path(f"{cfg.output}.json").read_text())
    assert again["loss"] == pytest.approx(valid["loss"], rel=1e-5) and result["chosen_step"] <= steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_each_phase_has_a_bar_with_its_name_on_a_terminal(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a line that is written meanwhile has a line of its own."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run.train(toy(), cli.log)
    text = terminal.getvalue()
    order = [text.index(f"\r{name}: ") for name in ("training", "predictions, valid split", "baselines")]
    assert order == sorted(order) and "\rpredictions, test split: " in text
    assert re.search(r"training: +100%\|.*8/8 \[\d\d:\d\d<\d\d:\d\d, .*loss=\d", text)
    after = text[text.rindex("training: ") :]
    assert "baselines: " in after, "the bar of training ends before what follows"
    screen = Screen()
    screen.feed(text.replace("\n", "\r\n"))
    lines = screen.text()
    assert any(line.startswith("test, composition baseline: ") for line in lines)
    assert [line.partition(":")[0] for line in lines if "%|" in line] == ["training"], "the others leave nothing"


def test_a_run_ends_with_six_lines(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    cfg = toy(optim={"lr": 1e-2})
    result = run.train(cfg, said.append).result
    lines = said[-1].splitlines()
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"eval step={result['chosen_step']} split=valid "), "SageMaker's tuner takes the last"
    assert lines == ending(result, "", cfg.output)
    assert len(lines) == 6 and max(map(len, lines[:-1])) < 120
    assert lines[0] == "test, 20 proteins, 95 % intervals" and lines[1].split()[0] == "MCC"
    assert lines[2].split()[:2] == ["this", "model"] and f"{result['test']['mcc']:.3f} [" in lines[2]
    best = result["verdicts"]["test"]["best"]
    assert lines[3].strip().startswith(best) and f"{result['verdicts']['test']['verdict']} by MCC" in lines[4]
    assert f"esm-neuron predict --model {cfg.output}" in lines[5]


def test_a_run_without_held_out_proteins_says_so(toy: Toy) -> None:
    said: list[str] = []
    run.train(toy(data={"valid": None, "test": None, "valid_fraction": 0.0}, loop={"max_steps": 1}), said.append)
    assert "no proteins were held out" in said[-1] and "esm-neuron predict" in said[-1]


def test_ctrl_c_in_predict_says_how_to_go_on(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = toy(loop={"max_steps": 1})
    run.train(cfg, str)
    words = ["predict", "--model", cfg.output, "--input", str(cfg.data.test), "--output", str(tmp_path / "p.csv")]
    original = predict.predict_table

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict_table", interrupted)
    assert cli.main(words) == 130
    assert "go on with the same command and --resume" in capsys.readouterr().err
    monkeypatch.setattr(predict, "predict_table", original)
    assert cli.main([*words, "--resume"]) == 0
