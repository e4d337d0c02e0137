"""docs/commands.md and its pictures: the help of each command; start and end of a run, on a terminal and in a log.

    python tools/screens.py     # writes docs/screens/run-*.svg: trains twice, a minute or two each

The page and the help are current by `make pages`. The runs are not: their times are those of a machine.
"""

from __future__ import annotations

import codecs
import csv
import fcntl
import gzip
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from esm_neuron import cli  # noqa: E402 - of this folder, also where another one is installed

COLUMNS, ROWS = 120, 42
"""Of the terminal."""
SIZE, LETTER, LINE, MARGIN = 13, 7.8, 17, 16
"""Pixels: letters, their width, from line to line, around the text."""
TRAIN = "esm-neuron train my.csv --label location --test_fraction 0.2 --adapter lora --epochs 4 --output runs/mine"
RUNS = {
    "run-start": "On a terminal, while it trains",
    "run-end": "On a terminal, at its end",
    "log-start": "With `> run.log 2>&1`, the first lines",
    "log-end": "The last lines of the log",
}
"""Picture of a run -> what it shows."""
TRAINING = r"training: +[4-9]\d%"
"""What stands on the terminal when the first picture is taken."""


def page() -> str:
    """Return docs/commands.md."""
    rows, screens = [], []
    for name, command in cli.COMMANDS.items():
        lines, about = help_lines(name), (command.__doc__ or "").partition("\n")[0]
        rows.append(f"| [{name}](#{name.replace(' ', '-')}) | {len(lines)} | {about} |")
        screens += ["", f"## {name}", f"![esm-neuron {name} --help]({file(name)})"]
    runs = [f"\n{told}:\n\n![{told}](screens/{name}.svg)" for name, told in RUNS.items()]
    return "\n".join([
        "# Commands",
        f"`esm-neuron --help` lists the commands. `esm-neuron COMMAND --help` is a screen of at most {ROWS} lines;",
        "`--help all` adds every setting that the command takes ([settings.md](settings.md)).",
        "",
        "| command | lines of its help | what it does |",
        "|---|---|---|",
        *rows,
        "",
        "## A run",
        f"`{TRAIN}`, with 600 proteins of the demo on two cores:",
        *runs,
        *screens,
    ]) + "\n"  # fmt: skip


def file(command: str) -> str:
    """Return the picture of a command's help, from docs/."""
    return f"screens/{command.replace(' ', '-')}.svg"


def help_lines(command: str) -> list[str]:
    """Return what `--help` of a command shows."""
    with redirect_stdout(io.StringIO()) as said:
        cli.main([*command.split(), "--help"])
    return said.getvalue().splitlines()


def help_picture(command: str) -> str:
    """Return the help of a command as a picture."""
    return picture([f"$ esm-neuron {command} --help", *help_lines(command)])


def picture(lines: Sequence[str]) -> str:
    """Return lines of a terminal as an SVG with text, which is small and can be searched."""
    width, height = COLUMNS * LETTER + 2 * MARGIN, len(lines) * LINE + 2 * MARGIN
    rows = [
        f'<text xml:space="preserve" x="{MARGIN}" y="{MARGIN + LINE * number + SIZE}" '
        f'textLength="{len(line) * LETTER:g}">{escape(line, quote=False)}</text>'
        for number, line in enumerate(lines)
        if line
    ]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height}">',
        f'<rect width="{width:g}" height="{height}" rx="8" fill="#f6f8fa"/>',
        '<g font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"'
        f' font-size="{SIZE}" fill="#1f2328">',
        *rows,
        "</g>",
        "</svg>",
    ]) + "\n"  # fmt: skip


class Screen:
    """What a terminal of COLUMNS shows; a line that is too long goes on in the next one."""

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0

    def feed(self, text: str) -> None:
        """Take what a program writes: letters, and the control sequences that tqdm has."""
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|[^\x1b]", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self._down()
            elif part == "\x1b[A":
                self.row -= 1
            elif part == "\x1b[K":
                self.lines[self.row] = self.lines[self.row][: self.column]
            elif not part.isprintable():
                raise ValueError(f"a screen here does not know {part!r}")
            else:
                if self.column == COLUMNS:
                    self._down()
                    self.column = 0
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1

    def _down(self) -> None:
        self.row += 1
        self.lines += [""] * (self.row == len(self.lines))

    def text(self) -> list[str]:
        """Return all lines, those that have been scrolled away too."""
        return "\n".join(line.rstrip() for line in self.lines).rstrip().split("\n")


def wrapped(lines: Sequence[str]) -> list[str]:
    """Return lines as a terminal shows them."""
    screen = Screen()
    screen.feed("\r\n".join(lines))
    return screen.text()


def recorded(words: Sequence[str], folder: Path, env: Mapping[str, str], moment: str) -> tuple[list[str], list[str]]:
    """Run a command on a pseudo-terminal; return its screen when it first matches `moment`, and at the end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(words, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen, letters, then = Screen(), codecs.getincrementaldecoder("utf-8")(), list[str]()
    while True:
        try:
            screen.feed(letters.decode(os.read(ours, 4096)))
        except OSError:  # the command has ended
            break
        if not then and re.search(moment, "\n".join(screen.text()[-ROWS:])):
            then = screen.text()[-ROWS:]
    os.close(ours)
    if process.wait() or not then:
        raise SystemExit("\n".join(screen.text()))
    return then, screen.text()[-ROWS:]


def write_proteins(path: Path) -> None:
    """Write 600 short proteins of the demo."""
    with gzip.open(ROOT / "examples/demo/localization.tsv.gz", "rt") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if len(row["sequence"]) < 200]
    lines = [f"{row['entry']},{row['sequence']},{row['label']}\n" for row in rows[:: len(rows) // 600][:600]]
    path.write_text("".join(["id,sequence,location\n", *lines]), encoding="utf-8")


def main() -> None:
    """Run the command at the top of this file."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "esm_neuron.cli", *TRAIN.split()[1:]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_proteins(folder / "my.csv")
        start, end = recorded(words, folder, env, TRAINING)
        (folder / "runs/mine").rename(folder / "runs/first")
        with (folder / "run.log").open("wb") as file:
            subprocess.run(words, cwd=folder, env=env, stdout=file, stderr=file, check=True)
        log = [f"$ {TRAIN} > run.log 2>&1", *(folder / "run.log").read_text(encoding="utf-8").splitlines()]
    shots = {
        "run-start": [f"$ {TRAIN}", *start],
        "run-end": end,
        "log-start": wrapped(log[:20]),
        "log-end": wrapped(log[-14:]),
    }
    for shot, lines in shots.items():
        (ROOT / "docs/screens" / f"{shot}.svg").write_text(picture(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
