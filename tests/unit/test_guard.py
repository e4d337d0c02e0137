"""Every command as it runs where others rule: no network that nobody asked for, a strange user, a bare environment."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import guarded
from helpers.weights import state_of, tiny, write_safetensors_folder
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
TRAIN = "train --model.name tiny --model.init random --data.train train.csv --loop.max_steps 1 --loop.packs_per_step 1 "
TRAIN += "--loop.packs_per_device 1"
COMMANDS = {
    "--version": 0,
    "data check train.csv --label_column label": 0,
    "plan --data.train train.csv --model.name foreign": 0,
    "doctor --backend cpu": 0,
    f"{TRAIN} --output run": 0,
    f"{TRAIN} --output quantized --adapter.kind qlora": 0,
    "train --model.name foreign --data.train train.csv --loop.max_steps 1 --output mlm --task.name masked_lm": 0,
    "evaluate --model run --input train.csv --output metrics.json": 0,
    "predict --model run --input train.csv --output p.csv": 0,
    "embed --model foreign --input train.csv --output e.safetensors": 0,
    "embed --model quantized --input train.csv --output e.parquet": 0,
    "score --model foreign --input variants.csv --wild-type one.fasta --output s.csv": 0,
    "report run": 0,
    "export --model run --output exported": 0,
    "convert pickles converted": 0,
    "compile --data.train train.csv": 2,
}
"""Every command, with local models -> its exit code."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Proteins, variants, and an ESM-2 in safetensors and in pickles whose config.json asks for code."""
    made = tmp_path_factory.mktemp("guard")
    rows = [f"p{i},{LETTERS[i:] + LETTERS[:i]},{'ab'[i % 2]}" for i in range(16)]
    (made / "train.csv").write_text("\n".join(["id,sequence,label", *rows]) + "\n")
    (made / "one.fasta").write_text(">one\nMKVLAAGIVG\n")
    (made / "variants.csv").write_text("variant\nM1A\n")
    write_safetensors_folder(state_of().items(), tiny(), made / "foreign")
    config = made / "foreign" / "config.json"
    asks = ("_attn_implementation", "_attn_implementation_internal", "attn_implementation", "experts_implementation")
    config.write_text(json.dumps(json.loads(config.read_text()) | dict.fromkeys(asks, "some/repo@main")))
    (made / "pickles").mkdir()
    (made / "pickles" / "config.json").write_text(config.read_text())
    torch.save(load_file(made / "foreign" / "model.safetensors"), made / "pickles" / "pytorch_model.bin")
    return made


def run_in(folder: Path, commands: Sequence[str], env: Mapping[str, str | None], **options: Any) -> dict[str, Any]:
    """Run commands in a process of their own that may not reach a network; None takes a variable away."""
    whole = {**os.environ, **env}
    whole["PYTHONPATH"] = os.pathsep.join(filter(None, [whole.get("PYTHONPATH"), str(ROOT)]))
    words = json.dumps([command.split() for command in commands])
    done = subprocess.run(
        [sys.executable, guarded.__file__, words],
        cwd=folder,
        env={name: value for name, value in whole.items() if value is not None},
        capture_output=True,
        check=False,
        timeout=600,
        **options,
    )
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0 and "Traceback" not in said, said[-5000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "said": said}


def test_no_command_reaches_for_a_network(folder: Path, tmp_path: Path) -> None:
    """Not with bitsandbytes and the hub's client, nor where `kernels` and wandb (stand-ins) could be called."""
    env = guarded.stand_ins(tmp_path, "kernels", "wandb")
    found = run_in(folder, list(COMMANDS), env)
    assert dict(zip(COMMANDS, found["codes"], strict=True)) == COMMANDS, found["said"][-3000:]
    assert found["tried"] == []
    assert found["versions"]["kernels"] == "99.0" and found["versions"]["bitsandbytes"]
    assert "pip install kernels" not in found["said"]
    loras = [words for words in COMMANDS if "qlora" not in words and "quantized" not in words]
    again = [words.replace("output run", "output other").replace("exported", "exported2") for words in loras]
    again = [words.replace("converted", "converted2").replace("output mlm", "output mlm2") for words in again]
    plain = run_in(folder, again, env)
    assert plain["codes"] == [COMMANDS[words] for words in loras]
    assert "bitsandbytes" not in plain["modules"] and "wandb" not in plain["modules"]


