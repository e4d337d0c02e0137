"""The cases that every engine runs beside one plain CPU process, and how far apart the two may be.

`tools/parity_page.py` makes docs/dev/parity.md of what a run shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

Case = tuple[str, str, dict[str, Any]]
"""Name, function of a file that `worker.py` imports, its arguments without `output`."""
World = int | str
"""Processes of NxD on gloo, or a key of LAZY."""
LAZY = {"xla": 1, "spmd": 4}
"""World of one process on XLA:CPU -> its devices."""


def _parity(name: str, backend: str, tp: int = 1, **settings: Any) -> Case:
    chosen = {key.replace("__", "."): value for key, value in settings.items()}
    return name, "parity", {"backend": backend, "set": {"parallel.tp": tp, **chosen}}


def _dropped(name: str, tp: int = 1, **settings: Any) -> Case:
    """A parity case with dropout, whose masks are those of one process."""
    name, _, arguments = _parity(name, "neuron", tp, model__dropout=0.1, **settings)
    return name, "same_masks", arguments


def _by_protein(backend: str, tp: int = 1) -> list[Case]:
    """The same proteins end to end in rows, and each in a row of its own."""
    return [
        (name, "by_protein", {"backend": backend, "set": {"parallel.tp": tp, "data.packing": packing}})
        for name, packing in (("packed", True), ("alone", False))
    ]


MLM, FULL, PLAIN = {"task__name": "masked_lm"}, {"adapter__kind": "none"}, {"parallel__zero1": False}
PADDED, BF16 = {"parallel__pad_heads": True}, {"loop__precision": "bf16"}
RES = {"task__name": "residue_classification"}
LEARNT = {"cls": {}, "mlm": MLM, "res": RES, "full": FULL, "mlmfull": {**MLM, **FULL}, "resfull": {**RES, **FULL}}
"""First word of a case's name -> what is learnt."""
DROPPED = {"dropcls": {"adapter__dropout": 0.2}, "dropfull": FULL}
"""The same of the cases with dropout."""
STEPS = {"optim.schedule": "constant", "optim.warmup_steps": 0}
DROPOUT = {"adapter.dropout": 0.2}
DROPOUT_FULL = {"adapter.kind": "none", "model.dropout": 0.1, "loop.precision": "bf16", "parallel.zero1": False}
SECOND_HALF = {**STEPS, "parallel.tp": 1, "loop.max_steps": 10}

LEFT_OUT: dict[str, dict[str, Any]] = {
    "dp2 zero1": {"parallel.tp": 1},
    "tp2 zero1 bf16": {"parallel.tp": 2, "adapter.kind": "none", "loop.precision": "bf16"},
    "tp2": {"parallel.tp": 2, "parallel.zero1": False},
}
"""Worlds in which one rank's loss is no number."""

COMMANDS = {
    "evaluate": ("cls", "labelled.csv", "metrics.json"),
    "predict": ("cls", "labelled.csv", "answers.csv"),
    "embed": ("cls", "labelled.csv", "vectors.parquet"),
    "predict hidden": ("mlm", "labelled.csv", "answers.csv"),
    "embed residues": ("mlm", "labelled.csv", "vectors.safetensors"),
    "score": ("mlm", "variants.csv", "scores.csv"),
    "score marginals": ("mlm", "variants.csv", "scores.csv"),
    "probe": ("cls", "labelled.csv", "predictions-test.parquet"),
}
"""Case of `command_cases.py` -> the run that answers, its input, the file that it leaves."""


def _answers(backend: str, tp: int = 1) -> list[Case]:
    return [
        (command, "answer", {"command": command, "made": "{root}/1/runs", "backend": backend, "tp": tp})
        for command in COMMANDS
    ]


