"""Commands in the pages for newcomers: every one is understood, and those of the first page are run, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers.intake import protein

from esm_neuron import cli
from esm_neuron.config import TrainConfig, rules, settings
from esm_neuron.config.flags import command_parser

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [*sorted((DOCS / "start").glob("*.md")), *sorted((DOCS / "tasks").glob("*.md")),
         DOCS / "ten-settings.md", DOCS / "faq.md"]  # fmt: skip


def commands(page: Path) -> list[list[str]]:
    """The words of each `esm-neuron` command in a page's blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("esm-neuron ")]
    return [words[1:] for words in found]


EVERY = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), EVERY, ids=[f"{page.stem}: {' '.join(words)}" for page, words in EVERY])
def test_a_command_is_understood(page: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DOCS.parent)
    length = 2 if words[0] == "data" else 1
    name, rest = " ".join(words[:length]), words[length:]
    args, more = command_parser(name, cli.COMMANDS[name]).parse_known_args(rest)
    if name == "data check":
        settings.override(TrainConfig(), more, ("config", *cli._taken("data check")), name)
    elif name in ("train", "plan"):
        if "--config" in more and not Path(more[more.index("--config") + 1]).exists():  # one that a command has written
            place = more.index("--config")
            more[place : place + 2] = ["--data.train", "my.fasta"]
        rules.validate(settings.parse(more))
    elif more:
        settings.override(TrainConfig(), more, cli._taken(name), name)
    assert args is not None


def test_the_pages_have_commands() -> None:
    assert all(commands(page) for page in PAGES) and len(EVERY) >= 30


def test_the_first_page_works_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On forty proteins, from an empty folder; but for the last two commands, whose training is another test's."""
    monkeypatch.chdir(tmp_path)
    rows = [(f"p{n}", ("Membrane", "Nucleus")[n % 2], protein(n, 60)) for n in range(40)]
    Path("my.fasta").write_text("".join(f">{name} label={label}\n{residues}\n" for name, label, residues in rows))
    Path("new.fasta").write_text(f">n1\n{protein(99, 50)}\n>n2\n{protein(98, 70)}\n")
    for words in commands(DOCS / "start" / "cpu.md")[:4]:
        assert cli.main(words) == 0, capsys.readouterr().err
    assert Path("runs/mine/report/index.html").is_file()
    assert [line.split(",")[0] for line in Path("answers.csv").read_text().splitlines()] == ["id", "n1", "n2"]