BARE = {"HOME": None, "TMPDIR": None, "LANG": None, "LC_ALL": "C", "STAND_IN_CALLS": ""}


@pytest.mark.parametrize("name", ["näme", "name"])
def test_a_bare_environment_is_enough(folder: Path, name: str) -> None:
    """umask 077, no HOME, no TMPDIR, and no UTF-8, where Python takes it in spite of LC_ALL=C and where it does not."""
    env = BARE if name == "näme" else {**BARE, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    rows = [f"é{i},{LETTERS[i:] + LETTERS[:i]},{'ßx'[i % 2]}" for i in range(16)]
    (folder / f"{name}.csv").write_text("\n".join(["id,sequence,label", *rows]) + "\n", encoding="utf-8")
    config = f"data: {{train: {name}.csv}}\ntask: {{labels: [ß, x]}}\nmodel: {{name: tiny, init: random}}\n"
    (folder / f"{name}.yaml").write_text(config, encoding="utf-8")
    commands = [
        f"data check {name}.csv --label_column label",
        f"plan --config {name}.yaml",
        f"train --config {name}.yaml --loop.max_steps 1 --output {name}",
        f"predict --model {name} --input {name}.csv --output {name}.out.csv",
        f"predict --model {name} --input {name}.none.csv --output q.csv",
        f"report {name}",
        f"export --model {name} --output {name}.export",
    ]
    found = run_in(folder, commands, env, umask=0o077)
    assert found["codes"] == [0, 0, 0, 0, 2, 0, 0], found["said"][-3000:]
    ids = [line.split(",")[0] for line in (folder / f"{name}.out.csv").read_text(encoding="utf-8").splitlines()]
    assert ids == ["id", *(f"é{i}" for i in range(16))]
    for path in (folder / f"{name}.out.csv", folder / name, folder / name / "config.yaml", folder / f"{name}.export"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


@pytest.mark.parametrize(
    ("words", "end", "code", "said"),
    [
        ("-OO -m esm_neuron.cli --help", "", 0, ""),
        ("-m esm_neuron.cli data check train.csv", ">/dev/full", 2, "No space left on device"),
        ("-m esm_neuron.cli data check train.csv", "| head -c0; exit ${PIPESTATUS[0]}", 141, ""),
        ("-m esm_neuron.cli data check none.csv", "2>/dev/full", 2, ""),
        ("-m esm_neuron.cli data check none.csv", "2>&1 >/dev/null | head -c0; exit ${PIPESTATUS[0]}", 2, ""),
        ("-m esm_neuron.cli data check $'n\\xff.csv'", "", 2, "is not of this locale's encoding; rename the file"),
        ("-m esm_neuron.cli plan --data.train train.csv --adapter.r 1000000000000", "", 2, "outside 1 to 65536"),
        (
            "-m esm_neuron.cli plan --data.train train.csv --loop.packs_per_device 60000 --data.pack_tokens 2048",
            "",
            2,
            "must be at most 67108864",
        ),
    ],
)
def test_streams_and_words_that_end_early(folder: Path, words: str, end: str, code: int, said: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {words} {end}"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    text = done.stderr.decode(errors="replace")
    assert done.returncode == code and said in text and "Traceback" not in text and text.count("\n") <= 1, text


def test_predictions_are_written_though_nobody_can_be_told(folder: Path) -> None:
    train = [sys.executable, "-m", "esm_neuron.cli", *TRAIN.split(), "--output", "untold"]
    predict = ["predict", "--model", "untold", "--input", "train.csv", "--output", "untold.csv"]
    with open("/dev/full", "w") as full:
        for words in (train, [*train[:3], *predict]):
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            assert subprocess.run(words, cwd=folder, env=env, stderr=full, check=False, timeout=300).returncode == 0
    assert len((folder / "untold.csv").read_text().splitlines()) == 17
