"""What comes from elsewhere and what we write passes a few doors; no other module opens files to write, or decodes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "esm_neuron"
DOORS: dict[str, tuple[str, ...]] = {
    # reading
    "json.loads": ("files.py",),
    "json.load": (),
    "yaml.": ("config/settings.py",),
    "pq.": ("data/parquet.py",),
    "pd.read_": ("data/parquet.py", "inference/stream.py"),  # workbooks; what has just been written
    "load_from_disk": ("data/parquet.py",),
    "safe_open": ("models/adapter_folder.py", "models/hf_folder.py"),  # the former names and shapes, without torch
    "load_file": (),
    "torch.load": ("models/convert.py",),
    "np.load": (),
    # writing
    "open for writing": ("files.py",),
    ".write_text": (),
    ".write_bytes": ("files.py", "training/watchdog.py"),  # it may not wait for a disk that hangs
    ".rmtree": ("files.py",),
    "save_file": ("files.py",),
    ".to_csv": (),
    ".to_parquet": (),
    "np.save": (),
    "os.open": ("cli.py", "files.py"),  # cli: the device that swallows what nobody reads
    # showing
    "print": ("cli.py",),
    "sys.stderr.write": ("cli.py",),
    "sys.stdout.write": (),
}
"""What is called -> the only modules that may call it."""


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each call; what opens a file to write is called so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            modes = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
            writes = [m for m in modes if isinstance(m, str) and len(m) <= 3 and set(m) & set("wax+")]
            if name.rpartition(".")[2] == "open" and writes:
                yield node.lineno, "open for writing"
            yield node.lineno, name


def matches(call: str, door: str) -> bool:
    """Whether a call is one of a door: by its name, its beginning (`pq.`) or its end (`.rmtree`)."""
    if door.endswith((".", "_")):
        return call.startswith(door)
    if door.startswith("."):
        return call.endswith(door) and call != f"files{door}"
    return call == door or call.endswith(f".{door}")


@pytest.fixture(scope="module")
def called() -> list[tuple[str, int, str]]:
    """Module, line and name of every call of the package."""
    return [
        (path.relative_to(SOURCES).as_posix(), line, name)
        for path in sorted(SOURCES.rglob("*.py"))
        for line, name in calls(ast.parse(path.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_the_only_way(called: list[tuple[str, int, str]], door: str) -> None:
    found = {module: line for module, line, name in called if matches(name, door)}
    others = {name: line for name, line in found.items() if name not in DOORS[door]}
    assert not others, f"{door} stands outside of {DOORS[door]}"
    assert set(DOORS[door]) <= set(found), "a door that nobody uses"


def test_the_rule_sees_what_it_forbids() -> None:
    text = 'open(p, "w"); p.open("ab"); p.open(mode="r+"); p.open("rb"); gzip.open(p, "rb"); shutil.rmtree(p); '
    text += 'a.b.write_text("x")'
    names = [name for _, name in calls(ast.parse(text))]
    assert names.count("open for writing") == 3
    assert sum(matches(name, ".rmtree") for name in names) == 1 == sum(matches(name, ".write_text") for name in names)
