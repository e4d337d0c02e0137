"""What comes from elsewhere and what we write passes a few doors; no other module opens files, decodes, or deletes.

The doors are `files.py`, `config/settings.py` (YAML), `data/text_files.py`, `data/parquet.py` and `data/lmdb.py`
(records), and `models/hf_folder.py` (weights). What else touches a file is listed with its reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOOR = "it is the door"
CACHE = "our own files, in a folder that cache.cached makes whole"
KERNEL = "the kernel's own files below /proc and /sys"
SPOOL = "the pieces of an input, in a folder that is claimed, each compared with its hash"
ASIDE = "within a folder that new_folder yields, not yet in its place"
DOORS: dict[str, dict[str, str]] = {
    # reading
    "json.loads": {"files.py": DOOR},
    "json.load": {},
    "yaml.": {"config/settings.py": DOOR, "launchers/sagemaker/job.py": "the list of images beside it"},
    "open to read": {
        "files.py": DOOR,
        "config/settings.py": DOOR,
        "data/text_files.py": DOOR,
        "data/lmdb.py": DOOR,
        "data/splits.py": CACHE,
        "data/validation.py": "the first bytes of a list that we may have written",
        "data/homology.py": "what MMseqs2 has written to a folder of ours",
        "inference/stream.py": "shards, after their sums were compared",
    },
    ".read_text": {
        "files.py": KERNEL,
        "compat.py": "metadata of an installed package",
        "config/threads.py": KERNEL,
        "models/cpu_attention.py": KERNEL,
        "backends/neuron_env.py": KERNEL,
        "backends/neuron_sdk.py": KERNEL,
        "launchers/sagemaker/job.py": "the list of images beside it, and a config that was parsed before",
        "launchers/sagemaker/stage.py": "our own locks and the list of an image's packages",
    },
    ".read_bytes": {},
    "gzip.open": {"data/text_files.py": DOOR},
    "zipfile.": {"data/parquet.py": DOOR, "models/convert.py": "tells the formats of pickles apart"},
    "tarfile.": {
        "launchers/sagemaker/hosting.py": "writes an archive, aside",
        "launchers/sagemaker/jobs.py": "unpacks a job's result by the filter `data`, into what new_folder yields",
        "launchers/sagemaker/stage.py": "writes an archive in a temporary folder",
    },
    "pq.": {"data/parquet.py": DOOR},
    "pa.ipc.": {"data/dataset.py": CACHE, "data/splits.py": CACHE, "inference/spool.py": SPOOL},
    "pa.memory_map": {"data/dataset.py": CACHE, "data/splits.py": CACHE, "inference/spool.py": SPOOL},
    "np.memmap": {"data/dataset.py": CACHE, "files.py": DOOR},
    "np.fromfile": {},
    "np.load": {},
    "np.loadtxt": {},
    "np.genfromtxt": {},
    "pd.read_": {"data/parquet.py": DOOR, "inference/stream.py": "what has just been written"},
    "load_from_disk": {"data/parquet.py": DOOR},
    "load_dataset_builder": {"data/parquet.py": DOOR},
    "load_dataset": {},
    "safe_open": {"models/adapter_folder.py": "names and shapes, without torch", "models/hf_folder.py": DOOR},
    "load_file": {},
    "torch.load": {"models/convert.py": "weights_only=True"},
    "pickle.": {},
    # writing
    "open to write": {"files.py": DOOR, "launchers/sagemaker/entry.py": "the first of several ranks alone may write"},
    ".write_text": {},
    ".write_bytes": {"files.py": DOOR, "training/watchdog.py": "it may not wait for a disk that hangs"},
    "save_file": {"files.py": DOOR},
    "torch.save": {},
    "np.save": {},
    "np.savez": {},
    "np.savetxt": {},
    ".tofile": {},
    ".to_csv": {},
    ".to_parquet": {},
    ".to_json": {},
    ".to_excel": {},
    ".to_pickle": {},
    ".savefig": {"reports/charts.py": "into memory"},
    ".save_pretrained": {"training/results.py": ASIDE},
    "SummaryWriter": {"training/trackers.py": "TensorBoard's own files, in a folder of its own"},
    "shutil.copy": {
        "data/remote.py": "between two open files",
        "inference/stream.py": "between two open files",
        "models/convert.py": ASIDE,
        "launchers/sagemaker/entry.py": "fills the folder that SageMaker made for the model",
        "launchers/sagemaker/hosting.py": "fills a temporary folder",
        "launchers/sagemaker/stage.py": "fills a temporary folder",
    },
    "tempfile.": {
        "data/remote.py": "what is read from its end, while it is read",
        "files.py": DOOR,
        "api.py": "for data frames, while a call lasts",
        "data/check.py": "tokens for the search of homologs, mapped",
        "data/homology.py": "for MMseqs2",
        "data/tokenizer.py": "for transformers' tokenizer",
        "launchers/sagemaker/hosting.py": "beside its output",
        **dict.fromkeys((f"launchers/sagemaker/{name}.py" for name in ("launch", "jobs", "sdk", "tune")), "archives"),
        "launchers/ray/answers.py": "what goes to a bucket or comes from one, while it is copied",
    },
    "os.open": {"cli.py": "the device that swallows what nobody reads", "files.py": DOOR},
    # moving and deleting
    "move a file": {"files.py": DOOR},
    ".rename": {
        "files.py": DOOR,
        "models/hf_folder.py": ASIDE,
        "training/checkpoint.py": "checkpoints, which are known by their manifests",
    },
    "shutil.move": {},
    "os.link": {},
    ".symlink_to": {},
    ".rmtree": {"files.py": DOOR},
    ".unlink": {
        "files.py": DOOR,
        "data/splits.py": CACHE,
        "data/validation.py": "a list that is ours by its header",
        "inference/spool.py": SPOOL,
    },
    "os.remove": {},
    # showing
    "print": {
        "cli.py": DOOR,
        "launchers/sagemaker/launch.py": "the request, for people and other programs",
        "launchers/sagemaker/tune.py": "the request, for people and other programs",
        "launchers/sagemaker/deploy.py": "the request, for people and other programs",
        "launchers/sagemaker/jobs.py": "what was asked for, through shown",
        "api.py": "progress in a notebook, through shown",
    },
    "sys.stderr.write": {
        "cli.py": DOOR,
        **dict.fromkeys(
            (f"launchers/sagemaker/{n}.py" for n in ("deploy", "hosting", "launch", "jobs", "tune")), "through shown"
        ),
        "launchers/ray/answers.py": "through shown",
    },
    "sys.stdout.write": {},
}
"""What is called -> the only modules that may call it, and why."""


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each call; what opens a file or moves one is called so besides."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield node.lineno, name
            last = name.rpartition(".")[2]
            if last == "open" and name.partition(".")[0] not in ("gzip", "os", "tarfile", "zipfile"):
                values = (*node.args, *(keyword.value for keyword in node.keywords))
                modes = [str(value.value) for value in values if isinstance(value, ast.Constant)]
                writes = [mode for mode in modes if len(mode) <= 3 and set(mode) & set("wax+")]
                yield node.lineno, "open to write" if writes else "open to read"
            one = "." in name and len(node.args) == 1 and not node.keywords  # of text two, of a dataclass keywords
            if last == "replace" and (one or name == "os.replace"):
                yield node.lineno, "move a file"


def matches(call: str, door: str) -> bool:
    """Whether a call is one of a door: by its name, its beginning (`pq.`, `shutil.copy`) or its end (`.rmtree`)."""
    if door.endswith((".", "_")) or door == "shutil.copy":
        return call.startswith(door)
    if door.startswith("."):
        return call.endswith(door) and call != f"files{door}"
    return call == door or call.endswith(f".{door}")


@pytest.fixture(scope="module")
def called() -> list[tuple[str, int, str]]:
    """Module, line and name of every call of the package, by its name there, and of the launchers."""
    package = ROOT / "esm_neuron"
    files = {path.relative_to(package).as_posix(): path for path in sorted(package.rglob("*.py"))}
    files |= {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "launchers").rglob("*.py"))}
    assert len(files) > 100
    return [
        (module, line, name)
        for module, path in files.items()
        for line, name in calls(ast.parse(path.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_the_only_way(called: list[tuple[str, int, str]], door: str) -> None:
    found = {module: line for module, line, name in called if matches(name, door)}
    others = {name: line for name, line in found.items() if name not in DOORS[door]}
    assert not others, f"{door} stands outside of {DOORS[door]}"
    assert set(DOORS[door]) <= set(found), "a door that nobody uses"


@pytest.mark.parametrize(
    ("text", "door"),
    [
        ('open(p, "w")', "open to write"),
        ('p.open("ab")', "open to write"),
        ('p.open(mode="r+")', "open to write"),
        ('p.open("rb")', "open to read"),
        ("p.open()", "open to read"),
        ("shutil.rmtree(p)", ".rmtree"),
        ('a.b.write_text("x")', ".write_text"),
        ("pa.ipc.new_file(p, s)", "pa.ipc."),
        ("pq.write_table(t, p)", "pq."),
        ("shutil.copy2(a, b)", "shutil.copy"),
        ("shutil.copytree(a, b)", "shutil.copy"),
        ("os.replace(a, b)", "move a file"),
        ("aside.replace(target)", "move a file"),
        ("os.rename(a, b)", ".rename"),
        ("folder.rename(x)", ".rename"),
        ("np.save(p, a)", "np.save"),
        ("Path(p).write_bytes(b)", ".write_bytes"),
    ],
)
def test_the_rule_sees_what_it_forbids(text: str, door: str) -> None:
    assert sum(matches(name, door) for _, name in calls(ast.parse(text))) == 1


@pytest.mark.parametrize("text", ['t.replace("a", "b")', "replace(cfg, seed=1)", "gzip.open(p)", "t.rename_columns(n)"])
def test_the_rule_lets_pass_what_touches_no_file_of_its_own(text: str) -> None:
    doors = ("open to read", "open to write", "move a file", ".rename")
    assert not any(matches(name, door) for _, name in calls(ast.parse(text)) for door in doors)