WORLDS: dict[World, list[Case]] = {
    1: [
        _parity("cls", "cpu"),
        _parity("mlm", "cpu", **MLM),
        _parity("full", "cpu", **FULL),
        *_by_protein("cpu"),
        ("whole run", "resume", {"backend": "cpu", "set": {**STEPS, "loop.max_steps": 10}}),
        *(_parity(name, "cpu", **LEARNT[name]) for name in ("res", "mlmfull", "resfull")),
        *(_parity(f"{name} bf16", "neuron", **kind, **PLAIN, **BF16) for name, kind in LEARNT.items()),
        *(_dropped(name, **kind, **PLAIN) for name, kind in DROPPED.items()),
        *(_dropped(f"{name} bf16", **kind, **PLAIN, **BF16) for name, kind in DROPPED.items()),
        ("runs", "make_runs", {}),
        *_answers("cpu"),
        ("plain", "load_plain", {"adapter": "{root}/2/adapter/adapter"}),
        ("650M", "write_650m", {}),
        ("signatures", "signatures", {}),
        ("unlisted", "call_unlisted", {}),
        ("placeholders", "find_placeholders", {}),
    ],
    "xla": [
        _parity("cls", "xla"),
        _parity("mlm", "xla", **MLM),
        _parity("full", "xla", **FULL),
        _parity("res", "xla", **RES),
        *_by_protein("xla"),
    ],
    "spmd": [
        _parity("cls tp2 dp2", "xla", 2),
        _parity("mlm tp2 dp2", "xla", 2, **MLM),
        _parity("full tp2 dp2", "xla", 2, **FULL),
        _parity("res tp2 dp2", "xla", 2, **RES),
        _parity("cls tp2 dp2 recomputed", "xla", 2, model__gradient_checkpointing=True),
        _parity("cls tp2 dp2 bf16", "xla", 2, loop__precision="bf16"),
        ("dropout", "dropout", {"backend": "xla", "set": {"parallel.tp": 2, **DROPOUT}}),
        *_by_protein("xla", 2),
    ],
    2: [
        _parity("cls tp2", "neuron", 2, **PLAIN),
        _parity("cls tp2 zero1", "neuron", 2),
        _parity("mlm tp2", "neuron", 2, **MLM, **PLAIN),
        _parity("mlm tp2 zero1", "neuron", 2, **MLM),
        _parity("full tp2", "neuron", 2, **FULL, **PLAIN),
        _parity("full tp2 zero1", "neuron", 2, **FULL),
        _parity("mlmfull tp2", "neuron", 2, **MLM, **FULL, **PLAIN),
        _parity("res tp2 zero1", "neuron", 2, **RES),
        _parity("resfull tp2", "neuron", 2, **RES, **FULL, **PLAIN),
        *(_dropped(f"{name} tp2", 2, **kind, **PLAIN) for name, kind in DROPPED.items()),
        _parity("cls tp1 dp2 zero1", "neuron", 1),
        _parity("cls tp2 recomputed", "neuron", 2, model__gradient_checkpointing=True),
        _parity("full tp2 bf16", "neuron", 2, **FULL, **BF16),
        _parity("cls tp2 bf16", "neuron", 2, **BF16),
        _parity("mlm tp2 bf16", "neuron", 2, **MLM, **PLAIN, **BF16),
        _parity("mlmfull tp2 bf16", "neuron", 2, **MLM, **FULL, **PLAIN, **BF16),
        _parity("res tp2 bf16", "neuron", 2, **RES, **PLAIN, **BF16),
        _parity("resfull tp2 bf16", "neuron", 2, **RES, **FULL, **BF16),
        *(_dropped(f"{name} tp2 bf16", 2, **kind, **BF16) for name, kind in DROPPED.items()),
        ("first half", "resume", {"backend": "neuron", "set": {**STEPS, "parallel.tp": 2, "loop.max_steps": 6}}),
        ("second half", "resume", {"backend": "neuron", "set": SECOND_HALF, "source": "{root}/2/first half"}),
        ("adapter", "export", {"backend": "neuron", "set": {"parallel.tp": 2}}),
        *_by_protein("neuron", 2),
        *((f"left out {name}", "left_out", {"backend": "neuron", "set": values}) for name, values in LEFT_OUT.items()),
        ("stand-ins", "describe_stand_ins", {}),
    ],
    4: [
        _parity("cls tp4", "neuron", 4, **PLAIN),
        ("memory", "load_650m", {"backend": "neuron", "set": {"parallel.tp": 4}, "model": "{root}/1/650M/model"}),
        _parity("cls tp4 zero1", "neuron", 4),
        _parity("mlm tp4", "neuron", 4, **MLM, **PLAIN),
        _parity("mlm tp4 zero1", "neuron", 4, **MLM),
        ("dropout", "dropout", {"backend": "neuron", "set": {"parallel.tp": 2, **DROPOUT}}),
        ("dropout full bf16", "dropout", {"backend": "neuron", "set": {"parallel.tp": 2, **DROPOUT_FULL}}),
        _parity("cls tp2 dp2", "neuron", 2, **PLAIN),
        _parity("cls tp2 dp2 zero1", "neuron", 2),
        _parity("mlm tp2 dp2", "neuron", 2, **MLM, **PLAIN),
        _parity("mlm tp2 dp2 zero1", "neuron", 2, **MLM),
        _parity("full tp2 dp2", "neuron", 2, **FULL, **PLAIN),
        _parity("full tp2 dp2 zero1", "neuron", 2, **FULL),
        _parity("mlmfull tp2 dp2 zero1", "neuron", 2, **MLM, **FULL),
        _parity("res tp2 dp2", "neuron", 2, **RES, **PLAIN),
        _parity("resfull tp2 dp2 zero1", "neuron", 2, **RES, **FULL),
        _parity("full tp2 dp2 bf16", "neuron", 2, **FULL, **PLAIN, **BF16),
        _parity("cls tp2 dp2 bf16", "neuron", 2, **BF16),
        _parity("cls tp4 bf16", "neuron", 4, **PLAIN, **BF16),
        _parity("full tp4 bf16", "neuron", 4, **FULL, **BF16),
        _parity("mlm tp2 dp2 bf16", "neuron", 2, **MLM, **BF16),
        _parity("mlmfull tp4 bf16", "neuron", 4, **MLM, **FULL, **PLAIN, **BF16),
        _parity("res tp4 bf16", "neuron", 4, **RES, **BF16),
        _parity("resfull tp2 dp2 bf16", "neuron", 2, **RES, **FULL, **PLAIN, **BF16),
        (
            "sharded",
            "load_sharded",
            {"backend": "neuron", "set": {"parallel.tp": 4}, "adapter": "{root}/1/plain/saved"},
        ),
        *_answers("neuron", 2),
    ],
    8: [
        _parity("cls tp8 padded", "neuron", 8, **PADDED, **PLAIN),
        _parity("cls tp8 padded zero1", "neuron", 8, **PADDED),
        _parity("mlm tp8 padded", "neuron", 8, **PADDED, **MLM, **PLAIN),
        _parity("mlm tp8 padded zero1", "neuron", 8, **PADDED, **MLM),
        _parity("cls tp4 dp2 zero1", "neuron", 4),
        ("tp8", "refuse", {"backend": "neuron", "set": {"parallel.tp": 8}}),
    ],
}

