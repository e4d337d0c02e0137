"""docs/dev/parity*.md: the table of every engine beside one plain CPU process, and whether the pages are of this code.

    python tools/parity_page.py             # name the pages that were made from other sources (make lint)
    python tools/parity_page.py --strict    # the same, and exit with 1 if there are any (make release-check)

The pages are written by the tests that judge the runs: `make parity NXD_SRC=<folder>`.
"""

from __future__ import annotations

import ast
import hashlib
import io
import sys
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "docs/dev/parity.md": "neuronx-distributed 0.15",
    "docs/dev/parity-nxd-0.18.md": "neuronx-distributed 0.18",
}
"""What is committed, and the library it was made with."""
ENGINE = (
    "backends/*.py",
    "distributed.py",
    "models/*.py",
    "training/build.py",
    "training/checkpoint.py",
    "training/evaluation.py",
    "training/optim.py",
    "training/trainer.py",
)
"""What decides the numbers of a parallel run, below `esm_neuron`."""
NOT_ENGINE = ("backends/cuda.py", "backends/survey.py", "models/convert.py")
"""No parity run takes these."""
PROOF = ("nxd/parity.py", "nxd/*cases.py", "nxd/worker.py", "nxd/standins/*.py", "helpers/device_run.py")
"""What runs it, below `tests`."""
WHERE: dict[int | str, str] = {
    1: "CPU",
    "xla": "XLA:CPU",
    "spmd": "XLA:CPU, SPMD on 2 x 2 devices",
    2: "NxD, 2 processes",
    4: "NxD, 4 processes",
    8: "NxD, 8 processes",
}
TASKS = {
    "cls": "sequence classification, LoRA",
    "mlm": "masked LM, LoRA",
    "full": "sequence classification, all weights",
    "mlmfull": "masked LM, all weights",
    "res": "residue classification, LoRA",
    "resfull": "residue classification, all weights",
    "dropcls": "sequence classification, LoRA, dropout",
    "dropfull": "sequence classification, all weights, dropout",
}


def sources() -> list[Path]:
    """Return the files that decide what the pages say. Raises FileNotFoundError where a pattern matches none."""
    found: list[Path] = []
    for folder, patterns in ((ROOT / "esm_neuron", ENGINE), (ROOT / "tests", PROOF)):
        for pattern in patterns:
            files = sorted(folder.glob(pattern))
            if not files:
                raise FileNotFoundError(f"{folder / pattern}: there is no such file; mend the lists in {__file__}")
            found += (file for file in files if str(file.relative_to(folder)) not in NOT_ENGINE)
    return found


def digest() -> str:
    """Return the sha256 of the sources, names included, comments, docstrings and empty lines left out."""
    found = hashlib.sha256()
    for file in sources():
        code = code_alone(file.read_text(encoding="utf-8"))
        found.update(f"{file.relative_to(ROOT)}\n{code}\n".encode())
    return found.hexdigest()


def code_alone(source: str) -> str:
    """Return the lines of code without comments and docstrings.

    By line and column, which every version of Python counts alike; `ast.dump` differs between them.
    """
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            rows = range(node.lineno - 1, node.end_lineno or node.lineno)
            lines[rows.start : rows.stop] = [""] * len(rows)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def page(version: str, compared: Mapping[tuple[int | str, str], Mapping[str, float]], facts: Iterable[str]) -> str:
    """Return the page: the table, and what else the run showed, one paragraph or list item each.

    Args:
        version: of neuronx-distributed.
        compared: (world, case) of `tests/nxd/parity.py` -> largest difference by kind.
        facts: lines below the table.
    """
    from parity import GRADIENT_FLOOR, KINDS, STEP_1, STEP_20  # on the path of the tests, which alone write the page

    columns = list(KINDS)
    lines = [
        "# Parity",
        "",
        f"Made by `make parity NXD_SRC=<folder>` with neuronx_distributed {version}; not edited by hand.",
        "When the sources of the engine or of its cases have changed since, `make lint` warns and `make release-check`",
        "fails.",
        "",
        f"Sources, sha256: `{digest()}`",
        "",
        "Each line is one run of 20 steps of the shape `tiny` (dropout 0, float32, clipped at 0.5, warm-up and cosine)",
        "beside the same run on one plain CPU process. A number is the largest difference of any tensor of its kind as",
        f"a share of that tensor's largest value. Gradients below {GRADIENT_FLOOR:g} of the model's largest are",
        f"divided by that floor (the tensors are named below). Allowed: {STEP_1:g} for logits, loss and every gradient",
        f"of step 1; {STEP_20:g} for what comes after: losses and norms of all steps, and after 20 steps weights,",
        "AdamW moments and the metrics of an evaluation over all ranks.",
        "",
        "| task | where | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for (world, name), kinds in compared.items():
        task, _, how = name.partition(" ")
        where = f"{WHERE[world]}{': ' if how else ''}{how}"
        lines.append(f"| {TASKS[task]} | {where} | " + " | ".join(f"{kinds[kind]:.1e}" for kind in columns) + " |")
    return "\n".join([*lines, "", *facts, ""])


def stale() -> list[str]:
    """Return a line for each page that is missing or was made from other sources, with the command that makes it."""
    today = f"sha256: `{digest()}`"
    found = []
    for name, version in PAGES.items():
        file = ROOT / name
        if not file.exists() or today not in file.read_text(encoding="utf-8"):
            state = "was made from other sources than these" if file.exists() else "is missing"
            found.append(f"{name} {state}; run make parity NXD_SRC=<folder of {version}> PAGE={name}")
    return found


if __name__ == "__main__":
    for line in stale():
        print(line if "--strict" in sys.argv[1:] else f"warning: {line}", file=sys.stderr)
    sys.exit("--strict" in sys.argv[1:] and bool(stale()))
