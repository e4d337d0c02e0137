"""Run transformers' and PEFT's own common tests on our pooled classes and exports, and on Hugging Face's as control.

The tests come from the source archives of the installed versions, which pip fetches as it is set up here, into a folder
that is removed. What fails for the control as well is theirs; what a pooled class refuses in one sentence is by design.
Anything beyond is a failure, and the exit code 1.

    python tools/peers.py [INTERPRETER]    (default: this one; its versions are compared)
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

CASES = Path(__file__).parents[1] / "tests" / "peers" / "cases.py"
LIBRARIES = ("transformers", "peft")
NEEDED = "parameterized"
"""What transformers' tests import and no environment here has."""
REFUSED = re.compile(r"takes no (inputs_embeds|output_attentions|output_hidden_states)")
KNOWN = {
    "test_retain_grad_hidden_states_attentions": "asks by the configuration for what the class refuses as an argument",
    "test_delete_adapter": "PEFT 0.17, no adapter left: the model looks into its head, which is an empty wrapper then",
    "test_delete_inactive_adapter": "as test_delete_adapter",
}
"""Tests that fail for a pooled class alone, and why."""


def fetch(folder: Path, python: str) -> None:
    """Download and unpack the archives of an interpreter's versions, and what their tests import."""
    asked = f"from importlib.metadata import version; print(*map(version, {LIBRARIES}))"
    found = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    versions = dict(zip(LIBRARIES, found, strict=True))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = ["download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder)]
    subprocess.run([*pip, *source, *(f"{name}=={each}" for name, each in versions.items())], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "packages"), NEEDED], check=True)
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as opened:
            opened.extractall(folder, [m for m in opened if "/tests/" in m.name], filter="data")
    for name, each in versions.items():
        print(f"{name} {each}")
        if not (folder / f"{name}-{each}" / "tests").is_dir():
            raise SystemExit(f"the source archive of {name} {each} has no tests; nothing was compared")


def outcomes(folder: Path, python: str) -> dict[str, dict[str, dict[str, str]]]:
    """Run the cases; return suite -> model -> test -> what failed, "" where it passed. Skipped ones are left out."""
    report, settings = folder / "report.xml", folder / "pytest.ini"
    settings.write_text("[pytest]\n")  # without our own: their markers are not ours
    words = ["-c", str(settings), "-p", "no:cacheprovider", "--tb=line", "--show-capture=no", f"--junitxml={report}"]
    paths = os.pathsep.join(map(str, (CASES.parents[2], CASES.parents[1])))
    environment = os.environ | {"PEERS": str(folder), "PYTHONPATH": paths}
    asked = [python, "-m", "pytest", "-q", *words, str(CASES)]
    subprocess.run(asked, env=environment, check=False, stdout=subprocess.DEVNULL)
    if not report.is_file():
        raise SystemExit(f"{python} has run no test; it needs what make install and make install-trn1 set up")
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for case in ET.parse(report).iter("testcase"):
        name, home = case.get("name", ""), case.get("classname", "").rpartition(".")[2]
        parts = re.fullmatch(r"test_common\[(\w+)-_?(\w+)\]", name)
        suite, model, test = ("peft", parts[1], parts[2]) if parts else ("transformers", home[4:].lower(), name)
        failed = next((child for child in case if child.tag in ("failure", "error")), None)
        if case.find("skipped") is None:
            found[suite][model][test] = "" if failed is None else failed.get("message", "") or "failed"
    return found


COLUMNS = {"tests": 6, "passed": 8, "as control": 12, "refused": 9, "known": 7, "skipped": 9, "beyond": 8}
"""Heading of the table -> its width. `tests` were not skipped; `skipped` were for a class of ours alone."""


def compare(found: dict[str, dict[str, dict[str, str]]]) -> int:
    """Print a table and each failure beyond the control's; return how many there are."""
    beyond = 0
    print(f"{'suite':<14}{'model':<11}" + "".join(f"{head:>{width}}" for head, width in COLUMNS.items()))
    for suite, models in sorted(found.items()):
        control = models["control"]
        for model, tests in models.items():
            failed = {name: text for name, text in tests.items() if text}
            shared = {name for name in failed if model == "control" or control.get(name)}
            refused = {name for name, text in failed.items() if REFUSED.search(text)} - shared
            known = (failed.keys() & KNOWN) - shared
            rest = failed.keys() - shared - refused - known
            skipped = control.keys() - tests.keys()
            counts = (len(tests), len(tests) - len(failed), *map(len, (shared, refused, known, skipped, rest)))
            shown = (f"{count:>{width}}" for count, width in zip(counts, COLUMNS.values(), strict=True))
            print(f"{suite:<14}{model:<11}{''.join(shown)}")
            if skipped:
                print(f"  skipped: {', '.join(sorted(skipped))}")
            for name in sorted(known | rest):
                print(f"  {name}: {KNOWN.get(name) or ' '.join(failed[name].split())[:200]}")
            beyond += len(rest)
    return beyond


if __name__ == "__main__":
    interpreter = sys.argv[1] if len(sys.argv) > 1 else sys.executable
    with tempfile.TemporaryDirectory(prefix="esm-neuron-peers-") as place:
        fetch(Path(place), interpreter)
        raise SystemExit(1 if compare(outcomes(Path(place), interpreter)) else 0)
