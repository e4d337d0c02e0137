"""What a command imports before it answers (the seconds are in benchmarks/startup.py), and that nothing broken is left.

Each case is a process of its own: here everything has been imported already.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "pandas", "sklearn", "scipy", "matplotlib", "datasets", "sympy", "accelerate")
SPARED = ("sklearn", "scipy", "matplotlib", "datasets", "sympy", "accelerate", "tensorboard", "torch._dynamo")
WATCH = """
import json, sys
from esm_neuron.cli import main
for words in sys.argv[2:]:
    try:
        code = main(words.split())
    except SystemExit as end:
        code = end.code
    found = [name for name in sys.argv[1].split() if name in sys.modules]
    print("WATCHED", json.dumps([words, code, found]))
"""


def python(folder: Path, code: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "imported in full" not in done.stderr
    return done.stdout


def imported(folder: Path, names: tuple[str, ...], *commands: str) -> list[tuple[str, int, list[str]]]:
    """Run commands one after the other in a new process; return each with its exit code and what is imported by then.

    Of `names` alone.
    """
    lines = python(folder, WATCH, " ".join(names), *commands).splitlines()
    return [tuple(json.loads(line.removeprefix("WATCHED "))) for line in lines if line.startswith("WATCHED ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with proteins, variants and a finished run of LoRA on `tiny`."""
    made = tmp_path_factory.mktemp("startup")
    letters = "ACDEFGHIKLMNPQRSTVWY"
    rows = [f"p{i},{letters[i:] + letters[:i]},{'ab'[i % 2]}" for i in range(16)]
    (made / "train.csv").write_text("\n".join(["id,sequence,label", *rows]) + "\n")
    (made / "one.fasta").write_text(">one\nMKVLAAGIVG\n")
    (made / "variants.csv").write_text("variant\nM1A\n")
    words = "train --model.name tiny --model.init random --data.train train.csv --loop.max_steps 1 --output run"
    assert imported(made, (), words) == [(words, 0, [])]
    return made


LIGHT = {
    "--help": 0,
    "predict --help": 0,
    "train --help": 0,
    "doctor --backend cpu": 0,
    "data check train.csv --label_column label": 0,
    "embed --model minni --input one.fasta --output x.parquet": 2,
    "embed --model mini --input none.fasta --output x.parquet": 2,
    "embed --model mini --input one.fasta --output x.csv": 2,
    "predict --model none --input one.fasta --output x.csv": 2,
    "predict --model run --input none.fasta --output x.csv": 2,
    "predict --model run --input train.csv --output x.csv --data.sequence_column seq": 2,
    "score --model mini --input variants.csv --wild-type none.fasta --output x.csv": 2,
    "score --model mini --input variants.csv --wild-type one.fasta --variant-column v --output x.csv": 2,
    "evaluate --model run --input train.csv --data.label_column lable": 2,
    "train --data.train none.csv --model.name mini": 2,
    "train --data.train train.csv --model.name minni": 2,
    "train --data.train train.csv --model.name mini --data.label_column lable": 2,
    "train --data.train train.csv --model.name mini --optim.lrr 1": 2,
    "train --data.train train.csv --model.name mini --loop.max_steps 0": 2,
    "train --data.train train.csv --model.name mini --task.name regresion": 2,
}
"""Commands that need no network, or have a mistake in a path, a flag, a column or a setting -> exit code."""


def test_what_needs_no_network_imports_none(folder: Path) -> None:
    """But pandas, which pyarrow imports with its first array; left out, it would be unknown to pyarrow ever after."""
    heavy = tuple(name for name in HEAVY if name != "pandas")
    assert imported(folder, heavy, *LIGHT) == [(words, code, []) for words, code in LIGHT.items()]
    no_array = [words for words in LIGHT if "--help" in words or words.startswith("doctor")]
    assert imported(folder, HEAVY, *no_array) == [(words, 0, []) for words in no_array]


def test_pyarrow_knows_pandas_after_our_import(tmp_path: Path) -> None:
    code = """
import esm_neuron.training.build, esm_neuron.training.trainer, esm_neuron.data.splits
import pandas, pyarrow
times = pyarrow.array([pandas.Timestamp("2020-01-01"), pandas.NaT, pandas.NA, None], from_pandas=True)
assert str(times.type).startswith("timestamp") and times.null_count == 3
"""
    python(tmp_path, code)


def test_a_report_needs_only_matplotlib(folder: Path) -> None:
    assert imported(folder, HEAVY, "report run") == [("report run", 0, ["pandas", "matplotlib"])]


def test_an_answer_imports_what_it_uses(folder: Path) -> None:
    commands = [
        "embed --model mini --input one.fasta --output e.parquet",
        "score --model mini --input variants.csv --wild-type one.fasta --output s.csv",
        "predict --model run --input one.fasta --output p.csv",
    ]
    assert imported(folder, SPARED, *commands) == [(words, 0, []) for words in commands]