COMPARED = ("parity", "same_masks")
"""Functions whose every tensor is compared with the same case of one process."""
EXACT = [
    (world, name)
    for world, cases in WORLDS.items()
    for name, function, _ in cases
    if world != 1 and function in COMPARED and "bf16" not in name
]
"""(world, case) whose every tensor is compared with that of the case of the same first word in world 1."""

ROUNDED = [
    (world, name)
    for world, cases in WORLDS.items()
    for name, function, arguments in cases
    if world != 1 and function in COMPARED and name.endswith("bf16") and arguments["backend"] == "neuron"
]
"""The same in bfloat16, whose gradients are compared with those of one process of the same backend."""
BF16_GRADIENT = 0.05
"""Largest distance of a parameter's gradient in bfloat16, as a share of its norm: a hundred roundings of 2^-9 to 2^-8,
most of which cancel. A gradient that was not summed over two ranks is off by 0.2 to 0.7."""

STEP_1, STEP_20 = 1e-5, 1e-3
"""Largest difference as a share of the tensor's largest value: in step 1, and after 20 steps."""
PACKED = {"logits": 1e-5, "loss": 1e-5, "gradient": 1e-4}
"""The same of proteins in packs against each alone."""
GRADIENT_FLOOR = 1e-4
"""Gradients below this share of the largest gradient are compared with it: a key's bias has none but rounding."""
KINDS = {
    "logits": STEP_1, "loss": STEP_1, "gradient": STEP_1,
    "losses": STEP_20, "norms": STEP_20, "weight": STEP_20, "moment": STEP_20, "metric": STEP_20,
}  # fmt: skip
"""First part of a result's name -> the largest difference allowed."""


def difference(got: Any, expected: Any, least: float = 0.0) -> float:
    """Largest difference as a share of the expected tensor's largest value, or of `least` where that is larger."""
    assert all(bool(value.isfinite().all()) for value in (got, expected)), "a value is no number"
    scale = max(float(expected.abs().max()), least) or 1.0
    return float((got - expected).abs().max()) / scale


def floored(results: Mapping[str, Any]) -> list[str]:
    """Names of the gradients that are compared with GRADIENT_FLOOR, being smaller."""
    sizes = {key.split("/", 1)[1]: float(g.abs().max()) for key, g in results.items() if key.startswith("gradient/")}
    return sorted(name for name, size in sizes.items() if size < GRADIENT_FLOOR * max(sizes.values()))


def gradient_distances(got: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """Parameter -> norm of the difference of its gradients as a share of its norm, or of 1/1000 of the largest."""
    norms = {key: float(value.norm()) for key, value in expected.items() if key.startswith("gradient/")}
    least = 1e-3 * max(norms.values())
    return {key: float((got[key] - expected[key]).norm()) / max(norm, least) for key, norm in norms.items()}


def differences(got: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Kind -> its largest difference, and the tensor that has it. The names and shapes must be the same."""
    assert {key: value.shape for key, value in got.items()} == {key: value.shape for key, value in expected.items()}
    largest = max(float(value.abs().max()) for key, value in expected.items() if key.startswith("gradient/"))
    found = {key.split("/")[0]: (0.0, "") for key in expected}
    for key, value in expected.items():
        kind = key.split("/")[0]
        least = GRADIENT_FLOOR * largest if kind == "gradient" else 0.0
        found[kind] = max(found[kind], (difference(got[key], value, least), key))
    return found