def test_training_imports_none_of_them_before_its_first_step_is_done(folder: Path) -> None:
    code = f"""
import sys
from esm_neuron.training.trainer import Trainer
step = Trainer.train_step
def watched(self, data):
    step(self, data)
    print([name for name in {SPARED} if name in sys.modules])
Trainer.train_step = watched
from esm_neuron.cli import main
assert main(sys.argv[1:]) == 0
"""
    words = "train --model.name mini --data.train train.csv --loop.max_steps 2 --output first --loop.packs_per_step 1"
    found = python(folder, code, *words.split(), "--loop.packs_per_device", "1").splitlines()[0]
    assert found == "[]"


LEFT = """
import gc, sys
import esm_neuron.training.build, esm_neuron.training.trainer
from esm_neuron.config import deferred
"""


def test_no_stand_in_is_left_in_the_modules(tmp_path: Path) -> None:
    code = """
left = [name for name, module in sys.modules.items() if isinstance(module, deferred._StandIn)]
lazy = [
    (name, key)
    for name, module in sys.modules.items()
    if isinstance(module, type(sys)) and type(module) is not type(sys)
    for key, value in vars(module).items()
    if isinstance(value, deferred.Deferred)
]
assert not left and not lazy, (left, lazy)
"""
    python(tmp_path, LEFT + code)


def test_what_was_left_out_is_whole_when_somebody_imports_it(tmp_path: Path) -> None:
    code = """
import torch, transformers, peft
from transformers import AutoModel, BloomPreTrainedModel, EsmModel, GenerationMixin, PreTrainedModel
from transformers.models import esm
from transformers.models.auto.modeling_auto import AutoModelForSequenceClassification
import accelerate, pandas, sklearn.metrics, scipy.optimize, torch._dynamo
import torch.fx.experimental.symbolic_shapes, torch.distributed.fsdp, torch.distributed.checkpoint
from esm_neuron.models.esm2 import PackedForPooledClassification, PooledEsmConfig

assert isinstance(AutoModel, type) and isinstance(torch._dynamo, type(sys)) and transformers.__version__
assert issubclass(EsmModel, PreTrainedModel) and EsmModel is esm.modeling_esm.EsmModel
assert issubclass(PackedForPooledClassification, transformers.PreTrainedModel)
assert AutoModelForSequenceClassification._model_mapping[PooledEsmConfig] is PackedForPooledClassification
assert transformers.AutoConfig.for_model("esm_neuron").__class__ is PooledEsmConfig
# every name of a module or table that stood for one of theirs is the real object now
held = {home for home, names in deferred._finder.held.items() for stand_in, _ in names if home in sys.modules}
assert not held, held
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
frame = pandas.DataFrame({"a": [1.5, None]})
import pyarrow
assert pyarrow.Table.from_pandas(frame).to_pandas().equals(frame) and pyarrow.array(frame["a"]).null_count == 1
"""
    python(tmp_path, LEFT + code)


def test_names_held_by_libraries_are_functions_classes_or_modules(tmp_path: Path) -> None:
    """A number or an error's class would not bear to be stood in for: `except` wants a class, and `x < 3` a number."""
    code = """
import inspect
from esm_neuron.config.deferred import Deferred
bad = []
names = [each for held in list(deferred._finder.held.values()) for each, _ in held if isinstance(each, Deferred)]
for name in names:
    if name._home.startswith("pandas"):  # held by pyarrow
        continue
    try:
        real = name._real()
    except ImportError:  # asked for within `try: ... except ImportError`
        continue
    if not (callable(real) or inspect.ismodule(real)) or (inspect.isclass(real) and issubclass(real, Exception)):
        bad.append(repr(name))
allowed = {"GuardOnDataDependentSymNode", "flex_default_block_size"}
bad = [each for each in bad if not any(word in each for word in allowed)]
assert not bad, bad
"""
    python(tmp_path, LEFT + code)


def test_what_is_imported_before_is_left_as_it_is(tmp_path: Path) -> None:
    code = """
import transformers, sys
before = transformers.PreTrainedModel
import esm_neuron.compat
from esm_neuron.config import deferred
assert sys.modules["transformers"] is transformers and esm_neuron.compat.PreTrainedModel is before
assert not isinstance(transformers, deferred._Postponed)
"""
    python(tmp_path, code)


def test_a_library_that_bears_no_stand_in_is_imported_in_full(tmp_path: Path) -> None:
    (tmp_path / "fussy.py").write_text("from colorsys import ONE_THIRD\nTWO = ONE_THIRD + ONE_THIRD\n")
    code = """
import sys
from esm_neuron.config.deferred import window
with window({"colorsys": {}}, optional=True):
    import fussy
import fussy
assert "colorsys" in sys.modules and 0.6 < fussy.TWO < 0.7
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "imported in full" in done.stderr
